//! The arms of an experiment: which models, and how much traffic each gets.

use super::Error;

/// Fewest and most arms of an experiment.
pub const ARMS: std::ops::RangeInclusive<usize> = 2..=6;

/// The greatest weight.
pub const MAX_WEIGHT: f64 = 1e6;

/// A model, in so many steps where the arm says so, and its share of the traffic.
#[derive(Debug, Clone, PartialEq)]
pub struct Arm {
    /// The model's id.
    pub model: String,
    /// Steps of the sampler; those of the request, or the model's usual ones, without.
    pub steps: Option<usize>,
    /// Its part of the sum of all weights; 0 to [`MAX_WEIGHT`].
    pub weight: f64,
}

/// Between model and steps in an arm's name; in no model's id.
const AT: char = '@';

impl Arm {
    /// By which the arm is known in counts, votes and the split: the model's id, with its steps where it says them.
    pub fn name(&self) -> String {
        match self.steps {
            None => self.model.clone(),
            Some(steps) => format!("{}{AT}{steps}", self.model),
        }
    }

    /// The arm of that name.
    pub(super) fn of_name(name: String, weight: f64) -> Self {
        let parts = name.rsplit_once(AT);
        let parts = parts.and_then(|(model, steps)| Some((model.to_owned(), steps.parse().ok()?)));
        match parts {
            Some((model, steps)) => Self { model, steps: Some(steps), weight },
            None => Self { model: name, steps: None, weight },
        }
    }

    /// Whether it is the same model in the same steps.
    fn is(&self, other: &Self) -> bool {
        (&self.model, self.steps) == (&other.model, other.steps)
    }
}

/// Arms that make an experiment: two or more, every model once in the same steps, weights that leave some traffic to split.
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
    for (at, arm) in arms.iter().enumerate() {
        if arms[..at].iter().any(|other| other.is(arm)) {
            let remedy =
                "it is an arm already; name every model once, or with other num_inference_steps";
            return refused(format!("arms[{at}].model"), format!("{:?}", arm.model), remedy);
        }
        let weight = &arm.weight;
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
    for (at, change) in changes.iter().enumerate() {
        let refused = |remedy: String| {
            let (field, value) = (format!("arms[{at}].model"), format!("{:?}", change.name()));
            Err(Error::Value { field, value, remedy })
        };
        if changes[..at].iter().any(|other| other.is(change)) {
            return refused("its weight is named already; name every arm once".into());
        }
        let names: Vec<_> = arms.iter().map(Arm::name).collect();
        let Some(arm) = arms.iter_mut().find(|arm| arm.is(change)) else {
            let names = names.join(", ");
            return refused(format!(
                "it is no arm of this experiment, whose arms are {names}; arms do not change, so create another experiment"
            ));
        };
        arm.weight = change.weight;
    }
    check(&arms)?;
    Ok(arms)
}
