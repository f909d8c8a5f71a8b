//! Noise schedules: how much of the clean sample is left at each training timestep.
//!
//! [`ScheduleConfig`] is a diffusers `scheduler_config.json`; [`ScheduleConfig::schedule`] reads it as
//! one diffusers class would (`Class.from_config(config)`: absent fields take that class's defaults,
//! fields the class does not know are ignored) and gives a [`Schedule`], whose tables are f64.
//!
//! Notation as in Ho et al. 2020 (arXiv 2006.11239): `x_t = sqrt(alpha_bar_t)·x0 +
//! sqrt(1 − alpha_bar_t)·eps`, `alpha_bar_t = Π (1 − beta_i)`; `sigma = sqrt((1 − alpha_bar) /
//! alpha_bar)` is the noise of Karras et al. 2022.

mod bound;
mod fields;
mod json;
mod names;
mod sigmas;
mod tables;
mod timesteps;

use serde_json::{Map, Value};

pub use names::{
    BetaSchedule, Class, FinalSigmas, PredictionType, SolverType, TimestepSpacing, VarianceType,
};

use crate::{Error, Result};
pub use bound::Bound;
pub use sigmas::{Node, SigmaSpacing};

/// A diffusers `scheduler_config.json`: which class it names, and the fields that are there.
///
/// A field that is `None` takes the default of whichever class reads the configuration, so that one
/// file means to each sampler what it means to the diffusers class of that name.
#[derive(Debug, Clone, PartialEq)]
pub struct ScheduleConfig {
    /// The file's name, for error messages (`scheduler/scheduler_config.json`).
    pub file: String,
    /// `_class_name`.
    pub class: Class,
    /// Number of training timesteps, 1 to 100 000.
    pub num_train_timesteps: Option<usize>,
    /// First beta, in (0, 1).
    pub beta_start: Option<f64>,
    /// Last beta, in (0, 1).
    pub beta_end: Option<f64>,
    /// How betas go from first to last.
    pub beta_schedule: Option<BetaSchedule>,
    /// The betas themselves, each in (0, 1), instead of start, end and schedule.
    pub trained_betas: Option<Vec<f64>>,
    /// Whether betas are rescaled so that nothing of the sample is left at the last timestep.
    pub rescale_betas_zero_snr: Option<bool>,
    /// What the network predicts.
    pub prediction_type: Option<PredictionType>,
    /// The variance of ancestral (DDPM) steps.
    pub variance_type: Option<VarianceType>,
    /// Whether the estimate of x0 is clamped.
    pub clip_sample: Option<bool>,
    /// To what magnitude it is clamped, above 0.
    pub clip_sample_range: Option<f64>,
    /// Whether the estimate of x0 is bounded by dynamic thresholding; wins over `clip_sample`.
    pub thresholding: Option<bool>,
    /// The quantile of dynamic thresholding, in [0, 1].
    pub dynamic_thresholding_ratio: Option<f64>,
    /// The largest threshold of dynamic thresholding, above 0.
    pub sample_max_value: Option<f64>,
    /// Which of the training timesteps a shorter trajectory visits.
    pub timestep_spacing: Option<TimestepSpacing>,
    /// Added to the timesteps of `leading` spacing.
    pub steps_offset: Option<usize>,
    /// Whether DDIM's last step ends at `alpha_bar = 1` instead of `alpha_bar_0`.
    pub set_alpha_to_one: Option<bool>,
    /// DPM-Solver++: the form of its second-order step.
    pub solver_type: Option<SolverType>,
    /// DPM-Solver++: whether trajectories below 15 steps end with a first-order step.
    pub lower_order_final: Option<bool>,
    /// DPM-Solver++: whether every trajectory ends with a first-order step.
    pub euler_at_final: Option<bool>,
    /// DPM-Solver++ and Euler: where the last step ends.
    pub final_sigmas_type: Option<FinalSigmas>,
    /// DPM-Solver++: timesteps whose `ln(sqrt(alpha_bar / (1 − alpha_bar)))` is below this are left out.
    pub lambda_min_clipped: Option<f64>,
    /// DPM-Solver++, Euler and Heun: whether sigmas are those of Karras et al. 2022.
    pub use_karras_sigmas: Option<bool>,
    /// Whether they lie evenly in their logarithm.
    pub use_exponential_sigmas: Option<bool>,
    /// Whether they are quantiles of a beta distribution.
    pub use_beta_sigmas: Option<bool>,
    /// The smallest of such sigmas, above 0.
    pub sigma_min: Option<f64>,
    /// The largest of such sigmas, above 0.
    pub sigma_max: Option<f64>,
    /// PNDM: whether it begins without Runge-Kutta steps.
    pub skip_prk_steps: Option<bool>,
    /// LCM and TCD: the number of timesteps that the model was distilled at.
    pub original_inference_steps: Option<usize>,
    /// LCM: what timesteps are multiplied by in the boundary condition, above 0.
    pub timestep_scaling: Option<f64>,
    /// Flow matching: by how much sigmas are shifted towards noise, above 0.
    pub shift: Option<f64>,
    /// Flow matching: the sigma that the last evaluation is stretched to, above 0 and below 1.
    pub shift_terminal: Option<f64>,
    /// Flow matching: whether each step noises its estimate of the clean sample anew.
    pub stochastic_sampling: Option<bool>,
    /// Every other field, as found: those that only matter when they have an unsupported value, and
    /// those nobody knows.
    pub extra: Map<String, Value>,
}

impl ScheduleConfig {
    /// A configuration in which every field has its class's default.
    pub fn new(class: Class) -> Self {
        Self {
            file: json::FILE.to_owned(),
            class,
            num_train_timesteps: None,
            beta_start: None,
            beta_end: None,
            beta_schedule: None,
            trained_betas: None,
            rescale_betas_zero_snr: None,
            prediction_type: None,
            variance_type: None,
            clip_sample: None,
            clip_sample_range: None,
            thresholding: None,
            dynamic_thresholding_ratio: None,
            sample_max_value: None,
            timestep_spacing: None,
            steps_offset: None,
            set_alpha_to_one: None,
            solver_type: None,
            lower_order_final: None,
            euler_at_final: None,
            final_sigmas_type: None,
            lambda_min_clipped: None,
            use_karras_sigmas: None,
            use_exponential_sigmas: None,
            use_beta_sigmas: None,
            sigma_min: None,
            sigma_max: None,
            skip_prk_steps: None,
            original_inference_steps: None,
            timestep_scaling: None,
            shift: None,
            shift_terminal: None,
            stochastic_sampling: None,
            extra: Map::new(),
        }
    }

    /// The number of training timesteps.
    pub fn train_timesteps(&self) -> usize {
        self.num_train_timesteps.unwrap_or(1000)
    }

    /// What the network predicts.
    pub fn prediction_type(&self) -> PredictionType {
        self.prediction_type.unwrap_or(PredictionType::Epsilon)
    }

    /// Whether another's training timesteps mean the same noise.
    ///
    /// # Errors
    /// As [`ScheduleConfig::schedule`].
    pub fn same_noise(&self, other: &Self) -> Result<bool> {
        match [self.class, other.class].map(|class| class == Class::FlowMatchEuler) {
            // A timestep is its sigma.
            [true, true] => Ok(self.train_timesteps() == other.train_timesteps()),
            [false, false] => Ok(self.tables(self.class)?.1 == other.tables(other.class)?.1),
            _ => Ok(false),
        }
    }

    /// The configuration as the diffusers class `class` reads it.
    ///
    /// One deliberate difference: every class takes the `sigmoid` betas here, which diffusers has in
    /// DDPM alone; betas belong to the network, not to the sampler. Another: PNDM begins without Runge-Kutta steps
    /// wherever another class's file says nothing of them, as with every PNDM file that is taken.
    ///
    /// # Errors
    /// [`Error::Value`] naming the file's field when the class would honour a value that is not
    /// supported here, or when the betas make no usable schedule.
    pub fn schedule(&self, class: Class) -> Result<Schedule> {
        self.refuse_unsupported(class)?;
        self.check_class(class)?;
        let honours = |classes: &[Class]| classes.contains(&class);
        let clips = honours(&[Class::Ddpm, Class::Ddim, Class::Heun, Class::Lcm])
            && self.clip_sample.unwrap_or(honours(&[Class::Ddpm, Class::Ddim]));
        let thresholds =
            honours(&[Class::Ddpm, Class::Ddim, Class::DpmSolverMultistep, Class::Lcm])
                && self.thresholding.unwrap_or(false);
        let bound = if thresholds {
            Bound::Threshold {
                ratio: self.dynamic_thresholding_ratio.unwrap_or(0.995),
                max: self.sample_max_value.unwrap_or(1.0),
            }
        } else if clips {
            Bound::Clamp { range: self.clip_sample_range.unwrap_or(1.0) }
        } else {
            Bound::None
        };
        let spacing = match class {
            Class::Ddpm | Class::Ddim | Class::Pndm => TimestepSpacing::Leading,
            _ => TimestepSpacing::Linspace,
        };
        let (betas, alpha_bar) = self.tables(class)?;
        let schedule = Schedule {
            file: self.file.clone(),
            class,
            betas,
            alpha_bar,
            prediction_type: self.prediction_type(),
            variance_type: self.variance_type.unwrap_or(VarianceType::FixedSmall),
            bound,
            timestep_spacing: self.timestep_spacing.unwrap_or(spacing),
            steps_offset: self.steps_offset.unwrap_or(0),
            set_alpha_to_one: self.set_alpha_to_one.unwrap_or(class != Class::Pndm),
            solver_type: self.solver_type.unwrap_or(SolverType::Midpoint),
            lower_order_final: self.lower_order_final.unwrap_or(true),
            euler_at_final: self.euler_at_final.unwrap_or(false),
            final_sigmas_type: self.final_sigmas_type.unwrap_or(FinalSigmas::Zero),
            lambda_min_clipped: self.lambda_min_clipped.unwrap_or(f64::NEG_INFINITY),
            beta_schedule: self.beta_schedule(class),
            sigma_spacing: self.sigma_spacing(class)?,
            sigma_min: self.sigma_min,
            sigma_max: self.sigma_max,
            original_inference_steps: self.original_inference_steps(class)?,
            timestep_scaling: self.timestep_scaling.unwrap_or(10.0),
            shift: self.shift.unwrap_or(1.0),
            shift_terminal: self.shift_terminal,
            stochastic_sampling: self.stochastic_sampling.unwrap_or(false),
        };
        schedule.kept_timesteps()?;
        Ok(schedule)
    }

    /// Refuses a class that makes nothing of what the network predicts, or begins as this crate's does not.
    fn check_class(&self, class: Class) -> Result<()> {
        let flows = |class: Class| class == Class::FlowMatchEuler;
        if flows(self.class) != flows(class) {
            let remedy = if flows(self.class) {
                "its network is trained by flow matching, which other schedulers do not know; use the scheduler flow-euler"
            } else {
                "its network is not trained by flow matching; use another scheduler than flow-euler"
            };
            return Err(self.refuse("_class_name", self.class.name(), remedy));
        }
        if class == Class::Pndm {
            let skips = self.skip_prk_steps.unwrap_or(self.class != Class::Pndm);
            if !skips {
                let value = self.skip_prk_steps.map_or("absent", |_| "false");
                let remedy = "Runge-Kutta steps are not supported; set it to true";
                return Err(self.refuse("skip_prk_steps", value, remedy));
            }
            if self.prediction_type() == PredictionType::Sample {
                let remedy = "PNDM combines predicted noise or velocities; use another scheduler";
                return Err(self.refuse("prediction_type", "sample", remedy));
            }
        }
        Ok(())
    }

    fn sigma_spacing(&self, class: Class) -> Result<SigmaSpacing> {
        if !matches!(
            class,
            Class::DpmSolverMultistep | Class::Euler | Class::Heun | Class::FlowMatchEuler
        ) {
            return Ok(SigmaSpacing::Timesteps);
        }
        let asked = [
            ("use_karras_sigmas", self.use_karras_sigmas, SigmaSpacing::Karras),
            ("use_exponential_sigmas", self.use_exponential_sigmas, SigmaSpacing::Exponential),
            ("use_beta_sigmas", self.use_beta_sigmas, SigmaSpacing::Beta),
        ];
        let mut asked = asked.into_iter().filter(|(_, asked, _)| *asked == Some(true));
        let spacing = asked.next().map_or(SigmaSpacing::Timesteps, |(.., spacing)| spacing);
        match asked.next() {
            None => Ok(spacing),
            Some((field, ..)) => {
                let remedy = "sigmas are spaced in one way; set all but one of use_karras_sigmas, \
                              use_exponential_sigmas and use_beta_sigmas to false";
                Err(self.refuse(field, true, remedy))
            }
        }
    }

    fn original_inference_steps(&self, class: Class) -> Result<usize> {
        let count = self.train_timesteps();
        let Some(original) = self.original_inference_steps else { return Ok(count.min(50)) };
        if original > count && matches!(class, Class::Lcm | Class::Tcd) {
            let remedy = format!("must be at most num_train_timesteps, {count}");
            return Err(self.refuse("original_inference_steps", original, remedy));
        }
        Ok(original)
    }

    /// A complaint about one of the file's fields.
    fn refuse(&self, field: &str, value: impl ToString, remedy: impl Into<String>) -> Error {
        Error::value(format!("{}: {field}", self.file), value, remedy)
    }
}

/// A [`ScheduleConfig`] as one class reads it: nothing is optional any more.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Schedule {
    /// The file's name, for error messages.
    pub file: String,
    /// The class that read the file.
    pub class: Class,
    /// `beta_t` for every training timestep.
    pub betas: Vec<f64>,
    /// `alpha_bar_t` for every training timestep: the share of the sample's variance that is left.
    pub alpha_bar: Vec<f64>,
    /// What the network predicts.
    pub prediction_type: PredictionType,
    /// The variance of ancestral steps.
    pub variance_type: VarianceType,
    /// How the class bounds the estimate of x0.
    pub bound: Bound,
    /// Which training timesteps a shorter trajectory visits.
    pub timestep_spacing: TimestepSpacing,
    /// Added to the timesteps of `leading` spacing.
    pub steps_offset: usize,
    /// Whether DDIM's last step ends at `alpha_bar = 1`.
    pub set_alpha_to_one: bool,
    /// The form of DPM-Solver++'s second-order step.
    pub solver_type: SolverType,
    /// Whether DPM-Solver++ trajectories below 15 steps end with a first-order step.
    pub lower_order_final: bool,
    /// Whether every DPM-Solver++ trajectory does.
    pub euler_at_final: bool,
    /// Where the last step of DPM-Solver++ and Euler ends.
    pub final_sigmas_type: FinalSigmas,
    /// The smallest `ln(sqrt(alpha_bar / (1 − alpha_bar)))` DPM-Solver++ visits.
    pub lambda_min_clipped: f64,
    /// How betas go from first to last.
    pub beta_schedule: BetaSchedule,
    /// How the sigmas of a solver in sigma lie between the largest and the smallest.
    pub sigma_spacing: SigmaSpacing,
    /// The smallest of them, where sigmas do not lie as timesteps do; else the class's.
    pub sigma_min: Option<f64>,
    /// The largest.
    pub sigma_max: Option<f64>,
    /// The number of timesteps that a consistency model was distilled at.
    pub original_inference_steps: usize,
    /// What timesteps are multiplied by in LCM's boundary condition.
    pub timestep_scaling: f64,
    /// By how much flow matching's sigmas are shifted towards noise.
    pub shift: f64,
    /// The sigma of flow matching's last evaluation, where that is stretched.
    pub shift_terminal: Option<f64>,
    /// Whether flow matching noises each estimate of the clean sample anew.
    pub stochastic_sampling: bool,
}

impl Schedule {
    /// The number of training timesteps.
    pub fn train_timesteps(&self) -> usize {
        self.alpha_bar.len()
    }

    /// `sigma_t = sqrt((1 − alpha_bar_t) / alpha_bar_t)`; infinite where `alpha_bar_t` is 0.
    pub fn sigma(&self, timestep: usize) -> Option<f64> {
        self.alpha_bar.get(timestep).map(|&alpha_bar| sigma(alpha_bar))
    }

    /// A complaint about one of the file's fields.
    pub(crate) fn refuse(
        &self,
        field: &str,
        value: impl ToString,
        remedy: impl Into<String>,
    ) -> Error {
        Error::value(format!("{}: {field}", self.file), value, remedy)
    }
}

/// `sigma = sqrt((1 − alpha_bar) / alpha_bar)`.
pub(crate) fn sigma(alpha_bar: f64) -> f64 {
    ((1.0 - alpha_bar) / alpha_bar).sqrt()
}
