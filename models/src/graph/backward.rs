//! The order in which gradients follow from each other, the same on every machine.
//!
//! A gradient takes memory from the first operation that adds to it until the operation that made the map has used it,
//! and with it the map.

use super::{Graph, Map, Op};

/// What adds the gradients of operations for one kind of machine.
pub(crate) trait Differentiate {
    /// Whether something has added to the gradient of a map.
    fn has_gradient(&self, map: Map) -> bool;

    /// Adds the gradients of an operation's weights, and of an offset or modulation, from that of what it wrote.
    fn weight_gradients(&mut self, graph: &Graph, op: &Op);

    /// Adds those of what it read, but for the residual of sums.
    fn source_gradients(&mut self, graph: &Graph, op: &Op);

    /// What was added has the gradient of the sum.
    fn pass_on(&mut self, sum: Map, residual: Map);

    /// The map and its gradient are not needed any more.
    fn forget(&mut self, map: Map);
}

/// Adds all gradients, given that of the answer; gives the operation from which that of the noisy sample follows, where
/// it is not among them.
pub(crate) fn backward<'a>(graph: &'a Graph, machine: &mut impl Differentiate) -> Option<&'a Op> {
    let (sample, _) = graph.sample();
    let mut first = None;
    for op in graph.ops.iter().rev() {
        let Some(to) = op.to() else { continue };
        let residual = match op {
            // Nothing comes before these.
            Op::Sample { .. }
            | Op::Sinusoid { .. }
            | Op::Row { .. }
            | Op::Condition { .. }
            | Op::TextTime { .. }
            | Op::Prompt { .. }
            | Op::Embed { .. }
            | Op::Nearest { .. }
            | Op::Positions { .. }
            | Op::Crop { .. } => continue,
            Op::Linear { epilogue, .. } | Op::Convolve { epilogue, .. } => epilogue.residual,
            Op::Gate { residual, .. } => Some(*residual),
            Op::Sum { source, .. } => Some(*source),
            _ => None,
        };
        if machine.has_gradient(to) {
            machine.weight_gradients(graph, op);
            // That of the sample can wait until somebody asks for it, unless a residual is waiting, too.
            if op.reads().contains(&sample) && !residual.is_some_and(|map| graph.learns(map)) {
                first = Some(op);
                continue;
            }
            if reads_what_learns(graph, op) {
                machine.source_gradients(graph, op);
            }
            if let Some(residual) = residual {
                machine.pass_on(to, residual);
            }
        }
        machine.forget(to);
    }
    first
}

/// Whether the gradient of what an operation reads is of use; a product with what is given has only weights.
fn reads_what_learns(graph: &Graph, op: &Op) -> bool {
    match op {
        Op::Linear { sources, .. } => sources.iter().any(|&source| graph.learns(source)),
        _ => true,
    }
}
