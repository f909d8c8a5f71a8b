//! What makes a run another one than its neighbour, and the check that a resumed run is the same.

use std::path::Path;

use serde_json::{Map, Value, json};
use understudy_models::{Error, Result};

use crate::checkpoint::Snapshot;
use crate::matching::Matching;
use crate::ranks::Shards;
use crate::task::{Settings, Task};

/// The form of identities. Checkpoints without a number are of versions that said less.
const FORMAT: u64 = 2;
const FORMAT_KEY: &str = "identity_format";
const IDENTITY_KEY: &str = "identity";

/// Everything that a run's losses and its model depend on, but for its length: what whoever started it
/// says, and what the parts of the task say of themselves.
pub(crate) fn of(task: &Task<'_>) -> Map<String, Value> {
    let settings = &task.settings;
    let parts = json!({
        "student_network": task.student.config.to_json(),
        "noise_schedule": task.student.schedule.to_json(),
        "prediction": task.student.schedule.prediction_type().name(),
        "initial_weights": task.student.source,
        "accumulate": settings.accumulate,
        "learning_rate": settings.optimizer.learning_rate,
        "warmup_steps": settings.optimizer.warmup_steps,
        "decay_steps": settings.optimizer.decay_steps,
        "weight_decay": settings.optimizer.weight_decay,
        "clip_norm": settings.optimizer.clip_norm,
        "ema": settings.average,
        "role": task.card.role,
        "teacher": task.card.teacher,
        "class_names": task.card.class_names,
        "null_class": task.card.null_class,
    });
    let mut identity = parts.as_object().cloned().unwrap_or_default();
    identity.extend(task.shards.identity());
    identity.extend(task.matching.iter().flat_map(Matching::identity));
    identity.extend(task.identity.clone());
    identity
}

/// Writes it into a checkpoint's state.
pub(crate) fn put(state: &mut Map<String, Value>, identity: &Map<String, Value>) {
    state.insert(FORMAT_KEY.into(), FORMAT.into());
    state.insert(IDENTITY_KEY.into(), identity.clone().into());
}

/// Refuses to go on with another run's checkpoint. Gives the names of what a checkpoint of an earlier version
/// does not say, which nobody can compare.
///
/// # Errors
/// [`Error::Value`] naming the first thing that differs; [`Error::Format`] for a checkpoint of a later version.
pub(crate) fn check(
    snapshot: &Snapshot,
    asked: &Map<String, Value>,
    out: &Path,
) -> Result<Vec<String>> {
    let earlier = match &snapshot.state[FORMAT_KEY] {
        Value::Null => true,
        format if *format == FORMAT => false,
        format => {
            let problem =
                format!("it is of a later version (format {format}, this one has {FORMAT})");
            return Err(snapshot.malformed(&problem));
        }
    };
    let there = snapshot.state[IDENTITY_KEY].as_object().cloned().unwrap_or_default();
    // Read back from text as what is there was, which may move the last bit of a number.
    let text = Value::Object(asked.clone()).to_string();
    let asked: Map<String, Value> = serde_json::from_str(&text).unwrap_or_default();
    let unsaid: Vec<String> =
        asked.keys().filter(|name| earlier && !there.contains_key(*name)).cloned().collect();
    // Earlier versions said some things that no longer stand for themselves.
    let known = there.keys().filter(|_| !earlier);
    let mut names = asked.keys().chain(known).filter(|name| !unsaid.contains(name));
    let Some(name) = names.find(|name| there.get(*name) != asked.get(*name)) else {
        return Ok(unsaid);
    };
    let (there, here) = difference(name, there.get(name), asked.get(name));
    Err(Error::value(
        "out",
        out.display(),
        format!(
            "it holds another run: {there} there and {here} here; give the same arguments and files to resume it, \
             or name another folder"
        ),
    ))
}

/// Refuses ranks that were given another run, or another length of it, than the first.
///
/// # Errors
/// [`Error::Value`] naming the first thing that differs.
pub(crate) fn check_ranks(
    shards: &Shards<'_>,
    identity: &Map<String, Value>,
    settings: &Settings,
) -> Result<()> {
    let mut own = identity.clone();
    own.insert("steps".into(), settings.steps.into());
    own.insert("checkpoint_every".into(), settings.checkpoint_every.into());
    own.insert("sample_every".into(), settings.sample_every.into());
    // All have it from text, which may move the last bit of a number.
    let text = Value::Object(own).to_string();
    let mut of_first = text.clone().into_bytes();
    shards.world().broadcast(&mut of_first);
    let read =
        |text: &[u8]| -> Map<String, Value> { serde_json::from_slice(text).unwrap_or_default() };
    let (own, of_first) = (read(text.as_bytes()), read(&of_first));
    let mut names = own.keys().chain(of_first.keys());
    let Some(name) = names.find(|name| own.get(*name) != of_first.get(*name)) else {
        return Ok(());
    };
    let (there, here) = difference(name, of_first.get(name), own.get(name));
    let remedy = format!(
        "of the first rank {there}, of this one {here}; give all the same arguments and files"
    );
    Err(Error::value("rank", shards.world().rank(), remedy))
}

/// The values of `name` in words; of objects, those of the first member that differs.
fn difference(name: &str, there: Option<&Value>, here: Option<&Value>) -> (String, String) {
    if let (Some(Value::Object(there)), Some(Value::Object(here))) = (there, here) {
        let mut members = there.keys().chain(here.keys());
        if let Some(member) = members.find(|member| there.get(*member) != here.get(*member)) {
            return difference(&format!("{name}.{member}"), there.get(member), here.get(member));
        }
    }
    let show = |value: Option<&Value>| match value {
        None => "absent".to_owned(),
        Some(value) => value.to_string().chars().take(80).collect(),
    };
    (format!("`{name}` is {}", show(there)), show(here))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap()
    }

    fn check_against(there: &Value, asked: Value) -> Result<Vec<String>> {
        let mut state = Map::new();
        put(&mut state, &object(there.clone()));
        check(&Snapshot::new(state.into()), &object(asked), Path::new("out"))
    }

    #[test]
    fn every_difference_is_another_run() {
        let there = json!({"seed": 1, "student_network": {"channels": [16, 32]}, "rate": 0.1});
        assert!(check_against(&there, there.clone()).unwrap().is_empty());
        for (asked, words) in [
            (json!({"seed": 2}), "`seed` is 1 there and 2 here"),
            (
                json!({"student_network": {"channels": [16, 8]}}),
                "`student_network.channels` is [16,32] there and [16,8] here",
            ),
            (json!({"data": "x"}), "`data` is absent there and \"x\" here"),
        ] {
            let mut changed = object(there.clone());
            changed.extend(object(asked));
            let problem = check_against(&there, changed.into()).unwrap_err().to_string();
            assert!(problem.contains(words), "{problem}");
        }
        let problem = check_against(&there, json!({"seed": 1})).unwrap_err().to_string();
        assert!(problem.contains("`rate` is 0.1 there and absent here"), "{problem}");
    }

    #[test]
    fn checkpoints_of_earlier_versions_go_on_with_what_they_do_not_say() {
        let state = json!({"identity": {"seed": 1, "gone": 7}});
        let check = |asked| check(&Snapshot::new(state.clone()), &object(asked), Path::new("out"));
        assert_eq!(check(json!({"seed": 1, "data_sha256": "x"})).unwrap(), ["data_sha256"]);
        assert!(check(json!({"seed": 2})).unwrap_err().to_string().contains("`seed`"));
    }
}
