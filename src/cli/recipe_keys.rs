//! What a recipe's keys are: the flags of `understudy distill` by their long names, each with the kind of value that it
//! takes. The parser and the JSON schema of recipes both read it off clap.

use std::{
    any::TypeId,
    num::{NonZeroU16, NonZeroU32, NonZeroU64, NonZeroUsize},
};

use clap::{Arg, ArgAction, Args, Command, builder::StyledStr};
use serde_json::{Map, Value, json};
use understudy_models::misspelt::nearest;

use super::{distill_args::DistillArgs, print};

/// Flags that are about this time, not about the recipe.
const NOT_IN_RECIPES: [&str; 1] = ["dry-run"];
/// Flags that all stages share: where they are made, and what the process is.
const OF_ALL_STAGES: [&str; 3] = ["out", "threads", "max-model-bytes"];
/// Flags that make a stage what it is, so that one value for all stages is none.
pub(super) const OF_A_STAGE: [&str; 3] = ["student", "init", "evaluations"];

/// The kind of value that a key takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    /// `true` or `false`.
    Switch,
    /// A whole number from that one on.
    Whole(u8),
    /// Any number.
    Number,
    /// One of these.
    Word(Vec<String>),
    /// A text.
    Text,
    /// A text, or a list of texts.
    Texts,
}

impl Kind {
    fn of(arg: &Arg) -> Self {
        if matches!(arg.get_action(), ArgAction::SetTrue) {
            return Self::Switch;
        }
        let words: Vec<String> = arg
            .get_possible_values()
            .iter()
            .filter(|value| !value.is_hide_set())
            .map(|value| value.get_name().to_owned())
            .collect();
        if !words.is_empty() {
            return Self::Word(words);
        }
        if takes_many(arg) {
            return Self::Texts;
        }
        let parsed = arg.get_value_parser().type_id();
        let is = |ids: &[TypeId]| ids.iter().any(|id| parsed == *id);
        if is(&[TypeId::of::<u32>(), TypeId::of::<u64>(), TypeId::of::<usize>()]) {
            return Self::Whole(0);
        }
        let above_zero = [TypeId::of::<NonZeroU16>(), TypeId::of::<NonZeroU32>()];
        if is(&above_zero) || is(&[TypeId::of::<NonZeroU64>(), TypeId::of::<NonZeroUsize>()]) {
            return Self::Whole(1);
        }
        if is(&[TypeId::of::<f64>()]) { Self::Number } else { Self::Text }
    }

    /// What it takes, as the end of a sentence.
    pub(super) fn takes(&self) -> String {
        match self {
            Self::Switch => "true or false".into(),
            Self::Whole(least) => format!("a whole number, {least} or more"),
            Self::Number => "a number".into(),
            Self::Word(words) => format!("one of the texts {}", words.join(", ")),
            Self::Text => "a text in quotes".into(),
            Self::Texts => "a text in quotes, or a list of texts".into(),
        }
    }

    fn schema(&self) -> Value {
        match self {
            Self::Switch => json!({"type": "boolean"}),
            Self::Whole(least) => json!({"type": "integer", "minimum": least}),
            Self::Number => json!({"type": "number"}),
            Self::Word(words) => json!({"enum": words}),
            Self::Text => json!({"type": "string"}),
            Self::Texts => json!({"oneOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
            ]}),
        }
    }
}

/// Whether a flag may be there several times, or takes several values.
fn takes_many(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Append) || takes_several(arg)
}

/// Whether one occurrence of a flag takes several values.
pub(super) fn takes_several(arg: &Arg) -> bool {
    arg.get_num_args().is_some_and(|count| count.max_values() > 1)
}

/// The flags of `understudy distill`.
pub(super) fn flags() -> Command {
    let mut flags = DistillArgs::augment_args(Command::new("understudy distill"));
    // So that every flag knows how many values it takes.
    flags.build();
    flags
}

/// A key: the flag behind it, and its kind.
#[derive(Debug, Clone)]
pub(super) struct Key {
    pub(super) arg: Arg,
    pub(super) kind: Kind,
}

impl Key {
    pub(super) fn new(arg: &Arg) -> Self {
        Self { arg: arg.clone(), kind: Kind::of(arg) }
    }
}

/// The key of that name.
///
/// # Errors
/// What is wrong with the name, as the end of a sentence.
pub(super) fn key(flags: &Command, name: &str, of_a_stage: bool) -> Result<Key, String> {
    if of_a_stage && name == "out" {
        return Err(
            "stages are made in folders of their names below the recipe's `out`; give the stage a `name`".into(),
        );
    }
    if of_a_stage && OF_ALL_STAGES.contains(&name) {
        return Err("is the same for all stages; put it above the first [[stage]]".into());
    }
    if NOT_IN_RECIPES.contains(&name) {
        return Err(format!("is no part of a recipe; give --{name} on the command line"));
    }
    let found = flags.get_arguments().find(|arg| arg.get_long() == Some(name) && name != "help");
    let arg = found.ok_or_else(|| {
        let alike = nearest(flags.get_arguments().filter_map(Arg::get_long), name);
        let hint = alike.map_or_else(String::new, |name| format!("; did you mean `{name}`?"));
        format!("is no flag of `understudy distill`{hint} (--help lists them; keys are their long names)")
    })?;
    Ok(Key::new(arg))
}

/// Print the JSON schema of recipes; `configs/recipe.schema.json` is made with it.
#[derive(Debug, clap::Args)]
pub(super) struct SchemaArgs {}

/// Runs the command.
///
/// # Errors
/// A sentence when nobody takes it.
pub(super) fn run(_: &SchemaArgs) -> Result<(), String> {
    print(format!("{:#}", schema()))
}

/// The JSON schema of recipes.
fn schema() -> Value {
    let flags = flags();
    let properties = |of_a_stage: bool| -> Map<String, Value> {
        let named = flags.get_arguments().filter(|arg| !arg.is_hide_set());
        named
            .filter_map(|arg| Some((arg.get_long()?, arg)))
            .filter(|(name, _)| key(&flags, name, of_a_stage).is_ok())
            .map(|(name, arg)| {
                let mut schema = Kind::of(arg).schema();
                let help = arg.get_help().map(StyledStr::to_string).unwrap_or_default();
                schema["description"] = help.into();
                (name.to_owned(), schema)
            })
            .collect()
    };
    let mut stage = properties(true);
    let name = json!({"type": "string", "pattern": "^[A-Za-z0-9._-]+$",
        "description": "The stage's folder below `out`."});
    stage.insert("name".into(), name);
    let mut recipe = properties(false);
    let stages = json!({"type": "array", "minItems": 1,
        "description": "The stages in their order. Each begins with the student of the one before.",
        "items": {"type": "object", "additionalProperties": false, "required": ["name"], "properties": stage}});
    recipe.insert("stage".into(), stages);
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of understudy distill --config",
        "description": "Keys are the long names of flags. Those above the first stage are for all stages; a stage's win.",
        "type": "object",
        "additionalProperties": false,
        "required": ["stage"],
        "properties": recipe,
    })
}
