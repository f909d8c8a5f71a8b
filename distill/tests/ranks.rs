//! A run over several ranks is the run of one process, to the bit. The ranks are threads here, which speak over channels;
//! `tests/ranks/run.sh` does the same with processes and MPI.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "../src/ranks/threads.rs"]
mod threads;

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::thread;

use candle_core::{DType, Device, Tensor};
use common::{Blind, curve, network, pool_of, shared, task, teacher};
use serde_json::{Value, json};
use threads::Threads;
use understudy_distill::objective::{Objective, SegmentEnd};
use understudy_distill::pool::Order;
use understudy_distill::pool::segments::{self, Segments};
use understudy_distill::ranks::{Alone, Shards, World, check, seed};
use understudy_distill::run_dir::{CHECKPOINT, RUN_DIR, RunDir};
use understudy_distill::teacher::Teacher;
use understudy_distill::train::{Outcome, Task, train};
use understudy_distill::training_batch::BatchSource;
use understudy_distill::watch::{Event, Watch};
use understudy_models::schedule::PredictionType;

const SHARDS: usize = 4;

/// A rank's part of a run of [`SHARDS`] shards of two rows each.
fn sharded<'a>(teacher: &'a Teacher, out: &Path, steps: u64, world: &'a dyn World) -> Task<'a> {
    let shards = Shards::new(world, SHARDS, |shard| {
        let pool = pool_of(teacher, Order::Dynamic { rho: 0.2 }, 10, None, (2, seed(3, shard)));
        Ok::<_, ()>(Box::new(pool) as Box<dyn BatchSource>)
    });
    let run = (world.rank() == 0).then(|| RunDir::open(out).unwrap());
    // Only the first rank's weights count.
    let student = network(8, &json!({}));
    let mut task = shared(teacher, (student, None), run, shards.unwrap(), steps);
    if world.rank() > 0 {
        let mut weights = task.student.weights.values_mut();
        weights
            .try_for_each(|weight| {
                *weight = weight.zeros_like()?;
                Ok::<_, candle_core::Error>(())
            })
            .unwrap();
    }
    task
}

/// A segment's ends in two shards.
fn of_segments<'a>(teacher: &'a Teacher, out: &Path, steps: u64, world: &'a dyn World) -> Task<'a> {
    let shards = Shards::new(world, 2, |shard| {
        let seed = seed(3, shard);
        let settings =
            segments::Settings { evaluations: 2, walk_steps: 10, samples: 8, batch: 2, seed };
        Segments::new(teacher, settings).map(|pool| Box::new(pool) as Box<dyn BatchSource>)
    });
    let run = (world.rank() == 0).then(|| RunDir::open(out).unwrap());
    let student = (network(8, &json!({})), Some(PredictionType::Velocity));
    let task = shared(teacher, student, run, shards.unwrap(), steps);
    let student = task.student.of_few_steps().unwrap();
    Task { objective: Objective::SegmentEnd(SegmentEnd), student, ..task }
}

/// Builds a rank's part of a run.
type Make = for<'a> fn(&'a Teacher, &Path, u64, &'a dyn World) -> Task<'a>;

/// The same run by so many ranks, each with the teacher that it opened itself.
fn by_ranks(home: &Path, make: Make, out: &Path, steps: u64, ranks: usize) {
    let folder = home.join("teacher");
    let rank = |world: Threads| {
        let open = Teacher::open(&folder, "teacher".into(), DType::F32, &Device::Cpu);
        train(make(&open.unwrap(), out, steps, &world), &mut Blind).unwrap()
    };
    let rank = &rank;
    thread::scope(|scope| {
        let ranks = Threads::world(ranks).into_iter();
        let ranks: Vec<_> = ranks.map(|world| scope.spawn(move || rank(world))).collect();
        for rank in ranks {
            assert_eq!(rank.join().unwrap(), Outcome::Finished);
        }
    });
}

/// Everything that a run leaves, but for its times and who did it.
fn left(out: &Path) -> (Vec<Value>, Vec<u8>, Vec<u8>) {
    let checkpoint = fs::read(out.join(RUN_DIR).join(CHECKPOINT)).unwrap();
    let header = 8 + u64::from_le_bytes(checkpoint[..8].try_into().unwrap()) as usize;
    let mut curve = curve(out);
    for line in &mut curve {
        line.as_object_mut().unwrap().remove("sent_bytes");
    }
    let weights = fs::read(out.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    (curve, checkpoint[header..].to_vec(), weights)
}

#[test]
fn any_number_of_ranks_makes_the_same_student() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    for (name, make, most) in [("pool", sharded as Make, 4), ("segments", of_segments, 2)] {
        let out = |number: &str| home.path().join(format!("{name}-{number}"));
        train(make(&teacher, &out("alone"), 10, &Alone), &mut Blind).unwrap();
        let alone = left(&out("alone"));
        assert_eq!(alone.0.len(), 10);
        for ranks in [1, 2, 4].into_iter().filter(|&ranks| ranks <= most) {
            by_ranks(home.path(), make, &out(&ranks.to_string()), 10, ranks);
            assert!(left(&out(&ranks.to_string())) == alone, "{name}: {ranks} ranks");
        }
        // Each goes on from what others wrote, the second time from the middle between two checkpoints.
        for (ranks, steps) in [(most, 4), (1, 7), (2, 10)] {
            by_ranks(home.path(), make, &out("resumed"), steps, ranks);
        }
        assert!(left(&out("resumed")) == alone, "{name}: resumed");
    }
}

/// The traffic of a ring: what a rank sends in a step is 2·(N − 1)/N of the gradient, and a few numbers.
#[test]
fn a_step_costs_the_traffic_of_a_ring() {
    let home = tempfile::tempdir().unwrap();
    let weights: usize = sharded(&teacher(home.path()), &home.path().join("0"), 1, &Alone)
        .student
        .weights
        .values()
        .map(Tensor::elem_count)
        .sum();
    for ranks in [2, 4] {
        let out = home.path().join(ranks.to_string());
        by_ranks(home.path(), sharded, &out, 5, ranks);
        let ring = (2 * (ranks - 1) * 4 * weights) as f64 / ranks as f64;
        for line in curve(&out) {
            let sent = line["sent_bytes"].as_u64().unwrap() as f64;
            assert!((sent / ring - 1.0).abs() < 0.01, "{sent} bytes, {ring} by the formula");
        }
    }
}

#[test]
fn one_shard_is_the_run_that_there_was_before_shards() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let (ordinary, shard) = (home.path().join("1"), home.path().join("2"));
    train(task(&teacher, &ordinary, 5, None), &mut Blind).unwrap();
    let mut one = task(&teacher, &shard, 5, None);
    let pool =
        |shard| pool_of(&teacher, Order::Dynamic { rho: 0.2 }, 10, None, (4, seed(3, shard)));
    let shards =
        Shards::new(&Alone, 1, |shard| Ok::<_, ()>(Box::new(pool(shard)) as Box<dyn BatchSource>));
    one.shards = shards.unwrap();
    train(one, &mut Blind).unwrap();
    assert!(left(&ordinary) == left(&shard));
    // Of several each has a seed of its own.
    let seeds: BTreeSet<u64> = (0..8).map(|shard| seed(3, shard)).collect();
    assert!(seeds.len() == 8 && seed(3, 0) == 3);
}

/// Stops its own rank, which stops all.
struct Stops(u64, bool);

impl Watch for Stops {
    fn event(&mut self, event: Event<'_>) {
        if let Event::Step { record, .. } = event {
            self.1 = record.step >= self.0;
        }
    }

    fn stops(&self) -> bool {
        self.1
    }
}

#[test]
fn a_rank_that_is_told_to_stop_stops_all_at_the_same_step() {
    let home = tempfile::tempdir().unwrap();
    let (folder, out) = (home.path().join("teacher"), home.path().join("out"));
    teacher(home.path());
    let rank = |world: Threads| {
        let open = Teacher::open(&folder, "teacher".into(), DType::F32, &Device::Cpu).unwrap();
        let task = sharded(&open, &out, 10, &world);
        let at = if world.rank() == 1 { 3 } else { u64::MAX };
        train(task, &mut Stops(at, false)).unwrap()
    };
    let rank = &rank;
    thread::scope(|scope| {
        let ranks = Threads::world(2).into_iter();
        let ranks: Vec<_> = ranks.map(|world| scope.spawn(move || rank(world))).collect();
        for rank in ranks {
            assert_eq!(rank.join().unwrap(), Outcome::Stopped { step: 3 });
        }
    });
    assert_eq!(curve(&out).len(), 3);
}

#[test]
fn another_number_of_shards_is_another_run() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let out = home.path().join("out");
    train(sharded(&teacher, &out, 2, &Alone), &mut Blind).unwrap();
    let problem = train(task(&teacher, &out, 3, None), &mut Blind).unwrap_err().to_string();
    assert!(problem.contains("`shards` is 4 there and absent here"), "{problem}");
}

/// A rank that was given something else says so, and the others do not begin without it.
#[test]
fn ranks_of_another_run_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let (folder, out) = (home.path().join("teacher"), home.path().join("out"));
    teacher(home.path());
    let rank = |world: Threads| {
        let open = Teacher::open(&folder, "teacher".into(), DType::F32, &Device::Cpu).unwrap();
        let mut task = sharded(&open, &out, 2, &world);
        task.identity.insert("batch".into(), (8 << world.rank()).into());
        let first = world.rank() == 0;
        // With MPI the first rank is ended where its channel breaks here.
        (first, catch_unwind(AssertUnwindSafe(|| train(task, &mut Blind))))
    };
    let rank = &rank;
    thread::scope(|scope| {
        let ranks = Threads::world(2).into_iter();
        let ranks: Vec<_> = ranks.map(|world| scope.spawn(move || rank(world))).collect();
        for rank in ranks {
            match rank.join().unwrap() {
                (true, ended) => assert!(ended.is_err()),
                (false, ended) => {
                    let problem = ended.unwrap().unwrap_err().to_string();
                    let words = "`rank` is 1: of the first rank `batch` is 8, of this one 16";
                    assert!(problem.contains(words), "{problem}");
                }
            }
        }
    });
    assert!(!out.join(RUN_DIR).join(CHECKPOINT).exists());
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let of = |size: usize| Threads::world(size).remove(0);
    for (shards, batch, accumulate, ranks, words) in [
        (3, 12, 1, 1, "`--shards` is 3: must be a power of two"),
        (0, 12, 1, 1, "must be a power of two"),
        (8, 12, 1, 1, "--batch 12 must be a multiple of 8"),
        (4, 12, 2, 1, "--batch 12 must be a multiple of 4 × 2"),
        (4, 12, 1, 3, "3 processes were started, and their number must be a power of two; start 2"),
        (1, 12, 1, 2, "2 processes were started, and each needs a shard; give --shards 2"),
    ] {
        let problem = check(shards, batch, accumulate, &of(ranks)).unwrap_err().to_string();
        assert!(problem.contains(words), "{problem}");
    }
    for (shards, batch, accumulate, ranks) in [(1, 7, 1, 1), (4, 12, 1, 4), (4, 12, 3, 2)] {
        check(shards, batch, accumulate, &of(ranks)).unwrap();
    }
}
