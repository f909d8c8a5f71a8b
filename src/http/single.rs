//! A client's request that one model serves, and what is done beside its reply: its teacher may repeat it, and it may
//! count for an experiment.

use std::sync::Arc;

use super::{
    App,
    error::Problem,
    repetition::{self, Repetition},
    run::{Delivery, Finished, Run},
    wire::{GenerationRequest, Routing},
};
use crate::experiments::Experiment;

/// A request in the engine. Dropping it cancels what has not finished.
pub(super) struct Single {
    pub(super) run: Run,
    pub(super) beside: Beside,
}

/// What goes with a request beside its images.
pub(super) struct Beside {
    /// Why this model serves, where there was a choice.
    pub(super) routing: Option<Routing>,
    /// The experiment that it is for, and which of its arms serves it.
    pub(super) arm: Option<(Arc<Experiment>, usize)>,
    /// The teacher's repetition of a student's request.
    pub(super) shadow: Option<Box<Repetition>>,
}

impl Single {
    /// It is to be repeated by its teacher afterwards, if it is a student's and drawn for that.
    pub(super) fn new(app: &App, run: Run, wire: &GenerationRequest) -> Self {
        let shadow = repetition::of(app, run.plan(), wire);
        Self { run, beside: Beside { routing: None, arm: None, shadow } }
    }

    /// Waits for all images. The first failure cancels the rest.
    pub(super) async fn finish(self) -> Result<Served, Problem> {
        Ok(Served { finished: self.run.finish().await?, beside: self.beside })
    }

    /// What has come of it, once all is over.
    pub(super) fn finished(self) -> Result<Served, Problem> {
        Ok(Served { finished: self.run.finished()?, beside: self.beside })
    }
}

/// A request that is finished.
pub(super) struct Served {
    pub(super) finished: Finished,
    pub(super) beside: Beside,
}

impl Served {
    /// Counts its time, now that its reply is ready.
    pub(super) fn observe(&self, app: &App, delivery: Delivery) {
        self.finished.observe(app, delivery);
        if let Some((experiment, arm)) = &self.beside.arm {
            let seconds = self.finished.timings.total_ms / 1e3;
            let images = self.finished.images.len();
            app.experiments.served(experiment, *arm, images, seconds);
        }
    }
}
