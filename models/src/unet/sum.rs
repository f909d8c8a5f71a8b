//! The sum that ends a block: what it made, its last bias, and the way around.
//!
//! On a GPU one kernel of our own (`kernels.cu`) where no gradient is asked for, elsewhere candle's operations.

#[cfg(feature = "cuda")]
mod launch;

use candle_core::{CpuStorage, CudaStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};

/// `a + b + bias`, of `[B, C, …]`, the same, and `[C]`.
///
/// # Errors
/// Shapes that do not fit, and whatever the device says.
pub(super) fn biased_sum(a: &Tensor, b: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let tracked = [a, b, bias].into_iter().any(Tensor::track_op);
    let kernel = matches!(a.dtype(), DType::F32 | DType::BF16 | DType::F16);
    if a.device().is_cuda() && kernel && !tracked {
        fused(a, b, bias)
    } else {
        composed(a, b, bias)
    }
}

fn composed(a: &Tensor, b: &Tensor, bias: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; a.rank()];
    shape[1] = a.dim(1)?;
    b + a.broadcast_add(&bias.reshape(shape)?)?
}

fn fused(a: &Tensor, b: &Tensor, bias: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op3_no_bwd(&b.contiguous()?, &bias.contiguous()?, &BiasedSum)
}

/// The kernel.
struct BiasedSum;

impl BiasedSum {
    /// Channels and pixels.
    ///
    /// # Errors
    /// Shapes that do not fit, which the kernel would not notice.
    fn check(a: &Layout, b: &Layout, bias: &Layout) -> Result<(usize, usize)> {
        let [_, channels, ref pixels @ ..] = *a.dims() else {
            bail!("a sum of {:?}: has no channels", a.dims())
        };
        let pixels = pixels.iter().product::<usize>();
        if b.dims() != a.dims() || bias.dims() != [channels] {
            bail!("a sum of {:?}, {:?} and the bias {:?}", a.dims(), b.dims(), bias.dims())
        }
        if a.shape().elem_count() == 0 || i32::try_from(channels * pixels).is_err() {
            bail!("a sum of {:?}: a sample has 1 to 2^31 - 1 values", a.dims())
        }
        Ok((channels, pixels))
    }
}

impl CustomOp3 for BiasedSum {
    fn name(&self) -> &'static str {
        "biased-sum"
    }

    /// The kernel's twin, which a test holds against candle's operations.
    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_at: &Layout,
        b: &CpuStorage,
        b_at: &Layout,
        bias: &CpuStorage,
        bias_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (channels, pixels) = Self::check(a_at, b_at, bias_at)?;
        let values =
            |storage: &CpuStorage, layout: &Layout| match (storage, layout.contiguous_offsets()) {
                (CpuStorage::F32(values), Some((start, end))) => Ok(values[start..end].to_vec()),
                _ => bail!("a sum's twin is for contiguous f32"),
            };
        let (a, b, bias) = (values(a, a_at)?, values(b, b_at)?, values(bias, bias_at)?);
        let sum = |(i, (a, b)): (usize, (&f32, &f32))| a + b + bias[i / pixels % channels];
        let sums = a.iter().zip(&b).enumerate().map(sum).collect();
        Ok((CpuStorage::F32(sums), a_at.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        a_at: &Layout,
        b: &CudaStorage,
        b_at: &Layout,
        bias: &CudaStorage,
        bias_at: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((Self::launch((a, a_at), (b, b_at), (bias, bias_at))?, a_at.shape().clone()))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        bail!("this build knows no GPU")
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn counted(from: f32, shape: &[usize]) -> Tensor {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|i| from + i as f32).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn the_twin_of_the_kernel_is_candles_operations() {
        for shape in [&[2, 3, 4, 5][..], &[1, 7, 6], &[3, 2]] {
            let (a, b) = (counted(1.0, shape), counted(0.5, shape));
            let bias = counted(100.0, &shape[1..2]);
            let values = |sum: Tensor| sum.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            // Small whole and half numbers, whose sums are exact in any order.
            assert_eq!(
                values(fused(&a, &b, &bias).unwrap()),
                values(composed(&a, &b, &bias).unwrap())
            );
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (a, bias) = (counted(0.0, &[2, 3, 4]), counted(0.0, &[3]));
        assert!(fused(&a, &counted(0.0, &[2, 3, 5]), &bias).is_err());
        assert!(fused(&a, &a, &counted(0.0, &[4])).is_err());
    }
}
