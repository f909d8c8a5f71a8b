//! The arms of an experiment: which models, and how much traffic each gets.

use super::Error;

/// Fewest and most arms of an experiment.
pub const ARMS: std::ops::RangeInclusive<usize> = 2..=6;

/// The greatest weight.
pub const MAX_WEIGHT: f64 = 1e6;

/// A model and its share of the traffic.
#[derive(Debug, Clone, PartialEq)]
pub struct Arm {
    /// The model's id.
    pub model: String,
    /// Its part of the sum of all weights; 0 to [`MAX_WEIGHT`].
    pub weight: f64,
}

/// Arms that make an experiment: two or more, every model once, weights that leave some traffic to split.
///
/// # Errors
/// [`Error::Value`].
pub(super) fn check(arms: &[Arm]) -> Result<(), Error> {
    let refused = |field: String, value: String, remedy: &str| {
        Err(Error::Value { field, value, remedy: remedy.to_owned() })
    };
    if !ARMS.contains(&arms.len()) {
        let remedy =
            format!("an experiment has {} to {} arms, each a model", ARMS.start(), ARMS.end());
        return refused("arms".into(), format!("a list of {}", arms.len()), &remedy);
    }
    for (at, Arm { model, weight }) in arms.iter().enumerate() {
        if arms[..at].iter().any(|other| other.model == *model) {
            let remedy = "it is an arm already; name every model once";
            return refused(format!("arms[{at}].model"), format!("{model:?}"), remedy);
        }
        if !(0.0..=MAX_WEIGHT).contains(weight) {
            let remedy = format!("a weight is a number from 0 to {MAX_WEIGHT}");
            return refused(format!("arms[{at}].weight"), weight.to_string(), &remedy);
        }
    }
    if arms.iter().all(|arm| arm.weight == 0.0) {
        let remedy = "the weights sum to zero; give at least one arm a weight above it";
        return refused("arms".into(), "without traffic".into(), remedy);
    }
    Ok(())
}

/// The arms with the weights of `changes`; arms that are not among these keep theirs.
///
/// # Errors
/// [`Error::Value`] for a model that is no arm or stands there twice, and as [`check`].
pub(super) fn reweighted(arms: &[Arm], changes: &[Arm]) -> Result<Vec<Arm>, Error> {
    let mut arms = arms.to_vec();
    for (at, Arm { model, weight }) in changes.iter().enumerate() {
        let refused = |remedy: String| {
            let (field, value) = (format!("arms[{at}].model"), format!("{model:?}"));
            Err(Error::Value { field, value, remedy })
        };
        if changes[..at].iter().any(|other| other.model == *model) {
            return refused("its weight is named already; name every model once".into());
        }
        let names: Vec<_> = arms.iter().map(|arm| arm.model.clone()).collect();
        let Some(arm) = arms.iter_mut().find(|arm| arm.model == *model) else {
            let names = names.join(", ");
            return refused(format!(
                "it is no arm of this experiment, whose arms are {names}; arms do not change, so create another experiment"
            ));
        };
        arm.weight = *weight;
    }
    check(&arms)?;
    Ok(arms)
}
