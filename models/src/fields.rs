//! Reading a JSON object field by field, so that every complaint names file, field, value and remedy.

use serde::{Serializer, de::DeserializeOwned};
use serde_json::{Map, Value};
use serde_path_to_error::Segment;

use crate::{Error, Result};

/// A larger side is a mistake, not an image.
const SIDE_LIMIT: usize = 1 << 14;

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

    /// Refuses a count that is 0 or above `limit`.
    pub(crate) fn bounded(
        &self,
        name: &str,
        count: impl Into<Option<usize>>,
        limit: usize,
    ) -> Result<()> {
        match count.into() {
            Some(count) if !(1..=limit).contains(&count) => Err(self.refuse(name, range(limit))),
            _ => Ok(()),
        }
    }

    /// Refuses a `sample_size` that a network of so many levels cannot halve as often as it must.
    pub(crate) fn check_sample_size(&self, sides: [usize; 2], levels: usize) -> Result<()> {
        let step = 1 << (levels - 1);
        let fits = |side: usize| (1..=SIDE_LIMIT).contains(&side) && side.is_multiple_of(step);
        if sides.into_iter().all(fits) {
            return Ok(());
        }
        let remedy = format!(
            "must be the side of a sample or [height, width], each a multiple of {step} of at most \
             {SIDE_LIMIT}, since {levels} levels halve it {} times",
            levels - 1
        );
        Err(self.refuse("sample_size", remedy))
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

    fn whole(&self, value: &Value, limit: usize) -> Option<usize> {
        let count = usize::try_from(value.as_u64()?).ok()?;
        (1..=limit).contains(&count).then_some(count)
    }
}

fn range(limit: usize) -> String {
    format!("must be a whole number from 1 to {limit}")
}

/// diffusers' files say `1`, not `1.0`, where the constructor's annotation is a whole number.
pub(crate) fn whole_if_exact<S: Serializer>(number: &f64, to: S) -> Result<S::Ok, S::Error> {
    if number.fract() == 0.0 && number.abs() < 1e9 {
        to.serialize_i64(*number as i64)
    } else {
        to.serialize_f64(*number)
    }
}

/// A value as it stands in the file, cut where it would fill the screen.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
