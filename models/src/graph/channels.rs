//! Which channels of a network stand or fall together, read off its graph.
//!
//! Maps that are added have the same channels; so do queries and keys. A norm's groups and the heads of an attention
//! divide channels into parts of equal size.

use super::{Graph, Kind, Map, Op, Product, Slice, Wave, WeightId};
use crate::channels::{ChannelSet, Channels, Choice};

impl Graph {
    /// The channel sets, and which weights have them along which dimension; nothing for a network that has no narrower
    /// twin: one whose time is told by random frequencies, which takes a vector as wide as it is, or whose channels are
    /// told apart by the sines of a token's place. A prompt's channels are its encoder's, and belong to no set.
    pub(crate) fn channels(&self) -> Option<Channels> {
        let mut sets = Sets::default();
        let mut of: Vec<Vec<usize>> = vec![Vec::new(); self.maps.len()];
        for op in &self.ops {
            match op {
                Op::Condition { .. }
                | Op::TextTime { .. }
                | Op::Embed { .. }
                | Op::Nearest { .. }
                | Op::Positions { .. }
                | Op::Crop { .. }
                | Op::Join { .. }
                | Op::Take { .. }
                | Op::RmsNorm { .. }
                | Op::Modulate { plus_one: true, .. }
                | Op::Gate { .. }
                | Op::Sum { .. }
                | Op::Sinusoid { wave: Wave::Fourier { .. }, .. } => return None,
                Op::Learned { to, .. } if self.normed_by(*to).is_none() => return None,
                // Channels of an image or a prompt belong to no set; those of a projection, and a norm's, are its readers'.
                Op::Sample { .. }
                | Op::Prompt { .. }
                | Op::Project { .. }
                | Op::Learned { .. }
                | Op::Answer { .. } => {}
                Op::Modulate { source, to, .. } => of[to.0] = of[source.0].clone(),
                // Both halves have the same channels.
                Op::Geglu { source, to } => {
                    of[to.0] = of[source.0].iter().copied().take(1).collect()
                }
                Op::Sinusoid { wave, to, .. } => {
                    let width = self.size(*to).channels;
                    let known = self.same(op, |one| {
                        matches!(one, Op::Sinusoid { wave: w, to, .. }
                        if w == wave && self.size(*to).channels == width)
                    });
                    of[to.0] = match known {
                        Some(known) => of[known.0].clone(),
                        None => vec![sets.set(width, Choice::Frequencies)],
                    };
                }
                Op::Row { table, to, .. } => {
                    let known =
                        self.same(op, |one| matches!(one, Op::Row { table: t, .. } if t == table));
                    of[to.0] = match known {
                        Some(known) => of[known.0].clone(),
                        None => vec![sets.set(self.size(*to).channels, Choice::Any)],
                    };
                }
                Op::Linear { products, epilogue, to, .. } => {
                    let width = |product: &Product| self.weight(product.weight).shape[0];
                    let widths: Vec<usize> = products.iter().map(width).collect();
                    of[to.0] = if self.is_gated(*to) {
                        let half = sets.set(widths[0] / 2, Choice::Any);
                        vec![half, half]
                    } else {
                        self.sums(&mut sets, &of, *to, &widths, epilogue.residual)
                    };
                }
                Op::Convolve { epilogue, to, .. } => {
                    let widths = [self.size(*to).channels];
                    of[to.0] = self.sums(&mut sets, &of, *to, &widths, epilogue.residual);
                    if let Some(offset) = epilogue.offset {
                        of[offset.0] = of[to.0].clone();
                    }
                }
                Op::GroupNorm { sources, groups, modulation, to, .. } => {
                    let all = joined(sources, &of);
                    for &set in &all {
                        sets.divide(set, *groups);
                    }
                    if let Some(modulation) = modulation {
                        // Scale and shift.
                        of[modulation.0] = [all.clone(), all.clone()].concat();
                    }
                    of[to.0] = all;
                }
                Op::Attend { queries, keys, values, heads, to, .. } => {
                    let [queries, keys, values] =
                        [queries, keys, values].map(|slice| sets.within(slice, &of));
                    for (&one, &other) in queries.iter().zip(&keys) {
                        sets.unite(one, other);
                    }
                    for &set in queries.iter().chain(&values) {
                        sets.divide(set, *heads);
                    }
                    of[to.0] = values;
                }
                Op::Downsample { source, to }
                | Op::Upsample { source, to }
                | Op::Activate { source, to, .. } => of[to.0] = of[source.0].clone(),
            }
        }
        Some(self.along(sets, &of))
    }

    /// The map that a layer norm with the weights in `vector` is of.
    fn normed_by(&self, vector: Map) -> Option<Map> {
        self.ops.iter().find_map(|op| match op {
            Op::Modulate { source, vector: own, plus_one: false, .. } if *own == vector => {
                Some(*source)
            }
            _ => None,
        })
    }

    /// Whether one half of a map's channels becomes the gate of the other.
    fn is_gated(&self, map: Map) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::Geglu { source, .. } if *source == map))
    }

    /// What an earlier operation that is the same wrote.
    fn same(&self, op: &Op, same: impl Fn(&Op) -> bool) -> Option<Map> {
        let earlier = self.ops.iter().take_while(|one| one.to() != op.to());
        earlier.filter(|one| same(one)).find_map(Op::to)
    }

    /// The sets of sums of so many outputs.
    fn sums(
        &self,
        sets: &mut Sets,
        of: &[Vec<usize>],
        to: Map,
        widths: &[usize],
        residual: Option<Map>,
    ) -> Vec<usize> {
        if self.maps[to.0].kind == Kind::Answer {
            return Vec::new();
        }
        match residual {
            Some(residual) => of[residual.0].clone(),
            None => widths.iter().map(|&width| sets.set(width, Choice::Any)).collect(),
        }
    }

    /// What lies along the dimensions of all weights.
    fn along(&self, mut sets: Sets, of: &[Vec<usize>]) -> Channels {
        let mut channels = Channels::default();
        let numbers = sets.numbers(&mut channels.sets);
        let numbered = |all: &[usize]| all.iter().map(|&set| numbers[set]).collect::<Vec<_>>();
        let mut put = |id: WeightId, along: [&[usize]; 2]| {
            let spec = self.weight(id);
            let mut dimensions = vec![Vec::new(); spec.shape.len()];
            for (dimension, sets) in dimensions.iter_mut().zip(along) {
                *dimension = numbered(sets);
            }
            channels.weights.insert(spec.name.clone(), dimensions);
        };
        let mut layer = |product: &Product, output: &[usize], input: &[usize]| {
            put(product.weight, [output, input]);
            if let Some(bias) = product.bias {
                put(bias, [output, &[]]);
            }
        };
        for op in &self.ops {
            match op {
                Op::Project { source, product, to } => {
                    layer(product, &of[to.0], &of[source.0]);
                }
                Op::Convolve { source, product, to, .. } => {
                    layer(product, &of[to.0], &of[source.0]);
                }
                Op::Linear { sources, products, to, .. } => {
                    let (output, input) = (&of[to.0], joined(sources, of));
                    for (i, product) in products.iter().enumerate() {
                        let own = if products.len() == 1 { &output[..] } else { &output[i..=i] };
                        layer(product, own, &input);
                    }
                }
                _ => {}
            }
        }
        for op in &self.ops {
            match op {
                Op::GroupNorm { sources, weight, bias, .. } => {
                    let all = joined(sources, of);
                    put(*weight, [&all, &[]]);
                    put(*bias, [&all, &[]]);
                }
                Op::Row { table, to, .. } => put(*table, [&[], &of[to.0]]),
                Op::Learned { weights, to } => {
                    let normed = self.normed_by(*to).map(|source| &of[source.0][..]);
                    weights.iter().for_each(|id| put(*id, [normed.unwrap_or_default(), &[]]));
                }
                _ => {}
            }
        }
        channels
    }
}

/// The sets of several maps, one behind the other.
fn joined(maps: &[Map], of: &[Vec<usize>]) -> Vec<usize> {
    maps.iter().flat_map(|map| of[map.0].iter().copied()).collect()
}

/// Sets in the making, some of which turn out to be one.
#[derive(Default)]
struct Sets {
    sets: Vec<ChannelSet>,
    /// The set that it became one with, or itself.
    same: Vec<usize>,
}

impl Sets {
    fn set(&mut self, width: usize, choice: Choice) -> usize {
        self.sets.push(ChannelSet { width, parts: 1, choice });
        self.same.push(self.same.len());
        self.same.len() - 1
    }

    fn find(&self, mut set: usize) -> usize {
        while self.same[set] != set {
            set = self.same[set];
        }
        set
    }

    fn unite(&mut self, one: usize, other: usize) {
        let (one, other) = (self.find(one), self.find(other));
        let (first, second) = (one.min(other), one.max(other));
        self.same[second] = first;
        self.divide(first, self.sets[second].parts);
    }

    /// Something divides the set into so many parts.
    fn divide(&mut self, set: usize, parts: usize) {
        let set = self.find(set);
        let (mut a, mut b) = (self.sets[set].parts, parts);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        self.sets[set].parts *= parts / a;
    }

    /// The sets of some channels of a map.
    fn within(&self, slice: &Slice, of: &[Vec<usize>]) -> Vec<usize> {
        let (mut start, end) = (0, slice.start + slice.width);
        let inside = of[slice.map.0].iter().copied().filter(|&set| {
            let first = start;
            start += self.sets[set].width;
            first >= slice.start && first < end
        });
        inside.collect()
    }

    /// Adds those that are left to `all`, and gives each one's place there.
    fn numbers(&mut self, all: &mut Vec<ChannelSet>) -> Vec<usize> {
        let mut numbers = vec![0; self.sets.len()];
        for set in 0..self.sets.len() {
            let same = self.find(set);
            if same == set {
                numbers[set] = all.len();
                all.push(self.sets[set]);
            } else {
                numbers[set] = numbers[same];
            }
        }
        numbers
    }
}
