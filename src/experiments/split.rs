//! Which arm a key belongs to: weighted rendezvous hashing.
//!
//! Every arm draws a number from the key, and the arm with the greatest serves (highest random weight:
//! Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates"). With an arm of weight
//! w drawing −w/ln(u), where u is uniform in (0, 1), it wins a share w ÷ Σw of all keys (the logarithmic
//! method: Schindelhauer and Schomaker 2005, "Weighted distributed hash tables", section 3). An arm's draw
//! does not depend on the others, so when one weight changes keys move only to or from that arm, and no
//! more of them than the shares make necessary.
//!
//! u comes from SipHash-2-4 (Aumasson and Bernstein 2012), whose output is fixed by its definition, and the logarithm from
//! `libm`, where the standard library's is the system's: a key stays with its arm over restarts, releases and machines, and
//! all replicas split alike.

use std::hash::Hasher;

use libm::log;
use siphasher::sip::SipHasher24;

/// The index of the arm, of those with their weights in `arms`, that `key` belongs to in an experiment;
/// arms of weight 0 get no keys. 0 where no arm has a positive weight.
pub fn arm_of<'a>(
    experiment: &str,
    arms: impl IntoIterator<Item = (&'a str, f64)>,
    key: &[u8],
) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (index, (model, weight)) in arms.into_iter().enumerate() {
        let draw = -weight / log(uniform(experiment, model, key));
        if weight > 0.0 && draw > best.1 {
            best = (index, draw);
        }
    }
    best.0
}

/// A number in (0, 1) that experiment, model and key decide.
fn uniform(experiment: &str, model: &str, key: &[u8]) -> f64 {
    let mut hasher = SipHasher24::new();
    for part in [experiment.as_bytes(), model.as_bytes(), key] {
        // With its length, so that no two triples are the same bytes.
        hasher.write(&(part.len() as u64).to_le_bytes());
        hasher.write(part);
    }
    // 53 bits, all that an f64 holds, and half a step away from 0.
    ((hasher.finish() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: usize = 100_000;

    fn assigned(arms: &[(&str, f64)]) -> Vec<usize> {
        let arm = |key: usize| arm_of("e", arms.iter().copied(), format!("user-{key}").as_bytes());
        (0..KEYS).map(arm).collect()
    }

    fn share(assigned: &[usize], arm: usize) -> f64 {
        assigned.iter().filter(|&&at| at == arm).count() as f64 / assigned.len() as f64
    }

    /// Four standard deviations of a share of [`KEYS`].
    const NOISE: f64 = 4.0 * 0.5 / 316.0;

    #[test]
    fn keys_are_split_by_weight() {
        let arms = [("a", 1.0), ("b", 3.0), ("c", 0.0), ("d", 0.5)];
        let assigned = assigned(&arms);
        for (arm, (_, weight)) in arms.iter().enumerate() {
            assert!((share(&assigned, arm) - weight / 4.5).abs() < NOISE, "{arm}");
        }
        assert_eq!(share(&assigned, 2), 0.0);
    }

    /// As few as any rule could: half of the sum of the shares' changes.
    #[test]
    fn a_change_of_weights_moves_as_few_keys_as_shares_change() {
        let before = [("a", 1.0), ("b", 1.0), ("c", 2.0)];
        let changes = [
            ([("a", 2.0), ("b", 1.0), ("c", 2.0)], 0.15),
            ([("a", 1.0), ("b", 1.0), ("c", 1.0)], 1.0 / 6.0),
            ([("a", 0.0), ("b", 1.0), ("c", 2.0)], 0.25),
            ([("a", 3.0), ("b", 3.0), ("c", 6.0)], 0.0),
        ];
        let old = assigned(&before);
        for (after, least) in changes {
            let new = assigned(&after);
            let moves: Vec<_> = old.iter().zip(&new).filter(|(old, new)| old != new).collect();
            let moved = moves.len() as f64 / KEYS as f64;
            assert!((moved - least).abs() < NOISE, "{after:?} moved {moved}, least {least}");
            let changed = before.iter().zip(&after).position(|(old, new)| old.1 != new.1);
            for (old, new) in moves {
                assert!([old, new].contains(&&changed.unwrap_or(0)), "{old} to {new}");
            }
        }
    }

    /// Counted, and as one number, by the formula in Python over integers and the logarithm of its `math`.
    #[test]
    fn all_machines_split_alike() {
        let assigned = assigned(&[("a", 1.0), ("b", 3.0), ("c", 0.1)]);
        let count = |arm| assigned.iter().filter(|&&at| at == arm).count();
        assert_eq!([0, 1, 2].map(count), [24_505, 73_096, 2_399]);
        let number = |hash: u64, arm: &usize| hash.wrapping_mul(31).wrapping_add(*arm as u64 + 1);
        assert_eq!(assigned.iter().fold(0, number), 0x3fce_ae71_ca18_d646);
    }

    #[test]
    fn experiments_split_independently() {
        let arms = || [("a", 1.0), ("b", 1.0)];
        let both = |key: usize| {
            let key = key.to_le_bytes();
            (arm_of("one", arms(), &key), arm_of("two", arms(), &key))
        };
        let same = (0..KEYS).map(both).filter(|(one, two)| one == two).count();
        assert!((same as f64 / KEYS as f64 - 0.5).abs() < NOISE);
    }

    /// A key keeps its arm over releases: what this says once it says for ever. The arms are those that the
    /// formula gives in Python over the package `siphash24`.
    #[test]
    fn the_split_is_the_same_for_ever() {
        let arms = [("teacher", 1.0), ("student", 1.0), ("other", 2.0)];
        let arm = |key: &str| arm_of("first", arms, key.as_bytes());
        assert_eq!(["", "a", "b", "alice", "bob", "carol"].map(arm), [2, 1, 2, 1, 1, 2]);
    }
}
