//! How often numbers of which size occur.

/// Bins.
const BINS: usize = 4096;

/// Numbers counted in bins of one width over a range around 0, which doubles when a number lies outside; so the order of
/// the numbers does not matter.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    counts: Vec<u64>,
    /// The bins reach from −reach to reach.
    reach: f32,
    least: f32,
    most: f32,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BINS], reach: 1.0 / 1024.0, least: 0.0, most: 0.0 }
    }
}

impl Histogram {
    /// Counts a finite number.
    pub fn add(&mut self, x: f32) {
        while x.abs() >= self.reach {
            self.widen();
        }
        self.least = self.least.min(x);
        self.most = self.most.max(x);
        let place = (x / self.reach + 1.0) * (BINS / 2) as f32;
        self.counts[(place as usize).min(BINS - 1)] += 1;
    }

    fn widen(&mut self) {
        let mut counts = vec![0; BINS];
        for (i, count) in self.counts.iter().enumerate() {
            counts[BINS / 4 + i / 2] += count;
        }
        (self.counts, self.reach) = (counts, 2.0 * self.reach);
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The least and the largest, or 0 where that is less or more.
    pub fn range(&self) -> [f32; 2] {
        [self.least, self.most]
    }

    /// Each bin that holds any: its middle, and how many.
    pub fn bins(&self) -> impl Iterator<Item = (f32, u64)> + '_ {
        let middle = |i: usize| ((i as f32 + 0.5) / (BINS / 2) as f32 - 1.0) * self.reach;
        let all = self.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        all.map(move |(i, &count)| (middle(i), count))
    }

    /// The share of numbers in bins whose middles lie outside a range.
    pub fn share_outside(&self, [least, most]: [f32; 2]) -> f64 {
        let outside = self.bins().filter(|(x, _)| *x < least || *x > most);
        outside.map(|(_, count)| count).sum::<u64>() as f64 / self.count().max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_order_does_not_matter(numbers in prop::collection::vec(-1e3f32..1e3, 1..200)) {
            let count = |numbers: &mut dyn Iterator<Item = &f32>| {
                let mut histogram = Histogram::default();
                numbers.for_each(|&x| histogram.add(x));
                histogram
            };
            let histogram = count(&mut numbers.iter());
            prop_assert_eq!(&histogram, &count(&mut numbers.iter().rev()));
            prop_assert_eq!(histogram.count(), numbers.len() as u64);
            let [least, most] = histogram.range();
            let width = 2.0 * histogram.reach / BINS as f32;
            for (x, _) in histogram.bins() {
                prop_assert!(numbers.iter().any(|number| (number - x).abs() <= 0.51 * width));
            }
            prop_assert_eq!(histogram.share_outside([least - width, most + width]), 0.0);
        }
    }
}
