//! ElementType that do not come from the samples: an operation's own, or those of a network that is trained,
//! which change from one run to the next.

use std::sync::Arc;

use super::arena::{Aligned, Buffer};
use super::program::Memory;

/// Packed numbers.
pub(crate) enum Constants {
    /// Packed when the program was made, or one of the same network over maps of another size.
    Own(Arc<Aligned>),
    /// Packed by an earlier operation of the same run into the memory for weights.
    Placed(Buffer),
}

impl Constants {
    /// Where they begin.
    #[inline(always)]
    pub(super) fn at(&self, memory: &Memory) -> *const f32 {
        match self {
            Self::Own(numbers) => numbers.as_slice().as_ptr(),
            Self::Placed(buffer) => memory.placed(*buffer),
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Own(numbers) => numbers.as_slice().len(),
            Self::Placed(buffer) => buffer.len,
        }
    }

    /// How many there are that the operation keeps itself.
    pub(super) fn own_len(&self) -> usize {
        match self {
            Self::Own(numbers) => numbers.as_slice().len(),
            Self::Placed(_) => 0,
        }
    }

    /// What of the memory for weights they are.
    pub(super) fn placed(&self) -> Option<Buffer> {
        match self {
            Self::Own(_) => None,
            Self::Placed(buffer) => Some(*buffer),
        }
    }
}

/// ElementType in the order of the checkpoint.
pub(crate) enum Values {
    /// The operation's own, or those of the same in another program.
    Own(Arc<Aligned>),
    /// A parameter of a network that is trained, by its number.
    Parameter(usize),
}

impl Values {
    /// The numbers.
    #[inline]
    pub(super) fn get<'a>(&'a self, memory: &'a Memory) -> &'a [f32] {
        match self {
            Self::Own(values) => values.as_slice(),
            Self::Parameter(number) => memory.parameters[*number],
        }
    }
}
