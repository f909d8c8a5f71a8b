//! How spans reach a collector: by the synchronous client that the rest of the program uses, on the thread that batches
//! them.

use std::{
    future::{Future, ready},
    pin::Pin,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use prost::Message;
use ureq::Agent;

/// Most bytes of an answer that are read: it says hardly anything.
const ANSWER_BYTES: u64 = 1 << 20;

/// A collector, and whether it took the last spans. What it did not take is tried again for a while, then lost; the log
/// tells once when that begins and once when it ends.
#[derive(Debug)]
pub(super) struct Collector {
    agent: Agent,
    failing: AtomicBool,
}

impl Collector {
    pub(super) fn new(timeout: Duration) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(timeout))
            .build();
        Self { agent: agent.into(), failing: AtomicBool::new(false) }
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let address = head.uri.clone();
        let sent = self.agent.run(Request::from_parts(head, body.as_ref()));
        let answer = sent.and_then(|answer| {
            let (head, mut body) = answer.into_parts();
            let body = body.with_config().limit(ANSWER_BYTES).read_to_vec()?;
            Ok(Response::from_parts(head, Bytes::from(body)))
        });
        match answer.as_ref().map(complaint) {
            Ok(None) => {
                if self.failing.swap(false, Ordering::Relaxed) {
                    tracing::info!(%address, "the collector takes spans again");
                }
            }
            Ok(Some(problem)) => self.failed(&address, &problem),
            Err(error) => self.failed(&address, &error.to_string()),
        }
        Ok(answer?)
    }

    fn failed(&self, address: &impl std::fmt::Display, problem: &str) {
        if !self.failing.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                %address,
                problem,
                "the collector takes no spans, and those that wait for it too long are lost; see to it, or set OTEL_TRACES_EXPORTER=none"
            );
        }
    }
}

/// What a collector has against the spans that it was sent.
fn complaint(answer: &Response<Bytes>) -> Option<String> {
    let status = answer.status();
    if !status.is_success() {
        return Some(format!("it answered {status}"));
    }
    let reply = ExportTraceServiceResponse::decode(answer.body().as_ref()).ok()?;
    let partial = reply.partial_success.filter(|partial| partial.rejected_spans > 0)?;
    Some(format!("it refused {} spans: {}", partial.rejected_spans, partial.error_message))
}

impl HttpClient for Collector {
    fn send_bytes<'s, 'f>(
        &'s self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'f>>
    where
        's: 'f,
        Self: 'f,
    {
        // The batching thread has nothing else to do.
        Box::pin(ready(self.send(request)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{
        io::{Read, Write},
        net::TcpListener,
        sync::{Arc, Mutex},
        thread,
    };

    use opentelemetry_proto::tonic::collector::trace::v1::ExportTracePartialSuccess;
    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    /// Lines of a log.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Lines {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    /// An address at which each of these answers is given to one request.
    fn answering(answers: Vec<(&'static str, Vec<u8>)>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/v1/traces", listener.local_addr().unwrap());
        thread::spawn(move || {
            for (status, body) in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut asked = [0; 1 << 12];
                let mut read = stream.read(&mut asked).unwrap();
                while !asked[..read].ends_with(b"spans") {
                    read += stream.read(&mut asked[read..]).unwrap();
                }
                let length = body.len();
                let head = format!(
                    "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
                );
                stream.write_all(&[head.as_bytes(), &body].concat()).unwrap();
            }
        });
        address
    }

    #[test]
    fn an_outage_is_one_warning_whatever_it_is_and_its_end_one_line() {
        let lines = Lines::default();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(lines.clone());
        let partial_success =
            Some(ExportTracePartialSuccess { rejected_spans: 3, error_message: "too old".into() });
        let partial = ExportTraceServiceResponse { partial_success }.encode_to_vec();
        let address = answering(vec![
            ("200 OK", Vec::new()),
            ("503 Service Unavailable", Vec::new()),
            ("400 Bad Request", Vec::new()),
            ("200 OK", Vec::new()),
            ("200 OK", Vec::new()),
            ("200 OK", partial),
        ]);
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let nobody = format!("http://{nobody}/v1/traces");
        let collector = Collector::new(Duration::from_secs(60));
        let ask = |address: &str| {
            let request = Request::post(address).body(Bytes::from_static(b"spans")).unwrap();
            collector.send(request).map(|answer| answer.status().as_u16()).ok()
        };
        tracing::subscriber::with_default(subscriber.finish(), || {
            assert_eq!(ask(&address), Some(200));
            assert_eq!(ask(&nobody), None);
            assert_eq!(ask(&nobody), None);
            assert_eq!(ask(&address), Some(503));
            assert_eq!(ask(&address), Some(400));
            assert_eq!(ask(&address), Some(200));
            assert_eq!(ask(&address), Some(200));
            assert_eq!(ask(&address), Some(200));
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].contains("WARN") && lines[0].contains("refused"), "{text}");
        assert!(lines[1].contains("INFO") && lines[1].contains("again"), "{text}");
        assert!(lines[2].contains("WARN") && lines[2].contains("3 spans: too old"), "{text}");
    }
}
