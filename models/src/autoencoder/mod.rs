//! Autoencoders: between images and the latents that a latent diffusion model works on.
//!
//! Each class is a checked configuration that records a graph for either half; a half is compiled as every network is, but
//! takes no time and no condition. All latents that go in and come out are the diffusion model's, scaled and shifted as
//! the configuration says.

mod coder;
mod kl;
mod preview;
mod tiny;
mod vq;

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use candle_core::{DType, Device, Result as TensorResult, Tensor, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::compiled::Compiled;
use crate::cpu::Unfinished;
use crate::demand::Demand;
use crate::denoiser::Conditions;
use crate::fields::Fields;
use crate::graph::Graph;
use crate::kernels::{Footprint, Timing};
use crate::unet::rename_attention;
use crate::weight::{Weight, here};
use crate::{Error, Result, weights};

pub use kl::AutoencoderKLConfig;
pub use preview::Preview;
pub use tiny::AutoencoderTinyConfig;
pub use vq::VQModelConfig;

/// `sample_size` as configurations write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum SampleSize {
    /// Of a square.
    Side(usize),
    /// Height and width.
    Sides([usize; 2]),
}

/// A diffusion model's latents.
#[derive(Debug, Clone, Copy)]
struct Latents {
    channels: usize,
    /// Pixels of an image's side for each of a latent's.
    factor: usize,
    /// A latent is `(the autoencoder's own − shift)·scale`.
    scale: f64,
    shift: f64,
}

impl Latents {
    /// Factor and shift that make the autoencoder's own of a latent.
    fn unscaling(self) -> (f32, f32) {
        ((1.0 / self.scale) as f32, self.shift as f32)
    }

    /// Factor and shift that make a latent of the autoencoder's own.
    fn scaling(self) -> (f32, f32) {
        (self.scale as f32, (-self.shift * self.scale) as f32)
    }
}

/// What the configuration of a class tells of both halves.
trait Half {
    /// The latents.
    fn latents(&self) -> Latents;

    /// Channels of the images that are encoded, and of those that are decoded.
    fn images(&self) -> [usize; 2];

    /// Latents of such a height and width to images.
    fn decoder(&self, latent: [usize; 2]) -> Graph;

    /// Images of such a height and width to latents, or, where these vary, to their distribution.
    fn encoder(&self, image: [usize; 2]) -> Graph;

    /// Whether an image has a distribution of latents, rather than one.
    fn varies(&self) -> bool;
}

/// A checked configuration of one of diffusers' autoencoders.
#[derive(Debug, Clone, PartialEq)]
pub enum AutoencoderConfig {
    /// `AutoencoderKL`.
    Kl(AutoencoderKLConfig),
    /// `VQModel`.
    Vq(VQModelConfig),
    /// `AutoencoderTiny`.
    Tiny(AutoencoderTinyConfig),
}

const KL: &str = "AutoencoderKL";
const VQ: &str = "VQModel";
const TINY: &str = "AutoencoderTiny";

impl AutoencoderConfig {
    /// The diffusers classes.
    pub const CLASSES: [&str; 3] = [KL, VQ, TINY];

    /// Reads and checks a `config.json`, whose `_class_name` says which autoencoder it is of; `file` is what error
    /// messages call it. Absent fields take diffusers' defaults.
    ///
    /// # Errors
    /// [`Error::Value`] naming file, field, value and remedy for anything that cannot be honoured.
    pub fn from_json(value: &Value, file: &str) -> Result<Self> {
        let fields = Fields::new(value, file)?;
        match fields.text("_class_name", None)? {
            Some(KL) => AutoencoderKLConfig::from_json(value, file).map(Self::Kl),
            Some(VQ) => VQModelConfig::from_json(value, file).map(Self::Vq),
            Some(TINY) => AutoencoderTinyConfig::from_json(value, file).map(Self::Tiny),
            _ => {
                let remedy = format!("must be one of {}", Self::CLASSES.join(", "));
                Err(fields.refuse("_class_name", remedy))
            }
        }
    }

    /// The same configuration as diffusers writes it, every field present.
    pub fn to_json(&self) -> Value {
        let json = match self {
            Self::Kl(config) => serde_json::to_value(config),
            Self::Vq(config) => serde_json::to_value(config),
            Self::Tiny(config) => serde_json::to_value(config),
        };
        // Numbers, names and lists of them.
        let mut json = json.unwrap_or_default();
        json["_class_name"] = self.class_name().into();
        json
    }

    /// The diffusers class.
    pub fn class_name(&self) -> &'static str {
        match self {
            Self::Kl(_) => KL,
            Self::Vq(_) => VQ,
            Self::Tiny(_) => TINY,
        }
    }

    fn half(&self) -> &dyn Half {
        match self {
            Self::Kl(config) => config,
            Self::Vq(config) => config,
            Self::Tiny(config) => config,
        }
    }

    /// Channels of a latent.
    pub fn latent_channels(&self) -> usize {
        self.half().latents().channels
    }

    /// Pixels of an image's side for each of a latent's: an image's sides are multiples of it.
    pub fn factor(&self) -> usize {
        self.half().latents().factor
    }

    /// Channels of the images that it decodes latents to.
    pub fn image_channels(&self) -> usize {
        self.half().images()[1]
    }

    /// Names and shapes of the weights of both halves.
    pub fn weight_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let factor = self.factor();
        let mut shapes = self.half().decoder([1, 1]).shapes();
        shapes.extend(self.half().encoder([factor, factor]).shapes());
        shapes
    }

    /// The half that makes images of latents of a height and a width, from the weights of both, in `dtype` on `device`
    /// (types as [`crate::NetworkConfig::load`]).
    ///
    /// # Errors
    /// [`Error::Weights`] naming what is missing, what does not belong, and what has another shape; [`Error::Value`] for
    /// a size of 0, and naming the field that asks for more memory than there is.
    pub fn decoder(
        &self,
        weights: HashMap<String, Tensor>,
        latent: [usize; 2],
        dtype: DType,
        device: &Device,
    ) -> Result<Decoder> {
        let half = self.half();
        check_size("latent", latent, 1)?;
        let compiled = self.compile(half.decoder(latent), weights, dtype, device)?;
        Ok(self.decodes(compiled, latent))
    }

    /// A decoder of latents of a height and a width.
    fn decodes(&self, compiled: Compiled, latent: [usize; 2]) -> Decoder {
        let (half, factor) = (self.half(), self.factor());
        let [from, to] = [half.latents().channels, half.images()[1]];
        let latent = [from, latent[0], latent[1]];
        let image = [to, factor * latent[1], factor * latent[2]];
        Decoder { compiled, config: self.clone(), latent, image }
    }

    /// The half that makes latents of images of a height and a width, multiples of [`AutoencoderConfig::factor`]; else as
    /// [`AutoencoderConfig::decoder`].
    ///
    /// # Errors
    /// As there.
    pub fn encoder(
        &self,
        weights: HashMap<String, Tensor>,
        image: [usize; 2],
        dtype: DType,
        device: &Device,
    ) -> Result<Encoder> {
        let half = self.half();
        check_size("image", image, self.factor())?;
        let compiled = self.compile(half.encoder(image), weights, dtype, device)?;
        let [height, width] = image;
        let (latents, varies) = (half.latents(), half.varies());
        Ok(Encoder { compiled, image: [half.images()[0], height, width], latents, varies })
    }

    fn demand(&self) -> Demand {
        let wide = match self {
            Self::Kl(_) | Self::Vq(_) => "block_out_channels",
            Self::Tiny(_) => "decoder_block_out_channels",
        };
        Demand::of(&self.to_json(), [wide, wide])
    }

    fn compile(
        &self,
        graph: Graph,
        weights: HashMap<String, Tensor>,
        dtype: DType,
        device: &Device,
    ) -> Result<Compiled> {
        let mut weights = here(weights);
        rename_attention(&mut weights);
        let mut weights = weights::fit(&self.weight_shapes(), weights)?;
        let own = graph.shapes();
        weights.retain(|name, _| own.contains_key(name));
        let demand = self.demand();
        let trained = weights.values().any(Weight::trained);
        if !trained {
            demand.check(&graph, device, dtype.size_in_bytes())?;
        }
        demand.built(|| Compiled::new(graph, weights, dtype, device), Compiled::footprint)
    }
}

/// Refuses sides that are none, or no multiples of what they must be.
fn check_size(what: &str, [height, width]: [usize; 2], factor: usize) -> Result<()> {
    let fits = |side: usize| side > 0 && side.is_multiple_of(factor);
    if fits(height) && fits(width) {
        return Ok(());
    }
    let remedy = format!("height and width must be multiples of {factor}, and not 0");
    Err(Error::value(format!("{what} size"), format!("{height}×{width}"), remedy))
}

/// The half of an autoencoder that makes images of latents.
pub struct Decoder {
    compiled: Compiled,
    config: AutoencoderConfig,
    latent: [usize; 3],
    image: [usize; 3],
}

impl Decoder {
    /// The images of a batch of latents `[B, channels, height, width]`, in [`Decoder::dtype`]: `[B, channels, height,
    /// width]` in that type, in [−1, 1] but for what a decoder overshoots by.
    ///
    /// On the CPU an image depends, to the bit, only on its own latent.
    ///
    /// # Errors
    /// Another shape or type, and whatever the device says.
    pub fn forward(&self, latents: &Tensor) -> TensorResult<Tensor> {
        check("latents", latents, self.latent, self.dtype())?;
        self.compiled.forward(latents, None, Conditions::default())
    }

    /// Whether [`Decoder::begin`] is for it: on a CPU it is.
    pub fn stretches(&self) -> bool {
        self.compiled.stretches()
    }

    /// As [`Decoder::forward`], to be done in so many stretches of layers, about as long as each other, between which the
    /// device may do something else. The images are the same to the bit.
    ///
    /// # Errors
    /// As [`Decoder::forward`]; a decoder that has no stretches.
    pub fn begin(&self, latents: &Tensor, stretches: usize) -> TensorResult<Decoding> {
        check("latents", latents, self.latent, self.dtype())?;
        self.compiled.begin(latents, stretches).map(Decoding)
    }

    /// Does the next stretch of what [`Decoder::begin`] began; the images after the last one.
    ///
    /// # Errors
    /// As [`Decoder::forward`]; what has ended.
    pub fn go_on(&self, decoding: &mut Decoding) -> TensorResult<Option<Tensor>> {
        self.compiled.go_on(&mut decoding.0)
    }

    /// The same evaluation, kernel by kernel; nothing where it is not compiled into kernels.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn profile(&self, latents: &Tensor) -> TensorResult<Vec<Timing>> {
        check("latents", latents, self.latent, self.dtype())?;
        self.compiled.profile(latents, None, Conditions::default())
    }

    /// The same decoder of latents of another height and width. Both share their weights, and each counts them in its
    /// [`Decoder::footprint`].
    ///
    /// # Errors
    /// [`Error::Value`] for a size of 0, one that no memory holds, and one that a decoder which runs on a GPU by kernels
    /// would have to be loaded anew for.
    pub fn at(&self, latent: [usize; 2]) -> Result<Self> {
        check_size("latent", latent, 1)?;
        let graph = self.config.half().decoder(latent);
        self.config.demand().check(&graph, self.device(), 0)?;
        Ok(self.config.decodes(self.compiled.at(graph)?, latent))
    }

    /// Channels, height and width of a latent.
    pub fn latent_shape(&self) -> [usize; 3] {
        self.latent
    }

    /// Channels, height and width of an image.
    pub fn image_shape(&self) -> [usize; 3] {
        self.image
    }

    /// The element type of what it takes and gives.
    pub fn dtype(&self) -> DType {
        self.compiled.dtype()
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        self.compiled.device()
    }

    /// Number of weights.
    pub fn parameters(&self) -> usize {
        self.compiled.parameters()
    }

    /// What it keeps in memory; nothing where it is not compiled into kernels.
    pub fn footprint(&self) -> Option<Footprint> {
        self.compiled.footprint()
    }
}

/// Latents half way to images. It holds what their decoder works on until it ends.
pub struct Decoding(Unfinished);

impl fmt::Debug for Decoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoding").finish_non_exhaustive()
    }
}

/// The half of an autoencoder that makes latents of images.
pub struct Encoder {
    compiled: Compiled,
    image: [usize; 3],
    latents: Latents,
    varies: bool,
}

impl Encoder {
    /// The latents of a batch of images `[B, channels, height, width]` in [−1, 1], in [`Encoder::dtype`].
    ///
    /// On the CPU they depend, to the bit, only on their own image.
    ///
    /// # Errors
    /// Another shape or type, and whatever the device says.
    pub fn forward(&self, images: &Tensor) -> TensorResult<Posterior> {
        check("images", images, self.image, self.dtype())?;
        let y = self.compiled.forward(images, None, Conditions::default())?;
        if !self.varies {
            return Ok(Posterior { mean: y, deviation: None });
        }
        let moments = y.chunk(2, 1)?;
        let (factor, shift) = self.latents.scaling();
        let mean = moments[0].affine(f64::from(factor), f64::from(shift))?;
        // Bounds of diffusers' own.
        let deviation = (moments[1].clamp(-30.0, 20.0)? * 0.5)?.exp()?;
        Ok(Posterior { mean, deviation: Some((deviation * f64::from(factor.abs()))?) })
    }

    /// Channels, height and width of an image.
    pub fn image_shape(&self) -> [usize; 3] {
        self.image
    }

    /// The device its weights are on, where images are expected.
    pub fn device(&self) -> &Device {
        self.compiled.device()
    }

    /// The element type of what it takes and gives.
    pub fn dtype(&self) -> DType {
        self.compiled.dtype()
    }

    /// What it keeps in memory; nothing where it is not compiled into kernels.
    pub fn footprint(&self) -> Option<Footprint> {
        self.compiled.footprint()
    }
}

/// The latents of images: those of one autoencoder are normally distributed (Kingma & Welling 2014), others' are not random.
pub struct Posterior {
    mean: Tensor,
    deviation: Option<Tensor>,
}

impl Posterior {
    /// The likeliest latents, `[B, channels, height, width]`.
    pub fn mode(&self) -> &Tensor {
        &self.mean
    }

    /// Latents drawn with standard normal `noise` of their shape; the likeliest where they are not random.
    ///
    /// # Errors
    /// Noise of another shape or type.
    pub fn sample(&self, noise: &Tensor) -> TensorResult<Tensor> {
        match &self.deviation {
            Some(deviation) => &self.mean + (deviation * noise)?,
            None => Ok(self.mean.clone()),
        }
    }
}

fn check(what: &str, tensor: &Tensor, shape: [usize; 3], dtype: DType) -> TensorResult<()> {
    let [channels, height, width] = shape;
    let batch = tensor.dims().first().copied().unwrap_or(0);
    if batch == 0 || tensor.dims() != [batch, channels, height, width] || tensor.dtype() != dtype {
        bail!(
            "{what} are {:?} {:?}, not {dtype:?} [B, {channels}, {height}, {width}] with B ≥ 1",
            tensor.dtype(),
            tensor.dims()
        )
    }
    Ok(())
}
