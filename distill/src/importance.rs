//! What leaving something out would do to a network's answer.
//!
//! To first order that is `J·w`: the derivative by the weights that make it times these (Molchanov et al. 2017, arXiv
//! 1611.06440, eq. 8; Diff-Pruning, Fang et al. 2023, has it for diffusion). Its mean square over noisy samples from the
//! network's own walk, and over random directions `r` of the answer, is `E ⟨r, J·w⟩²`: one backward pass each, and no data.
//! Directions are in v, whatever the network predicts: an error in v is as large an error in the image at every time.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use understudy_models::channels::{ChannelSet, Channels, Choice, Kept};
use understudy_models::schedule::{Class, PredictionType};
use understudy_models::{NetworkConfig, Result, noise};

use crate::objective::MOST_WEIGHT;
use crate::parameters::Parameters;
use crate::slices::with_f32;
use crate::teacher::Teacher;
use crate::training_batch::BatchSource;

/// Directions that are tried, each on samples of its own.
const PROBES: u64 = 24;

/// The importance of a network's channels, and of its products; up to one factor, the same for all.
pub struct Importance {
    channels: Channels,
    /// `E ⟨r, J·w⟩²` of every channel of every set.
    sets: Vec<Vec<f64>>,
    /// `⟨r, J·w⟩` of every weight, for each direction.
    weights: BTreeMap<String, Vec<f64>>,
}

impl Importance {
    /// Measures it on the samples of `batches`; nothing for a network whose channels cannot be left out.
    ///
    /// # Errors
    /// What the batches' source or the device says.
    pub fn new(
        teacher: &Teacher,
        weights: &BTreeMap<String, Tensor>,
        batches: &mut dyn BatchSource,
        seed: u64,
    ) -> Result<Option<Self>> {
        let Some(channels) = teacher.config.channels() else { return Ok(None) };
        let parameters = Parameters::new(weights.clone())?;
        let network = teacher.config.load(parameters.tensors(), DType::F32, &Device::Cpu)?;
        let in_v = in_v(teacher)?;
        let zeros = |set: &ChannelSet| vec![0.0; set.width];
        let mut sets: Vec<Vec<f64>> = channels.sets.iter().map(zeros).collect();
        let mut of_weights: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        while batches.prepare()?.is_some() {}
        for probe in 0..PROBES {
            let batch = batches.training_batch(probe)?.to_device(network.device())?;
            let answer = batch.ask(network.as_ref())?;
            let mut direction = vec![0.0; answer.elem_count()];
            noise::normal(seed, probe, &mut direction);
            let row = direction.len() / batch.rows();
            for (row, &t) in direction.chunks_exact_mut(row).zip(&batch.timesteps) {
                row.iter_mut().for_each(|number| *number *= in_v[t]);
            }
            let direction = Tensor::from_vec(direction, answer.dims(), answer.device())?;
            let gradients = (answer * direction)?.sum_all()?.backward()?;

            let mut effects: Vec<Vec<f64>> = channels.sets.iter().map(zeros).collect();
            for (name, var) in parameters.iter() {
                let Some(gradient) = gradients.get(var.as_tensor()) else { continue };
                let effect = (var.as_tensor() * gradient)?.contiguous()?;
                with_f32(&effect, |effect| {
                    let all = effect.iter().map(|&value| f64::from(value)).sum();
                    of_weights.entry(name.clone()).or_default().push(all);
                    if let Some(along) = channels.weights[name].first() {
                        gather(effect, var.dims()[0], along, &channels, &mut effects);
                    }
                })?;
            }
            for (sum, effect) in sets.iter_mut().flatten().zip(effects.iter().flatten()) {
                *sum += effect * effect;
            }
        }
        Ok(Some(Self { channels, sets, weights: of_weights }))
    }

    /// The most important channels for a narrower network, or one without some branches; nothing for one of another topology.
    pub fn kept(&self, narrower: &NetworkConfig) -> Option<Kept> {
        let choose = |origin: usize, to: ChannelSet| {
            choose(self.channels.sets[origin], to, &self.sets[origin])
        };
        Kept::new(self.channels.clone(), narrower.channels()?, choose)
    }

    /// What leaving out all else would do: the sum over channels, and the branches that are gone.
    pub fn lost(&self, kept: &Kept) -> f64 {
        let mut widest: BTreeMap<usize, &[usize]> = BTreeMap::new();
        for (origin, channels) in kept.sets() {
            let most = widest.entry(origin).or_insert(channels);
            if channels.len() > most.len() {
                *most = channels;
            }
        }
        let of_channels = widest.iter().map(|(&set, channels)| {
            let all: f64 = self.sets[set].iter().sum();
            all - channels.iter().map(|&channel| self.sets[set][channel]).sum::<f64>()
        });
        // The last product of a branch adds to a stream that is still there.
        let ends = |name: &str| {
            let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
            let weight = format!("{stem}.weight");
            let Some([output, input, ..]) = self.channels.weights.get(&weight).map(|it| &it[..])
            else {
                return false;
            };
            !input.is_empty() && output.iter().all(|set| widest.contains_key(set))
        };
        let mut gone = vec![0.0; PROBES as usize];
        for (_, effects) in self.weights.iter().filter(|(name, _)| !kept.has(name) && ends(name)) {
            gone.iter_mut().zip(effects).for_each(|(sum, effect)| *sum += effect);
        }
        of_channels.sum::<f64>() + gone.iter().map(|effect| effect * effect).sum::<f64>()
    }

    /// What leaving out everything would do, by the same count.
    pub fn all(&self) -> f64 {
        self.sets.iter().flatten().sum()
    }
}

/// What a change of the answer by one is, in v, at each training timestep: `v = α·eps − s·x0` at a fixed x_t. At most 10, since a
/// teacher's answers at the noisiest times have next to nothing of the image.
pub(crate) fn in_v(teacher: &Teacher) -> Result<Vec<f32>> {
    let alpha_bar = teacher.schedule.schedule(Class::Ddpm)?.alpha_bar;
    let of = |alpha_bar: f64| match teacher.schedule.prediction_type() {
        PredictionType::Epsilon => 1.0 / alpha_bar.sqrt(),
        PredictionType::Sample => 1.0 / (1.0 - alpha_bar).sqrt(),
        _ => 1.0,
    };
    Ok(alpha_bar.into_iter().map(|it| of(it).min(MOST_WEIGHT.sqrt()) as f32).collect())
}

/// Adds up what belongs to each channel along a weight's first dimension: the weights that make it.
fn gather(
    effect: &[f32],
    side: usize,
    sets: &[usize],
    channels: &Channels,
    effects: &mut [Vec<f64>],
) {
    let mut rows = effect.chunks_exact(effect.len() / side);
    for &set in sets {
        for (channel, row) in rows.by_ref().take(channels.sets[set].width).enumerate() {
            effects[set][channel] += row.iter().map(|&value| f64::from(value)).sum::<f64>();
        }
    }
}
/// The channels of `from` that `to` keeps, in their order.
fn choose(from: ChannelSet, to: ChannelSet, importance: &[f64]) -> Vec<usize> {
    match from.choice {
        Choice::Frequencies => frequencies(from.width, to.width),
        // Norms and heads see the same parts as before where both networks have as many.
        Choice::Any if from.parts == to.parts => {
            let (wide, narrow) = (from.width / from.parts, to.width / to.parts);
            let part = |part: usize| {
                let begin = part * wide;
                most(&importance[begin..begin + wide], narrow).map(move |channel| begin + channel)
            };
            (0..from.parts).flat_map(part).collect()
        }
        Choice::Any => most(importance, to.width).collect(),
    }
}

/// The `count` largest, in the order of their indices; of equals the first.
fn most(importance: &[f64], count: usize) -> impl Iterator<Item = usize> {
    let mut order: Vec<usize> = (0..importance.len()).collect();
    order.sort_by(|&a, &b| importance[b].total_cmp(&importance[a]).then(a.cmp(&b)));
    order.truncate(count);
    order.sort_unstable();
    order.into_iter()
}

/// Frequencies fall as `10000^(−i/half)`, so index `i` of a narrower set is index `i·half/narrow`.
fn frequencies(wide: usize, narrow: usize) -> Vec<usize> {
    let (half, part) = (wide / 2, (narrow / 2).max(1));
    let nearest = move |i: usize| ((i * half + part / 2) / part).min(half - 1);
    let first = (0..part).map(nearest);
    let second = (0..narrow - part).map(move |i| half + nearest(i));
    first.chain(second).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_keep_their_own_most_important_channels() {
        let set = |width, parts| ChannelSet { width, parts, choice: Choice::Any };
        let importance = [9.0, 1.0, 8.0, 7.0, 0.0, 2.0, 3.0, 1.0];
        assert_eq!(choose(set(8, 2), set(4, 2), &importance), [0, 2, 5, 6]);
        assert_eq!(choose(set(8, 2), set(4, 4), &importance), [0, 2, 3, 6]);
        assert_eq!(choose(set(8, 2), set(8, 2), &importance), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn frequencies_are_those_the_narrower_set_has() {
        assert_eq!(frequencies(8, 4), [0, 2, 4, 6]);
        assert_eq!(frequencies(12, 8), [0, 2, 3, 5, 6, 8, 9, 11]);
    }
}
