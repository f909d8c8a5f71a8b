//! Reading and writing `scheduler_config.json`.

use serde_json::{Value, json};

use super::fields::{CLOSED_UNIT, Fields, OPEN_UNIT, POSITIVE, list};
use super::{Class, ScheduleConfig, SolverType};
use crate::{Error, Result};

/// Where a model folder keeps its scheduler configuration.
pub(super) const FILE: &str = "scheduler/scheduler_config.json";

/// More training timesteps than any network has: a larger number is a mistake, not a table to fill.
const MOST_TIMESTEPS: u64 = 100_000;

/// Fields that some class honours and that are supported at one value (or none of them true) only:
/// name, classes that honour it, the values that change nothing, the remedy.
const ONE_VALUE: &[(&str, &[Class], &[&str], &str)] = {
    use Class::{DpmSolverMultistep as Dpm, Euler, FlowMatchEuler as Flow};
    &[
        ("use_lu_lambdas", &[Dpm], &[], "Lu's lambdas are not supported; set it to false"),
        ("use_flow_sigmas", &[Dpm], &[], "flow matching is not supported; set it to false"),
        ("algorithm_type", &[Dpm], &["dpmsolver++", "deis"], "only dpmsolver++ is supported"),
        ("solver_order", &[Dpm], &["2"], "only order 2 is supported"),
        (
            "use_dynamic_shifting",
            &[Flow],
            &[],
            "a shift that depends on the image's size is not supported; set it to false, and shift to a number",
        ),
        ("invert_sigmas", &[Flow], &[], "sigmas that rise are not supported; set it to false"),
        ("interpolation_type", &[Euler], &["linear"], "only linear is supported"),
        ("timestep_type", &[Euler], &["discrete"], "only discrete is supported"),
    ]
};

/// Fields that some class knows and that change nothing here: they qualify what is refused above.
const WITHOUT_EFFECT: &[&str] = &[
    "flow_shift",
    "time_shift_type",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
];

impl ScheduleConfig {
    /// Reads a `scheduler_config.json`. `file` is its name in error messages.
    ///
    /// Fields listed in `_use_default_values` count as absent, as in diffusers; fields that no
    /// supported class knows are kept, and warned about.
    ///
    /// # Errors
    /// [`Error::Value`] naming file and field: an unknown class or word, a value of the wrong type or
    /// out of range, and whatever the file's own class would honour and this crate cannot. What only
    /// another class would honour is refused when a trajectory asks for that class.
    pub fn from_json(value: &Value, file: &str) -> Result<Self> {
        let Value::Object(object) = value else {
            return Err(Error::value(file, kind_of(value), "must be a JSON object"));
        };
        let mut object = object.clone();
        if let Some(defaulted) = object.remove("_use_default_values") {
            let names = defaulted.as_array().into_iter().flatten().filter_map(Value::as_str);
            names.for_each(|name| drop(object.remove(name)));
        }
        // As diffusers does with the names of other classes' solvers.
        if let Some(Value::String(name)) = object.get_mut("solver_type")
            && matches!(name.as_str(), "logrho" | "bh1" | "bh2")
        {
            *name = SolverType::Midpoint.name().to_owned();
        }
        let mut fields = Fields { object, file };
        let Some(class) = fields.word("_class_name")? else {
            let remedy = format!("name one of {}", list::<Class>());
            return Err(Error::value(format!("{file}: _class_name"), "absent", remedy));
        };
        let config = Self {
            file: file.to_owned(),
            class,
            num_train_timesteps: fields.whole("num_train_timesteps", 1, MOST_TIMESTEPS)?,
            beta_start: fields.number("beta_start", OPEN_UNIT)?,
            beta_end: fields.number("beta_end", OPEN_UNIT)?,
            beta_schedule: fields.word("beta_schedule")?,
            trained_betas: fields.betas("trained_betas")?,
            rescale_betas_zero_snr: fields.flag("rescale_betas_zero_snr")?,
            prediction_type: fields.word("prediction_type")?,
            // DPMSolverMultistepScheduler writes null for "the network tells none".
            variance_type: fields.nullable("variance_type").word("variance_type")?,
            clip_sample: fields.flag("clip_sample")?,
            clip_sample_range: fields
                .nullable("clip_sample_range")
                .number("clip_sample_range", POSITIVE)?,
            thresholding: fields.flag("thresholding")?,
            dynamic_thresholding_ratio: fields
                .nullable("dynamic_thresholding_ratio")
                .number("dynamic_thresholding_ratio", CLOSED_UNIT)?,
            sample_max_value: fields
                .nullable("sample_max_value")
                .number("sample_max_value", POSITIVE)?,
            timestep_spacing: fields.word("timestep_spacing")?,
            steps_offset: fields.whole("steps_offset", 0, MOST_TIMESTEPS)?,
            set_alpha_to_one: fields.flag("set_alpha_to_one")?,
            solver_type: fields.word("solver_type")?,
            lower_order_final: fields.flag("lower_order_final")?,
            euler_at_final: fields.flag("euler_at_final")?,
            final_sigmas_type: fields.word("final_sigmas_type")?,
            lambda_min_clipped: fields.lambda("lambda_min_clipped")?,
            use_karras_sigmas: fields.flag("use_karras_sigmas")?,
            use_exponential_sigmas: fields.flag("use_exponential_sigmas")?,
            use_beta_sigmas: fields.flag("use_beta_sigmas")?,
            sigma_min: fields.nullable("sigma_min").number("sigma_min", POSITIVE)?,
            sigma_max: fields.nullable("sigma_max").number("sigma_max", POSITIVE)?,
            skip_prk_steps: fields.flag("skip_prk_steps")?,
            original_inference_steps: fields.whole(
                "original_inference_steps",
                1,
                MOST_TIMESTEPS,
            )?,
            timestep_scaling: fields.number("timestep_scaling", POSITIVE)?,
            shift: fields.number("shift", POSITIVE)?,
            shift_terminal: fields
                .nullable("shift_terminal")
                .number("shift_terminal", OPEN_UNIT)?,
            stochastic_sampling: fields.flag("stochastic_sampling")?,
            extra: fields.object,
        };
        config.check_lengths()?;
        config.warn_unknown();
        config.schedule(class)?;
        Ok(config)
    }

    /// Reads the text of a `scheduler_config.json`.
    ///
    /// Python writes `-Infinity` (diffusers does, for `lambda_min_clipped`), which is not JSON; it is
    /// understood here.
    ///
    /// # Errors
    /// [`Error::Format`] for text that is not JSON, else as [`ScheduleConfig::from_json`].
    pub fn from_text(text: &str, file: &str) -> Result<Self> {
        let value = serde_json::from_str(&quote_constants(text))
            .map_err(|error| Error::Format { path: file.into(), problem: error.to_string() })?;
        Self::from_json(&value, file)
    }

    /// The configuration as diffusers reads it: what was there, and nothing else.
    pub fn to_json(&self) -> Value {
        let mut object = self.extra.clone();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                object.insert(name.to_owned(), value);
            }
        };
        put("_class_name", Some(json!(self.class.name())));
        put("num_train_timesteps", self.num_train_timesteps.map(Value::from));
        put("beta_start", self.beta_start.map(Value::from));
        put("beta_end", self.beta_end.map(Value::from));
        put("beta_schedule", self.beta_schedule.map(|word| word.name().into()));
        put("trained_betas", self.trained_betas.clone().map(Value::from));
        put("rescale_betas_zero_snr", self.rescale_betas_zero_snr.map(Value::from));
        put("prediction_type", self.prediction_type.map(|word| word.name().into()));
        put("variance_type", self.variance_type.map(|word| word.name().into()));
        put("clip_sample", self.clip_sample.map(Value::from));
        put("clip_sample_range", self.clip_sample_range.map(Value::from));
        put("thresholding", self.thresholding.map(Value::from));
        put("dynamic_thresholding_ratio", self.dynamic_thresholding_ratio.map(Value::from));
        put("sample_max_value", self.sample_max_value.map(Value::from));
        put("timestep_spacing", self.timestep_spacing.map(|word| word.name().into()));
        put("steps_offset", self.steps_offset.map(Value::from));
        put("set_alpha_to_one", self.set_alpha_to_one.map(Value::from));
        put("solver_type", self.solver_type.map(|word| word.name().into()));
        put("lower_order_final", self.lower_order_final.map(Value::from));
        put("euler_at_final", self.euler_at_final.map(Value::from));
        put("final_sigmas_type", self.final_sigmas_type.map(|word| word.name().into()));
        put("lambda_min_clipped", self.lambda_min_clipped.map(Value::from));
        put("use_karras_sigmas", self.use_karras_sigmas.map(Value::from));
        put("use_exponential_sigmas", self.use_exponential_sigmas.map(Value::from));
        put("use_beta_sigmas", self.use_beta_sigmas.map(Value::from));
        put("sigma_min", self.sigma_min.map(Value::from));
        put("sigma_max", self.sigma_max.map(Value::from));
        put("skip_prk_steps", self.skip_prk_steps.map(Value::from));
        put("original_inference_steps", self.original_inference_steps.map(Value::from));
        put("timestep_scaling", self.timestep_scaling.map(Value::from));
        put("shift", self.shift.map(Value::from));
        put("shift_terminal", self.shift_terminal.map(Value::from));
        put("stochastic_sampling", self.stochastic_sampling.map(Value::from));
        Value::Object(object)
    }

    /// Refuses what `class` would honour and this crate cannot.
    pub(super) fn refuse_unsupported(&self, class: Class) -> Result<()> {
        for (field, classes, neutral, remedy) in ONE_VALUE {
            let Some(value) = self.extra.get(*field) else {
                continue;
            };
            let harmless = match value {
                Value::Null | Value::Bool(false) => neutral.is_empty(),
                Value::String(word) => neutral.contains(&word.as_str()),
                other => neutral.contains(&other.to_string().as_str()),
            };
            if classes.contains(&class) && !harmless {
                return Err(self.refuse(field, value, *remedy));
            }
        }
        Ok(())
    }

    fn check_lengths(&self) -> Result<()> {
        match &self.trained_betas {
            Some(betas) if betas.len() != self.train_timesteps() => Err(self.refuse(
                "trained_betas",
                format!("a list of {}", betas.len()),
                format!(
                    "must be as long as num_train_timesteps ({}); mend whichever is wrong",
                    self.train_timesteps()
                ),
            )),
            _ => Ok(()),
        }
    }

    fn warn_unknown(&self) {
        let known = |name: &str| {
            name.starts_with('_')
                || WITHOUT_EFFECT.contains(&name)
                || ONE_VALUE.iter().any(|(field, ..)| *field == name)
        };
        for name in self.extra.keys().filter(|name| !known(name)) {
            tracing::warn!(file = %self.file, field = %name, "no scheduler knows this field; ignored");
        }
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Puts quotes around Python's `NaN`, `Infinity` and `-Infinity` where they stand outside strings.
fn quote_constants(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let constant = ["-Infinity", "Infinity", "NaN"].into_iter().find(|c| rest.starts_with(c));
        let length = match (next, constant) {
            ('"', _) => string_length(rest),
            (_, Some(constant)) => {
                quoted.push('"');
                quoted.push_str(constant);
                quoted.push('"');
                rest = &rest[constant.len()..];
                continue;
            }
            _ => next.len_utf8(),
        };
        quoted.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    quoted
}

/// Bytes of the string literal that `text` starts with; all of it where the literal does not end.
fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (i, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return i + 1,
            _ => {}
        }
    }
    text.len()
}
