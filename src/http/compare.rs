//! `POST /v1/compare`: the same images by a teacher and its student, and how they compare.

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::Request,
    response::{IntoResponse, Response},
};
use futures_util::future::try_join;

use super::{
    App,
    accept::Wanted,
    body,
    caller::Caller,
    comparison::compared,
    error::Problem,
    generate::{ParsedRequest, Shape},
    observe::Received,
    pair::Pair,
    run::Delivery,
    stream,
    wire::{
        CompareReply, CompareRequest, CompareStreamed, ErrorReply, GenerationRequest, OneOrTwo,
    },
};
use crate::registry::Model;

/// Makes the same images with a teacher and its student, and compares them.
///
/// Both start from the same noise, and where both samplers are stochastic with equal steps every step
/// adds the same noise. The two run side by side, sharing the device, so each takes longer than alone.
#[utoipa::path(post, path = "/v1/compare", tag = "images",
    request_body(content = CompareRequest, example = json!(
        {"n": 1, "seed": 7, "num_inference_steps": 10, "scheduler": ["ddim", "dpm++"]}
    )),
    responses(
        (status = 200, description = "Both models' images and how they compare; events when asked for", content(
            (CompareReply = "application/json"),
            (CompareStreamed = "text/event-stream"),
        )),
        (status = 404, description = "No such model, or no student", body = ErrorReply),
        (status = 429, description = "The queue is full, or too long for the deadline", body = ErrorReply),
        (status = 503, description = "Not ready, or shutting down", body = ErrorReply),
))]
pub(super) async fn compare(
    Caller(app): Caller,
    Extension(Received(received)): Extension<Received>,
    request: Request,
) -> Result<Response, Problem> {
    let wire: CompareRequest = body::json(&app, request).await?;
    let in_flight = app.in_flight.token();
    let wires = wire.sides()?;
    let models = match &wires {
        [
            GenerationRequest { model: Some(teacher), .. },
            GenerationRequest { model: Some(student), .. },
        ] => [app.model(Some(teacher))?, app.model(Some(student))?],
        _ => app.pair("models", "absent")?,
    };
    let plans = ParsedRequest::pair(&app.settings, models, wires, Wanted::Json, received).await?;
    let shape = plans[0].shape;
    let pair = Pair::new(&app, plans, received)?;
    if shape == Shape::Events {
        return Ok(stream::comparison(app, pair, received, in_flight));
    }
    let sides = pair.finish().await?;
    let (sides, comparison) = compared(&app.metrics, sides).await?;
    let [teacher, student] = &sides;
    let (teachers, students) = try_join(teacher.data(), student.data()).await?;
    sides.iter().for_each(|side| side.observe(&app, Delivery::Whole));
    let pair = vec![teacher.reply(teachers), student.reply(students)];
    Ok(Json(CompareReply { pair, comparison }).into_response())
}

impl<T: Clone> OneOrTwo<T> {
    fn each(field: &str, value: Option<&Self>) -> Result<[Option<T>; 2], Problem> {
        match value {
            None => Ok([None, None]),
            Some(Self::One(both)) => Ok([Some(both.clone()), Some(both.clone())]),
            Some(Self::Two(list)) => match &list[..] {
                [teacher, student] => Ok([Some(teacher.clone()), Some(student.clone())]),
                _ => {
                    let value = format!("a list of {}", list.len());
                    let remedy = "send one value for both models, or a list of two: the teacher's and the student's";
                    Err(Problem::value(field, value, remedy))
                }
            },
        }
    }
}

impl CompareRequest {
    /// The two requests it stands for, the teacher's first; where one draws a seed, so does the other.
    fn sides(&self) -> Result<[GenerationRequest; 2], Problem> {
        let [teacher, student] = match self.models.as_deref() {
            None => [None, None],
            Some([teacher, student]) => [Some(teacher.clone()), Some(student.clone())],
            Some(list) => {
                let value = format!("a list of {}", list.len());
                let remedy = "two models are compared; send the teacher's id and the student's, or leave it out for the default pair";
                return Err(Problem::value("models", value, remedy));
            }
        };
        let steps = OneOrTwo::each("num_inference_steps", self.num_inference_steps.as_ref())?;
        let schedulers = OneOrTwo::each("scheduler", self.scheduler.as_ref())?;
        let [teachers_steps, students_steps] = steps;
        let [teachers_scheduler, students_scheduler] = schedulers;
        let side = |model, num_inference_steps, scheduler| GenerationRequest {
            model,
            num_inference_steps,
            scheduler,
            n: self.n,
            response_format: self.response_format.clone(),
            stream: self.stream,
            partial_images: self.partial_images,
            ..GenerationRequest::from(self)
        };
        Ok([
            side(teacher, teachers_steps, teachers_scheduler),
            side(student, students_steps, students_scheduler),
        ])
    }
}

impl App {
    /// The default model and its first student; `field` is what asked for them, with `value`.
    pub(super) fn pair(&self, field: &str, value: &str) -> Result<[Arc<Model>; 2], Problem> {
        let teacher = self.model(None)?;
        match self.registry.default_pair().1 {
            Some(student) => Ok([teacher, student]),
            None => Err(Problem::no_student(field, value, &teacher.id)),
        }
    }
}
