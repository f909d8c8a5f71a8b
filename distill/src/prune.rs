//! A student that begins with its teacher's most important channels.
//!
//! What leaving out channel c would do to the teacher's answer is, to first order, `J_c·w_c`: the
//! derivative by the channel's weights times these (Molchanov et al. 2017, arXiv 1611.06440, eq. 8;
//! Diff-Pruning, Fang et al. 2023, has it for diffusion). Its mean square over noisy samples from the
//! teacher's own walk, and over random directions `r` of the answer, is `E ⟨r, J_c·w_c⟩²`: one backward
//! pass each, and no data.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use candle_core::{DType, Device, Tensor};
use understudy_models::channels::{ChannelSet, Channels, Choice};
use understudy_models::{Error, NetworkConfig, Result, noise};

use crate::parameters::Parameters;
use crate::slices::with_f32;
use crate::teacher::Teacher;
use crate::training_batch::BatchSource;

/// Directions that are tried, each on samples of its own.
const PROBES: u64 = 24;

/// Weights for `student` out of `teacher`'s, chosen by what matters on the samples of `training batches`. What a student
/// does with a guidance scale that its teacher does not take begins as nothing.
///
/// # Errors
/// [`Error::Value`] for a student of another topology, or wider than its teacher anywhere.
pub fn weights(
    teacher: &Teacher,
    student: &NetworkConfig,
    batches: &mut dyn BatchSource,
    seed: u64,
) -> Result<BTreeMap<String, Tensor>> {
    let refuse = |problem: String| Err(Error::value("init", "pruned", problem));
    let alike = "give the student the teacher's blocks and layers, only narrower (such as --student \
                 0.5x), or begin from random weights";
    // The input for a guidance scale is the student's own.
    let plain = student.with_guidance(teacher.geometry().guidance);
    let plain = plain.as_ref().unwrap_or(student);
    let (Some(from), Some(to)) = (teacher.config.channels(), plain.channels()) else {
        let [theirs, ours] = [&teacher.config, student].map(NetworkConfig::class_name);
        return refuse(format!(
            "no channels can be left out from a {theirs} to a {ours}; begin from random weights \
             (--init random)"
        ));
    };
    if from.weights != to.weights {
        return refuse(format!("teacher and student have different layers; {alike}"));
    }
    if from.sets.iter().zip(&to.sets).any(|(from, to)| to.width > from.width) {
        return refuse(format!("the student is wider than its teacher; {alike}"));
    }
    let weights = teacher.weights()?;
    let importance = importance(teacher, &from, &weights, batches, seed)?;
    let kept: Vec<Vec<usize>> = from
        .sets
        .iter()
        .zip(&to.sets)
        .zip(&importance)
        .map(|((from, to), importance)| choose(*from, *to, importance))
        .collect();
    let narrow = |(name, weight): (String, Tensor)| -> Result<(String, Tensor)> {
        let mut narrow = weight;
        for (dimension, sets) in from.weights[&name].iter().enumerate() {
            if sets.is_empty() {
                continue;
            }
            let mut indices: Vec<u32> = Vec::new();
            let mut offset = 0;
            for &set in sets {
                indices.extend(kept[set].iter().map(|&channel| (offset + channel) as u32));
                offset += from.sets[set].width;
            }
            let indices = Tensor::new(indices, &Device::Cpu)?;
            narrow = narrow.contiguous()?.index_select(&indices, dimension)?;
        }
        Ok((name, narrow))
    };
    let mut narrowed: BTreeMap<String, Tensor> =
        weights.into_iter().map(narrow).collect::<Result<_>>()?;
    for (name, shape) in student.weight_shapes() {
        if let Entry::Vacant(entry) = narrowed.entry(name) {
            entry.insert(Tensor::zeros(shape, DType::F32, &Device::Cpu)?);
        }
    }
    Ok(narrowed)
}

/// `E ⟨r, J_c·w_c⟩²` of every channel of every set, up to a factor.
fn importance(
    teacher: &Teacher,
    channels: &Channels,
    weights: &BTreeMap<String, Tensor>,
    batches: &mut dyn BatchSource,
    seed: u64,
) -> Result<Vec<Vec<f64>>> {
    let parameters = Parameters::new(weights.clone())?;
    let network = teacher.config.load(parameters.tensors(), DType::F32, &Device::Cpu)?;
    let zeros = |set: &ChannelSet| vec![0.0; set.width];
    let mut sums: Vec<Vec<f64>> = channels.sets.iter().map(zeros).collect();
    while batches.prepare()?.is_some() {}
    for probe in 0..PROBES {
        let training_batch = batches.training_batch(probe)?.to_device(network.device())?;
        let answer = training_batch.ask(network.as_ref())?;
        let mut direction = vec![0.0; answer.elem_count()];
        noise::normal(seed, probe, &mut direction);
        let direction = Tensor::from_vec(direction, answer.dims(), answer.device())?;
        let gradients = (answer * direction)?.sum_all()?.backward()?;

        let mut effects: Vec<Vec<f64>> = channels.sets.iter().map(zeros).collect();
        for (name, var) in parameters.iter() {
            let (Some(gradient), Some(sets)) =
                (gradients.get(var.as_tensor()), channels.weights[name].first())
            else {
                continue;
            };
            let effect = (var.as_tensor() * gradient)?.contiguous()?;
            with_f32(&effect, |effect| {
                gather(effect, var.dims()[0], sets, channels, &mut effects)
            })?;
        }
        for (sum, effect) in sums.iter_mut().flatten().zip(effects.iter().flatten()) {
            *sum += effect * effect;
        }
    }
    Ok(sums)
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
