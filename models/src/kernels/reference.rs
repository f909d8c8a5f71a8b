//! The kernels' mathematics as plain loops in f64, for tests.

use super::Function;

/// A map: `[channels, height, width]`.
pub(super) struct Plain {
    pub(super) size: [usize; 3],
    pub(super) values: Vec<f64>,
}

impl Plain {
    pub(super) fn new(size: [usize; 3], values: &[f32]) -> Self {
        Self { size, values: values.iter().map(|&x| f64::from(x)).collect() }
    }

    pub(super) fn at(&self, c: usize, y: usize, x: usize) -> f64 {
        self.values[(c * self.size[1] + y) * self.size[2] + x]
    }

    pub(super) fn from_fn(size: [usize; 3], f: impl Fn(usize, usize, usize) -> f64) -> Self {
        let mut values = Vec::new();
        for c in 0..size[0] {
            for y in 0..size[1] {
                for x in 0..size[2] {
                    values.push(f(c, y, x));
                }
            }
        }
        Self { size, values }
    }

    /// The channels of all, one after another.
    pub(super) fn joined(parts: &[Self]) -> Self {
        let [_, height, width] = parts[0].size;
        let channels = parts.iter().map(|part| part.size[0]).sum();
        let values = parts.iter().flat_map(|part| part.values.iter().copied()).collect();
        Self { size: [channels, height, width], values }
    }

    pub(super) fn doubled(&self) -> Self {
        let [channels, height, width] = self.size;
        Self::from_fn([channels, 2 * height, 2 * width], |c, y, x| self.at(c, y / 2, x / 2))
    }

    pub(super) fn halved(&self) -> Self {
        let [channels, height, width] = self.size;
        Self::from_fn([channels, height / 2, width / 2], |c, y, x| {
            let at = |i: usize, j: usize| self.at(c, 2 * y + i, 2 * x + j);
            (at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1)) / 4.0
        })
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn convolve(
        &self,
        size: [usize; 3],
        weights: &[f32],
        bias: &[f32],
        side: usize,
        stride: usize,
        padding: usize,
        doubled: bool,
    ) -> Self {
        if doubled {
            return self.doubled().convolve(size, weights, bias, side, stride, padding, false);
        }
        let [channels, height, width] = self.size;
        Self::from_fn(size, |o, y, x| {
            let mut sum = f64::from(bias[o]);
            for i in 0..side {
                for j in 0..side {
                    let (y, x) = (y * stride + i, x * stride + j);
                    if y < padding || y - padding >= height || x < padding || x - padding >= width {
                        continue;
                    }
                    for c in 0..channels {
                        let weight = weights[((o * channels + c) * side + i) * side + j];
                        sum += f64::from(weight) * self.at(c, y - padding, x - padding);
                    }
                }
            }
            sum
        })
    }

    /// `(self + vector + residual) · factor`.
    pub(super) fn finished(&self, vector: &Self, residual: &Self, factor: f32) -> Self {
        Self::from_fn(self.size, |c, y, x| {
            (self.at(c, y, x) + vector.values[c] + residual.at(c, y, x)) * f64::from(factor)
        })
    }

    pub(super) fn normalised(
        &self,
        groups: usize,
        eps: f64,
        weight: &[f64],
        bias: &[f64],
        modulation: Option<&Self>,
        function: Function,
    ) -> Self {
        let channels = self.size[0];
        let len = self.values.len() / groups;
        let moments: Vec<(f64, f64)> = self
            .values
            .chunks_exact(len)
            .map(|group| {
                let mean = group.iter().sum::<f64>() / len as f64;
                let squares = group.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>();
                (mean, (squares / len as f64 + eps).sqrt())
            })
            .collect();
        Self::from_fn(self.size, |c, y, x| {
            let (mean, deviation) = moments[c / (channels / groups)];
            let normal = (self.at(c, y, x) - mean) / deviation;
            let affine = normal * weight[c] + bias[c];
            let modulated = match modulation {
                None => affine,
                Some(m) => affine * (1.0 + m.values[c]) + m.values[channels + c],
            };
            function.scalar(modulated)
        })
    }

    pub(super) fn attended(&self, heads: usize) -> Self {
        let width = self.size[0] / 3;
        let part = |number: usize| self.narrowed(number * width, width);
        part(0).attending(&part(1), &part(2), (heads, false))
    }

    /// So many channels, from `start` on.
    pub(super) fn narrowed(&self, start: usize, width: usize) -> Self {
        let size = [width, self.size[1], self.size[2]];
        Self::from_fn(size, |c, y, x| self.at(start + c, y, x))
    }

    /// The values averaged for each query, which this is, and head; where it is causal a query sees no key after its own
    /// place.
    pub(super) fn attending(
        &self,
        keys: &Self,
        values: &Self,
        (heads, causal): (usize, bool),
    ) -> Self {
        let [channels, height, width] = self.size;
        let (count, of_head) = (keys.size[1] * keys.size[2], channels / heads);
        let at = |map: &Self, c: usize, p: usize| map.at(c, p / map.size[2], p % map.size[2]);
        Self::from_fn([channels, height, width], |c, y, x| {
            let query = y * width + x;
            let seen = if causal { count.min(query + 1) } else { count };
            let own = c / of_head * of_head..(c / of_head + 1) * of_head;
            let score = |key: usize| -> f64 {
                own.clone().map(|c| at(self, c, query) * at(keys, c, key)).sum()
            };
            let scores: Vec<f64> = (0..seen).map(score).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let value = |(key, weight): (usize, &f64)| weight * at(values, c, key);
            weights.iter().enumerate().map(value).sum::<f64>() / sum
        })
    }

    /// Layer normalisation of each pixel; parts `scale` and `shift` of `told` are as long as a pixel.
    pub(super) fn modulated(&self, told: &Self, eps: f64, [scale, shift]: [usize; 2]) -> Self {
        let channels = self.size[0];
        Self::from_fn(self.size, |c, y, x| {
            let pixel: Vec<f64> = (0..channels).map(|c| self.at(c, y, x)).collect();
            let mean = pixel.iter().sum::<f64>() / channels as f64;
            let squares = pixel.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
            let normed = (pixel[c] - mean) / (squares / channels as f64 + eps).sqrt();
            let part = |index: usize| told.values[index * channels + c];
            normed * (1.0 + part(scale)) + part(shift)
        })
    }

    /// `residual + gate·x`, with part `gate` of `told`.
    pub(super) fn gated(&self, residual: &Self, told: &Self, gate: usize) -> Self {
        let channels = self.size[0];
        Self::from_fn(self.size, |c, y, x| {
            residual.at(c, y, x) + told.values[gate * channels + c] * self.at(c, y, x)
        })
    }
}

/// The root mean square of the difference, relative to that of `expected`; infinite where one is no
/// number.
///
/// The inputs of all tests lie between −1 and 1. Results below a tenth are what larger terms left over
/// when they cancelled: their error is held against a tenth.
pub(super) fn relative_error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let mean = |sum: f64| (sum / expected.len() as f64).sqrt();
    let square = |sum: f64, x: f64| sum + x * x;
    let difference = found.iter().zip(expected).map(|(&a, b)| f64::from(a) - b).fold(0.0, square);
    let size = mean(expected.iter().copied().fold(0.0, square));
    match mean(difference) / size.max(0.1) {
        error if error.is_nan() => f64::INFINITY,
        error => error,
    }
}
