//! What a run is made of.

use candle_core::DType;
use serde_json::{Map, Value};
use understudy_models::checkpoint::card::Card;

use crate::matching::Matching;
use crate::objective::Objective;
use crate::optimizer;
use crate::ranks::Shards;
use crate::run_dir::RunDir;
use crate::student::Student;

/// How long, how often.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Student steps in all.
    pub steps: u64,
    /// Parts a shard's training batch is cut into, whose gradients are averaged: memory for one part is enough.
    pub accumulate: usize,
    /// The optimizer.
    pub optimizer: optimizer::Settings,
    /// The limit of the running average's decay, below 1.
    pub average: f64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Steps between grids of samples; 0 for none.
    pub sample_every: u64,
    /// The type the student is evaluated in, and its gradients; its weights are f32 in any case.
    pub dtype: DType,
}

/// Everything a run is made of.
pub struct Task<'a> {
    /// The run's folder, in the one that becomes the model. The first rank alone has it, and writes.
    pub run: Option<RunDir>,
    /// What makes this run another one than its neighbour, beside what the parts of the task say of
    /// themselves: a resumed run must find the same.
    pub identity: Map<String, Value>,
    /// Where training batches come from, and who shares the run.
    pub shards: Shards<'a>,
    /// What answers are held against.
    pub objective: Objective,
    /// What matches the student's samples to the teacher's besides, if anything does.
    pub matching: Option<Matching<'a>>,
    /// Who learns, on the device its weights are on.
    pub student: Student,
    /// How long, how often.
    pub settings: Settings,
    /// The model's card; the loop adds the identity, and what was counted and measured, to its recipe.
    pub card: Card,
}
