//! Steps and maps in the making, and what a map is still owed.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Result, Tensor, bail};

use super::kernels::Ending;
use super::machine::Machine;
use super::parameters::{Form, Parameter, Trained};
use super::program::{Place, Program, Run, Step};
use super::tape::Layer;
use crate::assembly::{Assembly, End, Map, Projection, Size};
use crate::kernels::{Function, Layout};
use crate::weights::Weights;

/// Numbers that a map's place is a multiple of, so that it begins where the widest loads may.
pub(super) const ALIGNED: usize = 128;

/// A program in the making, of a network that `C` describes.
pub(crate) struct Builder<'a, C> {
    pub(super) config: &'a C,
    pub(super) machine: Machine,
    pub(super) maps: Vec<Entry>,
    pub(super) memory: Layout,
    pub(super) projections: Projections,
    pub(super) steps: Vec<Step>,
    /// The weights that are trained, where some are.
    pub(super) trained: Option<Trained>,
    /// The layers, and channels at most that anything is summed over the pixels of, where the network is trained.
    pub(super) tape: Vec<Layer>,
    pub(super) widest: usize,
}

/// A map that some later step still reads.
pub(super) struct Entry {
    pub(super) place: Place,
    pub(super) uses: usize,
    pub(super) debt: Debt,
    /// Where its gradient is, once there is one.
    pub(super) gradient: Option<Place>,
}

impl Entry {
    /// A map that one step will read.
    pub(super) fn new(place: Place) -> Self {
        Self { place, uses: 1, debt: Debt::None, gradient: None }
    }
}

/// What the numbers of a map still lack.
pub(super) enum Debt {
    None,
    /// Whoever reads them adds it, or has it added.
    Owed(Owed),
    /// A norm has added it as it read them. It leaves it there if it is told to, which is when others read them.
    OnTheWay(Arc<AtomicBool>),
}

/// What is to be added to a map, and what it is to be multiplied with then.
#[derive(Clone)]
pub(super) struct Owed {
    /// f32 `[channels]`.
    pub(super) bias: Parameter,
    pub(super) offset: Option<Projection>,
    /// A map, whose use ends when it has been added, and where it is.
    pub(super) residual: Option<(Map, Place)>,
    pub(super) factor: f32,
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
    /// Weights and biases of all of them, once they are one.
    pub(super) joined: Option<[Parameter; 2]>,
}

impl<'a, C> Builder<'a, C> {
    /// For a network on the GPU of `weights`, with maps of their type.
    ///
    /// # Errors
    /// Weights that are elsewhere.
    pub(crate) fn new(config: &'a C, weights: &Weights) -> Result<Self> {
        Self::empty(config, weights, weights.dtype(), None)
    }

    /// For a network that is trained, on the GPU of its weights, which are f32, with maps of `dtype`.
    ///
    /// # Errors
    /// Weights that are elsewhere.
    pub(crate) fn trained(config: &'a C, weights: &Weights, dtype: DType) -> Result<Self> {
        Self::empty(config, weights, dtype, Some(Trained::default()))
    }

    fn empty(
        config: &'a C,
        weights: &Weights,
        dtype: DType,
        trained: Option<Trained>,
    ) -> Result<Self> {
        Ok(Self {
            config,
            machine: Machine::new(weights.device(), dtype)?,
            maps: Vec::new(),
            memory: Layout::default(),
            projections: Projections::default(),
            steps: Vec::new(),
            trained,
            tape: Vec::new(),
            widest: 0,
        })
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
        self.steps.push(Box::new(step));
    }

    /// Memory for a map.
    pub(super) fn take(&mut self, size: Size) -> Place {
        let numbers = size.height * size.width * size.channels;
        Place { buffer: self.memory.take(numbers.next_multiple_of(ALIGNED)), size }
    }

    /// Where a map is, whatever it is owed.
    pub(super) fn place(&self, map: Map) -> Place {
        self.maps[map.0].place
    }

    /// Where a map is, for one who adds nothing as it reads it.
    pub(super) fn read(&mut self, map: Map) -> Place {
        self.settle(map);
        self.place(map)
    }

    /// Has what a map is owed added to it.
    pub(super) fn settle(&mut self, map: Map) {
        match mem::replace(&mut self.maps[map.0].debt, Debt::None) {
            Debt::None => {}
            Debt::OnTheWay(keep) => keep.store(true, Ordering::Relaxed),
            Debt::Owed(owed) => {
                let (place, residual) = (self.place(map), owed.residual);
                self.push(move |machine, run| {
                    let x = run.at(place)?;
                    machine.finish(&x, &run.ending(&owed)?, Function::Identity, &x)
                });
                self.added(residual);
            }
        }
    }

    /// What a map is owed, for one who adds it as it reads the map; it stays owed to others.
    pub(super) fn owed(&mut self, map: Map) -> Option<Owed> {
        if let Debt::Owed(owed) = &self.maps[map.0].debt {
            return Some(owed.clone());
        }
        self.settle(map);
        None
    }

    /// The same for one who can add nothing but a bias that does not change.
    pub(super) fn bias(&mut self, map: Map) -> Option<Tensor> {
        if let Debt::Owed(owed) = &self.maps[map.0].debt
            && let Owed { bias: Parameter::Own(bias), offset: None, residual: None, factor: 1.0 } =
                owed
        {
            return Some(bias.clone());
        }
        self.settle(map);
        None
    }

    /// The same for a norm, which leaves it there if it is told to.
    pub(super) fn take_owed(&mut self, map: Map) -> (Option<Owed>, Arc<AtomicBool>) {
        let keep = Arc::default();
        let owed = self.owed(map);
        if owed.is_some() {
            self.maps[map.0].debt = Debt::OnTheWay(Arc::clone(&keep));
            if self.trained.is_some() {
                // Its gradient will read the map.
                self.settle(map);
            }
        }
        (owed, keep)
    }

    /// A residual is not needed any more.
    pub(super) fn added(&mut self, residual: Option<(Map, Place)>) {
        if let Some((map, _)) = residual {
            self.release(map);
        }
    }

    /// Where a layer's sums go, to which a bias and all that `end` says is owed then.
    pub(super) fn owe(&mut self, target: Map, mut bias: Parameter, end: End) -> Result<Place> {
        let End { offset, residual, factor } = end;
        let residual = match residual {
            // What was there before stays where it is, and the sums go elsewhere.
            Some(map) if map == target => {
                let place = self.take(self.size(target));
                let entry = &mut self.maps[target.0];
                if entry.uses != 1 {
                    bail!("map {} is written again, but {} are to read it", target.0, entry.uses)
                }
                let before = Entry::new(mem::replace(&mut entry.place, place));
                let debt = mem::replace(&mut entry.debt, Debt::None);
                self.maps.push(Entry { debt, ..before });
                let before = Map(self.maps.len() - 1);
                if let (Some(more), Parameter::Own(own)) = (self.bias(before), &bias) {
                    bias = Parameter::Own((own + more)?);
                }
                Some(before)
            }
            Some(map) => {
                self.settle(map);
                Some(self.retain(map))
            }
            None => None,
        };
        let residual = residual.map(|map| (map, self.place(map)));
        self.maps[target.0].debt = Debt::Owed(Owed { bias, offset, residual, factor });
        Ok(self.place(target))
    }

    /// Puts the product of all projections where the time embedding is known: only now are their weights together.
    ///
    /// # Errors
    /// Those of the device.
    pub(super) fn insert_projections(&mut self) -> Result<()> {
        let Projections { weights, biases, total, time, .. } = &mut self.projections;
        let (&mut Some((time, at)), false) = (time, weights.is_empty()) else { return Ok(()) };
        let (weights, biases, total) = (mem::take(weights), mem::take(biases), *total);
        let [weight, bias] = match &mut self.trained {
            None => [Tensor::cat(&weights, 0)?, Tensor::cat(&biases, 0)?].map(Parameter::Own),
            Some(trained) => {
                let width = weights[0].dim(1)?;
                [
                    trained.register(weights, (total, width), Form::Matrix),
                    trained.register(biases, total, Form::Vector),
                ]
            }
        };
        self.projections.joined = Some([weight.clone(), bias.clone()]);
        let time = self.place(time);
        let step: Step = Box::new(move |machine, run| {
            let y = machine.empty((run.batch, 1, 1, total), DType::F32)?;
            machine.linear(&[run.at(time)?], &run.value(&weight)?, &y)?;
            let end = Ending { bias: Some(run.value(&bias)?), ..Ending::NONE };
            machine.finish(&y, &end, Function::Identity, &y)?;
            run.projected = Some(y);
            Ok(())
        });
        self.steps.insert(at, step);
        Ok(())
    }

    /// The program.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn finish(mut self) -> Result<Program> {
        self.insert_projections()?;
        Ok(Program {
            machine: self.machine,
            steps: self.steps,
            memory: self.memory.len(),
            searches: true,
        })
    }
}
