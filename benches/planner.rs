//! How long the planner takes to say who shares the next evaluation.
//!
//! `cargo bench --bench planner`

use understudy::engine::batcher::{Batcher, ModelKey, SampleKey};

fn main() {
    divan::main();
}

/// `samples` in flight over four models, all of which fit one evaluation.
fn busy(samples: u64) -> Batcher {
    let mut batcher = Batcher::default();
    for sample in 0..samples {
        // Three in four are the first model's: its batch is the one that is planned.
        let model = if sample % 4 == 3 { 1 + sample % 3 } else { 0 };
        batcher.join(ModelKey(model), SampleKey(sample), 1, samples as usize);
    }
    batcher
}

/// One evaluation's worth of planning: who is next, and what it cost.
#[divan::bench(args = [8, 64, 256])]
fn plan(bencher: divan::Bencher, samples: u64) {
    let mut batcher = Batcher::default();
    for sample in 0..samples {
        batcher.join(ModelKey(0), SampleKey(sample), 1, samples as usize);
    }
    bencher.bench_local(|| {
        let batch = batcher.next();
        batcher.ran(ModelKey(0), 0.01);
        batch
    });
}

/// The same with every sample leaving and a new one joining.
#[divan::bench(args = [8, 64, 256])]
fn plan_with_turnover(bencher: divan::Bencher, samples: u64) {
    let mut batcher = busy(samples);
    let mut newest = samples;
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
