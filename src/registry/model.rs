//! A model: a network, on one device or several, with all that belongs to it.

use std::{
    fmt,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use candle_core::{DType, Device};
use understudy_models::{
    Denoiser, Error, FixedBatch, Geometry,
    checkpoint::{ModelFolder, card::Card},
    sampler::Kind,
    schedule::ScheduleConfig,
};

use crate::engine::{CostModel, batcher::ModelKey};

/// Steps of a model whose card does not say.
const DEFAULT_STEPS: usize = 50;

/// A model that is ready to serve.
pub struct Model {
    /// Its folder's name (`owner--name` for a Hub model).
    pub id: String,
    /// This load of it; another load of the same folder has another key.
    pub key: ModelKey,
    /// Its model card, with defaults where the folder has none.
    pub card: Card,
    /// Shapes of its network.
    pub geometry: Geometry,
    /// Its noise schedule.
    pub schedule: ScheduleConfig,
    /// Number of weights.
    pub parameters: usize,
    /// `f32`, `bf16` or `f16`.
    pub dtype: &'static str,
    /// Unix seconds when it was loaded.
    pub created: u64,
    /// One for each of the engine's devices, in their order.
    replicas: Vec<Replica>,
}

/// The network on one device.
pub struct Replica {
    network: Box<dyn Denoiser>,
    /// What its evaluations cost; replaced by the warm-up.
    cost: Mutex<CostModel>,
}

impl Model {
    /// Reads a model folder, once for each device. What it costs is not known yet: it takes one row at a
    /// time until it is warmed up, or told.
    ///
    /// # Errors
    /// As [`ModelFolder::open`] and [`ModelFolder::load`]; [`Error::Value`] for no device.
    pub fn load(
        folder: &Path,
        id: String,
        key: u64,
        dtype: DType,
        devices: &[Device],
    ) -> understudy_models::Result<Self> {
        let Some((first, others)) = devices.split_first() else {
            return Err(Error::value("device", "none", "name at least one"));
        };
        let read = |device| ModelFolder::open(folder)?.load(dtype, device);
        let loaded = read(first)?;
        let mut replicas = vec![Replica::new(loaded.network)];
        for device in others {
            replicas.push(Replica::new(read(device)?.network));
        }
        let network = replicas[0].network();
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Self {
            id,
            key: ModelKey(key),
            card: loaded.card,
            geometry: network.geometry().clone(),
            schedule: loaded.schedule,
            parameters: network.parameters(),
            dtype: dtype.as_str(),
            created: since_epoch.map_or(0, |since| since.as_secs()),
            replicas,
        })
    }

    /// The same model, whose evaluations on GPUs all have `rows` rows, so that the bits of an answer do not
    /// depend on the size of the batch. On a CPU they never do, and nothing is padded.
    #[must_use]
    pub fn padded(mut self, rows: usize) -> Self {
        let pad = |replica: Replica| {
            if replica.network.device().is_cpu() {
                return replica;
            }
            Replica { network: Box::new(FixedBatch::new(replica.network, rows)), ..replica }
        };
        self.replicas = self.replicas.into_iter().map(pad).collect();
        self
    }

    /// The network on the engine's device of that number; every model has one on each.
    pub fn on(&self, device: usize) -> &Replica {
        &self.replicas[device]
    }

    /// Steps of who does not say: the card's, else 50, or all the schedule has where those are fewer.
    pub fn default_steps(&self) -> usize {
        let steps = self.card.defaults.num_inference_steps.unwrap_or(DEFAULT_STEPS);
        steps.min(self.schedule.train_timesteps())
    }

    /// The sampler of who does not say: the card's, else the one that fits the schedule's class.
    pub fn default_scheduler(&self) -> Kind {
        // A card that names no sampler there is has been refused.
        let named = self.card.defaults.scheduler.as_ref().and_then(|name| name.parse().ok());
        named.unwrap_or_else(|| Kind::for_scheduler_class(&self.schedule))
    }
}

impl Replica {
    fn new(network: Box<dyn Denoiser>) -> Self {
        Self { network, cost: Mutex::new(CostModel::new(vec![(1, 0.0)], None)) }
    }

    /// Most rows an evaluation has.
    pub fn max_rows(&self) -> usize {
        self.cost().max_rows()
    }

    /// Predicted seconds of one evaluation of so many rows.
    pub fn evaluation_seconds(&self, rows: usize) -> f64 {
        self.cost().seconds(rows)
    }

    /// For the thread of its device alone.
    pub(crate) fn network(&self) -> &dyn Denoiser {
        self.network.as_ref()
    }

    pub(crate) fn observe(&self, rows: usize, seconds: f64) {
        self.cost().observe(rows, seconds);
    }

    pub(crate) fn set_cost(&self, cost: CostModel) {
        *self.cost() = cost;
    }

    /// As [`CostModel::shrink`]; gives the new limit.
    pub(crate) fn shrink(&self, rows: usize) -> usize {
        let mut cost = self.cost();
        cost.shrink(rows);
        cost.max_rows()
    }

    fn cost(&self) -> MutexGuard<'_, CostModel> {
        self.cost.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("id", &self.id)
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
impl Model {
    /// A model around one network per device, costing `seconds` per evaluation however many rows it has.
    pub(crate) fn for_test(
        networks: Vec<Box<dyn Denoiser>>,
        schedule: ScheduleConfig,
        card: Card,
        key: u64,
        max_rows: usize,
        seconds: f64,
    ) -> std::sync::Arc<Self> {
        let points = vec![(1, seconds), (max_rows.max(2), seconds)];
        let replica = |network| {
            let replica = Replica::new(network);
            replica.set_cost(CostModel::new(points.clone(), Some(max_rows)));
            replica
        };
        let replicas: Vec<Replica> = networks.into_iter().map(replica).collect();
        std::sync::Arc::new(Self {
            id: format!("model-{key}"),
            key: ModelKey(key),
            card,
            geometry: replicas[0].network().geometry().clone(),
            schedule,
            parameters: replicas[0].network().parameters(),
            dtype: "f32",
            created: 0,
            replicas,
        })
    }

    /// The model in a folder, on the CPU.
    pub(crate) fn from_folder_for_test(folder: &Path) -> std::sync::Arc<Self> {
        let model = Self::load(folder, "model".into(), 0, DType::F32, &[Device::Cpu]);
        std::sync::Arc::new(model.expect("a model folder"))
    }
}
