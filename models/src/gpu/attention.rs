//! Attention (Vaswani et al. 2017) through tables of scores, for heads that its one kernel does not know, and its gradient.

use candle_core::{DType, Result, Tensor};

use super::context::Context;
use super::product::{Extent, Matrices, Order, multiply};

impl Context {
    /// What each query gathers, head by head, of queries, keys and values, one after another in the channels; in `y` `[B,
    /// height, width, channels]`. Scores, in f32, are multiplied with `scale`.
    pub(super) fn attend_with_scores(
        &self,
        qkv: &Tensor,
        (heads, scale): (usize, f32),
        y: &Tensor,
    ) -> Result<()> {
        let tables = Tables::new(qkv, heads)?;
        let weights = self.attention_weights(&tables, qkv, scale)?;
        let (weights, values) = (tables.table(&weights), tables.part(qkv, 2));
        let factors = [(weights, Order::Plain), (values, Order::Plain)];
        self.each_head(&tables, factors, tables.gathered(y), 1.0)
    }

    /// The gradient of queries, keys and values, in `of_qkv`, of that of what they gathered.
    pub(super) fn attend_gradient(
        &self,
        qkv: &Tensor,
        of_y: &Tensor,
        (heads, scale): (usize, f32),
        of_qkv: &Tensor,
    ) -> Result<()> {
        let tables = &Tables::new(qkv, heads)?;
        let weights = self.attention_weights(tables, qkv, scale)?;
        let of_weights = self.empty(weights.shape(), DType::F32)?;
        let own = (tables.gathered(of_y), Order::Plain);
        let values = (tables.part(qkv, 2), Order::Transposed);
        self.each_head(tables, [own, values], tables.table(&of_weights), 1.0)?;
        let turned = (tables.table(&weights), Order::Transposed);
        self.each_head(tables, [turned, own], tables.part(of_qkv, 2), 1.0)?;
        let of_scores = self.softmax_gradient(&weights, &of_weights)?;
        // Of queries by way of the keys, and of keys by way of the queries.
        for (to, from, order) in [(0, 1, Order::Plain), (1, 0, Order::Transposed)] {
            let scores = (tables.table(&of_scores), order);
            let from = (tables.part(qkv, from), Order::Plain);
            self.each_head(tables, [scores, from], tables.part(of_qkv, to), scale)?;
        }
        Ok(())
    }

    /// How much each query takes of each key's value: `[heads, B, tokens, tokens]`.
    fn attention_weights(&self, tables: &Tables, qkv: &Tensor, scale: f32) -> Result<Tensor> {
        let Tables { heads, batch, tokens, .. } = *tables;
        let scores = self.empty((heads, batch, tokens, tokens), DType::F32)?;
        let queries = (tables.part(qkv, 0), Order::Plain);
        let keys = (tables.part(qkv, 1), Order::Transposed);
        self.each_head(tables, [queries, keys], tables.table(&scores), scale)?;
        self.softmax(&scores)
    }

    /// A product, times `factor`, of each head of each sample: of one head of all samples at a time, or of all heads of
    /// one, whichever is fewer calls.
    fn each_head(
        &self,
        tables: &Tables,
        [(a, first), (b, second)]: [(Heads, Order); 2],
        c: Heads,
        factor: f32,
    ) -> Result<()> {
        let Tables { heads, batch, tokens, .. } = *tables;
        let by_head = heads < batch;
        let (calls, count) = if by_head { (heads, batch) } else { (batch, heads) };
        let depth = if first == Order::Plain { a.columns } else { tokens };
        let extent = Extent { count, rows: tokens, columns: c.columns, depth };
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
    /// Channels of a head.
    depth: usize,
}

/// A matrix of each head of each sample, with a row for each token.
#[derive(Clone, Copy)]
struct Heads<'a> {
    tensor: &'a Tensor,
    columns: usize,
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
        let Self { channels, depth, .. } = *self;
        let (start, row, of_sample) = (part * channels, 3 * channels, 3 * channels * self.tokens);
        Heads { tensor: qkv, columns: depth, start, row, of_head: depth, of_sample }
    }

    /// What is gathered.
    fn gathered<'a>(&self, y: &'a Tensor) -> Heads<'a> {
        let Self { channels, depth, .. } = *self;
        let of_sample = channels * self.tokens;
        Heads { tensor: y, columns: depth, start: 0, row: channels, of_head: depth, of_sample }
    }

    /// `[heads, B, tokens, tokens]`.
    fn table<'a>(&self, scores: &'a Tensor) -> Heads<'a> {
        let of_sample = self.tokens * self.tokens;
        let (columns, of_head) = (self.tokens, self.batch * of_sample);
        Heads { tensor: scores, columns, start: 0, row: columns, of_head, of_sample }
    }
}

impl<'a> Heads<'a> {
    /// Those of one head, or of one sample.
    fn matrices(self, call: usize, by_head: bool) -> Matrices<'a> {
        let Self { tensor, start, row, of_head, of_sample, .. } = self;
        let (own, next) = if by_head { (of_head, of_sample) } else { (of_sample, of_head) };
        Matrices { tensor, start: start + call * own, row, next }
    }
}
