//! Each kernel against plain loops, on a GPU or one in software (`tools/cuda-emulator`).

use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::{DType, Device, Error, Result, Tensor, Var};

use super::{Finish, Norm, Normed, PerSample, Waves};
use crate::gpu::context::Context;
use crate::gpu::convolution::{Part, Scratch, convolve};
use crate::graph::Size;
use crate::kernels::Function;
use crate::noise;

/// Types, and the relative error that their rounding explains.
const TYPES: [(DType, f64); 3] = [(DType::F32, 2e-6), (DType::BF16, 4e-3), (DType::F16, 5e-4)];

const FUNCTIONS: [Function; 6] = [
    Function::Identity,
    Function::Silu,
    Function::Mish,
    Function::Gelu,
    Function::GeluTanh,
    Function::Relu,
];

/// The context for each type. Memory that is taken next holds NaN.
fn contexts() -> Vec<(Context, f64)> {
    let device = Device::new_cuda(0).expect("a GPU");
    let context = |(dtype, limit)| {
        for _ in 0..8 {
            Tensor::full(f32::NAN, 1 << 16, &device).unwrap();
        }
        (Context::new(&device, dtype).unwrap(), limit)
    };
    TYPES.into_iter().map(context).collect()
}

/// Normal numbers as the context has them, and the same as plain loops take them.
fn random(context: &Context, seed: u64, shape: &[usize]) -> (Tensor, Vec<f64>) {
    let mut values = vec![0.0f32; shape.iter().product()];
    noise::normal(seed, 0, &mut values);
    let there = Tensor::from_vec(values, shape, &context.device).unwrap();
    let there = there.to_dtype(context.dtype).unwrap();
    let values = numbers(&there);
    (there, values)
}

/// What a kernel is to write, so far NaN.
fn blank(context: &Context, shape: &[usize]) -> Tensor {
    let nan = Tensor::full(f32::NAN, shape, &context.device).unwrap();
    nan.to_dtype(context.dtype).unwrap()
}

/// The same in f32, whatever the context's type.
fn vector(context: &Context, seed: u64, shape: &[usize]) -> (Tensor, Vec<f64>) {
    random(&Context { dtype: DType::F32, ..context.clone() }, seed, shape)
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    flat.to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect()
}

/// Fails on NaN, too.
fn close(what: &str, given: &Tensor, expected: &[f64], limit: f64) {
    close_to(what, given, expected, limit, 0.0);
}

/// The same where the numbers are differences of numbers of the size of `scale`.
fn close_to(what: &str, given: &Tensor, expected: &[f64], limit: f64, scale: f64) {
    let given = numbers(given);
    assert_eq!(given.len(), expected.len(), "{what}");
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let wrong = square(&mut given.iter().zip(expected).map(|(a, b)| a - b));
    let size = square(&mut expected.iter().copied()) + scale * scale * given.len() as f64;
    assert!(wrong <= limit * limit * size, "{what}: {:.2e}", (wrong / size).sqrt());
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn function(function: Function, x: f64) -> f64 {
    match function {
        Function::Identity => x,
        Function::QuickGelu => unreachable!("a network with it is not compiled here"),
        Function::Silu => x * sigmoid(x),
        Function::Mish => x * x.exp().ln_1p().tanh(),
        Function::Gelu => x * 0.5 * (1.0 + libm::erf(x / 2f64.sqrt())),
        Function::GeluTanh => x * sigmoid(2.0 * 0.797_884_560_8 * (x + 0.044715 * x.powi(3))),
        Function::Relu => x.max(0.0),
    }
}

/// Mean and deviation.
fn moments(values: &[f64], eps: f64) -> (f64, f64) {
    let size = values.len() as f64;
    let mean = values.iter().sum::<f64>() / size;
    let square = values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / size;
    (mean, (square + eps).sqrt())
}

#[test]
#[ignore = "needs a GPU, or one in software"]
fn group_norm_is_that_of_plain_loops() -> Result<()> {
    for (context, limit) in contexts() {
        // Batch, pixels, channels of both operands, groups: with groups that lie in both, and single channels.
        for (batch, [height, width], own, others, groups) in [
            (1, [1, 1], 4, 0, 2),
            (2, [5, 7], 6, 10, 4),
            (3, [16, 16], 32, 0, 8),
            (1, [8, 4], 3, 2, 5),
            (2, [3, 3], 600, 0, 2),
            // Too large to be kept at hand.
            (1, [40, 41], 16, 0, 1),
            (1, [53, 29], 12, 4, 1),
        ] {
            let (channels, pixels) = (own + others, height * width);
            let (x, xs) = random(&context, 1, &[batch, height, width, own]);
            let (more, mores) = random(&context, 2, &[batch, height, width, others.max(1)]);
            let more = (others > 0).then_some(&more);
            let (weight, weights) = vector(&context, 3, &[channels]);
            let (bias, biases) = vector(&context, 4, &[channels]);
            let (residual, residuals) = random(&context, 7, &[batch, height, width, own]);
            let (pending, biases_added) = vector(&context, 5, &[own]);
            let total = 3 * channels + 5;
            let (all, alls) = vector(&context, 6, &[batch, 1, 1, total]);
            let per_sample = |start| Some(PerSample { all: all.clone(), start });
            for (index, (beside, keep, after)) in [
                (false, false, false),
                (true, false, false),
                (false, false, true),
                (true, true, true),
                (true, false, true),
                (true, true, false),
            ]
            .into_iter()
            .enumerate()
            {
                let activation = FUNCTIONS[index];
                let before = Finish {
                    residual: Some(residual.clone()),
                    bias: Some(pending.clone()),
                    offset: per_sample(2),
                    factor: 0.5,
                };
                let norm = Norm {
                    weight: &weight,
                    bias: &bias,
                    groups,
                    eps: 1e-5,
                    before: if beside { before } else { Finish::NONE },
                    keep,
                    modulation: if after { per_sample(channels + 3) } else { None },
                    function: activation,
                };
                let x = x.copy()?;
                let y = blank(&context, &[batch, height, width, channels]);
                context.group_norm(&x, more, norm, &y)?;
                let value = |sample: usize, pixel: usize, channel: usize| {
                    let place = sample * pixels + pixel;
                    if let Some(channel) = channel.checked_sub(own) {
                        return mores[place * others + channel];
                    }
                    let i = place * own + channel;
                    let offset = biases_added[channel] + alls[sample * total + 2 + channel];
                    if beside { (xs[i] + residuals[i] + offset) * 0.5 } else { xs[i] }
                };
                let left = |i: usize| {
                    let (place, channel) = (i / own, i % own);
                    if keep { value(place / pixels, place % pixels, channel) } else { xs[i] }
                };
                close("what is left", &x, &(0..xs.len()).map(left).collect::<Vec<_>>(), limit);
                let mut expected = vec![0.0; batch * pixels * channels];
                let width = channels / groups;
                for sample in 0..batch {
                    for first in (0..channels).step_by(width) {
                        let places = || {
                            let pixels = 0..pixels;
                            pixels.flat_map(|p| (first..first + width).map(move |c| (p, c)))
                        };
                        let group: Vec<f64> = places()
                            .map(|(pixel, channel)| value(sample, pixel, channel))
                            .collect();
                        let (mean, deviation) = moments(&group, 1e-5);
                        for ((pixel, channel), x) in places().zip(&group) {
                            let mut y = (x - mean) / deviation * weights[channel] + biases[channel];
                            if after {
                                let scale = sample * total + channels + 3 + channel;
                                y = y * (1.0 + alls[scale]) + alls[scale + channels];
                            }
                            expected[(sample * pixels + pixel) * channels + channel] =
                                function(activation, y);
                        }
                    }
                }
                let what = format!("{:?} {batch} {own} {others} {groups}", context.dtype);
                // What is near zero was the difference of numbers that are not.
                close(&what, &y, &expected, 2.0 * limit);
            }
        }
        let (x, _) = random(&context, 1, &[1, 2, 2, 6]);
        let (vector, _) = vector(&context, 2, &[8]);
        let norm = Norm {
            weight: &vector,
            bias: &vector,
            groups: 2,
            eps: 0.0,
            before: Finish::NONE,
            keep: false,
            modulation: None,
            function: Function::Identity,
        };
        assert!(context.group_norm(&x, None, norm, &x.copy()?).is_err());
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or one in software"]
fn what_goes_value_by_value_is_that_of_plain_loops() -> Result<()> {
    for (context, limit) in contexts() {
        for (batch, [height, width], channels) in
            [(1, [1, 1], 1), (2, [6, 4], 8), (3, [2, 10], 7), (2, [32, 32], 48)]
        {
            let (pixels, count) = (height * width, batch * height * width * channels);
            let what = format!("{:?} {batch} {height} {width} {channels}", context.dtype);
            let (x, xs) = random(&context, 1, &[batch, height, width, channels]);
            let (residual, residuals) = random(&context, 2, &[batch, height, width, channels]);
            let (bias, biases) = vector(&context, 3, &[channels]);
            let total = channels + 9;
            let (all, alls) = vector(&context, 4, &[batch, 1, 1, total]);
            for which in 0..16 {
                let [with_residual, with_bias, with_offset, in_place] =
                    [1, 2, 4, 8].map(|bit| which & bit != 0);
                let end = Finish {
                    residual: with_residual.then(|| residual.clone()),
                    bias: with_bias.then(|| bias.clone()),
                    offset: with_offset.then(|| PerSample { all: all.clone(), start: 9 }),
                    factor: 0.7,
                };
                let x = x.copy()?;
                let y = if in_place { x.clone() } else { blank(&context, x.dims()) };
                let activation = FUNCTIONS[which % FUNCTIONS.len()];
                context.finish(&x, &end, activation, &y)?;
                let expected = |i: usize| {
                    let (sample, channel) = (i / channels / pixels, i % channels);
                    let mut sum = xs[i];
                    sum += if with_residual { residuals[i] } else { 0.0 };
                    sum += if with_bias { biases[channel] } else { 0.0 };
                    sum += if with_offset { alls[sample * total + 9 + channel] } else { 0.0 };
                    function(activation, sum * 0.7)
                };
                let what = format!("{what} {which} {activation:?}");
                close(&what, &y, &(0..count).map(expected).collect::<Vec<_>>(), limit);
            }
            // As rows, and back again.
            let numbers: Vec<f64> = (1..=batch).map(|i| i as f64).collect();
            let divisor = Tensor::arange(1f32, batch as f32 + 0.5, &context.device)?;
            let rows = context.export(&x, Some(&bias), Some(&divisor))?;
            let expected = |i: usize| {
                let (sample, channel, pixel) =
                    (i / pixels / channels, i / pixels % channels, i % pixels);
                let x = xs[(sample * pixels + pixel) * channels + channel];
                (x + biases[channel]) / numbers[sample]
            };
            close(&what, &rows, &(0..count).map(expected).collect::<Vec<_>>(), limit);
            let (rows, y) = (context.export(&x, None, None)?, blank(&context, x.dims()));
            context.import(&rows, [0, channels * pixels], (2.0, -1.0), &y)?;
            let expected: Vec<f64> = xs.iter().map(|x| 2.0 * x - 1.0).collect();
            close(&what, &y, &expected, limit);
            // The same of all samples, from the second pixel on.
            if pixels > 1 {
                let y = blank(&context, &[batch, 1, 1, channels]);
                context.import(&x, [channels, 0], (1.0, 0.0), &y)?;
                let expected: Vec<f64> =
                    (0..batch * channels).map(|i| xs[channels + i % channels]).collect();
                close(&what, &y, &expected, 1e-12);
                assert!(context.import(&x, [channels, channels * pixels], (1.0, 0.0), &y).is_ok());
                assert!(
                    context.import(&x, [channels, count], (1.0, 0.0), &y).is_err() || batch == 1
                );
            }
            let at = |sample: usize, row: usize, column: usize, channel: usize| {
                xs[((sample * height + row) * width + column) * channels + channel]
            };
            for (times, seen) in
                [(1, [height + 1, width + 1]), (2, [2 * height, 2 * width]), (1, [height, width])]
            {
                let [tall, wide] = seen;
                let y = blank(&context, &[batch, tall, wide, channels]);
                context.enlarge(&x, times, &y)?;
                let expected = |i: usize| {
                    let (channel, pixel) = (i % channels, i / channels);
                    let (row, column) = (pixel / wide % tall / times, pixel % wide / times);
                    let there = row < height && column < width;
                    if there { at(pixel / wide / tall, row, column, channel) } else { 0.0 }
                };
                let count = batch * tall * wide * channels;
                close(&what, &y, &(0..count).map(expected).collect::<Vec<_>>(), 1e-12);
            }
            let (tall, wide) = (height / 2, width / 2);
            if pixels == 1 {
                assert!(context.halve(&x, &x.copy()?).is_err());
                continue;
            }
            let y = blank(&context, &[batch, tall, wide, channels]);
            context.halve(&x, &y)?;
            let expected = |i: usize| {
                let (channel, pixel) = (i % channels, i / channels);
                let (sample, row, column) =
                    (pixel / wide / tall, 2 * (pixel / wide % tall), 2 * (pixel % wide));
                let four = [(0, 0), (0, 1), (1, 0), (1, 1)];
                four.map(|(down, right)| at(sample, row + down, column + right, channel))
                    .iter()
                    .sum::<f64>()
                    / 4.0
            };
            close(&what, &y, &(0..count / 4).map(expected).collect::<Vec<_>>(), limit);
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or one in software"]
fn what_tells_a_sample_its_time_and_class_is_that_of_plain_loops() -> Result<()> {
    for (context, limit) in contexts() {
        let times = [0.5f32, 1.0, 137.25, 999.0];
        let numbers = Tensor::new(&times, &context.device)?;
        let (frequencies, values) = vector(&context, 1, &[5]);
        for (cosines_first, logarithm, width) in
            [(false, false, 10), (true, false, 11), (false, true, 10)]
        {
            let waves = Waves { frequencies: frequencies.clone(), cosines_first, logarithm };
            let y = blank(&context, &[4, 1, 1, width]);
            context.waves(&numbers, &waves, &y)?;
            let mut expected = Vec::new();
            for time in times.map(f64::from) {
                let turns = std::f64::consts::TAU * time.ln();
                let phases = values.iter().map(|w| w * if logarithm { turns } else { time });
                let (sines, cosines): (Vec<_>, Vec<_>) = phases.map(f64::sin_cos).unzip();
                let both = if cosines_first { [cosines, sines] } else { [sines, cosines] };
                expected.extend(both.concat());
                expected.extend(vec![0.0; width - 10]);
            }
            // Phases are rounded to f32.
            close(&format!("{:?} {width}", context.dtype), &y, &expected, limit + 1e-4);
            assert!(context.waves(&numbers, &waves, &blank(&context, &[4, 1, 1, 12])).is_err());
        }
        let (table, values) = random(&context, 2, &[3, 7]);
        let y = blank(&context, &[4, 1, 1, 7]);
        context.rows_of(&table, &Tensor::new(&[2u32, 0, 1, 2], &context.device)?, &y)?;
        let row = |row: usize| &values[row * 7..(row + 1) * 7];
        let expected = [2, 0, 1, 2].map(row).concat();
        close("rows", &y, &expected, 1e-12);
        context.rows_of(&table, &Tensor::new(&[2f32, 0.0, 1.0, 2.0], &context.device)?, &y)?;
        close("rows", &y, &expected, 1e-12);
        context.rows_of(&table, &Tensor::new(&[3f32, -1.0, 0.5, 1.0], &context.device)?, &y)?;
        let y = self::numbers(&y);
        assert!(y[..21].iter().all(|x| x.is_nan()));
        assert_eq!(&y[21..], row(1));
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or one in software"]
fn what_transformers_have_is_that_of_plain_loops() -> Result<()> {
    for (context, limit) in contexts() {
        for (batch, [height, width], channels) in
            [(1, [1, 1], 2), (2, [3, 5], 40), (3, [2, 2], 300)]
        {
            let tokens = height * width;
            let (x, xs) = random(&context, 1, &[batch, height, width, channels]);
            let (residual, residuals) = random(&context, 2, &[batch, height, width, channels]);
            let (per_sample, values) = random(&context, 3, &[batch, 1, 1, 6 * channels]);
            let part = |i: usize, part: usize| {
                let (sample, channel) = (i / channels / tokens, i % channels);
                values[(sample * 6 + part) * channels + channel]
            };
            let y = blank(&context, x.dims());
            context.modulate(&x, 1e-6, &per_sample, [4, 3], &y)?;
            let normed = |i: usize| {
                let token = i / channels * channels;
                let (mean, deviation) = moments(&xs[token..token + channels], 1e-6);
                (xs[i] - mean) / deviation * (1.0 + part(i, 4)) + part(i, 3)
            };
            let what = format!("{:?} {batch} {tokens} {channels}", context.dtype);
            close(&what, &y, &(0..xs.len()).map(normed).collect::<Vec<_>>(), 2.0 * limit);
            let (bias, biases) = vector(&context, 5, &[channels]);
            for biased in [false, true] {
                let y = blank(&context, x.dims());
                context.gate(&x, biased.then_some(&bias), &residual, (&per_sample, 5), &y)?;
                let x = |i| if biased { xs[i] + biases[i % channels] } else { xs[i] };
                let gated = |i: usize| residuals[i] + part(i, 5) * x(i);
                close(&what, &y, &(0..xs.len()).map(gated).collect::<Vec<_>>(), limit);
            }
            assert!(context.gate(&x, None, &residual, (&per_sample, 6), &y).is_err());
        }
        for (rows, length) in [(1, 1), (9, 31), (20, 49), (3, 1000)] {
            let (scores, values) = vector(&context, 4, &[rows, length]);
            let (scores, scale) = ((scores * 20.0)?, 20.0);
            let y = context.softmax(&scores)?;
            let mut expected = Vec::new();
            for row in values.chunks_exact(length) {
                let most = row.iter().fold(f64::MIN, |a, &b| a.max(b));
                let powers: Vec<f64> = row.iter().map(|x| (scale * (x - most)).exp()).collect();
                let total: f64 = powers.iter().sum();
                expected.extend(powers.iter().map(|power| power / total));
            }
            close(&format!("{:?} {rows} {length}", context.dtype), &y, &expected, 3.0 * limit);
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or one in software"]
fn attention_is_that_of_plain_loops() -> Result<()> {
    for (context, limit) in contexts() {
        for (batch, Size { height, width, channels }, heads) in [
            (1, Size { height: 1, width: 1, channels: 2 }, 1),
            (2, Size { height: 7, width: 7, channels: 48 }, 3),
            (1, Size { height: 8, width: 8, channels: 64 }, 2),
            (3, Size { height: 5, width: 20, channels: 72 }, 3),
            (2, Size { height: 4, width: 5, channels: 130 }, 2),
            (1, Size { height: 3, width: 11, channels: 128 }, 1),
            (2, Size { height: 4, width: 4, channels: 9 }, 3),
            (1, Size { height: 4, width: 4, channels: 160 }, 1),
        ] {
            let (tokens, depth, row) = (height * width, channels / heads, 3 * channels);
            let (qkv, _) = random(&context, 1, &[batch, height, width, row]);
            // Scores that differ by much and little.
            let qkv = (qkv * (2.0 / (depth as f64).powf(0.25)))?;
            let mut values = numbers(&qkv);
            let (bias, biases) = vector(&context, 2, &[row]);
            values.iter_mut().enumerate().for_each(|(i, value)| *value += biases[i % row]);
            let mut expected = vec![0.0; batch * tokens * channels];
            for (sample, head) in (0..batch).flat_map(|i| (0..heads).map(move |j| (i, j))) {
                let at = |part: usize, token: usize, channel: usize| {
                    let place = part * channels + head * depth + channel;
                    values[(sample * tokens + token) * row + place]
                };
                for query in 0..tokens {
                    let score = |key| {
                        0.5 * (0..depth).map(|c| at(0, query, c) * at(1, key, c)).sum::<f64>()
                    };
                    let scores: Vec<f64> = (0..tokens).map(score).collect();
                    let most = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
                    let powers: Vec<f64> =
                        scores.iter().map(|score| (score - most).exp()).collect();
                    let total: f64 = powers.iter().sum();
                    for channel in 0..depth {
                        let gathered = (0..tokens).map(|key| powers[key] * at(2, key, channel));
                        let place = (sample * tokens + query) * channels + head * depth + channel;
                        expected[place] = gathered.sum::<f64>() / total;
                    }
                }
            }
            let what = format!("{:?} {batch} {tokens} {channels} {heads}", context.dtype);
            let known = context.dtype != DType::F32 && depth <= 128 && depth % 2 == 0;
            assert_eq!(context.attends(depth), known, "{what}");
            let shape = [batch, height, width, channels];
            let y = blank(&context, &shape);
            let given = context.attend(&qkv, Some(&bias), (heads, 0.5), &y);
            assert_eq!(given.is_ok(), known, "{what}");
            if known {
                close(&what, &y, &expected, 4.0 * limit);
            }
            let (end, y) = (Finish { bias: Some(bias), ..Finish::NONE }, blank(&context, &shape));
            context.finish(&qkv, &end, Function::Identity, &qkv)?;
            context.attend_with_scores(&qkv, (heads, 0.5), &y)?;
            close(&what, &y, &expected, 4.0 * limit);
            if known {
                let y = blank(&context, &shape);
                context.attend(&qkv, None, (heads, 0.5), &y)?;
                close(&what, &y, &expected, 4.0 * limit);
            }
            let (of_y, of_ys) = random(&context, 3, &shape);
            let of_qkv = blank(&context, qkv.dims());
            context.attend_gradient(&qkv, &of_y, (heads, 0.5), &of_qkv)?;
            let values = numbers(&qkv);
            let mut gradient = vec![0.0; values.len()];
            for (sample, head) in (0..batch).flat_map(|i| (0..heads).map(move |j| (i, j))) {
                let at = |part: usize, token: usize, channel: usize| {
                    (sample * tokens + token) * row + part * channels + head * depth + channel
                };
                for query in 0..tokens {
                    let score = |key| {
                        let products =
                            (0..depth).map(|c| values[at(0, query, c)] * values[at(1, key, c)]);
                        0.5 * products.sum::<f64>()
                    };
                    let scores: Vec<f64> = (0..tokens).map(score).collect();
                    let most = scores.iter().fold(f64::MIN, |a, &b| a.max(b));
                    let powers: Vec<f64> =
                        scores.iter().map(|score| (score - most).exp()).collect();
                    let total: f64 = powers.iter().sum();
                    let own = |c| of_ys[(sample * tokens + query) * channels + head * depth + c];
                    let of_weight =
                        |key| (0..depth).map(|c| own(c) * values[at(2, key, c)]).sum::<f64>();
                    let along: f64 =
                        (0..tokens).map(|key| powers[key] / total * of_weight(key)).sum();
                    for key in 0..tokens {
                        let weight = powers[key] / total;
                        let of_score = 0.5 * weight * (of_weight(key) - along);
                        for c in 0..depth {
                            gradient[at(0, query, c)] += of_score * values[at(1, key, c)];
                            gradient[at(1, key, c)] += of_score * values[at(0, query, c)];
                            gradient[at(2, key, c)] += weight * own(c);
                        }
                    }
                }
            }
            close(&what, &of_qkv, &gradient, 8.0 * limit);
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or one in software"]
fn linear_maps_and_convolutions_are_those_of_the_cpu() -> Result<()> {
    for (context, limit) in contexts() {
        let plain = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32);
        let (x, _) = random(&context, 1, &[3, 2, 5, 6]);
        let (more, _) = random(&context, 2, &[3, 2, 5, 11]);
        let (weight, _) = random(&context, 3, &[7, 17]);
        let both = Tensor::cat(&[plain(&x)?, plain(&more)?], 3)?.reshape((30, 17))?;
        let expected = numbers(&both.matmul(&plain(&weight)?.t()?)?);
        let wide = blank(&context, &[3, 2, 5, 7]).to_dtype(DType::F32)?;
        context.linear(&[x.clone(), more.clone()], &weight, &wide)?;
        close("linear", &wide, &expected, 2e-6);
        let y = blank(&context, &[3, 2, 5, 7]);
        context.linear(&[x, more.clone()], &weight, &y)?;
        close("linear", &y, &expected, 2.0 * limit);
        assert!(context.linear(&[more.clone(), more], &weight, &y).is_err());

        for (stride, padding, [height, width], size) in
            [(1, 1, [4, 5], 3), (2, 1, [8, 8], 3), (2, 0, [9, 5], 3), (1, 0, [3, 4], 1)]
        {
            let (x, _) = random(&context, 4, &[2, height, width, 3]);
            let (weight, _) = random(&context, 5, &[5, size, size, 3]);
            let rows = |tensor: &Tensor| plain(tensor)?.permute((0, 3, 1, 2))?.contiguous();
            let (of_x, of_weight) =
                (Var::from_tensor(&rows(&x)?)?, Var::from_tensor(&rows(&weight)?)?);
            let expected = of_x.conv2d(&of_weight, padding, stride, 1, 1)?;
            let (batch, outputs, tall, wide) = expected.dims4()?;
            let (of_y, _) = random(&context, 6, &[batch, tall, wide, outputs]);
            let of = (&expected * rows(&of_y)?)?.sum_all()?.backward()?;
            let maps = |tensor: &Tensor| Ok::<_, Error>(numbers(&tensor.permute((0, 2, 3, 1))?));
            let gradient = |var: &Var| maps(of.get(var).unwrap());
            let taps = [padding, stride];
            for search in [false, true, true] {
                let scratch = &mut Scratch::new(search);
                // Number 1 of them is where no more than a number's bytes are aligned.
                let count = expected.elem_count();
                let room = blank(&context, &[count + 2]);
                for start in [0, 1] {
                    let y = room.narrow(0, start, count)?.reshape(of_y.shape())?;
                    convolve(Part::Answer, [&x, &weight, &y], taps, scratch)?;
                    close("convolution", &y, &maps(&expected)?, limit);
                }
                assert!(numbers(&room)[count + 1].is_nan());
                let given = blank(&context, x.dims());
                convolve(Part::OfInput, [&given, &weight, &of_y], taps, scratch)?;
                close("gradient", &given, &gradient(&of_x)?, limit);
                let given = blank(&context, weight.dims());
                convolve(Part::OfWeight, [&x, &given, &of_y], taps, scratch)?;
                close("gradient", &given, &gradient(&of_weight)?, 2.0 * limit);
                for y in [&of_y.flatten_all()?, &of_y.to_dtype(DType::F64)?, &x] {
                    assert!(convolve(Part::Answer, [&x, &weight, y], taps, scratch).is_err());
                }
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or one in software"]
fn convolutions_are_captured_without_a_search() -> Result<()> {
    for (context, limit) in contexts() {
        let plain = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32);
        let rows = |tensor: &Tensor| plain(tensor)?.permute((0, 3, 1, 2))?.contiguous();
        let (x, _) = random(&context, 1, &[2, 7, 6, 4]);
        let (weight, _) = random(&context, 2, &[8, 3, 3, 4]);
        let expected = rows(&x)?.conv2d(&rows(&weight)?, 1, 1, 1, 1)?.permute((0, 2, 3, 1))?;
        let y = blank(&context, expected.dims());
        let stream = context.cuda.cuda_stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let asked = convolve(Part::Answer, [&x, &weight, &y], [1, 1], &mut Scratch::new(true));
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        asked?;
        graph?.expect("a graph").launch()?;
        close("captured convolution", &y, &numbers(&expected), limit);
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or one in software"]
fn gradients_of_norms_are_those_of_plain_loops() -> Result<()> {
    for (context, limit) in contexts() {
        for (batch, [height, width], own, others, groups) in [
            (1, [1, 1], 4, 0, 2),
            (2, [5, 7], 6, 10, 4),
            (3, [16, 16], 32, 0, 8),
            (1, [8, 4], 3, 2, 5),
            (2, [3, 3], 600, 0, 2),
        ] {
            let (channels, pixels) = (own + others, height * width);
            let (x, xs) = random(&context, 1, &[batch, height, width, own]);
            let (more, mores) = random(&context, 2, &[batch, height, width, others.max(1)]);
            let (weight, weights) = vector(&context, 3, &[channels]);
            let (bias, biases) = vector(&context, 4, &[channels]);
            let (of_y, of_ys) = random(&context, 5, &[batch, height, width, channels]);
            let total = 2 * channels + 3;
            let (all, alls) = vector(&context, 6, &[batch, 1, 1, total]);
            for (index, (modulated, add)) in
                [(false, false), (true, false), (false, true), (true, true)].into_iter().enumerate()
            {
                let activation = FUNCTIONS[(index + 1) % FUNCTIONS.len()];
                let per_sample =
                    |all: &Tensor| modulated.then(|| PerSample { all: all.clone(), start: 3 });
                let normed = Normed {
                    x: &x,
                    more: (others > 0).then_some(&more),
                    weight: &weight,
                    bias: &bias,
                    groups,
                    eps: 1e-5,
                    modulation: per_sample(&all),
                    function: activation,
                };
                let to = |like: &Tensor| {
                    if add { like.copy() } else { Ok(blank(&context, like.dims())) }
                };
                let (of_x, of_more) = (to(&x)?, to(&more)?);
                let shares = Tensor::full(f32::NAN, batch * 2 * channels, &context.device)?;
                let into_more = (others > 0).then_some((&of_more, add));
                context.norm_gradient(&normed, &of_y, (&of_x, add), into_more, &shares)?;
                let of_all = Tensor::zeros((batch, 1, 1, total), DType::F32, &context.device)?;
                let of = [0, 1].map(|_| Tensor::full(f32::NAN, channels, &context.device));
                let [of_weight, of_bias] = of;
                let (of_weight, of_bias) = (of_weight?, of_bias?);
                context.norm_shares(
                    &normed,
                    &shares,
                    per_sample(&of_all),
                    [&of_weight, &of_bias],
                )?;

                let (mut expected_x, mut expected_more) = (vec![0.0; xs.len()], mores.clone());
                let (mut expected_weight, mut expected_bias) =
                    (vec![0.0; channels], vec![0.0; channels]);
                let mut expected_all = vec![0.0; batch * total];
                let width = channels / groups;
                for sample in 0..batch {
                    for first in (0..channels).step_by(width) {
                        let places: Vec<(usize, usize)> = (0..pixels)
                            .flat_map(|pixel| (first..first + width).map(move |c| (pixel, c)))
                            .collect();
                        let value = |&(pixel, channel): &(usize, usize)| {
                            let place = sample * pixels + pixel;
                            match channel.checked_sub(own) {
                                None => xs[place * own + channel],
                                Some(channel) => mores[place * others + channel],
                            }
                        };
                        let group: Vec<f64> = places.iter().map(value).collect();
                        let (mean, deviation) = moments(&group, 1e-5);
                        let factor = |channel| {
                            if modulated { 1.0 + alls[sample * total + 3 + channel] } else { 1.0 }
                        };
                        let added = |channel| {
                            if modulated {
                                alls[sample * total + 3 + channels + channel]
                            } else {
                                0.0
                            }
                        };
                        let rows: Vec<(usize, f64, f64)> = places
                            .iter()
                            .zip(&group)
                            .map(|(&(pixel, channel), x)| {
                                let normed = (x - mean) / deviation;
                                let factor = factor(channel);
                                let z = (normed * weights[channel] + biases[channel]) * factor
                                    + added(channel);
                                let slope = (function(activation, z + 1e-4)
                                    - function(activation, z - 1e-4))
                                    / 2e-4;
                                let place = (sample * pixels + pixel) * channels + channel;
                                (channel, normed, of_ys[place] * slope)
                            })
                            .collect();
                        let size = group.len() as f64;
                        let (mut plain, mut along) = (0.0, 0.0);
                        for &(channel, normed, gradient) in &rows {
                            let factor = factor(channel);
                            expected_weight[channel] += gradient * normed * factor;
                            expected_bias[channel] += gradient * factor;
                            if modulated {
                                let at = sample * total + 3 + channel;
                                expected_all[at] +=
                                    gradient * (normed * weights[channel] + biases[channel]);
                                expected_all[at + channels] += gradient;
                            }
                            let inner = gradient * weights[channel] * factor;
                            plain += inner;
                            along += inner * normed;
                        }
                        for (&(pixel, channel), &(_, normed, gradient)) in places.iter().zip(&rows)
                        {
                            let inner = gradient * weights[channel] * factor(channel);
                            let of_x = (inner - plain / size - normed * along / size) / deviation;
                            let place = sample * pixels + pixel;
                            let (to, before) = match channel.checked_sub(own) {
                                None => (
                                    &mut expected_x[place * own + channel],
                                    xs[place * own + channel],
                                ),
                                Some(channel) => (
                                    &mut expected_more[place * others + channel],
                                    mores[place * others + channel],
                                ),
                            };
                            *to = of_x + if add { before } else { 0.0 };
                        }
                    }
                }
                let what = format!("{:?} {batch} {own} {others} {groups} {index}", context.dtype);
                let limit = 4.0 * limit + 1e-5;
                close_to(&what, &of_x, &expected_x, limit, 1e-3);
                if others > 0 {
                    close_to(&what, &of_more, &expected_more, limit, 1e-3);
                }
                close_to(&what, &of_weight, &expected_weight, limit, 1e-3);
                close(&what, &of_bias, &expected_bias, limit);
                close(&what, &of_all, &expected_all, limit);
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU, or one in software"]
fn gradients_of_what_goes_value_by_value_are_those_of_plain_loops() -> Result<()> {
    for (context, limit) in contexts() {
        for (batch, [height, width], channels) in
            [(1, [2, 2], 1), (2, [6, 4], 8), (3, [2, 10], 7), (2, [16, 16], 48)]
        {
            let what = format!("{:?} {batch} {height} {width} {channels}", context.dtype);
            let (there, theres) = random(&context, 1, &[batch, height, width, channels]);
            let place = |sample: usize, row: usize, column: usize, wide: usize, tall: usize| {
                ((sample * tall + row) * wide + column) * channels
            };
            let visit = |i: usize| {
                let (channel, pixel) = (i % channels, i / channels);
                (pixel / width / height, pixel / width % height, pixel % width, channel)
            };
            for add in [false, true] {
                let before = |i: usize| if add { theres[i] } else { 0.0 };
                let to = || if add { there.copy() } else { Ok(blank(&context, there.dims())) };
                for (times, [tall, wide]) in
                    [(1, [height + 1, width + 1]), (2, [2 * height, 2 * width])]
                {
                    let (of_y, of_ys) = random(&context, 2, &[batch, tall, wide, channels]);
                    let of_x = to()?;
                    context.enlarge_gradient(&of_y, times, (&of_x, add))?;
                    let expected = |i: usize| {
                        let (sample, row, column, channel) = visit(i);
                        let copies = (0..times).flat_map(|i| (0..times).map(move |j| (i, j)));
                        let own = copies.map(|(i, j)| {
                            let (row, column) = (row * times + i, column * times + j);
                            of_ys[place(sample, row, column, wide, tall) + channel]
                        });
                        before(i) + own.sum::<f64>()
                    };
                    let expected: Vec<f64> = (0..theres.len()).map(expected).collect();
                    close(&what, &of_x, &expected, 2.0 * limit);
                }
                let (of_y, of_ys) = random(&context, 3, &[batch, height / 2, width / 2, channels]);
                let of_x = to()?;
                context.halve_gradient(&of_y, (&of_x, add))?;
                let expected = |i: usize| {
                    let (sample, row, column, channel) = visit(i);
                    let half = place(sample, row / 2, column / 2, width / 2, height / 2);
                    before(i) + of_ys[half + channel] / 4.0
                };
                let expected: Vec<f64> = (0..theres.len()).map(expected).collect();
                close(&what, &of_x, &expected, 2.0 * limit);
            }
            let apart = channels + 5;
            let sums = Tensor::zeros(batch * apart, DType::F32, &context.device)?;
            context.sums(&there, &sums, [2, apart])?;
            let totals = Tensor::full(f32::NAN, channels, &context.device)?;
            context.totals(&sums, [2, apart], batch, &totals)?;
            let (mut expected, mut together) = (vec![0.0; batch * apart], vec![0.0; channels]);
            for (i, x) in theres.iter().enumerate() {
                let (sample, .., channel) = visit(i);
                expected[sample * apart + 2 + channel] += x;
                together[channel] += x;
            }
            close(&what, &sums, &expected, 1e-5);
            close(&what, &totals, &together, 1e-5);
            assert!(context.sums(&there, &sums, [6, apart]).is_err());
        }
        let (filter, filters) = random(&context, 4, &[5, 3, 3, 7]);
        let back = Tensor::full(f32::NAN, (5, 7, 3, 3), &context.device)?;
        context.weights_back(&filter, &back)?;
        let expected = (0..filters.len()).map(|i| {
            let (tap, input, output) = (i % 9, i / 9 % 7, i / 63);
            filters[(output * 9 + tap) * 7 + input]
        });
        close("filter", &back, &expected.collect::<Vec<_>>(), 1e-12);
    }
    Ok(())
}
