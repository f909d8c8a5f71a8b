//! A span under way. The request's is at hand wherever its future runs, so that nothing has to be handed from function to
//! function; what outlives that future, such as a stream, keeps its own.

use std::{
    borrow::Cow,
    future::Future,
    sync::Arc,
    time::{Instant, SystemTime},
};

use axum::http::HeaderMap;
use opentelemetry::{
    Context, KeyValue,
    context::{FutureExt, WithContext},
    trace::{Span as _, SpanBuilder, SpanId, SpanKind, Status, TraceContextExt, TraceId, Tracer},
};
use opentelemetry_sdk::trace::SdkTracer;
use prometheus::IntCounter;

use super::{Traces, parent};

/// A span that records, and what those below it need.
#[derive(Clone)]
pub struct Span {
    context: Context,
    origin: Arc<Origin>,
}

/// Of a request.
struct Origin {
    tracer: SdkTracer,
    made: IntCounter,
    /// The same moment on both clocks: all times of a trace are as far apart as on the steady one.
    received: Instant,
    wall: SystemTime,
}

impl Origin {
    fn wall(&self, at: Instant) -> SystemTime {
        match at.checked_duration_since(self.received) {
            Some(after) => self.wall + after,
            None => self.wall - self.received.duration_since(at),
        }
    }

    fn begin(
        self: &Arc<Self>,
        builder: SpanBuilder,
        began: Instant,
        attributes: Vec<KeyValue>,
        parent: &Context,
    ) -> Context {
        let builder = builder.with_start_time(self.wall(began)).with_attributes(attributes);
        let span = self.tracer.build_with_context(builder, parent);
        if span.is_recording() {
            self.made.inc();
        }
        parent.with_span(span)
    }
}

impl Span {
    /// A request's, which was received now; `None` where the sampler wants none of it.
    pub(crate) fn of_request(
        traces: &Traces,
        headers: &HeaderMap,
        name: String,
        received: Instant,
        attributes: Vec<KeyValue>,
    ) -> Option<Self> {
        let (tracer, made) = (traces.tracer.clone(), traces.counts.made.clone());
        let origin = Arc::new(Origin { tracer, made, received, wall: SystemTime::now() });
        let parent = Some(headers).filter(|_| traces.heeds_parents).and_then(parent::of);
        let outside = Context::new().with_value(Arc::clone(&origin));
        let outside = match parent {
            Some(parent) => outside.with_remote_span_context(parent),
            None => outside,
        };
        let builder = SpanBuilder::from_name(name).with_kind(SpanKind::Server);
        let context = origin.begin(builder, received, attributes, &outside);
        let records = context.span().is_recording();
        records.then_some(Self { context, origin })
    }

    /// That of the request whose future runs here.
    pub(crate) fn current() -> Option<Self> {
        Context::map_current(|context| {
            let origin = Arc::clone(context.get::<Arc<Origin>>()?);
            Some(Self { context: context.clone(), origin })
        })
    }

    /// A future that has this span at hand.
    pub(crate) fn around<F: Future>(&self, future: F) -> WithContext<F> {
        future.with_context(self.context.clone())
    }

    /// A span below this one.
    pub(crate) fn begin(
        &self,
        name: impl Into<Cow<'static, str>>,
        began: Instant,
        attributes: Vec<KeyValue>,
    ) -> Self {
        let builder = SpanBuilder::from_name(name);
        let context = self.origin.begin(builder, began, attributes, &self.context);
        Self { context, origin: Arc::clone(&self.origin) }
    }

    /// A span below this one that is over.
    pub(crate) fn record(
        &self,
        name: impl Into<Cow<'static, str>>,
        [began, ended]: [Instant; 2],
        attributes: Vec<KeyValue>,
    ) {
        self.begin(name, began, attributes).end(ended);
    }

    pub(crate) fn set(&self, attribute: KeyValue) {
        self.context.span().set_attribute(attribute);
    }

    /// It went wrong: of which kind, in a few words that are the same each time, and why.
    pub(crate) fn fail(
        &self,
        kind: impl Into<Cow<'static, str>>,
        why: impl Into<Cow<'static, str>>,
    ) {
        let span = self.context.span();
        span.set_attribute(KeyValue::new("error.type", kind.into()));
        span.set_status(Status::error(why));
    }

    /// It is over; what is said of it afterwards is lost.
    pub(crate) fn end(&self, at: Instant) {
        self.context.span().end_with_timestamp(self.origin.wall(at));
    }

    /// By which the trace is known, and the span in it.
    pub(crate) fn ids(&self) -> (TraceId, SpanId) {
        let span = self.context.span();
        let context = span.span_context();
        (context.trace_id(), context.span_id())
    }
}
