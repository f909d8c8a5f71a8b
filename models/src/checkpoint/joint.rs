//! Stable Diffusion 3's text encoders in a folder: two of CLIP's, and T5's, which may be missing.

use candle_core::Device;

use super::{
    parts::{TextConfig, TextPart},
    t5,
};
use crate::{
    Conditioning, Error, NetworkConfig, Result,
    text::{
        Tokenizer,
        joint::{JointTokenizer, T5_TOKENS},
        t5::T5Encoder,
    },
};

/// What turns prompts into tokens for all of them.
///
/// # Errors
/// As [`TextPart::tokenizer`].
pub(super) fn tokenizer(first: &TextPart, third: Option<&TextPart>) -> Result<Tokenizer> {
    let t5 = third.map(TextPart::t5_tokenizer).transpose()?;
    let tokenizer = JointTokenizer::new(first.clip_tokenizer()?, t5);
    Ok(Tokenizer::Joint(Box::new(tokenizer)))
}

/// T5's encoder, where it is there.
///
/// # Errors
/// As [`t5::encoder`].
pub(super) fn t5(third: Option<&TextPart>, device: &Device) -> Result<Option<T5Encoder>> {
    let Some(TextPart { encoder, .. }) = third else { return Ok(None) };
    match &encoder.config {
        TextConfig::T5 { config, .. } => {
            t5::encoder(config.clone(), &encoder.folder, device).map(Some)
        }
        // Refused where the index was read.
        TextConfig::Clip(_) => Err(Error::value("text_encoder_3", "CLIP's", "must be T5's")),
    }
}

/// The network as its text encoders speak to it, once they fit; `file` is its configuration.
///
/// # Errors
/// [`Error::Value`] naming the field that does not fit.
pub(super) fn fitted(
    network: NetworkConfig,
    text: &[TextPart],
    file: &str,
) -> Result<NetworkConfig> {
    let geometry = network.geometry();
    let [first, second, others @ ..] = text else {
        let remedy = "must be there: two of CLIP's read its prompts";
        return Err(Error::value("text_encoder_2", "absent", remedy));
    };
    let [first, second] = [first, second].map(|part| &part.encoder.config);
    let own = geometry.prompt.map_or(0, |prompt| prompt.width);
    let refuse = |field: &str, value: usize, remedy: String| {
        Err(Error::value(format!("{file}: {field}"), value, remedy))
    };
    if let Some(third) = others.first().map(|part| &part.encoder.config)
        && third.width() != own
    {
        let remedy = format!(
            "must be {}, the {} of text_encoder_3; use the text encoder that belongs to the network",
            third.width(),
            third.width_field()
        );
        return refuse(network.prompt_field(), own, remedy);
    }
    let side_by_side = first.width() + second.width();
    if side_by_side > own {
        let remedy = format!(
            "must be at least {side_by_side}, the hidden_sizes of text_encoder and text_encoder_2 together"
        );
        return refuse(network.prompt_field(), own, remedy);
    }
    let pooled = first.pooled().unwrap_or(0) + second.pooled().unwrap_or(0);
    match geometry.conditioning {
        Conditioning::TextTime { text, .. } if text != pooled => {
            let remedy = format!(
                "must be {pooled}, the projection_dims of text_encoder and text_encoder_2 together"
            );
            return refuse("pooled_projection_dim", text, remedy);
        }
        _ => {}
    }
    if second.tokens() != first.tokens() {
        let remedy = format!("must be {}, as of text_encoder", first.tokens());
        let field = "text_encoder_2: max_position_embeddings";
        return Err(Error::value(field, second.tokens(), remedy));
    }
    let resized = network.at([geometry.height, geometry.width], first.tokens() + T5_TOKENS);
    resized.unwrap_or(Ok(network))
}
