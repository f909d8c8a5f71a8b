//! The noise schedule that a checkpoint was trained with.

use serde_json::{Value, json};

use crate::Result;
use crate::fields::Fields;

/// Betas, and what the network says about the sample.
pub(super) struct Schedule {
    steps: usize,
    cosine: bool,
    /// How many steps of the schedule make one of the time that the network is given.
    stride: usize,
    predict_xstart: bool,
    sigma_small: bool,
}

impl Schedule {
    /// From the flags.
    pub(super) fn new(flags: &Fields) -> Result<Self> {
        let steps = flags.count("diffusion_steps", 1000, 1 << 20)?;
        let cosine = match flags.text("noise_schedule", Some("linear"))? {
            Some("linear") => false,
            Some("cosine") => true,
            _ => return Err(flags.refuse("noise_schedule", "must be linear or cosine")),
        };
        if steps != 1000 && flags.get("rescale_timesteps").is_none() {
            let remedy = "must be given where diffusion_steps is not 1000: true is the default of \
                          improved-diffusion, false that of guided-diffusion";
            return Err(flags.refuse("rescale_timesteps", remedy));
        }
        // A network that was told the time in thousandths is imported with the schedule's every
        // stride-th step: there its time is a whole number, and the schedule exact.
        let stride = if flags.flag("rescale_timesteps", false)? {
            if !steps.is_multiple_of(1000) {
                let remedy = "with rescale_timesteps it must be a multiple of 1000";
                return Err(flags.refuse("diffusion_steps", remedy));
            }
            steps / 1000
        } else {
            1
        };
        let schedule = Self {
            steps,
            cosine,
            stride,
            predict_xstart: flags.flag("predict_xstart", false)?,
            sigma_small: flags.flag("sigma_small", false)?,
        };
        if !cosine && schedule.scale() * 0.02 >= 1.0 {
            let remedy = "a linear schedule needs at least 21 steps to keep beta below 1";
            return Err(flags.refuse("diffusion_steps", remedy));
        }
        Ok(schedule)
    }

    /// As diffusers' `DDPMScheduler` describes it; `learn_sigma` is the network's.
    pub(super) fn to_json(&self, learn_sigma: bool) -> Value {
        let mut scheduler = json!({
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.steps / self.stride,
            "beta_schedule": if self.cosine { "squaredcos_cap_v2" } else { "linear" },
            "beta_start": self.scale() * 1e-4,
            "beta_end": self.scale() * 0.02,
            "prediction_type": if self.predict_xstart { "sample" } else { "epsilon" },
            "variance_type": match (learn_sigma, self.sigma_small) {
                (true, _) => "learned_range",
                (false, true) => "fixed_small",
                (false, false) => "fixed_large",
            },
            "clip_sample": true,
            "clip_sample_range": 1.0,
            "timestep_spacing": "leading",
            "steps_offset": 0,
        });
        if self.stride > 1 {
            scheduler["trained_betas"] = json!(self.strided_betas());
        }
        scheduler
    }

    /// A linear schedule of fewer steps takes larger ones.
    fn scale(&self) -> f64 {
        1000.0 / self.steps as f64
    }

    /// The betas of every `stride`-th step of the schedule (Nichol & Dhariwal 2021, §4).
    fn strided_betas(&self) -> Vec<f64> {
        let mut betas = Vec::with_capacity(self.steps / self.stride);
        let (mut alpha_bar, mut last) = (1.0, 1.0);
        for step in 0..self.steps {
            alpha_bar *= 1.0 - self.beta(step);
            if step.is_multiple_of(self.stride) {
                betas.push(1.0 - alpha_bar / last);
                last = alpha_bar;
            }
        }
        betas
    }

    fn beta(&self, step: usize) -> f64 {
        let steps = self.steps as f64;
        if self.cosine {
            let alpha_bar = |t: f64| {
                libm::pow(libm::cos((t / steps + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2), 2.0)
            };
            (1.0 - alpha_bar(step as f64 + 1.0) / alpha_bar(step as f64)).min(0.999)
        } else {
            self.scale() * (1e-4 + (0.02 - 1e-4) * step as f64 / (steps - 1.0))
        }
    }
}
