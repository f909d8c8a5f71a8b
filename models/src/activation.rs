//! The element-wise functions that configurations name.

use serde::{Deserialize, Serialize};

use crate::kernels::Function;

/// A function between norm and convolution, by the name that diffusers' `act_fn` has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Activation {
    /// `x·σ(x)`.
    #[serde(alias = "swish")]
    Silu,
    /// `x·tanh(ln(1 + eˣ))`.
    Mish,
    /// `x·Φ(x)`, exact.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

impl From<Activation> for Function {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::Silu => Self::Silu,
            Activation::Mish => Self::Mish,
            Activation::Gelu => Self::Gelu,
            Activation::Relu => Self::Relu,
        }
    }
}
