//! The pool of noisy samples on which the teacher walks: DKDM §3.3, "dynamic iterative distillation".
//!
//! ```text
//! pool:  slots, x ~ N(0, I), each walked by the teacher to a place of its own
//! loop:  take a batch of slots; those at their end restart from noise
//!        the teacher answers; the answer is the training batch, and advances the samples one step
//! ```
//!
//! A slot's trajectory is that of a request with its seed, its class and the walk's sampler: noise is
//! keyed by (seed, step) as everywhere, so nothing depends on which slots share an evaluation. Of a text-to-image teacher
//! it is that of a guided request; its prompt and its scale follow from its seed, as a class does.

mod advance;
mod guided;
mod rows;
pub mod segments;
pub(crate) mod step;
mod walked;

use std::path::PathBuf;
use std::rc::Rc;

use candle_core::{Device, Tensor};
use serde_json::{Map, Value};
use understudy_models::{Error, Result, memory, noise};

use crate::checkpoint::Snapshot;
use crate::estimate::timed_evaluation;
use crate::generate::Captions;
use crate::guidance::Guidance;
use crate::prompting::Prompting;
use crate::random::{self, Purpose};
use crate::teacher::Teacher;
use crate::training_batch::{BatchSource, Cost, TrainingBatch};
use crate::walk::Walks;
use rows::{Owner, Rows, Saved};

/// In which order noisy samples are shown (DKDM §3.3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Order {
    /// One batch, all at the same time, walked from noise to image together, again and again.
    Iterative,
    /// One batch, each walked a random number of steps before the first training batch.
    Shuffled,
    /// `round(rho·T)` batches, each sample at a time of its own; every training batch draws from all.
    Dynamic {
        /// ρ, above 0.
        rho: f64,
    },
}

impl Order {
    /// Samples in the pool for training batches of `batch` rows and `timesteps` training timesteps.
    pub fn slots(self, batch: usize, timesteps: usize) -> usize {
        match self {
            Self::Iterative | Self::Shuffled => batch,
            Self::Dynamic { rho } => {
                ((rho * timesteps as f64).round() as usize).max(1).saturating_mul(batch)
            }
        }
    }
}

/// What a pool is to be.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The order of the training batches.
    pub order: Order,
    /// Samples of a training batch: its rows, or half of them where guidance is kept.
    pub batch: usize,
    /// The run's seed.
    pub seed: u64,
    /// What tells the run from others, so that none takes another's pool file ([`RunDir::id`]): text
    /// without line breaks.
    ///
    /// [`RunDir::id`]: crate::run_dir::RunDir::id
    pub run: String,
    /// What an earlier version called the run, where it is one of that: its folder's name.
    pub earlier: Option<String>,
    /// The file the samples are kept in; in the memory of the teacher's device without one.
    pub file: Option<PathBuf>,
    /// The folder for finished samples, as `CLASS/SEED.png`; not kept without one.
    pub finished: Option<PathBuf>,
}

/// The pool.
pub struct Pool<'a> {
    teacher: &'a Teacher,
    walks: Walks,
    settings: Settings,
    /// What a text-to-image teacher is told.
    prompting: Option<Rc<Prompting>>,
    rows: Rows,
    /// Values of each.
    length: usize,
    slots: Vec<Slot>,
    /// Trajectories begun so far.
    begun: u64,
    evaluations: u64,
    finished: u64,
    /// The next slot that is to be walked to its first place; past the last once the pool is filled.
    filling: usize,
    active: Vec<usize>,
}

/// A sample on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Slot {
    /// Of its trajectory; below 2⁵³, as seeds of requests are.
    seed: u64,
    /// Which walk.
    offset: u32,
    /// Steps done.
    position: u32,
}

impl<'a> Pool<'a> {
    /// A pool that [`BatchSource::prepare`] will fill.
    ///
    /// # Errors
    /// [`Error::Value`] for settings out of range; [`Error::Io`] for a file that cannot be made;
    /// [`Error::Value`] for one that is another pool's.
    pub fn new(teacher: &'a Teacher, walks: Walks, settings: Settings) -> Result<Self> {
        if let Order::Dynamic { rho } = settings.order
            && !(rho.is_finite() && rho > 0.0)
        {
            return Err(Error::value("--rho", rho, "must be above 0; the paper has 0.4"));
        }
        let count = settings.order.slots(settings.batch, teacher.schedule.train_timesteps());
        if u32::try_from(count).is_err() {
            return Err(Error::value(
                "--rho",
                count,
                "the pool has too many samples; take a smaller one",
            ));
        }
        let geometry = teacher.geometry();
        let length = geometry.in_channels * geometry.height * geometry.width;
        let samples = (count as u64).saturating_mul((length * size_of::<f32>()) as u64);
        let mut bytes = (count * size_of::<Slot>()) as u64;
        if settings.file.is_none() && teacher.network().device().is_cpu() {
            bytes = bytes.saturating_add(samples);
        }
        let (field, value) = match settings.order {
            Order::Dynamic { rho } => ("rho", rho.to_string()),
            Order::Iterative | Order::Shuffled => ("batch", settings.batch.to_string()),
        };
        let remedy = "take a smaller one, or keep the pool in a file (--pool-file)";
        memory::check(field, value, [0, bytes], remedy)?;
        let rows = match &settings.file {
            None => Rows::in_memory(count, length, teacher.network().device())?,
            Some(path) => Rows::mapped(path, count, length, &owner(teacher, &settings))?,
        };
        Ok(Self {
            teacher,
            walks,
            settings,
            prompting: None,
            rows,
            length,
            slots: vec![Slot { seed: 0, offset: 0, position: 0 }; count],
            begun: 0,
            evaluations: 0,
            finished: 0,
            filling: 0,
            active: Vec::new(),
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

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Trajectories that reached their end.
    pub fn finished(&self) -> u64 {
        self.finished
    }

    /// Starts a new trajectory in `slot`: step 0 of its noise.
    fn begin(&mut self, slot: usize) -> Result<()> {
        let run = self.settings.seed;
        let seed = random::number(run, Purpose::Trajectory, self.begun, 0) >> 11;
        // The samples of an iterative batch stand at the same time, so they share a walk.
        let round = match self.settings.order {
            Order::Iterative => self.begun / self.settings.batch as u64,
            Order::Shuffled | Order::Dynamic { .. } => self.begun,
        };
        let offset = random::below(run, Purpose::Offset, round, 0, self.walks.offsets()) as u32;
        self.begun += 1;
        self.slots[slot] = Slot { seed, offset, position: 0 };
        let mut x = vec![0.0; self.length];
        noise::normal(seed, 0, &mut x);
        self.rows.scatter(&[slot], &Tensor::from_vec(x, (1, self.length), &Device::Cpu)?)
    }

    /// How many steps `slot` is walked before the first training batch.
    fn target(&self, slot: usize) -> u32 {
        match self.settings.order {
            Order::Iterative => 0,
            Order::Shuffled | Order::Dynamic { .. } => {
                let steps = self.walks.steps();
                random::below(self.settings.seed, Purpose::Target, slot as u64, 0, steps) as u32
            }
        }
    }

    /// The slots of the training batch of iteration `step`.
    fn draw(&self, step: u64) -> Vec<usize> {
        let Settings { order, batch, seed, .. } = self.settings;
        match order {
            Order::Iterative | Order::Shuffled => (0..self.len()).collect(),
            Order::Dynamic { .. } => random::distinct(seed, Purpose::Slot, step, batch, self.len()),
        }
    }
}

/// Says whose pool a file holds.
fn owner(teacher: &Teacher, settings: &Settings) -> Owner {
    let line = |format: u8, run: &String| {
        format!("understudy pool {format}: teacher {}, run {run}", &teacher.hash[..16])
    };
    Owner {
        line: line(2, &settings.run),
        earlier: settings.earlier.as_ref().map(|run| line(1, run)),
    }
}

/// How many slots are walked together while the pool is filled.
const FILL_ROWS: usize = 64;

impl BatchSource for Pool<'_> {
    fn identity(&self) -> Map<String, Value> {
        let place = if matches!(self.rows, Rows::Mapped(_)) { "file" } else { "memory" };
        let own = [
            ("teacher_sha256".into(), self.teacher.hash.clone().into()),
            ("teacher_noise_schedule".into(), self.teacher.schedule.to_json()),
            ("pool".into(), place.into()),
        ];
        own.into_iter().chain(self.prompting.iter().flat_map(|it| it.identity())).collect()
    }

    fn cost(&mut self) -> Result<Cost> {
        let network = self.teacher.network();
        let each = self.rows_each();
        let fill_rows = each * FILL_ROWS.max(self.settings.batch).min(self.len());
        // The first evaluation of a size is slower than those after it.
        timed_evaluation(network, fill_rows)?;
        let (_, fill_seconds) = timed_evaluation(network, fill_rows)?;
        timed_evaluation(network, each * self.settings.batch)?;
        let (mut sample, batch_seconds) = timed_evaluation(network, each * self.settings.batch)?;
        if let Some(Guidance::Distil { .. }) = self.prompting.as_ref().map(|it| it.guidance()) {
            sample = sample.part(0, each)?;
            let rows = sample.rows();
            sample.text.iter_mut().for_each(|text| text.guidance = Some(vec![0.0; rows]));
        }
        let left = |slot: usize| self.target(slot).saturating_sub(self.slots[slot].position);
        let steps: u64 = (self.filling..self.len()).map(|slot| u64::from(left(slot))).sum();
        let prepare_rows = each as u64 * steps;
        let encoding = self.prompting.as_ref().map_or(Ok(0.0), |it| it.seconds())?;
        let table = self.prompting.as_ref().map_or(0, |it| it.bytes());
        let values = (self.len() * self.length * size_of::<f32>()) as u64;
        let (in_memory, in_file) = match &self.rows {
            Rows::Memory(_) => (values, 0),
            Rows::Mapped(_) => (0, 2 * values),
        };
        Ok(Cost {
            prepare_rows,
            prepare_seconds: encoding + prepare_rows as f64 * fill_seconds / fill_rows as f64,
            batch_seconds,
            // Zeros take none before they are written to.
            memory_bytes: if self.begun == 0 && network.device().is_cpu() { in_memory } else { 0 },
            checkpoint_bytes: in_memory + (self.len() * size_of::<Slot>()) as u64,
            disk_bytes: in_file + table,
            sample,
        })
    }

    fn prepare(&mut self) -> Result<Option<f64>> {
        if let Some(prompting) = &self.prompting {
            prompting.prepare()?;
        }
        // Not when the pool is made: a resumed run must find the rows of its checkpoint in the file.
        if self.begun == 0 {
            (0..self.len()).try_for_each(|slot| self.begin(slot))?;
        }
        // A slot that reaches its place makes room for the next. Which slots share an evaluation does not
        // matter, so a resumed run may group them otherwise.
        while self.active.len() < FILL_ROWS.max(self.settings.batch) && self.filling < self.len() {
            if self.slots[self.filling].position < self.target(self.filling) {
                self.active.push(self.filling);
            }
            self.filling += 1;
        }
        if self.active.is_empty() {
            return Ok(None);
        }
        let active = std::mem::take(&mut self.active);
        self.advance(&active)?;
        let short = |&slot: &usize| self.slots[slot].position < self.target(slot);
        self.active = active.into_iter().filter(short).collect();
        let waiting = self.len() - self.filling;
        Ok(Some(1.0 - (waiting + self.active.len()) as f64 / self.len() as f64))
    }

    fn training_batch(&mut self, step: u64) -> Result<TrainingBatch> {
        let slots = self.draw(step);
        let end = self.walks.steps() as u32;
        for &slot in &slots {
            if self.slots[slot].position == end {
                self.begin(slot)?;
            }
        }
        self.advance(&slots)
    }

    fn captions(&self, count: usize) -> Result<Option<Captions>> {
        let device = self.teacher.network().device();
        self.prompting.as_ref().map(|prompting| prompting.captions(count, device)).transpose()
    }

    fn teacher_evaluations(&self) -> u64 {
        self.evaluations
    }

    fn save(&self, snapshot: &mut Snapshot) -> Result<()> {
        match self.rows.save()? {
            Saved::Values(values) => {
                snapshot.f32("pool.x", &[self.len(), self.length], &values);
            }
            Saved::Copies(copies) => snapshot.u8("pool.copies", &copies),
        }
        let column = |part: fn(&Slot) -> u64| self.slots.iter().map(part).collect::<Vec<u64>>();
        snapshot.u64("pool.seeds", &column(|slot| slot.seed));
        snapshot.u64("pool.offsets", &column(|slot| slot.offset.into()));
        snapshot.u64("pool.positions", &column(|slot| slot.position.into()));
        let filled = self.filling == self.len() && self.active.is_empty();
        let counters = [self.begun, self.evaluations, self.finished, filled.into()];
        snapshot.u64("pool.counters", &counters);
        Ok(())
    }

    fn keep(&mut self) {
        self.rows.keep();
    }

    fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let saved = match &self.rows {
            Rows::Memory(_) => Saved::Values(snapshot.get_f32("pool.x")?),
            Rows::Mapped(_) => Saved::Copies(snapshot.get_u8("pool.copies")?),
        };
        let restored = self.rows.restore(saved)?;
        let seeds = snapshot.get_u64("pool.seeds")?;
        let offsets = snapshot.get_u64("pool.offsets")?;
        let positions = snapshot.get_u64("pool.positions")?;
        let counters = snapshot.get_u64("pool.counters")?;
        let lengths = [seeds.len(), offsets.len(), positions.len()];
        let (&[begun, evaluations, finished, filled], true) =
            (&counters[..], restored && lengths == [self.len(); 3])
        else {
            return Err(snapshot.malformed("its pool is of another size"));
        };
        for (i, slot) in self.slots.iter_mut().enumerate() {
            let (offset, position) = (offsets[i], positions[i]);
            let within =
                offset < self.walks.offsets() as u64 && position <= self.walks.steps() as u64;
            if !within {
                return Err(snapshot.malformed("its pool's samples are on other walks"));
            }
            *slot = Slot { seed: seeds[i], offset: offset as u32, position: position as u32 };
        }
        (self.begun, self.evaluations, self.finished) = (begun, evaluations, finished);
        self.filling = if filled == 1 { self.len() } else { 0 };
        self.active = Vec::new();
        Ok(())
    }
}
