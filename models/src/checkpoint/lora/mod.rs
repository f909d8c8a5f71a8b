//! LoRA: what a fine-tune adds to a model's weights, as products of two small matrices (Hu et al. 2021, arXiv 2106.09685, eq. 3).
//!
//! A file is one of kohya's sd-scripts or of diffusers (PEFT); `names.rs` says how these name what they change. A weight `W` becomes
//! `W + scale·(alpha/rank)·up·down`. It is merged when the weights are read, so a model with a LoRA is as fast as one without.

mod names;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value};

use super::{read, tensors};
use crate::weight::Weight;
use crate::weights::Shapes;
use crate::{Error, Result};

use names::Part;
pub(crate) use names::{Component, Targets};

/// A LoRA file, read: small beside the model that it changes.
#[derive(Debug, Clone)]
pub struct Lora {
    path: Arc<PathBuf>,
    /// By the file's name of what is changed.
    pairs: Arc<BTreeMap<String, Pair>>,
    scale: f64,
}

/// What is added to one weight: `alpha/rank·up·down`.
#[derive(Debug)]
struct Pair {
    up: Tensor,
    down: Tensor,
    /// `alpha/rank`.
    factor: f64,
}

/// Tensors of a pair on their way in.
#[derive(Default)]
struct Parts {
    up: Option<Tensor>,
    down: Option<Tensor>,
    alpha: Option<f64>,
}

impl Lora {
    /// Reads a file that changes a model by `scale` times what it was trained to.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] naming the tensor: no LoRA, one of a kind that is not supported (LoHa, LoKr, DoRA, a
    /// convolution in three parts), halves without the other, of rank 0, or not numbers. [`Error::Value`] for a scale that is
    /// none.
    pub fn open(path: &Path, scale: f64) -> Result<Self> {
        check_scale(scale)?;
        let refuse = |problem: String| Error::Format { path: path.to_owned(), problem };
        // Where there is none, nothing of a model's own weights is to be said.
        read::open(path)?;
        let mut found: BTreeMap<String, Parts> = BTreeMap::new();
        for (name, weight) in tensors::open(path)? {
            let (target, part) = names::split(&name).map_err(&refuse)?;
            let parts = found.entry(target).or_default();
            let tensor = weight.take()?;
            match part {
                Part::Up => parts.up = Some(tensor),
                Part::Down => parts.down = Some(tensor),
                Part::Alpha => {
                    let alpha = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
                    let [alpha] = alpha[..] else {
                        return Err(refuse(format!("`{name}` must be one number")));
                    };
                    parts.alpha = Some(alpha);
                }
            }
        }
        if found.is_empty() {
            return Err(refuse("has no tensors".into()));
        }
        let trained = Trained::read(path)?;
        let mut pairs = BTreeMap::new();
        for (target, parts) in found {
            let (up, down) = match (parts.up, parts.down) {
                (Some(up), Some(down)) => (up, down),
                (None, None) => return Err(refuse(format!("`{target}` has a scale alone"))),
                (up, _) => {
                    let missing = if up.is_none() { "up (lora_B)" } else { "down (lora_A)" };
                    return Err(refuse(format!("`{target}` has no {missing}; fetch it again")));
                }
            };
            let rank = down.dims().first().copied().unwrap_or(0);
            let fits = up.rank() == down.rank() && up.dims().get(1) == Some(&rank);
            if rank == 0 || !fits || up.elem_count() == 0 || down.elem_count() == 0 {
                return Err(refuse(format!(
                    "`{target}`: up {:?} and down {:?} must be [outputs, rank, …] and [rank, inputs, …] of a rank of at \
                     least 1",
                    up.dims(),
                    down.dims()
                )));
            }
            let alpha = parts.alpha.or(trained.alpha(&target)).unwrap_or(rank as f64);
            pairs.insert(target, Pair { up, down, factor: alpha / rank as f64 });
        }
        Ok(Self { path: Arc::new(path.to_owned()), pairs: Arc::new(pairs), scale })
    }

    /// The same, by another scale.
    ///
    /// # Errors
    /// [`Error::Value`] for a scale that is no number.
    pub fn scaled(&self, scale: f64) -> Result<Self> {
        check_scale(scale)?;
        Ok(Self { scale, ..self.clone() })
    }

    /// How much of it is added.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Its file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it changes any weight of a component.
    pub(crate) fn changes(&self, targets: &Targets) -> bool {
        self.pairs.keys().any(|target| targets.find(target).is_some())
    }

    /// Checks that each of what it changes is there, in a component that has it.
    ///
    /// # Errors
    /// [`Error::Format`] naming what fits nothing, or was made for weights of another shape.
    pub(crate) fn check(&self, components: &[&Targets]) -> Result<()> {
        let refuse = |problem: String| Error::Format { path: self.path.to_path_buf(), problem };
        for (target, pair) in self.pairs.iter() {
            let mut found = components.iter().filter_map(|targets| targets.find(target));
            let Some((name, shape)) = found.next() else {
                return Err(refuse(format!(
                    "`{target}` fits no weight of the model; use a LoRA that was made for this kind of model"
                )));
            };
            if !pair.fits(shape) {
                return Err(refuse(format!(
                    "`{target}`: up {:?} and down {:?} do not make {shape:?}, the shape of `{name}`; use a LoRA that was \
                     made for this kind of model",
                    pair.up.dims(),
                    pair.down.dims()
                )));
            }
        }
        Ok(())
    }

    /// Adds what it changes of a component to its weights, when these are read. What belongs to others is left to them.
    pub(crate) fn merge(&self, targets: &Targets, weights: &mut HashMap<String, Weight>) {
        for target in self.pairs.keys() {
            let Some((name, _)) = targets.find(target) else { continue };
            let Some(weight) = weights.remove(name) else { continue };
            let (lora, target) = (self.clone(), target.clone());
            let merged = Weight::Later {
                shape: weight.dims().to_vec(),
                dtype: weight.dtype(),
                read: Box::new(move || lora.add(&target, &weight.take()?)),
            };
            weights.insert(name.to_owned(), merged);
        }
    }

    /// The weight with what is added to it, in its element type; added in f32.
    fn add(&self, target: &str, weight: &Tensor) -> Result<Tensor> {
        let Pair { up, down, factor } = &self.pairs[target];
        let [up, down] = [up, down].map(|part| part.to_dtype(DType::F32)?.flatten_from(1));
        let added = up?.matmul(&down?)?.reshape(weight.shape())?;
        let sum = (weight.to_dtype(DType::F32)? + (added * (self.scale * factor))?)?;
        Ok(sum.to_dtype(weight.dtype())?)
    }
}

impl Pair {
    /// Whether `up·down` has as many outputs and inputs as a weight of this shape. A product of single pixels changes a linear
    /// map, too.
    fn fits(&self, shape: &[usize]) -> bool {
        let (up, down) = (self.up.dims(), self.down.dims());
        let points = up[2..].iter().all(|&side| side == 1);
        let inputs: usize = down[1..].iter().product();
        points && shape.first() == Some(&up[0]) && shape[1..].iter().product::<usize>() == inputs
    }
}

fn check_scale(scale: f64) -> Result<()> {
    // Beyond that it is a mistyped number: trained scales are about 1.
    if scale.is_finite() && scale.abs() <= 100.0 {
        return Ok(());
    }
    Err(Error::value(
        "scale",
        scale,
        "must be a number from -100 to 100; 1 is what it was trained for",
    ))
}

/// What diffusers tells of a training beside the tensors.
#[derive(Default)]
struct Trained {
    told: Map<String, Value>,
}

impl Trained {
    /// Reads `lora_adapter_metadata` of the file.
    ///
    /// # Errors
    /// [`Error::Format`] naming a setting that changes what is added, and is not supported.
    fn read(path: &Path) -> Result<Self> {
        let metadata = tensors::metadata(path)?;
        let Some(text) = metadata.get("lora_adapter_metadata") else { return Ok(Self::default()) };
        let refuse = |problem: String| Error::Format { path: path.to_owned(), problem };
        let told: Map<String, Value> = serde_json::from_str(text).map_err(|error| {
            refuse(format!("`lora_adapter_metadata` is no JSON object ({error})"))
        })?;
        for (name, value) in &told {
            let setting = name.rsplit('.').next().unwrap_or(name);
            let changes = match setting {
                "use_dora" | "use_rslora" | "fan_in_fan_out" => *value == Value::Bool(true),
                "alpha_pattern" => value.as_object().is_some_and(|it| !it.is_empty()),
                _ => false,
            };
            if changes {
                return Err(refuse(format!("`{name}` is {value}, which is not supported")));
            }
        }
        Ok(Self { told })
    }

    /// The alpha of what is changed.
    fn alpha(&self, target: &str) -> Option<f64> {
        let component = target.split('.').next().unwrap_or(target);
        let told =
            self.told.get(&format!("{component}.lora_alpha")).or(self.told.get("lora_alpha"));
        told.and_then(Value::as_f64)
    }
}

/// Weights that may be changed, of the shapes of a component.
pub(crate) fn targets(component: Component, shapes: &Shapes) -> Targets {
    Targets::new(component, shapes)
}

#[cfg(test)]
mod tests;
