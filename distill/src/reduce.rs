//! The network that keeps most of what matters within a part of a larger one's time.
//!
//! As NetAdapt does (Yang et al. 2018, arXiv 1804.03230, algorithm 1), a step at a time: each makes the network quicker by
//! one thing, a level's width or a block, and times are measured, not worked out. Of all that could go, the one goes that costs
//! the least of what matters for the time it saves.

use understudy_models::{Error, NetworkConfig, Result};

use crate::importance::Importance;
use crate::shrink::measure;
use crate::teacher::Teacher;

/// The part of the time that is left after a step, where more is still to go.
const STEP: f64 = 0.85;
/// What is no quicker than this has only been measured so.
const QUICKER: f64 = 0.97;

/// A smaller network.
#[derive(Debug, Clone)]
pub struct Reduced {
    /// The network.
    pub config: NetworkConfig,
    /// Its share of the larger one's time per evaluation, as measured.
    pub share: f64,
    /// The share of importance that it keeps.
    pub kept: f64,
}

/// Refuses a share that is none, or that not even the smallest network reaches.
///
/// # Errors
/// [`Error::Value`] telling the least.
pub fn check(model: &Teacher, share: f64) -> Result<()> {
    if !(share > 0.0 && share < 1.0) {
        let remedy = "must be above 0 and below 1, such as 0.25x: a part of the model's time";
        return Err(Error::value("time", format!("{share}x"), remedy));
    }
    let smallest = smallest(&model.config);
    let least = measure(model, &smallest)?;
    if least > share {
        return Err(unreachable(share, least));
    }
    Ok(())
}

fn unreachable(share: f64, least: f64) -> Error {
    let ask = (100.0 * least).ceil() / 100.0;
    let ask = match ask < 1.0 {
        true => format!("ask for at least {ask:.2}x"),
        false => {
            "nothing can be gained; prune a larger model, or measure while nothing else runs".into()
        }
    };
    let remedy = format!(
        "the smallest network that can be pruned out of this one takes {least:.2} of its time; {ask}"
    );
    Error::value("time", format!("{share}x"), remedy)
}

/// The least of everything.
fn smallest(config: &NetworkConfig) -> NetworkConfig {
    let mut smallest = config.clone();
    loop {
        let directions = smallest.smaller().len();
        let before = smallest.clone();
        for direction in 0..directions {
            let all = smallest.smaller();
            let fits = |it: &&NetworkConfig| fits(it, config);
            if let Some(least) = all.get(direction).and_then(|it| it.iter().rev().find(fits)) {
                smallest = least.clone();
            }
        }
        if smallest == before {
            return smallest;
        }
    }
}

/// Whether a network can be made of the channels of `config`.
fn fits(smaller: &NetworkConfig, config: &NetworkConfig) -> bool {
    let (Some(own), Some(larger)) = (smaller.channels(), config.channels()) else { return false };
    own.origins(&larger).is_some()
}

/// Makes the network of `model` smaller until its evaluation takes at most `share` of the time.
///
/// # Errors
/// [`Error::Value`] for a share that is not reached, telling the least that is.
pub fn reduce(model: &Teacher, share: f64, importance: &Importance) -> Result<Reduced> {
    let mut now = Reduced { config: model.config.clone(), share: 1.0, kept: 1.0 };
    while now.share > share {
        let goal = share.max(STEP * now.share);
        let mut best: Option<(f64, Reduced)> = None;
        for direction in now.config.smaller() {
            let Some(next) = quicker(model, direction, (now.share, goal), importance)? else {
                continue;
            };
            let cost = (now.kept - next.kept) / (now.share / next.share).ln();
            if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                best = Some((cost, next));
            }
        }
        let Some((_, next)) = best else { return Err(unreachable(share, now.share)) };
        now = next;
    }
    Ok(now)
}

/// The first network of a direction that reaches the goal, else the quickest that is quicker than now.
fn quicker(
    model: &Teacher,
    direction: Vec<NetworkConfig>,
    (now, goal): (f64, f64),
    importance: &Importance,
) -> Result<Option<Reduced>> {
    let mut found: Option<Reduced> = None;
    for config in direction {
        let Some(kept) = importance.kept(&config) else { continue };
        let share = measure(model, &config)?;
        let before = found.as_ref().map_or(QUICKER * now, |it| it.share);
        if share < before {
            let kept = 1.0 - importance.lost(&kept) / importance.all();
            found = Some(Reduced { config, share, kept });
        }
        if share <= goal {
            break;
        }
    }
    Ok(found)
}
