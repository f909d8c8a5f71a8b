//! Trajectory distribution matching (Luo et al. 2025, arXiv 2503.06674): the student's samples are to be as the teacher's are,
//! not each where the teacher's walk would have ended. It is what keeps few steps from becoming smooth.
//!
//! ```text
//! student:  noise ─▶ … ─▶ x at t_k ─▶ x̂ ─▶ x at t_{k+1} ─▶ noised again: x_τ     its own steps; a gradient in x̂ alone
//! teacher:  D(x_τ)    critic: F(x_τ)      the difference is the gradient
//! critic:   learns from the same x_τ what the student's samples are
//! ```
//!
//! A text-to-image teacher answers guided, by the scale that the student is told; so the critic is told it, too.
//!
//! What is drawn is a function of the run's seed, the step and the row, so the critic's weights and its optimizer's moments
//! are all the state there is.

mod critic;
mod levels;
mod rollout;

use std::ops::Range;
use std::rc::Rc;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value};
use understudy_models::schedule::{PredictionType, ScheduleConfig};
use understudy_models::{Denoiser, Error, NetworkConfig, Result};

pub use critic::Renoised;
use critic::{Critic, clean, estimate};
use levels::Levels;

use crate::checkpoint::Snapshot;
use crate::estimate::blank;
use crate::guidance::guided;
use crate::objective::{matching, score_identity};
use crate::optimizer::{self, Gradients};
use crate::parameters::Parameters;
use crate::prompting::Prompting;
use crate::teacher::Teacher;
use crate::training_batch::{TextConditions, TrainingBatch};

/// How large the loss that a student learned with before stays beside this one: what keeps the samples on the teacher's walks.
pub const ANCHOR: f64 = 0.25;

/// How much faster the critic learns than the student, which it must follow.
pub const CRITIC_RATE: f64 = 5.0;

/// What the matching is to be.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Steps of the student.
    pub evaluations: usize,
    /// The run's seed.
    pub seed: u64,
    /// The student's optimizer; the critic's is the same, [`CRITIC_RATE`] times as fast.
    pub optimizer: optimizer::Settings,
    /// The type the critic is evaluated in.
    pub dtype: DType,
}

/// The teacher, the critic, and the steps between them.
pub struct Matching<'a> {
    teacher: &'a Teacher,
    /// What a text-to-image teacher is told.
    prompting: Option<Rc<Prompting>>,
    /// The teacher once more, with a gradient to its input, for a student of one step.
    followed: Option<Box<dyn Denoiser>>,
    critic: Critic,
    levels: Levels,
    seed: u64,
    /// Evaluations of the teacher so far, in rows.
    evaluations: u64,
}

/// What a batch of the student's samples gave.
pub struct Matched {
    /// A scalar with a gradient to the student's weights.
    pub loss: Tensor,
    /// What the critic is to learn.
    pub renoised: Renoised,
}

impl<'a> Matching<'a> {
    /// For a student on this schedule, on `device`.
    ///
    /// # Errors
    /// [`Error::Value`] for a student that does not predict v, and for a student of one step where the teacher has a guide.
    pub fn new(
        teacher: &'a Teacher,
        schedule: &ScheduleConfig,
        settings: Settings,
        device: &Device,
    ) -> Result<Self> {
        let predicted = schedule.prediction_type();
        if predicted != PredictionType::Velocity {
            let remedy = "distribution matching takes students that predict v_prediction";
            return Err(Error::value("student's prediction_type", predicted.name(), remedy));
        }
        let Settings { evaluations, seed, optimizer, dtype } = settings;
        if let (1, Some((guide, _))) = (evaluations, teacher.model().guide()) {
            let remedy = "a student of one evaluation follows its teacher's gradient, which a guided one does not have; ask for \
                          2, or take `autoguidance` out of the teacher's card";
            return Err(Error::value(
                "--evaluations",
                format!("1, with {}", guide.path.display()),
                remedy,
            ));
        }
        let rate = CRITIC_RATE * optimizer.learning_rate;
        let optimizer = optimizer::Settings { learning_rate: rate, ..optimizer };
        let followed = match evaluations {
            1 => Some(followed(teacher, dtype, device)?),
            _ => None,
        };
        Ok(Self {
            teacher,
            prompting: None,
            followed,
            critic: Critic::new(teacher, optimizer, dtype, device)?,
            levels: Levels::new(schedule, evaluations)?,
            seed,
            evaluations: 0,
        })
    }

    /// The same for a text-to-image teacher, whose student is told a scale.
    #[must_use]
    pub fn prompted(self, prompting: Option<Rc<Prompting>>) -> Self {
        Self { prompting, ..self }
    }

    /// What a text-to-image student is told of these seeds in iteration `step`. Of the one that is only measured, number 0,
    /// nothing is encoded yet.
    fn text(&self, seeds: &[u64], step: u64) -> Result<Option<TextConditions>> {
        let Some(prompting) = &self.prompting else { return Ok(None) };
        Ok(match step {
            0 => blank(self.critic.geometry(), seeds.len(), self.critic.device())?,
            _ => Some(prompting.conditions(seeds, self.critic.device())?),
        })
    }

    /// The teacher's estimate of the clean images of a batch of iteration `step`, by its guided answer where it draws after
    /// text; f32 `[B, C, H, W]`.
    fn real(&self, network: &dyn Denoiser, batch: &TrainingBatch, step: u64) -> Result<Tensor> {
        let prediction = self.teacher.schedule.prediction_type();
        let (Some(prompting), Some(text)) = (&self.prompting, &batch.text) else {
            return estimate(network, prediction, batch, &self.levels);
        };
        let empty = match step {
            0 => text.prompts.zeros_like()?,
            _ => prompting.empty(batch.rows(), network.device())?,
        };
        let both = batch.ask_both(network, [&text.prompts, &empty])?.answer;
        let rows = batch.rows();
        let less_one = text.guidance.iter().flatten();
        let scales: Vec<f64> = less_one.map(|&scale| f64::from(scale) + 1.0).collect();
        let answer = guided(&both.narrow(0, 0, rows)?, &both.narrow(0, rows, rows)?, &scales)?;
        clean(&answer, prediction, batch, &self.levels)
    }

    /// The loss of the rows `rows` of iteration `step`, drawn for it: by the student's own steps to the beginning of one of
    /// them, and that step.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn matched(
        &self,
        student: &dyn Denoiser,
        step: u64,
        rows: Range<usize>,
    ) -> Result<Matched> {
        let begun = self.begin(student, step, rows)?;
        let end = self.last_step(student, &begun)?;
        let Renoised { batch: noised, weights } = self.renoise(&end, step, &begun)?;
        let held = TrainingBatch { x: noised.x.detach(), ..noised.clone() };
        let levels = &self.levels;
        let loss = match &self.followed {
            Some(followed) => {
                let real = self.real(followed.as_ref(), &noised, step)?;
                score_identity(&end.x0, &real, &self.critic.estimate(&noised, levels)?)?
            }
            None => {
                let real = self.real(self.teacher.network(), &held, step)?;
                matching(&end.x0, &real, &self.critic.estimate(&held, levels)?.detach())?
            }
        };
        Ok(Matched { loss, renoised: Renoised { batch: held, weights } })
    }

    /// The gradients of the critic's loss of `parts` of equal size, and the loss: their means.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn gradients(&self, parts: &[Renoised]) -> Result<(Gradients, f32)> {
        let mut sum: Option<(Gradients, f32)> = None;
        for part in parts {
            let (gradients, loss) = self.critic.gradients(part, &self.levels, parts.len())?;
            match &mut sum {
                None => sum = Some((gradients, loss)),
                Some((all, total)) => {
                    all.add(gradients)?;
                    *total += loss;
                }
            }
        }
        sum.ok_or_else(|| Error::value("accumulate", 0, "must be at least 1"))
    }

    /// Lets the critic learn from `parts`, and gives its loss and its gradients' norm.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn learn(&mut self, parts: &[Renoised]) -> Result<(f32, f64)> {
        let (gradients, loss) = self.gradients(parts)?;
        let norm = self.critic.step(&gradients)?;
        let each = 1 + u64::from(self.prompting.is_some());
        self.evaluations += parts.iter().map(|part| each * part.batch.rows() as u64).sum::<u64>();
        Ok((loss, norm))
    }

    /// The class of a seed, as the teacher's walks have it.
    pub fn label(&self, seed: u64) -> Option<u32> {
        self.teacher.label(seed)
    }

    /// Evaluations of the teacher so far, in rows.
    pub fn teacher_evaluations(&self) -> u64 {
        self.evaluations
    }

    /// What makes another run of it.
    pub fn identity(&self) -> Map<String, Value> {
        [("anchor".into(), ANCHOR.into()), ("critic_rate".into(), CRITIC_RATE.into())]
            .into_iter()
            .collect()
    }

    /// What it adds to a checkpoint.
    pub fn checkpoint_bytes(&self) -> u64 {
        self.critic.bytes()
    }

    /// Refuses a critic that is not worth keeping.
    ///
    /// # Errors
    /// [`Error::Value`] naming the weight and the step.
    pub fn check(&self, step: u64) -> Result<()> {
        self.critic.check(step)
    }

    /// Writes the state.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn save(&self, snapshot: &mut Snapshot) -> Result<()> {
        let mut own = Snapshot::default();
        self.critic.save(&mut own)?;
        own.u64("evaluations", &[self.evaluations]);
        snapshot.put_part(PART, own);
        Ok(())
    }

    /// Reads the state back.
    ///
    /// # Errors
    /// A snapshot that holds something else.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let own = snapshot.part(PART);
        self.critic.restore(&own)?;
        self.evaluations = own.get_u64("evaluations")?.first().copied().unwrap_or_default();
        Ok(())
    }
}

/// The critic's part of a checkpoint.
const PART: &str = "critic";

/// The teacher as a network with gradients.
fn followed(teacher: &Teacher, dtype: DType, device: &Device) -> Result<Box<dyn Denoiser>> {
    teacher.config.load(parameters(teacher, &teacher.config, device)?.tensors(), dtype, device)
}

/// The teacher's weights as variables on a device; those of an input for a scale, where `config` has one more, begin as
/// nothing.
fn parameters(teacher: &Teacher, config: &NetworkConfig, device: &Device) -> Result<Parameters> {
    let mut theirs = teacher.weights()?;
    let take = |(name, shape): (String, Vec<usize>)| match theirs.remove(&name) {
        Some(weight) => Ok((name, weight.to_device(device)?)),
        None => Ok((name, Tensor::zeros(shape, DType::F32, device)?)),
    };
    let weights: Result<Vec<_>> = config.weight_shapes().into_iter().map(take).collect();
    Parameters::new(weights?)
}
