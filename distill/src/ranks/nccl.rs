//! Slices of gradients from GPU to GPU, by NVIDIA's NCCL. The world, MPI's, carries everything else, and the number by which ranks meet.
//!
//! **Never run on a GPU, nor with NCCL itself**: compiled, no more. What decides that it is used, cuts gradients into slices and adds
//! them is elsewhere (`gpus.rs`, `tree.rs`), and tested without it.
//!
//! NCCL moves numbers here and adds none: the order of its own sums is not fixed. All that it is asked for goes onto the one stream
//! of the run's device, between the kernels before and after it. A rank frees what connects it to others only after it has heard
//! from them, by the world, that their last step is done: [`train`](crate::train::train) asks all whether to stop after each.

use std::cell::Cell;

use bytemuck::{cast_slice, cast_slice_mut};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView};
use candle_core::cuda_backend::cudarc::nccl::result::{self, NcclError};
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail,
};

use super::gpus::{Uuid, between_gpus};
use super::world::World;

type Said<T> = std::result::Result<T, NcclError>;

/// This rank's end of the connections among all GPUs.
pub(super) struct Nccl {
    comm: Comm,
    version: String,
    device: Device,
    sent: Cell<u64>,
}

impl Nccl {
    /// Connects the ranks' GPUs, where they have some.
    ///
    /// # Errors
    /// Those of [`between_gpus`]; whatever CUDA or NCCL says.
    pub(super) fn meet(
        world: &dyn World,
        device: &Device,
    ) -> understudy_models::Result<Option<Self>> {
        let mut own = [0_u8; 1 + size_of::<Uuid>()];
        if let Device::Cuda(cuda) = device {
            let uuid = cuda.cuda_stream().context().uuid().w()?;
            own[0] = 1;
            own[1..].copy_from_slice(cast_slice(&uuid.bytes));
        }
        let mut all = vec![0; own.len() * world.size()];
        world.all_gather(&own, &mut all);
        let gpu = |told: &[u8]| Uuid::try_from(&told[1..]).ok().filter(|_| told[0] == 1);
        let gpus: Vec<_> = all.chunks(own.len()).map(gpu).collect();
        let Device::Cuda(cuda) = device else { return between_gpus(&gpus).map(|_| None) };
        if !between_gpus(&gpus)? {
            return Ok(None);
        }
        let mut id = Vec::new();
        if world.rank() == 0 {
            id.extend_from_slice(cast_slice(done(Id::new(), "a number to meet by")?.internal()));
        }
        world.broadcast(&mut id);
        let mut internal = [0; 128];
        cast_slice_mut(&mut internal).copy_from_slice(&id);
        let stream = cuda.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let comm = Comm::from_rank(stream, world.rank(), world.size(), Id::uninit(internal));
        let comm = done(comm, "connecting this rank's GPU to the others'")?;
        let number = done(result::get_nccl_version(), "telling its version")?;
        let version = format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100);
        Ok(Some(Self { comm, version, device: device.clone(), sent: Cell::new(0) }))
    }

    /// Of the library, such as 2.30.7.
    pub(super) fn version(&self) -> &str {
        &self.version
    }

    pub(super) fn size(&self) -> usize {
        self.comm.world_size()
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn all_to_all(&self, own: &Tensor) -> Result<Tensor> {
        let size = self.size();
        self.count(own.elem_count() / size);
        let all_to_all = |own: &CudaView<'_, f32>, all: &mut CudaSlice<f32>| {
            let slice = own.len() / size;
            // What is asked for between the two happens at once, so no rank waits for another's turn.
            result::group_start()?;
            let asked = (0..size).try_for_each(|rank| {
                let place = rank * slice..(rank + 1) * slice;
                self.comm.send(&own.slice(place.clone()), rank as i32)?;
                self.comm.recv(&mut all.slice_mut(place), rank as i32).map(drop)
            });
            let ended = result::group_end();
            asked.and(ended)
        };
        own.apply_op1_no_bwd(&Move {
            name: "all-to-all",
            shape: own.shape().clone(),
            by: all_to_all,
        })
    }

    pub(super) fn all_gather(&self, own: &Tensor) -> Result<Tensor> {
        self.count(own.elem_count());
        let all_gather =
            |own: &CudaView<'_, f32>, all: &mut CudaSlice<f32>| self.comm.all_gather(own, all);
        let shape = Shape::from(own.elem_count() * self.size());
        own.apply_op1_no_bwd(&Move { name: "all-gather", shape, by: all_gather })
    }

    /// A slice of so many numbers goes to each other rank.
    fn count(&self, slice: usize) {
        let bytes = slice * size_of::<f32>() * (self.size() - 1);
        self.sent.set(self.sent.get() + bytes as u64);
    }

    pub(super) fn sent_bytes(&self) -> u64 {
        self.sent.get()
    }
}

/// What NCCL makes of a tensor, as an operation.
struct Move<F> {
    name: &'static str,
    /// Of what comes.
    shape: Shape,
    by: F,
}

impl<F> CustomOp1 for Move<F>
where
    F: Fn(&CudaView<'_, f32>, &mut CudaSlice<f32>) -> Said<result::NcclStatus>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("NCCL's {} is from GPU to GPU, and a tensor is in host memory", self.name)
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            bail!("NCCL's {} takes a contiguous tensor, not {layout:?}", self.name)
        };
        let own = storage.as_cuda_slice::<f32>()?.slice(from..to);
        let mut all = storage.device.alloc_zeros::<f32>(self.shape.elem_count())?;
        done((self.by)(&own, &mut all), self.name)?;
        Ok((CudaStorage::wrap_cuda_slice(all, storage.device.clone()), self.shape.clone()))
    }
}

/// NCCL's error in words.
fn done<T>(said: Said<T>, what: &str) -> Result<T> {
    said.map_err(|NcclError(code)| {
        candle_core::Error::msg(format!(
            "NCCL: {what} failed: {code:?}; with NCCL_DEBUG=WARN in the environment NCCL says why; a build with --features cuda,mpi \
             does without it, through host memory"
        ))
    })
}
