//! The pool walks as the server samples.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device};
use std::collections::HashSet;
use std::fs;
use std::path::Path;

use common::{learned_teacher, network, pool, schedule, teacher};
use serde_json::json;
use understudy_distill::checkpoint::Snapshot;
use understudy_distill::data::Images;
use understudy_distill::generate::{Classes, Sampling};
use understudy_distill::pool::{Order, Pool, Settings};
use understudy_distill::prune;
use understudy_distill::teacher::Teacher;
use understudy_distill::training_batch::BatchSource;
use understudy_distill::walk::Walks;
use understudy_models::sampler::{self, Kind};

fn fill(pool: &mut Pool<'_>) {
    while pool.prepare().unwrap().is_some() {}
}

/// A sample that reaches its end is the image of its seed, to the bit.
#[test]
fn finished_samples_are_those_of_their_seeds() {
    let home = tempfile::tempdir().unwrap();
    for teacher in [teacher(home.path()), learned_teacher(home.path())] {
        let learned = teacher.learned_variance();
        let kept = home.path().join(format!("kept-{learned}"));
        let walks = Walks::new(&teacher.schedule, Kind::Ddpm, 20, learned).unwrap();
        let settings = Settings {
            order: Order::Iterative,
            batch: 4,
            seed: 3,
            run: "test".into(),
            earlier: None,
            file: None,
            finished: Some(kept.clone()),
        };
        let mut pool = Pool::new(&teacher, walks, settings).unwrap();
        fill(&mut pool);
        let mut seeds = Vec::new();
        for step in 0..20 {
            let training_batch = pool.training_batch(step).unwrap();
            assert!(training_batch.timesteps.iter().all(|&t| t == 19 - step as usize));
            seeds = training_batch.seeds;
        }
        assert_eq!(pool.finished(), 4);
        assert_eq!(pool.teacher_evaluations(), 80);
        for seed in seeds {
            let sampling = Sampling {
                trajectory: sampler::trajectory(&teacher.schedule, Kind::Ddpm, 20, 0.0, learned)
                    .unwrap(),
                classes: Classes::FromSeed(3),
                captions: None,
                first_seed: seed,
                batch: 1,
            };
            let batch = sampling.batches(teacher.network(), 0..1).next().unwrap().unwrap();
            let class = batch.labels.as_ref().unwrap()[0];
            let path = kept.join(format!("{class:04}/{seed}.png"));
            let picture = Images::open(path.parent().unwrap()).unwrap();
            let names: Vec<_> = fs::read_dir(path.parent().unwrap())
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect();
            assert!(names.contains(&path));
            let found = (0..picture.len())
                .any(|index| picture.image(index) == batch.images(None).unwrap()[0].pixels);
            assert!(found, "seed {seed}");
        }
    }
}

#[test]
fn orders_spread_times_as_the_paper_says() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let times = |order| {
        let mut pool = pool(&teacher, order, 20, None);
        fill(&mut pool);
        (0..3).map(|step| pool.training_batch(step).unwrap().timesteps).collect::<Vec<_>>()
    };
    let distinct = |times: &[usize]| times.iter().collect::<HashSet<_>>().len();
    assert!(times(Order::Iterative).iter().all(|times| distinct(times) == 1));
    let shuffled = times(Order::Shuffled);
    assert!(distinct(&shuffled[0]) > 1);
    // The same samples, one step on.
    for (before, after) in shuffled[0].iter().zip(&shuffled[1]) {
        assert!(*after + 1 == *before || (*before, *after) == (0, 19));
    }
    let dynamic = times(Order::Dynamic { rho: 1.0 });
    assert!(dynamic.iter().any(|times| distinct(times) > 2));
}

/// A kill while the teacher still fills the pool, in memory or in a file.
#[test]
fn an_interrupted_filling_ends_in_the_same_pool() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let order = Order::Dynamic { rho: 2.0 };
    let batches = |pool: &mut Pool<'_>| {
        let training_batch = |step| {
            let training_batch = pool.training_batch(step).unwrap();
            let values: Vec<f32> = training_batch.x.flatten_all().unwrap().to_vec1().unwrap();
            (values, training_batch.timesteps, training_batch.seeds)
        };
        (1..20).map(training_batch).collect::<Vec<_>>()
    };
    let mut whole = pool(&teacher, order, 20, None);
    fill(&mut whole);
    let expected = batches(&mut whole);
    for file in [None, Some(home.path().join("pool"))] {
        let mut begun = pool(&teacher, order, 20, file.clone());
        for _ in 0..7 {
            assert!(begun.prepare().unwrap().is_some());
        }
        let mut snapshot = Snapshot::default();
        begun.save(&mut snapshot).unwrap();
        begun.keep();
        // These steps are lost.
        for _ in 0..3 {
            assert!(begun.prepare().unwrap().is_some());
        }
        drop(begun);
        let mut resumed = pool(&teacher, order, 20, file);
        resumed.restore(&snapshot).unwrap();
        fill(&mut resumed);
        assert!(batches(&mut resumed) == expected);
        assert_eq!(resumed.teacher_evaluations(), whole.teacher_evaluations());
    }
}

/// Walks of few steps show every time, and samples that reach their end begin again.
#[test]
fn short_walks_visit_every_timestep() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let mut pool = pool(&teacher, Order::Dynamic { rho: 0.5 }, 5, None);
    fill(&mut pool);
    let mut seen = HashSet::new();
    (0..100).for_each(|step| seen.extend(pool.training_batch(step).unwrap().timesteps));
    assert_eq!(seen.len(), 20);
    assert!(pool.finished() > 40);
}

/// A pool in a file, or why it is refused.
fn in_file<'a>(
    teacher: &'a Teacher,
    file: &Path,
    run: &str,
    earlier: Option<&str>,
) -> Result<Pool<'a>, String> {
    let walks = Walks::new(&teacher.schedule, Kind::Ddpm, 20, teacher.learned_variance());
    let settings = Settings {
        order: Order::Shuffled,
        batch: 4,
        seed: 3,
        run: run.into(),
        earlier: earlier.map(Into::into),
        file: Some(file.to_owned()),
        finished: None,
    };
    Pool::new(teacher, walks.unwrap(), settings).map_err(|error| error.to_string())
}

#[test]
fn another_pools_file_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let (first, second) = (teacher(home.path()), learned_teacher(home.path()));
    let file = home.path().join("pool");
    let open = |teacher: &Teacher| in_file(teacher, &file, "test", None).map(drop);
    open(&first).unwrap();
    open(&first).unwrap();
    let problem = open(&second).unwrap_err();
    assert!(problem.contains("something else") && problem.contains("pool-file"), "{problem}");
    fs::write(&file, b"something else").unwrap();
    assert!(open(&first).unwrap_err().contains("14 bytes"));
    assert_eq!(fs::read(&file).unwrap(), b"something else", "what a pool did not make stays");
    // Another run of the same teacher, and a run of an earlier version.
    fs::remove_file(&file).unwrap();
    open(&first).unwrap();
    let named = |run: &str, earlier: Option<&str>| in_file(&first, &file, run, earlier);
    assert!(named("other", None).err().unwrap().contains("something else"));
    let held = named("test", None).unwrap();
    let problem = named("test", None).err().unwrap();
    assert!(problem.contains(&format!("in use (process {}", std::process::id())), "{problem}");
    drop(held);
    let line = format!("understudy pool 1: teacher {}, run out\n", &first.hash[..16]);
    let mut bytes = fs::read(&file).unwrap();
    bytes[..4096].fill(0);
    bytes[..line.len()].copy_from_slice(line.as_bytes());
    fs::write(&file, bytes).unwrap();
    assert!(named("test", None).err().unwrap().contains("something else"));
    drop(named("test", Some("out")).unwrap());
    named("test", None).unwrap();
}

#[cfg(unix)]
#[test]
fn a_pool_file_is_a_file() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path());
    let link = home.path().join("link");
    std::os::unix::fs::symlink("/dev/null", &link).unwrap();
    for path in [home.path().to_owned(), link.clone()] {
        let problem = in_file(&teacher, &path, "test", None).err().unwrap();
        assert!(problem.contains("not a regular file"), "{problem}");
        assert!(fs::symlink_metadata(&path).is_ok(), "it is still there");
    }
}

/// All channels kept is the teacher itself; half of them make a network that runs.
#[test]
fn a_pruned_student_begins_with_its_teachers_weights() {
    let home = tempfile::tempdir().unwrap();
    let attention = json!({
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "block_out_channels": [16, 24],
    });
    let config = network(16, &attention);
    let path = common::folder(home.path(), "attention", &config, &schedule(&json!({})));
    let teacher = Teacher::open(&path, "teacher".into(), DType::F32, &Device::Cpu).unwrap();
    let mut batches = pool(&teacher, Order::Shuffled, 10, None);
    let same = prune::weights(&teacher, &config, &mut batches, 1).unwrap();
    for (name, weight) in teacher.weights().unwrap() {
        let difference = (&same[&name] - &weight).unwrap().abs().unwrap().sum_all().unwrap();
        assert_eq!(difference.to_scalar::<f32>().unwrap(), 0.0, "{name}");
    }

    let half = config.scaled(0.5).unwrap();
    let mut batches = pool(&teacher, Order::Shuffled, 10, None);
    let narrow = prune::weights(&teacher, &half, &mut batches, 1).unwrap();
    half.fit(narrow.into_iter().collect()).unwrap();

    let deeper = network(8, &json!({"layers_per_block": 2}));
    let mut batches = pool(&teacher, Order::Shuffled, 10, None);
    let problem = prune::weights(&teacher, &deeper, &mut batches, 1).unwrap_err().to_string();
    assert!(problem.contains("different layers"), "{problem}");
}
