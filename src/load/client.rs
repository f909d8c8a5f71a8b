//! Requests over HTTP.

use std::{error::Error, time::Duration};

use axum::{
    body::Bytes,
    http::{HeaderValue, Method, Request, StatusCode, Uri, header},
};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde::Deserialize;

use super::Answer;

/// The longest answer that is read.
const MOST_BYTES: usize = 64 << 20;

/// A client of one server, over plain HTTP; its connections are kept and used again.
#[derive(Debug, Clone)]
pub struct Client {
    http: legacy::Client<HttpConnector, Full<Bytes>>,
    base: String,
    authorization: Option<HeaderValue>,
    timeout: Duration,
}

/// A model that the server has.
#[derive(Debug, Clone, Deserialize)]
pub struct Served {
    /// Its id.
    pub id: String,
    /// Whether it serves.
    pub ready: bool,
    /// `teacher`, `student` or `baseline`, where it is ready.
    pub role: Option<String>,
    /// A student's teacher.
    pub teacher: Option<String>,
}

#[derive(Deserialize)]
struct Models {
    data: Vec<Served>,
}

#[derive(Deserialize)]
struct Images {
    model: String,
    data: Vec<Image>,
}

#[derive(Deserialize)]
struct Image {}

#[derive(Deserialize)]
struct Refusal {
    error: Reason,
}

#[derive(Deserialize)]
struct Reason {
    message: String,
}

impl Client {
    /// A client of the server at `url` (`http://host:port`, perhaps with a path). Each request takes at
    /// most `timeout`.
    ///
    /// # Errors
    /// A sentence naming the flag whose value is at fault.
    pub fn new(url: &str, api_key: Option<&str>, timeout: Duration) -> Result<Self, String> {
        let remedy = "write http and the server's host and port, as in http://127.0.0.1:8080";
        let uri: Uri = url.parse().map_err(|error| format!("--url {url}: {error}; {remedy}"))?;
        match uri.scheme_str() {
            Some("http") if uri.query().is_none() => {}
            Some("https") => {
                return Err(format!(
                    "--url {url}: load is offered over plain HTTP; name the server itself, not what encrypts before it"
                ));
            }
            _ => return Err(format!("--url {url}: {remedy}")),
        }
        let bearer = |key| {
            let mut value = HeaderValue::try_from(format!("Bearer {key}"))
                .map_err(|_| "--api-key: not a key, it has characters that no header can carry")?;
            value.set_sensitive(true);
            Ok::<_, String>(value)
        };
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Ok(Self {
            http: legacy::Client::builder(TokioExecutor::new()).build(connector),
            base: url.trim_end_matches('/').to_owned(),
            authorization: api_key.map(bearer).transpose()?,
            timeout,
        })
    }

    /// The models of the server, the default one first.
    ///
    /// # Errors
    /// A sentence when there is no such server, or it does not tell.
    pub async fn models(&self) -> Result<Vec<Served>, String> {
        let said = |problem| format!("{}/v1/models: {problem}", self.base);
        let (status, body) = self.ask(Method::GET, "/v1/models", Bytes::new()).await.map_err(
            |problem| {
                format!(
                    "--url {}: {problem}; start a server with `understudy serve`, or name the one that runs",
                    self.base
                )
            },
        )?;
        if status != StatusCode::OK {
            return Err(said(format!("{status}: {}", refusal(&body))));
        }
        let models: Models = serde_json::from_slice(&body)
            .map_err(|error| said(format!("not a list of models ({error}); is it Understudy?")))?;
        Ok(models.data)
    }

    /// One request for images.
    pub async fn images(&self, request: Bytes) -> Answer {
        let asked = self.ask(Method::POST, "/v1/images/generations", request).await;
        let (status, body) = match asked {
            Ok(answer) => answer,
            Err(problem) => return Answer::Failed(problem),
        };
        if status != StatusCode::OK {
            return Answer::Refused { status: status.as_u16(), message: refusal(&body) };
        }
        match serde_json::from_slice::<Images>(&body) {
            Ok(Images { model, data }) => Answer::Images { model, count: data.len() as u64 },
            Err(error) => Answer::Failed(format!("not a reply with images: {error}")),
        }
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), String> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.authorization {
            request = request.header(header::AUTHORIZATION, key);
        }
        let request = request.body(Full::new(body)).map_err(|error| error.to_string())?;
        let exchange = async {
            let response = self.http.request(request).await.map_err(|error| cause(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MOST_BYTES).collect().await;
            Ok((status, body.map_err(|error| cause(error.as_ref()))?.to_bytes()))
        };
        match tokio::time::timeout(self.timeout, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(format!(
                "no answer within {} s (--timeout-seconds)",
                self.timeout.as_secs_f64()
            )),
        }
    }
}

/// The server's sentence, or the beginning of what it said instead.
fn refusal(body: &[u8]) -> String {
    match serde_json::from_slice::<Refusal>(body) {
        Ok(refusal) => refusal.error.message,
        Err(_) => String::from_utf8_lossy(body).chars().take(200).collect(),
    }
}

/// What is at the bottom of an error; hyper's own text says little.
fn cause(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_keys_that_cannot_be_are_refused_by_flag() {
        let client = |url, key| Client::new(url, key, Duration::from_secs(1));
        assert_eq!(client("http://[::1]:80/a/", Some("k")).unwrap().base, "http://[::1]:80/a");
        for url in ["", "localhost:8080", "ftp://host", "http://", "/v1", "http://host/?a=1"] {
            let error = client(url, None).unwrap_err();
            assert!(error.starts_with("--url") && error.contains("http://127.0.0.1"), "{error}");
        }
        assert!(client("https://host", None).unwrap_err().contains("plain HTTP"));
        let error = client("http://host", Some("a\nsecret")).unwrap_err();
        assert!(error.starts_with("--api-key") && !error.contains("secret"), "{error}");
    }
}
