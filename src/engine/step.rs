//! One batched network evaluation, and what every sample in it makes of the answer.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use candle_core::{DType, Device, Result, Tensor};
use understudy_models::{
    Conditioning, Conditions, Denoiser, Error, Prompt,
    autoencoder::Decoder,
    rollout::{self, FiniteCheck, Row},
    sampler::{self, Advanced, Mixture},
    text::PromptStates,
};

use super::{
    Beginning, Image, Mask,
    batcher::SampleKey,
    embeddings::{Embeddings, States, Tokens},
    sample::{Kept, Latent, Origin, Sample, Task, Walk},
    stage::Stage,
};
use crate::registry::Replica;

/// What a sample made of an evaluation.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It goes on; with a preview of x0, and its number, if one is due.
    Going(Option<(usize, Image)>),
    /// The image is finished.
    Image(Image),
    /// The raw answer, `[out_channels, height, width]`, flat.
    Raw(Vec<f32>),
    /// The network answered NaN or infinity for this sample.
    NonFinite {
        /// The training timestep it was asked about.
        timestep: f64,
    },
    /// The autoencoder answered NaN or infinity for this sample.
    Undecodable,
}

/// Works out the hidden states of the samples' prompts, each once, as far as they are not known by now.
///
/// # Errors
/// When a tensor operation fails; nothing is known then.
pub(super) fn encode(
    replica: &Replica,
    known: &Embeddings,
    samples: &mut [Sample],
) -> Result<Vec<Outcome>> {
    let mut unknown: Vec<Tokens> = Vec::new();
    for prompt in samples.iter().flat_map(|sample| &sample.prompts) {
        if prompt.states.is_none()
            && known.get(&prompt.tokens).is_none()
            && !unknown.contains(&prompt.tokens)
        {
            unknown.push(Arc::clone(&prompt.tokens));
        }
    }
    let new = read(replica, &unknown)?;
    for prompt in samples.iter_mut().flat_map(|sample| &mut sample.prompts) {
        if prompt.states.is_none() {
            let place = unknown.iter().position(|tokens| *tokens == prompt.tokens);
            let states = place.map(|place| new[place].clone());
            prompt.states = states.or_else(|| known.get(&prompt.tokens));
        }
    }
    for (tokens, states) in unknown.into_iter().zip(new) {
        known.keep(tokens, states);
    }
    Ok(samples.iter().map(|_| Outcome::Going(None)).collect())
}

/// What prompts come to, on the CPU.
///
/// # Errors
/// A model without a text encoder, and whatever the device says.
pub(super) fn read(replica: &Replica, prompts: &[Tokens]) -> Result<Vec<States>> {
    if prompts.is_empty() {
        return Ok(Vec::new());
    }
    let Some(encoder) = replica.encoder() else { candle_core::bail!("no text encoder") };
    let ids: Vec<&[u32]> = prompts.iter().map(|tokens| tokens.ids()).collect();
    let read = encoder.read(&ids).map_err(|error| match error {
        // A fault of the device stays one.
        Error::Tensor(error) => error,
        error => candle_core::Error::Msg(error.to_string()),
    })?;
    let of = |(tokens, PromptStates { states, pooled }): (&Tokens, PromptStates)| {
        let hidden = match tokens.weights() {
            Some(weights) => weigh(&states, weights)?,
            None => states,
        };
        let states = States { hidden, pooled: pooled.into() };
        if tokens.are_unsaid() { states.zeros() } else { Ok(states) }
    };
    prompts.iter().zip(read).map(of).collect()
}

/// Hidden states `[tokens, width]` times the weights of their tokens, and scaled so that their mean stays: what diffusers' long prompt
/// weighting pipeline does.
fn weigh(states: &Tensor, weights: Vec<f32>) -> Result<Tensor> {
    let mean = |states: &Tensor| states.mean_all()?.to_scalar::<f32>();
    let weighted =
        states.broadcast_mul(&Tensor::from_vec(weights, (states.dim(0)?, 1), &Device::Cpu)?)?;
    let factor = mean(states)? / mean(&weighted)?;
    // Of states around 0 there is no such scale.
    if factor.is_finite() { weighted * f64::from(factor) } else { Ok(weighted) }
}

/// The latents that samples begin with, of their images.
///
/// # Errors
/// When a tensor operation fails; no sample has begun then.
pub(super) fn embed(replica: &Replica, samples: &mut [Sample]) -> Result<Vec<Outcome>> {
    let Some(encoder) = replica.image_encoder() else { candle_core::bail!("no image encoder") };
    let network = replica.network();
    let (mut images, mut walks) = (Vec::new(), Vec::new());
    for sample in samples {
        let Task::Generate(walk) = &mut sample.task else { candle_core::bail!("no image") };
        let Origin::Image(beginning) = &walk.start else { candle_core::bail!("no image") };
        images.push(beginning.image.clone());
        walks.push((beginning.clone(), walk));
    }
    let images = Tensor::cat(&images, 0)?.to_device(network.device())?.to_dtype(encoder.dtype())?;
    let seeds: Vec<u64> = walks.iter().map(|(_, walk)| walk.seed).collect();
    let variation = rollout::variation(network.geometry(), &seeds, network.device())?;
    let latents = encoder.forward(&images)?.sample(&variation.to_dtype(encoder.dtype())?)?;
    let latents = latents.to_dtype(DType::F32)?;
    let finite = FiniteCheck::new(&latents)?.rows()?;
    let mut outcomes = Vec::new();
    for (row, (beginning, walk)) in walks.into_iter().enumerate() {
        let clean = latents.narrow(0, row, 1)?.contiguous()?;
        walk.start = Origin::Latent(with_noise(network, walk, clean, &beginning)?);
        outcomes.push(if finite[row] { Outcome::Going(None) } else { Outcome::Undecodable });
    }
    Ok(outcomes)
}

/// The images of samples whose walks are done; of one that is decoded in parts the next of these.
///
/// # Errors
/// When a tensor operation fails.
pub(super) fn decode(replica: &Replica, samples: &mut [Sample]) -> Result<Vec<Outcome>> {
    let Some(decoder) = replica.decoder() else { candle_core::bail!("no decoder") };
    if let [sample] = samples
        && sample.admission.parts[Stage::Decode].evaluations > 1
    {
        return Ok(vec![decode_part(decoder, sample)?]);
    }
    let latent = |sample: &Sample| match &sample.task {
        Task::Generate(Walk { latent: Some(latent), .. }) => Ok((latent.x.clone(), latent.row)),
        _ => candle_core::bail!("no latent"),
    };
    let latents = stack(&samples.iter().map(latent).collect::<Result<Vec<_>>>()?)?;
    decoded(&decoder.forward(&latents.to_dtype(decoder.dtype())?)?)
}

fn decode_part(decoder: &Decoder, sample: &mut Sample) -> Result<Outcome> {
    let parts = sample.admission.parts[Stage::Decode].evaluations;
    let Task::Generate(walk) = &mut sample.task else { candle_core::bail!("no latent") };
    if let Some(Latent { x, row, .. }) = walk.latent.take() {
        let latent = x.narrow(0, row, 1)?.to_dtype(decoder.dtype())?;
        walk.decoding = Some(Box::new(decoder.begin(&latent, parts)?));
    }
    let Some(decoding) = &mut walk.decoding else { candle_core::bail!("no latent") };
    let Some(image) = decoder.go_on(decoding)? else { return Ok(Outcome::Going(None)) };
    decoded(&image)?.pop().ok_or_else(|| candle_core::Error::Msg("an empty batch".into()))
}

/// What comes of images as a decoder makes them.
fn decoded(images: &Tensor) -> Result<Vec<Outcome>> {
    let images = images.to_dtype(DType::F32)?;
    let finite = FiniteCheck::new(&images)?.rows()?;
    let pictures = Image::from_batch(&images)?;
    let outcome =
        |(image, finite)| if finite { Outcome::Image(image) } else { Outcome::Undecodable };
    Ok(pictures.into_iter().zip(finite).map(outcome).collect())
}

/// Evaluates the network once for all `samples`, which may stand anywhere on any trajectory, and advances each. What
/// happens to a sample does not depend on the others.
///
/// # Errors
/// When a tensor operation fails; no sample has moved then.
pub(super) fn begin<'a>(replica: &'a Replica, samples: &mut [Sample]) -> Result<Begun<'a>> {
    let network = replica.network();
    for sample in samples.iter_mut() {
        if let Task::Generate(walk @ Walk { latent: None, .. }) = &mut sample.task {
            let start = std::mem::replace(&mut walk.start, Origin::Noise);
            walk.latent = Some(begun(match start {
                Origin::Noise => drawn(network, walk.seed)?,
                Origin::Latent(latent) => latent,
                // Of a model that works on pixels.
                Origin::Image(beginning) => {
                    let clean = beginning.image.to_device(network.device())?;
                    with_noise(network, walk, clean, &beginning)?
                }
            })?);
            let tokens = network.geometry().prompt.map_or(0, |prompt| prompt.tokens);
            for states in sample.prompts.iter_mut().filter_map(|it| it.states.as_mut()) {
                *states = states.on(network.device(), tokens)?;
            }
        }
    }
    let answer = ask(network, samples)?;
    let finite = FiniteCheck::new(&answer)?;

    let (mut asked, mut walks, mut answers) = (Vec::new(), Vec::new(), Vec::new());
    let mut row = 0;
    for sample in samples {
        let rows = sample.admission.rows();
        asked.push(Asked {
            key: sample.admission.key,
            rows: row..row + rows,
            timestep: match &mut sample.task {
                Task::Infer { timestep, .. } => f64::from(*timestep),
                Task::Generate(walk) => {
                    answers.push(match rows {
                        1 => (answer.clone(), row),
                        _ => (guided(&answer.narrow(0, row, rows)?, walk, network)?, 0),
                    });
                    let timestep = walk.current().timestep;
                    walks.push(walk);
                    timestep
                }
            },
        });
        row += rows;
    }
    let next = advance(network, walks, &answers)?;
    Ok(Begun { replica, check: Check { finite, asked }, answer, next })
}

/// An evaluation that the device has been asked for. It may not have ended.
pub(super) struct Begun<'a> {
    replica: &'a Replica,
    check: Check,
    answer: Tensor,
    /// Of the samples that are images, in their order, the state after this step.
    next: Option<Advanced>,
}

impl Begun<'_> {
    /// Whether some sample is to be given something that this evaluation makes.
    pub(super) fn due(samples: &[Sample]) -> bool {
        samples.iter().any(|sample| match &sample.task {
            Task::Infer { .. } => true,
            Task::Generate(walk) => walk.is_done() || walk.preview_due().is_some(),
        })
    }

    /// Waits for the end; one outcome per sample.
    ///
    /// # Errors
    /// When the device failed.
    pub(super) fn end(self, samples: &[Sample]) -> Result<Vec<Outcome>> {
        let bad = self.check.bad()?;
        let mut images = 0..;
        let outcome = |(asked, sample): (&Asked, &Sample)| {
            let row = match &sample.task {
                Task::Infer { .. } => None,
                Task::Generate(_) => images.next(),
            };
            if let Some(&timestep) = bad.get(&asked.key) {
                return Ok(Outcome::NonFinite { timestep });
            }
            let (Task::Generate(walk), Some(next), Some(row)) = (&sample.task, &self.next, row)
            else {
                let answer = self.answer.get(asked.rows.start)?;
                return Ok(Outcome::Raw(answer.flatten_all()?.to_vec1()?));
            };
            if walk.is_done() {
                return match self.replica.decoder() {
                    Some(_) => Ok(Outcome::Going(None)),
                    None => {
                        // Finite answers, guided far away from each other, may come to something that is not.
                        let x = next.x.narrow(0, row, 1)?;
                        let finite = FiniteCheck::new(&x)?.rows()?.into_iter().all(|finite| finite);
                        match finite {
                            true => Ok(Outcome::Image(image(&x)?)),
                            false => Ok(Outcome::NonFinite { timestep: asked.timestep }),
                        }
                    }
                };
            }
            let preview = |number| {
                let x0 = next.x0.narrow(0, row, 1)?;
                let image = match self.replica.preview() {
                    Some(preview) => preview.image(&x0)?,
                    None => image(&x0)?,
                };
                Ok::<_, candle_core::Error>((number, image))
            };
            Ok(Outcome::Going(walk.preview_due().map(preview).transpose()?))
        };
        self.check.asked.iter().zip(samples).map(outcome).collect()
    }

    /// What is left to look at where nothing is due.
    pub(super) fn check(self) -> Check {
        self.check
    }
}

/// What tells whether the network's answers are numbers.
pub(super) struct Check {
    finite: FiniteCheck,
    asked: Vec<Asked>,
}

/// What a sample asked.
struct Asked {
    key: SampleKey,
    rows: Range<usize>,
    timestep: f64,
}

impl Check {
    /// Waits for the end of the evaluation. The samples for which the network answered NaN or infinity, and the training
    /// timesteps that it was asked about.
    ///
    /// # Errors
    /// When the device failed.
    pub(super) fn bad(&self) -> Result<BTreeMap<SampleKey, f64>> {
        let finite = self.finite.rows()?;
        let bad = |asked: &&Asked| finite[asked.rows.clone()].contains(&false);
        Ok(self.asked.iter().filter(bad).map(|asked| (asked.key, asked.timestep)).collect())
    }
}

/// The noise that a seed means.
fn drawn(network: &dyn Denoiser, seed: u64) -> Result<Tensor> {
    rollout::start(network.geometry(), &[seed], network.device())
}

/// The clean image that a walk begins with, f32 `[1, C, H, W]` as the network works on it, with the noise of its seed. Where some of
/// it is to stay, the walk has it from now on.
fn with_noise(
    network: &dyn Denoiser,
    walk: &mut Walk,
    clean: Tensor,
    beginning: &Beginning,
) -> Result<Tensor> {
    let noise = drawn(network, walk.seed)?;
    let x = mixed(&clean, &noise, beginning.begin)?;
    walk.kept = match &beginning.mask {
        Some(mask) => {
            let Mask { drawn, after } = &**mask;
            let (drawn, after) = (drawn.to_device(network.device())?, Arc::clone(after));
            Some(Kept { mask: Arc::new(Mask { drawn, after }), clean, noise })
        }
        None => None,
    };
    Ok(x)
}

fn mixed(clean: &Tensor, eps: &Tensor, Mixture { signal, noise }: Mixture) -> Result<Tensor> {
    (clean * signal)? + (eps * noise)?
}

/// `x` `[B, C, H, W]` of walks that have all taken a step, with what is to stay of their images put back in, as noisy as the rest:
/// what diffusers' inpainting does with networks that see no mask.
fn kept(x: &Tensor, walks: &[&mut Walk]) -> Result<Tensor> {
    if walks.iter().all(|walk| walk.kept.is_none()) {
        return Ok(x.clone());
    }
    let row = |(row, walk): (usize, &&mut Walk)| {
        let x = x.narrow(0, row, 1)?;
        let Some(Kept { mask, clean, noise }) = &walk.kept else { return Ok(x) };
        let own = mixed(clean, noise, mask.after[walk.position])?;
        // own + drawn·(x − own), which is exactly own where nothing is drawn.
        &own + (x - &own)?.broadcast_mul(&mask.drawn)?
    };
    Tensor::cat(&walks.iter().enumerate().map(row).collect::<Result<Vec<_>>>()?, 0)
}

/// A walk begins at f32 `[1, C, H, W]`.
fn begun(x: Tensor) -> Result<Latent> {
    let memory = sampler::empty_memory(&x)?;
    Ok(Latent { x, memory, row: 0 })
}

/// The network's answer, f32 `[rows, out_channels, height, width]`; a guided sample has two rows, the
/// second with the class that means "none".
fn ask(network: &dyn Denoiser, samples: &[Sample]) -> Result<Tensor> {
    let device = network.device();
    let mut xs = Vec::new();
    let mut timesteps = Vec::new();
    let mut conditions = Vec::new();
    let mut prompts = Vec::new();
    let mut scales = Vec::new();
    for sample in samples {
        match &sample.task {
            Task::Infer { x, timestep, states, guidance_scale } => {
                if let Some(Prompt { tokens, width }) = network.geometry().prompt {
                    prompts.push(Tensor::from_slice(states, (tokens, width), device)?);
                }
                scales.push(guidance_scale - 1.0);
                xs.push((Tensor::from_slice(x, &latent_shape(network, 1)[..], device)?, 0));
                timesteps.push(*timestep);
                conditions.extend_from_slice(&sample.condition);
            }
            Task::Generate(walk) => {
                let Some(latent) = &walk.latent else { candle_core::bail!("no latent") };
                for row in 0..sample.admission.rows() {
                    if let Some(prompt) = sample.prompts.get(row) {
                        let Some(states) = &prompt.states else { candle_core::bail!("no states") };
                        prompts.push(states.hidden.clone());
                        if let Conditioning::TextTime { numbers, .. } =
                            network.geometry().conditioning
                        {
                            conditions.extend_from_slice(&states.pooled);
                            let sizes = sizes(&sample.admission.model.image);
                            conditions.extend(sizes.into_iter().take(numbers));
                        }
                    }
                    scales.push(walk.guidance_scale as f32 - 1.0);
                    xs.push((latent.x.clone(), latent.row));
                    timesteps.push(walk.current().timestep as f32);
                    match sample.admission.model.card.null_class.filter(|_| row == 1) {
                        Some(null_class) => conditions.push(null_class as f32),
                        None => conditions.extend_from_slice(&sample.condition),
                    }
                }
            }
        }
    }
    let rows = timesteps.len();
    let x = stack(&xs)?.to_dtype(network.dtype())?;
    let timesteps = Tensor::from_vec(timesteps, rows, device)?;
    let condition = match network.geometry().conditioning {
        Conditioning::None => None,
        Conditioning::Classes(_) => {
            let labels: Vec<u32> = conditions.iter().map(|&label| label as u32).collect();
            Some(Tensor::from_vec(labels, rows, device)?)
        }
        Conditioning::Timestep => Some(Tensor::from_vec(conditions, rows, device)?),
        Conditioning::Embedding(width) => {
            Some(Tensor::from_vec(conditions, (rows, width), device)?)
        }
        Conditioning::TextTime { text, numbers } => {
            Some(Tensor::from_vec(conditions, (rows, text + numbers), device)?)
        }
    };
    let prompt = match prompts.is_empty() {
        true => None,
        false => Some(Tensor::stack(&prompts, 0)?),
    };
    let guidance = match network.geometry().guidance {
        true => Some(Tensor::from_vec(scales, rows, device)?),
        false => None,
    };
    let conditions = Conditions {
        condition: condition.as_ref(),
        prompt: prompt.as_ref(),
        guidance: guidance.as_ref(),
    };
    network.evaluate(&x, &timesteps, conditions)?.to_dtype(DType::F32)
}

/// What a network is told of an image's size beside a pooled text, in pixels: the height and width that it had, the corner at
/// which it was cut, and the height and width it has: those of an image that was not cut, as diffusers has it for who says nothing else.
fn sizes([_, height, width]: &[usize; 3]) -> [f32; 6] {
    let [height, width] = [*height as f32, *width as f32];
    [height, width, 0.0, 0.0, height, width]
}

/// Classifier-free guidance (Ho and Salimans, 2022, eq. 6) in the form `none + s·(class − none)`, where
/// s = 1 is no guidance. A learned variance is the class's.
fn guided(rows: &Tensor, walk: &Walk, network: &dyn Denoiser) -> Result<Tensor> {
    let channels = network.geometry().in_channels;
    let (class, none) = (rows.narrow(0, 0, 1)?, rows.narrow(0, 1, 1)?);
    let (class_mean, none_mean) = (class.narrow(1, 0, channels)?, none.narrow(1, 0, channels)?);
    let mean = (&none_mean + ((class_mean - &none_mean)? * walk.guidance_scale)?)?;
    match network.geometry().out_channels - channels {
        0 => Ok(mean),
        variance => Tensor::cat(&[mean, class.narrow(1, channels, variance)?], 1),
    }
}

/// Advances every walk by its own step, in one batch.
fn advance(
    network: &dyn Denoiser,
    walks: Vec<&mut Walk>,
    answers: &[(Tensor, usize)],
) -> Result<Option<Advanced>> {
    if walks.is_empty() {
        return Ok(None);
    }
    let latents = || walks.iter().filter_map(|walk| walk.latent.as_ref());
    let x = stack(&latents().map(|latent| (latent.x.clone(), latent.row)).collect::<Vec<_>>())?;
    let memory: Vec<_> = latents().map(|latent| (latent.memory.clone(), latent.row)).collect();
    let memory = stack(&memory)?;
    let row = |walk: &&mut Walk| Row {
        seed: walk.seed,
        position: walk.position,
        step: walk.current().step,
    };
    let rows: Vec<Row> = walks.iter().map(row).collect();
    let mut next = rollout::advance(network.geometry(), &x, &memory, &stack(answers)?, &rows)?;
    next.x = kept(&next.x, &walks)?;
    for (row, walk) in walks.into_iter().enumerate() {
        walk.position += 1;
        walk.latent = Some(Latent { x: next.x.clone(), memory: next.memory.clone(), row });
    }
    Ok(Some(next))
}

/// Rows of batches as one batch: the very one that they are of, where they are all of its rows in order, as they are
/// when nobody came or went.
fn stack(rows: &[(Tensor, usize)]) -> Result<Tensor> {
    if let Some((batch, _)) = rows.first()
        && batch.dim(0)? == rows.len()
        && rows.iter().enumerate().all(|(i, (of, row))| of.id() == batch.id() && *row == i)
    {
        return Ok(batch.clone());
    }
    let row = |(batch, row): &(Tensor, usize)| batch.narrow(0, *row, 1);
    Tensor::cat(&rows.iter().map(row).collect::<Result<Vec<_>>>()?, 0)
}

fn latent_shape(network: &dyn Denoiser, rows: usize) -> [usize; 4] {
    let geometry = network.geometry();
    [rows, geometry.in_channels, geometry.height, geometry.width]
}

/// The picture of one f32 `[1, C, H, W]`.
fn image(x: &Tensor) -> Result<Image> {
    Image::from_batch(x)?.pop().ok_or_else(|| candle_core::Error::Msg("an empty batch".into()))
}

#[cfg(test)]
#[path = "step_tests.rs"]
mod tests;
