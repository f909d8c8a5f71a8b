//! A graph done operation by operation by candle: in any element type, on any device, with gradients.
//!
//! It is what other ways are compared with (in f64), and what runs where nothing is compiled. A map is
//! `[B, channels, height, width]`.
//!
//! Two promises hold for every operation. On the CPU a sample's result does not depend on its neighbours: every product
//! has a shape that is free of the batch size, because the product's algorithm, and with it the order of its sums, follows
//! from its shape. And every operation is differentiable: where a fast one has no gradient, or a wrong one, it is only
//! used on tensors that track none.

use candle_core::{D, DType, Device, Result, Tensor, bail};

use crate::denoiser::Conditions;
use crate::features::Feature;
use crate::graph::{Epilogue, Graph, Map, Op, Product, Sees, Size, Slice, WeightId, positions};
use crate::kernels::{Function, Taps};
use crate::weights::Weights;

/// A network whose weights are tensors.
pub(crate) struct Eager {
    graph: Graph,
    /// By [`crate::graph::WeightId`]; those of features stand there.
    weights: Vec<Option<Tensor>>,
    /// For each operation that makes one.
    features: Vec<Option<Feature>>,
    /// Positions, for the operation that has them: `[1, channels, height, width]`.
    positions: Option<Tensor>,
    dtype: DType,
}

impl Eager {
    /// With weights of `dtype`.
    ///
    /// # Errors
    /// Those of weights that cannot be read.
    pub(crate) fn new(graph: Graph, weights: &Weights, dtype: DType) -> crate::Result<Self> {
        let mut features = Vec::new();
        let mut taken = vec![None; graph.weights.len()];
        for op in &graph.ops {
            features.push(Feature::new(&graph, op, weights)?);
            let mut take = |product: &Product| -> crate::Result<()> {
                for id in [Some(product.weight), product.bias].into_iter().flatten() {
                    taken[id.0] = Some(weights.get_as(graph.weight(id), dtype)?);
                }
                Ok(())
            };
            match op {
                Op::Project { product, .. } | Op::Convolve { product, .. } => take(product)?,
                Op::Linear { products, .. } => products.iter().try_for_each(take)?,
                Op::Learned { weights: ids, .. } => {
                    for id in ids {
                        taken[id.0] = Some(weights.get_as(graph.weight(*id), dtype)?);
                    }
                }
                // As torch does, norms work in f32, or in f64 in a network that serves as the reference.
                Op::GroupNorm { weight, bias, .. } => {
                    for id in [weight, bias] {
                        let tensor = weights.get_as(graph.weight(*id), working(dtype))?;
                        taken[id.0] = Some(tensor);
                    }
                }
                Op::Embed { table, places, .. } => {
                    for id in [table, places] {
                        taken[id.0] = Some(weights.get_as(graph.weight(*id), dtype)?);
                    }
                }
                Op::Nearest { table, .. } | Op::Crop { table, .. } => {
                    taken[table.0] = Some(weights.get_as(graph.weight(*table), dtype)?);
                }
                Op::RmsNorm { weight, .. } => {
                    let tensor = weights.get_as(graph.weight(*weight), working(dtype))?;
                    taken[weight.0] = Some(tensor);
                }
                _ => {}
            }
        }
        let positions = positions_of(&graph, dtype, weights.device())?;
        Ok(Self { graph, weights: taken, features, positions, dtype })
    }

    /// The same operations over maps of other sizes; the weights are shared.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn at(&self, graph: Graph, device: &Device) -> crate::Result<Self> {
        let positions = positions_of(&graph, self.dtype, device)?;
        let weights = self.weights.clone();
        let ops = self.features.iter().zip(&graph.ops);
        let features = ops.map(|(it, op)| it.as_ref().map(|it| it.at(op))).collect();
        Ok(Self { graph, weights, features, positions, dtype: self.dtype })
    }

    /// One evaluation: `x` `[B, channels, height, width]` in the network's type, in patches where the graph says so, or, of
    /// tokens, their numbers, u32 `[B, tokens]`; all answers are tensors of the former kind. The times are not looked at by a network without time.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        conditions: Conditions,
    ) -> Result<Vec<Tensor>> {
        let mut answers = Vec::new();
        let mut maps: Vec<Option<Tensor>> = vec![None; self.graph.maps.len()];
        let mut uses = self.graph.uses();
        for (index, op) in self.graph.ops.iter().enumerate() {
            let made = self.made(index, op, x, (timesteps, conditions), &maps)?;
            match op.to() {
                Some(to) => maps[to.0] = Some(made),
                None => answers.push(made),
            }
            for map in op.reads() {
                uses[map.0] -= 1;
                if uses[map.0] == 0 {
                    maps[map.0] = None;
                }
            }
        }
        Ok(answers)
    }

    /// What it does, operation by operation.
    pub(crate) fn graph(&self) -> &Graph {
        &self.graph
    }

    /// A weight of a product or a norm.
    pub(crate) fn weight_mut(&mut self, id: WeightId) -> Option<&mut Tensor> {
        self.weights[id.0].as_mut()
    }

    /// What operation `index` makes of the maps that it reads, as it would if it were `op`.
    pub(crate) fn made(
        &self,
        index: usize,
        op: &Op,
        x: &Tensor,
        (timesteps, conditions): (&Tensor, Conditions),
        maps: &[Option<Tensor>],
    ) -> Result<Tensor> {
        match &self.features[index] {
            Some(feature) => {
                let vector = feature.forward(timesteps, conditions)?.to_dtype(self.dtype)?;
                vector.unsqueeze(2)?.unsqueeze(3)
            }
            None => self.apply(op, x, (timesteps, conditions.prompt), maps),
        }
    }

    fn apply(
        &self,
        op: &Op,
        x: &Tensor,
        (timesteps, prompt): (&Tensor, Option<&Tensor>),
        maps: &[Option<Tensor>],
    ) -> Result<Tensor> {
        let map = |map: Map| match &maps[map.0] {
            Some(tensor) => Ok(tensor),
            None => bail!("map {} is read before it is written", map.0),
        };
        match op {
            &Op::Sample { factor: 1.0, shift: 0.0, .. } => Ok(x.clone()),
            &Op::Sample { factor, shift, .. } => x.affine(f64::from(factor), f64::from(shift)),
            Op::Positions { .. } => match &self.positions {
                Some(positions) => {
                    let (_, channels, height, width) = positions.dims4()?;
                    positions.broadcast_as((x.dim(0)?, channels, height, width))?.contiguous()
                }
                None => bail!("positions are made when a network is"),
            },
            Op::Prompt { .. } => match prompt {
                Some(states) => states.transpose(1, 2)?.unsqueeze(2)?.to_dtype(self.dtype),
                None => bail!("the network was given no prompt"),
            },
            Op::Embed { table, places, .. } => {
                let [table, places] = [table, places].map(|id| self.weights[id.0].as_ref());
                let (Some(table), Some(places)) = (table, places) else {
                    bail!("tables have their rows")
                };
                let (batch, tokens) = x.dims2()?;
                let rows = table.index_select(&x.flatten_all()?, 0)?;
                let rows = rows.reshape((batch, tokens, ()))?.broadcast_add(places)?;
                rows.transpose(1, 2)?.unsqueeze(2)?.contiguous()
            }
            Op::Nearest { source, table, .. } => match &self.weights[table.0] {
                Some(table) => nearest(map(*source)?, table),
                None => bail!("a table has its rows"),
            },
            &Op::Crop { table, side, to } => match &self.weights[table.0] {
                Some(table) => {
                    let Size { height, width, channels } = self.graph.size(to);
                    let square = table.detach().reshape((side, side, channels))?;
                    let rows = square.narrow(0, (side - height) / 2, height)?;
                    let middle = rows.narrow(1, (side - width) / 2, width)?;
                    let map = middle.permute((2, 0, 1))?.unsqueeze(0)?;
                    map.broadcast_as((x.dim(0)?, channels, height, width))?.contiguous()
                }
                None => bail!("a table has its rows"),
            },
            Op::Join { sources, .. } => {
                let row = |&source: &Map| map(source)?.flatten_from(2)?.unsqueeze(2);
                Tensor::cat(&sources.iter().map(row).collect::<Result<Vec<_>>>()?, 3)
            }
            &Op::Take { source, first, to } => {
                let Size { height, width, .. } = self.graph.size(to);
                let source = map(source)?;
                let (batch, channels, ..) = source.dims4()?;
                let row = source.flatten_from(2)?.narrow(2, first, height * width)?;
                row.reshape((batch, channels, height, width))
            }
            &Op::RmsNorm { source, weight, eps, factor, .. } => match &self.weights[weight.0] {
                Some(weight) => rms_norm(map(source)?, weight, eps, factor),
                None => bail!("a norm has its weight"),
            },
            Op::Learned { weights, to } => {
                let all = weights.iter().filter_map(|id| self.weights[id.0].as_ref());
                let all: Vec<Tensor> = all.map(Tensor::flatten_all).collect::<Result<_>>()?;
                let size = self.graph.size(*to);
                let pixels = Tensor::cat(&all, 0)?.reshape((1, (), size.channels))?;
                let shape = (1, size.channels, size.height, size.width);
                let map = pixels.transpose(1, 2)?.reshape(shape)?;
                map.repeat((x.dim(0)?, 1, 1, 1))
            }
            Op::Project { source, product, .. } => self.product(map(*source)?, product),
            Op::Linear { sources, products, epilogue, .. } => {
                let sources: Vec<&Tensor> =
                    sources.iter().map(|&source| map(source)).collect::<Result<_>>()?;
                let x = joined(&sources)?;
                let parts: Vec<Tensor> = products
                    .iter()
                    .map(|product| self.product(&x, product))
                    .collect::<Result<_>>()?;
                finish(joined(&parts.iter().collect::<Vec<_>>())?, *epilogue, map)
            }
            Op::Convolve { source, product, taps, epilogue, .. } => {
                let y = convolve(map(*source)?, self.weight(product)?, *taps)?;
                let bias = self.bias(product)?;
                let y = match bias {
                    Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?,
                    None => y,
                };
                finish(y, *epilogue, map)
            }
            Op::GroupNorm { sources, weight, bias, groups, eps, modulation, function, .. } => {
                let sources: Vec<&Tensor> =
                    sources.iter().map(|&source| map(source)).collect::<Result<_>>()?;
                let [weight, bias] = [weight, bias].map(|id| &self.weights[id.0]);
                let (Some(weight), Some(bias)) = (weight, bias) else {
                    bail!("a norm has its weights")
                };
                let modulation = modulation.map(map).transpose()?;
                let y = group_norm(&joined(&sources)?, [weight, bias], (*groups, *eps), modulation);
                apply(*function, &y?)
            }
            Op::Attend { queries, keys, values, heads, sees, .. } => {
                let slices = [queries, keys, values].map(|slice| heads_of(slice, *heads, map));
                let [wide, keys, values] = slices;
                let like = map(queries.map)?;
                let (batch, _, height, width) = like.dims4()?;
                let (keys, values) = (keys?, values?);
                let hidden = match (sees, prompt) {
                    (Sees::Earlier, _) => Some(later(&keys)?),
                    (Sees::Prompt, Some(prompt)) => Some(filling(prompt, *heads)?),
                    _ => None,
                };
                attend(&wide?, &keys, &values, hidden)?.reshape((batch, (), height, width))
            }
            Op::Downsample { source, .. } => map(*source)?.avg_pool2d(2),
            Op::Upsample { source, .. } => upsample(map(*source)?),
            Op::Modulate { source, eps, vector, scale, shift, plus_one, .. } => {
                let source = map(*source)?;
                let channels = source.dim(1)?;
                let part = |index: &usize| map(*vector)?.narrow(1, index * channels, channels);
                let scale = if *plus_one { (part(scale)? + 1.0)? } else { part(scale)? };
                modulate(source, *eps, &scale, &part(shift)?)
            }
            Op::Gate { source, residual, vector, gate, .. } => {
                let source = map(*source)?;
                let channels = source.dim(1)?;
                let gate = map(*vector)?.narrow(1, gate * channels, channels)?;
                source.broadcast_mul(&gate)? + map(*residual)?
            }
            Op::Geglu { source, .. } => {
                let halves = map(*source)?.chunk(2, 1)?;
                &halves[0] * apply(Function::Gelu, &halves[1].contiguous()?)?
            }
            Op::Sum { source, parts, .. } => {
                let parts: Vec<&Tensor> =
                    parts.iter().map(|&part| map(part)).collect::<Result<_>>()?;
                map(*source)? + joined(&parts)?
            }
            Op::Activate { source, function, .. } => apply(*function, map(*source)?),
            &Op::Answer { source, divided, factor, shift } => {
                let y = map(source)?;
                let y = match (factor, shift) {
                    (1.0, 0.0) => y.clone(),
                    _ => y.affine(f64::from(factor), f64::from(shift))?,
                };
                if !divided {
                    return Ok(y);
                }
                let dtype = working(y.dtype());
                let sigma = timesteps.to_dtype(dtype)?.reshape(((), 1, 1, 1))?;
                y.to_dtype(dtype)?.broadcast_div(&sigma)?.to_dtype(y.dtype())
            }
            Op::Sinusoid { .. } | Op::Row { .. } | Op::Condition { .. } | Op::TextTime { .. } => {
                bail!("features are made elsewhere")
            }
        }
    }

    fn weight(&self, product: &Product) -> Result<&Tensor> {
        match &self.weights[product.weight.0] {
            Some(weight) => Ok(weight),
            None => bail!("a product has its weight"),
        }
    }

    fn bias(&self, product: &Product) -> Result<Option<&Tensor>> {
        match product.bias.map(|bias| &self.weights[bias.0]) {
            None => Ok(None),
            Some(Some(bias)) => Ok(Some(bias)),
            Some(None) => bail!("a product has its bias"),
        }
    }

    /// `[B, inputs, H, W]` → `[B, outputs, H, W]`, one product per sample.
    fn product(&self, x: &Tensor, product: &Product) -> Result<Tensor> {
        let weight = self.weight(product)?.flatten_from(1)?;
        let (batch, input, height, width) = x.dims4()?;
        let output = weight.dim(0)?;
        let flat = x.reshape((batch, input, height * width))?;
        let y = weight.broadcast_as((batch, output, input))?.matmul(&flat)?;
        let y = match self.bias(product)? {
            Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1))?)?,
            None => y,
        };
        let y = if product.factor == 1.0 { y } else { (y * product.factor)? };
        y.reshape((batch, output, height, width))
    }
}

/// Positions of the operation that has them: `[1, channels, height, width]`.
fn positions_of(graph: &Graph, dtype: DType, device: &Device) -> Result<Option<Tensor>> {
    let placed = graph.ops.iter().find_map(|op| match op {
        Op::Positions { grid, to } => Some((graph.size(*to), *grid)),
        _ => None,
    });
    let Some((size, grid)) = placed else { return Ok(None) };
    let shape = (1, size.height * size.width, size.channels);
    let values = Tensor::from_vec(positions(size, grid), shape, device)?;
    let channels_first = values.transpose(1, 2)?.to_dtype(dtype)?;
    Ok(Some(channels_first.reshape((1, size.channels, size.height, size.width))?))
}

/// Several maps' channels, one after another.
fn joined(maps: &[&Tensor]) -> Result<Tensor> {
    match maps {
        [one] => Ok((*one).clone()),
        all => Tensor::cat(all, 1),
    }
}

/// `factor·(y + offset + residual)`.
fn finish<'a>(
    mut y: Tensor,
    epilogue: Epilogue,
    map: impl Fn(Map) -> Result<&'a Tensor>,
) -> Result<Tensor> {
    let Epilogue { offset, residual, factor } = epilogue;
    if let Some(offset) = offset {
        y = y.broadcast_add(map(offset)?)?;
    }
    if let Some(residual) = residual {
        y = (y + map(residual)?)?;
    }
    if factor == 1.0 { Ok(y) } else { y * f64::from(factor) }
}

/// Of each pixel the row of `[rows, channels]` with the smallest squared distance, of several the first.
fn nearest(x: &Tensor, table: &Tensor) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let pixels = x.detach().permute((0, 2, 3, 1))?.reshape(((), 1, channels))?;
    // A few pixels at a time: all distances at once would be as many as pixels times rows.
    let rows = (0..pixels.dim(0)?).step_by(PIXELS).map(|first| {
        let count = PIXELS.min(pixels.dim(0)? - first);
        let apart = pixels.narrow(0, first, count)?.broadcast_sub(&table.detach().unsqueeze(0)?)?;
        apart.sqr()?.sum(D::Minus1)?.argmin(D::Minus1)
    });
    let rows = Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)?;
    let found = table.index_select(&rows, 0)?.reshape((batch, height, width, channels))?;
    found.permute((0, 3, 1, 2))?.contiguous()
}

/// Pixels whose distances to all rows of a table are worked out at a time.
const PIXELS: usize = 256;

fn convolve(x: &Tensor, weight: &Tensor, taps: Taps) -> Result<Tensor> {
    let Taps { side, stride, padding, doubled } = taps;
    let seen = if doubled { &upsample(x)? } else { x };
    if side == 3 && padding == 0 && stride == 2 {
        // Without padding above and left there is one row and column of zeros below and right.
        let wider = seen.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?;
        return wider.conv2d(weight, 0, stride, 1, 1);
    }
    seen.conv2d(weight, padding, stride, 1, 1)
}

/// Each pixel becomes four: `[B, C, H, W]` → `[B, C, 2H, 2W]`.
fn upsample(x: &Tensor) -> Result<Tensor> {
    let (height, width) = (x.dim(2)?, x.dim(3)?);
    // candle's gradient of this operation replaces what its argument has gathered so far instead of
    // adding to it, so the argument must be a tensor that nothing else uses.
    let x = if x.track_op() { &x.copy()? } else { x };
    x.upsample_nearest2d(2 * height, 2 * width)
}

/// `(x − mean)·scale + shift`: norm, affine map and modulation `[B, 2·channels, 1, 1]` in one product and one sum.
fn group_norm(
    x: &Tensor,
    [weight, bias]: [&Tensor; 2],
    (groups, eps): (usize, f64),
    modulation: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, channels, dtype) = (x.dim(0)?, x.dim(1)?, weight.dtype());
    let grouped = x.to_dtype(dtype)?.reshape((batch, groups, ()))?;
    let centred = grouped.broadcast_sub(&grouped.mean_keepdim(2)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(2)? + eps)?.sqrt()?;
    let mut scale = weight
        .reshape((1, groups, channels / groups))?
        .broadcast_div(&deviation)?
        .reshape((batch, channels, 1))?;
    let mut shift = bias.reshape((1, channels, 1))?;
    if let Some(modulation) = modulation {
        let parts = modulation.to_dtype(dtype)?.flatten_from(1)?.chunk(2, 1)?;
        let factor = (&parts[0] + 1.0)?.unsqueeze(2)?;
        scale = (scale * &factor)?;
        shift = (shift.broadcast_mul(&factor)? + parts[1].unsqueeze(2)?)?;
    }
    let y = centred.reshape((batch, channels, ()))?.broadcast_mul(&scale)?;
    y.broadcast_add(&shift)?.reshape(x.shape())?.to_dtype(x.dtype())
}

/// Layer norm over the channels of each pixel, then `y·scale + shift` with `[B, channels, 1, 1]` each.
fn modulate(x: &Tensor, eps: f64, scale: &Tensor, shift: &Tensor) -> Result<Tensor> {
    let wide = x.to_dtype(working(x.dtype()))?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(1)?)?;
    let deviation = (centred.sqr()?.mean_keepdim(1)? + eps)?.sqrt()?;
    let normed = centred.broadcast_div(&deviation)?.to_dtype(x.dtype())?;
    normed.broadcast_mul(scale)?.broadcast_add(shift)
}

/// Each head by its root mean square, times weight `[channels of a head]` and `factor`.
fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, factor: f32) -> Result<Tensor> {
    let (batch, channels, height, width) = x.dims4()?;
    let wide = x.to_dtype(weight.dtype())?;
    let heads = wide.reshape((batch, channels / weight.dim(0)?, (), height * width))?;
    let scale = (heads.sqr()?.mean_keepdim(2)? + eps)?.sqrt()?;
    let weight = (weight.reshape((1, 1, (), 1))? * f64::from(factor))?;
    let normed = heads.broadcast_div(&scale)?.broadcast_mul(&weight)?;
    normed.reshape(x.shape())?.to_dtype(x.dtype())
}

/// Some channels of a map as `[B·heads, channels of a head, pixels]`.
fn heads_of<'a>(
    slice: &Slice,
    heads: usize,
    map: impl Fn(Map) -> Result<&'a Tensor>,
) -> Result<Tensor> {
    let part = map(slice.map)?.narrow(1, slice.start, slice.width)?;
    let (batch, _, height, width) = part.dims4()?;
    part.reshape((batch * heads, slice.width / heads, height * width))
}

/// Scores are `[B·heads, queries, keys]`; values are gathered as `[B·heads, channels of a head, queries]`.
/// What `hidden` has is added to them.
fn attend(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    hidden: Option<Tensor>,
) -> Result<Tensor> {
    // Half types have no room for the sums of scores.
    let dtype = working(queries.dtype());
    let (wide, keys) = (queries.to_dtype(dtype)?, keys.to_dtype(dtype)?);
    let mut scores = wide.transpose(1, 2)?.matmul(&keys)?;
    if let Some(hidden) = hidden {
        scores = scores.broadcast_add(&hidden.to_dtype(dtype)?)?;
    }
    let weights = softmax(&scores)?.to_dtype(values.dtype())?;
    values.matmul(&weights.transpose(1, 2)?)
}

/// Minus infinity for keys after a query's own place, of keys `[B·heads, channels, keys]`: `[1, keys, keys]`.
fn later(keys: &Tensor) -> Result<Tensor> {
    let count = keys.dim(2)?;
    let hidden = |query: usize, key: usize| if key > query { f32::NEG_INFINITY } else { 0.0 };
    let mask: Vec<f32> = (0..count * count).map(|i| hidden(i / count, i % count)).collect();
    Tensor::from_vec(mask, (1, count, count), keys.device())
}

/// Minus infinity for the zeros that prompts `[B, tokens, width]` end with, unless there is nothing else: `[B·heads, 1,
/// tokens]`.
fn filling(prompt: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, tokens, _) = prompt.dims3()?;
    let device = prompt.device();
    let told = prompt.detach().abs()?.max(D::Minus1)?.gt(0.0)?.to_dtype(DType::F32)?;
    let places = Tensor::arange(1f32, tokens as f32 + 1.0, device)?.unsqueeze(0)?;
    let last = told.broadcast_mul(&places)?.max_keepdim(1)?;
    let all = Tensor::full(tokens as f32, last.shape(), device)?;
    let count = last.gt(0.0)?.where_cond(&last, &all)?;
    let hidden = places.broadcast_as((batch, tokens))?.gt(&count.broadcast_as((batch, tokens))?)?;
    let infinite = Tensor::full(f32::NEG_INFINITY, (batch, tokens), device)?;
    let mask = hidden.where_cond(&infinite, &infinite.zeros_like()?)?;
    let mask = mask.unsqueeze(1)?.broadcast_as((batch, heads, tokens))?.contiguous()?;
    mask.reshape((batch * heads, 1, tokens))
}

/// Softmax over the last dimension.
fn softmax(x: &Tensor) -> Result<Tensor> {
    if x.track_op() {
        candle_nn::ops::softmax(x, D::Minus1)
    } else {
        candle_nn::ops::softmax_last_dim(x)
    }
}

/// An element-wise function.
pub(crate) fn apply(function: Function, x: &Tensor) -> Result<Tensor> {
    match function {
        Function::Identity => Ok(x.clone()),
        Function::Silu => x.silu(),
        Function::Gelu => x.gelu_erf(),
        Function::GeluTanh => x.gelu(),
        Function::QuickGelu => x * ((x * -1.702)?.exp()? + 1.0)?.recip()?,
        Function::Relu => x.relu(),
        Function::SoftClamp => (x / 3.0)?.tanh()? * 3.0,
        // ln(1 + eˣ) = max(x, 0) + ln(1 + e^−|x|), which cannot overflow.
        Function::Mish => x * (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?.tanh()?,
    }
}

/// The type that sums over many values are worked out in.
fn working(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}
