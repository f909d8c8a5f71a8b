//! Batch norm and ReLU in one operation, with its gradient: candle composes them of a dozen passes.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::super::layers::contiguous;

pub(super) const EPS: f32 = 1e-5;
/// Rows whose sums are taken by one thread; fixed, so that sums do not depend on the threads.
const ROWS: usize = 512;

/// `max(0, γ·(x − mean)/√(var + ε) + β)` over x `[N, C]`, γ and β `[C]`, with the batch's own mean and
/// (biased) variance per channel (Ioffe and Szegedy 2015).
pub(super) fn norm_relu(x: &Tensor, gamma: &Tensor, beta: &Tensor) -> Result<Tensor> {
    x.apply_op3(gamma, beta, NormRelu)
}

/// Mean and biased variance per channel of `[N, C]`.
pub(super) fn statistics(x: &[f32], channels: usize) -> (Vec<f32>, Vec<f32>) {
    let rows = (x.len() / channels) as f64;
    let sums = sum_rows(x.len() / channels, channels, |row, sums| {
        let values = &x[row * channels..][..channels];
        sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum += value);
    });
    let mean: Vec<f32> = sums.iter().map(|sum| (sum / rows) as f32).collect();
    let squares = sum_rows(x.len() / channels, channels, |row, sums| {
        let values = &x[row * channels..][..channels];
        for ((sum, &value), mean) in sums.iter_mut().zip(values).zip(&mean) {
            *sum += (value - mean) * (value - mean);
        }
    });
    (mean, squares.iter().map(|sum| (sum / rows) as f32).collect())
}

/// Sums over rows of what `add` adds for each, in a fixed order.
fn sum_rows(rows: usize, width: usize, add: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f64> {
    let parts: Vec<Vec<f32>> = (0..rows.div_ceil(ROWS))
        .into_par_iter()
        .map(|part| {
            let mut sums = vec![0.0; width];
            (part * ROWS..rows.min((part + 1) * ROWS)).for_each(|row| add(row, &mut sums));
            sums
        })
        .collect();
    let mut total = vec![0.0; width];
    for part in parts {
        total.iter_mut().zip(part).for_each(|(total, part)| *total += f64::from(part));
    }
    total
}

struct NormRelu;

impl CustomOp3 for NormRelu {
    fn name(&self) -> &'static str {
        "norm-relu"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        gamma: &CpuStorage,
        gamma_layout: &Layout,
        beta: &CpuStorage,
        beta_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, channels) = layout.shape().dims2()?;
        let x = contiguous(x, layout)?;
        let (gamma, beta) = (contiguous(gamma, gamma_layout)?, contiguous(beta, beta_layout)?);
        let (mean, variance) = statistics(x, channels);
        let scale: Vec<f32> =
            gamma.iter().zip(&variance).map(|(gamma, var)| gamma / (var + EPS).sqrt()).collect();
        let mut y = vec![0.0; x.len()];
        y.par_chunks_mut(ROWS * channels).zip(x.par_chunks(ROWS * channels)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(channels)) {
                for c in 0..channels {
                    y[c] = ((x[c] - mean[c]) * scale[c] + beta[c]).max(0.0);
                }
            }
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gamma: &Tensor,
        _: &Tensor,
        y: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (rows, channels) = x.dims2()?;
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        let (xs, ys, mut dy, gammas) = (values(x)?, values(y)?, values(gradient)?, values(gamma)?);
        let (mean, variance) = statistics(&xs, channels);
        let inverse: Vec<f32> = variance.iter().map(|var| 1.0 / (var + EPS).sqrt()).collect();
        dy.par_iter_mut().zip(&ys).for_each(|(dy, &y)| *dy = if y > 0.0 { *dy } else { 0.0 });
        let d_beta = sum_rows(rows, channels, |row, sums| {
            let dy = &dy[row * channels..][..channels];
            sums.iter_mut().zip(dy).for_each(|(sum, dy)| *sum += dy);
        });
        let d_gamma = sum_rows(rows, channels, |row, sums| {
            let at = row * channels;
            for c in 0..channels {
                sums[c] += dy[at + c] * (xs[at + c] - mean[c]) * inverse[c];
            }
        });
        let d_beta: Vec<f32> = d_beta.into_iter().map(|sum| sum as f32).collect();
        let d_gamma: Vec<f32> = d_gamma.into_iter().map(|sum| sum as f32).collect();
        let count = rows as f32;
        dy.par_chunks_mut(channels).zip(xs.par_chunks(channels)).with_min_len(ROWS).for_each(
            |(dy, x)| {
                for c in 0..channels {
                    let normal = (x[c] - mean[c]) * inverse[c];
                    let centred = dy[c] - (d_beta[c] + normal * d_gamma[c]) / count;
                    dy[c] = gammas[c] * inverse[c] * centred;
                }
            },
        );
        let device = x.device();
        Ok((
            Some(Tensor::from_vec(dy, (rows, channels), device)?),
            Some(Tensor::from_vec(d_gamma, channels, device)?),
            Some(Tensor::from_vec(d_beta, channels, device)?),
        ))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor, Var};

    use super::*;

    /// The same of candle's own operations.
    fn composed(x: &Tensor, gamma: &Tensor, beta: &Tensor) -> Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(0)?)?;
        let scale = (centred.sqr()?.mean_keepdim(0)? + f64::from(EPS))?.sqrt()?;
        centred.broadcast_div(&scale)?.broadcast_mul(gamma)?.broadcast_add(beta)?.relu()
    }

    #[test]
    fn result_and_gradients_are_those_of_the_composed_operations() -> Result<()> {
        let mut numbers = vec![0.0; 1500 * 3 + 6];
        understudy_models::noise::normal(5, 0, &mut numbers);
        let var = |from: usize, shape: &[usize]| {
            let count: usize = shape.iter().product();
            Var::from_tensor(
                &Tensor::new(&numbers[from..from + count], &Device::Cpu)?.reshape(shape)?,
            )
        };
        let (x, gamma, beta) = (var(0, &[1500, 3])?, var(4500, &[3])?, var(4503, &[3])?);
        let weights = x.sin()?.detach();
        let loss = |y: Tensor| (y * &weights)?.sum_all()?.backward();
        let ours = loss(norm_relu(&x, &gamma, &beta)?)?;
        let theirs = loss(composed(&x, &gamma, &beta)?)?;
        for var in [&x, &gamma, &beta] {
            let gradient = |store: &candle_core::backprop::GradStore| store.get(var).cloned();
            let (ours, theirs) = (gradient(&ours), gradient(&theirs));
            let (ours, theirs) = (ours.expect("a gradient"), theirs.expect("a gradient"));
            let apart = (ours - &theirs)?.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?;
            let size = theirs.abs()?.flatten_all()?.max(0)?.to_dtype(DType::F64)?;
            let (apart, size) = (apart.to_scalar::<f64>()?, size.to_scalar::<f64>()?);
            assert!(apart < 1e-4 * size, "{apart} of {size}");
        }
        Ok(())
    }
}
