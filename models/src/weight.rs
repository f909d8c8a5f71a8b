//! A weight on its way into a network.

use std::collections::HashMap;

use candle_core::{DType, Tensor};

use crate::Result;

/// A tensor, or how to have it.
pub(crate) enum Weight {
    /// Here it is.
    Here(Tensor),
    /// It is read when its layer is built.
    Later {
        /// Its shape.
        shape: Vec<usize>,
        /// Its element type.
        dtype: DType,
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

    /// The element type.
    pub(crate) fn dtype(&self) -> DType {
        match self {
            Self::Here(tensor) => tensor.dtype(),
            Self::Later { dtype, .. } => *dtype,
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

/// Tensors as weights.
pub(crate) fn here(tensors: HashMap<String, Tensor>) -> HashMap<String, Weight> {
    tensors.into_iter().map(|(name, tensor)| (name, Weight::Here(tensor))).collect()
}
