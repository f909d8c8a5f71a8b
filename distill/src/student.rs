//! The network that learns: where it comes from, and whether it fits its teacher.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use understudy_models::checkpoint::{ModelFolder, read};
use understudy_models::schedule::{Class, PredictionType, ScheduleConfig, TimestepSpacing};
use understudy_models::{Conditioning, Error, Geometry, NetworkConfig, Result};

use crate::blocks;
use crate::prune;
use crate::teacher::{self, Teacher};
use crate::training_batch::BatchSource;

/// [`Student::initialisation`] of one that begins with its teacher's channels, and with its teacher's blocks.
pub const CHANNELS: &str = "the teacher's most important channels";
/// See [`CHANNELS`].
pub const BLOCKS: &str = "the teacher's blocks";

/// A student before its first training batch.
pub struct Student {
    /// Its architecture.
    pub config: NetworkConfig,
    /// Its noise schedule: the teacher's, but for what it predicts.
    pub schedule: ScheduleConfig,
    /// The weights it begins with.
    pub weights: BTreeMap<String, Tensor>,
    /// Where these come from, for its card.
    pub initialisation: String,
    /// SHA-256 of the weights of the folder that it goes on from.
    pub source: Option<String>,
    /// The folder whose text encoder, tokenizer and autoencoder are its own, too: its teacher's, where there are some.
    pub around: Option<PathBuf>,
}

/// An architecture, with weights where it came with some.
pub struct Candidate {
    /// The architecture.
    pub config: NetworkConfig,
    /// The schedule and the folder of a network that has weights.
    pub trained: Option<ModelFolder>,
}

impl Candidate {
    /// Reads a `config.json` as diffusers writes it, or a model folder, whose weights the student will
    /// begin with.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`], [`Error::Value`] naming the file and the field.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            let folder = ModelFolder::open(path)?;
            return Ok(Self { config: folder.network.clone(), trained: Some(folder) });
        }
        let text = read::text(path, read::DESCRIPTION_LIMIT)?;
        let value = serde_json::from_str(&text)
            .map_err(|error| Error::Format { path: path.into(), problem: error.to_string() })?;
        let config = NetworkConfig::from_json(&value, &path.display().to_string())?;
        Ok(Self { config, trained: None })
    }
}

impl Student {
    /// A student of `teacher` with random weights drawn by `seed`, or those the candidate came with. It
    /// predicts what `prediction` says, else what its folder says, else what its teacher does.
    ///
    /// # Errors
    /// [`Error::Value`] for networks that do not fit each other ([`check`]), and for a folder whose noise
    /// schedule is not the teacher's.
    pub fn new(
        candidate: Candidate,
        teacher: &Teacher,
        prediction: Option<PredictionType>,
        seed: u64,
    ) -> Result<Self> {
        let Candidate { config, trained } = candidate;
        let config = for_prompts_of(teacher, config)?;
        check(teacher, &config)?;
        let mut schedule = teacher.schedule.clone();
        let own = trained.as_ref().map(|folder| folder.schedule.prediction_type());
        if let (Some(own), Some(asked)) = (own, prediction)
            && own != asked
        {
            return Err(Error::value(
                "prediction",
                asked.name(),
                format!("the student's folder was trained for {}; leave the flag out", own.name()),
            ));
        }
        schedule.prediction_type =
            Some(prediction.or(own).unwrap_or(teacher.schedule.prediction_type()));
        let (weights, initialisation, source) = match trained {
            Some(folder) => {
                let alpha_bar = |config: &ScheduleConfig| -> Result<Vec<f64>> {
                    Ok(config.schedule(Class::Ddpm)?.alpha_bar)
                };
                if alpha_bar(&folder.schedule)? != alpha_bar(&teacher.schedule)? {
                    return Err(Error::value(
                        "student",
                        "a folder with another noise schedule than the teacher's",
                        "give the path of its config.json, to begin from random weights",
                    ));
                }
                let name = folder.path.file_name().unwrap_or_default().to_string_lossy();
                let origin = format!("weights of {name}");
                let weights = config.fit(folder.tensors()?)?;
                let source = teacher::hash(&config, &weights)?;
                (weights.into_iter().collect(), origin, Some(source))
            }
            None => (config.initial_weights(seed)?, "random".into(), None),
        };
        let around = (!teacher.model().makes_pixels()).then(|| teacher.folder().to_owned());
        Ok(Self { config, schedule, weights, initialisation, source, around })
    }

    /// The same student, to be sampled in few steps of DDIM: at the last timesteps of equal parts (`trailing`), the last
    /// step down to `alpha_bar = 1`, and x0 not clamped, since a step is to end where the teacher's walk does.
    ///
    /// # Errors
    /// [`Error::Value`] for one that does not predict v: what else there is to predict is next to nothing of the image
    /// at the last timestep, where it begins.
    pub fn of_few_steps(mut self) -> Result<Self> {
        let predicted = self.schedule.prediction_type();
        if predicted != PredictionType::Velocity {
            let remedy = "a student of few steps must predict v_prediction: distil one with --prediction \
                          v_prediction (the default) first, and go on from that";
            return Err(Error::value("student's prediction_type", predicted.name(), remedy));
        }
        let teacher = self.schedule;
        self.schedule = ScheduleConfig {
            num_train_timesteps: teacher.num_train_timesteps,
            beta_start: teacher.beta_start,
            beta_end: teacher.beta_end,
            beta_schedule: teacher.beta_schedule,
            trained_betas: teacher.trained_betas,
            rescale_betas_zero_snr: teacher.rescale_betas_zero_snr,
            prediction_type: Some(predicted),
            clip_sample: Some(false),
            thresholding: Some(false),
            timestep_spacing: Some(TimestepSpacing::Trailing),
            steps_offset: Some(0),
            set_alpha_to_one: Some(true),
            ..ScheduleConfig::new(Class::Ddim)
        };
        // Other samplers read it, where the network tells a variance.
        if self.config.geometry().learned_variance() {
            self.schedule.variance_type = teacher.variance_type;
        }
        Ok(self)
    }

    /// Begins with the blocks that it has in common with its teacher instead ([`blocks::weights`]).
    ///
    /// # Errors
    /// As [`blocks::weights`]; [`Error::Value`] for a student that comes with weights.
    pub fn of_blocks(mut self, teacher: &Teacher) -> Result<Self> {
        self.check_random("blocks")?;
        self.weights = blocks::weights(teacher, &self.config)?;
        self.initialisation = BLOCKS.into();
        Ok(self)
    }

    /// Refuses to begin otherwise with a student that comes with weights.
    fn check_random(&self, init: &str) -> Result<()> {
        if self.initialisation == "random" {
            return Ok(());
        }
        let remedy = "the student's folder has weights; give its config.json, or leave out --init";
        Err(Error::value("init", init, remedy))
    }

    /// Begins with the teacher's most important channels instead ([`prune::weights`]), as they matter on
    /// the samples of `training batches`. They serve a student that predicts something else as well: only what its
    /// last layer does with them is another thing.
    ///
    /// # Errors
    /// As [`prune::weights`]; [`Error::Value`] for a student that comes with weights.
    pub fn pruned(
        mut self,
        teacher: &Teacher,
        batches: &mut dyn BatchSource,
        seed: u64,
    ) -> Result<Self> {
        self.check_random("pruned")?;
        self.weights = prune::weights(teacher, &self.config, batches, seed)?;
        self.initialisation = CHANNELS.into();
        Ok(self)
    }

    /// A network with random weights drawn by `seed` that learns from images alone.
    ///
    /// # Errors
    /// [`Error::Value`] for what training does not honour.
    pub fn untaught(candidate: Candidate, schedule: ScheduleConfig, seed: u64) -> Result<Self> {
        let config = candidate.config;
        refuse_dropout(&config)?;
        let weights = config.initial_weights(seed)?;
        let initialisation = "random".into();
        Ok(Self { config, schedule, weights, initialisation, source: None, around: None })
    }

    /// A trained network that goes on learning, on its own schedule.
    ///
    /// # Errors
    /// [`Error::Value`] for a candidate without weights; [`Error::Format`] and [`Error::Weights`] for
    /// weights that cannot be read.
    pub fn continued(candidate: Candidate) -> Result<Self> {
        let Candidate { config, trained: Some(folder) } = candidate else {
            return Err(Error::value(
                "init",
                "a config.json",
                "name a model folder, which has weights",
            ));
        };
        refuse_dropout(&config)?;
        let name = folder.path.file_name().unwrap_or_default().to_string_lossy();
        let initialisation = format!("weights of {name}");
        let weights = config.fit(folder.tensors()?)?;
        let source = Some(teacher::hash(&config, &weights)?);
        let (schedule, weights) = (folder.schedule, weights.into_iter().collect());
        Ok(Self { config, schedule, weights, initialisation, source, around: None })
    }

    /// The same student with its weights on a device, where it will learn.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn onto(mut self, device: &Device) -> Result<Self> {
        for weight in self.weights.values_mut() {
            *weight = weight.to_device(device)?;
        }
        Ok(self)
    }

    /// Its number of weights.
    pub fn parameters(&self) -> usize {
        self.weights.values().map(Tensor::elem_count).sum()
    }
}

/// The network for prompts as long as the teacher's, of which a `config.json` says nothing.
fn for_prompts_of(teacher: &Teacher, config: NetworkConfig) -> Result<NetworkConfig> {
    let Some(prompt) = teacher.geometry().prompt else { return Ok(config) };
    let geometry = config.geometry();
    // One without a size is refused for that.
    if geometry.height == 0 {
        return Ok(config);
    }
    config.at([geometry.height, geometry.width], prompt.tokens).unwrap_or(Ok(config))
}

/// Refuses what cannot learn from that teacher.
///
/// # Errors
/// [`Error::Value`] naming what differs.
pub fn check(teacher: &Teacher, student: &NetworkConfig) -> Result<()> {
    let (theirs, ours) = (teacher.geometry().clone(), student.geometry());
    let refuse = |what: &str, student: String, teacher: String| {
        Err(Error::value(
            format!("student's {what}"),
            student,
            format!("the teacher's is {teacher}; the two must agree"),
        ))
    };
    let size = |geometry: &Geometry| format!("{}×{}", geometry.width, geometry.height);
    if size(&theirs) != size(&ours) {
        return refuse("image size", size(&ours), size(&theirs));
    }
    if theirs.in_channels != ours.in_channels {
        return refuse("in_channels", ours.in_channels.to_string(), theirs.in_channels.to_string());
    }
    let variance = |geometry: &Geometry| match geometry.learned_variance() {
        true => format!("{} (it learns its variance)", geometry.out_channels),
        false => format!("{} (its variance is fixed)", geometry.out_channels),
    };
    let width = |geometry: &Geometry| match geometry.prompt {
        Some(prompt) => prompt.width.to_string(),
        None => "none (it sees no prompt)".into(),
    };
    if theirs.prompt != ours.prompt {
        return refuse("cross_attention_dim", width(&ours), width(&theirs));
    }
    let [own, other] = [&teacher.config, student].map(NetworkConfig::class_name);
    if !teacher.model().makes_pixels() && own != other {
        return refuse(
            "_class_name",
            other.into(),
            format!("{own}, in a pipeline that takes no other"),
        );
    }
    if theirs.out_channels != ours.out_channels {
        return refuse("out_channels", variance(&ours), variance(&theirs));
    }
    if theirs.conditioning != ours.conditioning {
        let classes = |geometry: &Geometry| match geometry.conditioning {
            Conditioning::None => "none".into(),
            Conditioning::Classes(classes) => classes.to_string(),
            Conditioning::Timestep | Conditioning::Embedding(_) => "a number, not classes".into(),
            Conditioning::TextTime { .. } => "a pooled text, not classes".into(),
        };
        let wanted = match theirs.conditioning {
            Conditioning::Classes(classes) => Some(classes),
            _ => None,
        };
        let remedy = format!(
            "the teacher's are {}; set the student's {}",
            classes(&theirs),
            student.setting_for_classes(wanted)
        );
        return Err(Error::value("student's classes", classes(&ours), remedy));
    }
    refuse_dropout(student)
}

/// Refuses what training would have to honour and does not.
///
/// # Errors
/// [`Error::Value`] on `dropout`.
pub fn refuse_dropout(config: &NetworkConfig) -> Result<()> {
    match config.dropout() {
        0.0 => Ok(()),
        dropout => Err(Error::value(
            "student's dropout",
            dropout,
            "training here drops nothing; set it to 0",
        )),
    }
}
