//! The engine as its users see it: requests in, events out, one toy network behind it whose
//! evaluations wait for the test's word.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use serde_json::json;
use understudy_models::{
    Conditioning, Denoiser, DeviceFault, Geometry,
    checkpoint::card::Card,
    sampler::{self, Kind},
    schedule::ScheduleConfig,
};

use super::{stage::Stage, *};
use crate::{
    metrics::Metrics,
    registry::{Model, Syntax},
};

/// Halves what it sees; NaN for class 8, a panic for class 9, a broken GPU for class 7. Every evaluation waits for one `go`, and
/// its rows go into `rows`; of more than `memory_rows` it fails as CUDA's driver does.
struct Toy {
    geometry: Geometry,
    /// Nothing for one that does not wait.
    go: Option<Mutex<mpsc::Receiver<()>>>,
    rows: Arc<Mutex<Vec<usize>>>,
    memory_rows: usize,
    /// Whether it is on a device that is not waited for.
    defers: bool,
    /// Whether it panics where nobody expects that.
    broken: bool,
}

impl Toy {
    fn new(go: Option<mpsc::Receiver<()>>, memory_rows: usize) -> Self {
        let geometry = Geometry {
            in_channels: 1,
            out_channels: 1,
            height: 2,
            width: 2,
            conditioning: Conditioning::Classes(10),
            prompt: None,
            guidance: false,
        };
        let (go, rows) = (go.map(Mutex::new), Arc::default());
        Self { geometry, go, rows, memory_rows, defers: false, broken: false }
    }
}

impl Denoiser for Toy {
    fn forward(
        &self,
        x: &Tensor,
        _: &Tensor,
        labels: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        if let Some(go) = &self.go {
            go.lock().unwrap().recv().unwrap();
        }
        self.rows.lock().unwrap().push(x.dim(0)?);
        if x.dim(0)? > self.memory_rows {
            return Err(DeviceFault::OutOfMemory("CUDA_ERROR_OUT_OF_MEMORY".into()).into());
        }
        let labels: Vec<u32> = labels.unwrap().to_vec1()?;
        assert!(!labels.contains(&9), "class 9");
        if labels.contains(&7) {
            return Err(DeviceFault::Lost("CUDA_ERROR_ILLEGAL_ADDRESS".into()).into());
        }
        let factors =
            labels.iter().map(|&l| if l == 8 { f32::NAN } else { 0.5 }).collect::<Vec<_>>();
        x.broadcast_mul(&Tensor::from_vec(factors, (labels.len(), 1, 1, 1), &Device::Cpu)?)
    }
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }
    fn dtype(&self) -> DType {
        DType::F32
    }
    fn device(&self) -> &Device {
        &Device::Cpu
    }
    fn defers(&self) -> bool {
        assert!(!self.broken, "broken");
        self.defers
    }
    fn parameters(&self) -> usize {
        0
    }
}

struct Fixture {
    engine: Engine,
    metrics: Arc<Metrics>,
    model: Arc<Model>,
    go: mpsc::Sender<()>,
    rows: Arc<Mutex<Vec<usize>>>,
    /// The same of a second device, where there is one.
    second: Option<Ends>,
}

/// What tells a [`Toy`] to go, and what it tells.
type Ends = (mpsc::Sender<()>, Arc<Mutex<Vec<usize>>>);

const STEPS: usize = 4;

/// Evaluations are predicted to take a second.
fn fixture(max_queue: usize, max_rows: usize) -> Fixture {
    fixture_costing(max_queue, max_rows, 1.0)
}

fn fixture_costing(max_queue: usize, max_rows: usize, seconds: f64) -> Fixture {
    fixture_on(1, max_queue, max_rows, seconds, usize::MAX)
}

/// One device or two, each with memory for so many rows.
fn fixture_on(
    devices: usize,
    max_queue: usize,
    max_rows: usize,
    seconds: f64,
    memory_rows: usize,
) -> Fixture {
    let metrics = Metrics::new().unwrap();
    let count = NonZeroUsize::new(devices).unwrap();
    let engine = Engine::start(count, max_queue, Arc::clone(&metrics)).unwrap();
    let mut networks: Vec<Box<dyn Denoiser>> = Vec::new();
    let mut ends = Vec::new();
    for _ in 0..devices {
        let (go, waits) = mpsc::channel();
        let toy = Toy::new(Some(waits), memory_rows);
        ends.push((go, Arc::clone(&toy.rows)));
        networks.push(Box::new(toy));
    }
    let model = toy_model(networks, max_rows, seconds);
    let (go, rows) = ends.remove(0);
    Fixture { engine, metrics, model, go, rows, second: ends.pop() }
}

/// On a device that is not waited for, with evaluations that are predicted to take so long.
fn fixture_that_defers(seconds: f64) -> Fixture {
    let metrics = Metrics::new().unwrap();
    let engine = Engine::start(NonZeroUsize::MIN, 8, Arc::clone(&metrics)).unwrap();
    let (go, waits) = mpsc::channel();
    let toy = Toy { defers: true, ..Toy::new(Some(waits), usize::MAX) };
    let rows = Arc::clone(&toy.rows);
    let model = toy_model(vec![Box::new(toy)], 8, seconds);
    Fixture { engine, metrics, model, go, rows, second: None }
}

fn toy_model(networks: Vec<Box<dyn Denoiser>>, max_rows: usize, seconds: f64) -> Arc<Model> {
    let schedule = json!({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000});
    let schedule = ScheduleConfig::from_json(&schedule, "scheduler_config.json").unwrap();
    let card = Card { null_class: Some(0), ..Card::default() };
    Model::for_test(networks, schedule, card, 1, max_rows, seconds)
}

impl Fixture {
    fn request(&self, classes: &[u32]) -> GenerateRequest {
        let specs = classes.iter().enumerate();
        GenerateRequest {
            model: Arc::clone(&self.model),
            samples: specs
                .map(|(i, &class)| SampleSpec { seed: i as u64, class_label: Some(class) })
                .collect(),
            trajectory: sampler::trajectory(&self.model.schedule, Kind::Ddim, STEPS, 0.0, false)
                .unwrap(),
            prompts: Vec::new(),
            start: Start::Noise,
            guidance_scale: 1.0,
            partial_images: 0,
            deadline: None,
        }
    }

    fn go(&self, evaluations: usize) {
        (0..evaluations).for_each(|_| self.go.send(()).unwrap());
    }

    fn go_on_second(&self, evaluations: usize) {
        let (go, _) = self.second.as_ref().unwrap();
        (0..evaluations).for_each(|_| go.send(()).unwrap());
    }

    fn rows_of_second(&self) -> Vec<usize> {
        self.second.as_ref().unwrap().1.lock().unwrap().clone()
    }

    fn cancelled(&self, reason: &str) -> u64 {
        self.metrics.cancelled.with_label_values(&["model-1", reason]).get()
    }
}

/// All events of a submission, to its end.
fn all(mut submission: Submission) -> Vec<Event> {
    std::iter::from_fn(|| submission.events.blocking_recv()).collect()
}

fn completed(events: &[Event]) -> usize {
    events.iter().filter(|event| matches!(event, Event::Completed { .. })).count()
}

#[test]
fn every_image_takes_exactly_its_evaluations_and_shares_them() {
    let f = fixture(8, 8);
    let submission = f.engine.generate(f.request(&[1, 2, 3])).unwrap();
    f.go(STEPS);
    let events = all(submission);
    assert_eq!(completed(&events), 3);
    for event in events {
        let Event::Completed { timings, .. } = event else { panic!("{event:?}") };
        assert_eq!(timings.network_evaluations, STEPS);
        assert_eq!(timings.mean_batch, 3.0);
    }
    assert_eq!(*f.rows.lock().unwrap(), [3; STEPS]);
    assert_eq!(f.engine.predicted_drain(), Duration::ZERO);
}

#[test]
fn guidance_doubles_the_rows() {
    let f = fixture(8, 8);
    let request = GenerateRequest { guidance_scale: 2.0, ..f.request(&[1]) };
    let submission = f.engine.generate(request).unwrap();
    f.go(STEPS);
    let events = all(submission);
    let Event::Completed { timings, .. } = &events[0] else { panic!("{events:?}") };
    assert_eq!(timings.network_evaluations, 2 * STEPS);
    assert_eq!(*f.rows.lock().unwrap(), [2; STEPS]);
}

#[test]
fn a_newcomer_joins_at_the_next_evaluation() {
    let f = fixture(8, 8);
    let first = f.engine.generate(f.request(&[1])).unwrap();
    // The second is admitted while the first evaluation waits for its word, or before it began.
    let second = f.engine.generate(f.request(&[2])).unwrap();
    f.go(STEPS + 1);
    assert_eq!(completed(&all(first)) + completed(&all(second)), 2);
    let rows = f.rows.lock().unwrap().clone();
    assert!(rows == [1, 2, 2, 2, 1] || rows == [2; STEPS], "{rows:?}");
}

#[test]
fn a_full_queue_says_how_full_and_when_to_come_back() {
    let f = fixture(2, 8);
    let first = f.engine.generate(f.request(&[1])).unwrap();
    match f.engine.generate(f.request(&[1, 2])) {
        Err(Rejected::QueueFull { asked: 2, free: 1, limit: 2, retry_after }) => {
            // Four evaluations of a second each, of which at most one is under way.
            assert!(retry_after >= Duration::from_secs(3), "{retry_after:?}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(f.metrics.rejected.with_label_values(&["model-1", "queue_full"]).get(), 2);
    f.go(STEPS);
    assert_eq!(completed(&all(first)), 1);
    assert!(f.engine.generate(f.request(&[1, 2])).is_ok(), "its place is free again");
    f.go(1);
}

#[test]
fn a_cancelled_sample_frees_its_slot_at_the_next_evaluation() {
    let f = fixture(2, 8);
    let kept = f.engine.generate(f.request(&[1])).unwrap();
    let dropped = f.engine.generate(f.request(&[2])).unwrap();
    drop(dropped);
    f.go(STEPS);
    assert_eq!(completed(&all(kept)), 1);
    assert_eq!(f.cancelled("disconnect"), 1);
    assert!(*f.rows.lock().unwrap().last().unwrap() == 1);
}

#[test]
fn a_network_that_answers_nan_fails_that_sample_alone() {
    let f = fixture(8, 8);
    let submission = f.engine.generate(f.request(&[1, 8, 2])).unwrap();
    f.go(STEPS);
    let events = all(submission);
    assert_eq!(completed(&events), 2);
    assert!(events.iter().any(|event| matches!(
        event,
        Event::Failed { index: 1, failure: Failure::NonFinite { .. } }
    )));
    assert_eq!(f.cancelled("non_finite"), 1);
}

#[test]
fn a_device_that_is_not_waited_for_gives_the_same() {
    let pictures = |f: Fixture| {
        let request = GenerateRequest { partial_images: 1, ..f.request(&[1, 8, 2]) };
        let submission = f.engine.generate(request).unwrap();
        f.go(STEPS);
        let events = all(submission);
        let of = |event: &Event| match event {
            Event::Completed { index, image, timings } => {
                assert_eq!(timings.network_evaluations, STEPS);
                (*index, STEPS, image.pixels.clone())
            }
            Event::Partial { index, partial_index, image } => {
                (*index, *partial_index, image.pixels.clone())
            }
            Event::Failed { index: 1, failure: Failure::NonFinite { timestep } } => {
                (1, *timestep as usize, Vec::new())
            }
            other => panic!("{other:?}"),
        };
        let mut told: Vec<_> = events.iter().map(of).collect();
        told.sort();
        assert_eq!(f.cancelled("non_finite"), 1);
        assert_eq!(f.engine.predicted_drain(), Duration::ZERO);
        let evaluations = f.metrics.evaluation_duration.with_label_values(&["model-1"]);
        assert_eq!(evaluations.get_sample_count(), STEPS as u64);
        told
    };
    assert_eq!(pictures(fixture_that_defers(1e-6)), pictures(fixture(8, 8)));
}

#[test]
fn only_short_evaluations_are_not_waited_for() {
    for (seconds, evaluations) in [(1e-6, 2), (1.0, 1)] {
        let f = fixture_that_defers(seconds);
        let submission = f.engine.generate(f.request(&[8])).unwrap();
        f.go(STEPS);
        assert!(matches!(&all(submission)[..], [Event::Failed { .. }]));
        // The next began before anybody looked at the first.
        assert_eq!(f.rows.lock().unwrap().len(), evaluations);
    }
}

#[test]
fn who_leaves_an_evaluation_that_nobody_looked_at_harms_nobody() {
    let f = fixture_that_defers(1e-6);
    let stays = f.engine.generate(f.request(&[1])).unwrap();
    drop(f.engine.generate(f.request(&[8, 2])).unwrap());
    f.go(2 * STEPS);
    assert_eq!(completed(&all(stays)), 1);
    assert_eq!(f.engine.predicted_drain(), Duration::ZERO);
    let next = f.engine.generate(f.request(&[3])).unwrap();
    assert_eq!(completed(&all(next)), 1);
}

#[test]
fn a_panic_fails_its_batch_and_the_engine_lives_on() {
    let f = fixture(8, 1);
    let doomed = f.engine.generate(f.request(&[9])).unwrap();
    f.go(1);
    let events = all(doomed);
    assert!(
        matches!(&events[..], [Event::Failed { failure: Failure::Evaluation(text), .. }] if text.contains("class 9")),
        "{events:?}"
    );
    assert_eq!(f.cancelled("evaluation"), 1);
    let fine = f.engine.generate(f.request(&[1])).unwrap();
    f.go(STEPS);
    assert_eq!(completed(&all(fine)), 1);
}

#[test]
fn a_deadline_is_judged_at_admission_and_kept_while_running() {
    let f = fixture(8, 1);
    let within = |time| Some(Instant::now() + time);
    let impossible =
        GenerateRequest { deadline: within(Duration::from_secs(3)), ..f.request(&[1]) };
    assert!(matches!(f.engine.generate(impossible), Err(Rejected::DeadlineImpossible { .. })));

    // Two after each other take eight seconds, and a tenth more.
    let with = |seconds, classes: &[u32]| GenerateRequest {
        deadline: within(Duration::from_secs(seconds)),
        ..f.request(classes)
    };
    let queued = f.engine.generate(with(10, &[1, 2])).unwrap();
    match f.engine.generate(with(11, &[1])) {
        Err(Rejected::DeadlineQueue { retry_after, .. }) => {
            assert!(retry_after > Duration::from_secs(1), "{retry_after:?}");
        }
        other => panic!("{other:?}"),
    }
    // It would be in time if the others were not.
    let refused = f.engine.generate(with(6, &[1]));
    assert!(matches!(refused, Err(Rejected::DeadlineOthers { .. })), "{refused:?}");
    f.go(2 * STEPS);
    assert_eq!(completed(&all(queued)), 2);
}

#[test]
fn a_sample_whose_deadline_passes_is_told_so_and_leaves() {
    let f = fixture_costing(8, 8, 0.0);
    let deadline = Instant::now() + Duration::from_millis(5);
    let late = GenerateRequest { deadline: Some(deadline), ..f.request(&[1, 2, 3]) };
    let late = f.engine.generate(late).unwrap();
    while Instant::now() < deadline {
        std::thread::yield_now();
    }
    f.go(1);
    let events = all(late);
    assert!(
        matches!(
            &events[..],
            [Event::Failed { failure: Failure::Deadline { total: STEPS, .. }, .. }, _, _]
        ),
        "{events:?}"
    );
    assert_eq!(f.cancelled("deadline"), 3);
    // The request was late once: from 1.1, up by a step for a miss, in the logarithm, and by no more for its other images.
    let once = 1.1 * (0.05 * 0.995f64).exp();
    let margin = f.metrics.prediction_margin.get();
    assert!((margin / once - 1.0).abs() < 1e-3, "{margin}");
}

#[test]
fn guidance_that_overflows_fails_its_image() {
    let f = fixture(8, 8);
    let far = GenerateRequest { guidance_scale: f64::MAX, ..f.request(&[1]) };
    let far = f.engine.generate(far).unwrap();
    f.go(STEPS);
    let events = all(far);
    assert!(
        matches!(&events[..], [Event::Failed { failure: Failure::NonFinite { .. }, .. }]),
        "{events:?}"
    );
}

#[test]
fn a_deadline_goes_before_a_warm_up() {
    let f = fixture(8, 8);
    let deadline = Some(Instant::now() + Duration::from_secs(60));
    let promised = f.engine.generate(GenerateRequest { deadline, ..f.request(&[1]) }).unwrap();
    let seen = Arc::default();
    let rows = Arc::clone(&f.rows);
    let behind = Watching {
        toy: Toy::new(None, usize::MAX),
        other: Box::new(move || rows.lock().unwrap().len() as u64),
        seen: Arc::clone(&seen),
    };
    let model = toy_model(vec![Box::new(behind)], 1, 1.0);
    let engine = f.engine.clone();
    let warming = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(engine.warm_up(model, Some(1), StageCosts::default()))
    });
    f.go(STEPS);
    assert_eq!(completed(&all(promised)), 1);
    warming.join().unwrap().unwrap();
    let seen = seen.lock().unwrap();
    assert!(!seen.is_empty() && seen.iter().all(|&before| before == STEPS as u64), "{seen:?}");
}

#[test]
fn a_forecast_knows_of_the_evaluation_of_a_warm_up() {
    let f = fixture(8, 8);
    let within = |seconds| Some(Instant::now() + Duration::from_secs(seconds));
    let ask = |seconds| {
        f.engine.generate(GenerateRequest { deadline: within(seconds), ..f.request(&[1]) })
    };
    f.engine.devices[0].warms(10.0);
    // Four evaluations of a second each, and a tenth more, after it.
    assert!(matches!(ask(13), Err(Rejected::DeadlineQueue { .. })));
    let promised = ask(15).unwrap();
    f.engine.devices[0].warmed();
    f.go(STEPS);
    assert_eq!(completed(&all(promised)), 1);
}

#[test]
fn rows_of_a_raw_evaluation_come_back_by_number() {
    let f = fixture(8, 8);
    let request = InferRequest {
        model: Arc::clone(&f.model),
        sample: (0..8).map(|i| i as f32).collect(),
        guidance_scales: Vec::new(),
        prompts: Vec::new(),
        timesteps: vec![999.0, 3.0],
        condition: Some(vec![1.0, 2.0]),
        deadline: None,
    };
    let submission = f.engine.infer(request).unwrap();
    f.go(1);
    let mut outputs: Vec<(usize, Vec<f32>)> = all(submission)
        .into_iter()
        .map(|event| match event {
            Event::Inferred { index, output, .. } => (index, output),
            other => panic!("{other:?}"),
        })
        .collect();
    outputs.sort_by_key(|(index, _)| *index);
    assert_eq!(outputs, [(0, vec![0.0, 0.5, 1.0, 1.5]), (1, vec![2.0, 2.5, 3.0, 3.5])]);
}

#[test]
fn a_draining_engine_refuses_and_finishes() {
    let f = fixture(8, 8);
    let running = f.engine.generate(f.request(&[1])).unwrap();
    f.engine.drain();
    assert!(matches!(f.engine.generate(f.request(&[1])), Err(Rejected::Draining)));
    f.go(STEPS);
    assert_eq!(completed(&all(running)), 1);
}

#[test]
fn a_promise_goes_before_what_came_later_and_is_compared_with_its_prediction() {
    let f = fixture(8, 1);
    // Four evaluations of a second each; the margins need a little more.
    let deadline = Some(Instant::now() + Duration::from_secs(6));
    let promised = f.engine.generate(GenerateRequest { deadline, ..f.request(&[1]) }).unwrap();
    let later = f.engine.generate(f.request(&[2, 3, 4])).unwrap();
    f.go(STEPS);
    assert_eq!(completed(&all(promised)), 1, "its four evaluations were the first four");
    let text = f.metrics.encode().unwrap();
    assert!(text.contains("understudy_prediction_ratio_count{model=\"model-1\"} 1"), "{text}");
    f.go(3 * STEPS);
    assert_eq!(completed(&all(later)), 3);
}

#[test]
fn the_first_candidate_that_is_in_time_is_taken() {
    let f = fixture(8, 8);
    let within = |seconds| Some(Instant::now() + Duration::from_secs(seconds));
    let candidate = |steps, deadline| GenerateRequest {
        trajectory: sampler::trajectory(&f.model.schedule, Kind::Ddim, steps, 0.0, false).unwrap(),
        deadline,
        ..f.request(&[1])
    };
    let pair = |deadline| [candidate(STEPS, deadline), candidate(1, deadline)];
    let free = f.engine.generate_first(&pair(None)).unwrap();
    assert_eq!((free.served, &free.predicted[..]), (0, &[None][..]));
    f.go(STEPS);
    assert_eq!(completed(&all(free.submission)), 1);

    let quick = f.engine.generate_first(&pair(within(3))).unwrap();
    assert_eq!((quick.served, quick.predicted.len()), (1, 2));
    assert!(quick.predicted[0] > Some(Duration::from_secs(3)), "{:?}", quick.predicted);
    f.go(1);
    assert_eq!(completed(&all(quick.submission)), 1);

    let impossible = f.engine.generate_first(&[candidate(STEPS, within(1))]);
    assert!(matches!(impossible, Err(Rejected::DeadlineImpossible { .. })), "{impossible:?}");
}

#[test]
fn both_or_neither() {
    let f = fixture(3, 8);
    let refused = f.engine.generate_both([f.request(&[1, 2]), f.request(&[3, 4])]);
    assert!(matches!(refused, Err(Rejected::QueueFull { asked: 4, free: 3, .. })), "{refused:?}");
    let [one, two] = f.engine.generate_both([f.request(&[1]), f.request(&[2, 3])]).unwrap();
    f.go(STEPS);
    assert_eq!((completed(&all(one)), completed(&all(two))), (1, 2));
    assert_eq!(*f.rows.lock().unwrap(), [3; STEPS], "together from the first evaluation");
}

#[test]
fn background_work_lets_clients_pass_and_takes_no_place() {
    let f = fixture(1, 8);
    let shadow = f.engine.generate_in_background(f.request(&[1, 2])).unwrap();
    assert!(f.engine.is_idle());
    // At most the evaluation under way goes first.
    let client = f.engine.generate(f.request(&[3])).unwrap();
    assert!(!f.engine.is_idle());
    f.go(STEPS + 1);
    assert_eq!(completed(&all(client)), 1);
    f.go(STEPS);
    assert_eq!(completed(&all(shadow)), 2);
    assert_eq!(f.metrics.images.with_label_values(&["model-1"]).get(), 1);
    let rows = f.rows.lock().unwrap().clone();
    let clients: Vec<_> = rows.iter().skip_while(|&&rows| rows == 2).take(STEPS).collect();
    assert_eq!(clients, [&1; STEPS], "{rows:?}");
}

#[test]
fn a_request_goes_whole_to_the_device_that_is_done_soonest() {
    let f = fixture_on(2, 16, 8, 1.0, usize::MAX);
    let long = f.engine.generate(f.request(&[1, 2, 3])).unwrap();
    let [one, other] = f.engine.generate_both([f.request(&[4]), f.request(&[5])]).unwrap();
    assert_eq!(f.engine.predicted_drain(), Duration::from_secs(STEPS as u64));
    f.go_on_second(STEPS);
    assert_eq!((completed(&all(one)), completed(&all(other))), (1, 1));
    assert_eq!(f.rows_of_second(), [2; STEPS], "a pair shares its evaluations");
    assert!(!f.engine.is_idle());
    f.go(STEPS);
    assert_eq!(completed(&all(long)), 3);
    assert_eq!(*f.rows.lock().unwrap(), [3; STEPS]);
    assert!(f.engine.is_idle());
}

#[test]
fn every_device_makes_promises_of_its_own() {
    let f = fixture_on(2, 16, 1, 1.0, usize::MAX);
    let promised = || {
        let deadline = Some(Instant::now() + Duration::from_secs(6));
        f.engine.generate(GenerateRequest { deadline, ..f.request(&[1]) })
    };
    let (one, other) = (promised().unwrap(), promised().unwrap());
    let third = promised();
    assert!(matches!(third, Err(Rejected::DeadlineQueue { .. })), "{third:?}");
    f.go(STEPS);
    f.go_on_second(STEPS);
    assert_eq!((completed(&all(one)), completed(&all(other))), (1, 1));
}

#[test]
fn a_batch_without_memory_fails_alone_and_halves_the_limit_of_its_device() {
    let f = fixture_on(2, 16, 8, 1.0, 2);
    let doomed = f.engine.generate(f.request(&[1, 2, 3, 4])).unwrap();
    f.go(1);
    let events = all(doomed);
    assert_eq!(events.len(), 4);
    let no_memory = Failure::OutOfMemory { rows: 4, limit: 2 };
    for event in &events {
        let Event::Failed { failure, .. } = event else { panic!("{event:?}") };
        assert_eq!(*failure, no_memory);
    }
    assert_eq!(f.cancelled("out_of_memory"), 4);
    assert_eq!(
        (f.model.on(0).max_rows()[Stage::Denoise], f.model.on(1).max_rows()[Stage::Denoise]),
        (2, 8)
    );

    let again = f.engine.generate(f.request(&[1, 2, 3, 4])).unwrap();
    f.go(2 * STEPS);
    assert_eq!(completed(&all(again)), 4);
    assert_eq!(f.rows.lock().unwrap()[1..], [2; 2 * STEPS]);
}

#[test]
fn what_comes_after_a_device_is_lost_goes_to_the_other() {
    let f = fixture_on(2, 16, 8, 1.0, usize::MAX);
    let doomed = f.engine.generate(f.request(&[7])).unwrap();
    f.go(1);
    let events = all(doomed);
    assert!(
        matches!(&events[..], [Event::Failed { failure: Failure::Evaluation(reason), .. }]
            if reason.contains("ILLEGAL_ADDRESS")),
        "{events:?}"
    );
    assert!(f.engine.has_lost_a_device());
    for _ in 0..2 {
        let next = f.engine.generate(f.request(&[2])).unwrap();
        f.go_on_second(STEPS);
        assert_eq!(completed(&all(next)), 1);
    }
}

#[test]
fn a_device_whose_thread_panics_is_lost_and_says_so() {
    let toy = Toy { broken: true, ..Toy::new(None, usize::MAX) };
    let model = toy_model(vec![Box::new(toy)], 4, 1.0);
    let metrics = Metrics::new().unwrap();
    let engine = Engine::start(NonZeroUsize::MIN, 4, Arc::clone(&metrics)).unwrap();
    let request = || {
        let f = fixture(1, 1);
        GenerateRequest { model: Arc::clone(&model), ..f.request(&[1]) }
    };
    assert!(all(engine.generate(request()).unwrap()).is_empty(), "nothing comes of it");
    while !engine.has_lost_a_device() {
        std::thread::yield_now();
    }
    assert_eq!(metrics.panics.with_label_values(&["device"]).get(), 1);
    assert_eq!(engine.generate(request()).unwrap_err(), Rejected::DeviceLost);
    // Its places in the queue are free.
    assert_eq!(engine.check_room(&model), Ok(()));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let problem = runtime
        .block_on(engine.warm_up(Arc::clone(&model), None, StageCosts::default()))
        .unwrap_err();
    assert!(problem.contains("answers nothing"), "{problem}");
}

#[test]
fn a_limit_that_halves_while_samples_wait_holds_for_them() {
    let f = fixture_on(1, 16, 4, 1.0, 2);
    let first = f.engine.generate(f.request(&[1, 2, 3, 4])).unwrap();
    let second = f.engine.generate(f.request(&[4, 5, 6])).unwrap();
    // The first four fail together, whenever the others came; these are then two at a time.
    f.go(1 + 2 * STEPS);
    assert_eq!((completed(&all(first)), completed(&all(second))), (0, 3));
    assert!(f.rows.lock().unwrap()[1..].iter().all(|&rows| rows <= 2));
}

#[test]
fn warming_up_ends_where_memory_does_on_every_device() {
    let toys = [1, 2].map(|rows| Box::new(Toy::new(None, rows)) as Box<dyn Denoiser>);
    let model = toy_model(toys.into(), 1, 1.0);
    let engine = Engine::start(NonZeroUsize::new(2).unwrap(), 4, Metrics::new().unwrap()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(engine.warm_up(Arc::clone(&model), Some(64), StageCosts::default())).unwrap();
    assert_eq!(
        (model.on(0).max_rows()[Stage::Denoise], model.on(1).max_rows()[Stage::Denoise]),
        (1, 2)
    );

    let tiny = toy_model(vec![Box::new(Toy::new(None, 0)), Box::new(Toy::new(None, 1))], 1, 1.0);
    let problem = runtime.block_on(engine.warm_up(tiny, None, StageCosts::default())).unwrap_err();
    assert!(problem.contains("no memory for one row"), "{problem}");
}

/// A [`Toy`] that notes how much of something else there has been at each of its own evaluations.
struct Watching {
    toy: Toy,
    other: Box<dyn Fn() -> u64 + Send + Sync>,
    seen: Arc<Mutex<Vec<u64>>>,
}

fn decodes(metrics: &Metrics) -> u64 {
    metrics.transcoding_duration.with_label_values(&["model", "decode"]).get_sample_count()
}

impl Denoiser for Watching {
    fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        labels: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        self.seen.lock().unwrap().push((self.other)());
        self.toy.forward(x, timesteps, labels)
    }
    fn geometry(&self) -> &Geometry {
        self.toy.geometry()
    }
    fn dtype(&self) -> DType {
        self.toy.dtype()
    }
    fn device(&self) -> &Device {
        self.toy.device()
    }
    fn parameters(&self) -> usize {
        0
    }
}

/// diffusers' small Stable Diffusion, decoded whole and in parts; another model is evaluated meanwhile.
#[test]
fn others_are_evaluated_between_the_parts_of_a_decode_whose_images_stay_the_same() {
    const PARTS: usize = 16;
    const IMAGES: usize = 6;
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let golden = golden.join("models/tests/golden/pipeline/stable_diffusion");
    let model = Model::from_folder_for_test(&golden);
    let metrics = Metrics::new().unwrap();
    let engine = Engine::start(NonZeroUsize::MIN, 64, Arc::clone(&metrics)).unwrap();
    let ask = || GenerateRequest {
        model: Arc::clone(&model),
        samples: (0..IMAGES as u64).map(|seed| SampleSpec { seed, class_label: None }).collect(),
        trajectory: sampler::trajectory(&model.schedule, Kind::Ddim, 2, 0.0, false).unwrap(),
        prompts: model.prompts("red apple", "", 1.0, Syntax::Plain).unwrap(),
        start: Start::Noise,
        guidance_scale: 1.0,
        partial_images: 0,
        deadline: None,
    };
    let images = |submission| {
        let mut images = vec![None; IMAGES];
        for event in all(submission) {
            let Event::Completed { index, image, .. } = event else { panic!("{event:?}") };
            images[index] = Some(image.pixels);
        }
        images
    };
    let whole = images(engine.generate(ask()).unwrap());
    let before = decodes(&metrics);
    assert_eq!(before, IMAGES as u64, "one row at a time, since it has not been warmed up");

    let seen = Arc::default();
    let toy = Toy::new(None, usize::MAX);
    let decoded = Arc::clone(&metrics);
    let other = Box::new(move || decodes(&decoded));
    let watching = Watching { toy, other, seen: Arc::clone(&seen) };
    let watching = toy_model(vec![Box::new(watching)], 1, 1e-4);
    // More than end before the others do, one after the other.
    let endless = GenerateRequest {
        trajectory: sampler::trajectory(&watching.schedule, Kind::Ddim, 1000, 0.0, false).unwrap(),
        samples: vec![SampleSpec { seed: 1, class_label: Some(1) }; 50],
        prompts: Vec::new(),
        model: watching,
        ..ask()
    };
    model.on(0).decode_in(PARTS);
    let [split, other] = engine.generate_both([ask(), endless]).unwrap();
    assert_eq!(images(split), whole);
    drop(other);
    assert_eq!(decodes(&metrics) - before, (PARTS * IMAGES) as u64);
    let between = |count: &u64| !(count - before).is_multiple_of(PARTS as u64);
    assert!(seen.lock().unwrap().iter().any(between), "{seen:?}");
}
