//! A convolution whose gradient is made of operations that every device does fast.
//!
//! candle's own gradient is a transposed convolution and one with a kernel as large as the image, for both
//! of which its GPU backend has only naive kernels. Here the gradient of the input is a convolution like the
//! one going forward, and that of the weights nine matrix products.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};

/// `x` `[B, C, H, W]` convolved with `weight` `[O, C, K, K]`, with zeros around, as `Tensor::conv2d`.
///
/// # Errors
/// Shapes that do not fit, and whatever the device says.
pub(super) fn convolve(
    x: &Tensor,
    weight: &Tensor,
    padding: usize,
    stride: usize,
) -> Result<Tensor> {
    // On the CPU candle's gradient is as good, and does not copy the result.
    if x.device().is_cpu() || !(x.track_op() || weight.track_op()) {
        return x.conv2d(weight, padding, stride, 1, 1);
    }
    with_gradient(x, weight, padding, stride)
}

fn with_gradient(x: &Tensor, weight: &Tensor, padding: usize, stride: usize) -> Result<Tensor> {
    let y = x.detach().conv2d(&weight.detach(), padding, stride, 1, 1)?;
    x.apply_op3(weight, &y, Convolved { padding, stride })
}

/// Gives its third operand, the first convolved with the second, and has the gradients of that.
struct Convolved {
    padding: usize,
    stride: usize,
}

impl CustomOp3 for Convolved {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        y: &CpuStorage,
        y_at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((y.try_clone(y_at)?, y_at.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        y: &CudaStorage,
        y_at: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Ok((y.try_clone(y_at)?, y_at.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (x, weight) = (x.detach(), weight.detach());
        let gradient = gradient.detach().contiguous()?;
        let of_x = self.of_input(&x, &weight, &gradient)?;
        let of_weight = self.of_weight(&x, &weight, &gradient)?;
        Ok((Some(of_x), Some(of_weight), None))
    }
}

impl Convolved {
    /// `dx[i] = Σ_k w[k]·dy[(i + padding − k)/stride]`: a convolution of `dy`, with `stride − 1` zeros after
    /// each of its pixels, with the weights turned round and their channels exchanged.
    fn of_input(&self, x: &Tensor, weight: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = x.dims4()?;
        let spread = self.spread(gradient)?;
        let turned = weight.flip(&[2, 3])?.transpose(0, 1)?.contiguous()?;
        let dx = spread.conv2d(&turned, weight.dim(2)? - 1 - self.padding, 1, 1, 1)?;
        fit(&fit(&dx, 2, height)?, 3, width)
    }

    /// Zeros after each pixel, so that pixels are `stride` apart.
    fn spread(&self, gradient: &Tensor) -> Result<Tensor> {
        if self.stride == 1 {
            return Ok(gradient.clone());
        }
        let (batch, channels, height, width) = gradient.dims4()?;
        gradient
            .reshape((batch, channels, height, 1, width, 1))?
            .pad_with_zeros(3, 0, self.stride - 1)?
            .pad_with_zeros(5, 0, self.stride - 1)?
            .reshape((batch, channels, height * self.stride, width * self.stride))
    }

    /// `dw[k] = Σ_i dy[i]·x[i·stride + k − padding]`, a product for every `k`.
    fn of_weight(&self, x: &Tensor, weight: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let (batch, channels, ..) = x.dims4()?;
        let (_, outputs, height, width) = gradient.dims4()?;
        let (stride, size) = (self.stride, weight.dim(2)?);
        let pixels = batch * height * width;
        let rows = gradient.transpose(0, 1)?.contiguous()?.reshape((outputs, pixels))?;
        // What is picked from reaches as far as the last window's stride does.
        let after = self.padding + stride - 1;
        let x = x.pad_with_zeros(2, self.padding, after)?.pad_with_zeros(3, self.padding, after)?;
        let mut products = Vec::with_capacity(size * size);
        for (row, column) in (0..size * size).map(|k| (k / size, k % size)) {
            let seen = x.narrow(2, row, height * stride)?.narrow(3, column, width * stride)?;
            let seen = match stride {
                1 => seen,
                _ => seen
                    .contiguous()?
                    .reshape((batch * channels, height, stride, width, stride))?
                    .narrow(2, 0, 1)?
                    .narrow(4, 0, 1)?
                    .contiguous()?
                    .reshape((batch, channels, height, width))?,
            };
            let columns = seen.transpose(0, 1)?.contiguous()?.reshape((channels, pixels))?;
            products.push(rows.matmul(&columns.t()?)?);
        }
        Tensor::stack(&products, 2)?.reshape(weight.dims())
    }
}

/// Cuts what is beyond `size`, or adds zeros up to it.
fn fit(tensor: &Tensor, dimension: usize, size: usize) -> Result<Tensor> {
    let there = tensor.dim(dimension)?;
    if there >= size {
        tensor.narrow(dimension, 0, size)
    } else {
        tensor.pad_with_zeros(dimension, 0, size - there)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::noise;

    fn random(seed: u64, shape: (usize, usize, usize, usize)) -> Tensor {
        let mut values = vec![0.0; shape.0 * shape.1 * shape.2 * shape.3];
        noise::normal(seed, 0, &mut values);
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn the_gradient_is_candles_own() {
        // The shapes of the network: kept size, halved by one that sees zeros all around, and by one that
        // was given them at the lower right; and sizes that are odd.
        for (size, padding, stride) in
            [((8, 8), 1, 1), ((8, 8), 1, 2), ((9, 9), 0, 2), ((7, 5), 1, 2), ((7, 6), 1, 1)]
        {
            let x = Var::from_tensor(&random(1, (3, 4, size.0, size.1))).unwrap();
            let weight = Var::from_tensor(&random(2, (5, 4, 3, 3))).unwrap();
            let gradients = |y: Tensor| {
                let (batch, channels, height, width) = y.dims4().unwrap();
                let direction = random(3, (batch, channels, height, width));
                let loss = (y * direction).unwrap().sum_all().unwrap();
                let mut store = loss.backward().unwrap();
                [&x, &weight].map(|var| store.remove(var.as_tensor()).unwrap())
            };
            let theirs = x.conv2d(&weight, padding, stride, 1, 1).unwrap();
            let ours = with_gradient(&x, &weight, padding, stride).unwrap();
            let difference = |a: &Tensor, b: &Tensor| -> f32 {
                let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap();
                difference.to_scalar::<f32>().unwrap()
            };
            assert_eq!(difference(&ours, &theirs), 0.0);
            for (ours, theirs) in gradients(ours).iter().zip(&gradients(theirs)) {
                assert_eq!(ours.dims(), theirs.dims());
                let error = difference(ours, theirs);
                assert!(error < 1e-4, "{size:?} padding {padding} stride {stride}: {error}");
            }
        }
    }
}
