//! The encoder: weights in the type that they are stored in, arithmetic in f32.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result as TensorResult, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use candle_transformers::models::t5::T5EncoderModel;

use super::T5Config;
use crate::weight::{Weight, here};
use crate::{Error, Result, memory, weights};

/// What a full T5 has beside its encoder, and the table of tokens under its other name, which is the same.
const OTHERS: [&str; 3] = ["decoder.", "lm_head.", "encoder.embed_tokens."];
const TABLE: &str = "shared.weight";
const TABLE_TOO: &str = "encoder.embed_tokens.weight";

/// A T5 encoder on a device, whose weights are read when it is first asked, and may be forgotten until then next time.
pub struct T5Encoder {
    config: T5Config,
    source: Source,
    device: Device,
    loaded: Mutex<Option<Loaded>>,
}

/// The network, while its weights are in memory.
struct Loaded {
    model: T5EncoderModel,
    /// When it last answered.
    used: Instant,
}

/// Where its weights come from.
enum Source {
    Here(HashMap<String, Tensor>),
    /// Opens the files that hold them.
    Files(Box<Open>),
}

/// What opens files of weights, each of which is read when it is taken.
type Open = dyn Fn() -> Result<HashMap<String, Weight>> + Send + Sync;

impl T5Encoder {
    /// Of weights under transformers' names.
    ///
    /// # Errors
    /// [`Error::Weights`] naming what is missing, what does not belong, and what has another shape.
    pub fn new(
        config: T5Config,
        tensors: HashMap<String, Tensor>,
        device: &Device,
    ) -> Result<Self> {
        let fitted = fitted(&config, here(tensors))?;
        let tensors = fitted.into_iter().map(|(name, weight)| Ok((name, weight.take()?)));
        let source = Source::Here(tensors.collect::<Result<_>>()?);
        Ok(Self { config, source, device: device.clone(), loaded: Mutex::default() })
    }

    /// Of what opens the files that hold its weights, whose names and shapes are checked now.
    ///
    /// # Errors
    /// As [`T5Encoder::new`]; those of `open`.
    pub(crate) fn of_files(config: T5Config, open: Box<Open>, device: &Device) -> Result<Self> {
        fitted(&config, open()?)?;
        let source = Source::Files(open);
        Ok(Self { config, source, device: device.clone(), loaded: Mutex::default() })
    }

    /// The hidden states of a prompt's tokens, its end among them: f32 `[tokens, width]`.
    ///
    /// The first call reads the weights. Each is turned to f32 while it is used, so that it takes no more memory than its file,
    /// and numbers that f16 does not hold, as T5 has between its layers, are no fault.
    ///
    /// # Errors
    /// [`Error::Value`] for no tokens, for tokens that it does not know, and where there is no memory for the weights;
    /// [`Error::Io`] or [`Error::Format`] naming a file that cannot be read any more; whatever the device says.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        let vocabulary = self.config.vocabulary();
        if ids.is_empty() {
            return Err(Error::value("tokens of a prompt", 0, "must be at least 1: its end"));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
            let remedy = format!(
                "must be below {vocabulary}, the text encoder's vocab_size: use its own tokenizer"
            );
            return Err(Error::value("token", id, remedy));
        }
        let ids = Tensor::new(ids, &self.device)?.unsqueeze(0)?;
        self.with(|model| Ok(model.forward_dt(&ids, Some(DType::F32))?.squeeze(0)?))
    }

    /// Reads the weights, if they are not in memory.
    ///
    /// # Errors
    /// As [`T5Encoder::forward`].
    pub fn load(&self) -> Result<()> {
        self.with(|_| Ok(()))
    }

    /// Forgets the weights if nobody used them for so long, unless they came as tensors; the next call reads them again.
    /// Whether there were some. It waits for nobody: who uses them now is not idle.
    pub fn unload_if_idle(&self, idle: Duration) -> bool {
        let Source::Files(_) = self.source else { return false };
        let Ok(mut loaded) = self.loaded.try_lock() else { return false };
        loaded.take_if(|loaded| loaded.used.elapsed() >= idle).is_some()
    }

    /// Whether the weights are in memory.
    pub fn is_loaded(&self) -> bool {
        self.lock().is_some()
    }

    /// What `f` makes of the network, whose weights are read first if they are not in memory.
    fn with<T>(&self, f: impl FnOnce(&mut T5EncoderModel) -> Result<T>) -> Result<T> {
        let mut loaded = self.lock();
        let loaded = match &mut *loaded {
            Some(loaded) => loaded,
            none => none.insert(Loaded { model: self.read()?, used: Instant::now() }),
        };
        let made = f(&mut loaded.model);
        loaded.used = Instant::now();
        made
    }

    fn lock(&self) -> MutexGuard<'_, Option<Loaded>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration.
    pub fn config(&self) -> &T5Config {
        &self.config
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn read(&self) -> Result<T5EncoderModel> {
        let tensors = match &self.source {
            Source::Here(tensors) => tensors.clone(),
            Source::Files(open) => {
                let weights = fitted(&self.config, open()?)?;
                let bytes = weights.values().map(bytes).sum();
                let remedy = "use a narrower text encoder, a larger machine, or free some memory";
                memory::check("d_model", self.config.width(), [bytes, bytes], remedy)?;
                let tensors = weights.into_iter().map(|(name, weight)| Ok((name, weight.take()?)));
                tensors.collect::<Result<_>>()?
            }
        };
        let backend = Box::new(AsStored(tensors));
        let builder = VarBuilder::from_backend(backend, DType::F32, self.device.clone());
        Ok(T5EncoderModel::load(builder, &self.config.theirs())?)
    }
}

/// The encoder's own weights, checked to be exactly those of its configuration.
fn fitted(
    config: &T5Config,
    mut weights: HashMap<String, Weight>,
) -> Result<HashMap<String, Weight>> {
    if !weights.contains_key(TABLE)
        && let Some(table) = weights.remove(TABLE_TOO)
    {
        weights.insert(TABLE.into(), table);
    }
    weights.retain(|name, _| !OTHERS.iter().any(|other| name.starts_with(other)));
    weights::fit(&config.weight_shapes(), weights)
}

fn bytes(weight: &Weight) -> u64 {
    let elements = weight.dims().iter().map(|&side| side as u64).product::<u64>();
    elements * weight.dtype().size_in_bytes() as u64
}

/// Weights in the types that they have, whatever is asked for.
struct AsStored(HashMap<String, Tensor>);

impl SimpleBackend for AsStored {
    fn get(
        &self,
        _: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        at: &Device,
    ) -> TensorResult<Tensor> {
        self.get_unchecked(name, dtype, at)
    }

    fn get_unchecked(&self, name: &str, _: DType, device: &Device) -> TensorResult<Tensor> {
        match self.0.get(name) {
            Some(tensor) => tensor.to_device(device),
            None => candle_core::bail!("`{name}` is no weight of a T5 encoder"),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}
