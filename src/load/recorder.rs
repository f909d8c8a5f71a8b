//! Answers become figures.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Answer, Mix, Outcome};
use crate::percentiles::{percentile, sorted};

/// Gathers the outcomes of a run. It holds a number per answer, so that percentiles are exact.
#[derive(Debug)]
pub struct Recorder {
    mix: Mix,
    rate: f64,
    window_seconds: f64,
    entries: Vec<Entry>,
    late_seconds: Vec<f64>,
}

#[derive(Debug, Clone, Default)]
struct Entry {
    answered: Vec<f64>,
    refused_429: u64,
    refused_other: u64,
    failed: u64,
    images_in_window: u64,
    served_by: BTreeMap<String, u64>,
    problem: Option<String>,
}

/// One mix at one rate.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// The mix, as it was written.
    pub mix: String,
    /// Requests per second that were offered.
    pub rate: f64,
    /// Seconds until the last answer, or until the run was stopped.
    pub seconds: f64,
    /// Requests that were under way when it was stopped.
    pub unfinished: u64,
    /// How late requests were sent, in milliseconds: by the timer's resolution, or for want of a connection.
    pub late_ms: Option<Percentiles>,
    /// What became of the requests, by name in the mix.
    pub models: Vec<Figures>,
}

/// What became of the requests for one model of a mix.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Its name in the mix.
    pub name: String,
    /// Requests that were answered with images.
    pub accepted: u64,
    /// Refused with 429: the queue was full, or the deadline out of reach.
    pub refused_429: u64,
    /// Refused with any other status.
    pub refused_other: u64,
    /// Without an answer.
    pub failed: u64,
    /// Images per second that came while requests were sent.
    pub images_per_second: f64,
    /// From when a request was due until its images were here, in milliseconds.
    pub latency_ms: Option<Percentiles>,
    /// Which models made the images, in requests.
    pub served_by: BTreeMap<String, u64>,
    /// The first refusal other than 429, or failure.
    pub first_problem: Option<String>,
}

/// Percentiles, by nearest rank.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half do not exceed it.
    pub p50: f64,
    /// Nine tenths do not.
    pub p90: f64,
    /// 99 of a hundred do not.
    pub p99: f64,
    /// None does.
    pub max: f64,
}

impl Recorder {
    /// Of requests that are sent for `seconds`.
    pub fn new(mix: &Mix, rate: f64, seconds: f64) -> Self {
        let entries = vec![Entry::default(); mix.names().len()];
        let mix = mix.clone();
        Self { mix, rate, window_seconds: seconds, entries, late_seconds: Vec::new() }
    }

    /// Takes an outcome in.
    pub fn add(&mut self, outcome: Outcome) {
        self.late_seconds.push(outcome.late_seconds);
        let entry = &mut self.entries[outcome.arrival.entry];
        let problem = match outcome.answer {
            Answer::Images { model, count } => {
                entry.answered.push(outcome.latency_seconds);
                *entry.served_by.entry(model).or_default() += 1;
                if outcome.arrival.at + outcome.latency_seconds <= self.window_seconds {
                    entry.images_in_window += count;
                }
                return;
            }
            Answer::Refused { status: 429, .. } => {
                entry.refused_429 += 1;
                return;
            }
            Answer::Refused { status, message } => {
                entry.refused_other += 1;
                format!("{status}: {message}")
            }
            Answer::Failed(problem) => {
                entry.failed += 1;
                problem
            }
        };
        entry.problem.get_or_insert(problem);
    }

    /// Answers so far, and how many of them have no images.
    pub fn answers(&self) -> (usize, usize) {
        let accepted: usize = self.entries.iter().map(|entry| entry.answered.len()).sum();
        (self.late_seconds.len(), self.late_seconds.len() - accepted)
    }

    /// The figures of a run that took so many seconds and sent so many requests; `stopped` is whether it was
    /// to send more.
    pub fn finish(self, seconds: f64, sent: u64, stopped: bool) -> Run {
        let window = self.window_seconds;
        let window = if stopped { window.min(seconds) } else { window };
        let figures = |(name, entry): (&str, Entry)| Figures {
            name: name.to_owned(),
            accepted: entry.answered.len() as u64,
            refused_429: entry.refused_429,
            refused_other: entry.refused_other,
            failed: entry.failed,
            images_per_second: entry.images_in_window as f64 / window,
            latency_ms: Percentiles::of(entry.answered),
            served_by: entry.served_by,
            first_problem: entry.problem,
        };
        Run {
            mix: self.mix.to_string(),
            rate: self.rate,
            seconds,
            unfinished: sent - self.late_seconds.len() as u64,
            late_ms: Percentiles::of(self.late_seconds),
            models: self.mix.names().zip(self.entries).map(figures).collect(),
        }
    }
}

impl Figures {
    /// Requests that were answered or failed.
    pub fn requests(&self) -> u64 {
        self.accepted + self.refused_429 + self.refused_other + self.failed
    }
}

impl Percentiles {
    /// Of seconds, in milliseconds; `None` of none.
    fn of(seconds: Vec<f64>) -> Option<Self> {
        let all = sorted(seconds);
        let at = |percent| percentile(&all, percent) * 1e3;
        (!all.is_empty()).then(|| Self { p50: at(50), p90: at(90), p99: at(99), max: at(100) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Arrival;

    #[test]
    fn answers_are_counted_by_what_they_are() {
        let mut recorder = Recorder::new(&"a,b".parse().unwrap(), 4.0, 2.0);
        let mut add = |entry, at, latency_seconds, answer| {
            let arrival = Arrival { number: 0, at, entry };
            recorder.add(Outcome { arrival, late_seconds: 0.001, latency_seconds, answer });
        };
        let images = |model: &str, count| Answer::Images { model: model.into(), count };
        let refused = |status| Answer::Refused { status, message: format!("no {status}") };
        add(0, 0.0, 0.5, images("x", 2));
        add(0, 0.5, 0.25, images("y", 2));
        // After the last request was sent.
        add(0, 1.5, 1.0, images("y", 2));
        add(0, 1.6, 0.1, refused(429));
        add(1, 0.1, 0.1, refused(504));
        add(1, 0.2, 0.1, Answer::Failed("gone".into()));
        assert_eq!(recorder.answers(), (6, 3));
        let run = recorder.finish(2.5, 7, false);
        assert_eq!(run.unfinished, 1);
        let [a, b] = &run.models[..] else { panic!("{run:?}") };
        assert_eq!((a.accepted, a.refused_429, a.refused_other, a.failed), (3, 1, 0, 0));
        assert_eq!((b.accepted, b.refused_429, b.refused_other, b.failed), (0, 0, 1, 1));
        assert_eq!(a.images_per_second, 2.0);
        let percentiles = Percentiles { p50: 500.0, p90: 1000.0, p99: 1000.0, max: 1000.0 };
        assert_eq!((a.latency_ms, b.latency_ms), (Some(percentiles), None));
        assert_eq!(a.served_by, BTreeMap::from([("x".into(), 1), ("y".into(), 2)]));
        assert_eq!((&a.first_problem, b.first_problem.as_deref()), (&None, Some("504: no 504")));
        assert_eq!((a.requests(), b.requests()), (4, 2));
    }
}
