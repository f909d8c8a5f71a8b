//! Steps and maps in the making, and the epilogue a map is still to get.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{DType, Result, Tensor};

use super::context::Context;
use super::kernels::Finish;
use super::parameters::{Form, Parameter, Trained};
use super::program::{Place, Program, Run, Step};
use super::tape::Saved;
use crate::graph::{Epilogue, Graph, Map, Size};
use crate::kernels::{Function, Layout};
use crate::weights::Weights;

/// Numbers that a map's place is a multiple of, so that it begins where the widest loads may.
pub(super) const ALIGNED: usize = 128;

/// A program in the making.
pub(crate) struct Builder<'a> {
    pub(super) graph: &'a Graph,
    pub(super) context: Context,
    pub(super) maps: Vec<Entry>,
    pub(super) memory: Layout,
    pub(super) projections: Projections,
    pub(super) steps: Vec<Step>,
    /// The weights that are trained, where some are.
    pub(super) trained: Option<Trained>,
    /// What operations left for their gradients, and channels at most that anything is summed over the pixels of, where
    /// the network is trained.
    pub(super) saved: Vec<(Map, Saved)>,
    pub(super) widest: usize,
}

/// A map that some later step still reads.
pub(super) struct Entry {
    /// Where it is, once something writes it.
    pub(super) place: Option<Place>,
    pub(super) uses: usize,
    pub(super) pending: Pending,
    /// Where among all projections it begins, if it is one.
    pub(super) projection: Option<Projection>,
    /// What the scores of an attention are multiplied with that reads queries there, where the network is trained.
    pub(super) scale: f32,
    /// Where its gradient is, once there is one.
    pub(super) gradient: Option<Place>,
}

impl Entry {
    /// A map that so many steps will read.
    pub(super) fn new(uses: usize) -> Self {
        let (place, projection, gradient) = (None, None, None);
        Self { place, uses, pending: Pending::None, projection, scale: 1.0, gradient }
    }
}

/// Where among the numbers of all projections one begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Projection(pub(crate) usize);

/// What the numbers of a map still lack.
pub(super) enum Pending {
    None,
    /// Whoever reads them adds it, or has it added.
    Epilogue(PendingEpilogue),
    /// A norm has added it as it read them. It leaves it there if it is told to, which is when others read them.
    ByNorm(Arc<AtomicBool>),
}

/// What is to be added to a map, and what it is to be multiplied with then.
#[derive(Clone)]
pub(super) struct PendingEpilogue {
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

impl<'a> Builder<'a> {
    /// For a network on the GPU of `weights`, with maps of their type.
    ///
    /// # Errors
    /// Weights that are elsewhere.
    pub(crate) fn new(graph: &'a Graph, weights: &Weights) -> Result<Self> {
        Self::empty(graph, weights, None)
    }

    /// For a network that is trained, whose weights are f32.
    ///
    /// # Errors
    /// Weights that are elsewhere.
    pub(crate) fn trained(graph: &'a Graph, weights: &Weights) -> Result<Self> {
        Self::empty(graph, weights, Some(Trained::default()))
    }

    fn empty(graph: &'a Graph, weights: &Weights, trained: Option<Trained>) -> Result<Self> {
        Ok(Self {
            graph,
            context: Context::new(weights.device(), weights.dtype())?,
            maps: graph.uses().into_iter().map(Entry::new).collect(),
            memory: Layout::default(),
            projections: Projections::default(),
            steps: Vec::new(),
            trained,
            saved: Vec::new(),
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
        step: impl Fn(&Context, &mut Run) -> Result<()> + Send + Sync + 'static,
    ) {
        self.steps.push(Box::new(step));
    }

    /// Memory for a map.
    pub(super) fn take(&mut self, size: Size) -> Place {
        let numbers = size.height * size.width * size.channels;
        Place { buffer: self.memory.take(numbers.next_multiple_of(ALIGNED)), size }
    }

    /// Memory for a map of the graph.
    pub(super) fn map(&mut self, map: Map) -> Place {
        let place = self.take(self.graph.size(map));
        self.maps[map.0].place = Some(place);
        place
    }

    /// A map that is not the graph's, with one use.
    pub(super) fn another(&mut self, size: Size) -> Map {
        let place = Some(self.take(size));
        self.maps.push(Entry { place, ..Entry::new(1) });
        Map(self.maps.len() - 1)
    }

    /// Where a map is, whether or not its epilogue is still pending.
    pub(super) fn place(&self, map: Map) -> Place {
        self.maps[map.0].place.expect("a map is written before it is read")
    }

    /// One more use.
    pub(super) fn retain(&mut self, map: Map) -> Map {
        self.maps[map.0].uses += 1;
        map
    }

    /// One use less. After the last the map's memory is used for others, unless the network is trained: then gradients
    /// still need it.
    pub(super) fn release(&mut self, map: Map) {
        if self.trained.is_some() {
            return;
        }
        let entry = &mut self.maps[map.0];
        entry.uses -= 1;
        if entry.uses == 0 {
            // Nobody reads it, so nobody adds it.
            let pending = mem::replace(&mut entry.pending, Pending::None);
            // A projection has no memory of its own.
            if let Some(place) = entry.place {
                self.memory.give(place.buffer);
            }
            if let Pending::Epilogue(pending) = pending {
                self.added(pending.residual);
            }
        }
    }

    /// Where a map is, for one who adds nothing as it reads it.
    pub(super) fn read(&mut self, map: Map) -> Place {
        self.settle(map);
        self.place(map)
    }

    /// Applies the pending epilogue of a map.
    pub(super) fn settle(&mut self, map: Map) {
        match mem::replace(&mut self.maps[map.0].pending, Pending::None) {
            Pending::None => {}
            Pending::ByNorm(keep) => keep.store(true, Ordering::Relaxed),
            Pending::Epilogue(pending) => {
                let (place, residual) = (self.place(map), pending.residual);
                self.push(move |context, run| {
                    let x = run.at(place)?;
                    context.finish(&x, &run.finish_of(&pending)?, Function::Identity, &x)
                });
                self.added(residual);
            }
        }
    }

    /// The pending epilogue of a map, for a reader that applies it; it stays pending for others.
    pub(super) fn pending(&mut self, map: Map) -> Option<PendingEpilogue> {
        if let Pending::Epilogue(pending) = &self.maps[map.0].pending {
            return Some(pending.clone());
        }
        self.settle(map);
        None
    }

    /// The same for one who can add nothing but a bias that does not change.
    pub(super) fn bias(&mut self, map: Map) -> Option<Tensor> {
        if let Pending::Epilogue(pending) = &self.maps[map.0].pending
            && let PendingEpilogue {
                bias: Parameter::Own(bias),
                offset: None,
                residual: None,
                factor: 1.0,
            } = pending
        {
            return Some(bias.clone());
        }
        self.settle(map);
        None
    }

    /// The same for a norm, which leaves it there if it is told to.
    pub(super) fn take_pending(&mut self, map: Map) -> (Option<PendingEpilogue>, Arc<AtomicBool>) {
        let keep = Arc::default();
        let pending = self.pending(map);
        if pending.is_some() {
            self.maps[map.0].pending = Pending::ByNorm(Arc::clone(&keep));
            if self.trained.is_some() {
                // Its gradient will read the map.
                self.settle(map);
            }
        }
        (pending, keep)
    }

    /// A residual is not needed any more.
    pub(super) fn added(&mut self, residual: Option<(Map, Place)>) {
        if let Some((map, _)) = residual {
            self.release(map);
        }
    }

    /// Where an operation's sums go, whose bias and `epilogue` are pending from then on.
    pub(super) fn defer(
        &mut self,
        target: Map,
        mut bias: Parameter,
        epilogue: Epilogue,
    ) -> Result<Place> {
        let Epilogue { offset, residual, factor } = epilogue;
        let offset = offset.and_then(|map| self.maps[map.0].projection);
        if let Some(map) = residual {
            // What nobody else reads may keep its bias pending until both are added.
            let alone = self.graph.uses().get(map.0) == Some(&1);
            match (alone, &bias) {
                (true, Parameter::Own(own)) => {
                    let own = own.clone();
                    if let Some(more) = self.bias(map) {
                        bias = Parameter::Own((own + more)?);
                    }
                }
                _ => self.settle(map),
            }
            self.retain(map);
        }
        let place = self.map(target);
        let residual = residual.map(|map| (map, self.place(map)));
        self.maps[target.0].pending =
            Pending::Epilogue(PendingEpilogue { bias, offset, residual, factor });
        Ok(place)
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
        let step: Step = Box::new(move |context, run| {
            let y = context.empty((run.batch, 1, 1, total), DType::F32)?;
            context.linear(&[run.at(time)?], &run.value(&weight)?, &y)?;
            let end = Finish { bias: Some(run.value(&bias)?), ..Finish::NONE };
            context.finish(&y, &end, Function::Identity, &y)?;
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
            context: self.context,
            steps: self.steps,
            memory: self.memory.len(),
            searches: true,
        })
    }
}
