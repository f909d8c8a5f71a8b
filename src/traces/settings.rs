//! What the standard variables of the environment say about traces
//! (<https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>).
//!
//! The SDK reads some of them itself, and goes on with a default where it does not understand one. Here what cannot be
//! honoured is refused by its name, before anything starts. `OTEL_BSP_*`, the limits of spans, `OTEL_SERVICE_NAME` and
//! `OTEL_RESOURCE_ATTRIBUTES` take what the SDK takes.

use std::time::Duration;

use axum::http::{HeaderName, HeaderValue, Uri};
use percent_encoding::percent_decode_str;

/// Where a collector listens where nobody says: the specification's own default.
const DEFAULT_ENDPOINT: &str = "http://localhost:4318";
/// What is appended to an endpoint that is not for traces alone.
const PATH: &str = "v1/traces";
/// How long a collector may take where nobody says: the specification's own default.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// Beyond that a time-out is a mistake.
const LONGEST_TIMEOUT_MS: u64 = 10 * 60 * 1000;

/// Where spans go, and how. Valid from here on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The collector's address for spans, `http` or `https`.
    pub endpoint: Uri,
    /// What each request to it says beside the spans.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// How long one attempt to hand spans over, and all attempts together, may take.
    pub timeout: Duration,
    /// Whether spans are compressed by gzip.
    pub gzip: bool,
    /// Whether a request's `traceparent` is heeded.
    pub heeds_parents: bool,
}

impl Settings {
    /// What the process's environment asks for; `None` where that is no traces.
    ///
    /// # Errors
    /// A sentence that names the variable, its value and the remedy.
    pub fn of_environment() -> Result<Option<Self>, String> {
        Self::read(|name| match std::env::var_os(name) {
            None => Ok(None),
            Some(value) => value
                .into_string()
                .map(Some)
                .map_err(|_| format!("{name} is no UTF-8: give it a value that is")),
        })
    }

    /// The same from any source of variables.
    ///
    /// # Errors
    /// As [`Settings::of_environment`], and what `variable` says.
    pub fn read(
        variable: impl Fn(&str) -> Result<Option<String>, String>,
    ) -> Result<Option<Self>, String> {
        let environment = Environment(variable);
        if environment.is_true("OTEL_SDK_DISABLED")? {
            return Ok(None);
        }
        let asked = match environment.get("OTEL_TRACES_EXPORTER")?.as_deref() {
            None => false,
            Some("otlp") => true,
            Some("none") => return Ok(None),
            Some(other) => {
                let remedy = "spans go to a collector by OTLP alone; set it to otlp or none";
                return Err(refused("OTEL_TRACES_EXPORTER", other, remedy));
            }
        };
        let Some(endpoint) = environment.endpoint(asked)? else { return Ok(None) };
        environment.check_protocol()?;
        environment.check_tls()?;
        environment.check_sampler()?;
        Ok(Some(Self {
            endpoint,
            headers: environment.headers()?,
            timeout: environment.timeout()?,
            gzip: environment.gzip()?,
            heeds_parents: environment.heeds_parents()?,
        }))
    }
}

/// Variables by their names.
struct Environment<F>(F);

impl<F: Fn(&str) -> Result<Option<String>, String>> Environment<F> {
    /// An empty variable is as good as none.
    fn get(&self, name: &str) -> Result<Option<String>, String> {
        let value = (self.0)(name)?.map(|value| value.trim().to_owned());
        Ok(value.filter(|value| !value.is_empty()))
    }

    /// What is said for traces alone goes before what is said for everything. With the variable's name.
    fn of_exporter(&self, suffix: &str) -> Result<Option<(String, String)>, String> {
        for signal in ["TRACES_", ""] {
            let name = format!("OTEL_EXPORTER_OTLP_{signal}{suffix}");
            if let Some(value) = self.get(&name)? {
                return Ok(Some((name, value)));
            }
        }
        Ok(None)
    }

    fn is_true(&self, name: &str) -> Result<bool, String> {
        Ok(self.get(name)?.is_some_and(|value| value.eq_ignore_ascii_case("true")))
    }

    /// The address for spans; without one there are none, unless they are `asked` for.
    fn endpoint(&self, asked: bool) -> Result<Option<Uri>, String> {
        let found = self.of_exporter("ENDPOINT")?;
        let found = found.or_else(|| {
            asked.then(|| ("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), DEFAULT_ENDPOINT.to_owned()))
        });
        let Some((name, value)) = found else { return Ok(None) };
        // One for traces alone is taken as it is.
        let address = match name.contains("TRACES") {
            true => value.clone(),
            false => format!("{}/{PATH}", value.trim_end_matches('/')),
        };
        let uri = address.parse::<Uri>().ok().filter(|uri| uri.host().is_some());
        // The log shows the address.
        if uri.as_ref().and_then(Uri::authority).is_some_and(|it| it.as_str().contains('@')) {
            return Err(format!(
                "{name} has a name or a password before the host: leave them out, and send what the collector asks for by OTEL_EXPORTER_OTLP_HEADERS"
            ));
        }
        match uri {
            Some(uri) if matches!(uri.scheme_str(), Some("http" | "https")) => Ok(Some(uri)),
            _ => {
                let remedy = "it takes the address of a collector, such as http://localhost:4318";
                Err(refused(&name, &value, remedy))
            }
        }
    }

    fn check_protocol(&self) -> Result<(), String> {
        match self.of_exporter("PROTOCOL")? {
            Some((name, value)) if value != "http/protobuf" => {
                let remedy = "spans are sent as http/protobuf alone; set it to that, and the endpoint to the collector's port for it, which is 4318 as a rule; or set OTEL_TRACES_EXPORTER to none";
                Err(refused(&name, &value, remedy))
            }
            _ => Ok(()),
        }
    }

    /// Collectors are known by the certificates that browsers trust.
    fn check_tls(&self) -> Result<(), String> {
        for suffix in ["CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE"] {
            if let Some((name, value)) = self.of_exporter(suffix)? {
                let remedy = "certificates of one's own are not read; leave it out, and send spans to a collector on this machine or in this pod, which passes them on";
                return Err(refused(&name, &value, remedy));
            }
        }
        Ok(())
    }

    /// The SDK reads it; this is what it understands.
    fn check_sampler(&self) -> Result<(), String> {
        const NAME: &str = "OTEL_TRACES_SAMPLER";
        const ARGUMENT: &str = "OTEL_TRACES_SAMPLER_ARG";
        let by_ratio = match self.get(NAME)?.as_deref() {
            None
            | Some(
                "always_on" | "always_off" | "parentbased_always_on" | "parentbased_always_off",
            ) => false,
            Some("traceidratio" | "parentbased_traceidratio") => true,
            Some(other) => {
                let remedy =
                    "it takes always_on, always_off, traceidratio and these after parentbased_";
                return Err(refused(NAME, other, remedy));
            }
        };
        match self.get(ARGUMENT)? {
            Some(value) if by_ratio => match value.parse::<f64>() {
                Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(()),
                _ => Err(refused(ARGUMENT, &value, "it takes the share of traces, 0 to 1")),
            },
            None if by_ratio => {
                Err(format!("{ARGUMENT} is not set: {NAME} needs it, the share of traces, 0 to 1"))
            }
            _ => Ok(()),
        }
    }

    /// `name=value` pairs with commas between them, their values percent-encoded. Messages do not show them: they are
    /// keys as a rule.
    fn headers(&self) -> Result<Vec<(HeaderName, HeaderValue)>, String> {
        let Some((name, value)) = self.of_exporter("HEADERS")? else { return Ok(Vec::new()) };
        let pairs = value.split(',').enumerate().filter(|(_, pair)| !pair.trim().is_empty());
        pairs
            .map(|(number, pair)| {
                parsed_header(pair).ok_or_else(|| {
                    format!(
                        "{name}: its header number {} is none; it takes name=value pairs with commas between them, the values percent-encoded",
                        number + 1
                    )
                })
            })
            .collect()
    }

    fn timeout(&self) -> Result<Duration, String> {
        let Some((name, value)) = self.of_exporter("TIMEOUT")? else {
            return Ok(DEFAULT_TIMEOUT);
        };
        match value.parse::<u64>() {
            Ok(milliseconds) if (1..=LONGEST_TIMEOUT_MS).contains(&milliseconds) => {
                Ok(Duration::from_millis(milliseconds))
            }
            _ => {
                let remedy = format!("it takes milliseconds, 1 to {LONGEST_TIMEOUT_MS}");
                Err(refused(&name, &value, &remedy))
            }
        }
    }

    fn gzip(&self) -> Result<bool, String> {
        match self.of_exporter("COMPRESSION")? {
            None => Ok(false),
            Some((_, value)) if value == "none" => Ok(false),
            Some((_, value)) if value == "gzip" => Ok(true),
            Some((name, value)) => Err(refused(&name, &value, "it takes gzip or none")),
        }
    }

    /// Baggage has nowhere to go from here, so it may be named and changes nothing.
    fn heeds_parents(&self) -> Result<bool, String> {
        const NAME: &str = "OTEL_PROPAGATORS";
        let Some(value) = self.get(NAME)? else { return Ok(true) };
        let names: Vec<&str> = value.split(',').map(str::trim).collect();
        let known = ["tracecontext", "baggage", "none"];
        if let Some(other) = names.iter().find(|name| !known.contains(name)) {
            let remedy = "requests carry traceparent alone; set it to tracecontext or none";
            return Err(refused(NAME, other, remedy));
        }
        Ok(names.contains(&"tracecontext"))
    }
}

fn parsed_header(pair: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = pair.split_once('=')?;
    let value = percent_decode_str(value.trim()).decode_utf8().ok()?;
    let name = HeaderName::try_from(name.trim()).ok()?;
    Some((name, HeaderValue::from_str(&value).ok()?))
}

fn refused(name: &str, value: &str, remedy: &str) -> String {
    format!("{name} is {value:?}: {remedy}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Settings>, String> {
        Settings::read(|name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            Ok(found.map(|(_, value)| (*value).to_owned()))
        })
    }

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/base/");

    #[test]
    fn without_an_endpoint_there_are_no_traces_and_off_is_off() {
        assert_eq!(read(&[]), Ok(None));
        assert_eq!(read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "")]), Ok(None));
        assert_eq!(read(&[("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]), Ok(None));
        let bad = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        assert_eq!(read(&[ENDPOINT, bad, ("OTEL_SDK_DISABLED", "True")]), Ok(None));
        assert_eq!(read(&[ENDPOINT, bad, ("OTEL_TRACES_EXPORTER", "none")]), Ok(None));
        assert!(read(&[ENDPOINT, ("OTEL_SDK_DISABLED", "no")]).unwrap().is_some());
    }

    #[test]
    fn what_is_said_for_traces_goes_before_what_is_said_for_everything() {
        let settings = read(&[ENDPOINT]).unwrap().unwrap();
        assert_eq!(settings.endpoint, "http://collector:4318/base/v1/traces");
        assert_eq!((settings.timeout, settings.gzip), (Duration::from_secs(10), false));
        assert!(settings.headers.is_empty() && settings.heeds_parents);
        let settings = read(&[
            ENDPOINT,
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://traces.example.org/in"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "2000"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "500"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=a%20b,tenant=7,"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_TRACES_EXPORTER", "otlp"),
            ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
            ("OTEL_PROPAGATORS", "baggage"),
        ]);
        let settings = settings.unwrap().unwrap();
        assert_eq!(settings.endpoint, "https://traces.example.org/in");
        assert_eq!((settings.timeout, settings.gzip), (Duration::from_millis(500), true));
        let headers = settings.headers.iter().map(|(name, value)| (name.as_str(), value));
        let headers: Vec<_> =
            headers.map(|(name, value)| (name, value.to_str().unwrap())).collect();
        assert_eq!(headers, [("x-key", "a b"), ("tenant", "7")]);
        assert!(!settings.heeds_parents);
        let asked = read(&[("OTEL_TRACES_EXPORTER", "otlp")]).unwrap().unwrap();
        assert_eq!(asked.endpoint, "http://localhost:4318/v1/traces");
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_its_name() {
        for (name, value, remedy) in [
            ("OTEL_TRACES_EXPORTER", "zipkin", "otlp or none"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "collector:4318", "http://localhost:4318"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "ftp://collector", "http://localhost:4318"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://me:secret@host", "HEADERS"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "ca.pem", "leave it out"),
            ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", "key.pem", "leave it out"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=1,secret", "number 2"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "milliseconds"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0", "1 to"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "gzip or none"),
            ("OTEL_TRACES_SAMPLER", "xray", "traceidratio"),
            ("OTEL_TRACES_SAMPLER", "traceidratio", "OTEL_TRACES_SAMPLER_ARG"),
            ("OTEL_PROPAGATORS", "tracecontext,b3", "tracecontext or none"),
        ] {
            let refusal = read(&[ENDPOINT, (name, value)]).unwrap_err();
            assert!(refusal.contains(name) && refusal.contains(remedy), "{refusal}");
            assert!(!refusal.contains("secret"), "{refusal}");
        }
        let ratio = [("OTEL_TRACES_SAMPLER", "traceidratio"), ("OTEL_TRACES_SAMPLER_ARG", "2")];
        let refusal = read(&[ENDPOINT, ratio[0], ratio[1]]).unwrap_err();
        assert!(refusal.contains("OTEL_TRACES_SAMPLER_ARG is \"2\""), "{refusal}");
    }
}
