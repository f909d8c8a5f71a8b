//! Whether experiments can be kept now, as health and metrics tell it.

use std::sync::{Mutex, PoisonError};

use prometheus::{IntCounter, IntGauge};

/// Why nothing was kept when somebody last asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// A sentence.
    pub problem: String,
    /// Whether the database is damaged: what can be read of it may be wrong.
    pub damaged: bool,
}

/// Shared by the thread that owns the database and those who tell.
#[derive(Debug)]
pub(super) struct Condition {
    trouble: Mutex<Option<Trouble>>,
    pub(super) failing: IntGauge,
    pub(super) panics: IntCounter,
}

impl Condition {
    /// # Errors
    /// Only for a name that Prometheus does not take, which is a mistake in this file.
    pub(super) fn new() -> prometheus::Result<Self> {
        Ok(Self {
            trouble: Mutex::default(),
            failing: IntGauge::new(
                "understudy_experiments_failing",
                "1 while experiments and votes cannot be kept, else 0.",
            )?,
            panics: IntCounter::new(
                "understudy_experiments_panics_total",
                "Panics of the database of experiments.",
            )?,
        })
    }

    /// Something was written.
    pub(super) fn kept(&self) {
        self.set(None);
    }

    pub(super) fn failed(&self, problem: String, damaged: bool) {
        let damaged = damaged || self.trouble().is_some_and(|trouble| trouble.damaged);
        self.set(Some(Trouble { problem, damaged }));
    }

    pub(super) fn panicked(&self, problem: String) {
        self.panics.inc();
        self.set(Some(Trouble { problem, damaged: true }));
    }

    pub(super) fn trouble(&self) -> Option<Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, trouble: Option<Trouble>) {
        self.failing.set(trouble.is_some().into());
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }
}
