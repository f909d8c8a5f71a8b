//! Where the Hub is and where its files are kept, by the rules of Python's `huggingface_hub`, so that both use one
//! cache. A variable that is there but empty, as compose files make them, says nothing here.

use std::{env, fs, path::PathBuf, time::Duration};

use crate::{Error, Result, checkpoint::read};

const PUBLIC: &str = "https://huggingface.co";
/// Seconds for an answer, and between two parts of a file, as in Python.
const TIMEOUT_SECONDS: u64 = 10;

/// What the environment says.
#[derive(Debug, PartialEq)]
pub(super) struct Places {
    /// `HF_ENDPOINT`, without a slash at its end.
    pub(super) endpoint: String,
    /// `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub(super) cache: PathBuf,
    /// `HF_TOKEN_PATH`, or `token` in `HF_HOME`: where a login leaves its token.
    pub(super) token: PathBuf,
    /// `HF_HUB_OFFLINE`: no network.
    pub(super) offline: bool,
    /// `HF_HUB_DOWNLOAD_TIMEOUT`.
    pub(super) timeout: Duration,
}

impl Places {
    /// What the variables of `environment` say.
    ///
    /// # Errors
    /// [`Error::Value`] naming the variable.
    pub(super) fn new(environment: &impl Fn(&str) -> Option<String>) -> Result<Self> {
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        let expanded = |path: &str| variables(&home(path, environment), environment);
        let own = set("HF_HOME").unwrap_or_else(|| {
            let caches =
                set("XDG_CACHE_HOME").unwrap_or_else(|| join(&home("~", environment), ".cache"));
            join(&caches, "huggingface")
        });
        let own = expanded(&own);
        let cache = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE"));
        let cache = expanded(&cache.unwrap_or_else(|| join(&own, "hub")));
        if cache.starts_with('~') {
            let remedy = "this user has no home; name a folder to keep models in";
            return Err(Error::value("HF_HOME", format!("{own:?}"), remedy));
        }
        let offline = set("HF_HUB_OFFLINE").or_else(|| set("TRANSFORMERS_OFFLINE"));
        let timeout = match set("HF_HUB_DOWNLOAD_TIMEOUT") {
            None => TIMEOUT_SECONDS,
            Some(text) => match text.trim().parse() {
                Ok(seconds @ 1..=86_400) => seconds,
                _ => {
                    let remedy = "must be whole seconds from 1 to 86400";
                    return Err(Error::value("HF_HUB_DOWNLOAD_TIMEOUT", text, remedy));
                }
            },
        };
        Ok(Self {
            endpoint: set("HF_ENDPOINT")
                .unwrap_or_else(|| PUBLIC.into())
                .trim_end_matches('/')
                .into(),
            cache: cache.into(),
            token: expanded(&set("HF_TOKEN_PATH").unwrap_or_else(|| join(&own, "token"))).into(),
            offline: offline.is_some_and(|value| truth(&value)),
            timeout: Duration::from_secs(timeout),
        })
    }

    /// `HF_TOKEN`, else what a login left; nothing where `HF_HUB_DISABLE_IMPLICIT_TOKEN` says so.
    pub(super) fn token(&self, environment: &impl Fn(&str) -> Option<String>) -> Option<String> {
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        if set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|value| truth(&value)) {
            return None;
        }
        let clean = |token: String| {
            let token: String =
                token.chars().filter(|letter| !matches!(letter, '\r' | '\n')).collect();
            Some(token.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let named = set("HF_TOKEN").or_else(|| set("HUGGING_FACE_HUB_TOKEN")).and_then(clean);
        named.or_else(|| clean(read::text(&self.token, 4096).ok()?))
    }
}

/// The process's environment.
pub(super) fn environment(name: &str) -> Option<String> {
    env::var(name).ok()
}

fn truth(value: &str) -> bool {
    matches!(value.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
}

/// As Python's `os.path.join`.
fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() || folder.ends_with('/') {
        format!("{folder}{name}")
    } else {
        format!("{folder}/{name}")
    }
}

/// As Python's `os.path.expanduser`: `~` and `~user` at the start, where there is such a home.
fn home(path: &str, environment: &impl Fn(&str) -> Option<String>) -> String {
    let Some(named) = path.strip_prefix('~') else { return path.to_owned() };
    let (user, rest) = named.split_at(named.find('/').unwrap_or(named.len()));
    let home = match user {
        "" => environment("HOME").or_else(|| Some(env::home_dir()?.to_str()?.to_owned())),
        user => home_of(user),
    };
    let Some(home) = home else { return path.to_owned() };
    let expanded = format!("{}{rest}", home.trim_end_matches('/'));
    if expanded.is_empty() { "/".into() } else { expanded }
}

/// The home of another user, where the system keeps users in a file.
fn home_of(user: &str) -> Option<String> {
    let users = fs::read_to_string("/etc/passwd").ok()?;
    let line = users.lines().find(|line| line.split(':').next() == Some(user))?;
    line.split(':').nth(5).map(str::to_owned)
}

/// As Python's `os.path.expandvars`: `$NAME` and `${NAME}`; what is not set stays as it is.
fn variables(path: &str, environment: &impl Fn(&str) -> Option<String>) -> String {
    let mut expanded = String::new();
    let mut rest = path;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        rest = &rest[at..];
        let plain = rest[1..].find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let plain = &rest[1..plain.map_or(rest.len(), |end| 1 + end)];
        let braced = rest.strip_prefix("${").and_then(|inside| inside.split_once('}'));
        let (name, length) = match braced {
            Some((name, _)) => (name, name.len() + 3),
            None => (plain, plain.len() + 1),
        };
        match environment(name).filter(|_| length > 1) {
            Some(value) => expanded.push_str(&value),
            None => expanded.push_str(&rest[..length]),
        }
        rest = &rest[length..];
    }
    expanded + rest
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, path::Path};

    use serde_json::Value;

    use super::*;

    /// `tests/golden/make_hub.py` asked the real `huggingface_hub`.
    #[test]
    fn places_are_those_of_pythons_huggingface_hub() {
        let table = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/hub.json");
        let table: Value = serde_json::from_str(&std::fs::read_to_string(table).unwrap()).unwrap();
        let cases = table["cases"].as_array().unwrap();
        assert!(cases.len() > 20);
        for case in cases {
            let variables: HashMap<String, String> =
                serde_json::from_value(case["environment"].clone()).unwrap();
            let environment = |name: &str| variables.get(name).cloned();
            let places = Places::new(&environment).unwrap();
            let path = |name: &str| Path::new(case[name].as_str().unwrap());
            assert_eq!(places.cache, path("cache"), "{case}");
            assert_eq!(places.token, path("token_path"), "{case}");
            assert_eq!(places.offline, case["offline"], "{case}");
            assert_eq!(places.endpoint, case["endpoint"], "{case}");
            let token = places.token(&environment);
            assert_eq!(token.as_deref(), case["token"].as_str(), "{case}");
        }
    }

    #[test]
    fn an_empty_variable_says_nothing_and_a_wrong_one_is_named() {
        let places = |set: &'static [(&str, &str)]| {
            let environment = move |name: &str| {
                let found = set.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            Places::new(&environment)
        };
        let plain = places(&[("HOME", "/h")]).unwrap();
        let empty = [("HOME", "/h"), ("HF_HOME", ""), ("HF_HUB_CACHE", ""), ("HF_ENDPOINT", "")];
        assert_eq!(places(Box::leak(Box::new(empty))).unwrap(), plain);
        let problem = places(&[("HOME", "/h"), ("HF_HUB_DOWNLOAD_TIMEOUT", "soon")]).unwrap_err();
        assert!(problem.to_string().contains("`HF_HUB_DOWNLOAD_TIMEOUT` is soon"));
    }
}
