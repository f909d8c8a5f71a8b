//! What `model_index.json` says a folder holds: a network, and around it what makes images of latents and numbers of
//! prompts.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::file::read_json;
use super::weight_files::{DIFFUSERS, Stem, TRANSFORMERS};
use crate::autoencoder::AutoencoderConfig;
use crate::text::{
    Tokenizer,
    clip::{ClipConfig, ClipTokenizer},
    joint::T5_TOKENS,
    t5::{T5Config, T5Tokenizer},
};
use crate::weights::Shapes;
use crate::{Error, NetworkConfig, Result};

/// A part of a folder beside its network: what its configuration tells, and where it is.
#[derive(Debug)]
pub struct Part<C> {
    /// Its configuration.
    pub config: C,
    /// Its folder.
    pub(super) folder: PathBuf,
}

/// A text encoder of a folder, and its tokenizer.
#[derive(Debug)]
pub struct TextPart {
    /// The encoder.
    pub encoder: Part<TextConfig>,
    /// The tokenizer's folder.
    pub(super) tokenizer: PathBuf,
}

/// What a text encoder's configuration tells.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum TextConfig {
    /// Of CLIP's.
    Clip(ClipConfig),
    /// Of T5's.
    T5 {
        /// The encoder.
        config: T5Config,
        /// Tokens of a prompt at most, its end among them: the pipeline's.
        tokens: usize,
    },
}

impl TextConfig {
    /// Tokens of a prompt, those that begin and end it among them: exactly so many of CLIP's, at most of T5's.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Clip(config) => config.tokens(),
            Self::T5 { tokens, .. } => *tokens,
        }
    }

    /// Numbers of a token's hidden state.
    pub fn width(&self) -> usize {
        match self {
            Self::Clip(config) => config.width(),
            Self::T5 { config, .. } => config.width(),
        }
    }

    /// Numbers of what is pooled; nothing where nothing is.
    pub(super) fn pooled(&self) -> Option<usize> {
        match self {
            Self::Clip(config) => Some(config.pooled()),
            Self::T5 { .. } => None,
        }
    }

    /// Names and shapes of all weights.
    pub fn weight_shapes(&self) -> Shapes {
        match self {
            Self::Clip(config) => config.weight_shapes(),
            Self::T5 { config, .. } => config.weight_shapes(),
        }
    }

    fn vocabulary(&self) -> usize {
        match self {
            Self::Clip(config) => config.vocabulary(),
            Self::T5 { config, .. } => config.vocabulary(),
        }
    }

    /// The field of `config.json` that tells [`TextConfig::width`].
    pub(super) fn width_field(&self) -> &'static str {
        match self {
            Self::Clip(_) => "hidden_size",
            Self::T5 { .. } => "d_model",
        }
    }
}

/// What a folder has around its network.
#[derive(Debug)]
pub(super) struct Parts {
    /// The component that is the network: its name.
    pub(super) network: &'static str,
    /// Between latents and images.
    pub(super) autoencoder: Option<Part<AutoencoderConfig>>,
    /// From prompts to hidden states: one, or two or three that read the same prompt.
    pub(super) text: Vec<TextPart>,
    /// Whether an empty negative prompt is told as zeros instead of being read.
    pub(super) zero_empty_prompt: bool,
    /// Components that are there and have no part in making images.
    pub(super) idle: Vec<String>,
}

/// Components that judge images, or look at some that are given.
pub(super) const IDLE: [&str; 3] = ["safety_checker", "feature_extractor", "image_encoder"];
const AUTOENCODERS: [&str; 2] = ["vae", "vqvae"];
/// Text encoders, each with its tokenizer.
const TEXT: [[&str; 2]; 3] = [
    ["text_encoder", "tokenizer"],
    ["text_encoder_2", "tokenizer_2"],
    ["text_encoder_3", "tokenizer_3"],
];
/// Files of a tokenizer; which of them there are differs.
pub(super) const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
];
/// Folders of text encoders.
pub(super) const TEXT_ENCODERS: [&str; 3] = [TEXT[0][0], TEXT[1][0], TEXT[2][0]];
/// Folders of tokenizers.
pub(super) const TOKENIZER_FOLDERS: [&str; 3] = [TEXT[0][1], TEXT[1][1], TEXT[2][1]];
const CLIP_TOKENIZERS: [&str; 2] = ["CLIPTokenizer", "CLIPTokenizerFast"];
/// The class of CLIP's encoder whose pooled text is projected.
const PROJECTING: &str = "CLIPTextModelWithProjection";
const T5_TOKENIZERS: [&str; 2] = ["T5Tokenizer", "T5TokenizerFast"];
/// Pipelines whose prompts T5 reads, and how many tokens these have at most.
const T5_PIPELINES: [(&str, usize); 2] =
    [("PixArtAlphaPipeline", 120), ("PixArtSigmaPipeline", 300)];
/// The network that CLIP and T5 read prompts for together.
const JOINT: (&str, &str) = ("transformer", "SD3Transformer2DModel");
/// diffusers' name of a DiT in folders from before it had one of its own.
const FORMER_DIT: (&str, &str) = ("transformer", "Transformer2DModel");

impl Parts {
    /// Reads `model_index.json` and the configurations of what it names, but for the network and the schedule.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file; [`Error::Value`] naming the field that cannot be honoured.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let file = path.join("model_index.json");
        let index = read_json(&file)?;
        let refuse = |problem: String| Error::Format { path: file.clone(), problem };
        let class = |component: &str| index[component][1].as_str();
        let mut families = NetworkConfig::FAMILIES.iter();
        let family = families.find(|(component, name)| class(component) == Some(name));
        let former = || (class(FORMER_DIT.0) == Some(FORMER_DIT.1)).then_some(FORMER_DIT.0);
        let Some(network) = family.map(|(component, _)| *component).or_else(former) else {
            return Err(refuse(unknown_family(&index)));
        };
        let known = |name: &str| {
            name == network
                || name == "scheduler"
                || TEXT.as_flattened().contains(&name)
                || AUTOENCODERS.contains(&name)
        };
        let mut idle = Vec::new();
        for (name, value) in index.as_object().into_iter().flatten() {
            // What is no pair is a setting of the pipeline, and a component of no class is not there.
            let Some(class) = value[1].as_str().filter(|_| !name.starts_with('_')) else {
                continue;
            };
            if IDLE.contains(&name.as_str()) {
                idle.push(name.clone());
            } else if !known(name) {
                let problem = format!(
                    "`{name}` is a {class}, which changes what the model makes and is not supported; use a model without it"
                );
                return Err(refuse(problem));
            }
        }
        let mut autoencoders = AUTOENCODERS.iter().filter(|name| class(name).is_some());
        let autoencoder = autoencoders.next().map(|name| {
            let class = class(name).unwrap_or_default();
            if !AutoencoderConfig::CLASSES.contains(&class) {
                let known = AutoencoderConfig::CLASSES.join(", ");
                return Err(refuse(format!("`{name}` is a {class}, only {known} are supported")));
            }
            let folder = path.join(name);
            let file = folder.join("config.json");
            let config = AutoencoderConfig::from_json(&needed(&file, name)?, &shown(&file))?;
            Ok(Part { config, folder })
        });
        if let Some(other) = autoencoders.next() {
            return Err(refuse(format!("`{other}` is a second autoencoder; leave one")));
        }
        let [first, second, third] = TEXT.map(|[encoder, _]| class(encoder).is_some());
        let joint = class(JOINT.0) == Some(JOINT.1);
        if joint && !(first && second) {
            let missing = TEXT_ENCODERS[usize::from(first)];
            let problem = format!(
                "`{missing}` is not there: a {} needs two text encoders, each a CLIPTextModelWithProjection, and can do without `{}` alone",
                JOINT.1, TEXT_ENCODERS[2]
            );
            return Err(refuse(problem));
        }
        if third && !joint {
            let problem = format!(
                "`{}` is a third text encoder, which only a {} takes; leave it out",
                TEXT_ENCODERS[2], JOINT.1
            );
            return Err(refuse(problem));
        }
        if second && !first {
            let problem = "`text_encoder_2` is there without a `text_encoder`: refiners of Stable Diffusion XL are not supported; use the base model";
            return Err(refuse(problem.into()));
        }
        let there = TEXT.into_iter().filter(|[encoder, _]| class(encoder).is_some());
        let text = there.map(|names| text(path, (&file, &index), names, joint));
        Ok(Self {
            network,
            autoencoder: autoencoder.transpose()?,
            text: text.collect::<Result<_>>()?,
            zero_empty_prompt: index["force_zeros_for_empty_prompt"]
                .as_bool()
                .unwrap_or(second && !joint),
            idle,
        })
    }
}

/// What there is around the network that an index tells of.
pub(super) struct Around {
    /// The folders of components with weights, and what those files are called.
    pub(super) parts: Vec<(&'static str, Stem)>,
    /// The files that describe all components; of a tokenizer's not all need be there.
    pub(super) described: Vec<String>,
}

/// Reads what a folder's index says of it; its files need not be there.
///
/// # Errors
/// [`Error::Io`] or [`Error::Format`] naming the index.
pub(super) fn around(path: &Path) -> Result<Around> {
    let index = read_json(&path.join("model_index.json"))?;
    let there = |name: &str| index[name][1].is_string();
    let mut parts: Vec<(&str, Stem)> = Vec::new();
    parts.extend(AUTOENCODERS.into_iter().filter(|name| there(name)).map(|name| (name, DIFFUSERS)));
    let encoders = TEXT.into_iter().filter(|[encoder, _]| there(encoder));
    parts.extend(encoders.map(|[encoder, _]| (encoder, TRANSFORMERS)));
    let mut described: Vec<String> =
        parts.iter().map(|(name, _)| format!("{name}/config.json")).collect();
    for tokenizer in TOKENIZER_FOLDERS.into_iter().filter(|name| there(name)) {
        described.extend(TOKENIZER_FILES.map(|name| format!("{tokenizer}/{name}")));
    }
    Ok(Around { parts, described })
}

/// The text encoder of a class, and the folder of its tokenizer.
fn text(
    path: &Path,
    (file, index): (&Path, &Value),
    [encoder, tokens]: [&str; 2],
    joint: bool,
) -> Result<TextPart> {
    let refuse = |problem: String| Err(Error::Format { path: file.to_owned(), problem });
    let class = index[encoder][1].as_str().unwrap_or_default();
    let is_t5 = class == T5Config::CLASS;
    if !is_t5 && !ClipConfig::CLASSES.contains(&class) {
        let known = ClipConfig::CLASSES.join(", ");
        let known = format!("only {known} and {} are supported", T5Config::CLASS);
        return refuse(format!("`{encoder}` is a {class}, {known}"));
    }
    let tokenizers = if is_t5 { T5_TOKENIZERS } else { CLIP_TOKENIZERS };
    match index[tokens][1].as_str() {
        Some(name) if tokenizers.contains(&name) => {}
        Some(other) => {
            let [needed, _] = tokenizers;
            return refuse(format!("`{tokens}` is a {other}, a {class} needs a {needed}"));
        }
        None => {
            return refuse(format!(
                "`{encoder}` needs a `{tokens}`, which is not there; write [\"transformers\", \"{}\"], and put its files \
                 into {tokens}/",
                tokenizers[0]
            ));
        }
    }
    if joint {
        let needed = if encoder == TEXT_ENCODERS[2] { T5Config::CLASS } else { PROJECTING };
        if class != needed {
            return refuse(format!("`{encoder}` is a {class}, a {} needs a {needed}", JOINT.1));
        }
    }
    let pipeline = T5_PIPELINES.iter().find(|(name, _)| index["_class_name"] == **name);
    let most = match joint {
        true => Some(T5_TOKENS),
        false => pipeline.map(|(_, tokens)| *tokens),
    };
    if is_t5 && !joint && (most.is_none() || encoder != TEXT_ENCODERS[0]) {
        let known = T5_PIPELINES.map(|(name, _)| name).join(" and ");
        return refuse(format!(
            "`{encoder}` of a {} is a {class}, which is supported as the only text encoder of {known}",
            index["_class_name"].as_str().unwrap_or("pipeline")
        ));
    }
    let folder = path.join(encoder);
    let config = folder.join("config.json");
    let (json, shown) = (needed(&config, encoder)?, shown(&config));
    let config = match most.filter(|_| is_t5) {
        Some(tokens) => TextConfig::T5 { config: T5Config::from_json(&json, &shown)?, tokens },
        None => TextConfig::Clip(ClipConfig::from_json(class, &json, &shown)?),
    };
    let tokens = path.join(tokens);
    let there = |name: &str| tokens.join(name).exists();
    let (complete, needed) = match is_t5 {
        true => (there("spiece.model"), "spiece.model"),
        false => (there("vocab.json") && there("merges.txt"), "vocab.json and merges.txt"),
    };
    if !complete && !there("tokenizer.json") {
        return Err(Error::Format {
            path: tokens,
            problem: format!(
                "holds no tokenizer: tokenizer.json, or {needed}, must be there; fetch them again"
            ),
        });
    }
    Ok(TextPart { encoder: Part { config, folder }, tokenizer: tokens })
}

/// A component's configuration, which the index says is there.
fn needed(file: &Path, component: &str) -> Result<Value> {
    if !file.exists() {
        return Err(Error::Format {
            path: file.to_owned(),
            problem: format!(
                "is not there, and model_index.json names `{component}`; fetch the model again"
            ),
        });
    }
    read_json(file)
}

impl Part<AutoencoderConfig> {
    /// The files that hold its weights; they need not exist.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming an index or a folder that cannot be understood.
    pub fn weight_files(&self) -> Result<Vec<PathBuf>> {
        DIFFUSERS.files(&self.folder)
    }
}

impl Part<TextConfig> {
    /// The files that hold its weights; they need not exist.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming an index or a folder that cannot be understood.
    pub fn weight_files(&self) -> Result<Vec<PathBuf>> {
        TRANSFORMERS.files(&self.folder)
    }
}

impl TextPart {
    /// What turns prompts into its tokens.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file, also where it knows more tokens than the encoder.
    pub(super) fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.encoder.config {
            TextConfig::Clip(_) => self.clip_tokenizer().map(Tokenizer::Clip),
            TextConfig::T5 { .. } => self.t5_tokenizer().map(Tokenizer::T5),
        }
    }

    pub(super) fn t5_tokenizer(&self) -> Result<T5Tokenizer> {
        let tokenizer = T5Tokenizer::open(&self.tokenizer)?;
        self.check_vocabulary(tokenizer.vocabulary())?;
        Ok(tokenizer)
    }

    pub(super) fn clip_tokenizer(&self) -> Result<ClipTokenizer> {
        let tokenizer = ClipTokenizer::open(&self.tokenizer)?;
        self.check_vocabulary(tokenizer.vocabulary())?;
        Ok(tokenizer)
    }

    fn check_vocabulary(&self, known: usize) -> Result<()> {
        let most = self.encoder.config.vocabulary();
        if known <= most {
            return Ok(());
        }
        Err(Error::Format {
            path: self.tokenizer.clone(),
            problem: format!(
                "has {known} tokens, and the text encoder knows {most} (vocab_size); use the tokenizer that belongs to it"
            ),
        })
    }

    /// The token that fills prompts up, where the tokenizer numbers words as another's does: prompts are read once for both.
    ///
    /// # Errors
    /// As [`TextPart::tokenizer`], and [`Error::Format`] where it numbers them otherwise.
    pub(super) fn pad_like(&self, first: &Self) -> Result<u32> {
        let tokenizer = self.clip_tokenizer()?;
        if tokenizer.reads_like(&first.clip_tokenizer()?) {
            return Ok(tokenizer.pad());
        }
        Err(Error::Format {
            path: self.tokenizer.clone(),
            problem: format!(
                "numbers words otherwise than {}, which is not supported; use the tokenizers that belong to the model",
                first.tokenizer.display()
            ),
        })
    }
}

pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// What `model_index.json` names instead of a network that can be served.
fn unknown_family(index: &Value) -> String {
    let mut components = NetworkConfig::FAMILIES.iter().map(|(component, _)| *component);
    let found = components.find(|component| !index[component].is_null()).unwrap_or("unet");
    let known = NetworkConfig::FAMILIES
        .map(|(component, class)| format!("[\"diffusers\", \"{class}\"] as `{component}`"));
    format!("`{found}` is {}, only {} can be served", index[found], known.join(" or "))
}
