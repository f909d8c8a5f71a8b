//! A training run on the terminal: a bar with losses, rate and time to go, or plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use understudy_distill::watch::{Event, Record, Watch};

/// Shows events.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    shown: Option<Instant>,
}

/// Between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    /// On a terminal a bar, else lines.
    pub(super) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = "{bar:30} {pos}/{len}  {msg}  {elapsed} elapsed, {eta} to go";
            let style = ProgressStyle::with_template(style);
            let bar = ProgressBar::new(0);
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, shown: None }
    }

    /// Whether it is time for another line.
    fn due(&mut self) -> bool {
        let due = self.bar.is_none() && self.shown.is_none_or(|shown| shown.elapsed() > LINE_EVERY);
        if due {
            self.shown = Some(Instant::now());
        }
        due
    }

    fn preparing(&mut self, done: f64) {
        let message = format!("the teacher prepares the first lesson: {:.0} %", 100.0 * done);
        if self.due() {
            eprintln!("{message}");
        }
        if let Some(bar) = &self.bar {
            bar.set_message(message);
        }
    }

    fn step(&mut self, record: &Record, steps: u64) {
        let due = self.due();
        match &self.bar {
            Some(bar) => {
                if bar.length() != Some(steps) {
                    bar.set_length(steps);
                    bar.set_position(record.step - 1);
                    // The time to go is that of the steps from here on.
                    bar.reset_eta();
                }
                bar.set_position(record.step);
                bar.set_message(figures(record));
                if record.step == steps {
                    bar.finish();
                }
            }
            None if due || record.step == steps => {
                let rate = record.seconds / record.step as f64;
                let left = Duration::from_secs((rate * (steps - record.step) as f64) as u64);
                eprintln!(
                    "step {}/{steps}  {}  {} to go",
                    record.step,
                    figures(record),
                    indicatif::HumanDuration(left)
                );
            }
            None => {}
        }
    }
}

fn figures(record: &Record) -> String {
    let vlb = record.vlb.map(|vlb| format!("  vlb {vlb:.5}")).unwrap_or_default();
    format!("loss {:.5}{vlb}  {:.1} images/s", record.simple, record.images_per_second)
}

impl Watch for Progress {
    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Resumed { step } => eprintln!("going on from the checkpoint of step {step}"),
            Event::Preparing { done } => self.preparing(done),
            Event::Step { record, steps } => self.step(record, steps),
            Event::Checkpoint { .. } => {}
        }
    }
}
