//! Sums in a fixed order: a binary tree over the shards of a run, `((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))`.
//!
//! A rank has a block of 2ᵏ neighbouring shards, which is a whole subtree. So it does not matter to the sum, to the bit, where the
//! ranks' blocks begin: one process that has all shards adds in the same order as many that have some each.

use candle_core::{Result, Tensor, bail};

use super::exchange::Exchange;

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
        mut add: impl FnMut(T, T) -> std::result::Result<T, E>,
    ) -> std::result::Result<(), E> {
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

/// Every rank's `values`, f32 `[length]`, as long as this one's, added element by element by the tree: the same sum on every rank,
/// where `values` are. Each rank adds a slice of its own, which takes the traffic of a ring, `2·(N − 1)/N` of the values' bytes from
/// each rank, but not its order.
///
/// # Errors
/// Whatever the exchange or the device says.
pub(crate) fn sum(exchange: &Exchange<'_>, values: &Tensor) -> Result<Tensor> {
    sum_by(exchange, values, SLICE)
}

/// The same, by slices of so many values at most.
fn sum_by(exchange: &Exchange<'_>, values: &Tensor, most: usize) -> Result<Tensor> {
    let ranks = exchange.size();
    let own = values.to_device(exchange.device())?;
    let sums = own.zeros_like()?;
    for begin in (0..own.dim(0)?).step_by(ranks * most) {
        let length = (own.dim(0)? - begin).min(ranks * most);
        let slice = length.div_ceil(ranks);
        let part = own.narrow(0, begin, length)?.pad_with_zeros(0, 0, ranks * slice - length)?;
        let terms = exchange.all_to_all(&part.reshape((ranks, slice))?)?;
        let mut sum = TreeSum::new();
        for rank in 0..ranks {
            sum.push(terms.get(rank)?, |left, right| left + right)?;
        }
        let Some(sum) = sum.finish() else { bail!("{ranks} ranks are no power of two") };
        sums.slice_set(&exchange.all_gather(&sum)?.narrow(0, 0, length)?, 0, begin)?;
    }
    sums.to_device(values.device())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::convert::Infallible;
    use std::thread;

    use candle_core::Device;
    use proptest::prelude::*;

    use super::super::threads::Threads;
    use super::super::world::World;
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

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|it| it.to_bits()).collect()
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
            let blocks: Vec<Vec<f32>> = values
                .chunks(block)
                .map(|block| {
                    (0..length).map(|i| pushed(&block.iter().skip(i).step_by(length).copied().collect::<Vec<_>>())).collect()
                })
                .collect();
            let sums: Vec<f32> =
                (0..length).map(|i| pushed(&blocks.iter().map(|block| block[i]).collect::<Vec<_>>())).collect();
            prop_assert_eq!(bits(&sums), bits(&whole));
        }

        /// Whatever the slices, which need not come out even, every rank has the tree's sum, for the traffic of a ring.
        #[test]
        fn slices_add_up_to_the_same_on_every_rank(
            (ranks, values) in (0_u32..4, 1_usize..40).prop_flat_map(|(ranks, length)| {
                let values = proptest::collection::vec(-1e6_f32..1e6, length << ranks);
                (Just(1_usize << ranks), values)
            }),
            most in 1_usize..12,
        ) {
            let length = values.len() / ranks;
            let whole: Vec<f32> = (0..length)
                .map(|i| by_halves(&values.iter().skip(i).step_by(length).copied().collect::<Vec<_>>()))
                .collect();
            let rank = |world: Threads| {
                let own = &values[world.rank() * length..][..length];
                let own = Tensor::new(own, &Device::Cpu).unwrap();
                let sum = sum_by(&Exchange::through_host(&world), &own, most).unwrap();
                (sum.to_vec1::<f32>().unwrap(), world.sent_bytes())
            };
            let told: Vec<_> = thread::scope(|scope| {
                let ranks = Threads::world(ranks).into_iter();
                let ranks: Vec<_> = ranks.map(|world| scope.spawn(|| rank(world))).collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            // A slice is as long as its rounds allow, and the last round's is rounded up.
            let rounds = length.div_ceil(ranks * most);
            let last = (length - (rounds - 1) * ranks * most).div_ceil(ranks);
            let slices = (rounds - 1) * most + last;
            for (sum, sent) in told {
                prop_assert_eq!(bits(&sum), bits(&whole));
                prop_assert_eq!(sent, (2 * (ranks - 1) * slices * size_of::<f32>()) as u64);
            }
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
