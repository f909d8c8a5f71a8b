//! Networks compiled for the CPU: the operations of a graph as a list of kernels over one arena.

mod builder;
mod ops;
mod packed;
mod quantized;
mod tape;
mod training;

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, Layout, Result, Storage, Tensor, bail};

use crate::graph::{Graph, Size, lower};
use crate::kernels::{Call, ElementType, Footprint, Isa, Program, Timing, Workspace};
use crate::quantization::{Calibration, Quantization};
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

/// What else is done with the inputs of products.
#[derive(Clone, Default)]
pub(crate) enum Mode {
    /// Nothing.
    #[default]
    Plain,
    /// They become codes of 8 bits, and so are the weights.
    Quantized(Arc<Quantization>),
    /// They are shown to a calibration.
    Observed(Arc<Calibration>),
}

impl Mode {
    /// Whether operations look at the time of each sample.
    pub(crate) fn timed(&self) -> bool {
        !matches!(self, Self::Plain)
    }

    /// The same for networks whose weights are packed.
    fn packed(self) -> Self {
        match self {
            Self::Quantized(quantization) => Self::Quantized(Arc::new(quantization.grids())),
            other => other,
        }
    }
}

/// Floats per sample of each input.
fn inputs(graph: &Graph, mode: &Mode) -> [usize; 4] {
    let (_, divided) = graph.answer();
    let prompt = graph.prompt().map_or(0, |map| floats_of(graph.size(map)));
    [graph.asked(), graph.features().total, usize::from(divided || mode.timed()), prompt]
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
    mode: Mode,
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
        mode: Mode,
    ) -> crate::Result<Self> {
        Self::over(graph, weights, (isa, element), mode, Arc::default())
    }

    /// The same operations over maps of other sizes; the weights are shared.
    ///
    /// # Errors
    /// Those of a graph of other operations.
    pub(crate) fn at(&self, graph: &Graph) -> crate::Result<Self> {
        let none = Weights::new(HashMap::new(), DType::F32, &Device::Cpu);
        let numbers = (self.isa, self.element);
        Self::over(graph, &none, numbers, self.mode.clone(), self.packed.clone())
    }

    fn over(
        graph: &Graph,
        weights: &Weights,
        (isa, element): (Isa, ElementType),
        mode: Mode,
        packed: Arc<Packed>,
    ) -> crate::Result<Self> {
        let mut builder = Builder::new(graph, (isa, element), mode.clone(), packed.clone());
        lower(graph, weights, &mut builder)?;
        let answers: Vec<Size> = graph.answers().into_iter().map(|(_, size)| size).collect();
        let floats = answers.iter().copied().map(floats_of).sum();
        let program = builder.finish(inputs(graph, &mode).to_vec(), floats);
        let mode = mode.packed();
        Ok(Self { program, answers, packed, isa, element, mode })
    }

    /// Of f32 tensors that begin with the batch, one evaluation: all answers, `[B, channels, height, width]`.
    pub(crate) fn forward(&self, inputs: Inputs) -> Result<Vec<Tensor>> {
        let batch = inputs[SAMPLE].dim(0)?;
        let mut output = vec![0.0; batch * self.floats()];
        with_floats(&contiguous(inputs)?, |inputs| {
            Ok(self.program.run(batch, inputs, &mut output)?)
        })?;
        self.split(output, batch)
    }

    /// What each kernel does in one evaluation.
    pub(crate) fn profile(&self, inputs: Inputs) -> Result<Vec<Timing>> {
        let batch = inputs[SAMPLE].dim(0)?;
        let mut output = vec![0.0; batch * self.floats()];
        with_floats(&contiguous(inputs)?, |inputs| {
            Ok(self.program.profile(batch, inputs, &mut output)?)
        })
    }

    /// As [`Inference::forward`], to be done in so many stretches, at least one.
    pub(crate) fn begin(&self, inputs: Inputs, stretches: usize) -> Result<Unfinished> {
        let batch = inputs[SAMPLE].dim(0)?;
        let mut ends = self.program.stretches(stretches.max(1));
        ends.reverse();
        Ok(Unfinished {
            inputs: contiguous(inputs)?,
            batch,
            workspace: self.program.begin(),
            output: vec![0.0; batch * self.floats()],
            done: 0,
            ends,
        })
    }

    /// Does the next stretch; all answers after the last one.
    pub(crate) fn go_on(&self, unfinished: &mut Unfinished) -> Result<Option<Vec<Tensor>>> {
        let Unfinished { inputs, batch, workspace, output, done, ends } = unfinished;
        let Some(end) = ends.pop() else { bail!("the evaluation has ended") };
        with_floats(inputs, |inputs| {
            let (batch, operations) = (*batch, *done..end);
            let call = Call { batch, inputs, parameters: &[], output, gradients: &mut [] };
            Ok(self.program.run_stretch(operations, workspace, call)?)
        })?;
        *done = end;
        if !ends.is_empty() {
            return Ok(None);
        }
        self.program.end(std::mem::take(workspace));
        self.split(std::mem::take(output), *batch).map(Some)
    }

    /// Floats of all answers to one sample.
    fn floats(&self) -> usize {
        self.answers.iter().copied().map(floats_of).sum()
    }

    /// The answers to a batch, one by one.
    fn split(&self, output: Vec<f32>, batch: usize) -> Result<Vec<Tensor>> {
        let output = Tensor::from_vec(output, (batch, self.floats()), &Device::Cpu)?;
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

/// An evaluation that is done a stretch at a time. Its intermediate results have a memory of their own until it ends, so
/// others of the same network may come between.
pub(crate) struct Unfinished {
    inputs: [Tensor; 4],
    batch: usize,
    workspace: Workspace,
    output: Vec<f32>,
    /// Operations done.
    done: usize,
    /// Where the stretches end that are still to be done, the next one last.
    ends: Vec<usize>,
}

/// Tells `ask` the floats of contiguous tensors.
fn with_floats<T>(tensors: &[Tensor; 4], ask: impl FnOnce(&[&[f32]]) -> Result<T>) -> Result<T> {
    let storages = tensors.each_ref().map(Tensor::storage_and_layout);
    let mut all: [&[f32]; 4] = [&[]; 4];
    for (input, (storage, layout)) in all.iter_mut().zip(&storages) {
        *input = floats(storage, layout)?;
    }
    ask(&all)
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
