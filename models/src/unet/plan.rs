//! The network compiled for the CPU: the same layers as [`super::blocks`], as a list of kernels over
//! one arena.

mod attention;
mod blocks;
mod builder;
mod resnet;

use candle_core::{CpuStorage, Device, Result, Storage, Tensor, bail};

use super::UNet2DConfig;
use super::config::{Activation, TimeEmbedding};
use super::weights::Weights;
use crate::kernels::{Export, Footprint, Function, Import, Isa, Numbers, Program, Timing};
use builder::Builder;

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
        let (height, width) = (config.height, config.width);

        let time = builder.map_of_f32(1, 1, config.time_width());
        let time_image = builder.image(time);
        builder.push(Import { input: TIME, output: time_image, factor: 1.0, shift: 0.0 });
        // The projections' weights are gathered while the blocks are built; their place in the list is
        // here, and in memory for as long as the program runs.
        let projections_at = builder.len();

        let x = builder.map_of_f32(height, width, config.in_channels);
        let (factor, shift) = if config.center_input_sample { (2.0, -1.0) } else { (1.0, 0.0) };
        let output = builder.image(x);
        builder.push(Import { input: X, output, factor, shift });
        let first = builder.map(height, width, config.channels[0]);
        builder.same(&weights.at("conv_in"), x, first)?;
        builder.release(x);

        let bottom = blocks::network(&mut builder, weights, first)?;

        let (groups, name) = (config.norm_num_groups, weights.at("conv_norm_out"));
        let normed = builder.normalise(&name, &[bottom], groups, None, Function::Silu)?;
        builder.release(bottom);
        let y = builder.map_of_f32(height, width, config.out_channels);
        builder.same(&weights.at("conv_out"), normed, y)?;
        builder.release(normed);
        let fourier = config.time_embedding == TimeEmbedding::Fourier;
        let input = builder.image(y);
        builder.push(Export { input, divisor: fourier.then_some(SIGMA) });

        builder.insert_projections(projections_at, time_image);
        let inputs = vec![height * width * config.in_channels, config.time_width(), 1];
        let outputs = [config.out_channels, height, width];
        Ok(Self { program: builder.finish(inputs, outputs.iter().product()), outputs })
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
            let Storage::Cpu(CpuStorage::F32(values)) = &**storage else {
                bail!("the compiled network takes f32 on the CPU")
            };
            *input = &values[layout.start_offset()..][..layout.shape().elem_count()];
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
