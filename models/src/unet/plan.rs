//! The network compiled for the CPU: the same layers as [`super::blocks`], as a list of kernels over
//! one arena.

mod attention;
mod blocks;
mod builder;
mod resnet;
mod tape;
mod training;

use candle_core::{CpuStorage, Device, Layout, Result, Storage, Tensor, bail};

use super::UNet2DConfig;
use super::config::{Activation, TimeEmbedding};
use super::weights::Weights;
use crate::kernels::{Export, Footprint, Function, Import, Isa, Numbers, Program, Timing};
use builder::{Builder, Map};
pub(super) use training::Training;

/// Numbers of the program's inputs.
const X: usize = 0;
const TIME: usize = 1;
const SIGMA: usize = 2;

/// A network whose weights are packed and whose memory is planned.
pub(super) struct Plan {
    program: Program,
    outputs: [usize; 3],
}

impl Plan {
    /// Takes all weights but those of the time and class embedding. Maps between layers, and with them
    /// the operands of products, are of `numbers`; what comes in and goes out is f32.
    pub(super) fn new(
        config: &UNet2DConfig,
        weights: &Weights,
        isa: Isa,
        numbers: Numbers,
    ) -> crate::Result<Self> {
        let mut builder = Builder::new(config, isa, numbers)?;
        let Ends { time, projections, .. } = assemble(&mut builder, weights)?;
        let time = builder.image(time);
        builder.insert_projections(projections, time);
        let outputs = [config.out_channels, config.height, config.width];
        let program = builder.finish(inputs(config), outputs.iter().product());
        Ok(Self { program, outputs })
    }

    /// `x` `[B, C, H, W]`, `time` `[B, time width]`, already through the activation, `sigma` `[B]`, by
    /// which a network with Fourier embedding divides → `[B, C', H, W]`.
    pub(super) fn forward(&self, x: &Tensor, time: &Tensor, sigma: &Tensor) -> Result<Tensor> {
        self.with_inputs(x, time, sigma, |program, batch, inputs, output| {
            program.run(batch, inputs, output);
        })
    }

    /// What each kernel does in one evaluation.
    pub(super) fn profile(&self, x: &Tensor, time: &Tensor, sigma: &Tensor) -> Result<Vec<Timing>> {
        let mut lines = Vec::new();
        self.with_inputs(x, time, sigma, |program, batch, inputs, output| {
            lines = program.profile(batch, inputs, output);
        })?;
        Ok(lines)
    }

    fn with_inputs(
        &self,
        x: &Tensor,
        time: &Tensor,
        sigma: &Tensor,
        run: impl FnOnce(&Program, usize, &[&[f32]], &mut [f32]),
    ) -> Result<Tensor> {
        let batch = x.dim(0)?;
        let tensors = [x.contiguous()?, time.contiguous()?, sigma.contiguous()?];
        let storages = tensors.each_ref().map(Tensor::storage_and_layout);
        let mut inputs: [&[f32]; 3] = [&[]; 3];
        for (input, (storage, layout)) in inputs.iter_mut().zip(&storages) {
            *input = floats(storage, layout)?;
        }
        let [channels, height, width] = self.outputs;
        let mut output = vec![0.0; batch * channels * height * width];
        run(&self.program, batch, &inputs, &mut output);
        Tensor::from_vec(output, (batch, channels, height, width), &Device::Cpu)
    }

    /// What it keeps in memory.
    pub(super) fn footprint(&self) -> Footprint {
        self.program.footprint()
    }
}

/// Where a network begins and ends.
struct Ends {
    x: Map,
    time: Map,
    y: Map,
    /// Where in the list the projections of the time embedding belong: their weights are gathered while
    /// the blocks are built.
    projections: usize,
}

/// Floats per sample of each input of an evaluation.
fn inputs(config: &UNet2DConfig) -> Vec<usize> {
    vec![config.height * config.width * config.in_channels, config.time_width(), 1]
}

/// The whole network, from its inputs to its output.
fn assemble(builder: &mut Builder, weights: &Weights) -> crate::Result<Ends> {
    let config = builder.config;
    let time = builder.map_of_f32(1, 1, config.time_width());
    let output = builder.image(time);
    builder.push(Import { input: TIME, output, factor: 1.0, shift: 0.0 });
    if let Some(tape) = &mut builder.tape {
        tape.time = Some(time);
    }
    let projections = builder.len();

    let x = builder.map_of_f32(config.height, config.width, config.in_channels);
    let (factor, shift) = if config.center_input_sample { (2.0, -1.0) } else { (1.0, 0.0) };
    let output = builder.image(x);
    builder.push(Import { input: X, output, factor, shift });
    let first = builder.map(config.height, config.width, config.channels[0]);
    builder.same(&weights.at("conv_in"), x, first)?;
    builder.release(x);

    let bottom = blocks::network(builder, weights, first)?;

    let (groups, name) = (config.norm_num_groups, weights.at("conv_norm_out"));
    let normed = builder.normalise(&name, &[bottom], groups, None, Function::Silu)?;
    builder.release(bottom);
    let y = builder.map_of_f32(config.height, config.width, config.out_channels);
    builder.same(&weights.at("conv_out"), normed, y)?;
    builder.release(normed);
    let fourier = config.time_embedding == TimeEmbedding::Fourier;
    let input = builder.image(y);
    builder.push(Export { input, divisor: fourier.then_some(SIGMA) });
    Ok(Ends { x, time, y, projections })
}

/// The floats of a contiguous f32 tensor on the CPU.
fn floats<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        Storage::Cpu(storage) => slice(storage, layout),
        _ => bail!("the compiled network takes tensors on the CPU"),
    }
}

/// The floats of contiguous f32.
fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => bail!("the compiled network takes contiguous f32"),
    }
}

impl From<Activation> for Function {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Silu => Self::Silu,
            Activation::Mish => Self::Mish,
            Activation::Gelu => Self::Gelu,
            Activation::Relu => Self::Relu,
        }
    }
}
