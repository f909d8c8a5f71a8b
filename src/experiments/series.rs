//! Experiments as Prometheus series, read off them at every scrape, so that they go when an experiment
//! goes. The bounds on experiments and arms bound them.

use std::sync::{Arc, PoisonError};

use prometheus::{
    core::{Collector, Desc},
    proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};

use super::{
    condition::Condition,
    experiment::Experiment,
    guardrails::Guardrails,
    rollout::CONTROL,
    store::Live,
    traffic::{BOUNDS, Traffic},
};

/// An arm's series of a metric, each with the value of its label beside `experiment` and `model`, where it
/// has one.
type Read = fn(&Experiment, usize) -> Vec<(Option<&'static str>, Metric)>;

/// One metric.
struct Family {
    desc: Desc,
    kind: MetricType,
    of: Read,
}

fn family(
    name: &str,
    help: &str,
    kind: MetricType,
    more: &[&str],
    of: Read,
) -> prometheus::Result<Family> {
    let labels = ["experiment", "model"].iter().chain(more).map(|label| (*label).to_owned());
    let desc = Desc::new(name.into(), help.into(), labels.collect(), Default::default())?;
    Ok(Family { desc, kind, of })
}

/// All of them.
pub(super) struct Series {
    live: Live,
    condition: Arc<Condition>,
    families: Vec<Family>,
}

impl Series {
    /// # Errors
    /// Only for a name that Prometheus does not take, which is a mistake in this file.
    pub(super) fn new(live: Live, condition: Arc<Condition>) -> prometheus::Result<Self> {
        let gauge_kind = MetricType::GAUGE;
        let families = vec![
            family(
                "understudy_experiment_share_ratio",
                "An arm's share of an experiment's traffic.",
                gauge_kind,
                &[],
                |experiment, arm| alone(gauge(experiment.share(arm))),
            )?,
            family(
                "understudy_experiment_request_duration_seconds",
                "Time from the receipt of a request for an experiment to its answer, by the arm that served.",
                MetricType::HISTOGRAM,
                &[],
                |experiment, arm| alone(histogram(&experiment.traffic(arm))),
            )?,
            family(
                "understudy_experiment_images_total",
                "Images of answered requests for an experiment, by the arm that served.",
                MetricType::COUNTER,
                &[],
                |experiment, arm| alone(counter(experiment.traffic(arm).images)),
            )?,
            family(
                "understudy_experiment_votes_total",
                "Votes on blind pairs, seen from each arm of the pair.",
                MetricType::COUNTER,
                &["outcome"],
                |experiment, arm| {
                    let tally = experiment.votes.of(arm);
                    let counts = [("win", tally.wins), ("loss", tally.losses), ("tie", tally.ties)];
                    counts.map(|(outcome, count)| (Some(outcome), counter(count))).into()
                },
            )?,
            family(
                "understudy_experiment_win_ratio",
                "Share of an arm's decisive votes that preferred it.",
                gauge_kind,
                &[],
                |experiment, arm| {
                    let rate = experiment.votes.of(arm).win_rate();
                    rate.map(|rate| (None, gauge(rate))).into_iter().collect()
                },
            )?,
            family(
                "understudy_experiment_win_interval_ratio",
                "Ends of Wilson's 95 % interval of the win ratio.",
                gauge_kind,
                &["end"],
                |experiment, arm| match experiment.votes.of(arm).interval() {
                    Some([low, high]) => {
                        vec![(Some("low"), gauge(low)), (Some("high"), gauge(high))]
                    }
                    None => Vec::new(),
                },
            )?,
            family(
                "understudy_experiment_p_value_ratio",
                "Always-valid p-value of the hypothesis that an arm is preferred as often as not.",
                gauge_kind,
                &[],
                |experiment, arm| alone(gauge(experiment.votes.of(arm).p_value())),
            )?,
            family(
                "understudy_experiment_arm_stopped",
                "1 where a guardrail has stopped an arm, else 0; for every guardrail that is set.",
                gauge_kind,
                &["guardrail"],
                stopped,
            )?,
            family(
                "understudy_experiment_ramp_stage",
                "The stage of a ramp, from 1; of the arm that it gives more traffic.",
                gauge_kind,
                &[],
                |experiment, arm| {
                    let ramp =
                        experiment.rollout.as_ref().and_then(|rollout| rollout.ramp.as_ref());
                    let ramp = ramp.filter(|_| arm != CONTROL);
                    ramp.map(|ramp| (None, gauge((ramp.stage + 1) as f64))).into_iter().collect()
                },
            )?,
        ];
        Ok(Self { live, condition, families })
    }
}

impl Collector for Series {
    fn desc(&self) -> Vec<&Desc> {
        let of_experiments = self.families.iter().map(|family| &family.desc);
        let Condition { failing, panics, .. } = self.condition.as_ref();
        of_experiments.chain(failing.desc()).chain(panics.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        let family = |family: &Family| {
            let mut metrics = Vec::new();
            for experiment in live.values() {
                for (arm, named) in experiment.arms.iter().enumerate() {
                    let name = named.name();
                    for (more, mut metric) in (family.of)(experiment, arm) {
                        let values = [Some(experiment.id.as_str()), Some(name.as_str()), more];
                        let values = values.into_iter().flatten();
                        let names = &family.desc.variable_labels;
                        metric.set_label(names.iter().zip(values).map(label).collect());
                        metrics.push(metric);
                    }
                }
            }
            let mut written = MetricFamily::default();
            written.set_name(family.desc.fq_name.clone());
            written.set_help(family.desc.help.clone());
            written.set_field_type(family.kind);
            written.set_metric(metrics);
            written
        };
        let of_experiments = self.families.iter().map(family);
        let Condition { failing, panics, .. } = self.condition.as_ref();
        of_experiments.chain(failing.collect()).chain(panics.collect()).collect()
    }
}

fn stopped(experiment: &Experiment, arm: usize) -> Vec<(Option<&'static str>, Metric)> {
    let Some(rollout) = experiment.rollout.as_ref().filter(|_| arm != CONTROL) else {
        return Vec::new();
    };
    let by = rollout.stopped(arm).map(|stopped| stopped.reason.guardrail);
    let set = rollout.guardrails.iter().flat_map(Guardrails::set);
    set.map(|(guardrail, ..)| {
        let stopped = by == Some(guardrail);
        (Some(guardrail.name()), gauge(f64::from(u8::from(stopped))))
    })
    .collect()
}

fn alone(metric: Metric) -> Vec<(Option<&'static str>, Metric)> {
    vec![(None, metric)]
}

fn label((name, value): (&String, &str)) -> LabelPair {
    let mut label = LabelPair::default();
    label.set_name(name.clone());
    label.set_value(value.to_owned());
    label
}

fn gauge(value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = Metric::default();
    metric.set_gauge(gauge);
    metric
}

fn counter(value: u64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value as f64);
    let mut metric = Metric::default();
    metric.set_counter(counter);
    metric
}

fn histogram(traffic: &Traffic) -> Metric {
    let mut below = 0;
    let buckets = BOUNDS.iter().zip(&traffic.buckets).map(|(bound, count)| {
        below += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound);
        bucket.set_cumulative_count(below);
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(traffic.requests());
    histogram.set_sample_sum(traffic.seconds);
    let mut metric = Metric::default();
    metric.set_histogram(histogram);
    metric
}
