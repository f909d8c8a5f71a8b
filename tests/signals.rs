//! A real server under siege: told to stop it stops, whatever it is doing and whoever has stopped listening to it; and
//! connections that only wait leave it descriptors.
#![allow(clippy::unwrap_used)]
#![cfg(unix)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// Longer than stopping takes on a busy machine, and shorter than anything that it might wait for.
const PATIENCE: Duration = Duration::from_secs(20);

struct Server {
    child: Child,
    address: String,
    _states: tempfile::TempDir,
}

impl Server {
    fn spawn(arguments: &[&str], stderr: Stdio, environment: &[(&str, &str)]) -> Self {
        let program = Command::new(env!("CARGO_BIN_EXE_understudy"));
        Self::spawn_by(program, arguments, stderr, environment)
    }

    fn spawn_by(
        mut command: Command,
        arguments: &[&str],
        stderr: Stdio,
        environment: &[(&str, &str)],
    ) -> Self {
        let states = tempfile::tempdir().unwrap();
        // With the largest batch decided, warming up is short.
        let short = ["--max-batch", "4"];
        command
            .args(["serve", "--port", "0", "--drain-seconds", "3600"])
            .args(short)
            .args(arguments);
        command.env("XDG_STATE_HOME", states.path()).env("XDG_CACHE_HOME", states.path());
        command.envs(environment.iter().copied());
        command.current_dir(env!("CARGO_MANIFEST_DIR")).stdout(Stdio::piped()).stderr(stderr);
        Self { child: command.spawn().unwrap(), address: String::new(), _states: states }
    }

    /// One that serves the bundled models.
    fn start(stderr: Stdio) -> Self {
        Self::spawn(&[], stderr, &[]).announced()
    }

    /// The same, once it is ready.
    fn announced(self) -> Self {
        let mut server = self;
        let lines = BufReader::new(server.child.stdout.take().unwrap()).lines();
        for line in lines.map_while(Result::ok) {
            if let Some((_, address)) = line.split_once("serves on http://") {
                server.address = address.split(' ').next().unwrap().to_owned();
            }
            if line.starts_with("Ready after") {
                return server;
            }
        }
        panic!("it ended before it was ready");
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The answer to a request without a body.
    fn get(&self, path: &str) -> String {
        let mut stream = self.connect();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        reply
    }

    /// A connection over which a request for images was begun: `left` bytes of its body are missing.
    fn begin(&self, body: &str, left: usize) -> TcpStream {
        let mut stream = self.connect();
        let (length, sent) = (body.len(), &body[..body.len() - left]);
        write!(
            stream,
            "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{sent}"
        )
        .unwrap();
        stream
    }

    fn tell(&self, signal: &str) {
        let kill = format!("kill -{signal} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// How it ended, in time.
    fn ended(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < PATIENCE, "it goes on");
            std::thread::yield_now();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_download_that_never_ends_does_not_hold_up_the_end() {
    // A Hub that takes connections and says nothing.
    let hub = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", hub.local_addr().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    for signal in ["TERM", "INT"] {
        let arguments = ["--models", path, "--default-model", "owner/name"];
        let environment = [("HF_ENDPOINT", endpoint.as_str()), ("HF_HOME", path)];
        let mut server = Server::spawn(&arguments, Stdio::null(), &environment);
        let asked = hub.accept().unwrap();
        server.tell(signal);
        assert_eq!(server.ended().code(), Some(0), "{signal}");
        drop(asked);
    }
}

#[test]
fn a_request_that_is_not_here_yet_does_not_hold_up_the_end() {
    let mut server = Server::start(Stdio::null());
    let mut half = server.begin("{\"n\": 1, \"seed\": 1}", 5);
    let mut head = server.connect();
    head.write_all(b"GET /hea").unwrap();
    let _idle = server.connect();
    assert!(server.get("/health").starts_with("HTTP/1.1 200"));
    server.tell("TERM");
    assert_eq!(server.ended().code(), Some(0));
    let mut reply = String::new();
    half.read_to_string(&mut reply).unwrap();
    assert!(reply.starts_with("HTTP/1.1 503") && reply.contains("shutting down"), "{reply}");
}

#[test]
fn the_second_signal_ends_it_at_once() {
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let mut server = Server::start(Stdio::null());
        let long = "{\"n\": 16, \"num_inference_steps\": 1000, \"stream\": true}";
        let _long: Vec<_> = (0..4)
            .map(|_| {
                let mut stream = server.begin(long, 0);
                // It is under way.
                stream.read_exact(&mut [0; 12]).unwrap();
                stream
            })
            .collect();
        server.tell(signal);
        // The first lets it finish.
        while !server.get("/health").contains("draining") {}
        server.tell(signal);
        assert_eq!(server.ended().code(), Some(code), "{signal}");
    }
}

#[test]
fn nobody_has_to_read_the_log() {
    let mut server = Server::start(Stdio::piped());
    let path = format!("/{}", "x".repeat(4000));
    let mut stream = server.connect();
    // In one piece, or a request waits for the answer to its own beginning.
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    stream.set_nodelay(true).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    for _ in 0..600 {
        stream.write_all(request.as_bytes()).unwrap();
        let (mut line, mut length) = (String::new(), 0);
        reader.read_line(&mut line).unwrap();
        assert!(line.starts_with("HTTP/1.1 404"), "{line}");
        while line != "\r\n" {
            line.clear();
            reader.read_line(&mut line).unwrap();
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.trim().parse().unwrap();
            }
        }
        reader.read_exact(&mut vec![0; length]).unwrap();
    }
    let metrics = server.get("/metrics");
    let dropped =
        metrics.lines().find_map(|line| line.strip_prefix("understudy_log_lines_dropped_total "));
    assert!(dropped.unwrap().parse::<f64>().unwrap() > 0.0, "{dropped:?}");
    server.tell("TERM");
    assert_eq!(server.ended().code(), Some(0));
}

#[cfg(target_os = "linux")]
#[test]
fn with_64_open_files_health_answers_beside_200_idle_connections() {
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 64 && exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_understudy")]);
    let mut server = Server::spawn_by(limited, &[], Stdio::null(), &[]).announced();
    // Half of them have begun a request, half have not, and none will say more within the time-outs of the test.
    let idle: Vec<TcpStream> = (0..200)
        .map(|number| {
            let mut stream = server.connect();
            if number % 2 == 0 {
                let _ = stream.write_all(b"GET /hea");
            }
            stream
        })
        .collect();
    for _ in 0..10 {
        let reply = server.get("/health");
        assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    }
    // Whoever sends half of a body takes no more than the others.
    let half: Vec<TcpStream> = (0..100).map(|_| server.begin("{\"n\": 1}", 4)).collect();
    let reply = server.get("/health");
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    drop((idle, half));
    server.tell("TERM");
    assert_eq!(server.ended().code(), Some(0));
}

#[cfg(target_os = "linux")]
#[test]
fn too_few_open_files_are_told_with_the_way_out() {
    let serve = |limit: &str, arguments: &[&str]| {
        let shell = format!("ulimit -n {limit} && exec \"$0\" serve --port 0 \"$@\"");
        let mut command = Command::new("sh");
        command.args(["-c", &shell, env!("CARGO_BIN_EXE_understudy")]).args(arguments);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    for said in [serve("24", &[]), serve("256", &["--max-connections", "256"])] {
        assert!(said.starts_with("error: ") && said.contains("ulimit -n"), "{said}");
    }
}
