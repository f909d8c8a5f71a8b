//! Which models requests are for.

use std::{fmt, str::FromStr};

use super::Served;

/// Names of models with their weights, as in `teacher=1,student=4`.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    text: String,
    entries: Vec<(String, f64)>,
}

impl Mix {
    /// The names, in order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.iter().map(|(name, _)| name.as_str())
    }

    /// The entry that a uniform number in [0, 1) falls on.
    pub(super) fn pick(&self, uniform: f64) -> usize {
        let all: f64 = self.entries.iter().map(|(_, weight)| weight).sum();
        let mut left = uniform * all;
        let found = self.entries.iter().position(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        found.unwrap_or(self.entries.len() - 1)
    }

    /// What requests write as `model` for each entry: `teacher` and `student` are the server's default pair,
    /// every other name stands for itself.
    ///
    /// # Errors
    /// A sentence when there is no such pair.
    pub fn resolve(&self, served: &[Served]) -> Result<Vec<String>, String> {
        self.names().map(|name| resolve(name, served)).collect()
    }
}

fn resolve(name: &str, served: &[Served]) -> Result<String, String> {
    // The server lists its default model first.
    let default = served.first();
    let teacher = match default.filter(|model| model.role.as_deref() == Some("student")) {
        Some(student) => served.iter().find(|model| Some(&model.id) == student.teacher.as_ref()),
        None => default,
    };
    let teacher = teacher.filter(|model| model.ready);
    let found = match name {
        "teacher" => teacher,
        "student" => teacher.and_then(|teacher| {
            served.iter().find(|model| {
                model.ready
                    && model.role.as_deref() == Some("student")
                    && model.teacher.as_deref() == Some(&teacher.id)
            })
        }),
        _ => return Ok(name.to_owned()),
    };
    found.map(|model| model.id.clone()).ok_or_else(|| {
        let ids: Vec<&str> = served.iter().map(|model| model.id.as_str()).collect();
        let ids = if ids.is_empty() { "none".into() } else { ids.join(", ") };
        format!(
            "--mix {name}: the server has no default {name} that is ready; name a model, it has: {ids}"
        )
    })
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut entries: Vec<(String, f64)> = Vec::new();
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').unwrap_or((part, "1"));
            let allowed = |c: char| c.is_ascii_alphanumeric() || "._-:".contains(c);
            if name.is_empty() || !name.chars().all(allowed) {
                return Err(format!(
                    "{name:?} is no model; write names with weights, as in teacher=1,student=4"
                ));
            }
            if entries.iter().any(|(other, _)| other == name) {
                return Err(format!("{name} is there twice; give it one weight"));
            }
            match weight.parse::<f64>() {
                Ok(weight) if weight > 0.0 && weight <= 1e9 => {
                    entries.push((name.to_owned(), weight));
                }
                _ => {
                    return Err(format!(
                        "the weight of {name} is {weight:?}; write a number above 0 and at most 1e9"
                    ));
                }
            }
        }
        Ok(Self { text: text.to_owned(), entries })
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn served(id: &str, role: &str, teacher: Option<&str>) -> Served {
        Served {
            id: id.into(),
            ready: true,
            role: Some(role.into()),
            teacher: teacher.map(Into::into),
        }
    }

    #[test]
    fn weights_are_optional_and_mistakes_are_named() {
        let mix: Mix = "teacher,experiment:try-1=2.5".parse().unwrap();
        assert_eq!(mix.names().collect::<Vec<_>>(), ["teacher", "experiment:try-1"]);
        assert_eq!([0.0, 0.28, 0.29, 0.999].map(|u| mix.pick(u)), [0, 0, 1, 1]);
        for (text, part) in [
            ("", "\"\""),
            ("a,,b", "\"\""),
            ("a b", "\"a b\""),
            ("a=0", "weight of a is \"0\""),
            ("a=-1", "\"-1\""),
            ("a=nan", "\"nan\""),
            ("a=inf", "\"inf\""),
            ("a=", "weight of a is \"\""),
            ("a,b=2,a", "a is there twice"),
        ] {
            let error = text.parse::<Mix>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn teacher_and_student_are_the_default_pair() {
        let models = [
            served("big", "teacher", None),
            served("another", "student", Some("other")),
            served("small", "student", Some("big")),
        ];
        let mix: Mix = "student=4,teacher,auto".parse().unwrap();
        assert_eq!(mix.resolve(&models).unwrap(), ["small", "big", "auto"]);
        let error = mix.resolve(&models[..2]).unwrap_err();
        assert!(error.contains("--mix student") && error.contains("big, another"), "{error}");
        assert!(mix.resolve(&[]).unwrap_err().contains("it has: none"));
        // A student by default: the pair is its.
        let [big, another, small] = models;
        assert_eq!(mix.resolve(&[small, another.clone(), big]).unwrap(), ["small", "big", "auto"]);
        assert!(mix.resolve(&[another]).unwrap_err().contains("--mix student"));
    }
}
