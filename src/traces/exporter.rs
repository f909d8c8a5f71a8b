//! How many spans there were, and how many of them a collector took: the others are lost, or wait.

use std::time::Duration;

use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{SpanData, SpanExporter as Exporter},
};
use prometheus::IntCounter;

/// Both counts; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Counts {
    pub(super) made: IntCounter,
    pub(super) taken: IntCounter,
}

impl Counts {
    pub(super) fn new() -> Result<Self, String> {
        let counter = |name, help| IntCounter::new(name, help).map_err(|error| error.to_string());
        Ok(Self {
            made: counter("understudy_spans_total", "Spans of traces that began.")?,
            taken: counter("understudy_spans_taken_total", "Spans that a collector took.")?,
        })
    }
}

/// OTLP's exporter, and the count of what it got rid of.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) exporter: SpanExporter,
    pub(super) taken: IntCounter,
}

impl Exporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len() as u64;
        self.exporter.export(batch).await?;
        self.taken.inc_by(spans);
        Ok(())
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
