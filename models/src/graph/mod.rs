//! What a network does, as a list of operations: the one description of an architecture.
//!
//! A configuration records its graph ([`GraphBuilder`]). Everything else is read off it: the names and shapes of the
//! weights, the channels that stand or fall together ([`Graph::channels`]), the kernels for the CPU ([`crate::cpu`]),
//! those for a GPU (`crate::gpu`), candle's operations for any element type and device ([`crate::eager`]), and the order
//! of the gradients ([`backward`]). A graph holds no tensor and knows no batch.

pub(crate) mod backward;
mod builder;
mod channels;
mod lower;
mod positions;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::BTreeMap;

use crate::kernels::{Function, Taps};

pub(crate) use builder::{GraphBuilder, Name, query_scale};
pub(crate) use lower::{Backend, lower};
pub(crate) use positions::{Grid, positions};

/// A map of each sample, of pixels (or tokens) and channels. One operation writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Map(pub(crate) usize);

/// How large a map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) channels: usize,
}

/// What a map is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Features of an image's pixels, or of tokens.
    Features,
    /// One vector of each sample, such as the time embedding: a map of one pixel, always f32.
    Vector,
    /// The network's answer, always f32 on the CPU.
    Answer,
}

/// A map's size, and what it is for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MapInfo {
    pub(crate) size: Size,
    pub(crate) kind: Kind,
}

/// A weight, by its place in [`Graph::weights`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WeightId(pub(crate) usize);

/// A weight's name, as diffusers has it, and its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WeightSpec {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// How many operations read it.
    pub(crate) readers: usize,
}

/// One number of each sample that the network is given beside the noisy sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Scalar {
    /// The time.
    Time,
    /// The condition: a class, or a number.
    Condition,
    /// How far guidance goes beyond a prompt, in thousandths (Meng et al. 2023, who distil it).
    Guidance,
    /// The same for every sample.
    Number(f32),
}

/// What sines and cosines are taken of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Wave {
    /// `x·ω` with `ω_i = 10000^(−i / (half − shift))` (Vaswani et al. 2017, §3.5). An odd width ends with a zero.
    Positional { shift: f64, cosines_first: bool },
    /// `2π·w·ln x` with random weights `w` (Song et al. 2021).
    Fourier { weight: WeightId },
}

/// One product of a linear operation: `factor·(weight·x + bias)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    /// `[outputs, inputs]`, or a kernel of as many numbers.
    pub(crate) weight: WeightId,
    /// `[outputs]`.
    pub(crate) bias: Option<WeightId>,
    pub(crate) factor: f64,
}

/// What else goes into the sums of a convolution or linear operation: `factor·(sums + offset + residual)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Epilogue {
    /// A vector, added at every pixel.
    pub(crate) offset: Option<Map>,
    pub(crate) residual: Option<Map>,
    pub(crate) factor: f32,
}

impl Default for Epilogue {
    fn default() -> Self {
        Self { offset: None, residual: None, factor: 1.0 }
    }
}

/// Some channels of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slice {
    pub(crate) map: Map,
    /// The first channel.
    pub(crate) start: usize,
    /// How many.
    pub(crate) width: usize,
}

/// What a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sees {
    /// Every key.
    All,
    /// No key after its own place.
    Earlier,
    /// The keys of a prompt's tokens, but for the zeros that fill a shorter one at its end; all, where there is nothing
    /// else.
    Prompt,
}

/// One operation; `to` is what it writes.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    /// `factor·x + shift` of what the network is asked about, in patches where the graph says so: a noisy sample, or, of a
    /// network without time, a latent or an image.
    Sample { factor: f32, shift: f32, to: Map },
    /// Sines and cosines of a number of each sample; a vector.
    Sinusoid { of: Scalar, wave: Wave, to: Map },
    /// Each sample's row of a table `[rows, channels]`; a vector.
    Row { of: Scalar, table: WeightId, to: Map },
    /// The condition as it comes; a vector.
    Condition { to: Map },
    /// The first `text` numbers of the condition as they come, and sines and cosines of each of the `numbers` others, of
    /// positional waves; a vector.
    TextTime { text: usize, numbers: usize, shift: f64, cosines_first: bool, to: Map },
    /// Of each token the row of a table `[rows, channels]`, plus that of its place in another, `[tokens, channels]`: what a
    /// text encoder is asked about are the numbers of tokens.
    Embed { table: WeightId, places: WeightId, to: Map },
    /// The hidden states of a prompt, each of its tokens a pixel. It has no gradient on the CPU.
    Prompt { to: Map },
    /// Of each pixel the row of a table `[rows, channels]` that is nearest, by squared distance; of several the first. It
    /// has no gradient.
    Nearest { source: Map, table: WeightId, to: Map },
    /// Sines and cosines of each pixel's column and row ([`positions`]), the same for every sample. It has no gradient.
    Positions { grid: Grid, to: Map },
    /// The middle of a square table of places, `[1, side·side, channels]`, the same for every sample. It has no gradient.
    Crop { table: WeightId, side: usize, to: Map },
    /// Weights, one after another as `[pixels, channels]`, the same for every sample.
    Learned { weights: Vec<WeightId>, to: Map },
    /// A product with a vector, which becomes the offset or the modulation of other operations. Those of one vector may
    /// be done together.
    Project { source: Map, product: Product, to: Map },
    /// A linear map of each pixel: the channels of all sources, times all products, one after another in the channels.
    Linear { sources: Vec<Map>, products: Vec<Product>, epilogue: Epilogue, to: Map },
    /// A convolution.
    Convolve { source: Map, product: Product, taps: Taps, epilogue: Epilogue, to: Map },
    /// Group norm (Wu & He 2018) over the channels of one or two sources, times one plus the first half of `modulation`,
    /// plus its second half, then `function`.
    GroupNorm {
        sources: Vec<Map>,
        weight: WeightId,
        bias: WeightId,
        groups: usize,
        eps: f64,
        modulation: Option<Map>,
        function: Function,
        to: Map,
    },
    /// The values, averaged for each query and head with weights `softmax(query · keys)` (Vaswani et al. 2017); the
    /// queries are scaled already.
    Attend { queries: Slice, keys: Slice, values: Slice, heads: usize, sees: Sees, to: Map },
    /// The pixels of all sources, one after another.
    Join { sources: Vec<Map>, to: Map },
    /// Some pixels of a map: as many as `to` has, from `first` on.
    Take { source: Map, first: usize, to: Map },
    /// Each head of a pixel, as many channels as the weight has, by its root mean square (Zhang & Sennrich 2019), times the
    /// weight and `factor`.
    RmsNorm { source: Map, weight: WeightId, eps: f64, factor: f32, to: Map },
    /// The mean of each four pixels.
    Downsample { source: Map, to: Map },
    /// Each pixel as four.
    Upsample { source: Map, to: Map },
    /// Layer norm of each pixel (Ba et al. 2016), times part `scale` of `vector`, to which one is added where it is a
    /// change, plus part `shift`; a part has as many numbers as the source has channels.
    Modulate {
        source: Map,
        eps: f64,
        vector: Map,
        scale: usize,
        shift: usize,
        plus_one: bool,
        to: Map,
    },
    /// `residual + gate·source`, with part `gate` of `vector`.
    Gate { source: Map, residual: Map, vector: Map, gate: usize, to: Map },
    /// `a·gelu(b)` of the first and second half of the channels (Shazeer 2020, GEGLU), with the exact function.
    Geglu { source: Map, to: Map },
    /// A vector plus the others, one after another; they are as long together.
    Sum { source: Map, parts: Vec<Map>, to: Map },
    /// An element-wise function.
    Activate { source: Map, function: Function, to: Map },
    /// An answer of the network: `factor·x + shift`; divided by the time, where that is a noise level.
    Answer { source: Map, divided: bool, factor: f32, shift: f32 },
}

/// The vectors that a network's time and condition become before its first product, as they lie side by side in a
/// compiled network's input.
#[derive(Debug)]
pub(crate) struct Features {
    /// Each vector, and where it begins.
    pub(crate) starts: Vec<(Map, usize)>,
    /// Numbers of all of them.
    pub(crate) total: usize,
}

impl Features {
    /// Where a vector begins.
    pub(crate) fn start(&self, map: Map) -> usize {
        let found = self.starts.iter().find(|(one, _)| *one == map);
        found.map_or(0, |(_, start)| *start)
    }
}

/// A network.
#[derive(Debug, Clone)]
pub(crate) struct Graph {
    pub(crate) ops: Vec<Op>,
    pub(crate) maps: Vec<MapInfo>,
    pub(crate) weights: Vec<WeightSpec>,
    /// Pixels of a patch's side: the noisy sample comes in as squares of so many pixels, one of them a pixel of
    /// `side·side` times the channels, and the answer goes out as such. 1 for networks over pixels.
    pub(crate) patch: usize,
}

impl Op {
    /// The vector that time or condition becomes by it; nothing of other operations.
    pub(crate) fn feature(&self) -> Option<Map> {
        match *self {
            Self::Sinusoid { to, .. }
            | Self::Row { to, .. }
            | Self::Condition { to }
            | Self::TextTime { to, .. } => Some(to),
            _ => None,
        }
    }

    /// What it writes; nothing for the last.
    pub(crate) fn to(&self) -> Option<Map> {
        match *self {
            Self::Sample { to, .. }
            | Self::Sinusoid { to, .. }
            | Self::Row { to, .. }
            | Self::Condition { to }
            | Self::TextTime { to, .. }
            | Self::Prompt { to }
            | Self::Embed { to, .. }
            | Self::Nearest { to, .. }
            | Self::Positions { to, .. }
            | Self::Crop { to, .. }
            | Self::Learned { to, .. }
            | Self::Project { to, .. }
            | Self::Linear { to, .. }
            | Self::Convolve { to, .. }
            | Self::GroupNorm { to, .. }
            | Self::Attend { to, .. }
            | Self::Join { to, .. }
            | Self::Take { to, .. }
            | Self::RmsNorm { to, .. }
            | Self::Downsample { to, .. }
            | Self::Upsample { to, .. }
            | Self::Modulate { to, .. }
            | Self::Gate { to, .. }
            | Self::Geglu { to, .. }
            | Self::Sum { to, .. }
            | Self::Activate { to, .. } => Some(to),
            Self::Answer { .. } => None,
        }
    }

    /// What it reads, each map once.
    pub(crate) fn reads(&self) -> Vec<Map> {
        let mut maps = match self {
            Self::Sample { .. }
            | Self::Sinusoid { .. }
            | Self::Row { .. }
            | Self::Condition { .. }
            | Self::TextTime { .. }
            | Self::Prompt { .. }
            | Self::Embed { .. }
            | Self::Positions { .. }
            | Self::Crop { .. }
            | Self::Learned { .. } => Vec::new(),
            Self::Linear { sources, epilogue, .. } => {
                let more = epilogue.offset.into_iter().chain(epilogue.residual);
                sources.iter().copied().chain(more).collect()
            }
            Self::Convolve { source, epilogue, .. } => {
                [*source].into_iter().chain(epilogue.offset).chain(epilogue.residual).collect()
            }
            Self::Join { sources, .. } => sources.clone(),
            Self::GroupNorm { sources, modulation, .. } => {
                sources.iter().copied().chain(*modulation).collect()
            }
            Self::Attend { queries, keys, values, .. } => vec![queries.map, keys.map, values.map],
            Self::Project { source, .. }
            | Self::Nearest { source, .. }
            | Self::Take { source, .. }
            | Self::RmsNorm { source, .. }
            | Self::Downsample { source, .. }
            | Self::Upsample { source, .. }
            | Self::Geglu { source, .. }
            | Self::Activate { source, .. }
            | Self::Answer { source, .. } => vec![*source],
            Self::Sum { source, parts, .. } => [*source].into_iter().chain(parts.clone()).collect(),
            Self::Modulate { source, vector, .. } => vec![*source, *vector],
            Self::Gate { source, residual, vector, .. } => vec![*source, *residual, *vector],
        };
        maps.sort_by_key(|map| map.0);
        maps.dedup();
        maps
    }
}

impl Graph {
    /// A map's size.
    pub(crate) fn size(&self, map: Map) -> Size {
        self.maps[map.0].size
    }

    /// A weight's name and shape.
    pub(crate) fn weight(&self, id: WeightId) -> &WeightSpec {
        &self.weights[id.0]
    }

    /// Names and shapes of all weights.
    pub(crate) fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.weights.iter().map(|spec| (spec.name.clone(), spec.shape.clone())).collect()
    }

    /// How many operations read each map.
    pub(crate) fn uses(&self) -> Vec<usize> {
        let mut uses = vec![0; self.maps.len()];
        for op in &self.ops {
            for map in op.reads() {
                uses[map.0] += 1;
            }
        }
        uses
    }

    /// The vectors that time and condition become.
    pub(crate) fn features(&self) -> Features {
        let mut features = Features { starts: Vec::new(), total: 0 };
        for op in &self.ops {
            if let Some(to) = op.feature() {
                features.starts.push((to, features.total));
                features.total += self.size(to).channels;
            }
        }
        features
    }

    /// Floats of one sample's largest map.
    pub(crate) fn largest_map(&self) -> u64 {
        let floats = |info: &MapInfo| {
            let Size { height, width, channels } = info.size;
            [height, width, channels].into_iter().fold(1u64, |all, n| all.saturating_mul(n as u64))
        };
        self.maps.iter().map(floats).max().unwrap_or(0)
    }

    /// The network in two: what time and condition come to, whose answer is the vector that is projected, and the rest,
    /// whose condition that vector is. Nothing where none is projected.
    #[cfg(feature = "cuda")]
    pub(crate) fn split(&self) -> Option<[Self; 2]> {
        let vector = self.ops.iter().find_map(|op| match op {
            Op::Project { source, .. } => Some(*source),
            _ => None,
        })?;
        let last = self.ops.iter().position(|op| op.to() == Some(vector))?;
        let (before, after) = self.ops.split_at(last + 1);
        let of_vectors = |op: &Op| op.to().is_some_and(|to| self.maps[to.0].kind == Kind::Vector);
        if !before.iter().all(of_vectors) {
            return None;
        }
        let with = |ops: Vec<Op>| Self { ops, ..self.clone() };
        let answer = [Op::Answer { source: vector, divided: false, factor: 1.0, shift: 0.0 }];
        let condition = [Op::Condition { to: vector }];
        Some([[before, &answer[..]].concat(), [&condition[..], after].concat()].map(with))
    }

    /// Whether a map's gradient is of use: it comes from weights, or from the noisy sample or the condition.
    pub(crate) fn learns(&self, map: Map) -> bool {
        let given = |op: &Op| {
            matches!(
                op,
                Op::Positions { .. } | Op::Crop { .. } | Op::Prompt { .. } | Op::Nearest { .. }
            )
        };
        self.ops.iter().any(|op| op.to() == Some(map) && !given(op))
    }

    /// Whether every operation has its gradient among the CPU's kernels; all have one in [`crate::eager`].
    pub(crate) fn has_gradients(&self) -> bool {
        let with = |op: &Op| !matches!(op, Op::Join { .. } | Op::Take { .. } | Op::RmsNorm { .. });
        self.answers().len() == 1 && self.ops.iter().all(with)
    }

    /// Whether some attention looks at how long a prompt is.
    pub(crate) fn counts_tokens(&self) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::Attend { sees: Sees::Prompt, .. }))
    }

    /// The map of the prompt, where the network takes one.
    pub(crate) fn prompt(&self) -> Option<Map> {
        self.ops.iter().find_map(|op| match *op {
            Op::Prompt { to } => Some(to),
            _ => None,
        })
    }

    /// Maps of all answers, and their sizes, in their order.
    pub(crate) fn answers(&self) -> Vec<(Map, Size)> {
        let answer = |op: &Op| match *op {
            Op::Answer { source, .. } => Some((source, self.size(source))),
            _ => None,
        };
        self.ops.iter().filter_map(answer).collect()
    }

    /// The size of the last answer, and whether it is divided by the time.
    pub(crate) fn answer(&self) -> (Size, bool) {
        match self.ops.last() {
            Some(&Op::Answer { source, divided, .. }) => (self.size(source), divided),
            _ => unreachable!("a graph ends with its answer"),
        }
    }

    /// Numbers of what the network is asked about.
    pub(crate) fn asked(&self) -> usize {
        let Size { height, width, channels } = self.size(self.sample().0);
        let embeds = self.ops.iter().any(|op| matches!(op, Op::Embed { .. }));
        height * width * if embeds { 1 } else { channels }
    }

    /// The map of the noisy sample, and what it is multiplied with as it comes in.
    pub(crate) fn sample(&self) -> (Map, f32) {
        let sample = self.ops.iter().find_map(|op| match *op {
            Op::Sample { factor, to, .. } => Some((to, factor)),
            Op::Embed { to, .. } => Some((to, 1.0)),
            _ => None,
        });
        sample.unwrap_or_else(|| unreachable!("a graph reads the noisy sample"))
    }
}
