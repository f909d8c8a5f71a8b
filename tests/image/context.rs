//! What `docker build` sends: `.dockerignore` by Docker's own rules (`moby/patternmatcher`).

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The lines of a `.dockerignore`, in their order: the last that matches a path decides.
pub(crate) struct Rules(Vec<Rule>);

struct Rule {
    /// `!`: the path is sent after all.
    keep: bool,
    /// Without `.`, empty and trailing components, as Go's `filepath.Clean` leaves it.
    pattern: String,
}

impl Rules {
    pub(crate) fn parse(text: &str) -> Self {
        let rules = text
            .trim_start_matches('\u{feff}')
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| {
                let line = line.trim();
                let (keep, pattern) = match line.strip_prefix('!') {
                    Some(rest) => (true, rest.trim()),
                    None => (false, line),
                };
                let mut parts: Vec<&str> = Vec::new();
                for part in pattern.split('/') {
                    match part {
                        "" | "." => {}
                        ".." => drop(parts.pop()),
                        part => parts.push(part),
                    }
                }
                // An empty line says nothing; `.` alone would be the context itself, which is never ignored.
                (!parts.is_empty()).then(|| Rule { keep, pattern: parts.join("/") })
            });
        Self(rules.collect())
    }

    /// Whether a file at this path, relative to the context with `/` between components, stays behind. A rule
    /// that matches a folder matches all below it.
    pub(crate) fn ignored(&self, path: &str) -> bool {
        let mut ignored = false;
        for rule in &self.0 {
            let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
            if ignored == rule.keep
                && ends.into_iter().any(|end| matches(&rule.pattern, &path[..end]))
            {
                ignored = !rule.keep;
            }
        }
        ignored
    }
}

/// `**` is any number of folders, `*` and `?` stay within one, `[a-z]` and `[^a-z]` are one character, `\` takes the
/// next one as it is.
fn matches(pattern: &str, path: &str) -> bool {
    let mut rest = pattern.chars();
    let Some(first) = rest.next() else {
        return path.is_empty();
    };
    let character = path.chars().next();
    let tail = &path[character.map_or(0, char::len_utf8)..];
    match first {
        '*' if rest.as_str().starts_with('*') => {
            let rest = rest.as_str()[1..].trim_start_matches('/');
            let below = path.match_indices('/').map(|(at, _)| &path[at + 1..]);
            rest.is_empty() || [path].into_iter().chain(below).any(|path| matches(rest, path))
        }
        '*' => {
            let end = path.find('/').unwrap_or(path.len());
            (0..=end)
                .filter(|end| path.is_char_boundary(*end))
                .any(|end| matches(rest.as_str(), &path[end..]))
        }
        '?' => character.is_some_and(|character| character != '/') && matches(rest.as_str(), tail),
        '[' => {
            let (class, rest) = rest.as_str().split_once(']').expect("a closed class");
            character.is_some_and(|character| character != '/' && is_in(class, character))
                && matches(rest, tail)
        }
        '\\' => {
            let escaped = rest.next();
            escaped.is_some() && escaped == character && matches(rest.as_str(), tail)
        }
        first => character == Some(first) && matches(rest.as_str(), tail),
    }
}

fn is_in(class: &str, character: char) -> bool {
    let (negated, class) = class.strip_prefix('^').map_or((false, class), |class| (true, class));
    let members: Vec<char> = class.chars().collect();
    let mut at = 0;
    let mut found = false;
    while at < members.len() {
        let last =
            if members.get(at + 1) == Some(&'-') && at + 2 < members.len() { at + 2 } else { at };
        found |= (members[at]..=members[last]).contains(&character);
        at = last + 1;
    }
    found != negated
}

/// The files below a folder that the rules send. Folders named `target` at the top are not walked: they are large.
pub(crate) fn context(folder: &Path, rules: &Rules) -> BTreeSet<PathBuf> {
    assert!(rules.0.is_empty() || rules.ignored("target/x"), "what was built would be sent");
    let mut found = BTreeSet::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(below) = pending.pop() {
        for entry in fs::read_dir(folder.join(&below)).unwrap() {
            let entry = entry.unwrap();
            let path = below.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                if path != Path::new("target") {
                    pending.push(path);
                }
            } else if !rules.ignored(path.to_str().unwrap()) {
                found.insert(path);
            }
        }
    }
    found
}

#[test]
fn rules_read_as_docker_reads_them() {
    for (rules, path, ignored) in [
        // One component, and all below it.
        ("*", "a", true),
        ("*", "a/b/c", true),
        ("*.rs", "a.rs", true),
        ("*.rs", "a/b.rs", false),
        ("a", "a/b/c", true),
        ("a", "b/a", false),
        ("a/", "a/b", true),
        ("/a", "a/b", true),
        ("./a/../b", "b/c", true),
        // Order: the last word counts.
        ("*\n!a", "a/b", false),
        ("*\n!a\na/b", "a/b/c", true),
        ("*\n!a\na/b\n!a/b/c", "a/b/c", false),
        ("!a\n*", "a", true),
        ("*\n!a/b", "a/c", true),
        ("*\n!a/b", "a/b/c", false),
        ("* \n! a ", "a", false),
        // `**` is any number of folders, none among them.
        ("**/.*", ".env", true),
        ("**/.*", "a/b/.env", true),
        ("**/.*", "a/.git/config", true),
        ("**/.*", "a/b.env", false),
        ("a/**/b", "a/b", true),
        ("a/**/b", "a/c/d/b/e", true),
        ("a/**", "a/b/c", true),
        ("a/**", "b", false),
        ("**/target", "x/y/target/z", true),
        ("**/target", "x/targets", false),
        ("**", "a/b", true),
        // Characters.
        ("a?c", "abc", true),
        ("a?c", "a/c", false),
        ("[a-c]x", "bx", true),
        ("[^a-c]x", "bx", false),
        ("\\*", "*", true),
        ("\\*", "a", false),
        // Comments and empty lines.
        ("# a\n\n#b\n", "a", false),
        ("#a", "#a", false),
    ] {
        assert_eq!(Rules::parse(rules).ignored(path), ignored, "{path} under {rules:?}");
    }
}
