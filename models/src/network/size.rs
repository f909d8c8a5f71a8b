//! What a network takes of memory, refused by the field that asks for it before it is taken.

use candle_core::Device;

use super::NetworkConfig;
use crate::demand::Demand;
use crate::graph::Graph;
use crate::{Denoiser, Result};

impl NetworkConfig {
    /// The fields of its `config.json` that decide how much its weights, and how much its maps take.
    pub(crate) fn size_fields(&self) -> [&'static str; 2] {
        self.architecture().size_fields()
    }

    /// Those fields with their values.
    fn demand(&self) -> Demand {
        Demand::of(&self.to_json(), self.size_fields())
    }

    /// Refuses weights of so many bytes each, 0 where they are there already, or a single map, that there is no memory for:
    /// what is known without building the network.
    ///
    /// # Errors
    /// [`crate::Error::Value`] naming the field.
    pub(super) fn check_memory(&self, graph: &Graph, device: &Device, weight: usize) -> Result<()> {
        self.demand().check(graph, device, weight)
    }

    /// What `build` makes, unless one sample would find no memory in it, or it found none itself.
    ///
    /// # Errors
    /// [`crate::Error::Value`] naming the field; what `build` says.
    pub(super) fn built(
        &self,
        build: impl FnOnce() -> Result<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        self.demand().built(build, |network| network.footprint())
    }
}
