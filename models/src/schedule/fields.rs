//! Taking fields out of a configuration, with complaints that name file, field, value and remedy.

use serde_json::{Map, Value};

use super::names::Word;
use crate::{Error, Result};

/// Allowed values of a number, and how to say so.
pub(super) type Range = (fn(f64) -> bool, &'static str);
pub(super) const OPEN_UNIT: Range = (|x| x > 0.0 && x < 1.0, "a number above 0 and below 1");
pub(super) const CLOSED_UNIT: Range = (|x| (0.0..=1.0).contains(&x), "a number from 0 to 1");
/// Of what is computed with in f32.
pub(super) const POSITIVE: Range = (
    |x| (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&x),
    "a number above 0 and at most 3.4e38, as f32 holds",
);

/// The file's fields; reading one takes it out.
pub(super) struct Fields<'a> {
    pub(super) object: Map<String, Value>,
    pub(super) file: &'a str,
}

impl Fields<'_> {
    fn refuse(&self, field: &str, value: &Value, must_be: &str) -> Error {
        Error::value(format!("{}: {field}", self.file), value, format!("must be {must_be}"))
    }

    /// Lets null mean "absent" for a field for which diffusers writes it.
    pub(super) fn nullable(&mut self, field: &str) -> &mut Self {
        if self.object.get(field).is_some_and(Value::is_null) {
            self.object.remove(field);
        }
        self
    }

    pub(super) fn number(&mut self, field: &str, (allowed, must_be): Range) -> Result<Option<f64>> {
        let Some(value) = self.object.remove(field) else {
            return Ok(None);
        };
        match value.as_f64().filter(|&number| allowed(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.refuse(field, &value, must_be)),
        }
    }

    pub(super) fn whole(&mut self, field: &str, least: u64, most: u64) -> Result<Option<usize>> {
        let Some(value) = self.object.remove(field) else {
            return Ok(None);
        };
        match value.as_u64().filter(|number| (least..=most).contains(number)) {
            Some(number) => Ok(Some(number as usize)),
            None => {
                Err(self.refuse(field, &value, &format!("a whole number from {least} to {most}")))
            }
        }
    }

    /// Python's None is false, whatever the default.
    pub(super) fn flag(&mut self, field: &str) -> Result<Option<bool>> {
        match self.object.remove(field) {
            None => Ok(None),
            Some(Value::Null) => Ok(Some(false)),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(other) => Err(self.refuse(field, &other, "true or false")),
        }
    }

    pub(super) fn word<T: Word>(&mut self, field: &str) -> Result<Option<T>> {
        let Some(value) = self.object.remove(field) else {
            return Ok(None);
        };
        match value.as_str().and_then(T::parse) {
            Some(word) => Ok(Some(word)),
            None => Err(self.refuse(field, &value, &format!("one of {}", list::<T>()))),
        }
    }

    pub(super) fn betas(&mut self, field: &str) -> Result<Option<Vec<f64>>> {
        let values = match self.nullable(field).object.remove(field) {
            None => return Ok(None),
            Some(Value::Array(values)) => values,
            Some(other) => return Err(self.refuse(field, &other, "a list of numbers, or null")),
        };
        let (allowed, must_be) = OPEN_UNIT;
        let beta = |(i, value): (usize, &Value)| match value.as_f64().filter(|&beta| allowed(beta))
        {
            Some(beta) => Ok(beta),
            None => Err(self.refuse(&format!("{field}[{i}]"), value, must_be)),
        };
        values.iter().enumerate().map(beta).collect::<Result<_>>().map(Some)
    }

    /// A number, or minus infinity in one of the ways Python programs write it, which is the default.
    pub(super) fn lambda(&mut self, field: &str) -> Result<Option<f64>> {
        if let Some(Value::String(text)) = self.object.get(field)
            && matches!(text.as_str(), "-Infinity" | "-inf")
        {
            self.object.remove(field);
        }
        self.number(field, (f64::is_finite, "a number, or -Infinity"))
    }
}

/// Every allowed word.
pub(super) fn list<T: Word>() -> String {
    T::all().iter().map(|value| value.word()).collect::<Vec<_>>().join(", ")
}
