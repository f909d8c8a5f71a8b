//! Networks compiled for the CPU: layers of whichever family as a list of kernels over one arena.

mod builder;
mod layers;
mod tape;
mod tokens;
mod training;

use candle_core::{CpuStorage, Device, Layout, Result, Storage, Tensor, bail};

use crate::assembly::X;
use crate::kernels::{Footprint, Program, Timing};
pub(crate) use builder::Builder;
pub(crate) use training::Training;

/// What a compiled network takes and gives.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// Floats per sample of each input.
    pub(crate) inputs: [usize; 3],
    /// Channels, height and width of the answer.
    pub(crate) output: [usize; 3],
}

/// A network whose weights are packed and whose memory is planned.
pub(crate) struct Plan {
    program: Program,
    output: [usize; 3],
}

impl Plan {
    /// Of a network whose operations have all been added, the [`crate::kernels::Export`] of the answer last.
    pub(crate) fn new<C>(builder: Builder<C>, sizes: Sizes) -> Self {
        let Sizes { inputs, output } = sizes;
        let program = builder.finish(inputs.to_vec(), output.iter().product());
        Self { program, output }
    }

    /// Of f32 tensors that begin with the batch, one evaluation: `[B, channels, height, width]`.
    pub(crate) fn forward(&self, inputs: [&Tensor; 3]) -> Result<Tensor> {
        self.with_inputs(inputs, |program, batch, inputs, output| {
            Ok(program.run(batch, inputs, output)?)
        })
    }

    /// What each kernel does in one evaluation.
    pub(crate) fn profile(&self, inputs: [&Tensor; 3]) -> Result<Vec<Timing>> {
        let mut lines = Vec::new();
        self.with_inputs(inputs, |program, batch, inputs, output| {
            lines = program.profile(batch, inputs, output)?;
            Ok(())
        })?;
        Ok(lines)
    }

    fn with_inputs(
        &self,
        inputs: [&Tensor; 3],
        run: impl FnOnce(&Program, usize, &[&[f32]], &mut [f32]) -> Result<()>,
    ) -> Result<Tensor> {
        let batch = inputs[X].dim(0)?;
        let tensors = contiguous(inputs)?;
        let storages = tensors.each_ref().map(Tensor::storage_and_layout);
        let mut inputs: [&[f32]; 3] = [&[]; 3];
        for (input, (storage, layout)) in inputs.iter_mut().zip(&storages) {
            *input = floats(storage, layout)?;
        }
        let [channels, height, width] = self.output;
        let mut output = vec![0.0; batch * channels * height * width];
        run(&self.program, batch, &inputs, &mut output)?;
        Tensor::from_vec(output, (batch, channels, height, width), &Device::Cpu)
    }

    /// What it keeps in memory.
    pub(crate) fn footprint(&self) -> Footprint {
        self.program.footprint()
    }
}

fn contiguous(inputs: [&Tensor; 3]) -> Result<[Tensor; 3]> {
    let [x, told, fixed] = inputs;
    Ok([x.contiguous()?, told.contiguous()?, fixed.contiguous()?])
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
