//! Pictures of latents at a glance: a linear map from the channels of a latent to those of an image, fitted to what the
//! decoder makes.

use candle_core::{DType, Result, Tensor, bail};

use super::Decoder;
use crate::{Image, noise};

/// Latents that the map is fitted to, and their sides.
const LATENTS: usize = 4;
const SIDE: usize = 16;
/// Latents are noise of this and of twice as large a grain, as pictures have details and surfaces.
const GRAINS: [usize; 2] = [1, 4];
/// What is added to the diagonal of the normal equations, as a part of their mean: a channel that the decoder does not
/// look at gets no weight.
const RIDGE: f64 = 1e-4;

/// A linear map from latents to small images, one pixel for each of a latent's.
#[derive(Debug, Clone)]
pub struct Preview {
    /// By image channel: a weight for each latent channel, and what is added.
    weights: Vec<Vec<f64>>,
    /// Pixels of an image's side for each of a latent's.
    factor: usize,
}

impl Preview {
    /// Fits the map by least squares to what the decoder makes of noise; every pixel of a latent is asked for the mean of
    /// its pixels.
    ///
    /// # Errors
    /// Whatever the decoder says.
    pub fn fit(decoder: &Decoder) -> crate::Result<Self> {
        let small = decoder.at([SIDE, SIDE]);
        // Where a decoder has one size it is asked at that.
        let decoder = small.as_ref().unwrap_or(decoder);
        let [channels, height, width] = decoder.latent_shape();
        let factor = decoder.image_shape()[1] / height;
        let latents = latents(channels, height, width);
        let shape = (LATENTS, channels, height, width);
        let z = Tensor::from_vec(latents, shape, decoder.device())?;
        let images = decoder.forward(&z.to_dtype(decoder.dtype())?)?.to_dtype(DType::F32)?;
        let images = images.avg_pool2d(factor)?;
        Ok(Self { weights: least_squares(&rows(&z)?, &rows(&images)?), factor })
    }

    /// The picture of a latent f32 `[1, channels, height, width]`, as large as the image that it is decoded to.
    ///
    /// # Errors
    /// A latent of other channels, and whatever the device says.
    pub fn image(&self, latent: &Tensor) -> Result<Image> {
        let (_, channels, height, width) = latent.dims4()?;
        if self.weights.iter().any(|row| row.len() != channels + 1) {
            bail!("a latent of {channels} channels has no preview")
        }
        let rows = rows(latent)?;
        let colours: Vec<u8> = rows
            .iter()
            .flat_map(|z| self.weights.iter().map(move |row| byte(dot(row, z))))
            .collect();
        let (count, factor) = (self.weights.len(), self.factor);
        let mut pixels = Vec::with_capacity(rows.len() * factor * factor * count);
        for y in 0..height * factor {
            for x in 0..width * factor {
                let at = (y / factor * width + x / factor) * count;
                pixels.extend_from_slice(&colours[at..at + count]);
            }
        }
        Ok(Image { width: width * factor, height: height * factor, channels: count, pixels })
    }
}

fn byte(value: f64) -> u8 {
    ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8
}

/// The map's value for a latent's pixel: weights and what is added.
fn dot(row: &[f64], z: &[f64]) -> f64 {
    let (added, weights) = row.split_last().unwrap_or((&0.0, &[]));
    weights.iter().zip(z).map(|(w, z)| w * z).sum::<f64>() + added
}

/// The pixels of f32 `[B, channels, height, width]`, each with its channels.
fn rows(x: &Tensor) -> Result<Vec<Vec<f64>>> {
    let channels = x.dim(1)?;
    let pixels = x.permute((0, 2, 3, 1))?.to_dtype(DType::F64)?.reshape(((), channels))?;
    pixels.to_vec2()
}

fn latents(channels: usize, height: usize, width: usize) -> Vec<f32> {
    let count = LATENTS * channels * height * width;
    let mut sum = vec![0.0; count];
    for (draw, grain) in GRAINS.into_iter().enumerate() {
        let mut noise = vec![0.0; count];
        noise::normal(0, draw as u64, &mut noise);
        for (i, value) in sum.iter_mut().enumerate() {
            let (plane, y, x) = (i / (height * width), i / width % height, i % width);
            *value += noise[(plane * height + y / grain) * width + x / grain];
        }
    }
    sum.iter().map(|value| value / (GRAINS.len() as f32).sqrt()).collect()
}

/// By channel of `targets`, the weights of `inputs` and of 1 that come closest.
fn least_squares(inputs: &[Vec<f64>], targets: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let sides = inputs.first().map_or(0, Vec::len) + 1;
    let with_one = |row: &[f64], i: usize| row.get(i).copied().unwrap_or(1.0);
    let mut normal = vec![vec![0.0; sides]; sides];
    for row in inputs {
        for (i, line) in normal.iter_mut().enumerate() {
            for (j, sum) in line.iter_mut().enumerate() {
                *sum += with_one(row, i) * with_one(row, j);
            }
        }
    }
    let mean = (0..sides).map(|i| normal[i][i]).sum::<f64>() / sides as f64;
    for (i, line) in normal.iter_mut().enumerate() {
        line[i] += RIDGE * mean;
    }
    let colours = targets.first().map_or(0, Vec::len);
    let solved = |colour: usize| {
        let sum =
            |i| inputs.iter().zip(targets).map(|(row, to)| with_one(row, i) * to[colour]).sum();
        solve(normal.clone(), (0..sides).map(sum).collect())
    };
    (0..colours).map(solved).collect()
}

/// The solution of a symmetric positive definite system, by Gauss' elimination.
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Vec<f64> {
    let n = b.len();
    for pivot in 0..n {
        for row in pivot + 1..n {
            let factor = a[row][pivot] / a[pivot][pivot];
            let (above, below) = a.split_at_mut(row);
            for (to, from) in below[0].iter_mut().zip(&above[pivot]).skip(pivot) {
                *to -= factor * from;
            }
            b[row] -= factor * b[pivot];
        }
    }
    for row in (0..n).rev() {
        let known: f64 = (row + 1..n).map(|column| a[row][column] * b[column]).sum();
        b[row] = (b[row] - known) / a[row][row];
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_map_is_found() {
        let mut values = vec![0.0; 3 * 200];
        noise::normal(1, 0, &mut values);
        let inputs: Vec<Vec<f64>> =
            values.chunks(3).map(|row| row.iter().copied().map(f64::from).collect()).collect();
        let truth = [vec![0.5, -1.0, 0.25, 0.1], vec![0.0, 2.0, 1.0, -0.3]];
        let targets: Vec<Vec<f64>> =
            inputs.iter().map(|z| truth.iter().map(|row| dot(row, z)).collect()).collect();
        for (found, true_) in least_squares(&inputs, &targets).iter().zip(&truth) {
            for (found, true_) in found.iter().zip(true_) {
                assert!((found - true_).abs() < 1e-3, "{found} {true_}");
            }
        }
    }
}
