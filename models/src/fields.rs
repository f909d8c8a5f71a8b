//! Reading a JSON object field by field, so that every complaint names file, field, value and remedy.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use serde_path_to_error::Segment;

use crate::{Error, Result};

/// A configuration whose members are those of `T`, as serde has them; `file` is what messages call it. Members whose names
/// begin with `_` tell of the library that wrote the file, and are not looked at.
///
/// # Errors
/// [`Error::Value`] naming file, member and value for what `T` does not take.
pub(crate) fn typed<T: DeserializeOwned>(value: &Value, file: &str) -> Result<T> {
    let Value::Object(object) = value else {
        return Err(Error::value(file, short(value), "the file must hold one JSON object"));
    };
    let own = object.iter().filter(|(name, _)| !name.starts_with('_'));
    let own = Value::Object(own.map(|(name, value)| (name.clone(), value.clone())).collect());
    serde_path_to_error::deserialize(&own).map_err(|error| {
        let path = error.path();
        let found = path.iter().try_fold(&own, |value, segment| match segment {
            Segment::Map { key } => value.get(key),
            Segment::Seq { index } => value.get(index),
            _ => Some(value),
        });
        let found = found.map_or_else(|| "absent".to_owned(), short);
        Error::value(
            format!("{file}: {path}"),
            found,
            format!("cannot be honoured: {}", error.inner()),
        )
    })
}

/// The members of a configuration file. An absent member takes the default the caller gives, as the
/// constructor that the file configures would; a member of the wrong kind is refused.
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    file: &'a str,
}

impl<'a> Fields<'a> {
    /// The members of `value`, which must be an object; `file` is what messages call it.
    pub(crate) fn new(value: &'a Value, file: &'a str) -> Result<Self> {
        match value {
            Value::Object(object) => Ok(Self { object, file }),
            other => Err(Error::value(file, short(other), "the file must hold one JSON object")),
        }
    }

    /// An error about `name`, whose value is taken from the file.
    pub(crate) fn refuse(&self, name: &str, remedy: impl Into<String>) -> Error {
        let found = self.object.get(name).map_or_else(|| "absent".to_string(), short);
        Error::value(format!("{}: {name}", self.file), found, remedy)
    }

    /// An error about entry `index` of the list `name`.
    pub(crate) fn refuse_entry(
        &self,
        name: &str,
        index: usize,
        remedy: impl Into<String>,
    ) -> Error {
        let entry = self.object.get(name).and_then(|list| list.get(index));
        let found = entry.map_or_else(|| "the default".to_string(), short);
        Error::value(format!("{}: {name}[{index}]", self.file), found, remedy)
    }

    /// The member, unless it is absent.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name)
    }

    /// The names of all members.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.object.keys().map(String::as_str)
    }

    /// `true` or `false`.
    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.refuse(name, "must be true or false")),
        }
    }

    /// A whole number from 1 to `limit`.
    pub(crate) fn count(&self, name: &str, default: usize, limit: usize) -> Result<usize> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => self.whole(value, limit).ok_or_else(|| self.refuse(name, range(limit))),
        }
    }

    /// A whole number from 1 to `limit`, or nothing: absent and `null` are the same.
    pub(crate) fn optional_count(&self, name: &str, limit: usize) -> Result<Option<usize>> {
        match self.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match self.whole(value, limit) {
                Some(count) => Ok(Some(count)),
                None => Err(self.refuse(name, format!("{}, or null", range(limit)))),
            },
        }
    }

    /// A list of whole numbers from 1 to `limit`.
    pub(crate) fn counts(&self, name: &str, default: &[usize], limit: usize) -> Result<Vec<usize>> {
        match self.get(name) {
            None => Ok(default.to_vec()),
            Some(Value::Array(list)) => {
                let entry = |(i, value)| {
                    self.whole(value, limit).ok_or_else(|| self.refuse_entry(name, i, range(limit)))
                };
                list.iter().enumerate().map(entry).collect()
            }
            Some(_) => Err(self.refuse(name, "must be a list of whole numbers")),
        }
    }

    /// A number that f32, in which networks compute, holds.
    pub(crate) fn number(&self, name: &str, default: f64) -> Result<f64> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => {
                value.as_f64().filter(|number| number.abs() <= f64::from(f32::MAX)).ok_or_else(
                    || self.refuse(name, "must be a number of at most 3.4e38, as f32 holds"),
                )
            }
        }
    }

    /// A string, or nothing for `null`.
    pub(crate) fn text(&self, name: &str, default: Option<&'a str>) -> Result<Option<&'a str>> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.refuse(name, "must be a string")),
        }
    }

    /// A list of strings.
    pub(crate) fn texts(&self, name: &str, default: &[&'a str]) -> Result<Vec<&'a str>> {
        match self.get(name) {
            None => Ok(default.to_vec()),
            Some(Value::Array(list)) => {
                let entry = |(i, value): (usize, &'a Value)| {
                    value.as_str().ok_or_else(|| self.refuse_entry(name, i, "must be a string"))
                };
                list.iter().enumerate().map(entry).collect()
            }
            Some(_) => Err(self.refuse(name, "must be a list of strings")),
        }
    }

    fn whole(&self, value: &Value, limit: usize) -> Option<usize> {
        let count = usize::try_from(value.as_u64()?).ok()?;
        (1..=limit).contains(&count).then_some(count)
    }
}

fn range(limit: usize) -> String {
    format!("must be a whole number from 1 to {limit}")
}

/// A value as it stands in the file, cut where it would fill the screen.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
