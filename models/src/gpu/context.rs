//! Where a network's steps are done.

use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};

use super::product::{Extent, Matrices, Order, multiply};

/// A GPU, and the type of the maps on it.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) dtype: DType,
    pub(crate) device: Device,
    pub(crate) cuda: CudaDevice,
    /// Its compute capability's first number.
    pub(super) generation: i32,
}

impl Context {
    /// # Errors
    /// A device that is no GPU.
    pub(crate) fn new(device: &Device, dtype: DType) -> Result<Self> {
        let cuda = device.as_cuda_device()?.clone();
        let (generation, _) = cuda.cuda_stream().context().compute_capability().w()?;
        Ok(Self { dtype, device: device.clone(), cuda, generation })
    }

    /// The channels of all sources, `[B, height, width, …]`, times `weight` `[outputs, inputs]`, in `y`, as large a map,
    /// which may be f32, too.
    pub(super) fn linear(&self, sources: &[Tensor], weight: &Tensor, y: &Tensor) -> Result<()> {
        let (outputs, inputs) = weight.dims2()?;
        let (batch, height, width, wide) = y.dims4()?;
        let deep: usize = sources.iter().map(|source| source.elem_count()).sum();
        if wide != outputs || deep != batch * height * width * inputs {
            bail!("a linear map {:?} of {deep} numbers to {:?}", weight.dims(), y.dims())
        }
        let mut first = 0;
        for source in sources {
            let (rows, depth) = (batch * height * width, source.dim(3)?);
            let extent = Extent { count: 1, rows, columns: outputs, depth };
            let part = Matrices { start: first, ..Matrices::whole(weight, inputs) };
            let source = (Matrices::whole(source, depth), Order::Plain);
            let (part, into) = ((part, Order::Transposed), Matrices::whole(y, outputs));
            multiply(&self.cuda, extent, source, part, into, (1.0, first > 0))?;
            first += depth;
        }
        Ok(())
    }
}
