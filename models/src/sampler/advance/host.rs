//! The step on the CPU: plain loops over one row at a time, which are what the compiler vectorises; and the twin of
//! the kernel for GPUs.
//!
//! A row is a few thousand numbers, so the passes below find it in the first-level cache.

use candle_core::{CpuStorage, Layout, Result, Storage, bail};

use super::Advance;
use super::quantile::threshold;
use crate::sampler::{Bound, MEMORIES, NoiseScale, Remember, Step};

/// The numbers of a contiguous f32 tensor in host memory.
fn numbers<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => bail!("advance: expected contiguous f32 in host memory"),
    }
}

pub(super) fn advance(
    Advance { steps, noise }: &Advance,
    (x, x_at): (&CpuStorage, &Layout),
    (memory, memory_at): (&CpuStorage, &Layout),
    (model, model_at): (&CpuStorage, &Layout),
) -> Result<Vec<f32>> {
    let operands = (numbers(x, x_at)?, numbers(memory, memory_at)?, numbers(model, model_at)?);
    let length = operands.0.len();
    let mut all = vec![0.0; (2 + MEMORIES) * length];
    let (x, rest) = all.split_at_mut(length);
    let (x0, memory) = rest.split_at_mut(length);
    let mut buffers = Buffers { x, memory, x0 };
    let storage = noise.as_ref().map(|noise| noise.storage_and_layout());
    let noise = match &storage {
        Some((storage, layout)) => match &**storage {
            Storage::Cpu(storage) => Some(numbers(storage, layout)?),
            _ => bail!("advance: the noise is not in host memory"),
        },
        None => None,
    };
    buffers.fill(operands, noise, steps);
    Ok(all)
}

/// One row of what a step reads.
struct Row<'a> {
    x: &'a [f32],
    /// As long as `x` for each value remembered, the newest first.
    memory: &'a [f32],
    model: &'a [f32],
    /// Empty where the network tells none.
    variance: &'a [f32],
    /// Empty where no row needs it.
    noise: &'a [f32],
}

struct Buffers<'a> {
    x: &'a mut [f32],
    memory: &'a mut [f32],
    x0: &'a mut [f32],
}

impl Buffers<'_> {
    fn fill(
        &mut self,
        (x, memory, model): (&[f32], &[f32], &[f32]),
        noise: Option<&[f32]>,
        steps: &[Step],
    ) {
        if x.is_empty() {
            return;
        }
        let length = x.len() / steps.len();
        let answer = model.len() / steps.len();
        for (i, step) in steps.iter().enumerate() {
            let here = i * length..(i + 1) * length;
            let remembered = i * MEMORIES * length..(i + 1) * MEMORIES * length;
            let (model, variance) = model[i * answer..(i + 1) * answer].split_at(length);
            let row = Row {
                x: &x[here.clone()],
                memory: &memory[remembered.clone()],
                model,
                variance,
                noise: noise.map_or(&[], |noise| &noise[here.clone()]),
            };
            estimate(step, &row, &mut self.x0[here.clone()]);
            let x0 = &self.x0[here.clone()];
            combine(step, &row, x0, &mut self.x[here.clone()]);
            add_noise(step, &row, &mut self.x[here]);
            remember(step, &row, x0, &mut self.memory[remembered]);
        }
    }
}

/// `x0 = bound(p·x + q·model)`.
fn estimate(step: &Step, row: &Row<'_>, x0: &mut [f32]) {
    let (p, q) = (step.p as f32, step.q as f32);
    for ((x0, x), model) in x0.iter_mut().zip(row.x).zip(row.model) {
        *x0 = p * x + q * model;
    }
    match step.bound {
        Bound::None => {}
        Bound::Clamp { range } => clamp(x0, range as f32),
        Bound::Threshold { ratio, max } => {
            let limit = threshold(x0, ratio, max);
            clamp(x0, limit);
            x0.iter_mut().for_each(|x0| *x0 /= limit);
        }
    }
}

/// NaN stays NaN: it is neither above nor below.
fn clamp(values: &mut [f32], limit: f32) {
    for value in values {
        *value = if *value > limit {
            limit
        } else if *value < -limit {
            -limit
        } else {
            *value
        };
    }
}

/// `x' = a·x + b·x0 + e·model (+ c·memory for each that is read)`.
fn combine(step: &Step, row: &Row<'_>, x0: &[f32], out: &mut [f32]) {
    let (a, b, e) = (step.a as f32, step.b as f32, step.e as f32);
    for (((out, x), x0), model) in out.iter_mut().zip(row.x).zip(x0).zip(row.model) {
        *out = a * x + b * x0 + e * model;
    }
    for (c, memory) in step.c.into_iter().zip(row.memory.chunks_exact(out.len())) {
        let c = c as f32;
        if c != 0.0 {
            out.iter_mut().zip(memory).for_each(|(out, memory)| *out += c * memory);
        }
    }
}

/// What is remembered comes before what was, of which the oldest is forgotten.
fn remember(step: &Step, row: &Row<'_>, x0: &[f32], out: &mut [f32]) {
    let newest = match step.remember {
        Remember::Nothing => return out.copy_from_slice(row.memory),
        Remember::X0 => x0,
        Remember::Answer => row.model,
    };
    let (first, rest) = out.split_at_mut(newest.len());
    first.copy_from_slice(newest);
    rest.copy_from_slice(&row.memory[..rest.len()]);
}

/// `x' += d·noise`.
fn add_noise(step: &Step, row: &Row<'_>, out: &mut [f32]) {
    match step.d {
        NoiseScale::Fixed(scale) => {
            if step.needs_noise() {
                let scale = scale as f32;
                out.iter_mut().zip(row.noise).for_each(|(out, noise)| *out += scale * noise);
            }
        }
        NoiseScale::LearnedRange { min_log, max_log } => {
            let (middle, slope) = log_scale(min_log, max_log);
            for ((out, noise), variance) in out.iter_mut().zip(row.noise).zip(row.variance) {
                *out += libm::expf(middle + slope * variance) * noise;
            }
        }
        NoiseScale::Learned => {
            for ((out, noise), &variance) in out.iter_mut().zip(row.noise).zip(row.variance) {
                let scale = if variance < 0.0 { 0.0 } else { variance.sqrt() };
                *out += scale * noise;
            }
        }
    }
}

/// `ln(scale) = middle + slope·r`: half of `lerp(min_log, max_log, (r + 1)/2)`.
pub(super) fn log_scale(min_log: f64, max_log: f64) -> (f32, f32) {
    (((min_log + max_log) / 4.0) as f32, ((max_log - min_log) / 4.0) as f32)
}
