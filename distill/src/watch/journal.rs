//! What a run writes down: a JSON line per step, and the same for TensorBoard.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;
use understudy_models::checkpoint::write_atomically;
use understudy_models::{Error, Result};

use super::likeness::Likeness;
use super::tensorboard::EventFile;

/// The figures of a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// Counted from 1.
    pub step: u64,
    /// What was minimised.
    pub loss: f32,
    /// `L_simple`.
    pub simple: f32,
    /// `L_vlb` in bits per dimension, for networks that learn their variance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlb: Option<f32>,
    /// What matches the student's samples to the teacher's, where something does: no measure of how far it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matching: Option<f32>,
    /// The critic's own error, in the clean image, weighted; one that rises tells of a critic that cannot follow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub critic: Option<f32>,
    /// How like the student's images are to the teacher's, at the steps at which there is a grid of samples.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub likeness: Option<Likeness>,
    /// Norm of the gradients before clipping.
    pub gradient_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Evaluations of the teacher so far, in rows.
    pub teacher_evaluations: u64,
    /// Bytes that the first rank has sent to others in this step, where there are others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
    /// Rows a second, of late.
    pub images_per_second: f64,
    /// Time spent so far, in all sessions.
    pub seconds: f64,
}

/// The run's log: `log.jsonl`, and a TensorBoard event file per session.
pub struct Journal {
    path: PathBuf,
    lines: File,
    events: EventFile,
}

/// Steps between TensorBoard's points.
const EVENT_EVERY: u64 = 10;

impl Journal {
    /// Opens the log of a run that has done `step` steps. Lines of later ones, from a session that ended
    /// before its next checkpoint, are taken out: those steps will be done again.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn open(folder: &Path, step: u64) -> Result<Self> {
        let path = folder.join("log.jsonl");
        let io = |source| Error::Io { path: path.clone(), source };
        fs::create_dir_all(folder).map_err(io)?;
        if path.exists() {
            let mut kept = Vec::new();
            for line in BufReader::new(File::open(&path).map_err(io)?).split(b'\n') {
                let line = line.map_err(io)?;
                let number =
                    serde_json::from_slice(&line).ok().and_then(|v: Value| v["step"].as_u64());
                if number.is_some_and(|number| number <= step) {
                    kept.extend_from_slice(&line);
                    kept.push(b'\n');
                }
            }
            write_atomically(&path, &kept)?;
        }
        let lines = OpenOptions::new().append(true).create(true).open(&path).map_err(io)?;
        let events = EventFile::create(folder, step)?;
        Ok(Self { path, lines, events })
    }

    /// Writes a step down.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let mut line = serde_json::to_vec(record).map_err(|error| io(error.into()))?;
        line.push(b'\n');
        self.lines.write_all(&line).map_err(io)?;
        if record.step.is_multiple_of(EVENT_EVERY) || record.step == 1 {
            let mut scalars = vec![
                ("loss/total", record.loss),
                ("loss/simple", record.simple),
                ("gradient_norm", record.gradient_norm as f32),
                ("learning_rate", record.learning_rate as f32),
                ("images_per_second", record.images_per_second as f32),
            ];
            scalars.extend(record.vlb.map(|vlb| ("loss/vlb", vlb)));
            scalars.extend(record.matching.map(|loss| ("loss/matching", loss)));
            scalars.extend(record.critic.map(|loss| ("loss/critic", loss)));
            if let Some(likeness) = &record.likeness {
                scalars.push(("likeness/precision", likeness.precision as f32));
                scalars.push(("likeness/recall", likeness.recall as f32));
            }
            self.events.scalars(record.step, &scalars)?;
        }
        Ok(())
    }

    /// Brings everything to disk.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn sync(&mut self) -> Result<()> {
        self.lines.sync_all().map_err(|source| Error::Io { path: self.path.clone(), source })?;
        self.events.sync()
    }
}
