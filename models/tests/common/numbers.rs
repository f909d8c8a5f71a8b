//! Numbers by a formula, and how tensors are compared.
#![allow(clippy::unwrap_used)]

use candle_core::{Device, Tensor};

pub(crate) fn bits(tensor: &Tensor) -> Vec<u32> {
    let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// The worst row's largest difference, relative to that row's largest value.
pub(crate) fn relative_error(found: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(found.dims(), expected.dims());
    let rows = |t: &Tensor| t.flatten_from(1).unwrap().to_vec2::<f32>().unwrap();
    let row = |(found, expected): (Vec<f32>, Vec<f32>)| {
        let scale = expected.iter().fold(0f32, |max, v| max.max(v.abs()));
        let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        worst.fold(0f32, |max, v| if v.is_nan() { f32::INFINITY } else { max.max(v) }) / scale
    };
    rows(found).into_iter().zip(rows(expected)).map(row).fold(0f32, f32::max)
}

/// Numbers from −`scale` to `scale`, the same for the same seed.
pub(crate) fn formula(shape: &[usize], scale: f32, seed: u32) -> Tensor {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1u32 << 23) as f32 - 1.0) * scale
    };
    let values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}
