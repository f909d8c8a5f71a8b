//! Where a network's steps are done.

use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};

use super::product::{Extent, Matrices, Second, multiply};

/// A GPU, and the type of the maps on it.
#[derive(Clone)]
pub(crate) struct Machine {
    pub(crate) dtype: DType,
    pub(crate) device: Device,
    pub(crate) cuda: CudaDevice,
    /// Its compute capability's first number.
    pub(super) generation: i32,
}

impl Machine {
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
            let source = Matrices::whole(source, depth);
            let into = Matrices::whole(y, outputs);
            multiply(&self.cuda, extent, source, (part, Second::Transposed), into, first > 0)?;
            first += depth;
        }
        Ok(())
    }

    /// What each query gathers with a table of scores in f32, for heads that
    /// [`Machine::attends`] says no to; in `y` `[B, height, width, channels]`.
    pub(super) fn attend_with_scores(&self, qkv: &Tensor, heads: usize, y: &Tensor) -> Result<()> {
        let (batch, height, width, wide) = qkv.dims4()?;
        let (tokens, channels, depth) = (height * width, wide / 3, wide / 3 / heads);
        let scores = self.empty((heads, batch, tokens, tokens), DType::F32)?;
        // Products of one head of all samples, or of all heads of one: whichever is fewer calls.
        let by_head = heads < batch;
        let (calls, count) = if by_head { (heads, batch) } else { (batch, heads) };
        let matrices = |tensor, row: usize, of_head: usize, of_sample: usize, call: usize| {
            let (own, next) = if by_head { (of_head, of_sample) } else { (of_sample, of_head) };
            Matrices { tensor, start: call * own, row, next }
        };
        let square = tokens * tokens;
        for call in 0..calls {
            let queries = matrices(qkv, wide, depth, tokens * wide, call);
            let keys = Matrices { start: queries.start + channels, ..queries };
            let into = matrices(&scores, tokens, batch * square, square, call);
            let extent = Extent { count, rows: tokens, columns: tokens, depth };
            multiply(&self.cuda, extent, queries, (keys, Second::Transposed), into, false)?;
        }
        let weights = self.softmax(&scores)?;
        for call in 0..calls {
            let queries = matrices(qkv, wide, depth, tokens * wide, call);
            let values = Matrices { start: queries.start + 2 * channels, ..queries };
            let weights = matrices(&weights, tokens, batch * square, square, call);
            let into = matrices(y, channels, depth, tokens * channels, call);
            let extent = Extent { count, rows: tokens, columns: depth, depth: tokens };
            multiply(&self.cuda, extent, weights, (values, Second::Plain), into, false)?;
        }
        Ok(())
    }
}
