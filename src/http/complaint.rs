//! What serde complains about, read out of its sentences.
//!
//! serde hands a deserializer the names of fields, but `serde_json::Error` keeps only the sentence that it makes of them,
//! as do serde_path_to_error, which adds the path, and axum's rejection. The names as data would take a deserializer
//! with an error type of its own. The sentences are those of serde's default methods of [`serde::de::Error`], which the tests hold
//! to; of any other sentence nothing is said here.

/// A complaint about a field as such, not about its value.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Complaint<'a> {
    /// A field that a structure does not have.
    Unknown {
        /// Its name, as it was sent.
        field: &'a str,
        /// Those that the structure has, with commas between them.
        fields: String,
    },
    /// A field that is there twice.
    Duplicate {
        /// Its name.
        field: &'a str,
    },
    /// A field that must be there.
    Missing {
        /// Its name.
        field: &'a str,
    },
}

impl<'a> Complaint<'a> {
    /// What a message of `serde_json` complains about.
    ///
    /// | serde's sentence | complaint |
    /// | --- | --- |
    /// | "unknown field \`x\`, expected \`a\`", "… expected \`a\` or \`b\`", "… expected one of \`a\`, \`b\`", "… there are no fields" | [`Self::Unknown`] |
    /// | "duplicate field \`a\`" | [`Self::Duplicate`] |
    /// | "missing field \`a\`" | [`Self::Missing`] |
    ///
    /// `serde_json` adds " at line 1 column 2".
    pub(super) fn of(message: &'a str) -> Option<Self> {
        let message = message.rsplit_once(" at line ").map_or(message, |(message, _)| message);
        if let Some(rest) = message.strip_prefix("unknown field `") {
            // What was sent may hold anything, serde's own words too; the fields' names are plain.
            let (field, fields) = match rest.rsplit_once("`, expected ") {
                Some((field, fields)) => (field, fields.trim_start_matches("one of ")),
                None => (rest.strip_suffix("`, there are no fields")?, "none"),
            };
            let fields = fields.replace("` or `", "`, `").replace('`', "");
            return Some(Self::Unknown { field, fields });
        }
        let named = |start: &str| message.strip_prefix(start)?.strip_suffix('`');
        if let Some(field) = named("duplicate field `") {
            return Some(Self::Duplicate { field });
        }
        named("missing field `").map(|field| Self::Missing { field })
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, de::DeserializeOwned};

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct Two {
        first: u32,
        second: Option<String>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)]
    struct One {
        only: Option<u32>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct None {}

    fn message<T: DeserializeOwned + std::fmt::Debug>(body: &str) -> String {
        serde_json::from_str::<T>(body).unwrap_err().to_string()
    }

    fn unknown<'a>(field: &'a str, fields: &str) -> Option<Complaint<'a>> {
        Some(Complaint::Unknown { field, fields: fields.into() })
    }

    #[test]
    fn serde_says_what_the_table_has() {
        let said = message::<Two>(r#"{"first": 1, "third": 2}"#);
        assert_eq!(Complaint::of(&said), unknown("third", "first, second"), "{said}");
        let said = message::<One>(r#"{"third": 2}"#);
        assert_eq!(Complaint::of(&said), unknown("third", "only"), "{said}");
        let said = message::<None>(r#"{"third": 2}"#);
        assert_eq!(Complaint::of(&said), unknown("third", "none"), "{said}");
        let said = message::<Two>(r#"{"first": 1, "first": 2}"#);
        assert_eq!(Complaint::of(&said), Some(Complaint::Duplicate { field: "first" }), "{said}");
        let said = message::<Two>(r#"{"second": "x"}"#);
        assert_eq!(Complaint::of(&said), Some(Complaint::Missing { field: "first" }), "{said}");
    }

    #[test]
    fn a_name_that_quotes_serde_is_a_name() {
        for name in ["a`, expected b", "x` at line 7", "missing field `first`", "", "`"] {
            let said = message::<Two>(&format!("{{{name:?}: 1}}"));
            assert_eq!(Complaint::of(&said), unknown(name, "first, second"), "{said}");
        }
    }

    #[test]
    fn values_that_do_not_fit_are_no_complaint_about_fields() {
        for body in [r#"{"first": "missing field `x`"}"#, r#"{"first": -1}"#, "3", "{"] {
            assert_eq!(Complaint::of(&message::<Two>(body)), Option::None, "{body}");
        }
    }
}
