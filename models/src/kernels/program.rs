//! A list of operations over one arena, checked once and then run any number of times.

use std::ops::Range;
use std::sync::Mutex;

use super::arena::{Aligned, Buffer, LINE, Layout, NoMemory};
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

    /// The parts of the memory for weights that it reads or writes.
    fn placed(&self) -> Vec<Buffer> {
        Vec::new()
    }

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
    placed: *mut f32,
    /// What comes from outside, in the order agreed on with the operations that read it.
    pub(crate) inputs: &'a [&'a [f32]],
    /// The weights of a network that is trained, as they are outside.
    pub(crate) parameters: &'a [&'a [f32]],
    output: *mut f32,
    gradients: *mut f32,
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

    /// Where `buffer` of the memory for weights begins; it is the same for all samples.
    #[inline]
    pub(crate) fn placed(&self, buffer: Buffer) -> *mut f32 {
        self.placed.wrapping_add(buffer.offset)
    }

    /// The gradients of all parameters, one after another.
    #[inline]
    pub(crate) fn gradients(&self) -> *mut f32 {
        self.gradients
    }

    /// The result of the part of the program that runs, for all samples.
    #[inline]
    pub(crate) fn output(&self) -> *mut f32 {
        self.output
    }
}

/// Memory of one run, kept for the next.
#[derive(Default)]
pub(crate) struct Workspace {
    batch: usize,
    arena: Option<Aligned>,
    placed: Option<Aligned>,
    shared: Option<Aligned>,
    scratch: Option<Aligned>,
    phases: Vec<usize>,
    places: Vec<(usize, usize)>,
}

/// Operations that run by themselves, before or after others over the same arena.
pub(crate) struct Part {
    /// Which ones.
    pub(crate) operations: Range<usize>,
    /// Floats per sample of the input with each number.
    pub(crate) inputs: Vec<usize>,
    /// Floats per sample of the output.
    pub(crate) output: usize,
}

/// What comes into one run of a part, and where its results go.
pub(crate) struct Call<'a> {
    /// Samples.
    pub(crate) batch: usize,
    /// One slice for each of the part's inputs.
    pub(crate) inputs: &'a [&'a [f32]],
    /// The network's weights, where it is trained.
    pub(crate) parameters: &'a [&'a [f32]],
    /// The part's output.
    pub(crate) output: &'a mut [f32],
    /// The gradients of all parameters, one after another; empty in a part that makes none.
    pub(crate) gradients: &'a mut [f32],
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
    parts: Vec<Part>,
    /// Floats per sample.
    arena: usize,
    /// Floats per sample in use at once at most.
    live: usize,
    /// Floats for weights.
    placed: usize,
    /// Floats of each parameter.
    parameters: Vec<usize>,
    /// As many as there were runs at the same time.
    workspaces: Mutex<Vec<Workspace>>,
}

impl Program {
    /// A program of one part, whose operations have their weights.
    ///
    /// # Panics
    /// As [`Program::in_parts`].
    pub(crate) fn new(
        isa: Isa,
        operations: Vec<Box<dyn Operation>>,
        layout: &Layout,
        inputs: Vec<usize>,
        output: usize,
    ) -> Self {
        let part = Part { operations: 0..operations.len(), inputs, output };
        Self::in_parts(isa, operations, [layout, &Layout::default()], vec![part], Vec::new())
    }

    /// Checks that every buffer lies in its memory, the arena or that for weights, and that no
    /// operation overwrites what it reads.
    ///
    /// # Panics
    /// Where that does not hold: the plan is wrong, not its input.
    pub(crate) fn in_parts(
        isa: Isa,
        operations: Vec<Box<dyn Operation>>,
        [layout, placed]: [&Layout; 2],
        parts: Vec<Part>,
        parameters: Vec<usize>,
    ) -> Self {
        for operation in &operations {
            let (reads, writes) = (operation.reads(), operation.writes());
            let name = operation.name();
            for buffer in reads.iter().chain(&writes) {
                assert!(buffer.offset + buffer.len <= layout.len(), "{name} leaves the arena");
            }
            for buffer in operation.placed() {
                assert!(buffer.offset + buffer.len <= placed.len(), "{name} leaves the weights");
            }
            for (i, write) in writes.iter().enumerate() {
                let shared = |read: &&Buffer| Some(**read) != operation.in_place();
                let mut others = reads.iter().filter(shared).chain(&writes[..i]);
                assert!(!others.any(|other| other.overlaps(*write)), "{name} overwrites its input");
            }
        }
        let (arena, live, placed) = (layout.len(), layout.peak(), placed.len());
        let workspaces = Mutex::default();
        Self { isa, operations, parts, arena, live, placed, parameters, workspaces }
    }

    /// Runs all operations of a program of one part for `batch` samples on the threads of the current
    /// rayon pool.
    ///
    /// # Errors
    /// [`NoMemory`] for so many samples.
    ///
    /// # Panics
    /// Where inputs and output do not have the lengths that were agreed on.
    pub(crate) fn run(
        &self,
        batch: usize,
        inputs: &[&[f32]],
        output: &mut [f32],
    ) -> Result<(), NoMemory> {
        let mut workspace = self.begin();
        let call = Call { batch, inputs, parameters: &[], output, gradients: &mut [] };
        let run = self.run_part(0, &mut workspace, call, None);
        self.end(workspace);
        run
    }

    /// As [`Program::run`], giving what each operation did and how long it took.
    pub(crate) fn profile(
        &self,
        batch: usize,
        inputs: &[&[f32]],
        output: &mut [f32],
    ) -> Result<Vec<Timing>, NoMemory> {
        let (mut workspace, mut profile) = (self.begin(), Vec::new());
        let call = Call { batch, inputs, parameters: &[], output, gradients: &mut [] };
        let run = self.run_part(0, &mut workspace, call, Some(&mut profile));
        self.end(workspace);
        run.map(|()| profile)
    }

    /// Memory for a run of all parts.
    pub(crate) fn begin(&self) -> Workspace {
        let kept = self.workspaces.lock().unwrap_or_else(|e| e.into_inner()).pop();
        Workspace { batch: 0, ..kept.unwrap_or_default() }
    }

    /// Keeps such memory for the next run.
    pub(crate) fn end(&self, workspace: Workspace) {
        self.workspaces.lock().unwrap_or_else(|e| e.into_inner()).push(workspace);
    }

    /// Runs one part, on the threads of the current rayon pool; what the parts before have left in the
    /// workspace is there. With `profile`, one operation at a time.
    ///
    /// # Errors
    /// [`NoMemory`] for so many samples.
    ///
    /// # Panics
    /// Where a length is not what was agreed on, or the batch not that of the parts before.
    pub(crate) fn run_part(
        &self,
        part: usize,
        workspace: &mut Workspace,
        call: Call,
        profile: Option<&mut Vec<Timing>>,
    ) -> Result<(), NoMemory> {
        let part = &self.parts[part];
        self.run_operations(part, part.operations.clone(), workspace, call, profile)
    }

    /// Runs a stretch of the operations of a program of one part, on the threads of the current rayon pool; those before
    /// have run in this workspace, for the same inputs and into the same output.
    ///
    /// # Errors
    /// [`NoMemory`] for so many samples.
    ///
    /// # Panics
    /// As [`Program::run_part`].
    pub(crate) fn run_stretch(
        &self,
        operations: Range<usize>,
        workspace: &mut Workspace,
        call: Call,
    ) -> Result<(), NoMemory> {
        self.run_operations(&self.parts[0], operations, workspace, call, None)
    }

    /// The ends of so many stretches of all operations, of about as many floating-point operations each. Where there are
    /// fewer operations some are empty.
    pub(crate) fn stretches(&self, count: usize) -> Vec<usize> {
        let flop: Vec<f64> = self.operations.iter().map(|operation| operation.flop()).collect();
        let total: f64 = flop.iter().sum();
        let (mut ends, mut done) = (Vec::with_capacity(count), 0.0);
        for (i, flop) in flop.iter().enumerate() {
            // The operation belongs to the stretch that its middle is in.
            while ends.len() + 1 < count
                && done + flop / 2.0 > total * (ends.len() + 1) as f64 / count as f64
            {
                ends.push(i);
            }
            done += flop;
        }
        ends.resize(count, self.operations.len());
        ends
    }

    fn run_operations(
        &self,
        part: &Part,
        operations: Range<usize>,
        workspace: &mut Workspace,
        call: Call,
        profile: Option<&mut Vec<Timing>>,
    ) -> Result<(), NoMemory> {
        let Call { batch, inputs, parameters, output, gradients } = call;
        assert!(inputs.iter().map(|input| input.len()).eq(part.inputs.iter().map(|n| batch * n)));
        assert!(parameters.iter().map(|one| one.len()).eq(self.parameters.iter().copied()));
        assert_eq!(output.len(), batch * part.output);
        assert!(gradients.is_empty() || gradients.len() == self.parameters.iter().sum::<usize>());
        assert!(workspace.batch == 0 || workspace.batch == batch);
        workspace.batch = batch;
        let threads = rayon::current_num_threads().max(1);
        let needs = self.schedule(operations.clone(), batch, threads, workspace);
        let scratch_len = needs.scratch.next_multiple_of(LINE) + SLACK;
        let memory = Memory {
            isa: self.isa,
            batch,
            threads,
            arena: grown(&mut workspace.arena, self.arena * batch + SLACK)?,
            placed: grown(&mut workspace.placed, self.placed + SLACK)?,
            shared: grown(&mut workspace.shared, needs.shared + SLACK)?,
            scratch: grown(&mut workspace.scratch, scratch_len * threads)?,
            scratch_len,
            inputs,
            parameters,
            output: output.as_mut_ptr(),
            gradients: gradients.as_mut_ptr(),
        };
        let Some(profile) = profile else {
            let work = |phase: usize, item: usize, worker: usize| {
                let (operation, phase) = workspace.places[phase];
                // SAFETY: the team runs the phases one after another, and the checks above and in
                // `in_parts` saw to the memory.
                unsafe { self.operations[operation].run(&memory, phase, item, worker) }
            };
            team::run(threads, &workspace.phases, &work);
            return Ok(());
        };
        for operation in &self.operations[operations] {
            let start = std::time::Instant::now();
            // SAFETY: as above, with one operation at a time.
            let work = |phase: usize, item: usize, worker: usize| unsafe {
                operation.run(&memory, phase, item, worker);
            };
            team::run(threads, &operation.split(batch, threads).items, &work);
            let seconds = start.elapsed().as_secs_f64();
            let floats = |buffers: Vec<Buffer>| buffers.iter().map(|b| b.len).sum::<usize>();
            let floats = floats(operation.reads()) + floats(operation.writes());
            profile.push(Timing {
                name: operation.name(),
                flop: operation.flop() * batch as f64,
                bytes: (4 * floats * batch + operation.weight_bytes()) as f64,
                seconds,
            });
        }
        Ok(())
    }

    /// Notes all phases of operations with work in them, and gives the largest needs.
    fn schedule(
        &self,
        operations: Range<usize>,
        batch: usize,
        threads: usize,
        workspace: &mut Workspace,
    ) -> Needs {
        workspace.phases.clear();
        workspace.places.clear();
        let mut needs = Needs::default();
        for i in operations {
            let split = self.operations[i].split(batch, threads);
            for (phase, items) in
                split.items.into_iter().enumerate().filter(|(_, items)| *items > 0)
            {
                workspace.phases.push(items);
                workspace.places.push((i, phase));
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
        let all = |w: &Workspace| {
            4 * [&w.arena, &w.placed, &w.shared, &w.scratch].into_iter().map(floats).sum::<usize>()
        };
        Footprint {
            weight_bytes: self.operations.iter().map(|operation| operation.weight_bytes()).sum(),
            live_bytes_per_sample: 4 * self.live,
            workspace_bytes: workspaces.iter().map(all).sum(),
        }
    }
}

/// A pointer to at least `len` floats, those that are there or, where they are too few, new ones.
fn grown(memory: &mut Option<Aligned>, len: usize) -> Result<*mut f32, NoMemory> {
    if memory.as_ref().is_none_or(|memory| memory.as_slice().len() < len) {
        // What is there must go first, or both would be held for a moment.
        *memory = None;
    }
    let memory = match memory {
        Some(memory) => memory,
        none => none.insert(Aligned::try_zeros(len)?),
    };
    Ok(memory.as_mut_slice().as_mut_ptr())
}
