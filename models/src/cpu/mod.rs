//! Networks compiled for the CPU: the operations of a graph as a list of kernels over one arena.

mod builder;
mod ops;
mod packed;
mod tape;
mod training;

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor, bail};

use crate::graph::{Graph, Size, lower};
use crate::kernels::{ElementType, Footprint, Isa, Program, Timing};
use crate::weights::Weights;
use builder::Builder;
use packed::Packed;
pub(crate) use training::Training;

/// Numbers of a compiled network's inputs: what it is asked about, `[B, channels, height, width]` or, of tokens, their
/// numbers `[B, tokens]`; the vectors that time
/// and condition become ([`crate::features`]), `[B, all their numbers]`; the times `[B]`; and the prompts
/// `[B, width, tokens]`. Those that a network does not take are `[B, 0]`.
pub(crate) const SAMPLE: usize = 0;
pub(crate) const FEATURES: usize = 1;
pub(crate) const TIME: usize = 2;
pub(crate) const PROMPT: usize = 3;

/// One tensor for each.
pub(crate) type Inputs<'a> = [&'a Tensor; 4];

/// Floats per sample of each input.
fn inputs(graph: &Graph) -> [usize; 4] {
    let (_, divided) = graph.answer();
    let prompt = graph.prompt().map_or(0, |map| floats_of(graph.size(map)));
    [graph.asked(), graph.features().total, usize::from(divided), prompt]
}

/// Floats of a map.
fn floats_of(Size { height, width, channels }: Size) -> usize {
    height * width * channels
}

/// A network whose weights are packed and whose memory is planned.
pub(crate) struct Inference {
    program: Program,
    /// Sizes of all answers.
    answers: Vec<Size>,
    packed: Arc<Packed>,
    isa: Isa,
    element: ElementType,
}

impl Inference {
    /// Maps between operations, and with them the operands of products, are of `element`; what comes in and goes out is
    /// f32.
    ///
    /// # Errors
    /// Those of weights that cannot be read.
    pub(crate) fn new(
        graph: &Graph,
        weights: &Weights,
        isa: Isa,
        element: ElementType,
    ) -> crate::Result<Self> {
        Self::over(graph, weights, isa, element, Arc::default())
    }

    /// The same operations over maps of other sizes; the weights are shared.
    ///
    /// # Errors
    /// Those of a graph of other operations.
    pub(crate) fn at(&self, graph: &Graph) -> crate::Result<Self> {
        let none = Weights::new(HashMap::new(), DType::F32, &Device::Cpu);
        Self::over(graph, &none, self.isa, self.element, self.packed.clone())
    }

    fn over(
        graph: &Graph,
        weights: &Weights,
        isa: Isa,
        element: ElementType,
        packed: Arc<Packed>,
    ) -> crate::Result<Self> {
        let mut builder = Builder::new(graph, isa, element, packed.clone());
        lower(graph, weights, &mut builder)?;
        let answers: Vec<Size> = graph.answers().into_iter().map(|(_, size)| size).collect();
        let floats = answers.iter().copied().map(floats_of).sum();
        let program = builder.finish(inputs(graph).to_vec(), floats);
        Ok(Self { program, answers, packed, isa, element })
    }

    /// Of f32 tensors that begin with the batch, one evaluation: all answers, `[B, channels, height, width]`.
    pub(crate) fn forward(&self, inputs: Inputs) -> Result<Vec<Tensor>> {
        self.with_inputs(inputs, |program, batch, inputs, output| {
            Ok(program.run(batch, inputs, output)?)
        })
    }

    /// What each kernel does in one evaluation.
    pub(crate) fn profile(&self, inputs: Inputs) -> Result<Vec<Timing>> {
        let mut lines = Vec::new();
        self.with_inputs(inputs, |program, batch, inputs, output| {
            lines = program.profile(batch, inputs, output)?;
            Ok(())
        })?;
        Ok(lines)
    }

    fn with_inputs(
        &self,
        inputs: Inputs,
        run: impl FnOnce(&Program, usize, &[&[f32]], &mut [f32]) -> Result<()>,
    ) -> Result<Vec<Tensor>> {
        let batch = inputs[SAMPLE].dim(0)?;
        let tensors = contiguous(inputs)?;
        let storages = tensors.each_ref().map(Tensor::storage_and_layout);
        let mut inputs: [&[f32]; 4] = [&[]; 4];
        for (input, (storage, layout)) in inputs.iter_mut().zip(&storages) {
            *input = floats(storage, layout)?;
        }
        let all: usize = self.answers.iter().copied().map(floats_of).sum();
        let mut output = vec![0.0; batch * all];
        run(&self.program, batch, &inputs, &mut output)?;
        let output = Tensor::from_vec(output, (batch, all), &Device::Cpu)?;
        let mut start = 0;
        let answer = |&size: &Size| {
            let (Size { height, width, channels }, floats) = (size, floats_of(size));
            start += floats;
            output.narrow(1, start - floats, floats)?.reshape((batch, channels, height, width))
        };
        self.answers.iter().map(answer).collect()
    }

    /// What it keeps in memory.
    pub(crate) fn footprint(&self) -> Footprint {
        self.program.footprint()
    }
}

fn contiguous(inputs: Inputs) -> Result<[Tensor; 4]> {
    let [sample, features, time, prompt] = inputs;
    Ok([sample.contiguous()?, features.contiguous()?, time.contiguous()?, prompt.contiguous()?])
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
