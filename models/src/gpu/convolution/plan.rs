//! How cuDNN does a part of a convolution: one of the plans that its heuristics propose, chosen once for each shape and
//! thread.
//!
//! Refused are those that add in an order that differs from one time to the next, sum in less than f32, or round f32
//! before they multiply. Of the others it is the first, the same in every process, or the fastest here.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use candle_core::cuda_backend::cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind,
    cudnnBackendHeurMode_t as Mode, cudnnBackendNumericalNote_t as Noted,
};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, sys};
use candle_core::cuda_backend::{DeviceId, WrapErr};
use candle_core::{CudaDevice, DType, Error, Result, bail};

use super::graph::{NAMES, graph};
use super::{Part, Problem};
use crate::DeviceFault;
use crate::gpu::cudnn::{Address, Descriptor, Handle, Note};

/// Bytes at most that a plan may need besides its operands: as many as they have, where it turns large batches of f32
/// into rows, as all do there but the slowest.
const MOST_BYTES: usize = 1 << 30;

/// Plans that are timed. The first dozen are often one engine's, with other tiles.
const MOST_TIMED: usize = 16;

/// How often each is timed.
const TIMES: usize = 5;

/// Addresses that are multiples of this are as good as any: kernels read so many bytes at once.
const ALIGNED: u64 = 16;

/// What an engine may not do with numbers; the first only for f32.
const REFUSED: [Noted; 4] = [
    Noted::CUDNN_NUMERICAL_NOTE_TENSOR_CORE,
    Noted::CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS,
    Noted::CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION,
    Noted::CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC,
];

/// More notes than there are of an engine.
const MOST_NOTES: usize = 64;

/// What the convolutions of an evaluation share.
pub(in crate::gpu) struct Scratch {
    /// Whether plans are timed, and the fastest kept; otherwise it is the same everywhere.
    search: bool,
    /// What plans need besides their operands, one after another.
    memory: Option<CudaSlice<u8>>,
}

impl Scratch {
    pub(in crate::gpu) fn new(search: bool) -> Self {
        Self { search, memory: None }
    }

    /// The address of so many bytes, which may hold anything, for what the stream does next.
    fn bytes(&mut self, device: &CudaDevice, bytes: usize) -> Result<u64> {
        if bytes == 0 {
            return Ok(0);
        }
        let slice = match self.memory.take().filter(|slice| slice.len() >= bytes) {
            Some(slice) => slice,
            // SAFETY: plans write what they read there.
            None => unsafe { device.alloc(bytes)? },
        };
        let slice = self.memory.insert(slice);
        Ok(slice.device_ptr(&device.cuda_stream()).0)
    }
}

/// The plan for a part of a problem, or why there is none. `operands` are the addresses of x, the weights and y, 0 for one
/// that will be aligned; where plans are searched they are timed on them, but not while a graph is captured.
///
/// # Safety
/// If `scratch` searches, [`Plan::run`]'s.
///
/// # Errors
/// Whatever the device says.
pub(super) unsafe fn planned(
    device: &CudaDevice,
    problem: Problem,
    part: Part,
    operands: [u64; 3],
    scratch: &mut Scratch,
) -> Result<Choice> {
    thread_local! {
        static HANDLES: RefCell<HashMap<DeviceId, Rc<Handle>>> = RefCell::default();
        static CHOICES: RefCell<HashMap<Key, Choice>> = RefCell::default();
    }
    let [x, weight, y] = operands;
    let alignment = 1 << (x | weight | y | ALIGNED).trailing_zeros();
    let known = |key: &Key| CHOICES.with_borrow(|choices| choices.get(key).cloned());
    let mut key = Key { device: device.id(), problem, part, alignment, searched: scratch.search };
    if let Some(choice) = known(&key) {
        return Ok(choice);
    }
    let idle = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    if key.searched && device.cuda_stream().capture_status().w()? != idle {
        key.searched = false;
        if let Some(choice) = known(&key) {
            return Ok(choice);
        }
    }
    let handle = match HANDLES.with_borrow(|handles| handles.get(&device.id()).cloned()) {
        Some(handle) => handle,
        None => {
            let handle = Rc::new(Handle::new(device)?);
            HANDLES.with_borrow_mut(|handles| handles.insert(device.id(), Rc::clone(&handle)));
            handle
        }
    };
    let most = if key.searched { MOST_TIMED } else { 1 };
    let choice = match plans(&handle, problem, part, alignment, most) {
        Ok(mut plans) => {
            let times = match key.searched {
                // SAFETY: the caller's promise.
                true => unsafe { fastest_first(&mut plans, device, operands, scratch) },
                false => Vec::new(),
            };
            let plan = plans.swap_remove(0);
            let Plan { engine, bytes, .. } = plan;
            tracing::debug!(
                ?problem,
                ?part,
                alignment,
                engine,
                bytes,
                ?times,
                "a convolution's plan"
            );
            Ok(Rc::new(plan))
        }
        Err(reason) => Err(DeviceFault::of(&reason)),
    };
    CHOICES.with_borrow_mut(|choices| choices.insert(key, choice.clone()));
    Ok(choice)
}

/// What there is for a part of a problem, or what was last said against what there might have been.
pub(super) type Choice = std::result::Result<Rc<Plan>, DeviceFault>;

/// What is chosen once. cuDNN's handles, and what is made with them, belong to one thread.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    device: DeviceId,
    problem: Problem,
    part: Part,
    alignment: i64,
    searched: bool,
}

/// A way to do a part of a convolution.
pub(super) struct Plan {
    plan: Rc<Descriptor>,
    handle: Rc<Handle>,
    /// cuDNN's number of it.
    engine: i64,
    /// What it needs besides its operands.
    bytes: usize,
}

impl Plan {
    /// # Errors
    /// Why there is none of that configuration, or why it is not for us.
    fn new(handle: &Rc<Handle>, config: &Rc<Descriptor>, dtype: DType) -> Result<Self> {
        let engines = config
            .others(Name::CUDNN_ATTR_ENGINECFG_ENGINE, Kind::CUDNN_BACKEND_ENGINE_DESCRIPTOR)?;
        let [engine] = &engines[..] else { bail!("a configuration of {} engines", engines.len()) };
        let notes: Vec<Note> = engine.values(Name::CUDNN_ATTR_ENGINE_NUMERICAL_NOTE, MOST_NOTES)?;
        let engine = engine.number(Name::CUDNN_ATTR_ENGINE_GLOBAL_INDEX)?;
        // Tensor cores round f32 to TF32.
        let refused = if dtype == DType::F32 { &REFUSED[..] } else { &REFUSED[1..] };
        if let Some(note) = refused.iter().find(|&&note| notes.iter().any(|has| has.is(note))) {
            bail!("engine {engine}: {note:?}")
        }
        let plan = Descriptor::new(Kind::CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_EXECUTION_PLAN_HANDLE, &[handle.raw()])?
            .of(Name::CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config)?
            .finish()?;
        let bytes = plan.number(Name::CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE)?;
        match usize::try_from(bytes) {
            Ok(bytes) if bytes <= MOST_BYTES => {
                Ok(Self { plan, handle: Rc::clone(handle), engine, bytes })
            }
            _ => bail!("engine {engine} needs {bytes} bytes"),
        }
    }

    /// Does it. `operands` are the addresses of x, the weights and y.
    ///
    /// # Safety
    /// They are memory on the device, of the problem's shapes and type, that nothing else writes until the stream has
    /// done it, nor reads where the answer is.
    ///
    /// # Errors
    /// Whatever cuDNN and the device say.
    pub(super) unsafe fn run(
        &self,
        device: &CudaDevice,
        operands: [u64; 3],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let pack = self.pack(device, operands, scratch)?;
        // SAFETY: the caller's promise; the stream does one thing after another with the scratch memory.
        unsafe { self.handle.execute(&self.plan, &pack) }
    }

    /// What it is done with.
    fn pack(
        &self,
        device: &CudaDevice,
        operands: [u64; 3],
        scratch: &mut Scratch,
    ) -> Result<Rc<Descriptor>> {
        let memory = scratch.bytes(device, self.bytes)?;
        Descriptor::new(Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &NAMES)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, &operands.map(Address))?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, &[Address(memory)])?
            .finish()
    }

    /// Milliseconds that it takes: the median of a few times, after a first.
    ///
    /// # Safety
    /// [`Plan::run`]'s.
    unsafe fn time(
        &self,
        device: &CudaDevice,
        operands: [u64; 3],
        scratch: &mut Scratch,
    ) -> Result<f32> {
        let pack = self.pack(device, operands, scratch)?;
        // SAFETY: the caller's promise.
        let execute = || unsafe { self.handle.execute(&self.plan, &pack) };
        execute()?;
        // Little is asked for between two events: a small convolution takes the device less time than the host.
        let stream = device.cuda_stream();
        let event = || {
            let timed = sys::CUevent_flags::CU_EVENT_DEFAULT;
            stream.context().new_event(Some(timed)).w()
        };
        let events: Vec<_> = (0..TIMES).map(|_| Ok((event()?, event()?))).collect::<Result<_>>()?;
        for (start, end) in &events {
            start.record(&stream).w()?;
            execute()?;
            end.record(&stream).w()?;
        }
        let times = events.iter().map(|(start, end)| start.elapsed_ms(end).w());
        let mut times = times.collect::<Result<Vec<f32>>>()?;
        times.sort_by(f32::total_cmp);
        Ok(times[TIMES / 2])
    }
}

/// Puts the fastest of them first; gives what each takes, in ms, in the order that they had.
///
/// # Safety
/// [`Plan::run`]'s.
unsafe fn fastest_first(
    plans: &mut [Plan],
    device: &CudaDevice,
    operands: [u64; 3],
    scratch: &mut Scratch,
) -> Vec<f32> {
    let times = plans.iter().map(|plan| {
        // SAFETY: the caller's promise.
        let time = unsafe { plan.time(device, operands, scratch) };
        time.unwrap_or_else(|reason| {
            tracing::debug!(engine = plan.engine, %reason, "a plan that fails");
            f32::INFINITY
        })
    });
    let times: Vec<f32> = times.collect();
    if let Some(fastest) = (0..times.len()).min_by(|&a, &b| times[a].total_cmp(&times[b])) {
        plans.swap(0, fastest);
    }
    times
}

/// The first plans that cuDNN's heuristics propose and are for us: one at least, and so many at most.
///
/// # Errors
/// What was last said against one, if there is none.
fn plans(
    handle: &Rc<Handle>,
    problem: Problem,
    part: Part,
    alignment: i64,
    most: usize,
) -> Result<Vec<Plan>> {
    let graph = graph(handle, problem, part, alignment)?;
    let mut plans = Vec::new();
    let mut said = Error::msg("cuDNN proposes nothing");
    // The second is what there is nearly everywhere: for f32 often all that does without tensor cores.
    for mode in [Mode::CUDNN_HEUR_MODE_A, Mode::CUDNN_HEUR_MODE_FALLBACK] {
        let configs = proposed(&graph, mode).unwrap_or_else(|reason| {
            said = reason;
            Vec::new()
        });
        for config in configs {
            if plans.len() == most {
                return Ok(plans);
            }
            match Plan::new(handle, &config, problem.dtype) {
                Ok(plan) => plans.push(plan),
                Err(reason) => said = reason,
            }
        }
    }
    if plans.is_empty() { Err(said) } else { Ok(plans) }
}

/// Configurations of engines for a graph, the best first as far as cuDNN knows.
fn proposed(graph: &Rc<Descriptor>, mode: Mode) -> Result<Vec<Rc<Descriptor>>> {
    let asked = Descriptor::new(Kind::CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR)?
        .of(Name::CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph)?
        .with(Name::CUDNN_ATTR_ENGINEHEUR_MODE, &[mode])?
        .finish()?;
    let kind = Kind::CUDNN_BACKEND_ENGINECFG_DESCRIPTOR;
    asked.others(Name::CUDNN_ATTR_ENGINEHEUR_RESULTS, kind)
}
