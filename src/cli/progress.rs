//! How far long work has come: a bar on a terminal, plain lines otherwise; both on standard error.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a line is written where there is no terminal.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Work of a known size under way.
pub(super) struct Progress {
    /// `None` where there is no terminal.
    bar: Option<ProgressBar>,
    unit: &'static str,
    total: f64,
    done: f64,
    began: Instant,
    told: Instant,
}

impl Progress {
    /// `total` of `unit` (a plural) are to be done.
    pub(super) fn new(total: usize, unit: &'static str) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:40} {msg}");
            ProgressBar::new(1000)
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        let now = Instant::now();
        Self { bar, unit, total: total as f64, done: 0.0, began: now, told: now }
    }

    /// So much more is done.
    pub(super) fn advance(&mut self, by: f64) {
        self.done += by;
        if let Some(bar) = &self.bar {
            bar.set_position((1000.0 * self.done / self.total) as u64);
            bar.set_message(self.text());
        } else if self.told.elapsed() >= PLAIN_EVERY {
            self.told = Instant::now();
            // Who does not read it can do without.
            let _ = writeln!(io::stderr(), "{}", self.text());
        }
    }

    fn text(&self) -> String {
        let rate = self.done / self.began.elapsed().as_secs_f64();
        let left = (self.total - self.done) / rate;
        let Self { unit, total, done, .. } = self;
        format!("{done:.0} of {total} {unit}, {rate:.2} a second, {left:.0} s to go")
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
