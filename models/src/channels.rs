//! Which channels of a network stand or fall together, for making a narrower network out of it.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use crate::{Error, Result};

/// Channels that several weights share: the residual stream of a level, the inside of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelSet {
    /// How many there are.
    pub width: usize,
    /// Parts of equal size that a norm or the heads of an attention divide them into.
    pub parts: usize,
    /// How a narrower set is made.
    pub choice: Choice,
}

/// How a narrower set is made of a wider one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Any channels of each part may be left out.
    Any,
    /// Sines and cosines of falling frequencies, in two halves: those whose frequencies the narrower set
    /// has too must be kept.
    Frequencies,
}

/// The channel sets of a network, and which weights have them along which dimension.
///
/// Two networks of one topology and different widths have the same `weights`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Channels {
    /// The sets.
    pub sets: Vec<ChannelSet>,
    /// For each weight and each of its dimensions the sets that lie along it, one behind the other; none
    /// where the dimension belongs to no set (pixels of a kernel, channels of the image, classes).
    pub weights: BTreeMap<String, Vec<Vec<usize>>>,
}

impl Channels {
    /// For each set the one of `larger` that it is a part of; nothing where this is not `larger` with fewer channels, or without
    /// some of its branches. Of a set of `larger` several may be parts, where levels that were equally wide are not any more.
    pub fn origins(&self, larger: &Self) -> Option<Vec<usize>> {
        let mut origins = vec![None; self.sets.len()];
        for (name, dimensions) in &self.weights {
            let Some(theirs) = larger.weights.get(name) else { continue };
            let same = |(own, theirs): (&Vec<usize>, &Vec<usize>)| own.len() == theirs.len();
            if dimensions.len() != theirs.len() || !dimensions.iter().zip(theirs).all(same) {
                return None;
            }
            for (&own, &origin) in dimensions.iter().flatten().zip(theirs.iter().flatten()) {
                if *origins[own].get_or_insert(origin) != origin {
                    return None;
                }
            }
        }
        let origins: Vec<usize> = origins.into_iter().collect::<Option<_>>()?;
        let fits = |(own, &origin): (&ChannelSet, &usize)| own.width <= larger.sets[origin].width;
        self.sets.iter().zip(&origins).all(fits).then_some(origins)
    }
}

/// What a narrower network keeps of a larger one.
#[derive(Debug, Clone)]
pub struct Kept {
    larger: Channels,
    own: Channels,
    origins: Vec<usize>,
    channels: Vec<Vec<usize>>,
}

impl Kept {
    /// Those that `choose` names for each set, out of the set of `larger` whose number it is given, in rising order; nothing where
    /// [`Channels::origins`] are.
    pub fn new(
        larger: Channels,
        own: Channels,
        choose: impl Fn(usize, ChannelSet) -> Vec<usize>,
    ) -> Option<Self> {
        let origins = own.origins(&larger)?;
        let channels = own.sets.iter().zip(&origins);
        let channels = channels.map(|(&set, &origin)| choose(origin, set)).collect();
        Some(Self { larger, own, origins, channels })
    }

    /// Of each set: the set of the larger network, and the channels of it.
    pub fn sets(&self) -> impl Iterator<Item = (usize, &[usize])> {
        self.origins.iter().copied().zip(self.channels.iter().map(Vec::as_slice))
    }

    /// Whether the narrower network has a weight of this name.
    pub fn has(&self, name: &str) -> bool {
        self.own.weights.contains_key(name)
    }

    /// What lies along a dimension of a weight that both have, as indices into the larger one's; nothing where it is the whole
    /// dimension.
    pub fn along(&self, name: &str, dimension: usize) -> Option<Vec<u32>> {
        let own = self.own.weights.get(name)?.get(dimension)?;
        let mut indices = Vec::new();
        let mut offset = 0;
        for &set in own {
            indices.extend(self.channels[set].iter().map(|&channel| (offset + channel) as u32));
            offset += self.larger.sets[self.origins[set]].width;
        }
        (!own.is_empty()).then_some(indices)
    }

    /// The narrower network's weights out of the larger one's, f32 on the CPU. A product that the larger one has not, since the
    /// two sides of it were one set there, hands on the channels that both sides keep.
    ///
    /// # Errors
    /// [`Error::Weights`] for a weight that neither has.
    pub fn narrow(
        &self,
        weights: &BTreeMap<String, Tensor>,
        shapes: &BTreeMap<String, Vec<usize>>,
    ) -> Result<BTreeMap<String, Tensor>> {
        let narrow = |(name, shape): (&String, &Vec<usize>)| -> Result<(String, Tensor)> {
            let Some(weight) = weights.get(name) else {
                return Ok((name.clone(), self.handed_on(name, shape)?));
            };
            let mut narrow = weight.clone();
            for dimension in 0..shape.len() {
                if let Some(indices) = self.along(name, dimension) {
                    let indices = Tensor::new(indices, &Device::Cpu)?;
                    narrow = narrow.contiguous()?.index_select(&indices, dimension)?;
                }
            }
            Ok((name.clone(), narrow))
        };
        shapes.iter().map(narrow).collect()
    }

    /// A product of the narrower network alone: ones where output and input are the same channel of the larger one.
    fn handed_on(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let mut values = vec![0f32; shape.iter().product()];
        match &self.own.weights[name][..] {
            [_] => {}
            [output, input, rest @ ..] if rest.iter().all(Vec::is_empty) => {
                let all = |sets: &[usize]| -> Vec<(usize, usize)> {
                    let of = |&set: &usize| {
                        self.channels[set].iter().map(move |&it| (self.origins[set], it))
                    };
                    sets.iter().flat_map(of).collect()
                };
                let (output, input) = (all(output), all(input));
                let taps: usize = shape[2..].iter().product();
                for (i, out) in output.iter().enumerate() {
                    for j in (0..input.len()).filter(|&j| input[j] == *out) {
                        values[(i * input.len() + j) * taps + taps / 2] = 1.0;
                    }
                }
            }
            _ => {
                let problem = format!("`{name}` is no product, and the larger network has none");
                return Err(Error::Weights(problem));
            }
        }
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}
