//! Reading a JSON object field by field, so that every complaint names file, field, value and remedy.

use serde::{Serialize, Serializer, de::DeserializeOwned};
use serde_json::{Map, Value};
use serde_path_to_error::Segment;

use crate::weights::Shapes;
use crate::{Error, Result};

/// A larger side is a mistake, not an image.
const SIDE_LIMIT: usize = 1 << 14;

/// Activations, scores or weights beyond which a mistyped number is likelier than a network: 16 GiB in f32.
pub(crate) const ELEMENT_LIMIT: u64 = 1 << 32;

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

    /// The members of `value`, which is of the class of diffusers' that the file may leave out.
    pub(crate) fn of_class(value: &'a Value, file: &'a str, class: &str) -> Result<Self> {
        let fields = Self::new(value, file)?;
        match fields.text("_class_name", Some(class))? {
            Some(named) if named == class => Ok(fields),
            _ => Err(fields.refuse("_class_name", format!("must be {class}"))),
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

    /// Refuses a network of so many weights that a mistyped number of `name` is likelier than one.
    pub(crate) fn check_weights(&self, name: &str, shapes: &Shapes, limit: u64) -> Result<()> {
        let count = |shape: &Vec<usize>| shape.iter().map(|&side| side as u64).product::<u64>();
        let weights: u64 = shapes.values().map(count).sum();
        if weights > limit {
            let remedy =
                format!("the network would have {weights} weights; at most {limit} are supported");
            return Err(self.refuse(name, remedy));
        }
        Ok(())
    }

    /// Refuses tokens whose places sines and cosines of rows and of columns cannot tell, or that are wider than `limit`.
    pub(crate) fn check_token_width(&self, width: usize, heads: usize, limit: usize) -> Result<()> {
        if !width.is_multiple_of(4) || width > limit {
            let remedy = format!(
                "times num_attention_heads, {heads}, must be a multiple of 4, for the sines and cosines of rows \
                 and columns, and at most {limit}"
            );
            return Err(self.refuse("attention_head_dim", remedy));
        }
        Ok(())
    }

    /// Refuses patches and tokens of a prompt that attend to each other and are more than memory holds: 16 GiB in f32.
    pub(crate) fn check_tokens(&self, tokens: u64, heads: usize, width: usize) -> Result<()> {
        let scores = tokens.saturating_mul(tokens).saturating_mul(heads as u64);
        if scores.max(tokens.saturating_mul(4 * width as u64)) > ELEMENT_LIMIT {
            let remedy = format!(
                "{tokens} patches and tokens would have more than {ELEMENT_LIMIT} activations or attention scores \
                 per sample; use larger patches (patch_size)"
            );
            return Err(self.refuse("sample_size", remedy));
        }
        Ok(())
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

/// What diffusers writes of a configuration, every field present.
pub(crate) fn written(config: &impl Serialize, class: &str) -> Value {
    // Numbers, names and lists of them.
    let mut json = serde_json::to_value(config).unwrap_or_default();
    json["_class_name"] = class.into();
    json
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
