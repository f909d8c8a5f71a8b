//! How slices of gradients go from rank to rank: through host memory, or, in a build with the feature `nccl`, from GPU to GPU. What
//! is sent where, and what is added in which order, is the same either way (`tree.rs`): the way does not change the sum, to the bit.

use bytemuck::{cast_slice, cast_slice_mut};
use candle_core::{Device, Tensor};
use understudy_models::Result;

#[cfg(feature = "nccl")]
use super::nccl::Nccl;
use super::world::World;
use crate::slices::with_f32;

/// The way of a run's gradients.
pub struct Exchange<'a>(Way<'a>);

enum Way<'a> {
    Host(&'a dyn World),
    #[cfg(feature = "nccl")]
    Nccl(Nccl),
}

impl<'a> Exchange<'a> {
    /// Through host memory, wherever the run's tensors are.
    pub fn through_host(world: &'a dyn World) -> Self {
        Self(Way::Host(world))
    }

    /// The way for ranks that train on `device`. Every rank of the world calls this: in a build with the feature `nccl` those on
    /// GPUs meet here.
    ///
    /// # Errors
    /// [`Error::Value`](understudy_models::Error::Value) where ranks share a GPU, or some have none; what NCCL says.
    #[cfg_attr(not(feature = "nccl"), expect(unused_variables))]
    pub fn open(world: &'a dyn World, device: &Device) -> Result<Self> {
        #[cfg(feature = "nccl")]
        if let Some(nccl) = Nccl::meet(world, device)? {
            return Ok(Self(Way::Nccl(nccl)));
        }
        Ok(Self::through_host(world))
    }

    /// In words that go on from "gradients go".
    pub fn way(&self) -> String {
        match &self.0 {
            Way::Host(_) => "through host memory".into(),
            #[cfg(feature = "nccl")]
            Way::Nccl(nccl) => format!("from GPU to GPU, by NCCL {}", nccl.version()),
        }
    }

    /// How many ranks there are.
    pub(super) fn size(&self) -> usize {
        match &self.0 {
            Way::Host(world) => world.size(),
            #[cfg(feature = "nccl")]
            Way::Nccl(nccl) => nccl.size(),
        }
    }

    /// Where its tensors are.
    pub(super) fn device(&self) -> &Device {
        match &self.0 {
            Way::Host(_) => &Device::Cpu,
            #[cfg(feature = "nccl")]
            Way::Nccl(nccl) => nccl.device(),
        }
    }

    /// Row `i` of `own` goes to rank `i`, and row `i` of the answer comes from there: f32 `[ranks, length]`, contiguous.
    pub(super) fn all_to_all(&self, own: &Tensor) -> candle_core::Result<Tensor> {
        match &self.0 {
            Way::Host(world) => {
                let mut all = vec![0.0_f32; own.elem_count()];
                with_f32(own, |own| world.all_to_all(cast_slice(own), cast_slice_mut(&mut all)))?;
                Tensor::from_vec(all, own.dims(), &Device::Cpu)
            }
            #[cfg(feature = "nccl")]
            Way::Nccl(nccl) => nccl.all_to_all(own),
        }
    }

    /// Every rank's `own`, f32 `[length]`, contiguous, one after the other, for every rank.
    pub(super) fn all_gather(&self, own: &Tensor) -> candle_core::Result<Tensor> {
        match &self.0 {
            Way::Host(world) => {
                let mut all = vec![0.0_f32; own.elem_count() * world.size()];
                with_f32(own, |own| world.all_gather(cast_slice(own), cast_slice_mut(&mut all)))?;
                Tensor::new(all, &Device::Cpu)
            }
            #[cfg(feature = "nccl")]
            Way::Nccl(nccl) => nccl.all_gather(own),
        }
    }

    /// Bytes that this rank has handed over for others so far, past the world.
    pub(super) fn sent_bytes(&self) -> u64 {
        match &self.0 {
            Way::Host(_) => 0,
            #[cfg(feature = "nccl")]
            Way::Nccl(nccl) => nccl.sent_bytes(),
        }
    }
}
