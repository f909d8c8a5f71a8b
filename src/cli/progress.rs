//! How far long work has come, on standard error: a bar on a terminal, a line every ten seconds
//! elsewhere.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use understudy_distill::watch::{Event, Record, Watch};

/// Between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Work of a known size under way.
pub(super) struct Progress {
    what: &'static str,
    total: usize,
    /// What was done before.
    start: usize,
    began: Instant,
    told: Instant,
    /// `None` where there is no terminal.
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Begins at `start` of `total`; `what` names the things (a plural).
    pub(super) fn new(what: &'static str, start: usize, total: usize) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let style = "{bar:30} {pos}/{len} {msg}  {per_sec}  {elapsed} elapsed, {eta} to go";
            let style = ProgressStyle::with_template(style);
            let bar = ProgressBar::new(total as u64)
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
                .with_message(what)
                .with_position(start as u64);
            // The time to go is that of what is left.
            bar.reset_eta();
            bar
        });
        let now = Instant::now();
        Self { what, total, start, began: now, told: now, bar }
    }

    /// So many are done; `note` says more.
    pub(super) fn at(&mut self, done: usize, note: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{} {note}", self.what));
            bar.set_position(done as u64);
        } else if self.told.elapsed() >= LINE_EVERY || done >= self.total {
            self.told = Instant::now();
            let rate = (done - self.start) as f64 / self.began.elapsed().as_secs_f64().max(1e-9);
            let left = self.total.saturating_sub(done) as f64 / rate;
            let left = Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX);
            let Self { what, total, .. } = self;
            let left = HumanDuration(Duration::from_secs(left.as_secs()));
            tell(format_args!("{done}/{total} {what} {note}  {rate:.1}/s  {left} to go"));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Who does not read standard error can do without.
fn tell(line: std::fmt::Arguments) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// A training run: first its pool, then its steps.
#[derive(Default)]
pub(super) struct TrainingProgress {
    pool: Option<Progress>,
    steps: Option<Progress>,
}

impl Watch for TrainingProgress {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Resumed { step, unsaid } => {
                tell(format_args!("going on from the checkpoint of step {step}"));
                if !unsaid.is_empty() {
                    tell(format_args!(
                        "it was written by an earlier version and does not say: {}; what is given now counts",
                        unsaid.join(", ")
                    ));
                }
            }
            Event::Preparing { done } => self
                .pool
                .get_or_insert_with(|| {
                    Progress::new("% of the first training batch prepared by the teacher", 0, 100)
                })
                .at((100.0 * done) as usize, ""),
            Event::Step { record, steps } => {
                self.pool = None;
                let step = record.step as usize;
                self.steps
                    .get_or_insert_with(|| Progress::new("steps", step - 1, steps as usize))
                    .at(step, &figures(record));
            }
            Event::Checkpoint { .. } => {}
        }
    }
}

fn figures(record: &Record) -> String {
    let vlb = record.vlb.map(|vlb| format!("  vlb {vlb:.5}")).unwrap_or_default();
    format!("loss {:.5}{vlb}  {:.1} images/s", record.simple, record.images_per_second)
}
