//! What a network takes of memory, refused by the field that asks for it before it is taken.

use candle_core::Device;

use super::NetworkConfig;
use crate::graph::{Graph, WeightSpec};
use crate::{Denoiser, Error, Result, kernels::NoMemory, memory};

const SMALLER: &str = "use a smaller image, a larger machine, or free some memory";
const NARROWER: &str = "use a narrower network, a larger machine, or free some memory";

impl NetworkConfig {
    /// The fields of its `config.json` that decide how much its weights, and how much its maps take.
    pub(crate) fn size_fields(&self) -> [&'static str; 2] {
        self.architecture().size_fields()
    }

    /// Refuses weights, or a single map, that there is no memory for: what is known without building the network.
    ///
    /// # Errors
    /// [`Error::Value`] naming the field.
    pub(super) fn check_weights(&self, graph: &Graph, device: &Device) -> Result<()> {
        let count = |spec: &WeightSpec| spec.shape.iter().map(|&side| side as u64).product::<u64>();
        let count: u64 = graph.weights.iter().map(count).sum();
        // At least this much, in whatever form they are kept.
        let bytes = count.saturating_mul(if device.is_cpu() { 4 } else { 2 });
        let [wide, large] = self.size_fields();
        memory::check(wide, self.field(wide), [bytes, bytes], NARROWER)?;
        if !device.is_cpu() {
            // A device counts its own memory, and says where it ends.
            return Ok(());
        }
        let map = graph.largest_map();
        let bytes = map.saturating_mul(4);
        memory::check(large, self.field(large), [bytes, bytes], SMALLER)
    }

    /// What `build` makes, unless one sample would find no memory in it, or it found none itself.
    ///
    /// # Errors
    /// [`Error::Value`] naming the field; what `build` says.
    pub(super) fn built(
        &self,
        build: impl FnOnce() -> Result<Box<dyn Denoiser>>,
    ) -> Result<Box<dyn Denoiser>> {
        let [wide, large] = self.size_fields();
        let network = NoMemory::caught(build).unwrap_or_else(|NoMemory { bytes }| {
            let remedy = format!("no memory for {bytes} bytes more of its weights; {NARROWER}");
            Err(Error::value(wide, self.field(wide), remedy))
        })?;
        if let Some(footprint) = network.footprint() {
            let live = footprint.live_bytes_per_sample as u64;
            let total = live.saturating_add(footprint.weight_bytes as u64);
            memory::check(large, self.field(large), [total, live], SMALLER)?;
        }
        Ok(network)
    }

    fn field(&self, name: &str) -> String {
        self.to_json()[name].to_string()
    }
}
