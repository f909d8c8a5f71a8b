//! What an image was made with, as text in its PNG: in the form, and under the name, that A1111's web UI and what reads its
//! images know.

use std::borrow::Cow;

use serde_json::json;
use understudy_models::sampler::Kind;

use crate::engine::GenerateRequest;

/// What the engine's request does not tell any more.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    /// Of a model that reads text.
    pub(super) prompt: Option<String>,
    pub(super) negative_prompt: Option<String>,
    pub(super) sampler: Kind,
    pub(super) steps: usize,
    pub(super) eta: f64,
    /// Names and scales.
    pub(super) loras: Vec<(String, f64)>,
}

impl Recipe {
    /// Of an image of a request: the prompt; the negative prompt, where there is one; and a line of fields.
    pub(super) fn text(&self, request: &GenerateRequest, index: usize) -> String {
        let (model, sample) = (&request.model, request.samples[index]);
        let [_, height, width] = model.image;
        let class = sample.class_label.map(|class| {
            let name = model.card.class_names.get(class as usize).cloned();
            name.unwrap_or_else(|| class.to_string())
        });
        let loras = self.loras.iter().map(|(name, scale)| format!("{name} {scale}"));
        let loras = Some(loras.collect::<Vec<_>>().join(", ")).filter(|loras| !loras.is_empty());
        let eta = Some(self.eta).filter(|eta| *eta != 0.0);
        let fields = [
            ("Steps", Some(self.steps.to_string())),
            ("Sampler", Some(self.sampler.to_string())),
            ("CFG scale", Some(request.guidance_scale.to_string())),
            ("Seed", Some(sample.seed.to_string())),
            ("Size", Some(format!("{width}x{height}"))),
            ("Model", Some(model.id.clone())),
            ("LoRA", loras),
            ("Class", class),
            ("Eta", eta.map(|eta| eta.to_string())),
            ("Version", Some(concat!("understudy ", env!("CARGO_PKG_VERSION")).to_owned())),
        ];
        let fields = fields.into_iter().filter_map(|(name, value)| Some((name, value?)));
        let fields: Vec<String> =
            fields.map(|(name, value)| format!("{name}: {}", quoted(&value))).collect();
        let prompt = self.prompt.iter().cloned();
        let negative = self.negative_prompt.iter().map(|text| format!("Negative prompt: {text}"));
        prompt.chain(negative).chain([fields.join(", ")]).collect::<Vec<_>>().join("\n")
    }
}

/// A value that would end early is written as a string of JSON.
fn quoted(value: &str) -> Cow<'_, str> {
    if value.contains([',', '\n', ':']) { json!(value).to_string().into() } else { value.into() }
}
