//! A list of operations over one arena, checked once and then run any number of times.

use std::sync::Mutex;

use super::arena::{Aligned, Buffer, LINE, Layout};
use super::isa::Isa;
use super::team;

/// The most floats a vector load may reach past the values it is for.
const SLACK: usize = 64;

/// What an operation needs beside its own buffers while it runs.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Needs {
    /// Floats that each thread has for itself.
    pub(crate) scratch: usize,
    /// Floats that the threads share from one phase of the operation to the next.
    pub(crate) shared: usize,
}

/// How an operation is cut into work for one batch and thread count.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Split {
    /// Items of the first phase and, where there is one, of the second. A phase begins when the one
    /// before it is complete.
    pub(crate) items: [usize; 2],
    /// What that takes.
    pub(crate) needs: Needs,
}

impl Split {
    /// One phase.
    pub(crate) fn one(items: usize) -> Self {
        Self { items: [items, 0], needs: Needs::default() }
    }
}

/// One operation of a program. Results do not depend on how it is split.
pub(crate) trait Operation: Send + Sync {
    /// How it is cut up.
    fn split(&self, batch: usize, threads: usize) -> Split;

    /// The buffers it reads.
    fn reads(&self) -> Vec<Buffer>;

    /// The buffers it writes; they overlap none that it reads, except as [`Operation::in_place`].
    fn writes(&self) -> Vec<Buffer>;

    /// A buffer it reads and writes such that each item reads only what it writes itself.
    fn in_place(&self) -> Option<Buffer> {
        None
    }

    /// What it is, for profiles.
    fn name(&self) -> String;

    /// Floating-point operations for one sample, counted as a direct implementation would need them.
    fn flop(&self) -> f64 {
        0.0
    }

    /// Bytes of the weights it keeps.
    fn weight_bytes(&self) -> usize {
        0
    }

    /// Does one item of one phase.
    ///
    /// # Safety
    /// `memory` is that of a [`Program`] that holds `self`; the phases before are complete; nothing
    /// else runs at the same time but other items of the same phase. The operation promises in turn
    /// that items of a phase write different memory, and that all it touches lies in the buffers and
    /// needs that it told.
    unsafe fn run(&self, memory: &Memory, phase: usize, item: usize, worker: usize);
}

/// What operations work on during one run.
pub(crate) struct Memory<'a> {
    /// Instructions to use.
    pub(crate) isa: Isa,
    /// Samples.
    pub(crate) batch: usize,
    /// Threads the work is split for.
    pub(crate) threads: usize,
    arena: *mut f32,
    shared: *mut f32,
    scratch: *mut f32,
    scratch_len: usize,
    /// What comes from outside, in the order agreed on with the operations that read it.
    pub(crate) inputs: &'a [&'a [f32]],
    output: *mut f32,
}

// SAFETY: the pointers lead into memory that `Program::run` holds exclusively for as long as a
// `Memory` exists; what threads may do with them at the same time is the contract of
// `Operation::run`.
unsafe impl Sync for Memory<'_> {}

impl Memory<'_> {
    /// Where `buffer` begins for `sample`.
    ///
    /// The pointer is good for the buffer's length, and [`SLACK`] more for reading.
    #[inline]
    pub(crate) fn at(&self, buffer: Buffer, sample: usize) -> *mut f32 {
        debug_assert!(sample < self.batch);
        self.arena.wrapping_add(buffer.offset * self.batch + sample * buffer.len)
    }

    /// The floats of `worker` alone: as many as the operation's needs say.
    #[inline]
    pub(crate) fn scratch(&self, worker: usize) -> *mut f32 {
        debug_assert!(worker < self.threads);
        self.scratch.wrapping_add(worker * self.scratch_len)
    }

    /// The floats that are kept between the phases of an operation: as many as its needs say.
    #[inline]
    pub(crate) fn shared(&self) -> *mut f32 {
        self.shared
    }

    /// The result of the whole program, for all samples.
    #[inline]
    pub(crate) fn output(&self) -> *mut f32 {
        self.output
    }
}

/// Memory of one run, kept for the next.
#[derive(Default)]
struct Workspace {
    arena: Option<Aligned>,
    shared: Option<Aligned>,
    scratch: Option<Aligned>,
    phases: Vec<usize>,
    places: Vec<(usize, usize)>,
}

/// What one operation of an evaluation did, and how long it took.
#[derive(Debug, Clone)]
pub struct Timing {
    /// The operation.
    pub name: String,
    /// Floating-point operations for the whole batch, as a direct implementation would need them.
    pub flop: f64,
    /// Bytes of the maps it reads and writes, once each, and of its weights.
    pub bytes: f64,
    /// Wall time.
    pub seconds: f64,
}

/// What a compiled network keeps in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Weights, in the one form that each layer needs.
    pub weight_bytes: usize,
    /// Intermediate results of one sample that are alive at the same time, at most.
    pub live_bytes_per_sample: usize,
    /// What is kept from one evaluation to the next beside the weights: intermediate results for the
    /// largest batch so far, and what single operations need beside them.
    pub workspace_bytes: usize,
}

/// Operations over an arena, checked.
pub(crate) struct Program {
    isa: Isa,
    operations: Vec<Box<dyn Operation>>,
    /// Floats per sample.
    arena: usize,
    /// Floats per sample in use at once at most.
    live: usize,
    /// Floats per sample of the input with each number, and of the output.
    inputs: Vec<usize>,
    output: usize,
    /// As many as there were runs at the same time.
    workspaces: Mutex<Vec<Workspace>>,
}

impl Program {
    /// Checks that every buffer lies in the arena and that no operation overwrites what it reads.
    ///
    /// # Panics
    /// Where that does not hold: the plan is wrong, not its input.
    pub(crate) fn new(
        isa: Isa,
        operations: Vec<Box<dyn Operation>>,
        layout: &Layout,
        inputs: Vec<usize>,
        output: usize,
    ) -> Self {
        for operation in &operations {
            let (reads, writes) = (operation.reads(), operation.writes());
            let name = operation.name();
            for buffer in reads.iter().chain(&writes) {
                assert!(buffer.offset + buffer.len <= layout.len(), "{name} leaves the arena");
            }
            for (i, write) in writes.iter().enumerate() {
                let shared = |read: &&Buffer| Some(**read) != operation.in_place();
                let mut others = reads.iter().filter(shared).chain(&writes[..i]);
                assert!(!others.any(|other| other.overlaps(*write)), "{name} overwrites its input");
            }
        }
        let arena = layout.len();
        let live = layout.peak();
        Self { isa, operations, arena, live, inputs, output, workspaces: Mutex::default() }
    }

    /// Runs all operations for `batch` samples on the threads of the current rayon pool.
    ///
    /// # Panics
    /// Where inputs and output do not have the lengths that were agreed on.
    pub(crate) fn run(&self, batch: usize, inputs: &[&[f32]], output: &mut [f32]) {
        self.run_with(batch, inputs, output, &|memory, workspace| {
            let work = |phase: usize, item: usize, worker: usize| {
                let (operation, part) = workspace.places[phase];
                // SAFETY: the team runs the phases one after another, and `new` and `run_with` saw to
                // the memory.
                unsafe { self.operations[operation].run(memory, part, item, worker) }
            };
            team::run(memory.threads, &workspace.phases, &work);
        });
    }

    /// As [`Program::run`], giving what each operation did and how long it took.
    pub(crate) fn profile(
        &self,
        batch: usize,
        inputs: &[&[f32]],
        output: &mut [f32],
    ) -> Vec<Timing> {
        let times = Mutex::new(Vec::new());
        self.run_with(batch, inputs, output, &|memory, _| {
            for operation in &self.operations {
                let start = std::time::Instant::now();
                let items = operation.split(batch, memory.threads).items;
                // SAFETY: as in `run`, with one operation at a time.
                let work = |phase: usize, item: usize, worker: usize| unsafe {
                    operation.run(memory, phase, item, worker);
                };
                team::run(memory.threads, &items, &work);
                let seconds = start.elapsed().as_secs_f64();
                let floats = |buffers: Vec<Buffer>| buffers.iter().map(|b| b.len).sum::<usize>();
                let floats = floats(operation.reads()) + floats(operation.writes());
                let timing = Timing {
                    name: operation.name(),
                    flop: operation.flop() * batch as f64,
                    bytes: (4 * floats * batch + operation.weight_bytes()) as f64,
                    seconds,
                };
                times.lock().unwrap_or_else(|e| e.into_inner()).push(timing);
            }
        });
        times.into_inner().unwrap_or_else(|e| e.into_inner())
    }

    fn run_with(
        &self,
        batch: usize,
        inputs: &[&[f32]],
        output: &mut [f32],
        work: &(dyn Fn(&Memory, &Workspace) + Sync),
    ) {
        assert_eq!(inputs.len(), self.inputs.len());
        for (input, len) in inputs.iter().zip(&self.inputs) {
            assert_eq!(input.len(), batch * len);
        }
        assert_eq!(output.len(), batch * self.output);
        let threads = rayon::current_num_threads().max(1);
        let kept = self.workspaces.lock().unwrap_or_else(|e| e.into_inner()).pop();
        let mut workspace = kept.unwrap_or_default();
        let needs = self.schedule(batch, threads, &mut workspace);
        let scratch_len = needs.scratch.next_multiple_of(LINE) + SLACK;
        let memory = Memory {
            isa: self.isa,
            batch,
            threads,
            arena: grown(&mut workspace.arena, self.arena * batch + SLACK),
            shared: grown(&mut workspace.shared, needs.shared + SLACK),
            scratch: grown(&mut workspace.scratch, scratch_len * threads),
            scratch_len,
            inputs,
            output: output.as_mut_ptr(),
        };
        work(&memory, &workspace);
        self.workspaces.lock().unwrap_or_else(|e| e.into_inner()).push(workspace);
    }

    /// Notes all phases with work in them, and gives the largest needs.
    fn schedule(&self, batch: usize, threads: usize, workspace: &mut Workspace) -> Needs {
        workspace.phases.clear();
        workspace.places.clear();
        let mut needs = Needs::default();
        for (i, operation) in self.operations.iter().enumerate() {
            let split = operation.split(batch, threads);
            for (part, items) in split.items.into_iter().enumerate().filter(|(_, items)| *items > 0)
            {
                workspace.phases.push(items);
                workspace.places.push((i, part));
            }
            needs.scratch = needs.scratch.max(split.needs.scratch);
            needs.shared = needs.shared.max(split.needs.shared);
        }
        needs
    }

    /// What it keeps in memory.
    pub(crate) fn footprint(&self) -> Footprint {
        let workspaces = self.workspaces.lock().unwrap_or_else(|e| e.into_inner());
        let floats = |memory: &Option<Aligned>| memory.as_ref().map_or(0, |m| m.as_slice().len());
        let kept = |w: &Workspace| 4 * (floats(&w.arena) + floats(&w.shared) + floats(&w.scratch));
        Footprint {
            weight_bytes: self.operations.iter().map(|operation| operation.weight_bytes()).sum(),
            live_bytes_per_sample: 4 * self.live,
            workspace_bytes: workspaces.iter().map(kept).sum(),
        }
    }
}

/// A pointer to at least `len` floats, those that are there or, where they are too few, new ones.
fn grown(memory: &mut Option<Aligned>, len: usize) -> *mut f32 {
    if memory.as_ref().is_none_or(|memory| memory.as_slice().len() < len) {
        // What is there must go first, or both would be held for a moment.
        *memory = None;
    }
    memory.get_or_insert_with(|| Aligned::zeros(len)).as_mut_slice().as_mut_ptr()
}
