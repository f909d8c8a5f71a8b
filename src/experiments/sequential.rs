//! A test that may be looked at after every vote: the mixture sequential probability ratio test.
//!
//! The null hypothesis is that of two arms neither is preferred, so that a vote which prefers one of them
//! prefers either with probability ½ (the sign test; ties say nothing about it and are left out). Against it
//! stands a preference θ of which nothing is known, uniform on (0, 1). After w votes for and l against, the
//! mixture likelihood ratio is
//!
//!   Λ(w, l) = ∫₀¹ θ^w (1 − θ)^l dθ ÷ ½^(w+l) = 2^(w+l) · w! · l! ÷ (w + l + 1)!
//!
//! Under the null it is a martingale that begins at 1, so it ever reaches 1/α with probability at most α
//! (Ville's inequality; Robbins 1970, "Statistical methods related to the law of the iterated logarithm",
//! section 3). Hence p = min(1, 1 ÷ the largest Λ so far) is a p-value at every moment at once, whenever
//! one looks and for whatever reason one stops (Johari, Koomen, Pekelis and Walsh 2022, "Always valid
//! inference: continuous monitoring of A/B tests", Operations Research 70, equations 6 and 8).

use libm::lgamma;

/// ln Λ after so many votes for and against.
pub fn ln_likelihood_ratio(wins: u64, losses: u64) -> f64 {
    let (w, l) = (wins as f64, losses as f64);
    (w + l) * std::f64::consts::LN_2 + lgamma(w + 1.0) + lgamma(l + 1.0) - lgamma(w + l + 2.0)
}

/// The always-valid p-value, from the largest [`ln_likelihood_ratio`] there has been.
pub fn p_value(largest_ln_likelihood_ratio: f64) -> f64 {
    (-largest_ln_likelihood_ratio).exp().min(1.0)
}

#[cfg(test)]
mod tests {
    use understudy_models::noise;

    use super::*;
    use crate::experiments::{golden, wilson};

    const LEVEL: f64 = 0.05;

    #[test]
    fn ratios_are_those_of_scipy() {
        for case in golden::cases() {
            let ratio = ln_likelihood_ratio(case.wins, case.losses);
            let tolerance = 1e-12 * (1.0 + (case.wins + case.losses) as f64);
            assert!((ratio - case.ln_ratio).abs() < tolerance, "{case:?}: {ratio}");
        }
    }

    /// Shares of `people` who, looking after each of `votes` votes, would at some time have called a
    /// preference proven: by this test, and by Wilson's interval.
    fn called(people: u64, votes: u64, preference: f64) -> [f64; 2] {
        let mut called = [0; 2];
        for person in 0..people {
            let (mut wins, mut losses, mut by) = (0, 0, [false; 2]);
            for vote in 0..votes {
                let drawn = noise::uniform_u64(person, vote + 1) as f64 / u64::MAX as f64;
                if drawn < preference {
                    wins += 1
                } else {
                    losses += 1
                }
                by[0] |= p_value(ln_likelihood_ratio(wins, losses)) <= LEVEL;
                let [low, high] = wilson::interval(wins, wins + losses).unwrap_or_default();
                by[1] |= low > 0.5 || high < 0.5;
            }
            (0..2).for_each(|test| called[test] += u64::from(by[test]));
        }
        called.map(|called| called as f64 / people as f64)
    }

    #[test]
    fn looked_at_after_every_vote_it_errs_no_more_often_than_it_says() {
        let [sequential, wilson] = called(2000, 1000, 0.5);
        assert!(sequential <= LEVEL, "{sequential}");
        // What it is there for.
        assert!(wilson > 0.4, "{wilson}");
    }

    /// Not by simulation but exactly: the probability of being at every (wins, losses) without having
    /// rejected before.
    #[test]
    fn the_probability_of_ever_erring_is_below_the_level() {
        let mut erred = 0.0;
        let mut reached = vec![1.0];
        for votes in 1..=2000u64 {
            let mut next = vec![0.0; reached.len() + 1];
            for (wins, probability) in reached.iter().enumerate() {
                next[wins] += probability / 2.0;
                next[wins + 1] += probability / 2.0;
            }
            for (wins, probability) in next.iter_mut().enumerate() {
                let wins = wins as u64;
                if *probability > 0.0 && p_value(ln_likelihood_ratio(wins, votes - wins)) <= LEVEL {
                    erred += std::mem::take(probability);
                }
            }
            reached = next;
        }
        assert!((0.02..=LEVEL).contains(&erred), "{erred}");
    }

    #[test]
    fn a_real_preference_is_found() {
        let [found, _] = called(500, 400, 0.65);
        assert!(found > 0.95, "{found}");
    }
}
