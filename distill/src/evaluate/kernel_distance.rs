//! The kernel distance (KID; Bińkowski et al. 2018): the unbiased squared maximum mean discrepancy under
//! the kernel `(x·y/D + 1)³`.

use candle_core::{D, Result, Tensor};
use understudy_models::noise;

use super::inception_score::mean_and_deviation;

/// The distance over `subsets` subsets of `size` images, each drawn without replacement from both sets
/// by `seed`: mean and standard deviation.
///
/// `a` and `b` are f64 `[N, D]`; both must have at least `size` rows, and `size` be at least 2.
///
/// # Errors
/// Whatever the device says.
pub fn kernel_distance(
    a: &Tensor,
    b: &Tensor,
    subsets: usize,
    size: usize,
    seed: u64,
) -> Result<(f64, f64)> {
    let distances: Vec<f64> = (0..subsets as u64)
        .map(|subset| {
            let draw = |from: &Tensor, set: u64| -> Result<Tensor> {
                let rows = subset_of(from.dim(0)?, size, seed, 2 * subset + set);
                from.index_select(&Tensor::new(rows, from.device())?, 0)
            };
            discrepancy(&draw(a, 0)?, &draw(b, 1)?)
        })
        .collect::<Result<_>>()?;
    Ok(mean_and_deviation(&distances))
}

/// The unbiased estimate for two sets of the same size, f64 `[N, D]`.
fn discrepancy(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (rows, width) = a.dims2()?;
    let kernel = |x: &Tensor, y: &Tensor| -> Result<Tensor> {
        let dot = x.matmul(&y.t()?.contiguous()?)?;
        let root = dot.affine(1.0 / width as f64, 1.0)?;
        (root.sqr()? * root)?.contiguous()
    };
    let sum = |kernel: Tensor| kernel.sum_all()?.to_scalar::<f64>();
    // k(x, x), which an unbiased estimate leaves out.
    let diagonal = |x: &Tensor| -> Result<f64> {
        let root = x.sqr()?.sum(D::Minus1)?.affine(1.0 / width as f64, 1.0)?;
        sum((root.sqr()? * root)?)
    };
    let within = sum(kernel(a, a)?)? - diagonal(a)? + sum(kernel(b, b)?)? - diagonal(b)?;
    let between = sum(kernel(a, b)?)?;
    let rows = rows as f64;
    Ok(within / (rows * (rows - 1.0)) - 2.0 * between / (rows * rows))
}

/// `size` of the numbers below `total`, without replacement: the beginning of a Fisher–Yates shuffle.
fn subset_of(total: usize, size: usize, seed: u64, stream: u64) -> Vec<u32> {
    let mut numbers: Vec<u32> = (0..total as u32).collect();
    for place in 0..size.min(total) {
        let draw = noise::uniform_u64(seed, 1 + stream * total as u64 + place as u64);
        let room = (total - place) as u128;
        numbers.swap(place, place + ((u128::from(draw) * room) >> 64) as usize);
    }
    numbers.truncate(size);
    numbers
}
