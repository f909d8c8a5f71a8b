//! Which names may stand in a path, a label or a request's `model`.

/// Whether it may name a model or an experiment: `[A-Za-z0-9._-]+`, neither `.` nor `..` nor a name that
/// means something else as a request's `model`.
pub(crate) fn is_id(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let reserved = matches!(name, "." | ".." | "auto" | "draft");
    !name.is_empty() && name.chars().all(plain) && !reserved
}

/// What is wrong with a folder whose name [`is_id`] refuses, and the remedy.
pub(crate) const UNUSABLE_NAME: &str = "its name is reserved, or has other characters than letters, digits, `.`, `_` and `-`; rename it";
