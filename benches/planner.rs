//! How long the planner takes to say who shares the next evaluation.
//!
//! `cargo bench --bench planner`

use understudy::engine::{
    batcher::{Batcher, Costs, ModelKey, SampleKey, ScheduledWork, Urgency},
    stage::{PerStage, Stage},
};

fn main() {
    divan::main();
}

/// A hundredth of a second for every row.
struct PerRow;

impl Costs for PerRow {
    fn seconds(&self, _: ModelKey, _: Stage, rows: usize) -> f64 {
        0.01 * rows as f64
    }
    fn margin(&self) -> f64 {
        1.1
    }
}

fn ordinary() -> ScheduledWork {
    ScheduledWork::denoising(1, 50, Urgency::Ordinary(0.0))
}

/// `samples` in flight of each of so many models, all of which fit one evaluation.
fn busy(models: u64, samples: u64) -> Batcher {
    let mut batcher = Batcher::default();
    for sample in 0..models * samples {
        let (model, key) = (ModelKey(sample % models), SampleKey(sample));
        batcher.join(model, key, ordinary(), PerStage::new(|_| samples as usize));
    }
    batcher
}

/// One evaluation's worth of planning: who is next, and what it cost.
#[divan::bench(args = [8, 64, 256])]
fn plan(bencher: divan::Bencher, samples: u64) {
    let mut batcher = busy(1, samples);
    bencher.bench_local(|| {
        let batch = batcher.next(0.0, &PerRow)?;
        batcher.ran(&batch, 0.01);
        Some(batch)
    });
}

/// The same among four models, as many samples each, with every sample of the batch leaving and a
/// new one joining: the most that an evaluation can change.
#[divan::bench(args = [8, 64, 256])]
fn plan_with_turnover(bencher: divan::Bencher, samples: u64) {
    let mut batcher = busy(4, samples);
    let mut newest = 4 * samples;
    bencher.bench_local(|| {
        let Some(batch) = batcher.next(0.0, &PerRow) else { return };
        batcher.ran(&batch, 0.01);
        for sample in batch.samples {
            batcher.leave(batch.model, sample);
            batcher.join(
                batch.model,
                SampleKey(newest),
                ordinary(),
                PerStage::new(|_| samples as usize),
            );
            newest += 1;
        }
    });
}

/// The same with every sample promised by a time that not all can be done by: the most that there is to
/// look at.
#[divan::bench(args = [8, 64, 256])]
fn plan_with_promises(bencher: divan::Bencher, samples: u64) {
    let mut batcher = Batcher::default();
    for sample in 0..samples {
        let work = ScheduledWork {
            urgency: Urgency::Deadline { due: 1.0 + 0.01 * sample as f64, from: f64::INFINITY },
            ..ordinary()
        };
        batcher.join(ModelKey(sample % 2), SampleKey(sample), work, PerStage::new(|_| 8));
    }
    bencher.bench_local(|| batcher.next(0.0, &PerRow));
}
