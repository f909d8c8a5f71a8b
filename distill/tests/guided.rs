//! The pool of a text-to-image teacher: it walks as guided samples are drawn, and shows what is to be learned of guidance.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;
use std::rc::Rc;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};
use understudy_distill::generate::{Captions, Classes, Sampling};
use understudy_distill::generated::{self, Latents};
use understudy_distill::guidance::Guidance;
use understudy_distill::matching::{self, Matching};
use understudy_distill::objective::{Objective, SegmentEnd};
use understudy_distill::optimizer;
use understudy_distill::parameters::Parameters;
use understudy_distill::pool::segments::{self, Segments};
use understudy_distill::pool::{Order, Pool, Settings};
use understudy_distill::prompting::Prompting;
use understudy_distill::prompts::Prompts;
use understudy_distill::ranks::Shards;
use understudy_distill::run_dir::RunDir;
use understudy_distill::student::{Candidate, Student};
use understudy_distill::teacher::Teacher;
use understudy_distill::train::{Settings as TrainingSettings, Task, train};
use understudy_distill::training_batch::{BatchSource, TrainingBatch};
use understudy_distill::walk::Walks;
use understudy_models::checkpoint::{Draft, ModelFolder, card::Card};
use understudy_models::sampler::{self, Kind};
use understudy_models::schedule::{Class, PredictionType, ScheduleConfig, TimestepSpacing};
use understudy_models::{FewerBlocks, NetworkConfig};

/// A small network over the bundled autoencoder's latents, after the bundled text encoder's prompts.
fn network(more: &Value) -> NetworkConfig {
    let mut config = json!({
        "_class_name": "UNet2DConditionModel", "sample_size": 16, "in_channels": 4, "out_channels": 4,
        "block_out_channels": [16, 16], "norm_num_groups": 4, "layers_per_block": 1,
        "attention_head_dim": 2, "cross_attention_dim": 128,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    });
    for (name, value) in more.as_object().unwrap() {
        config[name] = value.clone();
    }
    NetworkConfig::from_json(&config, "config.json").unwrap()
}

fn teacher(home: &Path, more: &Value) -> Teacher {
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/zoo/emoji-text-to-image");
    let bundled = ModelFolder::open(&bundled).unwrap();
    let schedule = common::schedule(&json!({"clip_sample": false}));
    let (path, network) = (home.join("teacher"), network(more));
    let weights = network.initial_weights(1).unwrap().into_iter().collect();
    let (draft, card) = (Draft::new(&path).unwrap(), Card::default());
    ModelFolder::write_around(draft, &network, &weights, &schedule, &card, Some(&bundled)).unwrap();
    Teacher::open(&path, "teacher".into(), DType::F32, &Device::Cpu).unwrap()
}

fn prompting(teacher: &Teacher, guidance: Guidance, file: Option<&Path>) -> Prompting {
    let prompts = Prompts::read(&["{red|blue} {apple|house|dog}".to_owned()]).unwrap();
    Prompting::new(teacher, prompts, guidance, file.map(Path::to_owned)).unwrap()
}

/// A pool of two samples, filled.
fn pool<'a>(teacher: &'a Teacher, order: Order, prompting: Prompting) -> Pool<'a> {
    let walks = Walks::new(&teacher.schedule, Kind::Ddpm, 20, false).unwrap();
    let settings = Settings {
        order,
        batch: 2,
        seed: 3,
        run: "test".into(),
        earlier: None,
        file: None,
        finished: None,
    };
    let mut pool = Pool::new(teacher, walks, settings).unwrap().prompted(Some(Rc::new(prompting)));
    while pool.prepare().unwrap().is_some() {}
    pool
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn prompts(batch: &TrainingBatch) -> &Tensor {
    &batch.text.as_ref().unwrap().prompts
}

/// A student of the teacher's own shape that is told a scale.
fn few_steps_student(teacher: &Teacher) -> Student {
    let config = network(&json!({"time_cond_proj_dim": 256}));
    let candidate = Candidate { config, trained: None };
    let student = Student::new(candidate, teacher, Some(PredictionType::Velocity), 5).unwrap();
    student.of_few_steps().unwrap()
}

fn matched<'a>(
    teacher: &'a Teacher,
    evaluations: usize,
    prompting: &Rc<Prompting>,
) -> Matching<'a> {
    let optimizer = optimizer::Settings { beta1: 0.0, ..common::settings(1).optimizer };
    let settings = matching::Settings { evaluations, seed: 3, optimizer, dtype: DType::F32 };
    let schedule = few_steps_student(teacher).schedule;
    let matching = Matching::new(teacher, &schedule, settings, &Device::Cpu).unwrap();
    matching.prompted(Some(prompting.clone()))
}

fn segments<'a>(
    teacher: &'a Teacher,
    evaluations: usize,
    prompting: &Rc<Prompting>,
) -> Segments<'a> {
    let pool = segments::Settings { evaluations, walk_steps: 10, samples: 8, batch: 4, seed: 3 };
    Segments::new(teacher, pool).unwrap().prompted(Some(prompting.clone()))
}

/// A critic that is still the teacher differs from it by what guidance adds: from scale 1, nothing.
#[test]
fn the_teacher_that_is_matched_is_guided() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path(), &json!({}));
    let student = few_steps_student(&teacher);
    let network = student
        .config
        .load(Parameters::new(student.weights).unwrap().tensors(), DType::F32, &Device::Cpu)
        .unwrap();
    for evaluations in [1, 2] {
        let losses = [1.0, 4.0].map(|scale| {
            let guidance = Guidance::Distil { least: scale, most: scale };
            let prompting = Rc::new(prompting(&teacher, guidance, None));
            let mut pool = segments(&teacher, evaluations, &prompting);
            while pool.prepare().unwrap().is_some() {}
            let mut matching = matched(&teacher, evaluations, &prompting);
            let matched = matching.matched(network.as_ref(), 1, 0..8).unwrap();
            let text = matched.renoised.batch.text.clone().unwrap();
            assert_eq!(text.guidance.unwrap(), [scale as f32 - 1.0; 8]);
            let loss: f32 = matched.loss.to_scalar().unwrap();
            matching.learn(&[matched.renoised]).unwrap();
            // Each row with its prompt and without.
            assert_eq!(matching.teacher_evaluations(), 16);
            loss.abs()
        });
        assert!(losses[0] < 1e-4 && losses[1] > 10.0 * losses[0].max(1e-5), "{losses:?}");
    }
}

#[test]
fn a_resumed_run_of_distribution_matching_is_the_uninterrupted_one_to_the_bit() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path(), &json!({}));
    let run = |out: &Path, steps: u64| {
        let run = RunDir::open(out).unwrap();
        let guidance = Guidance::Distil { least: 1.0, most: 4.0 };
        let table = run.path().join("prompts.safetensors");
        let prompting = Rc::new(prompting(&teacher, guidance, Some(&table)));
        let task = Task {
            run: Some(run),
            identity: Map::new(),
            shards: Shards::one(Box::new(segments(&teacher, 2, &prompting))),
            objective: Objective::SegmentEnd(SegmentEnd),
            matching: Some(matched(&teacher, 2, &prompting)),
            student: few_steps_student(&teacher),
            settings: TrainingSettings {
                accumulate: 2,
                sample_every: 3,
                ..common::settings(steps)
            },
            card: Card {
                evaluations: vec![2],
                guidance_range: Some([1.0, 4.0]),
                ..Card::default()
            },
        };
        train(task, &mut common::Blind).unwrap();
    };
    let (whole, parts) = (home.path().join("whole"), home.path().join("parts"));
    run(&whole, 6);
    for steps in [2, 3, 6] {
        run(&parts, steps);
    }
    let lines = common::curve(&whole);
    assert!(lines.iter().all(|line| line["critic"].is_f64() && line["matching"].is_f64()));
    assert!(lines[5]["likeness"]["recall"].is_f64(), "{}", lines[5]);
    assert_eq!(lines, common::curve(&parts));
    let weights =
        |out: &Path| fs::read(out.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    assert_eq!(weights(&whole), weights(&parts));
}

/// A sample on its way is where a guided request with its seed, prompt and scale is, to the bit.
#[test]
fn samples_are_walked_as_guided_ones_are_drawn() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path(), &json!({}));
    let keep = Guidance::Keep { scale: 3.0 };
    let mut pool = pool(&teacher, Order::Iterative, prompting(&teacher, keep, None));
    let mut batches = (0..20).map(|step| pool.training_batch(step).unwrap());
    let last = batches.nth(19).unwrap();
    assert_eq!(pool.teacher_evaluations(), 20 * 2 * 2);
    let trajectory = sampler::trajectory(&teacher.schedule, Kind::Ddpm, 20, 0.0, false).unwrap();
    for row in 0..2 {
        let narrow = |row: usize| prompts(&last).narrow(0, row, 1).unwrap();
        let sampling = Sampling {
            trajectory: trajectory[..19].to_vec().into(),
            classes: Classes::None,
            captions: Some(Captions {
                texts: vec![String::new()],
                prompts: narrow(row),
                empty: narrow(2 + row),
                scale: 3.0,
            }),
            first_seed: last.seeds[row],
            batch: 1,
        };
        let drawn = sampling.batches(teacher.network(), 0..1).next().unwrap().unwrap().x;
        assert!(values(&drawn) == values(&last.x.get(row).unwrap()), "row {row}");
    }
}

/// The baseline's data are guided samples; it is told their prompts and scales, and shown them with noise of its own.
#[test]
fn latents_of_the_baseline_are_drawn_as_guided_samples_are() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path(), &json!({}));
    let prompts = Prompts::read(&["{red} apple".to_owned()]).unwrap();
    let reader = teacher.model().reader(DType::F32, &Device::Cpu).unwrap().unwrap();
    let shape = teacher.geometry().prompt.unwrap();
    let captions = Captions::new(&reader, &prompts, shape, 2.0).unwrap();
    let sampling = Sampling {
        trajectory: sampler::trajectory(&teacher.schedule, Kind::Ddim, 5, 0.0, false).unwrap(),
        classes: Classes::None,
        captions: None,
        first_seed: 7,
        batch: 2,
    };
    let guided = Sampling { captions: Some(captions.clone()), ..sampling.clone() };
    let drawn = guided.batches(teacher.network(), 0..3).map(|batch| batch.unwrap().x);
    let drawn: Vec<Vec<f32>> = drawn
        .flat_map(|x| (0..x.dim(0).unwrap()).map(move |row| values(&x.get(row).unwrap())))
        .collect();

    let guidance = Guidance::Distil { least: 2.0, most: 2.0 };
    let prompting = Rc::new(Prompting::new(&teacher, prompts, guidance, None).unwrap());
    let folder = home.path().join("drawn");
    let settings = generated::Settings { sampling, count: 3, folder, batch: 3, seed: 1 };
    let latents = || {
        let mut latents =
            Latents::new(&teacher, Some(prompting.clone()), settings.clone(), &teacher.schedule)
                .unwrap();
        while latents.prepare().unwrap().is_some() {}
        latents
    };
    let batch = latents().training_batch(1).unwrap();
    let text = batch.text.clone().unwrap();
    assert_eq!(text.guidance.unwrap(), [1.0; 3]);
    let alpha_bar = teacher.schedule.schedule(Class::Ddpm).unwrap().alpha_bar;
    let mut found = Vec::new();
    for row in 0..3 {
        assert_eq!(values(&text.prompts.get(row).unwrap()), values(&captions.prompts));
        let at = alpha_bar[batch.timesteps[row]];
        let (alpha, s) = (at.sqrt() as f32, (1.0 - at).sqrt() as f32);
        let [x, eps] = [&batch.x, &batch.answer].map(|it| values(&it.get(row).unwrap()));
        let clean = x.iter().zip(&eps).map(|(x, eps)| (x - s * eps) / alpha);
        let clean: Vec<f32> = clean.collect();
        let is = |drawn: &Vec<f32>| drawn.iter().zip(&clean).all(|(a, b)| (a - b).abs() < 1e-3);
        found.push(drawn.iter().position(is).unwrap());
    }
    found.sort_unstable();
    assert_eq!(found, [0, 1, 2]);
    // Those on disk are not drawn again, and must be whole.
    let file = settings.folder.join("00000002.f32");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[4..]).unwrap();
    let mut cut = Latents::new(&teacher, None, settings.clone(), &teacher.schedule).unwrap();
    let problem = std::iter::repeat_with(|| cut.prepare()).find_map(Result::err).unwrap();
    assert!(problem.to_string().contains("4092 bytes, not 4096"), "{problem}");
    fs::write(&file, &bytes).unwrap();
    assert_eq!(latents().teacher_evaluations(), 3 * 2 * 5);
}

#[test]
fn both_answers_are_shown_where_guidance_is_kept_and_the_guided_one_where_it_is_distilled() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path(), &json!({}));
    let table = home.path().join("prompts.safetensors");
    let batch = |guidance, file: Option<&Path>| {
        let prompting = prompting(&teacher, guidance, file);
        pool(&teacher, Order::Dynamic { rho: 0.2 }, prompting).training_batch(1).unwrap()
    };
    let kept = batch(Guidance::Keep { scale: 3.0 }, Some(&table));
    assert_eq!((kept.rows(), kept.x.dims()), (4, &[4, 4, 16, 16][..]));
    assert!(values(&kept.ask(teacher.network()).unwrap()) == values(&kept.answer));
    let half = |tensor: &Tensor, part: usize| tensor.narrow(0, 2 * part, 2).unwrap();
    assert!(values(&half(&kept.x, 0)) == values(&half(&kept.x, 1)));
    assert!(values(&half(prompts(&kept), 0)) != values(&half(prompts(&kept), 1)));
    let empty = values(&prompts(&kept).get(2).unwrap());
    assert!(empty == values(&prompts(&kept).get(3).unwrap()));

    // From the file that is there, the same.
    let again = batch(Guidance::Keep { scale: 3.0 }, Some(&table));
    assert!(values(&again.answer) == values(&kept.answer));
    assert!(values(prompts(&again)) == values(prompts(&kept)));

    let distilled = batch(Guidance::Distil { least: 3.0, most: 3.0 }, None);
    assert_eq!(distilled.rows(), 2);
    assert!(values(&distilled.x) == values(&half(&kept.x, 0)));
    assert_eq!(distilled.text.as_ref().unwrap().guidance, Some(vec![2.0; 2]));
    let [with, without] = [0, 1].map(|part| half(&kept.answer, part));
    let guided = (&without + ((with - &without).unwrap() * 3.0).unwrap()).unwrap();
    assert!(values(&guided) == values(&distilled.answer));

    // A part of a batch is told its own prompts.
    let part = kept.part(1, 2).unwrap();
    assert!(values(prompts(&part)) == values(&half(prompts(&kept), 1)));
}

/// A student of one step that answers what it is told lands where the guided walk of its prompt and scale ends.
#[test]
fn segments_end_where_guided_walks_do() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path(), &json!({}));
    let guidance = Guidance::Distil { least: 2.0, most: 6.0 };
    let settings =
        segments::Settings { evaluations: 1, walk_steps: 10, samples: 4, batch: 2, seed: 3 };
    let mut pool = Segments::new(&teacher, settings).unwrap();
    pool = pool.prompted(Some(Rc::new(prompting(&teacher, guidance, None))));
    while pool.prepare().unwrap().is_some() {}
    let trailing = |prediction: Option<PredictionType>| ScheduleConfig {
        timestep_spacing: Some(TimestepSpacing::Trailing),
        set_alpha_to_one: Some(true),
        prediction_type: prediction.or(teacher.schedule.prediction_type),
        ..teacher.schedule.clone()
    };
    let student = trailing(Some(PredictionType::Velocity));
    let step = sampler::trajectory(&student, Kind::Ddim, 1, 0.0, false).unwrap()[0].step;
    let mut starts = 0;
    for number in 1..=20 {
        let batch = pool.training_batch(number).unwrap();
        let scales = batch.text.as_ref().unwrap().guidance.clone().unwrap();
        for row in (0..2).filter(|&row| batch.timesteps[row] == 19) {
            starts += 1;
            let sampling = Sampling {
                trajectory: sampler::trajectory(&trailing(None), Kind::Ddim, 10, 0.0, false)
                    .unwrap(),
                classes: Classes::None,
                captions: Some(Captions {
                    texts: vec![String::new()],
                    prompts: prompts(&batch).narrow(0, row, 1).unwrap(),
                    empty: empty(&teacher),
                    scale: f64::from(scales[row]) + 1.0,
                }),
                first_seed: batch.seeds[row],
                batch: 1,
            };
            let drawn = sampling.batches(teacher.network(), 0..1).next().unwrap().unwrap().x;
            let [x, answer] = [&batch.x, &batch.answer].map(|all| values(&all.get(row).unwrap()));
            for ((x, answer), end) in x.into_iter().zip(answer).zip(values(&drawn)) {
                let (x, model) = (f64::from(x), f64::from(answer));
                let landed = step.evaluate(sampler::Element { x, model, ..Default::default() }).x;
                assert!((landed - f64::from(end)).abs() < 1e-3, "{landed} {end}");
            }
        }
    }
    assert!(starts > 4);
    assert_eq!(pool.teacher_evaluations() % 80, 0, "4 samples, 10 steps, 2 rows");
}

/// The states of the empty prompt.
fn empty(teacher: &Teacher) -> Tensor {
    let reader = teacher.model().reader(DType::F32, &Device::Cpu).unwrap().unwrap();
    let prompts = Prompts::read(&["{apple|dog}".to_owned()]).unwrap();
    Captions::new(&reader, &prompts, teacher.geometry().prompt.unwrap(), 1.0).unwrap().empty
}

#[test]
fn trajectories_have_prompts_and_scales_of_their_own() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path(), &json!({}));
    let guidance = Guidance::Distil { least: 1.0, most: 8.0 };
    let mut pool = pool(&teacher, Order::Dynamic { rho: 1.0 }, prompting(&teacher, guidance, None));
    let (mut seen, mut scales) = (Vec::new(), Vec::new());
    for step in 0..20 {
        let batch = pool.training_batch(step).unwrap();
        scales.extend(batch.text.as_ref().unwrap().guidance.clone().unwrap());
        for row in 0..2 {
            let states = values(&prompts(&batch).get(row).unwrap());
            if !seen.contains(&states) {
                seen.push(states);
            }
        }
    }
    assert_eq!(seen.len(), 6);
    assert!(scales.iter().all(|scale| (0.0..7.0).contains(scale)));
    let spread = |pick: fn(f32, f32) -> f32| scales.iter().copied().reduce(pick).unwrap();
    assert!(spread(f32::min) < 2.0 && spread(f32::max) > 5.0);
}

/// A narrower student with an input for the scale begins with its teacher's channels, and that input as nothing.
#[test]
fn channels_are_left_out_of_a_network_that_sees_prompts() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path(), &json!({"block_out_channels": [32, 32]}));
    let config = network(&json!({"time_cond_proj_dim": 16}));
    let student = |config: NetworkConfig| {
        Student::new(Candidate { config, trained: None }, &teacher, None, 5).unwrap()
    };
    let keep = Guidance::Keep { scale: 3.0 };
    let mut walked = pool(&teacher, Order::Shuffled, prompting(&teacher, keep, None));
    let pruned = student(config).pruned(&teacher, &mut walked, 5).unwrap();
    let theirs = teacher.weights().unwrap();
    let block = "down_blocks.0.attentions.0.transformer_blocks.0";
    let gate = &pruned.weights[&format!("{block}.ff.net.0.proj.bias")];
    // Both halves keep the same channels.
    let whole = values(&theirs[&format!("{block}.ff.net.0.proj.bias")]);
    let place = |value: &f32| whole.iter().position(|one| one == value).unwrap();
    let kept: Vec<usize> = values(gate).iter().map(place).collect();
    let (first, second) = kept.split_at(64);
    assert_eq!(first.iter().map(|one| one + 128).collect::<Vec<_>>(), second);
    assert_eq!(pruned.weights[&format!("{block}.attn2.to_k.weight")].dims(), [16, 128]);
    let told = values(&pruned.weights["time_embedding.cond_proj.weight"]);
    assert!(told.len() == 256 && told.iter().all(|value| *value == 0.0));

    // All channels of a teacher are the teacher.
    let whole = network(&json!({"block_out_channels": [32, 32]}));
    let mut walked = pool(&teacher, Order::Shuffled, prompting(&teacher, keep, None));
    let all = student(whole).pruned(&teacher, &mut walked, 5).unwrap();
    for (name, weight) in &all.weights {
        assert!(values(weight) == values(&theirs[name]), "{name}");
    }
}

/// Of Stable Diffusion's shape: a student without the deepest level has the weights of the blocks that stay.
#[test]
fn a_student_of_fewer_blocks_begins_with_its_teachers() {
    let home = tempfile::tempdir().unwrap();
    let shape = json!({
        "block_out_channels": [8, 16, 16, 16], "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    });
    let teacher = teacher(home.path(), &shape);
    let theirs = teacher.weights().unwrap();
    for (how, name, source) in [
        (
            FewerBlocks::Base,
            "up_blocks.3.attentions.1.norm.weight",
            "up_blocks.3.attentions.2.norm.weight",
        ),
        (
            FewerBlocks::Small,
            "up_blocks.0.resnets.0.conv1.weight",
            "up_blocks.0.resnets.0.conv1.weight",
        ),
        (
            FewerBlocks::Tiny,
            "up_blocks.0.resnets.1.conv1.weight",
            "up_blocks.1.resnets.2.conv1.weight",
        ),
    ] {
        let config = teacher.config.fewer_blocks(how).unwrap().unwrap();
        let candidate = Candidate { config, trained: None };
        let student = Student::new(candidate, &teacher, None, 5).unwrap();
        let student = student.of_blocks(&teacher).unwrap();
        assert!(values(&student.weights[name]) == values(&theirs[source]), "{how:?}");
        assert!(student.parameters() < teacher.network().parameters());
    }
    let narrow = network(&json!({"block_out_channels": [8, 8]}));
    let narrow = Student::new(Candidate { config: narrow, trained: None }, &teacher, None, 5);
    let problem = narrow.unwrap().of_blocks(&teacher).err().unwrap().to_string();
    assert!(problem.contains("base, small or tiny"), "{problem}");
}

#[test]
fn what_is_no_whole_table_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let teacher = teacher(home.path(), &json!({}));
    let table = home.path().join("prompts.safetensors");
    let keep = Guidance::Keep { scale: 3.0 };
    drop(pool(&teacher, Order::Iterative, prompting(&teacher, keep, Some(&table))));
    let whole = fs::read(&table).unwrap();
    let open = || {
        let prompts = Prompts::read(&["{red|blue} {apple|house|dog}".to_owned()]).unwrap();
        Prompting::new(&teacher, prompts, keep, Some(table.clone()))
    };
    assert!(open().is_ok());
    for broken in
        [&whole[..whole.len() - 4], &whole[..4], b"something else entirely, and long enough"]
    {
        fs::write(&table, broken).unwrap();
        let problem = open().err().unwrap().to_string();
        assert!(
            problem.contains("prompts.safetensors") && problem.contains("remove it"),
            "{problem}"
        );
    }
    let prompts = Prompts::read(&["{red|blue} cat".to_owned()]).unwrap();
    fs::write(&table, whole).unwrap();
    let problem = Prompting::new(&teacher, prompts, keep, Some(table)).err().unwrap().to_string();
    assert!(problem.contains("from other prompts"), "{problem}");
}
