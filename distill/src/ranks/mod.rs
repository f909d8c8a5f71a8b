//! A run over several processes, to the same bits whatever their number.
//!
//! ```text
//! run:    S shards, a power of two, each with a part of every batch, and slots, counters and a gradient of its own
//! rank:   one of N processes, N a power of two and at most S, with a block of S/N neighbouring shards
//! step:   each shard's gradient ──▶ sum by a fixed tree (tree.rs) ──▶ the same optimizer's step on every rank
//! ```
//!
//! S is a part of the run's identity, N is not: a checkpoint, which the first rank writes in the shards' order, is gone on
//! with by any number of ranks. With one shard all of this is the ordinary run.

mod exchange;
#[cfg(any(test, feature = "nccl"))]
mod gpus;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
#[cfg(test)]
mod threads;
mod tree;
mod world;

use bytemuck::{Pod, cast_slice, cast_slice_mut};
use candle_core::Tensor;
use serde_json::{Map, Value};
use understudy_models::{Error, Result};

pub use exchange::Exchange;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub(crate) use tree::TreeSum;
pub use world::{Alone, World};

use crate::checkpoint::Snapshot;
use crate::parameters::{self, Parameters};
use crate::random::{self, Purpose};
use crate::training_batch::{BatchSource, Cost, TrainingBatch};

/// The seed of a shard in a run of that seed; that of the first one is the run's.
pub fn seed(run: u64, shard: usize) -> u64 {
    if shard == 0 { run } else { random::number(run, Purpose::Shard, shard as u64, 0) }
}

/// Refuses what cannot be shared: `batch` rows over so many shards, each in `accumulate` parts, over the ranks of a world.
///
/// # Errors
/// [`Error::Value`] on `--shards`.
pub fn check(shards: usize, batch: usize, accumulate: usize, world: &dyn World) -> Result<()> {
    let refuse = |remedy: String| Err(Error::value("--shards", shards, remedy));
    if !shards.is_power_of_two() {
        return refuse("must be a power of two, such as 4".into());
    }
    if !batch.is_multiple_of(shards.saturating_mul(accumulate)) {
        let parts = if accumulate == 1 { String::new() } else { format!(" × {accumulate}") };
        return refuse(format!("--batch {batch} must be a multiple of {shards}{parts}"));
    }
    let ranks = world.size();
    if !ranks.is_power_of_two() {
        let fewer = ranks.next_power_of_two() / 2;
        return refuse(format!(
            "{ranks} processes were started, and their number must be a power of two; start {fewer}"
        ));
    }
    if ranks > shards {
        return refuse(format!(
            "{ranks} processes were started, and each needs a shard; give --shards {ranks}, or a larger power of two"
        ));
    }
    Ok(())
}

/// The shards of a run, of which this process does some, with the other ranks that do the rest.
pub struct Shards<'a> {
    world: &'a dyn World,
    exchange: Exchange<'a>,
    /// Of the whole run.
    count: usize,
    /// Those of this process, in their order.
    sources: Vec<Box<dyn BatchSource + 'a>>,
}

impl<'a> Shards<'a> {
    /// A run that is not cut up, in one process.
    pub fn one(source: Box<dyn BatchSource + 'a>) -> Self {
        Self {
            world: &Alone,
            exchange: Exchange::through_host(&Alone),
            count: 1,
            sources: vec![source],
        }
    }

    /// A run of `count` shards, as [`check`] takes them; `source` makes those of this process. Gradients go through host memory.
    ///
    /// # Errors
    /// Those of `source`.
    pub fn new<E>(
        world: &'a dyn World,
        count: usize,
        source: impl FnMut(usize) -> Result<Box<dyn BatchSource + 'a>, E>,
    ) -> Result<Self, E> {
        let own = count / world.size();
        let shards = world.rank() * own..(world.rank() + 1) * own;
        let sources = shards.map(source).collect::<Result<_, E>>()?;
        Ok(Self { world, exchange: Exchange::through_host(world), count, sources })
    }

    /// The same run, whose gradients go another way between the ranks of its world.
    #[must_use]
    pub fn exchanging(self, exchange: Exchange<'a>) -> Self {
        Self { exchange, ..self }
    }

    /// How many the run has.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// How many this process does.
    pub(crate) fn own(&self) -> usize {
        self.sources.len()
    }

    fn first_own(&self) -> usize {
        self.world.rank() * self.own()
    }

    /// The ranks.
    pub(crate) fn world(&self) -> &'a dyn World {
        self.world
    }

    /// A shard of this process, whichever where all say the same.
    pub(crate) fn source(&self) -> &dyn BatchSource {
        self.sources[0].as_ref()
    }

    /// What makes the shards those of one run and no other.
    pub(crate) fn identity(&self) -> Map<String, Value> {
        let mut identity = self.source().identity();
        // A run of one is what runs were before there were shards.
        if self.count > 1 {
            identity.insert("shards".into(), self.count.into());
        }
        identity
    }

    /// What all training batches of an iteration take here, as the first one's shard says; what is counted is that of the whole
    /// run.
    ///
    /// # Errors
    /// As [`BatchSource::cost`].
    pub(crate) fn cost(&mut self) -> Result<Cost> {
        let (own, count) = (self.own() as u64, self.count as u64);
        let one = self.sources[0].cost()?;
        Ok(Cost {
            prepare_rows: count * one.prepare_rows,
            prepare_seconds: own as f64 * one.prepare_seconds,
            batch_seconds: own as f64 * one.batch_seconds,
            memory_bytes: own * one.memory_bytes,
            checkpoint_bytes: count * one.checkpoint_bytes,
            disk_bytes: count * one.disk_bytes,
            sample: one.sample,
        })
    }

    /// Does a part of what must be done before the first training batch, as every rank does at the same time, and tells how
    /// much of all is done; nothing once everything is.
    ///
    /// # Errors
    /// As [`BatchSource::prepare`].
    pub(crate) fn prepare(&mut self) -> Result<Option<f64>> {
        let own = self.own() as f64;
        let mut done = None;
        for (number, source) in self.sources.iter_mut().enumerate() {
            if let Some(part) = source.prepare()? {
                done = Some((number as f64 + part) / own);
                break;
            }
        }
        if !self.any(done.is_some()) {
            return Ok(None);
        }
        let all = self.told(&[done.unwrap_or(1.0)]);
        Ok(Some(all.iter().sum::<f64>() / all.len() as f64))
    }

    /// The training batch of one of this process's shards for iteration `step`.
    ///
    /// # Errors
    /// As [`BatchSource::training_batch`].
    pub(crate) fn training_batch(&mut self, own: usize, step: u64) -> Result<TrainingBatch> {
        self.sources[own].training_batch(step)
    }

    /// Network evaluations of the teacher so far, of all shards.
    pub fn teacher_evaluations(&self) -> u64 {
        let own: u64 = self.sources.iter().map(|source| source.teacher_evaluations()).sum();
        self.told(&[own]).iter().sum()
    }

    /// Whether it is so on any rank.
    pub(crate) fn any(&self, here: bool) -> bool {
        self.told(&[u8::from(here)]).contains(&1)
    }

    /// What every rank tells, in their order.
    fn told<T: Pod>(&self, own: &[T]) -> Vec<T> {
        let mut all = vec![T::zeroed(); own.len() * self.world.size()];
        self.world.all_gather(cast_slice(own), cast_slice_mut(&mut all));
        all
    }

    /// The sum of every rank's values, f32 `[length]`, by the tree.
    ///
    /// # Errors
    /// Whatever the ranks' connections or the device say.
    pub(crate) fn sum(&self, values: &Tensor) -> Result<Tensor> {
        Ok(tree::sum(&self.exchange, values)?)
    }

    /// Bytes that this rank has handed over for others so far.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.world.sent_bytes() + self.exchange.sent_bytes()
    }

    /// What the first rank has read; the others have nothing.
    ///
    /// # Errors
    /// [`Error::Format`] for what cannot be passed on.
    pub(crate) fn of_first(&self, own: Option<Snapshot>) -> Result<Option<Snapshot>> {
        if self.world.size() == 1 {
            return Ok(own);
        }
        let mut bytes = match &own {
            Some(snapshot) => snapshot.to_bytes()?,
            None => Vec::new(),
        };
        self.world.broadcast(&mut bytes);
        match own {
            None if !bytes.is_empty() => Snapshot::from_bytes(&bytes).map(Some),
            own => Ok(own),
        }
    }

    /// Gives every rank the first one's weights.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn spread(&self, parameters: &Parameters) -> Result<()> {
        if self.world.size() == 1 {
            return Ok(());
        }
        let weights: Vec<f32> = parameters::joined(parameters)?.to_vec1()?;
        let mut bytes = cast_slice(&weights).to_vec();
        self.world.broadcast(&mut bytes);
        parameters.set(bytemuck::pod_collect_to_vec(&bytes))
    }

    /// Writes the state of all shards into the first rank's snapshot; the others' are of no use afterwards.
    ///
    /// # Errors
    /// As [`BatchSource::save`].
    pub(crate) fn save(&self, snapshot: &mut Snapshot) -> Result<()> {
        if self.count == 1 {
            return self.source().save(snapshot);
        }
        let first = self.world.rank() == 0;
        let mut own = Snapshot::default();
        for (number, source) in self.sources.iter().enumerate() {
            let mut shard = Snapshot::default();
            source.save(&mut shard)?;
            own.put_part(&name(self.first_own() + number), shard);
        }
        if !first {
            self.world.send(&own.to_bytes()?);
            return Ok(());
        }
        snapshot.put_all(own);
        for rank in 1..self.world.size() {
            snapshot.put_all(Snapshot::from_bytes(&self.world.receive(rank))?);
        }
        Ok(())
    }

    /// Tells that the snapshot last saved to is on disk.
    pub(crate) fn keep(&mut self) {
        self.sources.iter_mut().for_each(|source| source.keep());
    }

    /// Reads the state back.
    ///
    /// # Errors
    /// As [`BatchSource::restore`].
    pub(crate) fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        if self.count == 1 {
            return self.sources[0].restore(snapshot);
        }
        let first = self.first_own();
        for (number, source) in self.sources.iter_mut().enumerate() {
            source.restore(&snapshot.part(&name(first + number)))?;
        }
        Ok(())
    }
}

/// What a checkpoint calls a shard.
fn name(shard: usize) -> String {
    format!("shard.{shard}")
}
