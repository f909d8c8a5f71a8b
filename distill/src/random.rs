//! The draws of a run: each a pure function of the run's seed, what it is for, and its place there.

use understudy_models::noise;

/// What a draw is for. Draws of different purposes never meet.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Purpose {
    /// The seed of a trajectory of the teacher.
    Trajectory = 1,
    /// Which of the interleaved timesteps it visits.
    Offset,
    /// How far a slot of the pool is walked before training.
    Target,
    /// Which slots an iteration takes.
    Slot,
    /// Which images.
    Picture,
    /// At which timesteps they are noised.
    Timestep,
    /// The seed of their noise.
    Noise,
    /// In which order the samples of a round of segments are shown.
    Row,
    /// Which prompt a trajectory of the teacher is after.
    Prompt,
    /// How far that trajectory is guided.
    Guidance,
    /// The seed of a student's sample.
    Generated,
    /// Which of its steps is looked at.
    Segment,
    /// To which timestep its end is noised again.
    RenoisedTo,
    /// The seed of that noise.
    Renoised,
    /// The seed of a shard of the run.
    Shard,
    /// Whether a picture is shown without its caption.
    Uncaptioned,
}

/// A uniform 64-bit number: draw `minor` (below 2²⁰) of round `major` (below 2³⁶).
pub(crate) fn number(seed: u64, purpose: Purpose, major: u64, minor: u64) -> u64 {
    noise::uniform_u64(seed, stream(purpose, major, minor))
}

/// The same as a number below `limit`.
pub(crate) fn below(seed: u64, purpose: Purpose, major: u64, minor: u64, limit: usize) -> usize {
    noise::below(seed, stream(purpose, major, minor), limit)
}

/// `count` distinct numbers below `limit` (all of them where there are fewer): R. Floyd's algorithm
/// (Bentley & Floyd 1987), O(count) whatever the limit.
pub(crate) fn distinct(
    seed: u64,
    purpose: Purpose,
    major: u64,
    count: usize,
    limit: usize,
) -> Vec<usize> {
    let mut seen = std::collections::HashSet::with_capacity(count);
    let mut drawn = Vec::with_capacity(count);
    for last in limit.saturating_sub(count)..limit {
        let number = below(seed, purpose, major, drawn.len() as u64, last + 1);
        let number = if seen.insert(number) { number } else { last };
        seen.insert(number);
        drawn.push(number);
    }
    drawn
}

/// The numbers below `count` in an order drawn by `seed`, of the `count` draws from number `stream` on: a Fisher–Yates shuffle.
pub(crate) fn shuffled(count: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..count).collect();
    for place in (1..count).rev() {
        numbers.swap(place, noise::below(seed, stream + place as u64, place + 1));
    }
    numbers
}

fn stream(purpose: Purpose, major: u64, minor: u64) -> u64 {
    debug_assert!(major < 1 << 36 && minor < 1 << 20);
    (purpose as u64) << 56 | major << 20 | minor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinct_numbers_are_distinct_and_even() {
        let mut counts = [0_u32; 10];
        for round in 0..10_000 {
            let mut drawn = distinct(1, Purpose::Slot, round, 4, 10);
            drawn.iter().for_each(|&number| counts[number] += 1);
            drawn.sort_unstable();
            drawn.dedup();
            assert_eq!(drawn.len(), 4);
        }
        assert!(counts.iter().all(|count| (3800..4200).contains(count)), "{counts:?}");
        assert_eq!(distinct(1, Purpose::Slot, 0, 7, 3).len(), 3);
    }
}
