//! How long the planner takes to say who shares the next evaluation.
//!
//! `cargo bench --bench planner`

use understudy::engine::batcher::{Batcher, ModelKey, SampleKey};

fn main() {
    divan::main();
}

/// `samples` in flight of each of so many models, all of which fit one evaluation.
fn busy(models: u64, samples: u64) -> Batcher {
    let mut batcher = Batcher::default();
    for sample in 0..models * samples {
        let (model, key) = (ModelKey(sample % models), SampleKey(sample));
        batcher.join(model, key, 1, samples as usize);
    }
    batcher
}

/// One evaluation's worth of planning: who is next, and what it cost.
#[divan::bench(args = [8, 64, 256])]
fn plan(bencher: divan::Bencher, samples: u64) {
    let mut batcher = busy(1, samples);
    bencher.bench_local(|| {
        let batch = batcher.next();
        batcher.ran(ModelKey(0), 0.01);
        batch
    });
}

/// The same among four models, as many samples each, with every sample of the batch leaving and a
/// new one joining: the most that an evaluation can change.
#[divan::bench(args = [8, 64, 256])]
fn plan_with_turnover(bencher: divan::Bencher, samples: u64) {
    let mut batcher = busy(4, samples);
    let mut newest = 4 * samples;
    bencher.bench_local(|| {
        let Some(batch) = batcher.next() else { return };
        batcher.ran(batch.model, 0.01);
        for sample in batch.samples {
            batcher.leave(batch.model, sample);
            batcher.join(batch.model, SampleKey(newest), 1, samples as usize);
            newest += 1;
        }
    });
}
