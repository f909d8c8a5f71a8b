//! A network that was made narrower is fitted to the larger one, layer by layer.
//!
//! Both are shown the same samples. In the order in which they run, every norm of the narrower network gets the scales and shifts,
//! and every product the weights and bias, with which it comes nearest, by least squares, to what the larger one has in the
//! channels that were kept. A layer is fitted on what the layers before it give now, so it mends their errors too; a product
//! whose sums are added to others is fitted to the sum (He et al. 2017, arXiv 1707.06168, §3.1 and §3.2).

use std::collections::{BTreeMap, HashMap};

use candle_core::{D, DType, Device, Tensor, bail};

use crate::channels::Kept;
use crate::denoiser::Conditions;
use crate::eager::Eager;
use crate::graph::{Map, Op, Product, WeightId};
use crate::kernels::{Function, Taps};
use crate::least_squares::Normal;
use crate::weight::here;
use crate::weights::Weights;
use crate::{NetworkConfig, Result};

/// Samples that both networks are shown at a time.
#[derive(Debug, Clone)]
pub struct Shown {
    /// x_t, f32 `[B, C, H, W]`.
    pub x: Tensor,
    /// t, f32 `[B]`.
    pub timesteps: Tensor,
    /// The class of each, u32 `[B]`, for class-conditional networks.
    pub condition: Option<Tensor>,
}

/// A network and its weights, f32 on the CPU.
pub type Weighted<'a> = (&'a NetworkConfig, &'a BTreeMap<String, Tensor>);

/// The weights of a narrower network, fitted to `larger` on what is `shown`, some samples after another.
///
/// # Errors
/// [`crate::Error::Weights`] for weights that are not the networks'; networks whose layers follow one another in other orders.
pub fn repair(
    larger: Weighted<'_>,
    narrower: Weighted<'_>,
    kept: &Kept,
    shown: &[Shown],
) -> Result<BTreeMap<String, Tensor>> {
    let mut weights = narrower.1.clone();
    let (mut larger, mut own) = (Walk::new(larger, shown)?, Walk::new(narrower, shown)?);
    for index in 0..own.network.graph().ops.len() {
        let op = own.network.graph().ops[index].clone();
        let fitted = match &op {
            Op::GroupNorm { weight, bias, .. } => {
                let name = own.name(*weight);
                match larger.reach_layer(&name)? {
                    Some(their) => {
                        own.fit_norm(index, [*weight, *bias], (&mut larger, their), kept)?
                    }
                    None => Vec::new(),
                }
            }
            Op::Project { product, .. } | Op::Convolve { product, .. } => {
                own.fit(index, &[*product], &mut larger, kept)?
            }
            Op::Linear { products, .. } => own.fit(index, &products.clone(), &mut larger, kept)?,
            _ => Vec::new(),
        };
        weights.extend(fitted);
        own.step()?;
    }
    Ok(weights)
}

/// A network on its way through its operations, over all samples at once.
struct Walk<'a> {
    network: Eager,
    shown: &'a [Shown],
    /// The maps that are still needed, of each.
    maps: Vec<Vec<Option<Tensor>>>,
    uses: Vec<usize>,
    next: usize,
}

impl<'a> Walk<'a> {
    fn new((config, weights): Weighted<'_>, shown: &'a [Shown]) -> Result<Self> {
        let weights: HashMap<String, Tensor> = weights.clone().into_iter().collect();
        let weights = Weights::new(here(config.fit(weights)?), DType::F32, &Device::Cpu);
        let graph = config.graph();
        let maps = vec![vec![None; graph.maps.len()]; shown.len()];
        let uses = graph.uses();
        Ok(Self { network: Eager::new(graph, &weights, DType::F32)?, shown, maps, uses, next: 0 })
    }

    fn name(&self, id: WeightId) -> String {
        self.network.graph().weight(id).name.clone()
    }

    /// What the next operation makes of sample set `i`, or what it would if it were `op`.
    fn made(&self, op: &Op, i: usize) -> candle_core::Result<Tensor> {
        let Shown { x, timesteps, condition } = &self.shown[i];
        let conditions = Conditions { condition: condition.as_ref(), ..Conditions::default() };
        self.network.made(self.next, op, x, (timesteps, conditions), &self.maps[i])
    }

    /// Does the next operation.
    fn step(&mut self) -> Result<()> {
        let op = self.network.graph().ops[self.next].clone();
        for i in 0..self.shown.len() {
            if let Some(to) = op.to() {
                let made = self.made(&op, i)?;
                self.maps[i][to.0] = Some(made);
            }
        }
        for map in op.reads() {
            self.uses[map.0] -= 1;
            if self.uses[map.0] == 0 {
                self.maps.iter_mut().for_each(|maps| maps[map.0] = None);
            }
        }
        self.next += 1;
        Ok(())
    }

    /// Goes on until just before the layer that reads the weight `name`; nothing where none does.
    fn reach_layer(&mut self, name: &str) -> Result<Option<Op>> {
        let ops = &self.network.graph().ops;
        let reads = |op: &Op| match op {
            Op::GroupNorm { weight, .. } => self.name(*weight) == name,
            Op::Project { product, .. } | Op::Convolve { product, .. } => {
                self.name(product.weight) == name
            }
            Op::Linear { products, .. } => self.name(products[0].weight) == name,
            _ => false,
        };
        let Some(place) = ops.iter().position(reads) else { return Ok(None) };
        if place < self.next {
            let problem = format!("`{name}` comes earlier in the larger network");
            return Err(crate::Error::Weights(problem));
        }
        let op = ops[place].clone();
        while self.next < place {
            self.step()?;
        }
        Ok(Some(op))
    }

    /// A map of sample set `i`.
    fn map(&self, map: Map, i: usize) -> candle_core::Result<&Tensor> {
        match &self.maps[i][map.0] {
            Some(tensor) => Ok(tensor),
            None => bail!("map {} is read before it is written", map.0),
        }
    }

    /// Fits the products of the next operation, and gives their new weights by name.
    fn fit(
        &mut self,
        index: usize,
        products: &[Product],
        larger: &mut Walk<'_>,
        kept: &Kept,
    ) -> Result<Vec<(String, Tensor)>> {
        let op = self.network.graph().ops[index].clone();
        let first = self.name(products[0].weight);
        let Some(their) = larger.reach_layer(&first)? else { return Ok(Vec::new()) };
        larger.step()?;
        let Some(to) = their.to() else { return Ok(Vec::new()) };
        let outputs =
            |walk: &Self, product: &Product| walk.network.graph().weight(product.weight).shape[0];
        let [mut own_start, mut their_start] = [0, 0];
        let mut fitted = Vec::new();
        for product in products {
            let name = self.name(product.weight);
            let theirs = larger.network.graph().weights.iter().find(|spec| spec.name == name);
            let width = theirs.map_or(0, |spec| spec.shape[0]);
            let count = outputs(self, product);
            let indices = match kept.along(&name, 0) {
                Some(indices) => indices.iter().map(|it| it + their_start as u32).collect(),
                None => (their_start as u32..(their_start + width) as u32).collect::<Vec<_>>(),
            };
            let indices = Tensor::new(indices, &Device::Cpu)?;
            let inputs: usize =
                self.network.graph().weight(product.weight).shape[1..].iter().product();
            let unknowns = inputs + usize::from(product.bias.is_some());
            let mut normal = Normal::new(unknowns, count);
            for i in 0..self.shown.len() {
                let target = larger.map(to, i)?.index_select(&indices, 1)?;
                let now = self.made(&op, i)?.narrow(1, own_start, count)?;
                let missing = pixels(&(target - now)?)?;
                let factor = product.factor * f64::from(epilogue_factor(&op));
                normal.add(&self.columns(&op, i, product.bias.is_some())?, &(missing / factor)?)?;
            }
            let change: Vec<f32> = normal.solve().into_iter().map(|it| it as f32).collect();
            let change = Tensor::from_vec(change, (unknowns, count), &Device::Cpu)?.t()?;
            fitted.extend(self.changed(product.weight, &change.narrow(1, 0, inputs)?)?);
            if let Some(bias) = product.bias {
                fitted.extend(self.changed(bias, &change.narrow(1, inputs, 1)?)?);
            }
            own_start += count;
            their_start += width;
        }
        Ok(fitted)
    }

    /// Adds to a weight, and gives its name and what it is now.
    fn changed(&mut self, id: WeightId, change: &Tensor) -> Result<Option<(String, Tensor)>> {
        let name = self.name(id);
        let Some(weight) = self.network.weight_mut(id) else { return Ok(None) };
        *weight = (&*weight + change.contiguous()?.reshape(weight.shape())?)?;
        Ok(Some((name, weight.clone())))
    }

    /// What the next operation's product is of, in sample set `i`: `[pixels, inputs]`, with a column of ones for a bias.
    fn columns(&self, op: &Op, i: usize, bias: bool) -> candle_core::Result<Tensor> {
        let columns = match op {
            Op::Project { source, .. } => pixels(self.map(*source, i)?)?,
            Op::Convolve { source, taps, .. } => seen(self.map(*source, i)?, *taps)?,
            Op::Linear { sources, .. } => {
                let sources: Vec<&Tensor> =
                    sources.iter().map(|&map| self.map(map, i)).collect::<Result<_, _>>()?;
                pixels(&Tensor::cat(&sources, 1)?)?
            }
            _ => bail!("the operation has no product"),
        };
        if !bias {
            return Ok(columns);
        }
        let ones = Tensor::ones((columns.dim(0)?, 1), DType::F32, &Device::Cpu)?;
        Tensor::cat(&[columns, ones], 1)
    }

    /// Fits the scales and shifts of the next operation, a norm, to those of `larger`'s, which is its next.
    fn fit_norm(
        &mut self,
        index: usize,
        ids: [WeightId; 2],
        (larger, their): (&mut Walk<'_>, Op),
        kept: &Kept,
    ) -> Result<Vec<(String, Tensor)>> {
        let op = bare(&self.network.graph().ops[index]);
        let their = bare(&their);
        let indices = kept.along(&self.name(ids[0]), 0);
        // Sums of x, y, x² and xy of each channel.
        let mut sums: [Option<Tensor>; 4] = [const { None }; 4];
        let mut count = 0;
        for i in 0..self.shown.len() {
            let x = pixels(&self.made(&op, i)?)?.to_dtype(DType::F64)?;
            let mut y = larger.made(&their, i)?;
            if let Some(indices) = &indices {
                y = y.index_select(&Tensor::new(&indices[..], &Device::Cpu)?, 1)?;
            }
            let y = pixels(&y)?.to_dtype(DType::F64)?;
            count += x.dim(0)?;
            for (sum, more) in sums.iter_mut().zip([x.clone(), y.clone(), x.sqr()?, (&x * &y)?]) {
                let more = more.sum(0)?;
                *sum = Some(match sum.take() {
                    Some(sum) => (sum + more)?,
                    None => more,
                });
            }
        }
        let sums: Vec<Vec<f64>> =
            sums.into_iter().flatten().map(|it| it.to_vec1()).collect::<Result<_, _>>()?;
        let [x, y, xx, xy] = &sums[..] else { return Ok(Vec::new()) };
        let n = count as f64;
        let (mut scales, mut shifts) = (Vec::new(), Vec::new());
        for c in 0..x.len() {
            let (mx, my) = (x[c] / n, y[c] / n);
            let (variance, covariance) = (xx[c] / n - mx * mx, xy[c] / n - mx * my);
            let scale = if variance > 1e-12 { covariance / variance } else { 1.0 };
            scales.push(scale as f32);
            shifts.push((my - scale * mx) as f32);
        }
        let mut fitted = Vec::new();
        for (id, shift) in ids.into_iter().zip([None, Some(shifts)]) {
            let name = self.name(id);
            let Some(weight) = self.network.weight_mut(id) else { continue };
            let scaled = (&*weight * Tensor::new(&scales[..], &Device::Cpu)?)?;
            *weight = match shift {
                Some(shift) => (scaled + Tensor::new(shift, &Device::Cpu)?)?,
                None => scaled,
            };
            fitted.push((name, weight.clone()));
        }
        Ok(fitted)
    }
}

/// A norm by itself: nothing modulates it, and no function follows.
fn bare(op: &Op) -> Op {
    let mut op = op.clone();
    if let Op::GroupNorm { modulation, function, .. } = &mut op {
        (*modulation, *function) = (None, Function::Identity);
    }
    op
}

fn epilogue_factor(op: &Op) -> f32 {
    match op {
        Op::Linear { epilogue, .. } | Op::Convolve { epilogue, .. } => epilogue.factor,
        _ => 1.0,
    }
}

/// `[B, channels, H, W]` → `[B·H·W, channels]`.
fn pixels(map: &Tensor) -> candle_core::Result<Tensor> {
    let channels = map.dim(1)?;
    map.permute((0, 2, 3, 1))?.reshape(((), channels))
}

/// What each tap of a convolution sees: `[B, channels, H, W]` → `[B·H'·W', channels·taps]`.
fn seen(map: &Tensor, taps: Taps) -> candle_core::Result<Tensor> {
    let Taps { side, stride, padding, doubled } = taps;
    let map = match doubled {
        true => map.upsample_nearest2d(2 * map.dim(2)?, 2 * map.dim(3)?)?,
        false => map.clone(),
    };
    // Without padding above and left there is one row and column of zeros below and right.
    let before = padding;
    let after = if side == 3 && padding == 0 && stride == 2 { 1 } else { padding };
    let map = map.pad_with_zeros(2, before, after)?.pad_with_zeros(3, before, after)?;
    let (_, channels, height, width) = map.dims4()?;
    let [rows, columns] = [height, width].map(|length| (length - side) / stride + 1);
    let every = |count: usize, first: usize| {
        let places: Vec<u32> = (0..count).map(|i| (first + i * stride) as u32).collect();
        Tensor::new(places, &Device::Cpu)
    };
    let mut all = Vec::new();
    for y in 0..side {
        let lines = map.index_select(&every(rows, y)?, 2)?;
        for x in 0..side {
            all.push(lines.index_select(&every(columns, x)?, 3)?);
        }
    }
    // Channels, then taps, as in a kernel.
    let all = Tensor::stack(&all, 2)?.flatten(1, 2)?;
    debug_assert_eq!(all.dim(1)?, channels * side * side);
    all.permute((0, 2, 3, 1))?.flatten(0, 2)?.contiguous()?.reshape(((), all.dim(D::Minus(3))?))
}
