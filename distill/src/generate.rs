//! Images from any network, a batch at a time.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor, bail};
use understudy_models::{
    Conditioning, Conditions, Denoiser, Image,
    autoencoder::Decoder,
    noise,
    rollout::{self, FiniteCheck, Row},
    sampler::{self, Trajectory},
};

use crate::data::Images;
use crate::guidance::guided;

/// Which class each sample is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Classes {
    /// None: the network knows of no classes.
    None,
    /// Sample `i` (counted from the first, whatever its seed) takes entry `i mod len`.
    InTurn(Vec<u32>),
    /// Drawn from the sample's seed, evenly among the first so many, as the server does for a request that
    /// names none.
    FromSeed(usize),
}

impl Classes {
    /// All classes of a network in turn, but for the one that means "none" (`null_class` of its card).
    ///
    /// # Errors
    /// [`understudy_models::Error::Value`] for a network that is conditioned on numbers instead of classes.
    pub fn all(
        conditioning: Conditioning,
        null_class: Option<u32>,
    ) -> understudy_models::Result<Self> {
        match conditioning {
            Conditioning::None => Ok(Self::None),
            Conditioning::Classes(classes) => {
                let labels = (0..classes as u32).filter(|&label| Some(label) != null_class);
                Ok(Self::InTurn(labels.collect()))
            }
            Conditioning::TextTime { .. } => Err(understudy_models::Error::value(
                "addition_embed_type",
                "text_time",
                "a network that takes a pooled text beside the prompt (Stable Diffusion XL and 3) can be served, and neither distilled nor evaluated; use one of Stable Diffusion 1 or 2",
            )),
            Conditioning::Timestep | Conditioning::Embedding(_) => {
                Err(understudy_models::Error::value(
                    "class_embed_type",
                    "a number or an embedding",
                    "use a network that is unconditional or conditioned on classes",
                ))
            }
        }
    }

    /// The class of sample number `index`, which has the seed `seed`.
    pub fn label(&self, index: usize, seed: u64) -> Option<u32> {
        match self {
            Self::None => None,
            Self::InTurn(labels) => labels.get(index % labels.len().max(1)).copied(),
            Self::FromSeed(classes) => Some(noise::class_label(seed, *classes) as u32),
        }
    }
}

/// What a text-to-image network is told. Sample `i` is drawn after caption `i mod n`.
#[derive(Debug, Clone)]
pub struct Captions {
    /// The captions, `n` of them.
    pub texts: Vec<String>,
    /// The states of the captions, f32 `[n, tokens, width]`.
    pub prompts: Tensor,
    /// Those of the empty prompt, f32 `[1, tokens, width]`.
    pub empty: Tensor,
    /// How far samples are guided; 1 is not at all.
    pub scale: f64,
}

/// What is to be sampled. Sample `i` has the seed `first_seed + i`, and is the same to the bit on the
/// CPU as the server's for that seed, class and trajectory, whatever the batch.
#[derive(Debug, Clone)]
pub struct Sampling {
    /// The steps that all samples take.
    pub trajectory: Trajectory,
    /// Classes.
    pub classes: Classes,
    /// Prompts, of a text-to-image network.
    pub captions: Option<Captions>,
    /// The seed of sample 0; seeds stay below 2⁵³ and wrap there.
    pub first_seed: u64,
    /// Samples per network evaluation, at least 1.
    pub batch: usize,
}

/// Clean samples, in the order of their numbers.
#[derive(Debug, Clone)]
pub struct Batch {
    /// f32 `[B, C, H, W]`, about [−1, 1], on the network's device.
    pub x: Tensor,
    /// Each one's seed.
    pub seeds: Vec<u64>,
    /// Each one's class, for a network that has classes.
    pub labels: Option<Vec<u32>>,
    /// Each one's caption, for a network that draws after text.
    pub captions: Option<Vec<String>>,
}

/// Latents that are decoded together.
const DECODED_TOGETHER: usize = 8;

impl Batch {
    /// The samples as 8-bit pictures; those of a latent model by its decoder.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn images(&self, decoder: Option<&Decoder>) -> Result<Vec<Image>> {
        let Some(decoder) = decoder else { return Image::from_batch(&self.x) };
        let (rows, mut images) = (self.x.dim(0)?, Vec::new());
        for begin in (0..rows).step_by(DECODED_TOGETHER) {
            let latents = self.x.narrow(0, begin, DECODED_TOGETHER.min(rows - begin))?;
            let pixels = decoder.forward(&latents.to_dtype(decoder.dtype())?)?;
            images.extend(Image::from_batch(&pixels.to_dtype(DType::F32)?)?);
        }
        Ok(images)
    }

    /// Such pictures of the samples as a set.
    pub fn set(&self, images: &[Image]) -> Images {
        let (labels, captions) = (self.labels.clone(), self.captions.clone());
        Images { labels, captions, ..Images::of_pictures(images) }
    }
}

impl Sampling {
    /// Rows of an evaluation that a sample takes: two where it is guided by a network that takes no scale.
    pub fn rows(&self, network: &dyn Denoiser) -> usize {
        match &self.captions {
            Some(captions) if captions.scale != 1.0 && !network.geometry().guidance => 2,
            _ => 1,
        }
    }

    /// The seed of sample number `index`.
    pub fn seed(&self, index: usize) -> u64 {
        (self.first_seed + index as u64) % noise::SEEDS
    }

    /// The samples with the numbers in `range`, batch by batch.
    pub fn batches<'a>(
        &'a self,
        network: &'a dyn Denoiser,
        range: Range<usize>,
    ) -> impl Iterator<Item = Result<Batch>> + 'a {
        let end = range.end;
        range
            .step_by(self.batch.max(1))
            .map(move |begin| self.run(network, begin..end.min(begin + self.batch.max(1))))
    }

    /// The samples with the numbers in `range`, all in one batch.
    fn run(&self, network: &dyn Denoiser, range: Range<usize>) -> Result<Batch> {
        let geometry = network.geometry();
        let rows = range.len();
        let seeds: Vec<u64> = range.clone().map(|index| self.seed(index)).collect();
        let text = self
            .captions
            .as_ref()
            .map(|it| BatchText::new(it, range.clone(), self.rows(network) == 2, network.device()));
        let text = text.transpose()?;
        let caption = |captions: &Captions| {
            let texts = captions.texts.iter().cycle().skip(range.start % captions.texts.len());
            texts.take(rows).cloned().collect()
        };
        let captions = self.captions.as_ref().map(caption);
        let labels: Option<Vec<u32>> =
            range.zip(&seeds).map(|(index, &seed)| self.classes.label(index, seed)).collect();
        let condition = match &labels {
            Some(labels) => Some(Tensor::new(&labels[..], network.device())?),
            None => None,
        };
        let mut x = rollout::start(geometry, &seeds, network.device())?;
        let mut memory = sampler::empty_memory(&x)?;
        for (position, evaluation) in self.trajectory.iter().enumerate() {
            let timesteps = Tensor::full(evaluation.timestep as f32, rows, network.device())?;
            let input = x.to_dtype(network.dtype())?;
            let answer = match &text {
                None => network.forward(&input, &timesteps, condition.as_ref())?,
                Some(text) => text.answer(network, &input, &timesteps, condition.as_ref())?,
            };
            let row = |&seed: &u64| Row { seed, position, step: evaluation.step };
            let rows: Vec<Row> = seeds.iter().map(row).collect();
            let next = rollout::advance(geometry, &x, &memory, &answer, &rows)?;
            (x, memory) = (next.x, next.memory);
        }
        if let Some(row) = FiniteCheck::new(&x)?.first_bad()? {
            bail!("the sample with seed {} came out as NaN or infinity", seeds[row])
        }
        Ok(Batch { x, seeds, labels, captions })
    }
}

/// The prompts of a batch's samples, and how far these are guided, for all their steps.
struct BatchText {
    /// Of each row; of a guided network that takes no scale those of the empty prompt follow.
    prompts: Tensor,
    scale: f64,
    /// Whether evaluations have two rows a sample.
    twice: bool,
}

impl BatchText {
    fn new(captions: &Captions, range: Range<usize>, twice: bool, device: &Device) -> Result<Self> {
        let (all, rows) = (captions.prompts.dim(0)?, range.len());
        let places: Vec<u32> = range.map(|index| (index % all) as u32).collect();
        let places = Tensor::new(places, captions.prompts.device())?;
        let mut prompts = captions.prompts.index_select(&places, 0)?;
        if twice {
            prompts = Tensor::cat(&[&prompts, &captions.empty.repeat((rows, 1, 1))?], 0)?;
        }
        Ok(Self { prompts: prompts.to_device(device)?, scale: captions.scale, twice })
    }

    /// The guided answer.
    fn answer(
        &self,
        network: &dyn Denoiser,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> Result<Tensor> {
        let rows = x.dim(0)?;
        let double = |tensor: &Tensor| match self.twice {
            true => Tensor::cat(&[tensor, tensor], 0),
            false => Ok(tensor.clone()),
        };
        let (x, timesteps) = (double(x)?, double(timesteps)?);
        let condition = condition.map(double).transpose()?;
        let guidance = match network.geometry().guidance {
            true => Some(Tensor::full((self.scale - 1.0) as f32, rows, network.device())?),
            false => None,
        };
        let conditions = Conditions {
            condition: condition.as_ref(),
            prompt: Some(&self.prompts),
            guidance: guidance.as_ref(),
        };
        let answer = network.evaluate(&x, &timesteps, conditions)?.to_dtype(DType::F32)?;
        if !self.twice {
            return Ok(answer);
        }
        let (with, without) = (answer.narrow(0, 0, rows)?, answer.narrow(0, rows, rows)?);
        guided(&with, &without, &vec![self.scale; rows])
    }
}
