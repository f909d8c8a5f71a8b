//! Shutdown, over a real socket: readiness first, what is in flight finishes, then the end.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};
use understudy::http::{self, Shutdown};

use crate::server::{ENDLESS, Server};

pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) stop: oneshot::Sender<()>,
    pub(crate) ended: JoinHandle<std::io::Result<()>>,
}

pub(crate) async fn run(server: &Server, drain: Duration) -> Running {
    run_until(server, Shutdown { drain, ..Shutdown::default() }).await
}

async fn run_until(server: &Server, shutdown: Shutdown) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let told = async {
        let _ = stopped.await;
    };
    let ended = tokio::spawn(http::serve(listener, server.app.clone(), told, shutdown));
    Running { address, stop, ended }
}

/// Sends a request and reads what comes back, to the end of the connection.
pub(crate) async fn talk(address: SocketAddr, method: &str, path: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await.unwrap();
    String::from_utf8_lossy(&reply).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_flight_finishes_and_nothing_new_begins() {
    let server = Server::start().await;
    let Running { address, stop, ended } = run(&server, Duration::from_secs(60)).await;
    assert!(talk(address, "GET", "/health", "").await.starts_with("HTTP/1.1 200"));

    let body = "{\"num_inference_steps\": 3000}";
    let generate = "/v1/images/generations";
    let in_flight = tokio::spawn(talk(address, "POST", generate, body));
    server.until("running", |server| server.running() == 1).await;
    stop.send(()).unwrap();

    // The listener still answers: not ready, and no.
    let mut health = talk(address, "GET", "/health", "").await;
    while health.starts_with("HTTP/1.1 200") {
        health = talk(address, "GET", "/health", "").await;
    }
    assert!(health.starts_with("HTTP/1.1 503") && health.contains("draining"), "{health}");
    let refused = talk(address, "POST", generate, "{}").await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("shutting down"), "{refused}");

    let finished = in_flight.await.unwrap();
    assert!(finished.starts_with("HTTP/1.1 200"), "{finished}");
    ended.await.unwrap().unwrap();
    assert!(TcpStream::connect(address).await.is_err(), "the listener is closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_taken_until_the_delay_is_over() {
    let server = Server::start().await;
    let shutdown = Shutdown { delay: Duration::from_secs(3600), drain: Duration::from_secs(60) };
    let Running { address, stop, ended } = run_until(&server, shutdown).await;
    let generate = |steps: &str| format!("{{\"num_inference_steps\": {steps}}}");
    stop.send(()).unwrap();
    let mut health = talk(address, "GET", "/health", "").await;
    while health.starts_with("HTTP/1.1 200") {
        health = talk(address, "GET", "/health", "").await;
    }
    assert!(health.contains("draining"), "{health}");
    for probe in ["/v2/health/ready", "/v2/models/classes/ready"] {
        let reply = talk(address, "GET", probe, "").await;
        assert!(reply.starts_with("HTTP/1.1 503"), "{probe}: {reply}");
    }
    // Alive, and at work.
    let live = talk(address, "GET", "/v2/health/live", "").await;
    assert!(live.starts_with("HTTP/1.1 200"), "{live}");
    let image = talk(address, "POST", "/v1/images/generations", &generate("2")).await;
    assert!(image.starts_with("HTTP/1.1 200"), "{image}");
    ended.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_ends_in_time() {
    let server = Server::start().await;
    let Running { address, stop, ended } = run(&server, Duration::from_millis(200)).await;
    let body = format!("{{\"num_inference_steps\": {ENDLESS}}}");
    let in_flight =
        tokio::spawn(async move { talk(address, "POST", "/v1/images/generations", &body).await });
    server.until("running", |server| server.running() == 1).await;
    stop.send(()).unwrap();
    ended.await.unwrap().unwrap();
    in_flight.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_stops_at_once() {
    let server = Server::start().await;
    let Running { address, stop, ended } = run(&server, Duration::from_secs(60)).await;
    // A connection that is kept alive does not hold it up.
    let _idle = TcpStream::connect(address).await.unwrap();
    stop.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(10), ended).await.unwrap().unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disconnected_socket_cancels_its_images() {
    let server = Server::start().await;
    let Running { address, stop: _stop, .. } = run(&server, Duration::from_secs(1)).await;
    let body = format!("{{\"num_inference_steps\": {ENDLESS}}}");
    let client =
        tokio::spawn(async move { talk(address, "POST", "/v1/images/generations", &body).await });
    server.until("running", |server| server.running() == 1).await;
    client.abort();
    server.until("gone", |server| server.running() == 0).await;
}
