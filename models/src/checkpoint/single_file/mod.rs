//! Stable Diffusion in one file, as its authors and most fine-tunes are published, as a diffusers folder.
//!
//! Such a file (`.safetensors`, or `.ckpt` of `torch.save`) holds the tensors of the network, the autoencoder and the text
//! encoder under the names of the programs that trained them (Rombach et al. 2022, `CompVis/latent-diffusion`), and no
//! configuration. [`import`] reads the architecture off the tensors' names and shapes. What these do not tell is taken as
//! Stable Diffusion has it: the noise schedule, the scale of latents, the heads of attentions, and CLIP's vocabulary.
//!
//! | here | there |
//! | --- | --- |
//! | network (`unet.rs`) | `model.diffusion_model.…` |
//! | autoencoder (`vae.rs`) | `first_stage_model.…` |
//! | text encoder (`clip.rs`) | `cond_stage_model.transformer.…`, or OpenCLIP's `cond_stage_model.model.…` |
//! | both of XL's | `conditioner.embedders.0.transformer.…` and `conditioner.embedders.1.model.…` |

mod clip;
mod family;
mod unet;
mod vae;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Value, json};

use super::card::{CARD, Card};
use super::readme::{self, README};
use super::{Draft, StateDict, write};
use crate::autoencoder::AutoencoderConfig;
use crate::schedule::{PredictionType, ScheduleConfig};
use crate::text::clip::{ClipConfig, clip_vocabulary, file_name};
use crate::weights::{Shapes, mismatch};
use crate::{Error, NetworkConfig, Result};

use family::Family;

/// A tensor of the file, and what is made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    /// It is the same.
    Same(String),
    /// It is a convolution of single pixels, and a linear map here.
    Point(String),
    /// One of its three equal parts along the first dimension.
    Third(String, usize),
    /// Its rows are columns here.
    Transposed(String),
}

impl Source {
    fn name(&self) -> &str {
        let (Self::Same(name) | Self::Point(name) | Self::Third(name, _) | Self::Transposed(name)) =
            self;
        name
    }

    /// The shape of the file's tensor where `shape` is the shape here.
    fn shape(&self, shape: &[usize]) -> Vec<usize> {
        let mut there = shape.to_vec();
        match self {
            Self::Same(_) => {}
            Self::Point(_) => there.extend([1, 1]),
            Self::Third(..) => there[0] *= 3,
            Self::Transposed(_) => there.reverse(),
        }
        there
    }

    fn of(&self, tensor: &Tensor, shape: &[usize]) -> Result<Tensor> {
        Ok(match self {
            Self::Same(_) => tensor.clone(),
            Self::Point(_) => tensor.reshape(shape)?,
            Self::Transposed(_) => tensor.t()?.contiguous()?,
            Self::Third(_, part) => tensor.narrow(0, part * shape[0], shape[0])?.contiguous()?,
        })
    }
}

/// A component of a pipeline: its configuration, and where each of its tensors is in the file.
struct Component {
    /// Its folder.
    name: &'static str,
    /// Its library and class.
    class: [&'static str; 2],
    config: Value,
    /// The file of its weights.
    weights: &'static str,
    /// By the names here, shapes and sources.
    tensors: BTreeMap<String, (Vec<usize>, Source)>,
}

impl Component {
    /// All tensors of `shapes`, where `source` says they are.
    fn tensors(
        shapes: BTreeMap<String, Vec<usize>>,
        source: impl Fn(&str) -> Source,
    ) -> BTreeMap<String, (Vec<usize>, Source)> {
        let found = |(name, shape): (String, Vec<usize>)| {
            let source = source(&name);
            (name, (shape, source))
        };
        shapes.into_iter().map(found).collect()
    }
}

/// Converts the checkpoint at `path` to a diffusers folder at `out`, and returns the network's configuration.
///
/// `prediction` is what the network predicts; where it is not given, Stable Diffusion 1 and XL predict the noise, and Stable
/// Diffusion 2, of which there are two, is refused. The folder appears complete or not at all. Weights keep their element
/// type, except that f64 becomes f32.
///
/// # Errors
/// [`Error::Format`] for a file that is something else, by its name where that is known; [`Error::Weights`] naming tensors
/// that are missing, do not belong, or have another shape; [`Error::Value`] for `prediction`, and where `out` exists;
/// [`Error::Io`].
pub fn import(
    path: &Path,
    out: &Path,
    prediction: Option<PredictionType>,
) -> Result<NetworkConfig> {
    let mut file = StateDict::open(path, &anchors())?;
    let shapes = file.shapes();
    let family = Family::tell(path, &shapes)?;
    let prediction = family.prediction(prediction)?;

    let network_json = unet::config(path, &shapes, family.sample_size(prediction))?;
    let network = NetworkConfig::from_json(&network_json, &format!("{}", path.display()))?;
    let autoencoder_json = vae::config(path, &shapes, family.latent_scale())?;
    let autoencoder = AutoencoderConfig::from_json(&autoencoder_json, "the autoencoder")?;
    let mut components = vec![
        Component {
            name: network.component(),
            class: ["diffusers", network.class_name()],
            weights: "diffusion_pytorch_model.safetensors",
            tensors: Component::tensors(
                network.weight_shapes(),
                unet::sources(&network.weight_shapes()),
            ),
            config: network.to_json(),
        },
        Component {
            name: "vae",
            class: ["diffusers", autoencoder.class_name()],
            weights: "diffusion_pytorch_model.safetensors",
            tensors: Component::tensors(
                autoencoder.weight_shapes(),
                vae::sources(&autoencoder_json),
            ),
            config: autoencoder.to_json(),
        },
    ];
    for encoder in family.encoders() {
        let json = encoder.config(path, &shapes)?;
        let config = ClipConfig::from_json(encoder.class(), &json, "the text encoder")?;
        let weights = config.weight_shapes().into_iter();
        components.push(Component {
            name: encoder.folders[0],
            class: ["transformers", encoder.class()],
            weights: "model.safetensors",
            tensors: Component::tensors(
                weights.map(|(name, it)| (file_name(&name), it)).collect(),
                encoder.sources(),
            ),
            config: encoder.whole_config(&json),
        });
    }
    check(path, &shapes, &family, &components)?;

    let schedule = ScheduleConfig::from_json(&family.scheduler(prediction), "the scheduler")?;
    let card = Card::default();
    let draft = Draft::new(out)?;
    let mut index = family.index();
    index["scheduler"] = json!(["diffusers", schedule.to_json()["_class_name"]]);
    for Component { name, class, .. } in &components {
        index[*name] = json!(class);
    }
    for encoder in family.encoders() {
        index[encoder.folders[1]] = json!(["transformers", "CLIPTokenizer"]);
    }
    draft.write_json("model_index.json", &index)?;
    draft.write_json("scheduler/scheduler_config.json", &schedule.to_json())?;
    for encoder in family.encoders() {
        for (name, bytes) in clip_vocabulary(encoder.padding())? {
            draft.write(&format!("{}/{name}", encoder.folders[1]), &bytes)?;
        }
    }
    for Component { name, config, weights, tensors, .. } in &components {
        draft.write_json(&format!("{name}/config.json"), config)?;
        let tensors = read(path, &mut file, tensors)?;
        draft.write_tensors(&format!("{name}/{weights}"), &tensors)?;
    }
    draft.write_json(CARD, &json!(card))?;
    draft.write(README, readme::text(&network, &schedule, &card).as_bytes())?;
    draft.finish()?;
    Ok(network)
}

/// The names that a network's weights have in a single file, without what stands before them; none for a network that could
/// be in none.
pub(super) fn unet_names(shapes: &Shapes) -> BTreeMap<String, String> {
    unet::names(shapes)
}

/// Names by which the tensors are found among what programs save beside them.
fn anchors() -> BTreeSet<String> {
    [unet::FIRST, vae::FIRST].map(str::to_owned).into_iter().chain(clip::firsts()).collect()
}

/// Compared before anything is read, so that no size in the file is believed.
fn check(path: &Path, found: &Shapes, family: &Family, components: &[Component]) -> Result<()> {
    let all = || components.iter().flat_map(|component| component.tensors.values());
    let expected: Shapes =
        all().map(|(shape, source)| (source.name().to_owned(), source.shape(shape))).collect();
    let belongs = |name: &str| {
        let encoders = family.encoders();
        let roots = encoders.iter().map(|encoder| encoder.root);
        let mut parts = [unet::PREFIX, vae::PREFIX].into_iter().chain(roots);
        parts.any(|part| name.starts_with(part))
            && !vae::is_idle(name)
            && !encoders.iter().any(|encoder| encoder.is_idle(name))
    };
    let found: Shapes = found
        .iter()
        .filter(|(name, _)| expected.contains_key(*name) || belongs(name))
        .map(|(name, shape)| (name.clone(), shape.clone()))
        .collect();
    match mismatch(&expected, &found) {
        None => Ok(()),
        Some(difference) => Err(Error::Weights(format!("{}: {difference}", path.display()))),
    }
}

/// The tensors of a component, read from the file.
fn read(
    path: &Path,
    file: &mut StateDict,
    tensors: &BTreeMap<String, (Vec<usize>, Source)>,
) -> Result<HashMap<String, Tensor>> {
    // What is made of each tensor of the file: the name and the shape here.
    type Made<'a> = (&'a str, &'a [usize], &'a Source);
    let mut of: BTreeMap<&str, Vec<Made>> = BTreeMap::new();
    for (name, (shape, source)) in tensors {
        of.entry(source.name()).or_default().push((name, shape, source));
    }
    let mut made = HashMap::new();
    for (there, parts) in of {
        let tensor = file.take(there)?;
        let tensor = match tensor.dtype() {
            DType::F64 => tensor.to_dtype(DType::F32)?,
            DType::F32 | DType::F16 | DType::BF16 => tensor,
            other => {
                let problem = format!(
                    "`{there}` is {other:?}; weights must be of 16 or 32 bits, so use the model's file of such"
                );
                return Err(Error::Format { path: path.to_owned(), problem });
            }
        };
        if !write::is_finite(&tensor)? {
            let problem = format!("`{there}` holds NaN or infinity; fetch it again");
            return Err(Error::Format { path: path.to_owned(), problem });
        }
        for (name, shape, source) in parts {
            made.insert(name.to_owned(), source.of(&tensor, shape)?);
        }
    }
    Ok(made)
}

/// The length of dimension `dimension` of the file's tensor `name`.
fn length(path: &Path, shapes: &Shapes, name: &str, dimension: usize) -> Result<usize> {
    let found = shapes.get(name).and_then(|shape| shape.get(dimension));
    found.copied().ok_or_else(|| Error::Format {
        path: path.to_owned(),
        problem: match shapes.get(name) {
            None => format!("has no tensor `{name}`, which every Stable Diffusion checkpoint has"),
            Some(shape) => {
                format!("`{name}` has {} dimensions, too few to be a weight", shape.len())
            }
        },
    })
}

#[cfg(test)]
mod tests;
