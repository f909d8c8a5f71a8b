//! How far a count has come: a bar on a terminal, a line every ten seconds elsewhere.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

/// Between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Counts one kind of thing on standard error.
pub(super) struct Counter {
    what: &'static str,
    total: usize,
    began: Instant,
    shown: Instant,
    bar: Option<ProgressBar>,
}

impl Counter {
    /// Begins at 0 of `total`; `what` names the things.
    pub(super) fn new(what: &'static str, total: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{bar:30} {pos}/{len} {msg}  {per_sec}  {elapsed} elapsed, {eta} to go";
            let style = ProgressStyle::with_template(style);
            ProgressBar::new(total as u64)
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
                .with_message(what)
        });
        Self { what, total, began: Instant::now(), shown: Instant::now(), bar }
    }

    /// So many are done; `note` says more.
    pub(super) fn at(&mut self, done: usize, note: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{} {note}", self.what));
            bar.set_position(done as u64);
            return;
        }
        if self.shown.elapsed() < LINE_EVERY && done < self.total {
            return;
        }
        self.shown = Instant::now();
        let seconds = self.began.elapsed().as_secs_f64();
        let rate = done as f64 / seconds.max(1e-9);
        let left = Duration::from_secs((self.total.saturating_sub(done) as f64 / rate) as u64);
        eprintln!(
            "{done}/{} {} {note}  {rate:.1}/s  {} to go",
            self.total,
            self.what,
            HumanDuration(left)
        );
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
