//! Names like a misspelt one.

/// Names of which one is a misspelt other are at least this like each other, of 1.
const ALIKE: f64 = 0.8;

/// The name that is most like `misspelt` (Damerau and Levenshtein's distance by length), where one is.
pub fn nearest<'a>(names: impl IntoIterator<Item = &'a str>, misspelt: &str) -> Option<&'a str> {
    let likeness = |name| strsim::normalized_damerau_levenshtein(name, misspelt);
    let names = names.into_iter().map(|name| (likeness(name), name));
    let (likeness, name) = names.max_by(|(one, _), (other, _)| one.total_cmp(other))?;
    (likeness >= ALIKE).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_is_like_none_has_no_nearest() {
        let names = ["steps", "learning-rate", "rho"];
        assert_eq!(nearest(names, "stepz"), Some("steps"));
        assert_eq!(nearest(names, "learning_rate"), Some("learning-rate"));
        assert_eq!(nearest(names, "colour"), None);
        assert_eq!(nearest([], "steps"), None);
    }
}
