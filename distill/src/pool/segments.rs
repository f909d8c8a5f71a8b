//! The pool for students of few steps: samples walk a segment at a time, and where each ends is what is to be learned.
//!
//! ```text
//! segment:  the part of the teacher's walk that one step of the student is to do
//! round:    every sample walks a segment; all that it visits becomes training batches, in an order of their own
//! ```
//!
//! The walk is DDIM's, which adds no noise, so x_t alone decides where it ends: what is to be learned does not move, and
//! costs no evaluation beside those of the walk (Berthelot et al. 2023, arXiv 2303.04248, and Heek et al. 2024, arXiv
//! 2403.06807, have a moving student say it instead). A text-to-image teacher walks by its guided answer, and the student
//! is told the scale.

use std::rc::Rc;

use candle_core::{Device, Tensor};
use serde_json::{Map, Value};
use understudy_models::rollout::{self, Row};
use understudy_models::schedule::{Class, ScheduleConfig};
use understudy_models::{Error, Result, memory};

use super::rows::{Rows, Saved};
use super::step::step;
use crate::checkpoint::Snapshot;
use crate::estimate::timed_evaluation;
use crate::generate::Captions;
use crate::objective::{Linear, apply, secant};
use crate::prompting::Prompting;
use crate::random::{self, Purpose};
use crate::teacher::Teacher;
use crate::training_batch::{BatchSource, Cost, TrainingBatch};
use crate::walk::Walks;

/// What the pool is to be.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Evaluations that the student is to need, K: segments of the walk.
    pub evaluations: usize,
    /// Steps of the teacher's walk, a multiple of `evaluations`.
    pub walk_steps: usize,
    /// Samples in the pool, a multiple of `batch`.
    pub samples: usize,
    /// Rows of a training batch.
    pub batch: usize,
    /// The run's seed.
    pub seed: u64,
}

/// The pool.
pub struct Segments<'a> {
    teacher: &'a Teacher,
    settings: Settings,
    /// What a text-to-image teacher is told.
    prompting: Option<Rc<Prompting>>,
    walk: Walks,
    /// Of each step of the walk: what turns x_t and the end of its segment into v.
    targets: Vec<Linear>,
    /// Where the samples' segments begin.
    starts: Rows,
    slots: Vec<Slot>,
    /// Trajectories begun so far.
    begun: u64,
    evaluations: u64,
    /// Rounds walked.
    rounds: u64,
    round: Option<Round>,
}

/// A sample on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slot {
    /// Of its trajectory; below 2⁵³, as seeds of requests are.
    seed: u64,
    /// The segment that it is in.
    segment: usize,
}

/// What was visited in a round.
struct Round {
    /// `[samples · steps of a segment, length]`.
    visited: Tensor,
    /// Where the segments end, `[samples, length]`.
    ends: Tensor,
    /// Rows to show: each a sample and a step of its segment.
    order: Vec<(usize, usize)>,
}

/// Refuses a walk that does not come by the timesteps of a student of so many evaluations.
///
/// # Errors
/// [`Error::Value`] naming the flag and what divides what.
pub fn check(schedule: &ScheduleConfig, evaluations: usize, walk_steps: usize) -> Result<()> {
    let timesteps = schedule.train_timesteps();
    if evaluations == 0 || !timesteps.is_multiple_of(evaluations) {
        let remedy =
            format!("must divide the teacher's {timesteps} training timesteps, as 4, 2 and 1 do");
        return Err(Error::value("--evaluations", evaluations, remedy));
    }
    if !walk_steps.is_multiple_of(evaluations) || walk_steps <= evaluations {
        let remedy = format!(
            "must be a multiple of --evaluations {evaluations}, and larger, so that the student's timesteps are among \
             those of the walk"
        );
        return Err(Error::value("--walk-steps", walk_steps, remedy));
    }
    Walks::trailing(schedule, walk_steps)?;
    Ok(())
}

/// How many samples are walked together.
const WALK_ROWS: usize = 64;

impl<'a> Segments<'a> {
    /// A pool that [`BatchSource::prepare`] will fill.
    ///
    /// # Errors
    /// [`Error::Value`] for settings out of range, or a schedule that the walk cannot honour.
    pub fn new(teacher: &'a Teacher, settings: Settings) -> Result<Self> {
        let Settings { evaluations, walk_steps, samples, batch, .. } = settings;
        check(&teacher.schedule, evaluations, walk_steps)?;
        let walk = Walks::trailing(&teacher.schedule, walk_steps)?;
        let alpha_bar = teacher.schedule.schedule(Class::Ddpm)?.alpha_bar;
        let at = |position: usize| match walk.evaluation(0, position) {
            Some(evaluation) => alpha_bar[evaluation.timestep as usize],
            None => 1.0,
        };
        let length = walk_steps / evaluations;
        let target = |position: usize| secant(at(position), at((position / length + 1) * length));
        let targets = (0..walk_steps).map(target).collect();

        let geometry = teacher.geometry();
        let values = geometry.in_channels * geometry.height * geometry.width;
        let rows = samples.saturating_mul(length - 1 + start_copies(length));
        if samples == 0 || !samples.is_multiple_of(batch) || rows >= 1 << 20 {
            let remedy = format!(
                "must be a multiple of --batch {batch}, and {rows} rows of a round below {}; change --rho",
                1 << 20
            );
            return Err(Error::value("samples of the pool", samples, remedy));
        }
        let device = teacher.network().device();
        if device.is_cpu() {
            let bytes = (samples * (length + 2) * values * size_of::<f32>()) as u64;
            memory::check("rho", samples.to_string(), [0, bytes], "take a smaller one")?;
        }
        let starts = Rows::in_memory(samples, values, device)?;
        let slots = vec![Slot { seed: 0, segment: 0 }; samples];
        Ok(Self {
            teacher,
            settings,
            prompting: None,
            walk,
            targets,
            starts,
            slots,
            begun: 0,
            evaluations: 0,
            rounds: 0,
            round: None,
        })
    }

    /// The same pool of a text-to-image teacher, whose samples are walked after prompts.
    #[must_use]
    pub fn prompted(self, prompting: Option<Rc<Prompting>>) -> Self {
        Self { prompting, ..self }
    }

    /// Rows of the teacher's evaluation for each sample.
    fn rows_each(&self) -> usize {
        1 + usize::from(self.prompting.is_some())
    }

    /// Steps of a segment.
    fn length(&self) -> usize {
        self.settings.walk_steps / self.settings.evaluations
    }

    /// Training batches of a round.
    fn batches(&self) -> u64 {
        let rows = self.length() - 1 + start_copies(self.length());
        (self.slots.len() * rows / self.settings.batch) as u64
    }

    /// Starts a new trajectory in each of `slots`.
    fn begin(&mut self, slots: &[usize]) -> Result<()> {
        for &slot in slots {
            let run = self.settings.seed;
            let seed = random::number(run, Purpose::Trajectory, self.begun, 0) >> 11;
            self.begun += 1;
            self.slots[slot] = Slot { seed, segment: 0 };
        }
        for slots in slots.chunks(WALK_ROWS) {
            let seeds: Vec<u64> = slots.iter().map(|&slot| self.slots[slot].seed).collect();
            let x = rollout::start(self.teacher.geometry(), &seeds, &Device::Cpu)?;
            self.starts.scatter(slots, &x.flatten_from(1)?)?;
        }
        Ok(())
    }

    /// Where `slots` come to on their segments: `[slots, steps + 1, length]`, beginning with where they are.
    fn walk(&self, slots: &[usize]) -> Result<Tensor> {
        let geometry = self.teacher.geometry();
        let device = self.teacher.network().device();
        let shape = (slots.len(), geometry.in_channels, geometry.height, geometry.width);
        let mut x = self.starts.gather(slots, device)?.reshape(shape)?;
        let mut visited = vec![x.flatten_from(1)?];
        for at in 0..self.length() {
            let mut moves = Vec::with_capacity(slots.len());
            let mut timesteps = Vec::with_capacity(slots.len());
            for &slot in slots {
                let Slot { seed, segment } = self.slots[slot];
                let position = segment * self.length() + at;
                let next = self.walk.evaluation(0, position);
                let next =
                    next.ok_or_else(|| Error::Weights(format!("slot {slot} is past its end")))?;
                moves.push(Row { seed, position, step: next.step });
                timesteps.push(next.timestep as usize);
            }
            x = step(self.teacher, self.prompting.as_deref(), x, timesteps, &moves)?.next;
            visited.push(x.flatten_from(1)?);
        }
        Ok(Tensor::stack(&visited, 1)?)
    }

    /// Walks all samples through their segments.
    fn walk_round(&mut self) -> Result<()> {
        let length = self.length();
        let (mut visited, mut ends) = (Vec::new(), Vec::new());
        let slots: Vec<usize> = (0..self.slots.len()).collect();
        for slots in slots.chunks(WALK_ROWS) {
            let walked = self.walk(slots)?;
            visited.push(walked.narrow(1, 0, length)?.flatten_to(1)?.contiguous()?);
            ends.push(walked.narrow(1, length, 1)?.squeeze(1)?.contiguous()?);
        }
        let (visited, ends) = (Tensor::cat(&visited, 0)?, Tensor::cat(&ends, 0)?);
        let order = self.order();
        self.round = Some(Round { visited, ends, order });
        Ok(())
    }

    /// The order in which a round's rows are shown: shuffled (Fisher & Yates).
    fn order(&self) -> Vec<(usize, usize)> {
        let again = start_copies(self.length()) - 1;
        let each = self.length() + again;
        let mut order: Vec<_> = (0..self.slots.len() * each)
            .map(|row| (row / each, (row % each).saturating_sub(again)))
            .collect();
        for last in (1..order.len()).rev() {
            let (seed, minor) = (self.settings.seed, last as u64);
            order.swap(last, random::below(seed, Purpose::Row, self.rounds, minor, last + 1));
        }
        order
    }

    /// Goes on to the next segments.
    fn turn(&mut self) -> Result<()> {
        let Some(round) = self.round.take() else { return Ok(()) };
        let slots: Vec<usize> = (0..self.slots.len()).collect();
        self.starts.scatter(&slots, &round.ends)?;
        self.slots.iter_mut().for_each(|slot| slot.segment += 1);
        let ended = |&slot: &usize| self.slots[slot].segment == self.settings.evaluations;
        let ended: Vec<usize> = slots.into_iter().filter(ended).collect();
        self.begin(&ended)
    }

    /// The samples that are still to be walked to the segment in which they begin: all segments are alike often.
    fn unfilled(&self) -> impl Iterator<Item = (usize, usize)> {
        let slots = self.slots.iter().enumerate().filter(|_| self.rounds == 0);
        slots
            .map(|(slot, at)| (slot, (slot % self.settings.evaluations).saturating_sub(at.segment)))
            .filter(|(_, segments)| *segments > 0)
    }
}

/// How often the beginning of a segment is shown for once of its other steps: they are what a student of K steps is
/// asked in the end, and make a third of what it is shown.
fn start_copies(length: usize) -> usize {
    (length / 2).max(3)
}

impl BatchSource for Segments<'_> {
    fn identity(&self) -> Map<String, Value> {
        [
            ("teacher_sha256".into(), self.teacher.hash.clone().into()),
            ("teacher_noise_schedule".into(), self.teacher.schedule.to_json()),
            ("evaluations".into(), self.settings.evaluations.into()),
            ("pool_samples".into(), self.settings.samples.into()),
        ]
        .into_iter()
        .chain(self.prompting.iter().flat_map(|it| it.identity()))
        .collect()
    }

    fn cost(&mut self) -> Result<Cost> {
        let network = self.teacher.network();
        let each = self.rows_each();
        let rows = each * WALK_ROWS.min(self.slots.len());
        // The first evaluation of a size is slower than those after it.
        timed_evaluation(network, rows)?;
        let (_, seconds) = timed_evaluation(network, rows)?;
        let (mut sample, _) = timed_evaluation(network, self.settings.batch)?;
        let batch = self.settings.batch;
        sample.text.iter_mut().for_each(|text| text.guidance = Some(vec![0.0; batch]));
        let segments: usize = self.unfilled().map(|(_, segments)| segments).sum();
        let prepare_rows = (each * segments * self.length()) as u64;
        let round_rows = each * self.slots.len() * self.length();
        let geometry = self.teacher.geometry();
        let sample_bytes =
            (geometry.in_channels * geometry.height * geometry.width * size_of::<f32>()) as u64;
        let encoding = self.prompting.as_ref().map_or(Ok(0.0), |it| it.seconds())?;
        let samples = self.slots.len() as u64;
        // Visited samples, and a copy while they are put together.
        let held = 2 * (self.length() as u64 + 1) + 1;
        let on_cpu = self.round.is_none() && network.device().is_cpu();
        Ok(Cost {
            prepare_rows,
            prepare_seconds: encoding + prepare_rows as f64 * seconds / rows as f64,
            batch_seconds: round_rows as f64 * seconds / rows as f64 / self.batches() as f64,
            memory_bytes: if on_cpu { samples * sample_bytes * held } else { 0 },
            checkpoint_bytes: samples * (sample_bytes + 16),
            disk_bytes: self.prompting.as_ref().map_or(0, |it| it.bytes()),
            sample,
        })
    }

    fn prepare(&mut self) -> Result<Option<f64>> {
        if let Some(prompting) = &self.prompting {
            prompting.prepare()?;
        }
        if self.begun == 0 {
            self.begin(&(0..self.slots.len()).collect::<Vec<_>>())?;
        }
        let slots: Vec<usize> = self.unfilled().map(|(slot, _)| slot).take(WALK_ROWS).collect();
        if slots.is_empty() {
            return Ok(None);
        }
        let ends = self.walk(&slots)?.narrow(1, self.length(), 1)?.squeeze(1)?;
        self.starts.scatter(&slots, &ends)?;
        slots.iter().for_each(|&slot| self.slots[slot].segment += 1);
        self.evaluations += (self.rows_each() * slots.len() * self.length()) as u64;
        let left: usize = self.unfilled().map(|(_, segments)| segments).sum();
        let all: usize = (0..self.slots.len()).map(|slot| slot % self.settings.evaluations).sum();
        Ok(Some(1.0 - left as f64 / all as f64))
    }

    fn training_batch(&mut self, step: u64) -> Result<TrainingBatch> {
        let step = step.saturating_sub(1);
        let (round, place) = (step / self.batches() + 1, step % self.batches());
        // A resumed run walks its round again.
        if self.rounds > 0 && self.round.is_none() {
            self.walk_round()?;
        }
        while self.rounds < round {
            self.turn()?;
            self.rounds += 1;
            self.evaluations += (self.rows_each() * self.slots.len() * self.length()) as u64;
            self.walk_round()?;
        }
        let Some(walked) = &self.round else {
            return Err(Error::Weights("no round was walked".into()));
        };
        let batch = self.settings.batch;
        let from = place as usize * batch;
        let rows = &walked.order[from..from + batch];

        let geometry = self.teacher.geometry();
        let shape = (batch, geometry.in_channels, geometry.height, geometry.width);
        let device = walked.visited.device();
        let pick = |all: &Tensor, of: &dyn Fn(&(usize, usize)) -> usize| -> Result<Tensor> {
            let places: Vec<u32> = rows.iter().map(|row| of(row) as u32).collect();
            Ok(all.index_select(&Tensor::new(places, device)?, 0)?.reshape(shape)?)
        };
        let x = pick(&walked.visited, &|(slot, at)| slot * self.length() + at)?;
        let ends = pick(&walked.ends, &|(slot, _)| *slot)?;
        let positions: Vec<usize> =
            rows.iter().map(|(slot, at)| self.slots[*slot].segment * self.length() + at).collect();
        let targets: Vec<Linear> =
            positions.iter().map(|&position| self.targets[position]).collect();
        let timestep = |position: &usize| {
            self.walk.evaluation(0, *position).map_or(0, |next| next.timestep as usize)
        };
        let seeds: Vec<u64> = rows.iter().map(|(slot, _)| self.slots[*slot].seed).collect();
        let text = self.prompting.as_ref().map(|it| it.conditions(&seeds, x.device()));
        Ok(TrainingBatch {
            answer: apply(&targets, &x, &ends)?,
            timesteps: positions.iter().map(timestep).collect(),
            labels: seeds.iter().map(|&seed| self.teacher.label(seed)).collect(),
            text: text.transpose()?,
            seeds,
            x,
        })
    }

    fn captions(&self, count: usize) -> Result<Option<Captions>> {
        let device = self.teacher.network().device();
        self.prompting.as_ref().map(|prompting| prompting.captions(count, device)).transpose()
    }

    fn images(&self, count: usize) -> Result<Option<(Tensor, Vec<u64>)>> {
        let Some(round) = &self.round else { return Ok(None) };
        let last = |(_, slot): &(usize, &Slot)| slot.segment + 1 == self.settings.evaluations;
        let ended = self.slots.iter().enumerate().filter(last).take(count);
        let (rows, seeds): (Vec<u32>, Vec<u64>) =
            ended.map(|(row, slot)| (row as u32, slot.seed)).unzip();
        if rows.is_empty() {
            return Ok(None);
        }
        let geometry = self.teacher.geometry();
        let shape = (rows.len(), geometry.in_channels, geometry.height, geometry.width);
        let rows = Tensor::new(rows, round.ends.device())?;
        Ok(Some((round.ends.index_select(&rows, 0)?.reshape(shape)?, seeds)))
    }

    fn teacher_evaluations(&self) -> u64 {
        self.evaluations
    }

    fn save(&self, snapshot: &mut Snapshot) -> Result<()> {
        if let Saved::Values(values) = self.starts.save()? {
            snapshot.f32("pool.x", &[self.slots.len(), values.len() / self.slots.len()], &values);
        }
        let column = |part: fn(&Slot) -> u64| self.slots.iter().map(part).collect::<Vec<u64>>();
        snapshot.u64("pool.seeds", &column(|slot| slot.seed));
        snapshot.u64("pool.segments", &column(|slot| slot.segment as u64));
        snapshot.u64("pool.counters", &[self.begun, self.evaluations, self.rounds]);
        Ok(())
    }

    fn keep(&mut self) {}

    fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let restored = self.starts.restore(Saved::Values(snapshot.get_f32("pool.x")?))?;
        let seeds = snapshot.get_u64("pool.seeds")?;
        let segments = snapshot.get_u64("pool.segments")?;
        let counters = snapshot.get_u64("pool.counters")?;
        let lengths = [seeds.len(), segments.len()];
        let within = segments.iter().all(|&segment| (segment as usize) < self.settings.evaluations);
        let (&[begun, evaluations, rounds], true) =
            (&counters[..], restored && within && lengths == [self.slots.len(); 2])
        else {
            return Err(snapshot.malformed("its pool is of another size, or on another walk"));
        };
        for (slot, (seed, segment)) in self.slots.iter_mut().zip(seeds.into_iter().zip(segments)) {
            *slot = Slot { seed, segment: segment as usize };
        }
        (self.begun, self.evaluations, self.rounds) = (begun, evaluations, rounds);
        self.round = None;
        Ok(())
    }
}
