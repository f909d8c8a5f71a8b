//! Steps and maps in the making, and what a map is still owed.

use candle_core::{DType, Result, Tensor, bail};

use super::kernels::Ending;
use super::machine::Machine;
use super::program::{Program, Run, Step};
use crate::assembly::{Map, Projection, Size};
use crate::weights::Weights;

/// A program in the making, of a network that `C` describes.
pub(crate) struct Builder<'a, C> {
    pub(super) config: &'a C,
    pub(super) machine: Machine,
    pub(super) maps: Vec<Entry>,
    pub(super) projections: Projections,
    steps: Vec<Step>,
}

/// A map that some later step still reads.
pub(super) struct Entry {
    pub(super) size: Size,
    pub(super) uses: usize,
    pub(super) owed: Debt,
}

/// What the numbers of a map still lack.
pub(super) enum Debt {
    None,
    /// Whoever reads them adds it, or has it added.
    Owed(Owed),
    /// Nobody will add it any more.
    Taken,
}

/// What is the same at every pixel of a sample.
#[derive(Clone)]
pub(super) struct Owed {
    /// f32 `[channels]`.
    pub(super) bias: Tensor,
    pub(super) offset: Option<Projection>,
}

/// The linear maps of the time embedding, one for each residual block, as one.
#[derive(Default)]
pub(super) struct Projections {
    pub(super) weights: Vec<Tensor>,
    /// f32.
    pub(super) biases: Vec<Tensor>,
    /// Numbers of all of them so far.
    pub(super) total: usize,
    /// The time embedding, and where in the list of steps it is known.
    pub(super) time: Option<(Map, usize)>,
}

impl<'a, C> Builder<'a, C> {
    /// For a network on the GPU of `weights`, with maps of their type.
    ///
    /// # Errors
    /// Weights that are elsewhere.
    pub(crate) fn new(config: &'a C, weights: &Weights) -> Result<Self> {
        let machine = Machine::new(weights.device(), weights.dtype())?;
        let (maps, projections, steps) = (Vec::new(), Projections::default(), Vec::new());
        Ok(Self { config, machine, maps, projections, steps })
    }

    /// Steps so far.
    pub(super) fn len(&self) -> usize {
        self.steps.len()
    }

    /// Adds a step.
    pub(super) fn push(
        &mut self,
        step: impl Fn(&Machine, &mut Run) -> Result<()> + Send + Sync + 'static,
    ) {
        let machine = self.machine.clone();
        self.steps.push(Box::new(move |run| step(&machine, run)));
    }

    /// Has what a map is owed added to it, for whoever reads it next.
    pub(super) fn settle(&mut self, map: Map) {
        match std::mem::replace(&mut self.maps[map.0].owed, Debt::None) {
            Debt::None => {}
            Debt::Owed(Owed { bias, offset }) => self.push(move |machine, run| {
                let offset = run.told(offset)?;
                let end = Ending { bias: Some(&bias), offset, ..Ending::default() };
                machine.finish(run.map(map)?, end)
            }),
            Debt::Taken => self.push(move |_, _| {
                bail!("map {} is read once more after its last reader took what it was owed", map.0)
            }),
        }
    }

    /// What a map is owed, for whoever reads it next and adds it; if it is the only one to read it: others find it
    /// settled.
    pub(super) fn take(&mut self, map: Map) -> Option<Owed> {
        let entry = &mut self.maps[map.0];
        if let (1, Debt::Owed(owed)) = (entry.uses, &entry.owed) {
            let owed = owed.clone();
            entry.owed = Debt::Taken;
            return Some(owed);
        }
        self.settle(map);
        None
    }

    /// The same for one who can add nothing but a bias.
    pub(super) fn take_bias(&mut self, map: Map) -> Option<Tensor> {
        if let Debt::Owed(Owed { offset: Some(_), .. }) = self.maps[map.0].owed {
            self.settle(map);
        }
        self.take(map).map(|owed| owed.bias)
    }

    /// The program.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn finish(mut self) -> Result<Program> {
        if let (Some((time, at)), true) = (self.projections.time, self.projections.total > 0) {
            // Only now are their weights together.
            let weight = Tensor::cat(&self.projections.weights, 0)?;
            let bias = Tensor::cat(&self.projections.biases, 0)?;
            self.push(move |machine, run| {
                let projected = machine.linear(&[run.map(time)?], &weight, DType::F32)?;
                machine.finish(&projected, Ending { bias: Some(&bias), ..Ending::default() })?;
                run.projected = Some(projected);
                Ok(())
            });
            let step = self.steps.pop().expect("it was pushed just now");
            self.steps.insert(at, step);
        }
        Ok(Program { steps: self.steps, maps: self.maps.len() })
    }
}
