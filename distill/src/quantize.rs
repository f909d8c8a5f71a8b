//! A network becomes one whose products are of 8 bits (W8A8), without data: it shows what its layers are given while it
//! makes images, as at inference.
//!
//! Activations get the range with the least mean square error in each bucket of timesteps, weights that of each output
//! channel; then biases are corrected for what the weights' rounding does to the mean of each output (Nagel et al. 2019,
//! §4.2).

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use understudy_models::checkpoint::ModelFolder;
use understudy_models::quantization::{
    Calibration, Grid, Histogram, Layer, Observed, Quantization,
};
use understudy_models::{Error, Result};

use crate::generate::Sampling;

/// The most buckets of timesteps.
const BUCKETS: usize = 8;
/// Of so many images that are calibrated on, one more is made to see whether the ranges hold.
const HELD_OUT: usize = 8;
/// The largest share of the numbers of images made for that which may lie outside of a range.
const MOST_SATURATED: f64 = 0.01;
/// Ranges that are tried at each end, and clips of weights.
const TRIED: u16 = 40;
/// The narrowest of them, as a share of the widest.
const NARROWEST: f32 = 0.4;

/// A quantised network.
pub struct Quantized {
    /// All weights, f32: those of quantised layers are what their codes stand for, so that whoever knows no codes has the
    /// same network.
    pub weights: HashMap<String, Tensor>,
    /// The codes, and the grids of activations.
    pub quantization: Quantization,
    /// Evaluations of one sample that were calibrated on.
    pub rows: usize,
    /// The largest share of numbers outside of a range among images that were not calibrated on, and the layer.
    pub saturated: (f64, String),
}

/// Quantises the network of a folder, calibrated on at least `rows` evaluations of single samples, which `sampling` makes;
/// `tell` is told of how many images of how many are made.
///
/// # Errors
/// [`Error::Value`] for a model that is quantised, or takes prompts; for a calibration in which a layer saturates, naming
/// the layer; and as [`ModelFolder::tensors`].
pub fn quantize(
    folder: &ModelFolder,
    sampling: &Sampling,
    rows: usize,
    mut tell: impl FnMut(usize, usize),
) -> Result<Quantized> {
    if folder.quantization()?.is_some() {
        let remedy = "quantise the model that it was made from";
        return Err(Error::value("model", "quantised already", remedy));
    }
    if folder.network.geometry().prompt.is_some() {
        let remedy = "only models without prompts can be quantised yet; serve it in bf16";
        return Err(Error::value("model", "a text-to-image model", remedy));
    }
    let weights = folder.network.fit(folder.tensors()?)?;
    let weights =
        weights.into_iter().map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?)));
    let mut weights: HashMap<String, Tensor> = weights.collect::<Result<_>>()?;
    let evaluations = sampling.trajectory.len();
    let images = rows.div_ceil(evaluations).max(1);
    let held_out = images.div_ceil(HELD_OUT);
    let starts = starts(sampling);
    let mut observe = |range: std::ops::Range<usize>| -> Result<Vec<Observed>> {
        let calibration = Calibration::new(starts.clone());
        let network = folder.network.load_observed(weights.clone(), &calibration)?;
        let mut done = range.start;
        for batch in sampling.batches(&*network, range) {
            done += batch?.seeds.len();
            tell(done, images + held_out);
        }
        Ok(calibration.observed())
    };
    let observed = observe(0..images)?;
    let others = observe(images..images + held_out)?;
    let mut quantization = Quantization { starts, ..Quantization::default() };
    let mut saturated = (0.0, String::new());
    for (layer, other) in observed.iter().zip(&others) {
        let inputs: Vec<Vec<Grid>> =
            layer.histograms.iter().map(|buckets| buckets.iter().map(grid).collect()).collect();
        let share = worst(&inputs, other);
        let (name, _) = &layer.weights[0];
        if share > MOST_SATURATED {
            let limit = 100.0 * MOST_SATURATED;
            let remedy = format!(
                "of its inputs in images that were not calibrated on, at most {limit} % may lie outside of the range; \
                 calibrate on more rows (--rows)"
            );
            return Err(Error::value(name, format!("saturated by {:.1} %", 100.0 * share), remedy));
        }
        if share > saturated.0 {
            saturated = (share, name.clone());
        }
        for (name, bias) in &layer.weights {
            let quantised = quantised(&weights[name], inputs.clone())?;
            let shift = shift(&weights[name], &quantised, &layer.means)?;
            let rounded = Tensor::from_vec(quantised.weight(), &quantised.shape[..], &Device::Cpu)?;
            weights.insert(name.clone(), rounded);
            if let Some(bias) = bias {
                let corrected = (&weights[bias] - shift)?;
                weights.insert(bias.clone(), corrected);
            }
            quantization.layers.insert(name.clone(), quantised);
        }
    }
    if quantization.layers.is_empty() {
        let remedy =
            "its network has no convolution or linear map between features; serve it as it is";
        return Err(Error::value("model", "without layers to quantise", remedy));
    }
    Ok(Quantized { weights, quantization, rows: images * evaluations, saturated })
}

/// Where buckets begin: between the times of the trajectory, so that each has as many of them.
fn starts(sampling: &Sampling) -> Vec<f32> {
    let mut times: Vec<f32> = sampling.trajectory.iter().map(|it| it.timestep as f32).collect();
    times.sort_by(f32::total_cmp);
    times.dedup();
    let buckets = BUCKETS.min(times.len());
    let first = |bucket: usize| bucket * times.len() / buckets;
    (1..buckets).map(|bucket| (times[first(bucket) - 1] + times[first(bucket)]) / 2.0).collect()
}

/// The largest share of numbers outside of the ranges.
fn worst(inputs: &[Vec<Grid>], seen: &Observed) -> f64 {
    let pairs = inputs.iter().flatten().zip(seen.histograms.iter().flatten());
    pairs.map(|(grid, numbers)| numbers.share_outside(grid.covered())).fold(0.0, f64::max)
}

/// Shares of a range that are tried, the whole first.
fn shares() -> impl Iterator<Item = f32> {
    (0..TRIED).map(|i| 1.0 - (1.0 - NARROWEST) * f32::from(i) / f32::from(TRIED))
}

/// The grid with the least mean square error: first the upper end is chosen, then the lower.
fn grid(numbers: &Histogram) -> Grid {
    let [least, most] = numbers.range();
    let of = |least: f32, most: f32| {
        let scale = ((most - least) / 255.0).max(f32::MIN_POSITIVE);
        Grid { scale, zero: (-least / scale).round().clamp(0.0, 255.0) as u8 }
    };
    if least == most {
        return Grid { scale: 1.0, zero: 0 };
    }
    let error = |grid: Grid| -> f64 {
        let [lowest, highest] = grid.range();
        let squares = numbers.bins().map(|(x, count)| {
            let near = (x / grid.scale).round() * grid.scale;
            f64::from(near.clamp(lowest, highest) - x).powi(2) * count as f64
        });
        squares.sum()
    };
    let best = |grids: &mut dyn Iterator<Item = (f32, Grid)>| {
        let errors = grids.map(|(share, grid)| (error(grid), share, grid));
        let better = |a: (f64, f32, Grid), b: (f64, f32, Grid)| if b.0 < a.0 { b } else { a };
        errors.reduce(better).map_or((1.0, of(least, most)), |(_, share, grid)| (share, grid))
    };
    let (upper, _) = best(&mut shares().map(|share| (share, of(least, share * most))));
    best(&mut shares().map(|share| (share, of(share * least, upper * most)))).1
}

/// A weight as codes, each output channel with the scale of the least square error.
fn quantised(weight: &Tensor, inputs: Vec<Vec<Grid>>) -> Result<Layer> {
    let shape = weight.dims().to_vec();
    let values: Vec<f32> = weight.flatten_all()?.to_vec1()?;
    let row = values.len() / shape[0];
    let (mut codes, mut scales) = (Vec::with_capacity(values.len()), Vec::new());
    for row in values.chunks_exact(row) {
        let most = row.iter().fold(0f32, |most, x| most.max(x.abs()));
        let code = |x: f32, scale: f32| (x / scale).round().clamp(-127.0, 127.0);
        let error = |scale: f32| -> f64 {
            row.iter().map(|&x| f64::from(code(x, scale) * scale - x).powi(2)).sum()
        };
        let tried = shares().map(|share| (share * most / 127.0).max(f32::MIN_POSITIVE));
        let better = |a: (f64, f32), b: (f64, f32)| if b.0 < a.0 { b } else { a };
        let best = tried.map(|scale| (error(scale), scale)).reduce(better);
        let scale = best.filter(|_| most > 0.0).map_or(1.0, |(_, scale)| scale);
        codes.extend(row.iter().map(|&x| code(x, scale) as i8));
        scales.push(scale);
    }
    Ok(Layer { shape, codes, scales, inputs })
}

/// What the rounding of a weight adds to the mean of each output channel, where the channels of its input have these
/// means: f32 `[output channels]`. Pixels at the border, which see fewer, are not told from others.
fn shift(weight: &Tensor, quantised: &Layer, means: &[f64]) -> Result<Tensor> {
    let exact: Vec<f32> = weight.flatten_all()?.to_vec1()?;
    let rounded = quantised.weight();
    let outputs = quantised.shape[0];
    let row = exact.len() / outputs;
    let taps = row / means.len();
    let shifts = exact.chunks_exact(row).zip(rounded.chunks_exact(row)).map(|(exact, rounded)| {
        let terms = exact.iter().zip(rounded).enumerate();
        let shift: f64 = terms.map(|(i, (w, near))| f64::from(near - w) * means[i / taps]).sum();
        shift as f32
    });
    Ok(Tensor::from_vec(shifts.collect::<Vec<_>>(), outputs, &Device::Cpu)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_range_without_outliers_is_kept_and_one_with_them_is_cut() {
        let mut numbers = Histogram::default();
        // So many that one number is little beside what all lose by a wider range.
        (0..1_000_000u32).for_each(|i| numbers.add((i % 1000) as f32 / 250.0 - 1.0));
        let [least, most] = grid(&numbers).range();
        assert!((least + 1.0).abs() < 0.02 && (most - 3.0).abs() < 0.02, "{least} {most}");
        let [_, wide] = grid(&numbers).range();
        numbers.add(6.0);
        let [_, most] = grid(&numbers).range();
        assert!(most < 5.0 && most > wide - 0.1, "{most}");
        assert!(numbers.share_outside([least, most]) > 0.0);
        assert_eq!(grid(&Histogram::default()), Grid { scale: 1.0, zero: 0 });
    }

    #[test]
    fn weights_are_near_their_codes_and_means_stay() {
        let values: Vec<f32> =
            (0..2 * 3 * 4).map(|i| ((i * 37 % 23) as f32 - 11.0) / 7.0).collect();
        let weight = Tensor::from_vec(values.clone(), (2, 3, 2, 2), &Device::Cpu).unwrap();
        let layer = quantised(&weight, Vec::new()).unwrap();
        for (exact, near) in values.iter().zip(layer.weight()) {
            assert!((exact - near).abs() < 0.02, "{exact} {near}");
        }
        let means = [0.5, -1.0, 2.0];
        let mean = |values: &[f32], output: usize| -> f64 {
            (0..12).map(|i| f64::from(values[12 * output + i]) * means[i / 4]).sum()
        };
        let shifts: Vec<f32> = shift(&weight, &layer, &means).unwrap().to_vec1().unwrap();
        for (output, shift) in shifts.iter().enumerate() {
            let moved = mean(&layer.weight(), output) - f64::from(*shift);
            assert!((moved - mean(&values, output)).abs() < 1e-5);
        }
    }
}
