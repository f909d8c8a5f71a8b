//! `--student 0.5x`: the widest network like the teacher that takes half its time, as measured here.

use understudy_models::{Denoiser, Error, NetworkConfig, Result};

use crate::estimate::timed_evaluation;
use crate::teacher::Teacher;

/// Samples of an evaluation that is timed: as a server's batches are.
const ROWS: usize = 8;
/// Rounds, in each of which teacher and student take turns.
const ROUNDS: usize = 9;
/// Seconds of a turn, at least: many times as long as a scheduler lets a program run before another's turn, so that what
/// others take is the same part of each.
const TURN: f64 = 0.03;
/// Widths that are tried, as parts of the teacher's.
const PARTS: usize = 64;

/// A network of the teacher's shape and a part of its widths.
#[derive(Debug, Clone)]
pub struct Shrunk {
    /// The network.
    pub config: NetworkConfig,
    /// Its share of the teacher's time per evaluation, as measured.
    pub share: f64,
}

/// Finds the widest network of the teacher's shape whose evaluation takes at most `share` of the
/// teacher's. Wider networks are not always slower, so the time of each is measured, not worked out.
///
/// # Errors
/// [`Error::Value`] for a share that is not within 0 and 1, and where even the narrowest takes longer.
pub fn shrink(teacher: &Teacher, share: f64) -> Result<Shrunk> {
    if !(share > 0.0 && share < 1.0) {
        return Err(Error::value("student", format!("{share}x"), "use a part of 1, such as 0.5x"));
    }
    let mut candidates: Vec<NetworkConfig> = Vec::new();
    for part in 1..PARTS {
        let scaled = teacher.config.scaled(part as f64 / PARTS as f64);
        candidates.extend(scaled.filter(|scaled| candidates.last() != Some(scaled)));
    }
    // From below: the first that is too slow ends the search, and the slow ones are never timed.
    let mut best: Option<Shrunk> = None;
    let mut fastest = f64::INFINITY;
    for config in candidates {
        let measured = measure(teacher, &config)?;
        fastest = fastest.min(measured);
        if measured <= share {
            best = Some(Shrunk { config, share: measured });
        } else if best.is_some() {
            break;
        }
    }
    best.ok_or_else(|| {
        Error::value(
            "student",
            format!("{share}x"),
            format!(
                "the narrowest network of the teacher's shape takes {fastest:.2} of its time; write a \
                 config.json with fewer blocks or layers"
            ),
        )
    })
}

/// The median of the rounds' ratios of the two networks' times. An evaluation that is longer than a scheduler's slice is
/// interrupted every time where other programs run, and a short one is not; so neither times of single evaluations are
/// compared, nor the shortest of each.
pub(crate) fn measure(teacher: &Teacher, config: &NetworkConfig) -> Result<f64> {
    let weights = config.initial_weights(0)?.into_iter().collect();
    let network = teacher.network();
    let student = config.load(weights, network.dtype(), network.device())?;
    let turns = [student.as_ref(), teacher.network()];
    // The first evaluation of a size is slower than those after it.
    for network in turns {
        timed_evaluation(network, ROWS)?;
    }
    let mut ratios = [0.0; ROUNDS];
    for ratio in &mut ratios {
        *ratio = turn(turns[0])? / turn(turns[1])?;
    }
    ratios.sort_unstable_by(f64::total_cmp);
    Ok(ratios[ROUNDS / 2])
}

/// Seconds of an evaluation, as the mean of a turn.
fn turn(network: &dyn Denoiser) -> Result<f64> {
    let (mut seconds, mut evaluations) = (0.0, 0.0);
    while seconds < TURN {
        seconds += timed_evaluation(network, ROWS)?.1;
        evaluations += 1.0;
    }
    Ok(seconds / evaluations)
}
