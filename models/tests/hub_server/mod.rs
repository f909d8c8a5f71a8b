//! A server with the Hub's URL shape: the list of files at one commit, small files at `resolve`, large
//! ones behind a redirect to another address, byte ranges.

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

pub(crate) struct HubServer {
    pub(crate) endpoint: String,
    state: Arc<State>,
}

struct State {
    id: String,
    files: Vec<(String, Vec<u8>)>,
    token: Mutex<Option<String>>,
    cut_short: Mutex<Option<usize>>,
    stall: Mutex<Option<usize>>,
    listing: Mutex<Option<String>>,
    etag: Mutex<Option<String>>,
    shrink: AtomicBool,
    stopped: AtomicBool,
    /// Path and range of each request.
    requests: Mutex<Vec<String>>,
}

impl HubServer {
    pub(crate) fn new(id: &str, files: Vec<(String, Vec<u8>)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let state = Arc::new(State {
            id: id.to_owned(),
            files,
            token: Mutex::default(),
            cut_short: Mutex::default(),
            stall: Mutex::default(),
            listing: Mutex::default(),
            etag: Mutex::default(),
            shrink: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            requests: Mutex::default(),
        });
        let server = Self { endpoint: endpoint.clone(), state: Arc::clone(&state) };
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if state.stopped.load(Ordering::SeqCst) {
                    return;
                }
                // A client that left is its own affair.
                let _ = state.answer(stream, &endpoint);
            }
        });
        server
    }

    pub(crate) fn with_token(self, token: &str) -> Self {
        *self.state.token.lock().unwrap() = Some(token.to_owned());
        self
    }

    /// Ends the answer to a request for weights after so many bytes, though it promised more.
    pub(crate) fn cut_short(&self, bytes: Option<usize>) {
        *self.state.cut_short.lock().unwrap() = bytes;
    }

    /// As [`HubServer::cut_short`], but the connection stays open.
    pub(crate) fn stall(&self, bytes: Option<usize>) {
        *self.state.stall.lock().unwrap() = bytes;
    }

    /// Answers this for the list of files.
    pub(crate) fn list(&self, answer: &str) {
        *self.state.listing.lock().unwrap() = Some(answer.to_owned());
    }

    /// Says that this is the etag of every file.
    pub(crate) fn name_contents(&self, etag: &str) {
        *self.state.etag.lock().unwrap() = Some(etag.to_owned());
    }

    /// Serves half of the weights as if they were all.
    pub(crate) fn shrink(&self, on: bool) {
        self.state.shrink.store(on, Ordering::SeqCst);
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.state.requests.lock().unwrap().clone()
    }
}

impl Drop for HubServer {
    fn drop(&mut self) {
        self.state.stopped.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.endpoint.trim_start_matches("http://"));
    }
}

impl State {
    fn answer(&self, stream: TcpStream, endpoint: &str) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines().map_while(Result::ok);
        let request = lines.next().unwrap_or_default();
        let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        let header = |name: &str| {
            let mut pairs = headers.iter().filter_map(|line| line.split_once(": "));
            pairs.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.to_owned())
        };
        let path = request.split(' ').nth(1).unwrap_or_default();
        let range = header("range");
        let line = format!("{path} {}", range.as_deref().unwrap_or_default());
        self.requests.lock().unwrap().push(line);

        let token = self.token.lock().unwrap().clone();
        if token.is_some_and(|token| header("authorization") != Some(format!("Bearer {token}"))) {
            return reply(stream, "401 Unauthorized", "", b"");
        }
        let path = path.split('?').next().unwrap_or_default();
        if path == format!("/api/models/{}/revision/main", self.id) {
            return reply(stream, "200 OK", "", self.listing().as_bytes());
        }
        let resolved = path.strip_prefix(&format!("/{}/resolve/{SHA}/", self.id));
        if let Some(name) = resolved.filter(|name| name.ends_with(".safetensors")) {
            let headers = format!(
                "Location: {endpoint}/cdn/{name}\r\nX-Linked-Etag: \"{}\"\r\nX-Repo-Commit: {SHA}\r\n",
                self.etag(name)
            );
            return reply(stream, "302 Found", &headers, b"");
        }
        let name = resolved.or(path.strip_prefix("/cdn/"));
        match name.and_then(|name| self.files.iter().find(|(file, _)| file == name)) {
            Some((name, bytes)) => self.send(stream, name, bytes, range),
            None => reply(stream, "404 Not Found", "", b""),
        }
    }

    fn etag(&self, name: &str) -> String {
        self.etag.lock().unwrap().clone().unwrap_or_else(|| name.replace(['/', '.'], ""))
    }

    fn listing(&self) -> String {
        if let Some(answer) = self.listing.lock().unwrap().clone() {
            return answer;
        }
        let files = self
            .files
            .iter()
            .map(|(name, bytes)| format!(r#"{{"rfilename": "{name}", "size": {}}}"#, bytes.len()));
        let files = files.collect::<Vec<_>>().join(", ");
        format!(r#"{{"sha": "{SHA}", "siblings": [{files}]}}"#)
    }

    fn send(
        &self,
        mut stream: TcpStream,
        name: &str,
        bytes: &[u8],
        range: Option<String>,
    ) -> std::io::Result<()> {
        let weights = name.ends_with(".safetensors");
        let shrunk = weights && self.shrink.load(Ordering::SeqCst);
        let bytes = if shrunk { &bytes[..bytes.len() / 2] } else { bytes };
        let range = range.unwrap_or_default();
        let (start, end) = range.trim_start_matches("bytes=").split_once('-').unwrap_or_default();
        let start: usize = start.parse().unwrap_or(0);
        let end = end.parse().map_or(bytes.len(), |last: usize| last + 1);
        let part = &bytes[start..end];
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{}\r\nEtag: \"{}\"\r\nX-Repo-Commit: {SHA}\r\nConnection: close\r\n\r\n",
            part.len(),
            end.saturating_sub(1),
            bytes.len(),
            self.etag(name)
        );
        let cut = self.cut_short.lock().unwrap().filter(|_| weights).unwrap_or(usize::MAX);
        stream.write_all(head.as_bytes())?;
        let stall = *self.stall.lock().unwrap();
        if let Some(bytes) = stall.filter(|_| weights) {
            stream.write_all(&part[..part.len().min(bytes)])?;
            // Open until the client leaves.
            return std::io::copy(&mut stream, &mut std::io::sink()).map(drop);
        }
        stream.write_all(&part[..part.len().min(cut)])
    }
}

fn reply(mut stream: TcpStream, status: &str, headers: &str, body: &[u8]) -> std::io::Result<()> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}
