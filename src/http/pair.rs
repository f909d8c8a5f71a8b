//! A teacher's request and its student's, in the engine together.

use std::{future::poll_fn, task::Poll, time::Instant};

use super::{
    App,
    error::Problem,
    generate::ParsedRequest,
    run::{Finished, Run},
};
use crate::engine::Event;

/// One of a pair; as a number, its place where a reply lists both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Teacher = 0,
    Student = 1,
}

/// Two requests for the same images. Dropping it cancels what has not finished of either.
pub(super) struct Pair {
    pub(super) teacher: Run,
    pub(super) student: Run,
}

impl Pair {
    /// Both are admitted together; they share the device from the start, and the student goes first where neither has a
    /// claim.
    pub(super) fn new(
        app: &App,
        [teacher, student]: [ParsedRequest; 2],
        received: Instant,
    ) -> Result<Self, Problem> {
        let requests = [student.request.clone(), teacher.request.clone()];
        let asked = Instant::now();
        let [students, teachers] = app.engine.generate_both(requests)?;
        Ok(Self {
            teacher: Run::of(teacher, teachers, received, asked),
            student: Run::of(student, students, received, asked),
        })
    }

    pub(super) fn side(&self, side: Side) -> &Run {
        match side {
            Side::Teacher => &self.teacher,
            Side::Student => &self.student,
        }
    }

    /// The next event and whose it is; `None` once every image of both is completed or failed.
    pub(super) async fn next(&mut self) -> Option<(Side, Event)> {
        poll_fn(|context| {
            // The student's news first: its image is to be out before the teacher's.
            let student = self.student.poll_next(context);
            if let Poll::Ready(Some(event)) = student {
                return Poll::Ready(Some((Side::Student, event)));
            }
            match self.teacher.poll_next(context) {
                Poll::Ready(Some(event)) => Poll::Ready(Some((Side::Teacher, event))),
                Poll::Ready(None) if student.is_ready() => Poll::Ready(None),
                Poll::Ready(None) | Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    /// Waits for all images. The first failure cancels the rest.
    pub(super) async fn finish(mut self) -> Result<[Finished; 2], Problem> {
        while let Some((_, event)) = self.next().await {
            if let Event::Failed { failure, .. } = event {
                return Err(failure.into());
            }
        }
        self.finished()
    }

    /// What has come of the teacher's and of the student's, once all is over.
    pub(super) fn finished(self) -> Result<[Finished; 2], Problem> {
        Ok([self.teacher.finished()?, self.student.finished()?])
    }
}
