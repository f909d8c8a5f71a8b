//! What a network takes of memory, refused by the field that asks for it before it is taken.

use candle_core::Device;
use serde_json::Value;

use crate::graph::{Graph, WeightSpec};
use crate::kernels::{Footprint, NoMemory};
use crate::{Error, Result, memory};

const SMALLER: &str = "use a smaller image, a larger machine, or free some memory";
const NARROWER: &str = "use a narrower network, a larger machine, or free some memory";

/// The fields that decide how much a network's weights, and how much its maps take, with their values.
pub(crate) struct Demand([(&'static str, String); 2]);

impl Demand {
    /// Of two fields of a configuration.
    pub(crate) fn of(config: &Value, fields: [&'static str; 2]) -> Self {
        Self(fields.map(|field| (field, config[field].to_string())))
    }

    /// Refuses weights of so many bytes each, 0 where they are there already, or a single map, that there is no memory for:
    /// what is known without building the network.
    ///
    /// # Errors
    /// [`Error::Value`] naming the field.
    pub(crate) fn check(&self, graph: &Graph, device: &Device, weight: usize) -> Result<()> {
        let count = |spec: &WeightSpec| spec.shape.iter().map(|&side| side as u64).product::<u64>();
        let count: u64 = graph.weights.iter().map(count).sum();
        // At least this much, however they are packed.
        let bytes = count.saturating_mul(weight as u64);
        let Self([(wide, width), (large, size)]) = self;
        memory::check(*wide, width, [bytes, bytes], NARROWER)?;
        if !device.is_cpu() {
            // A device counts its own memory, and says where it ends.
            return Ok(());
        }
        let bytes = graph.largest_map().saturating_mul(4);
        memory::check(*large, size, [bytes, bytes], SMALLER)
    }

    /// What `build` makes, unless one sample would find no memory in it, or it found none itself.
    ///
    /// # Errors
    /// [`Error::Value`] naming the field; what `build` says.
    pub(crate) fn built<T>(
        &self,
        build: impl FnOnce() -> Result<T>,
        footprint: impl Fn(&T) -> Option<Footprint>,
    ) -> Result<T> {
        let Self([(wide, width), (large, size)]) = self;
        let network = NoMemory::caught(build).unwrap_or_else(|NoMemory { bytes }| {
            let remedy = format!("no memory for {bytes} bytes more of its weights; {NARROWER}");
            Err(Error::value(*wide, width, remedy))
        })?;
        if let Some(footprint) = footprint(&network) {
            let live = footprint.live_bytes_per_sample as u64;
            let total = live.saturating_add(footprint.weight_bytes as u64);
            memory::check(*large, size, [total, live], SMALLER)?;
        }
        Ok(network)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn weights_ask_for_what_their_type_takes_and_once() {
        let Some(there) = memory::available() else { return };
        // In bf16 they take seven tenths of what is free, in f32 more than all, whatever other tests take meanwhile.
        let shape = vec![usize::try_from(there / 100).unwrap(), 35];
        let weights = vec![WeightSpec { name: "weight".into(), shape, readers: 1 }];
        let graph = Graph { ops: Vec::new(), maps: Vec::new(), weights, patch: 1 };
        let demand = Demand::of(&json!({"channels": 35, "side": 8}), ["channels", "side"]);
        let check = |weight| demand.check(&graph, &Device::Cpu, weight);
        let problem = check(4).unwrap_err().to_string();
        assert!(
            problem.contains("channels") && problem.contains("of memory are free"),
            "{problem}"
        );
        check(2).unwrap();
        // Those that another size of the network has already.
        check(0).unwrap();
    }
}
