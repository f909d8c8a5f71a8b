//! What a run left behind: its losses, its grids of samples, its command.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use understudy_distill::run_dir::RUN_DIR;
use understudy_models::checkpoint::read;

/// A line of the log.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Point {
    pub(crate) step: u64,
    pub(crate) simple: f64,
    pub(crate) seconds: f64,
}

/// A finished run's record; of a folder that was not trained here it is empty.
#[derive(Debug, Default)]
pub(crate) struct Training {
    /// Losses, by step.
    pub(crate) log: Vec<Point>,
    /// Grids of samples: steps, and the picture.
    pub(crate) grids: Vec<(u64, PathBuf)>,
    /// The command that started it, as it was typed.
    pub(crate) command: Option<String>,
}

/// The file in the run's folder that holds its command.
pub(crate) const COMMAND: &str = "command.txt";

impl Training {
    /// Reads the record of a model folder.
    pub(crate) fn read(folder: &Path) -> Self {
        let run = folder.join(RUN_DIR);
        let log = fs::read_to_string(run.join("log.jsonl")).unwrap_or_default();
        let entries = fs::read_dir(&run).into_iter().flatten().flatten();
        let mut grids: Vec<(u64, PathBuf)> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let step = name.strip_prefix("samples-")?.strip_suffix(".png")?;
                Some((step.parse().ok()?, entry.path()))
            })
            .collect();
        grids.sort();
        Self {
            log: log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect(),
            grids,
            command: read::text(&run.join(COMMAND), read::DESCRIPTION_LIMIT).ok(),
        }
    }

    /// Losses averaged over equal parts of the run, at most `points`: single ones are noisy.
    pub(crate) fn losses(&self, points: usize) -> Vec<(f64, f64)> {
        let part = self.log.len().div_ceil(points).max(1);
        let middle = |part: &[Point]| {
            let mean = part.iter().map(|point| point.simple).sum::<f64>() / part.len() as f64;
            (part[part.len() / 2].step as f64, mean)
        };
        self.log.chunks(part).map(middle).collect()
    }
}
