//! Whom the server answers: requests to a name of its own, from programs and from its own pages.
//!
//! A browser sends any page's requests to any address. Two headers that no page can forge tell them apart:
//! `Origin` and `Sec-Fetch-Site` say which page asks, `Host` which name it asked for. A page whose own name is
//! pointed at this machine after it was loaded (DNS rebinding) has the right origin and the wrong host.

use std::{net::IpAddr, str::FromStr, sync::Arc};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header, request},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::{
    Settings,
    error::{Problem, quoted},
};

const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
const FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");

/// A host, written in one way: lower case, no final dot, IPv4 addresses not inside of IPv6 ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A name.
    Name(String),
    /// An address.
    Address(IpAddr),
}

impl Host {
    /// Whether it is this machine, whoever is asked.
    fn is_loopback(&self) -> bool {
        match self {
            Self::Name(name) => name == "localhost",
            Self::Address(address) => address.is_loopback(),
        }
    }
}

impl FromStr for Host {
    type Err = ();

    /// A name, an IPv4 address, or an IPv6 address in brackets.
    fn from_str(text: &str) -> Result<Self, ()> {
        if let Some(inside) = text.strip_prefix('[') {
            let address = inside.strip_suffix(']').ok_or(())?;
            let address: std::net::Ipv6Addr = address.parse().map_err(|_| ())?;
            return Ok(Self::Address(IpAddr::V6(address).to_canonical()));
        }
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        match name.parse::<std::net::Ipv4Addr>() {
            Ok(address) => Ok(Self::Address(address.into())),
            Err(_) if !name.is_empty() && name.bytes().all(fits) => Ok(Self::Name(name)),
            Err(_) => Err(()),
        }
    }
}

/// A host, and its port where one is named.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Authority {
    host: Host,
    port: Option<u16>,
}

impl FromStr for Authority {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        // The colons of an IPv6 address stand in brackets.
        let colon = text.rfind(':').filter(|&colon| !text[colon..].contains(']'));
        let (host, port) = match colon {
            Some(colon) => (&text[..colon], &text[colon + 1..]),
            None => (text, ""),
        };
        let digits = port.bytes().all(|byte| byte.is_ascii_digit());
        let port = match port {
            "" => None,
            port if digits => Some(port.parse().map_err(|_| ())?),
            _ => return Err(()),
        };
        Ok(Self { host: host.parse()?, port })
    }
}

/// Where a page comes from: scheme, host, and the port unless it is the scheme's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    scheme: String,
    host: Host,
    port: Option<u16>,
}

impl Origin {
    fn default_port(scheme: &str) -> Option<u16> {
        match scheme {
            "http" => Some(80),
            "https" => Some(443),
            _ => None,
        }
    }
}

impl FromStr for Origin {
    type Err = ();

    /// `http` or `https`, a host, perhaps a port, and nothing else.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (scheme, authority) = text.split_once("://").ok_or(())?;
        let scheme = scheme.to_ascii_lowercase();
        let own = Self::default_port(&scheme).ok_or(())?;
        let Authority { host, port } = authority.parse()?;
        Ok(Self { scheme, host, port: port.filter(|port| *port != own) })
    }
}

/// What the operator decided about hosts and origins.
#[derive(Debug)]
pub(super) struct Policy {
    /// Whether only this machine reaches the server.
    loopback: bool,
    hosts: Vec<Host>,
    origins: Vec<Origin>,
    /// Whether pages from anywhere may use the server.
    any_origin: bool,
}

impl Policy {
    pub(super) fn new(settings: &Settings) -> Self {
        let named = &settings.cors_allow_origin;
        Self {
            loopback: settings.loopback,
            hosts: settings.allowed_hosts.clone(),
            origins: named.iter().filter_map(|origin| origin.parse().ok()).collect(),
            any_origin: named.iter().any(|origin| origin == "*"),
        }
    }

    fn admits(&self, head: &request::Parts) -> Result<(), Problem> {
        let host = self.host(head)?;
        self.origin(head, &host)
    }

    /// What the request takes this server for: exactly one host, and one of the server's.
    fn host(&self, head: &request::Parts) -> Result<Authority, Problem> {
        let invalid = |message: &str| {
            let message = format!("`host` {message}; send one, as in `Host: localhost:8080`");
            Problem::new(StatusCode::BAD_REQUEST, "invalid_host", message).at("host")
        };
        let mut sent = head.headers.get_all(header::HOST).iter();
        let sent = match (sent.next(), sent.next()) {
            (Some(host), None) => Some(host.to_str().unwrap_or_default()),
            (None, _) => None,
            (Some(_), Some(_)) => return Err(invalid("stands in the request more than once")),
        };
        // HTTP/2, and a request through a proxy, name it in the request line.
        let target = head.uri.authority().map(|authority| authority.as_str());
        let text = match (sent, target) {
            (Some(sent), Some(target)) if sent.parse::<Authority>() != target.parse() => {
                return Err(invalid("is not the host of the request line"));
            }
            (Some(host), _) | (None, Some(host)) => host,
            // HTTP/1.0 knows no such header, and health checks of load balancers use it. No browser does.
            (None, None) if head.version == Version::HTTP_10 => "localhost",
            (None, None) => return Err(invalid("is missing")),
        };
        let host: Authority = text
            .parse()
            .map_err(|()| invalid(&format!("is {}, which is no host", quoted(text))))?;
        let open = !self.loopback && self.hosts.is_empty();
        if open || host.host.is_loopback() || self.hosts.contains(&host.host) {
            return Ok(host);
        }
        let message = format!(
            "`host` is {}: this server does not answer to that name; ask for localhost, or start it with --allowed-host and the name",
            quoted(text)
        );
        Err(Problem::new(StatusCode::FORBIDDEN, "host_not_allowed", message).at("host"))
    }

    /// Refuses the requests of pages from elsewhere, links to pages of this server apart.
    fn origin(&self, head: &request::Parts, host: &Authority) -> Result<(), Problem> {
        let origins = head.headers.get_all(header::ORIGIN);
        let all_named = head.headers.contains_key(header::ORIGIN)
            && origins.iter().all(|origin| self.names(origin));
        if self.any_origin || all_named || is_visit(head) {
            return Ok(());
        }
        let refuse = |field: &str, value: &str| {
            let message = format!(
                "`{field}` is {}: pages from elsewhere may not use this server; name theirs with --cors-allow-origin, or have a proxy pass the Host header on",
                quoted(value)
            );
            Err(Problem::new(StatusCode::FORBIDDEN, "foreign_origin", message).at(field))
        };
        if let Some(foreign) = origins.iter().find(|origin| !self.is_own(origin, host)) {
            return refuse("origin", &String::from_utf8_lossy(foreign.as_bytes()));
        }
        if says(&head.headers, &FETCH_SITE, "cross-site") {
            return refuse(FETCH_SITE.as_str(), "cross-site");
        }
        Ok(())
    }

    /// Whether `--cors-allow-origin` names it.
    fn names(&self, origin: &HeaderValue) -> bool {
        self.any_origin || parsed(origin).is_some_and(|origin| self.origins.contains(&origin))
    }

    /// Whether the page is this server's, which was asked for as `host`. The names of this machine are one where only
    /// it reaches the server.
    fn is_own(&self, origin: &HeaderValue, host: &Authority) -> bool {
        let Some(Origin { scheme, host: page, port }) = parsed(origin) else { return false };
        let same =
            page == host.host || self.loopback && page.is_loopback() && host.host.is_loopback();
        let own = Origin::default_port(&scheme);
        same && port == host.port.filter(|port| Some(*port) != own)
    }

    /// Headers that let pages from the named origins read replies; none without any.
    pub(super) fn cors(self: &Arc<Self>) -> Option<CorsLayer> {
        if self.origins.is_empty() && !self.any_origin {
            return None;
        }
        let policy = Arc::clone(self);
        let origin = if self.any_origin {
            AllowOrigin::any()
        } else {
            AllowOrigin::predicate(move |origin, _| policy.names(origin))
        };
        let layer = CorsLayer::new()
            .allow_origin(origin)
            .allow_methods([Method::GET, Method::POST, Method::PATCH, Method::DELETE])
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(
                [
                    "x-request-id",
                    "server-timing",
                    "retry-after",
                    "x-understudy-seed",
                    "x-understudy-model",
                ]
                .map(HeaderName::from_static),
            );
        Some(layer)
    }
}

/// Middleware: 400 and 403 for whom the server does not answer.
pub(super) async fn check(
    State(policy): State<Arc<Policy>>,
    request: Request,
    next: Next,
) -> Response {
    let (head, body) = request.into_parts();
    match policy.admits(&head) {
        Ok(()) => next.run(Request::from_parts(head, body)).await,
        Err(problem) => problem.into_response(),
    }
}

/// Whether somebody follows a link, or types an address: no page reads what comes of it.
fn is_visit(head: &request::Parts) -> bool {
    let document =
        !head.headers.contains_key(FETCH_DEST) || says(&head.headers, &FETCH_DEST, "document");
    matches!(head.method, Method::GET | Method::HEAD)
        && says(&head.headers, &FETCH_MODE, "navigate")
        && document
}

fn says(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    let word = word.as_bytes();
    headers
        .get_all(name)
        .iter()
        .any(|value| value.as_bytes().trim_ascii().eq_ignore_ascii_case(word))
}

fn parsed(origin: &HeaderValue) -> Option<Origin> {
    origin.to_str().ok()?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn policy(loopback: bool, hosts: &[&str], origins: &[&str]) -> Policy {
        Policy {
            loopback,
            hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
            origins: origins.iter().filter_map(|origin| origin.parse().ok()).collect(),
            any_origin: origins.contains(&"*"),
        }
    }

    /// The status of a request with these headers; 200 where it is let through.
    fn status(policy: &Policy, method: &str, headers: &[(&str, &str)]) -> u16 {
        let mut request = Request::builder().method(method).uri("/v1/models");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (head, ()) = request.body(()).unwrap().into_parts();
        policy.admits(&head).map_or_else(|problem| problem.status.as_u16(), |()| 200)
    }

    #[test]
    fn a_server_for_this_machine_answers_to_its_names_alone() {
        let policy = policy(true, &["Pictures.Example."], &[]);
        for (host, expected) in [
            ("localhost", 200),
            ("LOCALHOST:8080", 200),
            ("localhost.", 200),
            ("localhost.:8080", 200),
            ("localhost:", 200),
            ("127.0.0.1:8080", 200),
            ("127.8.9.10", 200),
            ("[::1]", 200),
            ("[::1]:8080", 200),
            ("[0:0:0:0:0:0:0:1]:8080", 200),
            ("[::ffff:127.0.0.1]", 200),
            ("pictures.example:8443", 200),
            ("PICTURES.EXAMPLE.", 200),
            ("evil.example", 403),
            ("localhost.evil.example", 403),
            ("127.0.0.1.evil.example", 403),
            ("notlocalhost", 403),
            ("10.0.0.1", 403),
            ("0.0.0.0:8080", 403),
            ("[::2]", 403),
            ("2130706433", 403),
            ("", 400),
            (":8080", 400),
            ("localhost:http", 400),
            ("localhost:99999", 400),
            ("localhost:+80", 400),
            ("::1", 400),
            ("[::1", 400),
            ("[::1]x", 400),
            ("user@localhost", 400),
            ("localhost/", 400),
            ("local host", 400),
            ("localhost,evil.example", 400),
        ] {
            assert_eq!(status(&policy, "GET", &[("host", host)]), expected, "{host:?}");
        }
        assert_eq!(status(&policy, "GET", &[]), 400);
        let twice = [("host", "localhost"), ("host", "localhost")];
        assert_eq!(status(&policy, "GET", &twice), 400);
    }

    #[test]
    fn a_server_for_others_answers_to_any_name_until_some_are_named() {
        let any = policy(false, &[], &[]);
        let named = policy(false, &["pictures.example", "10.0.0.7", "[fd00::7]"], &[]);
        for (host, with_any, with_named) in [
            ("pictures.example", 200, 200),
            ("10.0.0.7:8080", 200, 200),
            ("[FD00::7]:8080", 200, 200),
            // Health checks inside of a container.
            ("127.0.0.1:8080", 200, 200),
            ("evil.example", 200, 403),
            ("10.0.0.8", 200, 403),
            ("a b", 400, 400),
        ] {
            assert_eq!(status(&any, "POST", &[("host", host)]), with_any, "{host}");
            assert_eq!(status(&named, "POST", &[("host", host)]), with_named, "{host}");
        }
        assert_eq!(status(&any, "GET", &[]), 400);
    }

    #[test]
    fn the_request_line_and_the_header_name_one_host() {
        let policy = policy(true, &[], &[]);
        let status = |uri: &str, host: Option<&str>| {
            let mut request = Request::get(uri);
            if let Some(host) = host {
                request = request.header("host", host);
            }
            let (head, ()) = request.body(()).unwrap().into_parts();
            policy.admits(&head).map_or_else(|problem| problem.status.as_u16(), |()| 200)
        };
        assert_eq!(status("http://localhost:80/", Some("LOCALHOST:80")), 200);
        assert_eq!(status("http://localhost/", None), 200);
        assert_eq!(status("http://evil.example/", Some("localhost")), 400);
        assert_eq!(status("http://evil.example/", Some("evil.example")), 403);
        assert_eq!(status("http://evil.example/", None), 403);
    }

    #[test]
    fn pages_from_elsewhere_are_refused() {
        let at_home = policy(true, &["pictures.example"], &[]);
        for (host, origin, expected) in [
            ("localhost:8080", "http://localhost:8080", 200),
            ("localhost:8080", "HTTP://LocalHost.:8080", 200),
            ("127.0.0.1:8080", "http://localhost:8080", 200),
            ("[::1]:8080", "http://[::1]:8080", 200),
            ("localhost", "http://localhost", 200),
            ("localhost:80", "http://localhost", 200),
            ("localhost", "http://localhost:80", 200),
            // Behind a proxy that encrypts.
            ("pictures.example", "https://pictures.example", 200),
            ("pictures.example:443", "https://pictures.example", 200),
            ("pictures.example:8443", "https://pictures.example:8443", 200),
            ("pictures.example", "https://pictures.example:8443", 403),
            ("pictures.example", "http://localhost", 403),
            ("localhost:8080", "http://localhost:3000", 403),
            ("localhost:8080", "http://localhost", 403),
            ("localhost:8080", "https://evil.example", 403),
            ("localhost:8080", "http://evil.example:8080", 403),
            ("localhost:8080", "http://localhost:8080.evil.example", 403),
            ("localhost:8080", "http://localhost:8080/", 403),
            ("localhost:8080", "http://user@localhost:8080", 403),
            ("localhost:8080", "localhost:8080", 403),
            ("localhost:8080", "file://", 403),
            ("localhost:8080", "chrome-extension://localhost:8080", 403),
            ("localhost:8080", "null", 403),
            ("localhost:8080", "", 403),
        ] {
            for method in ["GET", "HEAD", "OPTIONS", "POST", "PATCH", "DELETE", "PUT"] {
                let headers = [("host", host), ("origin", origin)];
                assert_eq!(status(&at_home, method, &headers), expected, "{host} {origin:?}");
            }
        }
        // Where others reach the server, localhost is whoever says so.
        let abroad = policy(false, &[], &[]);
        let headers = [("host", "127.0.0.1:8080"), ("origin", "http://localhost:8080")];
        assert_eq!(status(&abroad, "POST", &headers), 403);
        let own_and_foreign = [
            ("host", "localhost:8080"),
            ("origin", "http://localhost:8080"),
            ("origin", "https://evil.example"),
        ];
        assert_eq!(status(&at_home, "POST", &own_and_foreign), 403);
    }

    #[test]
    fn the_site_counts_where_there_is_no_origin_and_links_are_followed() {
        let policy = policy(true, &[], &[]);
        let site = |method, fetch: &[(&str, &str)]| {
            status(&policy, method, &[&[("host", "localhost")], fetch].concat())
        };
        for own in ["same-origin", "same-site", "none"] {
            assert_eq!(site("GET", &[("sec-fetch-site", own)]), 200, "{own}");
            assert_eq!(site("POST", &[("sec-fetch-site", own)]), 200, "{own}");
        }
        let cross = ("sec-fetch-site", "cross-site");
        let navigate = ("sec-fetch-mode", "navigate");
        assert_eq!(site("GET", &[cross]), 403);
        assert_eq!(site("GET", &[("sec-fetch-site", "Cross-Site")]), 403);
        assert_eq!(site("GET", &[cross, ("sec-fetch-mode", "no-cors")]), 403);
        assert_eq!(site("GET", &[cross, navigate]), 200);
        assert_eq!(site("HEAD", &[cross, navigate, ("sec-fetch-dest", "document")]), 200);
        for inside in ["iframe", "frame", "embed", "object", "image"] {
            assert_eq!(site("GET", &[cross, navigate, ("sec-fetch-dest", inside)]), 403);
        }
        // A form that is sent is a navigation as well.
        assert_eq!(site("POST", &[cross, navigate, ("sec-fetch-dest", "document")]), 403);
        assert_eq!(site("POST", &[cross, ("origin", "http://localhost")]), 403);
    }

    #[test]
    fn named_origins_are_let_in() {
        let some = policy(true, &[], &["https://a.example", "http://B.example:80"]);
        let any = policy(true, &[], &["*"]);
        let post = |policy: &Policy, headers: &[(&str, &str)]| {
            status(policy, "POST", &[&[("host", "localhost")], headers].concat())
        };
        let cross = ("sec-fetch-site", "cross-site");
        for origin in ["https://a.example", "https://A.example:443", "http://b.example"] {
            assert_eq!(post(&some, &[("origin", origin), cross]), 200, "{origin}");
        }
        for origin in ["http://a.example", "https://a.example:8443", "https://c.example", "null"] {
            assert_eq!(post(&some, &[("origin", origin), cross]), 403, "{origin}");
            assert_eq!(post(&any, &[("origin", origin), cross]), 200, "{origin}");
        }
        let one_of_two = [("origin", "https://a.example"), ("origin", "https://c.example")];
        assert_eq!(post(&some, &one_of_two), 403);
        assert_eq!(post(&some, &[cross]), 403);
        assert_eq!(post(&any, &[cross]), 200);
        // Any page is not any name.
        assert_eq!(status(&any, "POST", &[("host", "evil.example")]), 403);
    }
}
