//! From a graph to what a machine does: operation by operation, each map for as long as something reads it.

use super::{Graph, Map, Op};
use crate::Result;
use crate::weights::Weights;

/// What compiles operations for one kind of machine.
pub(crate) trait Backend {
    /// Adds what `op` does.
    ///
    /// # Errors
    /// Those of weights that cannot be read, and of the device.
    fn add(&mut self, graph: &Graph, op: &Op, weights: &Weights) -> Result<()>;

    /// One operation fewer will read the map.
    fn release(&mut self, map: Map);
}

/// Compiles all operations of a graph.
///
/// # Errors
/// As [`Backend::add`].
pub(crate) fn lower(graph: &Graph, weights: &Weights, backend: &mut impl Backend) -> Result<()> {
    for op in &graph.ops {
        backend.add(graph, op, weights)?;
        for map in op.reads() {
            backend.release(map);
        }
    }
    Ok(())
}
