//! What networks of both families are made of: products of vectors, softmax, sines of the time.
//!
//! Two promises hold for every layer. On the CPU a sample's result does not depend on its
//! neighbours: every product has a shape that is free of the batch size, because the product's
//! algorithm, and with it the order of its sums, follows from its shape. And every layer is
//! differentiable: where a fast operation has no gradient, or a wrong one, it is only used on tensors
//! that track none.

use candle_core::{D, DType, Device, Result, Tensor};

use crate::weights::Weights;

/// A linear layer over vectors.
pub(crate) struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    /// From `input` to `output` values.
    pub(crate) fn new(weights: &Weights, input: usize, output: usize) -> crate::Result<Self> {
        let weight = weights.get("weight", &[output, input])?;
        Ok(Self { weight, bias: weights.get("bias", &[output])? })
    }

    /// Bytes of weight and bias.
    pub(crate) fn weight_bytes(&self) -> usize {
        let count = self.weight.elem_count() + self.bias.elem_count();
        count * self.weight.dtype().size_in_bytes()
    }

    /// `[B, input]` → `[B, output]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = if x.device().is_cpu() {
            let (output, input) = self.weight.dims2()?;
            let weight = self.weight.broadcast_as((x.dim(0)?, output, input))?;
            weight.matmul(&x.unsqueeze(2)?)?.squeeze(2)?
        } else {
            x.matmul(&self.weight.t()?)?
        };
        y.broadcast_add(&self.bias)
    }
}

/// Two linear layers with SiLU between them.
pub(crate) struct Mlp {
    linear_1: Linear,
    linear_2: Linear,
}

impl Mlp {
    /// From `input` to `width` values, with as many between.
    pub(crate) fn new(weights: &Weights, input: usize, width: usize) -> crate::Result<Self> {
        Ok(Self {
            linear_1: Linear::new(&weights.at("linear_1"), input, width)?,
            linear_2: Linear::new(&weights.at("linear_2"), width, width)?,
        })
    }

    /// Bytes of its weights.
    pub(crate) fn weight_bytes(&self) -> usize {
        self.linear_1.weight_bytes() + self.linear_2.weight_bytes()
    }

    /// `[B, input]` → `[B, width]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear_2.forward(&self.linear_1.forward(x)?.silu()?)
    }
}

/// The type that sums over many values are worked out in.
pub(crate) fn working(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Softmax over the last dimension, in f32 or f64.
pub(crate) fn softmax(x: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = x.to_dtype(working(dtype))?;
    let y = if x.track_op() {
        candle_nn::ops::softmax(&x, D::Minus1)?
    } else {
        candle_nn::ops::softmax_last_dim(&x)?
    };
    y.to_dtype(dtype)
}

/// `ω_i = 10000^(−i / (half − shift))`, f32 `[1, half]` (Vaswani et al. 2017, §3.5).
///
/// Worked out in f32 step by step as torch does, so that `t·ω` agrees to the last bits at large `t`.
pub(crate) fn frequencies(half: usize, shift: f64, device: &Device) -> Result<Tensor> {
    let logarithm = -(10_000f64.ln()) as f32;
    let span = (half as f64 - shift) as f32;
    let frequencies: Vec<f32> =
        (0..half).map(|i| libm::expf(logarithm * i as f32 / span)).collect();
    Tensor::from_vec(frequencies, (1, half), device)
}
