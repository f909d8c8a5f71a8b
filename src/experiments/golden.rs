//! What statsmodels and scipy say of a few tallies: `tests/golden/make_preference.py`.
#![allow(clippy::unwrap_used)]

/// One tally and what follows from it.
#[derive(Debug, serde::Deserialize)]
pub(super) struct Case {
    pub(super) wins: u64,
    pub(super) losses: u64,
    pub(super) wilson: [f64; 2],
    pub(super) ln_ratio: f64,
}

pub(super) fn cases() -> Vec<Case> {
    #[derive(serde::Deserialize)]
    struct Golden {
        cases: Vec<Case>,
    }
    let text = include_str!("../../tests/golden/preference.json");
    serde_json::from_str::<Golden>(text).unwrap().cases
}
