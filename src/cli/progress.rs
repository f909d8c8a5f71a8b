//! How far long work has come, on standard error: a bar on a terminal, a line every ten seconds
//! elsewhere.

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use understudy_distill::{
    estimate::Estimate,
    watch::{Event, Record, Watch},
};

use super::{grouped, interrupt::Interrupt};
use crate::mlflow::{Status, Tracking};

/// Between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The end of a dry run.
pub(super) const DRY: &str = "Nothing was written: this was a dry run.";

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
    /// Begins at `start` of `total`; `what` says what is done, such as "Sampling".
    pub(super) fn new(what: &'static str, start: usize, total: usize) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            // Never wider than the terminal, which cuts what does not fit.
            let style = ProgressStyle::with_template("{prefix} [{bar:12}] {wide_msg}");
            ProgressBar::new(total as u64)
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
                .with_prefix(what)
                .with_position(start as u64)
        });
        let now = Instant::now();
        Self { what, total, start, began: now, told: now, bar }
    }

    /// So many are done; `note` says more.
    pub(super) fn at(&mut self, done: usize, note: &str) {
        let due = self.bar.is_some() || self.told.elapsed() >= LINE_EVERY || done >= self.total;
        if !due {
            return;
        }
        self.told = Instant::now();
        let percent = (100 * done).checked_div(self.total).unwrap_or(100);
        let counted = match self.total {
            // Percents need no count.
            100 => String::new(),
            total => format!("{}/{}  ", grouped(done), grouped(total)),
        };
        let line = format!("{percent} %  {counted}{}{note}", self.left(done));
        let line = line.trim_end();
        match &self.bar {
            Some(bar) => {
                bar.set_position(done as u64);
                bar.set_message(line.to_owned());
            }
            None => tell(format_args!("{}: {line}", self.what)),
        }
    }

    /// The time to go, at the mean rate since the work began: steadier than one of late.
    fn left(&self, done: usize) -> String {
        let rate = done.saturating_sub(self.start) as f64 / self.began.elapsed().as_secs_f64();
        let left = self.total.saturating_sub(done) as f64 / rate;
        match Duration::try_from_secs_f64(left) {
            Ok(left) if done > self.start && done < self.total => {
                format!("{} left  ", duration(left))
            }
            _ => String::new(),
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

/// A duration in its largest unit.
pub(super) fn duration(duration: Duration) -> HumanDuration {
    HumanDuration(Duration::from_secs(duration.as_secs_f64().round() as u64))
}

/// Who does not read standard error can do without.
fn tell(line: std::fmt::Arguments) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// A training run: what it will cost, then its first training batch, then its steps.
pub(super) struct TrainingProgress {
    /// What is done before the first step.
    preparing: &'static str,
    dry_run: bool,
    /// Another process tells.
    silent: bool,
    /// Seconds that a report takes after a run of so many.
    report: Option<fn(f64) -> f64>,
    interrupt: Interrupt,
    began: Instant,
    prepared: Option<Progress>,
    steps: Option<Progress>,
    /// What the estimate came to, in seconds; 0 where there was nothing left to estimate.
    estimated_seconds: f64,
    /// Who else is told.
    tracking: Option<Tracking>,
}

impl TrainingProgress {
    /// Watches a run that stops after its estimate, or when it is interrupted; `preparing` says what is done before
    /// the first step.
    pub(super) fn new(
        preparing: &'static str,
        dry_run: bool,
        interrupt: Interrupt,
        tracking: Option<Tracking>,
    ) -> Self {
        let (began, prepared, steps) = (Instant::now(), None, None);
        let (report, estimated_seconds) = (None, 0.0);
        Self {
            preparing,
            dry_run,
            silent: false,
            report,
            interrupt,
            began,
            prepared,
            steps,
            estimated_seconds,
            tracking,
        }
    }

    /// Tells nothing where another process that shares the run does.
    pub(super) fn silent(self, silent: bool) -> Self {
        Self { silent, ..self }
    }

    /// How the run ended, and its report where it has one.
    pub(super) fn ended(&mut self, status: Status, report: Option<PathBuf>) {
        if let Some(tracking) = &mut self.tracking {
            tracking.ended(status, report);
        }
    }

    /// What is left of the run, in seconds, as it was measured at its beginning; 0 of one that had ended before.
    pub(super) fn estimated_seconds(&self) -> f64 {
        self.estimated_seconds
    }

    /// A report follows, which takes so many seconds after a run of so many.
    pub(super) fn before_report(self, seconds: fn(f64) -> f64) -> Self {
        Self { report: Some(seconds), ..self }
    }

    /// The end of a run that was to stop.
    ///
    /// # Errors
    /// A sentence that says how to go on, unless a dry run was asked for, which ends so.
    pub(super) fn stopped(mut self, step: u64, out: &Path) -> Result<(), String> {
        self.ended(Status::Killed, None);
        // What follows stands on a line of its own.
        self.prepared = None;
        self.steps = None;
        if self.dry_run {
            return Ok(());
        }
        Err(format!(
            "interrupted after step {}; {} holds a checkpoint: give the same command again to go on",
            grouped(step as usize),
            out.display()
        ))
    }

    /// The seconds since it began.
    pub(super) fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// The time since it began, as the end of a list.
    pub(super) fn took(&self) -> String {
        format!(", {}", duration(self.began.elapsed()))
    }

    fn estimated(&mut self, estimate: &Estimate) {
        let seconds =
            |seconds: f64| duration(Duration::try_from_secs_f64(seconds).unwrap_or_default());
        if estimate.prepare_rows > 0 {
            tell(format_args!(
                "  {:<24} {} ({} evaluations of the teacher)",
                self.preparing,
                seconds(estimate.prepare_seconds),
                grouped(estimate.prepare_rows as usize)
            ));
        }
        tell(format_args!(
            "  {:<24} {} ({} steps of {:.3} s)",
            "Training",
            seconds(estimate.steps as f64 * estimate.step_seconds),
            grouped(estimate.steps as usize),
            estimate.step_seconds
        ));
        let report = self.report.map(|of| of(estimate.seconds()));
        if let Some(report) = report {
            tell(format_args!("  {:<24} {}", "Report, at most", seconds(report)));
        }
        let total = estimate.seconds() + report.unwrap_or(0.0);
        self.estimated_seconds = total;
        tell(format_args!("  {:<24} {}", "In all", seconds(total)));
        let memory = match estimate.memory_bytes {
            Some(bytes) => format!("{} of memory, ", HumanBytes(bytes)),
            None => String::new(),
        };
        tell(format_args!(
            "  {:<24} {memory}{} on disk",
            "At most",
            HumanBytes(estimate.disk_bytes)
        ));
    }
}

impl Watch for TrainingProgress {
    fn event(&mut self, event: Event<'_>) {
        if self.silent {
            return;
        }
        if let Some(tracking) = &mut self.tracking {
            tracking.event(event);
        }
        match event {
            Event::Begun { .. } | Event::Checkpoint { .. } => {}
            Event::Resumed { step, unsaid } => {
                tell(format_args!(
                    "Resuming from the checkpoint of step {}.",
                    grouped(step as usize)
                ));
                if !unsaid.is_empty() {
                    tell(format_args!(
                        "It was written by an earlier version and does not say: {}; what is given now counts.",
                        unsaid.join(", ")
                    ));
                }
            }
            Event::Estimated(estimate) => self.estimated(estimate),
            Event::Preparing { done } => {
                let preparing = self.preparing;
                self.prepared
                    .get_or_insert_with(|| Progress::new(preparing, (100.0 * done) as usize, 100))
                    .at((100.0 * done) as usize, "");
            }
            Event::Step { record, steps } => {
                self.prepared = None;
                let step = record.step as usize;
                self.steps
                    .get_or_insert_with(|| Progress::new("Training", step - 1, steps as usize))
                    .at(step, &figures(record));
            }
        }
    }

    fn stops(&self) -> bool {
        self.dry_run || self.interrupt.came()
    }
}

fn figures(record: &Record) -> String {
    let vlb = record.vlb.map(|vlb| format!("  vlb {vlb:.4}")).unwrap_or_default();
    let critic = record.critic.map(|loss| format!("  critic {loss:.4}")).unwrap_or_default();
    format!("loss {:.4}{vlb}{critic}", record.simple)
}
