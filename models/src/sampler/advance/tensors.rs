//! The step in tensor operations, for devices other than the CPU.
//!
//! Coefficients go up as one small tensor. Terms that no row needs are not computed; where some rows
//! need one, the others keep their value by selection, not by adding zero.

use candle_core::{DType, Result, Tensor};

use super::host::log_scale;
use super::quantile::threshold;
use super::{Advanced, Operands};
use crate::sampler::{Bound, NoiseScale, Step};

/// Per-row coefficients in one tensor `[B, COLUMNS]`.
struct Coefficients(Tensor);

#[derive(Clone, Copy)]
enum Column {
    P,
    Q,
    A,
    B,
    E,
    C,
    D,
    Middle,
    Slope,
    ReadsMemory,
    Remember,
    NeedsNoise,
    LearnedRange,
    Learned,
}

const COLUMNS: usize = Column::Learned as usize + 1;

fn columns(step: &Step) -> [f32; COLUMNS] {
    let (mut fixed, mut middle, mut slope) = (0.0, 0.0, 0.0);
    match step.d {
        NoiseScale::Fixed(scale) => fixed = scale as f32,
        NoiseScale::LearnedRange { min_log, max_log } => {
            (middle, slope) = log_scale(min_log, max_log);
        }
        NoiseScale::Learned => {}
    }
    let flag = |set: bool| if set { 1.0 } else { 0.0 };
    [
        step.p as f32,
        step.q as f32,
        step.a as f32,
        step.b as f32,
        step.e as f32,
        step.c as f32,
        fixed,
        middle,
        slope,
        flag(step.reads_memory()),
        flag(step.remember),
        flag(step.needs_noise()),
        flag(matches!(step.d, NoiseScale::LearnedRange { .. })),
        flag(step.d == NoiseScale::Learned),
    ]
}

impl Coefficients {
    fn upload(steps: &[Step], like: &Tensor) -> Result<Self> {
        let values: Vec<f32> = steps.iter().flat_map(columns).collect();
        Ok(Self(Tensor::from_vec(values, (steps.len(), COLUMNS, 1, 1), like.device())?))
    }

    /// `[B, 1, 1, 1]`.
    fn column(&self, column: Column) -> Result<Tensor> {
        self.0.narrow(1, column as usize, 1)?.contiguous()
    }

    fn times(&self, column: Column, tensor: &Tensor) -> Result<Tensor> {
        tensor.broadcast_mul(&self.column(column)?)
    }

    /// `yes` in rows where `column` is set, `no` elsewhere.
    fn select(&self, column: Column, yes: &Tensor, no: &Tensor) -> Result<Tensor> {
        self.column(column)?.ne(0.0)?.broadcast_as(yes.shape())?.where_cond(yes, no)
    }
}

pub(super) fn advance(operands: &Operands, steps: &[Step]) -> Result<Advanced> {
    let Operands { x, memory, model: answer, noise } = operands;
    let rows = Coefficients::upload(steps, x)?;
    let channels = x.dim(1)?;
    let model = answer.narrow(1, 0, channels)?.contiguous()?;

    let x0 = (rows.times(Column::P, x)? + rows.times(Column::Q, &model)?)?;
    let x0 = bound(x0, steps)?;

    let mut next = (rows.times(Column::A, x)? + rows.times(Column::B, &x0)?)?;
    next = (next + rows.times(Column::E, &model)?)?;
    if steps.iter().any(Step::reads_memory) {
        let sum = (&next + rows.times(Column::C, memory)?)?;
        next = rows.select(Column::ReadsMemory, &sum, &next)?;
    }
    if let Some(noise) = noise {
        let scale = scale(&rows, answer, channels, steps)?;
        let sum = (&next + noise.broadcast_mul(&scale)?)?;
        next = rows.select(Column::NeedsNoise, &sum, &next)?;
    }

    let memory = if steps.iter().any(|step| step.remember) {
        rows.select(Column::Remember, &x0, memory)?
    } else {
        memory.clone()
    };
    Ok(Advanced { x: next, memory, x0 })
}

/// The scale of the noise: `[B, 1, 1, 1]`, or per element where a row learns it.
fn scale(rows: &Coefficients, answer: &Tensor, channels: usize, steps: &[Step]) -> Result<Tensor> {
    let fixed = rows.column(Column::D)?;
    if !steps.iter().any(Step::needs_variance) {
        return Ok(fixed);
    }
    let variance = answer.narrow(1, channels, channels)?.contiguous()?;
    let mut scale = fixed.broadcast_as(variance.shape())?.contiguous()?;
    if steps.iter().any(|step| matches!(step.d, NoiseScale::LearnedRange { .. })) {
        let log =
            rows.times(Column::Slope, &variance)?.broadcast_add(&rows.column(Column::Middle)?)?;
        scale = rows.select(Column::LearnedRange, &log.exp()?, &scale)?;
    }
    if steps.iter().any(|step| step.d == NoiseScale::Learned) {
        let root = variance.lt(0.0)?.where_cond(&variance.zeros_like()?, &variance.sqrt()?)?;
        scale = rows.select(Column::Learned, &root, &scale)?;
    }
    Ok(scale)
}

/// Bounds each row as its step says. Thresholds are found on the host: no device sorts long rows, and
/// thresholding is rare.
fn bound(x0: Tensor, steps: &[Step]) -> Result<Tensor> {
    if steps.iter().all(|step| step.bound == Bound::None) {
        return Ok(x0);
    }
    let limits = steps
        .iter()
        .enumerate()
        .map(|(i, step)| match step.bound {
            Bound::None => Ok([f32::INFINITY, 1.0]),
            Bound::Clamp { range } => Ok([range as f32, 1.0]),
            Bound::Threshold { ratio, max } => {
                let row = x0.get(i)?.flatten_all()?.to_vec1::<f32>()?;
                let limit = threshold(&row, ratio, max);
                Ok([limit, limit])
            }
        })
        .collect::<Result<Vec<_>>>()?;
    let limits = Tensor::from_vec(limits.concat(), (steps.len(), 2, 1, 1), x0.device())?;
    let limit = limits.narrow(1, 0, 1)?.contiguous()?;
    let divisor = limits.narrow(1, 1, 1)?.contiguous()?;
    let bounded =
        x0.broadcast_minimum(&limit)?.broadcast_maximum(&limit.neg()?)?.broadcast_div(&divisor)?;
    // The minimum of some devices drops NaN. A NaN threshold spreads through the division.
    let is_nan = x0.ne(&x0)?;
    debug_assert_eq!(is_nan.dtype(), DType::U8);
    is_nan.where_cond(&x0, &bounded)
}
