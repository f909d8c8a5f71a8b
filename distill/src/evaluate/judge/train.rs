//! Trains a judge.

use std::collections::HashMap;

use candle_core::{D, Device, Result, Tensor, Var, bail};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, loss::cross_entropy};
use serde_json::{Map, json};
use understudy_models::noise;

use super::{
    FeatureNetwork, Judge, JudgeConfig, Layer, norm,
    norm::{norm_relu, statistics},
};
use crate::{
    data::Images,
    evaluate::layers::{Convolution, Window},
    random,
};

/// What a judge of one kind of images looks like, and how these may be changed without another class
/// coming out.
struct Design {
    layers: &'static [Layer],
    /// Pixels by which an image is moved at random, either way.
    shift: i64,
    /// Whether one image in two, at random, is mirrored, left to right.
    mirrored: bool,
}

/// Gray 32×32 images, such as Fashion-MNIST's: 128 features.
const GRAY: Design = Design {
    layers: &[
        Layer { channels: 24, kernel: 5, stride: 2 },
        Layer { channels: 64, kernel: 3, stride: 2 },
        Layer { channels: 96, kernel: 3, stride: 1 },
        Layer { channels: 128, kernel: 3, stride: 2 },
    ],
    shift: 1,
    mirrored: false,
};
/// 32×32 photographs, such as CIFAR-10's: 192 features.
const RGB: Design = Design {
    layers: &[
        Layer { channels: 32, kernel: 5, stride: 2 },
        Layer { channels: 64, kernel: 3, stride: 1 },
        Layer { channels: 128, kernel: 3, stride: 2 },
        Layer { channels: 128, kernel: 3, stride: 1 },
        Layer { channels: 192, kernel: 3, stride: 2 },
    ],
    shift: 2,
    mirrored: true,
};
/// Pixels of a side that the designs are made for.
pub const SIDE: usize = 32;
/// Images per step.
const BATCH: usize = 128;
const LEARNING_RATE: f64 = 4e-3;
const WEIGHT_DECAY: f64 = 5e-4;
/// The share of the steps in which the learning rate rises.
const WARM_UP: f64 = 0.2;
/// Pixels of the images from which the batch norms' statistics are taken in the end, all at once; a batch of images at least.
const CALIBRATION: usize = 2000 * 32 * 32;

/// How a judge is trained.
#[derive(Debug, Clone)]
pub struct Training {
    /// The judge's name.
    pub name: String,
    /// Times every image is seen.
    pub epochs: usize,
    /// Seeds the weights, the order, the shifts and who is mirrored.
    pub seed: u64,
}

/// Trains a judge on labelled images and measures it on others: AdamW, cross-entropy, a learning rate that
/// rises and falls once, images shifted at random by a pixel or two; RGB images are taken for photographs, and
/// one in two, at random, is mirrored. Gives configuration and weights for [`super::write`].
///
/// `watch` is told steps done, steps in all, and the loss.
///
/// # Errors
/// Sets without labels, of fewer images than a batch or of different shapes, a loss that is not finite, and whatever the device says.
pub fn train(
    training: &Training,
    images: &Images,
    test: &Images,
    mut watch: impl FnMut(usize, usize, f32),
) -> Result<(JudgeConfig, HashMap<String, Tensor>)> {
    let Some(labels) = &images.labels else { bail!("the training images have no labels") };
    if images.len() < BATCH {
        bail!(
            "{} training images are fewer than a batch, which has {BATCH}; take more",
            images.len()
        );
    }
    let classes = images.classes();
    let design = if images.channels == 1 { &GRAY } else { &RGB };
    let layers = design.layers(images.height.max(images.width));
    let mut student = Student::new(&layers, images.channels, classes, training.seed)?;
    let vars = student.vars();
    let parameters =
        ParamsAdamW { lr: LEARNING_RATE, weight_decay: WEIGHT_DECAY, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(vars, parameters)?;
    let per_epoch = images.len() / BATCH;
    let steps = training.epochs * per_epoch;
    for epoch in 0..training.epochs {
        let stream = ORDER + (epoch * images.len()) as u64;
        let order = random::shuffled(images.len(), training.seed, stream);
        for (batch, indices) in order.chunks_exact(BATCH).enumerate() {
            let step = epoch * per_epoch + batch;
            optimizer.set_learning_rate(LEARNING_RATE * cycle(step as f64 / steps as f64));
            let x = design.varied(images, indices, training.seed, step)?;
            let targets: Vec<u32> = indices.iter().map(|&index| labels[index]).collect();
            let targets = Tensor::new(targets, &Device::Cpu)?;
            let loss = cross_entropy(&student.forward(&x)?, &targets)?;
            let value = loss.to_scalar::<f32>()?;
            if !value.is_finite() {
                bail!("the loss is {value} at step {step} with seed {}", training.seed);
            }
            optimizer.backward_step(&loss)?;
            watch(step + 1, steps, value);
        }
    }

    let tensors = student.folded(images)?;
    let mut config = JudgeConfig {
        name: training.name.clone(),
        channels: images.channels,
        height: images.height,
        width: images.width,
        layers,
        classes,
        test_accuracy: 0.0,
        recipe: Map::new(),
    };
    config.test_accuracy = accuracy(&Judge::new(config.clone(), &tensors)?, test)?;
    config.recipe.extend([
        ("epochs".to_owned(), json!(training.epochs)),
        ("seed".to_owned(), json!(training.seed)),
        ("batch".to_owned(), json!(BATCH)),
        ("shift".to_owned(), json!(design.shift)),
        ("mirrored".to_owned(), json!(design.mirrored)),
        ("training_images".to_owned(), json!(images.len())),
        ("test_images".to_owned(), json!(test.len())),
    ]);
    Ok((config, tensors))
}

/// The share of labelled images that a judge classifies correctly.
fn accuracy(judge: &Judge, images: &Images) -> Result<f64> {
    let Some(labels) = &images.labels else { bail!("the test images have no labels") };
    let indices: Vec<usize> = (0..images.len()).collect();
    let mut right = 0;
    for indices in indices.chunks(judge.batch()) {
        let observed = judge.observe(&images.batch(indices, &Device::Cpu)?)?;
        let answers: Vec<u32> = observed.logits.argmax(D::Minus1)?.to_vec1()?;
        right += indices
            .iter()
            .zip(answers)
            .filter(|(index, answer)| labels[**index] == *answer)
            .count();
    }
    Ok(right as f64 / images.len() as f64)
}

/// A judge whose weights change: batch norms, and no biases but the head's.
struct Student {
    layers: Vec<StudentLayer>,
    head: Var,
    head_bias: Var,
}

struct StudentLayer {
    /// `[kernel·kernel·inputs, outputs]`
    weight: Var,
    gamma: Var,
    beta: Var,
    window: Window,
}

impl Student {
    /// Normal weights of variance 2/inputs (He et al. 2015).
    fn new(design: &[Layer], channels: usize, classes: usize, seed: u64) -> Result<Self> {
        let normal = |stream: usize, rows: usize, columns: usize, variance: f64| {
            let mut values = vec![0.0; rows * columns];
            noise::normal(seed, stream as u64, &mut values);
            let tensor = Tensor::from_vec(values, (rows, columns), &Device::Cpu)?;
            Var::from_tensor(&(tensor * variance.sqrt())?)
        };
        let constant =
            |value: f32, len: usize| Var::from_tensor(&Tensor::full(value, len, &Device::Cpu)?);
        let mut inputs = channels;
        let mut layers = Vec::new();
        for (i, &Layer { channels, kernel, stride }) in design.iter().enumerate() {
            let rows = kernel * kernel * inputs;
            layers.push(StudentLayer {
                weight: normal(i, rows, channels, 2.0 / rows as f64)?,
                gamma: constant(1.0, channels)?,
                beta: constant(0.0, channels)?,
                window: Window::square(kernel, stride, kernel / 2),
            });
            inputs = channels;
        }
        let head = normal(design.len(), inputs, classes, 1.0 / inputs as f64)?;
        Ok(Self { layers, head, head_bias: constant(0.0, classes)? })
    }

    fn vars(&self) -> Vec<Var> {
        let layers = self.layers.iter().flat_map(|l| [&l.weight, &l.gamma, &l.beta]);
        layers.chain([&self.head, &self.head_bias]).cloned().collect()
    }

    /// Images `[B, H, W, C]` → logits `[B, classes]`, with the batch's own statistics.
    fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let mut x = images.clone();
        for layer in &self.layers {
            x = layer.forward(&layer.convolve(&x)?)?;
        }
        let features = x.flatten(1, 2)?.mean(1)?;
        features.matmul(&self.head)?.broadcast_add(&self.head_bias)
    }

    /// The weights of a [`Judge`]: every norm's statistics are taken from the first images and folded into
    /// its convolution.
    fn folded(&mut self, images: &Images) -> Result<HashMap<String, Tensor>> {
        let count = (CALIBRATION / (images.height * images.width)).max(BATCH);
        let indices: Vec<usize> = (0..images.len().min(count)).collect();
        let mut x = images.batch(&indices, &Device::Cpu)?.permute((0, 2, 3, 1))?.contiguous()?;
        let mut tensors = HashMap::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let convolved = layer.convolve(&x)?.detach();
            let values: Vec<f32> = convolved.flatten_all()?.to_vec1()?;
            let channels = layer.gamma.elem_count();
            let (mean, variance) = statistics(&values, channels);
            let variance = Tensor::new(variance, &Device::Cpu)?;
            let scale = (layer.gamma.as_tensor() / (variance + f64::from(norm::EPS))?.sqrt()?)?;
            let bias = (layer.beta.as_tensor() - (Tensor::new(mean, &Device::Cpu)? * &scale)?)?;
            let kernel = layer.window.kernel.0;
            let weight = layer.weight.broadcast_mul(&scale)?;
            let weight = weight.reshape((kernel, kernel, (), channels))?.permute((3, 2, 0, 1))?;
            tensors.insert(format!("conv.{i}.weight"), weight.contiguous()?.detach());
            tensors.insert(format!("conv.{i}.bias"), bias.detach());
            x = layer.forward(&convolved)?.detach();
        }
        tensors.insert("head.weight".into(), self.head.t()?.contiguous()?.detach());
        tensors.insert("head.bias".into(), self.head_bias.as_tensor().detach());
        Ok(tensors)
    }
}

impl StudentLayer {
    fn convolve(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.weight.as_tensor().clone();
        Convolution { weight, bias: None, window: self.window }.forward(x)
    }

    /// Norm and ReLU, `[B, H, W, C]`.
    fn forward(&self, convolved: &Tensor) -> Result<Tensor> {
        norm_relu(&convolved.flatten_to(2)?, &self.gamma, &self.beta)?.reshape(convolved.shape())
    }
}

/// The learning rate's factor when `done` of the steps (0 to 1) are over: a line up, a half cosine down.
fn cycle(done: f64) -> f64 {
    if done < WARM_UP {
        return done / WARM_UP;
    }
    let falling = (done - WARM_UP) / (1.0 - WARM_UP);
    (1.0 + (std::f64::consts::PI * falling).cos()) / 2.0
}

/// Numbers of the draws that have this seed.
const ORDER: u64 = 1 << 60;
const SHIFTS: u64 = 1 << 61;

impl Design {
    /// The convolutions for images with such a longer side: one more that halves the map for every doubling of 32 pixels.
    fn layers(&self, side: usize) -> Vec<Layer> {
        let halved = Layer { kernel: 3, stride: 2, ..self.layers[0] };
        let more = side.div_ceil(SIDE).next_power_of_two().ilog2() as usize;
        let (first, rest) = self.layers.split_at(1);
        [first, &vec![halved; more], rest].concat()
    }

    /// A batch `[B, H, W, C]`, every image moved and perhaps mirrored, background coming in.
    fn varied(&self, images: &Images, indices: &[usize], seed: u64, step: usize) -> Result<Tensor> {
        let (height, width, channels) = (images.height, images.width, images.channels);
        let mut values = vec![-1.0; indices.len() * images.image_bytes()];
        let rows = values.chunks_exact_mut(images.image_bytes()).zip(indices).enumerate();
        for (row, (values, &index)) in rows {
            let draw = noise::uniform_u64(seed, SHIFTS + (step * BATCH + row) as u64);
            let span = 2 * self.shift as u64 + 1;
            let down = (draw % span) as i64 - self.shift;
            let right = (draw / span % span) as i64 - self.shift;
            let mirrored = self.mirrored && draw / span / span % 2 == 1;
            for (number, pixel) in images.image(index).chunks_exact(channels).enumerate() {
                let (y, x) = (number / width, number % width);
                let x = if mirrored { width - 1 - x } else { x };
                let (y, x) = (y as i64 + down, x as i64 + right);
                if (0..height as i64).contains(&y) && (0..width as i64).contains(&x) {
                    let at = (y as usize * width + x as usize) * channels;
                    for (value, &byte) in values[at..].iter_mut().zip(pixel) {
                        *value = f32::from(byte) / 127.5 - 1.0;
                    }
                }
            }
        }
        Tensor::from_vec(values, (indices.len(), height, width, channels), &Device::Cpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn larger_images_take_more_layers() {
        let maps =
            |side: usize| RGB.layers(side).iter().fold(side, |map, it| map.div_ceil(it.stride));
        assert_eq!([17, 32, 33, 64, 100, 256].map(maps), [3, 4, 3, 4, 4, 4]);
    }

    #[test]
    fn photographs_are_moved_and_one_in_two_is_mirrored() -> Result<()> {
        // One bright pixel, in row 3 and column 1 of 8.
        let mut pixels = vec![0; 8 * 8 * 3];
        pixels[(3 * 8 + 1) * 3..][..3].fill(255);
        let images =
            Images { channels: 3, height: 8, width: 8, pixels, labels: None, ..Images::default() };
        let batch = RGB.varied(&images, &[0; 400], 7, 0)?.flatten_from(1)?.to_vec2::<f32>()?;
        let (mut kept, mut mirrored) = (0, 0);
        for image in batch {
            let bright: Vec<usize> = (0..64).filter(|pixel| image[pixel * 3] == 1.0).collect();
            match bright[..] {
                // Moved by two pixels, column 1 is out of the picture.
                [] => kept += 1,
                [pixel] => {
                    let (row, column) = (pixel / 8, pixel % 8);
                    assert!((1..=5).contains(&row), "row {row}");
                    if column <= 3 { kept += 1 } else { mirrored += 1 }
                }
                _ => panic!("{bright:?}"),
            }
        }
        assert!(kept > 100 && mirrored > 100, "{kept} as they were, {mirrored} mirrored");
        Ok(())
    }
}
