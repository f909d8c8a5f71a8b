//! What stops an arm by itself: bounds on its images, its times and its votes. The decision is a pure function of what
//! was observed.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Error, sequential, tally::Tally};

/// Images that a median of PSNR or SSIM is of, where the guardrails say nothing else.
const COMPARISONS: u64 = 50;
/// Requests of the arm, and of the control, before their times are compared.
const REQUESTS: u64 = 100;
/// Votes that preferred one of the two before they are tested.
const VOTES: u64 = 20;

/// The most images that a median is of: they are kept.
const MAX_COMPARISONS: u64 = 500;
/// The most of any other count.
const MAX_COUNT: u64 = 1_000_000;
/// The greatest bound on the ratio of times.
const MAX_RATIO: f64 = 1000.0;

/// Bounds that every arm but the first, the control, has to keep. Fields that are `None` set no bound, or leave a count at
/// its default.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Guardrails {
    /// Least median PSNR in dB of the arm's images beside its teacher's, 0 to 100.
    pub min_psnr_db: Option<f64>,
    /// Least median SSIM of the same, −1 to 1.
    pub min_ssim: Option<f64>,
    /// The medians are of the last so many images, and nothing is said before there are as many.
    pub min_comparisons: Option<u64>,
    /// Greatest median time of the arm's requests ÷ the control's.
    pub max_latency_ratio: Option<f64>,
    /// Nothing is said before both have answered so many requests since the weights last changed.
    pub min_requests: Option<u64>,
    /// People prefer the control when the always-valid p-value is at most this, above 0 and at most 0.5.
    pub votes_p_value: Option<f64>,
    /// Nothing is said before so many votes preferred one of the two.
    pub min_votes: Option<u64>,
}

/// Which bound it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guardrail {
    /// [`Guardrails::min_psnr_db`].
    MinPsnrDb,
    /// [`Guardrails::min_ssim`].
    MinSsim,
    /// [`Guardrails::max_latency_ratio`].
    MaxLatencyRatio,
    /// [`Guardrails::votes_p_value`].
    VotesPValue,
}

/// A value, and how many observations it is of.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Measured {
    /// Observations.
    pub count: u64,
    /// What they come to; `None` where they come to nothing.
    pub value: Option<f64>,
}

/// What was observed of an arm beside the control.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Evidence {
    /// Median PSNR in dB.
    pub psnr_db: Measured,
    /// Median SSIM.
    pub ssim: Measured,
    /// Median time ÷ the control's; the count is of the arm that answered fewer.
    pub latency_ratio: Measured,
    /// Votes on the arm and the control, seen from the arm.
    pub votes: Tally,
}

/// What follows from it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// A bound has too few observations to judge by, and none is broken.
    Wait,
    /// Every bound is kept.
    Fine,
    /// A bound is broken.
    Stop(Reason),
}

/// Why an arm was stopped.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Reason {
    /// The bound that it broke.
    pub guardrail: Guardrail,
    /// What was observed.
    pub observed: f64,
    /// The bound's value.
    pub bound: f64,
    /// Of how many observations.
    pub count: u64,
}

impl Guardrail {
    /// The name of its field.
    pub fn name(self) -> &'static str {
        match self {
            Self::MinPsnrDb => "min_psnr_db",
            Self::MinSsim => "min_ssim",
            Self::MaxLatencyRatio => "max_latency_ratio",
            Self::VotesPValue => "votes_p_value",
        }
    }

    fn is_broken(self, observed: f64, bound: f64) -> bool {
        match self {
            Self::MinPsnrDb | Self::MinSsim => observed < bound,
            Self::MaxLatencyRatio => observed > bound,
            Self::VotesPValue => observed <= bound,
        }
    }
}

impl Guardrails {
    /// Images that a median is of.
    pub fn comparisons(&self) -> u64 {
        self.min_comparisons.unwrap_or(COMPARISONS)
    }

    /// Requests of either arm before their times are compared.
    pub fn requests(&self) -> u64 {
        self.min_requests.unwrap_or(REQUESTS)
    }

    /// Votes before they are tested.
    pub fn votes(&self) -> u64 {
        self.min_votes.unwrap_or(VOTES)
    }

    /// Whether a bound is on images beside the teacher's, which shadow traffic makes.
    pub fn compare_images(&self) -> bool {
        self.min_psnr_db.or(self.min_ssim).is_some()
    }

    /// Every bound that is set, with its value and the observations that it takes.
    pub fn set(&self) -> impl Iterator<Item = (Guardrail, f64, u64)> {
        let all = [
            (Guardrail::MinPsnrDb, self.min_psnr_db, self.comparisons()),
            (Guardrail::MinSsim, self.min_ssim, self.comparisons()),
            (Guardrail::MaxLatencyRatio, self.max_latency_ratio, self.requests()),
            (Guardrail::VotesPValue, self.votes_p_value, self.votes()),
        ];
        all.into_iter().filter_map(|(guardrail, bound, least)| Some((guardrail, bound?, least)))
    }

    /// What the evidence says of an arm. Of several bounds that are broken the first is told.
    pub fn judge(&self, evidence: &Evidence) -> Verdict {
        let mut verdict = Verdict::Fine;
        for (guardrail, bound, least) in self.set() {
            let Measured { count, value } = evidence.of(guardrail);
            match value {
                Some(observed) if count >= least => {
                    if guardrail.is_broken(observed, bound) {
                        return Verdict::Stop(Reason { guardrail, observed, bound, count });
                    }
                }
                _ => verdict = Verdict::Wait,
            }
        }
        verdict
    }

    /// # Errors
    /// [`Error::Value`] for a bound or a count that cannot be, a count without its bound, and where nothing is bounded.
    pub(super) fn check(&self) -> Result<(), Error> {
        let within = |name: &str, value: Option<f64>, ok: fn(f64) -> bool, remedy: &str| match value
        {
            Some(value) if !ok(value) => refused(name, value, remedy),
            _ => Ok(()),
        };
        within(
            "min_psnr_db",
            self.min_psnr_db,
            |it| (0.0..=100.0).contains(&it),
            "it takes 0 to 100 dB",
        )?;
        within("min_ssim", self.min_ssim, |it| (-1.0..=1.0).contains(&it), "it takes -1 to 1")?;
        let ratio = |it| it > 0.0 && it <= MAX_RATIO;
        let remedy = format!("it takes a number above 0, at most {MAX_RATIO}");
        within("max_latency_ratio", self.max_latency_ratio, ratio, &remedy)?;
        let level = |it| it > 0.0 && it <= 0.5;
        within(
            "votes_p_value",
            self.votes_p_value,
            level,
            "it takes a number above 0, at most 0.5",
        )?;

        let counts = [
            (
                "min_comparisons",
                self.min_comparisons,
                MAX_COMPARISONS,
                self.compare_images(),
                "min_psnr_db or min_ssim",
            ),
            (
                "min_requests",
                self.min_requests,
                MAX_COUNT,
                self.max_latency_ratio.is_some(),
                "max_latency_ratio",
            ),
            ("min_votes", self.min_votes, MAX_COUNT, self.votes_p_value.is_some(), "votes_p_value"),
        ];
        for (name, count, most, used, bound) in counts {
            let Some(count) = count else { continue };
            if !(1..=most).contains(&count) {
                return refused(name, count, &format!("it takes a whole number from 1 to {most}"));
            }
            if !used {
                return refused(
                    name,
                    count,
                    &format!("it is of no use without {bound}; give that, too, or leave it out"),
                );
            }
        }
        if self.set().next().is_none() {
            let remedy = "they bound nothing; give min_psnr_db, min_ssim, max_latency_ratio or votes_p_value, or leave them out";
            return Err(Error::Value {
                field: "guardrails".into(),
                value: "{}".into(),
                remedy: remedy.into(),
            });
        }
        Ok(())
    }
}

fn refused(name: &str, value: impl fmt::Display, remedy: &str) -> Result<(), Error> {
    let field = format!("guardrails.{name}");
    Err(Error::Value { field, value: value.to_string(), remedy: remedy.to_owned() })
}

impl Evidence {
    fn of(&self, guardrail: Guardrail) -> Measured {
        match guardrail {
            Guardrail::MinPsnrDb => self.psnr_db,
            Guardrail::MinSsim => self.ssim,
            Guardrail::MaxLatencyRatio => self.latency_ratio,
            Guardrail::VotesPValue => {
                let Tally { wins, losses, .. } = self.votes;
                // A preference for the arm speaks for it, and so does one that there was: these votes count, not the most
                // that any votes so far have said. Every vote is looked at, so none that says enough is missed.
                let ratio = sequential::ln_likelihood_ratio(wins, losses);
                let against = if losses > wins { sequential::p_value(ratio) } else { 1.0 };
                Measured { count: wins + losses, value: Some(against) }
            }
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { guardrail, observed, bound, count } = self;
        match guardrail {
            Guardrail::MinPsnrDb => write!(
                f,
                "the median PSNR of its last {count} images beside its teacher's is {observed:.2} dB"
            )?,
            Guardrail::MinSsim => write!(
                f,
                "the median SSIM of its last {count} images beside its teacher's is {observed:.3}"
            )?,
            Guardrail::MaxLatencyRatio => write!(
                f,
                "its median time is {observed:.2} times the control's, over at least {count} requests each"
            )?,
            Guardrail::VotesPValue => {
                write!(f, "{count} votes prefer the control to it with p = {observed:.2e}")?;
            }
        }
        let side = match guardrail {
            Guardrail::MinPsnrDb | Guardrail::MinSsim => "below",
            Guardrail::MaxLatencyRatio => "above",
            Guardrail::VotesPValue => "at most",
        };
        write!(f, ", {side} `{}` {bound}", guardrail.name())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::experiments::tally::Outcome;

    fn tally(wins: u64, losses: u64) -> Tally {
        let mut tally = Tally::default();
        (0..wins).for_each(|_| tally.count(Outcome::Win));
        (0..losses).for_each(|_| tally.count(Outcome::Loss));
        tally
    }

    fn all() -> Guardrails {
        Guardrails {
            min_psnr_db: Some(20.0),
            min_ssim: Some(0.5),
            max_latency_ratio: Some(1.5),
            votes_p_value: Some(0.05),
            ..Guardrails::default()
        }
    }

    fn good() -> Evidence {
        let of = |count, value| Measured { count, value: Some(value) };
        Evidence {
            psnr_db: of(50, 25.0),
            ssim: of(50, 0.8),
            latency_ratio: of(100, 0.2),
            votes: tally(10, 10),
        }
    }

    #[test]
    fn every_bound_stops_and_says_why() {
        assert_eq!(all().judge(&good()), Verdict::Fine);
        let of = |count, value| Measured { count, value: Some(value) };
        let cases = [
            (
                Evidence { psnr_db: of(50, 19.994), ..good() },
                "PSNR of its last 50 images beside its teacher's is 19.99 dB, below `min_psnr_db` 20",
            ),
            (
                Evidence { ssim: of(50, 0.4), ..good() },
                "SSIM of its last 50 images beside its teacher's is 0.400, below `min_ssim` 0.5",
            ),
            (
                Evidence { latency_ratio: of(100, 2.0), ..good() },
                "its median time is 2.00 times the control's, over at least 100 requests each, above `max_latency_ratio` 1.5",
            ),
            (
                Evidence { votes: tally(0, 20), ..good() },
                "20 votes prefer the control to it with p = 2.00e-5, at most `votes_p_value` 0.05",
            ),
        ];
        for (evidence, text) in cases {
            match all().judge(&evidence) {
                Verdict::Stop(reason) => assert!(reason.to_string().ends_with(text), "{reason}"),
                other => panic!("{other:?} of {evidence:?}"),
            }
        }
        // As sure as can be, but of the arm.
        assert_eq!(all().judge(&Evidence { votes: tally(20, 0), ..good() }), Verdict::Fine);
        // As sure of the arm as could be, and then undecided.
        let turned = Evidence { votes: tally(13, 14), ..good() };
        assert!(turned.votes.p_value() < 0.01);
        assert_eq!(all().judge(&turned), Verdict::Fine);
    }

    #[test]
    fn what_bounds_nothing_or_cannot_be_is_refused_by_name() {
        let none = Guardrails::default();
        let cases = [
            (none.clone(), "guardrails"),
            (Guardrails { min_psnr_db: Some(101.0), ..none.clone() }, "guardrails.min_psnr_db"),
            (Guardrails { min_psnr_db: Some(f64::NAN), ..none.clone() }, "guardrails.min_psnr_db"),
            (Guardrails { min_ssim: Some(-1.5), ..none.clone() }, "guardrails.min_ssim"),
            (
                Guardrails { max_latency_ratio: Some(0.0), ..none.clone() },
                "guardrails.max_latency_ratio",
            ),
            (Guardrails { votes_p_value: Some(0.0), ..none.clone() }, "guardrails.votes_p_value"),
            (Guardrails { min_comparisons: Some(0), ..all() }, "guardrails.min_comparisons"),
            (Guardrails { min_comparisons: Some(501), ..all() }, "guardrails.min_comparisons"),
            (
                Guardrails { min_comparisons: Some(5), votes_p_value: Some(0.1), ..none.clone() },
                "guardrails.min_comparisons",
            ),
            (
                Guardrails { min_requests: Some(5), min_ssim: Some(0.1), ..none.clone() },
                "guardrails.min_requests",
            ),
            (
                Guardrails { min_votes: Some(5), min_ssim: Some(0.1), ..none },
                "guardrails.min_votes",
            ),
        ];
        for (guardrails, at) in cases {
            let refused = guardrails.check();
            assert!(
                matches!(&refused, Err(Error::Value { field, .. }) if field == at),
                "{refused:?}"
            );
        }
        assert_eq!(all().check(), Ok(()));
    }

    fn some<T: std::fmt::Debug + Clone + 'static>(
        of: impl Strategy<Value = T> + 'static,
    ) -> impl Strategy<Value = Option<T>> {
        proptest::option::of(of)
    }

    prop_compose! {
        fn guardrails()(
            min_psnr_db in some(0.0..100.0), min_ssim in some(-1.0..1.0), max_latency_ratio in some(0.1..10.0),
            votes_p_value in some(0.001..0.5), min_comparisons in some(1u64..500), min_requests in some(1u64..1000),
            min_votes in some(1u64..60),
        ) -> Guardrails {
            Guardrails { min_psnr_db, min_ssim, min_comparisons, max_latency_ratio, min_requests, votes_p_value, min_votes }
        }
    }

    prop_compose! {
        fn evidence()(
            psnr_db in (0u64..600, some(0.0..100.0)), ssim in (0u64..600, some(-1.0..1.0)),
            latency in (0u64..1200, some(0.01..20.0)), wins in 0u64..50, losses in 0u64..50,
        ) -> Evidence {
            let of = |(count, value)| Measured { count, value };
            Evidence { psnr_db: of(psnr_db), ssim: of(ssim), latency_ratio: of(latency), votes: tally(wins, losses) }
        }
    }

    proptest! {
        #[test]
        fn nobody_is_stopped_by_less_than_was_asked_for_or_by_a_bound_that_is_not_set(
            guardrails in guardrails(), evidence in evidence(),
        ) {
            let verdict = guardrails.judge(&evidence);
            if let Verdict::Stop(Reason { guardrail, observed, bound, count }) = verdict {
                let (_, set, least) = guardrails.set().find(|(it, ..)| *it == guardrail).unwrap();
                prop_assert!(count >= least && bound == set && guardrail.is_broken(observed, bound));
            }
            let few = Evidence {
                psnr_db: Measured { count: guardrails.comparisons() - 1, ..evidence.psnr_db },
                ssim: Measured { count: guardrails.comparisons() - 1, ..evidence.ssim },
                latency_ratio: Measured { count: guardrails.requests() - 1, ..evidence.latency_ratio },
                votes: tally(0, guardrails.votes() - 1),
            };
            let expected = if guardrails.set().next().is_some() { Verdict::Wait } else { Verdict::Fine };
            prop_assert_eq!(guardrails.judge(&few), expected);
        }

        #[test]
        fn worse_evidence_never_saves_an_arm(
            guardrails in guardrails(), evidence in evidence(), by in 0.0..5.0f64, more in 0u64..10,
        ) {
            let stopped = |evidence: &Evidence| matches!(guardrails.judge(evidence), Verdict::Stop(_));
            let change = |it: Measured, by: f64| Measured { value: it.value.map(|value| value + by), ..it };
            let mut votes = evidence.votes;
            (0..more).for_each(|_| votes.count(Outcome::Loss));
            let worse = Evidence {
                psnr_db: change(evidence.psnr_db, -by),
                ssim: change(evidence.ssim, -by),
                latency_ratio: change(evidence.latency_ratio, by),
                votes,
            };
            prop_assert!(!stopped(&evidence) || stopped(&worse));
        }
    }
}
