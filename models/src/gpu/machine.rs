//! Where a network's steps are done.

use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};

use super::product::{Extent, Matrices, Order, multiply};

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
            let source = (Matrices::whole(source, depth), Order::Plain);
            let (part, into) = ((part, Order::Transposed), Matrices::whole(y, outputs));
            multiply(&self.cuda, extent, source, part, into, (1.0, first > 0))?;
            first += depth;
        }
        Ok(())
    }

    /// What each query gathers with a table of scores in f32, for heads that [`Machine::attends`] says no to; in `y` `[B,
    /// height, width, channels]`. Scores are multiplied with `scale`.
    pub(super) fn attend_with_scores(
        &self,
        qkv: &Tensor,
        (heads, scale): (usize, f32),
        y: &Tensor,
    ) -> Result<()> {
        let tables = Tables::new(qkv, heads)?;
        let weights = self.attention_weights(&tables, qkv, scale)?;
        let part = |tensor, part| tables.part(tensor, part);
        let own = tables.own(y);
        let products =
            Extent { rows: tables.tokens, columns: tables.depth, depth: tables.tokens, count: 0 };
        self.each_head(
            &tables,
            products,
            (tables.table(&weights), Order::Plain),
            (part(qkv, 2), Order::Plain),
            own,
            1.0,
        )
    }

    /// The gradient of queries, keys and values, in `of_qkv`, of that of what they gathered.
    pub(super) fn attend_gradient(
        &self,
        qkv: &Tensor,
        of_y: &Tensor,
        (heads, scale): (usize, f32),
        of_qkv: &Tensor,
    ) -> Result<()> {
        let tables = Tables::new(qkv, heads)?;
        let Tables { tokens, depth, .. } = tables;
        let weights = self.attention_weights(&tables, qkv, scale)?;
        let of_weights = self.empty(weights.shape(), DType::F32)?;
        let wide = Extent { count: 0, rows: tokens, columns: tokens, depth };
        let narrow = Extent { count: 0, rows: tokens, columns: depth, depth: tokens };
        let (own, values) = (tables.own(of_y), tables.part(qkv, 2));
        let into = tables.table(&of_weights);
        self.each_head(&tables, wide, (own, Order::Plain), (values, Order::Transposed), into, 1.0)?;
        let turned = (tables.table(&weights), Order::Transposed);
        let into = tables.part(of_qkv, 2);
        self.each_head(&tables, narrow, turned, (own, Order::Plain), into, 1.0)?;
        let of_scores = self.softmax_gradient(&weights, &of_weights)?;
        for (to, from, order) in [(0, 1, Order::Plain), (1, 0, Order::Transposed)] {
            let (scores, from) = ((tables.table(&of_scores), order), tables.part(qkv, from));
            let into = tables.part(of_qkv, to);
            self.each_head(&tables, narrow, scores, (from, Order::Plain), into, scale)?;
        }
        Ok(())
    }

    /// How much each query takes of each key's value: `[heads, B, tokens, tokens]`.
    fn attention_weights(&self, tables: &Tables, qkv: &Tensor, scale: f32) -> Result<Tensor> {
        let Tables { heads, batch, tokens, depth, .. } = *tables;
        let scores = self.empty((heads, batch, tokens, tokens), DType::F32)?;
        let extent = Extent { count: 0, rows: tokens, columns: tokens, depth };
        let (queries, keys) = (tables.part(qkv, 0), tables.part(qkv, 1));
        let (queries, keys) = ((queries, Order::Plain), (keys, Order::Transposed));
        self.each_head(tables, extent, queries, keys, tables.table(&scores), scale)?;
        self.softmax(&scores)
    }

    /// Products of one head of all samples at a time, or of all heads of one: whichever is fewer calls.
    fn each_head(
        &self,
        tables: &Tables,
        extent: Extent,
        (a, first): (Heads, Order),
        (b, second): (Heads, Order),
        c: Heads,
        factor: f32,
    ) -> Result<()> {
        let Tables { heads, batch, .. } = *tables;
        let by_head = heads < batch;
        let (calls, count) = if by_head { (heads, batch) } else { (batch, heads) };
        let extent = Extent { count, ..extent };
        for call in 0..calls {
            let [a, b, c] = [a, b, c].map(|heads| heads.matrices(call, by_head));
            multiply(&self.cuda, extent, (a, first), (b, second), c, (factor, false))?;
        }
        Ok(())
    }
}

/// How queries, keys, values and tables of scores lie.
struct Tables {
    heads: usize,
    batch: usize,
    tokens: usize,
    channels: usize,
    depth: usize,
}

/// A matrix of each head of each sample.
#[derive(Clone, Copy)]
struct Heads<'a> {
    tensor: &'a Tensor,
    start: usize,
    row: usize,
    of_head: usize,
    of_sample: usize,
}

impl Tables {
    fn new(qkv: &Tensor, heads: usize) -> Result<Self> {
        let (batch, height, width, wide) = qkv.dims4()?;
        let channels = wide / 3;
        Ok(Self { heads, batch, tokens: height * width, channels, depth: channels / heads })
    }

    /// Queries, keys or values.
    fn part<'a>(&self, qkv: &'a Tensor, part: usize) -> Heads<'a> {
        let (start, row) = (part * self.channels, 3 * self.channels);
        Heads { tensor: qkv, start, row, of_head: self.depth, of_sample: self.tokens * row }
    }

    /// What is gathered.
    fn own<'a>(&self, y: &'a Tensor) -> Heads<'a> {
        let row = self.channels;
        Heads { tensor: y, start: 0, row, of_head: self.depth, of_sample: self.tokens * row }
    }

    /// `[heads, B, tokens, tokens]`.
    fn table<'a>(&self, scores: &'a Tensor) -> Heads<'a> {
        let of_sample = self.tokens * self.tokens;
        let of_head = self.batch * of_sample;
        Heads { tensor: scores, start: 0, row: self.tokens, of_head, of_sample }
    }
}

impl<'a> Heads<'a> {
    /// Those of one head, or of one sample.
    fn matrices(self, call: usize, by_head: bool) -> Matrices<'a> {
        let Self { tensor, start, row, of_head, of_sample } = self;
        let (own, next) = if by_head { (of_head, of_sample) } else { (of_sample, of_head) };
        Matrices { tensor, start: start + call * own, row, next }
    }
}
