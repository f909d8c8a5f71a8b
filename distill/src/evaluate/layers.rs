//! Layers of feature networks, over maps `[B, H, W, C]` in f32 on the CPU.
//!
//! A convolution is a gathering of patches (`Patches`) and a product. Both have a gradient, the
//! gathering's being the scattering that is its transpose: candle's own backward of a convolution is too
//! slow to train with.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// A convolution with bias: weight `[kh·kw·Cin, Cout]`, patches' rows from top left to bottom right.
#[derive(Debug, Clone)]
pub(super) struct Convolution {
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
    pub(super) window: Window,
}

/// How a convolution or a pool moves over a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    /// Rows and columns.
    pub(super) kernel: (usize, usize),
    pub(super) stride: usize,
    /// Rows of padding above and below, columns left and right.
    pub(super) padding: (usize, usize),
}

impl Window {
    pub(super) fn square(kernel: usize, stride: usize, padding: usize) -> Self {
        Self { kernel: (kernel, kernel), stride, padding: (padding, padding) }
    }

    /// Rows and columns of the result.
    fn output(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        let along = |size: usize, kernel: usize, padding: usize| {
            (size + 2 * padding).checked_sub(kernel).map(|room| room / self.stride + 1)
        };
        let rows = along(height, self.kernel.0, self.padding.0);
        let columns = along(width, self.kernel.1, self.padding.1);
        match (rows, columns) {
            (Some(rows), Some(columns)) => Ok((rows, columns)),
            _ => bail!("a map of {height}×{width} is smaller than the window {:?}", self.kernel),
        }
    }

    /// The pixels under the window at output `(row, column)` that lie on the map: place in the window,
    /// row, column.
    fn pixels(
        &self,
        (row, column): (usize, usize),
        (height, width): (usize, usize),
    ) -> impl Iterator<Item = (usize, usize, usize)> {
        let (kernel, padding) = (self.kernel, self.padding);
        let (top, left) = (row * self.stride, column * self.stride);
        let places = (0..kernel.0).flat_map(move |ky| (0..kernel.1).map(move |kx| (ky, kx)));
        places.filter_map(move |(ky, kx)| {
            let y = (top + ky).checked_sub(padding.0).filter(|&y| y < height)?;
            let x = (left + kx).checked_sub(padding.1).filter(|&x| x < width)?;
            Some((ky * kernel.1 + kx, y, x))
        })
    }
}

impl Convolution {
    /// From a weight as PyTorch has it, `[Cout, Cin, kh, kw]`.
    pub(super) fn from_torch(
        weight: &Tensor,
        bias: Option<Tensor>,
        stride: usize,
        padding: (usize, usize),
    ) -> Result<Self> {
        let (outputs, _, height, width) = weight.dims4()?;
        let weight = weight.permute((2, 3, 1, 0))?.reshape(((), outputs))?.contiguous()?;
        let window = Window { kernel: (height, width), stride, padding };
        Ok(Self { weight, bias, window })
    }

    /// `[B, H, W, Cin]` → `[B, H', W', Cout]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, height, width, _) = x.dims4()?;
        let (rows, columns) = self.window.output(height, width)?;
        let patches = if self.window == Window::square(1, 1, 0) {
            x.flatten_to(2)?
        } else {
            x.apply_op1(Patches(self.window))?
        };
        let y = patches.matmul(&self.weight)?;
        let y = match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        };
        y.reshape((batch, rows, columns, ()))
    }
}

/// `[B, H, W, C]` → `[B·H'·W', kh·kw·C]`, zeros outside the map.
struct Patches(Window);

impl CustomOp1 for Patches {
    fn name(&self) -> &'static str {
        "patches"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, height, width, channels) = layout.shape().dims4()?;
        let x = contiguous(storage, layout)?;
        let (rows, columns) = self.0.output(height, width)?;
        let row = self.0.kernel.0 * self.0.kernel.1 * channels;
        let mut patches = vec![0.0; batch * rows * columns * row];
        let line = columns * row;
        patches.par_chunks_mut(line).enumerate().for_each(|(number, line)| {
            let image = &x[number / rows * height * width * channels..];
            for (column, patch) in line.chunks_exact_mut(row).enumerate() {
                for (place, y, x) in self.0.pixels((number % rows, column), (height, width)) {
                    let pixel = &image[(y * width + x) * channels..][..channels];
                    patch[place * channels..][..channels].copy_from_slice(pixel);
                }
            }
        });
        Ok((CpuStorage::F32(patches), (batch * rows * columns, row).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (_, height, width, channels) = x.dims4()?;
        let scatter = Scatter { window: self.0, map: (height, width), channels };
        gradient.contiguous()?.apply_op1_no_bwd(&scatter).map(Some)
    }
}

/// The transpose of [`Patches`].
struct Scatter {
    window: Window,
    map: (usize, usize),
    channels: usize,
}

impl CustomOp1 for Scatter {
    fn name(&self) -> &'static str {
        "scatter-patches"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let patches = contiguous(storage, layout)?;
        let ((height, width), channels) = (self.map, self.channels);
        let (rows, columns) = self.window.output(height, width)?;
        let row = self.window.kernel.0 * self.window.kernel.1 * channels;
        let batch = patches.len() / (rows * columns * row);
        let mut x = vec![0.0; batch * height * width * channels];
        x.par_chunks_mut(height * width * channels).enumerate().for_each(|(number, image)| {
            let patches = &patches[number * rows * columns * row..][..rows * columns * row];
            for (index, patch) in patches.chunks_exact(row).enumerate() {
                for (place, y, x) in
                    self.window.pixels((index / columns, index % columns), self.map)
                {
                    let pixel = &mut image[(y * width + x) * channels..][..channels];
                    let part = &patch[place * channels..][..channels];
                    pixel.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
                }
            }
        });
        Ok((CpuStorage::F32(x), (batch, height, width, channels).into()))
    }
}

/// What a pool makes of the pixels under its window; those outside the map count for neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pool {
    Largest,
    Mean,
}

impl Pool {
    /// `[B, H, W, C]` → `[B, H', W', C]`, without a gradient.
    pub(super) fn forward(self, x: &Tensor, window: Window) -> Result<Tensor> {
        x.contiguous()?.apply_op1_no_bwd(&Pooling(self, window))
    }
}

struct Pooling(Pool, Window);

impl CustomOp1 for Pooling {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, height, width, channels) = layout.shape().dims4()?;
        let x = contiguous(storage, layout)?;
        let (rows, columns) = self.1.output(height, width)?;
        let start = if self.0 == Pool::Largest { f32::NEG_INFINITY } else { 0.0 };
        let mut pooled = vec![start; batch * rows * columns * channels];
        pooled.par_chunks_mut(columns * channels).enumerate().for_each(|(number, line)| {
            let image = &x[number / rows * height * width * channels..];
            for (column, out) in line.chunks_exact_mut(channels).enumerate() {
                let mut count = 0;
                for (_, y, x) in self.1.pixels((number % rows, column), (height, width)) {
                    let pixel = &image[(y * width + x) * channels..][..channels];
                    count += 1;
                    for (out, &value) in out.iter_mut().zip(pixel) {
                        // A comparison keeps NaN where a maximum would lose it.
                        match self.0 {
                            Pool::Largest if value <= *out => {}
                            Pool::Largest => *out = value,
                            Pool::Mean => *out += value,
                        }
                    }
                }
                if self.0 == Pool::Mean {
                    out.iter_mut().for_each(|out| *out /= count as f32);
                }
            }
        });
        Ok((CpuStorage::F32(pooled), (batch, rows, columns, channels).into()))
    }
}

/// The values of a contiguous f32 tensor.
pub(super) fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(values), Some((start, end))) => Ok(&values[start..end]),
        _ => bail!("feature networks take contiguous f32 tensors"),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn numbers(seed: u64, shape: &[usize]) -> Result<Var> {
        let mut values = vec![0.0; shape.iter().product()];
        understudy_models::noise::normal(seed, 0, &mut values);
        Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu)?)
    }

    fn apart(a: &Tensor, b: &Tensor) -> Result<f32> {
        (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
    }

    #[test]
    fn convolution_and_its_gradients_are_candles() -> Result<()> {
        for (kernel, stride, padding) in [(3, 1, 1), (5, 2, 2), (3, 2, 0), (1, 1, 0)] {
            // Odd both ways: candle's own gradient takes for the width what the height leaves over.
            let (x, weight) = (numbers(1, &[2, 3, 9, 7])?, numbers(2, &[4, 3, kernel, kernel])?);
            let theirs = x.conv2d(&weight, padding, stride, 1, 1)?;
            let convolution = Convolution::from_torch(&weight, None, stride, (padding, padding))?;
            let y = convolution.forward(&x.permute((0, 2, 3, 1))?.contiguous()?)?;
            let ours = y.permute((0, 3, 1, 2))?;
            assert!(apart(&ours, &theirs)? < 1e-4, "{kernel} {stride} {padding}");
            let weights = theirs.sin()?.detach();
            let (ours, theirs) = (
                (ours * &weights)?.sum_all()?.backward()?,
                (theirs * &weights)?.sum_all()?.backward()?,
            );
            for var in [&x, &weight] {
                let (Some(ours), Some(theirs)) = (ours.get(var), theirs.get(var)) else {
                    bail!("no gradient")
                };
                assert!(apart(ours, theirs)? < 1e-3, "{kernel} {stride} {padding}");
            }
        }
        Ok(())
    }

    #[test]
    fn pools_leave_the_padding_out() -> Result<()> {
        let x = Tensor::new(&[[[[-1.0_f32], [-2.0]], [[-3.0], [-6.0]]]], &Device::Cpu)?;
        let window = Window::square(3, 1, 1);
        let values = |pool: Pool| pool.forward(&x, window)?.flatten_all()?.to_vec1::<f32>();
        assert_eq!(values(Pool::Largest)?, [-1.0; 4]);
        assert_eq!(values(Pool::Mean)?, [-3.0; 4]);
        Ok(())
    }
}
