//! Traces: where the time of each request went, as OpenTelemetry's spans, sent to a collector by OTLP.
//!
//! OpenTelemetry's SDK samples, batches and encodes; a collector that is slow or gone costs spans, and nothing else. Without
//! a collector there is nothing of all this.

mod collector;
mod exporter;
mod parent;
mod settings;
mod span;

use std::{collections::HashMap, time::Duration};

use opentelemetry::{InstrumentationScope, Key, KeyValue, trace::TracerProvider};
use opentelemetry_otlp::{Compression, Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::{
    Resource,
    trace::{SdkTracer, SdkTracerProvider},
};

use collector::Collector;
use exporter::{Counted, Counts};
pub use settings::Settings;
pub use span::Span;

/// What a server calls itself where the environment does not name it.
const SERVICE: &str = env!("CARGO_PKG_NAME");

/// The way of spans to a collector.
#[derive(Debug, Clone)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    heeds_parents: bool,
    counts: Counts,
}

impl Traces {
    /// Starts the thread that batches and sends. Whether a collector is there shows when the first spans are sent.
    ///
    /// # Errors
    /// A sentence when the exporter cannot be made of the settings.
    pub fn start(settings: &Settings) -> Result<Self, String> {
        let headers = settings.headers.iter().map(|(name, value)| {
            let value = value.to_str().map_err(|error| format!("{name}: {error}"))?;
            Ok((name.to_string(), value.to_owned()))
        });
        let mut exporter = SpanExporter::builder()
            .with_http()
            .with_http_client(Collector::new(settings.timeout))
            .with_endpoint(settings.endpoint.to_string())
            .with_protocol(Protocol::HttpBinary)
            .with_timeout(settings.timeout)
            .with_headers(headers.collect::<Result<HashMap<_, _>, String>>()?);
        if settings.gzip {
            exporter = exporter.with_compression(Compression::Gzip);
        }
        let counts = Counts::new()?;
        let exporter = exporter.build().map_err(|error| format!("traces: {error}"))?;
        let provider = SdkTracerProvider::builder()
            .with_resource(resource())
            .with_batch_exporter(Counted { exporter, taken: counts.taken.clone() })
            .build();
        let scope = InstrumentationScope::builder(SERVICE).with_version(env!("CARGO_PKG_VERSION"));
        let tracer = provider.tracer_with_scope(scope.build());
        Ok(Self { provider, tracer, heeds_parents: settings.heeds_parents, counts })
    }

    /// Spans that there were, and those that a collector took.
    pub fn series(&self) -> [Box<dyn prometheus::core::Collector>; 2] {
        [Box::new(self.counts.made.clone()), Box::new(self.counts.taken.clone())]
    }

    /// Sends what waits, and waits for that, but not longer than `patience`. It blocks.
    ///
    /// # Errors
    /// A sentence when spans are lost.
    pub fn end(&self, patience: Duration) -> Result<(), String> {
        self.provider.shutdown_with_timeout(patience).map_err(|error| error.to_string())
    }
}

/// Who sends the spans.
fn resource() -> Resource {
    let found = Resource::builder().build();
    let named = |key| found.get(&Key::from_static_str(key)).map(|value| value.to_string());
    let mut resource = Resource::builder();
    // The SDK calls those that nobody named so.
    if named("service.name").is_none_or(|name| name.starts_with("unknown_service")) {
        resource = resource.with_service_name(SERVICE);
    }
    if named("service.version").is_none() {
        let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        resource = resource.with_attribute(version);
    }
    resource.build()
}
