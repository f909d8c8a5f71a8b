//! What `distill` asks a text-to-image teacher: prompts, and how far they guide it.

use std::path::PathBuf;

use understudy_distill::{
    guidance::Guidance, prompting::Prompting, prompts::Prompts, run_dir::RunDir, teacher::Teacher,
};
use understudy_models::NetworkConfig;

use super::distill_args::{DistillArgs, Method};

/// Prompts, and the guidance of walks after them.
#[derive(Debug, Clone)]
pub(super) struct PromptArgs {
    prompts: Prompts,
    pub(super) guidance: Guidance,
}

/// Where a run keeps the states of its prompts.
pub(super) const TABLE: &str = "prompts.safetensors";
/// Prompts that channels are judged on.
const PROBE_PROMPTS: usize = 256;

impl PromptArgs {
    /// What the flags say; nothing for a teacher that draws after no text.
    ///
    /// # Errors
    /// A sentence naming the flag, its value and the remedy.
    pub(super) fn new(
        args: &DistillArgs,
        teacher: &Teacher,
        method: Method,
    ) -> Result<Option<Self>, String> {
        let reads_text = teacher.geometry().prompt.is_some();
        let flags = [
            ("--guidance", !args.guidance.is_empty()),
            ("--guidance-scale", args.guidance_scale.is_some()),
        ];
        check_flags(&teacher.name, reads_text, &args.prompts, &flags)?;
        if !reads_text {
            return Ok(None);
        }
        let guidance = guidance(args, teacher)?;
        if let (Some(evaluations), Guidance::Keep { .. }) = (args.evaluations, guidance) {
            return Err(format!(
                "--evaluations {evaluations}: a step of a student of few steps is many guided ones of its teacher, so the \
                 scale is its input; add --guidance distil, such as --guidance distil 1..8"
            ));
        }
        if let (Method::DataFreeBaseline, Guidance::Keep { .. }) = (method, guidance) {
            return Err(
                "--method data-free-baseline: the teacher's samples are guided ones, and teach one answer, not two; add \
                 --guidance distil, such as --guidance distil 1..8"
                    .into(),
            );
        }
        let prompts = Prompts::read(&args.prompts).map_err(|error| error.to_string())?;
        Ok(Some(Self { prompts, guidance }))
    }

    /// Samples of a batch of so many rows.
    ///
    /// # Errors
    /// A sentence naming the flag where there is no such number.
    pub(super) fn samples(&self, batch: usize) -> Result<usize, String> {
        match self.guidance {
            Guidance::Distil { .. } => Ok(batch),
            Guidance::Keep { .. } if batch.is_multiple_of(2) => Ok(batch / 2),
            Guidance::Keep { .. } => Err(format!(
                "--batch {batch}: must be even, since a sample has two rows with --guidance keep"
            )),
        }
    }

    /// What the teacher is told on the walks of a run.
    ///
    /// # Errors
    /// A sentence naming a prompt that is too long, or a file that is another run's.
    pub(super) fn of_run(&self, teacher: &Teacher, run: &RunDir) -> Result<Prompting, String> {
        self.prompting(teacher, self.prompts.clone(), self.guidance, Some(run.path().join(TABLE)))
    }

    /// The same of walks that show which channels matter: both answers count, and some of the prompts are enough.
    ///
    /// # Errors
    /// As [`PromptArgs::of_run`].
    pub(super) fn of_probe(&self, teacher: &Teacher) -> Result<Prompting, String> {
        let scale = match self.guidance {
            Guidance::Keep { scale } => scale,
            Guidance::Distil { least, most } => f64::midpoint(least, most),
        };
        let prompts = self.prompts.thinned(PROBE_PROMPTS);
        self.prompting(teacher, prompts, Guidance::Keep { scale }, None)
    }

    /// Refuses prompts that the teacher's text encoder does not take, before anything is written.
    ///
    /// # Errors
    /// A sentence naming the prompt.
    pub(super) fn check(&self, teacher: &Teacher) -> Result<(), String> {
        let checked = Prompting::check(teacher, &self.prompts, self.guidance);
        checked.map(drop).map_err(|error| error.to_string())
    }

    fn prompting(
        &self,
        teacher: &Teacher,
        prompts: Prompts,
        guidance: Guidance,
        file: Option<PathBuf>,
    ) -> Result<Prompting, String> {
        Prompting::new(teacher, prompts, guidance, file).map_err(|error| error.to_string())
    }

    /// The student's network as it was measured, with an input for the scale where it is to have one.
    pub(super) fn student(&self, config: NetworkConfig) -> NetworkConfig {
        let takes = matches!(self.guidance, Guidance::Distil { .. });
        config.with_guidance(takes).unwrap_or(config)
    }

    /// Refuses a student that cannot be told what it is to learn.
    ///
    /// # Errors
    /// A sentence naming the flag and the field.
    pub(super) fn check_student(&self, config: &NetworkConfig) -> Result<(), String> {
        match (self.guidance, config.geometry().guidance) {
            (Guidance::Distil { .. }, false) => Err(
                "--guidance distil: the student has no input for the scale; set time_cond_proj_dim in its config.json to \
                 256, or use --guidance keep"
                    .into(),
            ),
            (Guidance::Keep { .. }, true) => Err(
                "--guidance keep: the student takes the scale as an input (time_cond_proj_dim); use --guidance distil, or \
                 set it to null in its config.json"
                    .into(),
            ),
            _ => Ok(()),
        }
    }

    /// The range of scales that the student's card tells.
    pub(super) fn range(&self) -> Option<[f64; 2]> {
        match self.guidance {
            Guidance::Keep { .. } => None,
            Guidance::Distil { least, most } => Some([least, most]),
        }
    }
}

/// Refuses prompts, and flags beside them that are given, of a model that reads no text; and one that does without any.
///
/// # Errors
/// A sentence naming the flag, the model and the remedy.
pub(super) fn check_flags(
    model: &str,
    reads_text: bool,
    prompts: &[String],
    beside: &[(&str, bool)],
) -> Result<(), String> {
    let given = [("--prompts", !prompts.is_empty())];
    match given.iter().chain(beside).find(|(_, given)| *given) {
        Some((flag, _)) if !reads_text => {
            Err(format!("{flag}: {model} draws after no text; leave it out"))
        }
        _ if reads_text && prompts.is_empty() => Err(format!(
            "--prompts: {model} draws after text; give a file with one prompt a line, or a template such as --prompts \
             \"{{red|blue}} {{apple|house}}\""
        )),
        _ => Ok(()),
    }
}

/// Refuses what is not made of latents.
///
/// # Errors
/// A sentence naming the flag.
pub(super) fn check_latent(args: &DistillArgs, teacher: &Teacher) -> Result<(), String> {
    match &args.keep_samples {
        Some(folder) if !teacher.model().makes_pixels() => Err(format!(
            "--keep-samples {}: {} makes latents, which are no images; leave the flag out",
            folder.display(),
            teacher.name
        )),
        _ => Ok(()),
    }
}

/// What the flags say of guidance.
fn guidance(args: &DistillArgs, teacher: &Teacher) -> Result<Guidance, String> {
    let words: Vec<&str> = args.guidance.iter().map(String::as_str).collect();
    match words[..] {
        [] | ["keep"] => {
            let usual = teacher.card.defaults.guidance_scale.unwrap_or(1.0);
            Ok(Guidance::Keep { scale: args.guidance_scale.unwrap_or(usual) })
        }
        ["distil", range] => {
            if let Some(scale) = args.guidance_scale {
                return Err(format!(
                    "--guidance-scale {scale}: the scales of --guidance distil are its range's; leave the flag out"
                ));
            }
            let ends = range.split_once("..");
            let ends =
                ends.and_then(|(least, most)| Some((least.parse().ok()?, most.parse().ok()?)));
            let Some((least, most)) = ends else {
                return Err(format!(
                    "--guidance distil {range}: write the least and the largest scale, such as 1..8"
                ));
            };
            Ok(Guidance::Distil { least, most })
        }
        ["distil"] => {
            Err("--guidance distil: say for which scales, such as --guidance distil 1..8".into())
        }
        _ => Err(format!(
            "--guidance {}: use keep, or distil with a range such as distil 1..8",
            words.join(" ")
        )),
    }
}
