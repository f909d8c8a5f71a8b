//! A weight on its way into a network.

use candle_core::Tensor;

use crate::Result;

/// A tensor, or how to have it.
pub(crate) enum Weight {
    /// Here it is.
    Here(Tensor),
    /// It is read when its layer is built.
    Later {
        /// Its shape.
        shape: Vec<usize>,
        /// Reads it.
        read: Box<dyn FnOnce() -> Result<Tensor>>,
    },
}

impl Weight {
    /// The shape.
    pub(crate) fn dims(&self) -> &[usize] {
        match self {
            Self::Here(tensor) => tensor.dims(),
            Self::Later { shape, .. } => shape,
        }
    }

    /// Whether its gradient is tracked.
    pub(crate) fn trained(&self) -> bool {
        matches!(self, Self::Here(tensor) if tensor.track_op())
    }

    /// The tensor.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub(crate) fn take(self) -> Result<Tensor> {
        match self {
            Self::Here(tensor) => Ok(tensor),
            Self::Later { read, .. } => read(),
        }
    }
}
