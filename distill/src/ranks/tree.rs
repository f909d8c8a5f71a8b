//! Sums in a fixed order: a binary tree over the shards of a run, `((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))`.
//!
//! A rank has a block of 2ᵏ neighbouring shards, which is a whole subtree. So it does not matter to the sum, to the bit, where the
//! ranks' blocks begin: one process that has all shards adds in the same order as many that have some each.

use bytemuck::{cast_slice, cast_slice_mut};

use super::world::World;

/// A sum over a power of two of terms, given one after the other. It holds a partial sum for each level of the tree at most.
#[derive(Debug)]
pub(crate) struct TreeSum<T> {
    /// Sums of whole subtrees, the largest first, each with the number of its terms.
    partial: Vec<(usize, T)>,
}

impl<T> TreeSum<T> {
    pub(crate) fn new() -> Self {
        Self { partial: Vec::new() }
    }

    /// Takes the next term; `add` gives the sum of two neighbouring subtrees.
    ///
    /// # Errors
    /// Those of `add`.
    pub(crate) fn push<E>(
        &mut self,
        term: T,
        mut add: impl FnMut(T, T) -> Result<T, E>,
    ) -> Result<(), E> {
        let (mut terms, mut sum) = (1, term);
        while let Some((_, left)) = self.partial.pop_if(|(size, _)| *size == terms) {
            sum = add(left, sum)?;
            terms *= 2;
        }
        self.partial.push((terms, sum));
        Ok(())
    }

    /// The sum of all terms, where their number is a power of two.
    pub(crate) fn finish(mut self) -> Option<T> {
        self.partial.pop().filter(|_| self.partial.is_empty()).map(|(_, sum)| sum)
    }
}

/// Values of a slice that goes to one rank at a time: 4 MiB, so that latency counts little, and memory for a few of them is
/// enough whatever the size of a network.
const SLICE: usize = 1 << 20;

/// Every rank's `values`, as long as this one's, added element by element by the tree: the same sum on every rank. Each rank adds a
/// slice of its own, which takes the traffic of a ring, `2·(N − 1)/N` of the values' bytes from each rank, but not its order.
pub(crate) fn sum(world: &dyn World, values: &mut [f32]) {
    let size = world.size();
    if size == 1 {
        return;
    }
    for part in values.chunks_mut(size * SLICE) {
        let slice = part.len().div_ceil(size);
        let mut own = part.to_vec();
        own.resize(size * slice, 0.0);
        let mut all = vec![0.0; size * slice];
        world.all_to_all(cast_slice(&own), cast_slice_mut(&mut all));
        fold(&mut all, slice);
        world.all_gather(cast_slice(&all[..slice]), cast_slice_mut(&mut own));
        part.copy_from_slice(&own[..part.len()]);
    }
}

/// Adds a power of two of slices by the tree; the sum is where the first one was.
fn fold(slices: &mut [f32], length: usize) {
    let mut width = length;
    while 0 < width && width < slices.len() {
        for pair in slices.chunks_mut(2 * width) {
            let (left, right) = pair.split_at_mut(width);
            for (left, right) in left[..length].iter_mut().zip(&right[..length]) {
                *left += *right;
            }
        }
        width *= 2;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    /// The tree as its definition has it.
    fn by_halves(terms: &[f32]) -> f32 {
        match terms {
            [term] => *term,
            terms => {
                let (left, right) = terms.split_at(terms.len() / 2);
                by_halves(left) + by_halves(right)
            }
        }
    }

    fn pushed(terms: &[f32]) -> f32 {
        let mut sum = TreeSum::new();
        for &term in terms {
            sum.push(term, |left, right| Ok::<_, Infallible>(left + right)).unwrap();
        }
        sum.finish().unwrap()
    }

    proptest! {
        /// However many ranks have the shards, the bits are the tree's.
        #[test]
        fn blocks_of_ranks_are_subtrees(
            (shards, ranks, values) in (0_u32..6).prop_flat_map(|shards| {
                let values = proptest::collection::vec(-1e6_f32..1e6, 3 << shards);
                (Just(1_usize << shards), 0..=shards, values)
            }),
        ) {
            let (ranks, length) = (1 << ranks, 3);
            let whole: Vec<f32> = (0..length)
                .map(|i| by_halves(&values.iter().skip(i).step_by(length).copied().collect::<Vec<_>>()))
                .collect();
            let block = shards / ranks * length;
            let mut slices: Vec<f32> = values
                .chunks(block)
                .flat_map(|block| {
                    (0..length).map(|i| pushed(&block.iter().skip(i).step_by(length).copied().collect::<Vec<_>>()))
                })
                .collect();
            fold(&mut slices, length);
            let bits = |values: &[f32]| values.iter().map(|it| it.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(&slices[..length]), bits(&whole));
        }
    }

    #[test]
    fn a_sum_that_is_no_whole_tree_is_none() {
        let mut sum = TreeSum::new();
        for term in 0..3 {
            sum.push(term, |left: i32, right| Ok::<_, Infallible>(left + right)).unwrap();
        }
        assert_eq!(sum.finish(), None);
        assert_eq!(TreeSum::<i32>::new().finish(), None);
    }
}
