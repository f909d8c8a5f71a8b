//! HTTP/2 by hand: its connections have the limits of all others.

use std::time::Duration;

use axum::http::StatusCode;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    lifecycle::{run, talk},
    server::{ENDLESS, Server},
};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(30);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// RFC 9113, 4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A head: a method and a scheme of HPACK's table, a path and an authority as they are (RFC 7541, 6).
fn head(method: u8, path: &str) -> Vec<u8> {
    let text = |index: u8, value: &str| {
        [&[0x40 | index, value.len() as u8][..], value.as_bytes()].concat()
    };
    [vec![0x80 | method, 0x86], text(4, path), text(1, "localhost")].concat()
}

fn get(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &head(2, path))
}

fn generate(stream: u32) -> Vec<u8> {
    let body = json!({"num_inference_steps": ENDLESS}).to_string();
    let head = frame(HEADERS, END_HEADERS, stream, &head(3, "/v1/images/generations"));
    [head, frame(DATA, END_STREAM, stream, body.as_bytes())].concat()
}

/// A connection that has begun with these settings.
async fn begun(address: std::net::SocketAddr, settings: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, settings)].concat()).await.unwrap();
    stream
}

/// A frame that came: its kind, its stream and its payload.
type Frame = (u8, u32, Vec<u8>);

/// The next frame; `None` once the connection has ended, or is given up.
async fn next(stream: &mut TcpStream) -> Option<Frame> {
    let read = async {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.ok()?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await.ok()?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Some((head[3], stream, payload))
    };
    tokio::time::timeout(PATIENCE, read).await.unwrap()
}

/// All frames that come until the connection ends.
async fn rest(stream: &mut TcpStream) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let Some(frame) = next(stream).await {
        frames.push(frame);
    }
    frames
}

#[tokio::test(flavor = "multi_thread")]
async fn the_whole_api_answers_over_http2() {
    let server = Server::start().await;
    let running = run(&server, LONG).await;
    let mut stream = begun(running.address, &[]).await;
    stream.write_all(&[get(1, "/v2"), get(3, "/v2/health/live")].concat()).await.unwrap();
    let (mut first, mut second) = (Vec::new(), Vec::new());
    while first.is_empty() || second.is_empty() {
        match next(&mut stream).await.unwrap() {
            (DATA, 1, payload) => first.extend(payload),
            (DATA, 3, payload) => second.extend(payload),
            _ => {}
        }
    }
    assert_eq!(first, server.get("/v2").await.body);
    assert_eq!(second, b"{\"live\":true}");
    running.stop.send(()).unwrap();
    assert!(rest(&mut stream).await.iter().any(|(kind, ..)| *kind == GOAWAY));
    running.ended.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_with_a_word() {
    let server = Server::with(|settings| settings.idle_timeout = SHORT).await;
    let running = run(&server, LONG).await;
    let mut stream = begun(running.address, &[]).await;
    assert!(rest(&mut stream).await.iter().any(|(kind, ..)| *kind == GOAWAY));
    // Whoever only begins to say what it speaks has the time of a head.
    let server = Server::with(|settings| settings.head_timeout = SHORT).await;
    let running = run(&server, LONG).await;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    stream.write_all(&PREFACE[..9]).await.unwrap();
    assert_eq!(rest(&mut stream).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_of_its_answer_is_given_up() {
    let server = Server::with(|settings| settings.idle_timeout = SHORT).await;
    let running = run(&server, LONG).await;
    // SETTINGS_INITIAL_WINDOW_SIZE is 0: the client takes heads, and no byte of a body.
    let mut stream = begun(running.address, &[0, 4, 0, 0, 0, 0]).await;
    stream.write_all(&get(1, "/openapi.json")).await.unwrap();
    let frames = rest(&mut stream).await;
    assert!(frames.iter().any(|(kind, stream, _)| (*kind, *stream) == (HEADERS, 1)));
    assert!(frames.iter().all(|(kind, ..)| *kind != DATA));
}

#[tokio::test(flavor = "multi_thread")]
async fn work_keeps_a_connection_and_its_end_ends_the_work() {
    let server = Server::with(|settings| settings.idle_timeout = SHORT).await;
    let running = run(&server, LONG).await;
    let mut stream = begun(running.address, &[]).await;
    stream.write_all(&[generate(1), generate(3)].concat()).await.unwrap();
    server.until("running", |server| server.running() == 2).await;
    let began = tokio::time::Instant::now();
    while began.elapsed() < 4 * SHORT {
        let health = talk(running.address, "GET", "/health", "").await;
        assert!(health.starts_with("HTTP/1.1 200"));
    }
    assert_eq!(server.running(), 2);
    // RST_STREAM with CANCEL: one of them is given up, the other goes on.
    stream.write_all(&frame(3, 0, 1, &8u32.to_be_bytes())).await.unwrap();
    server.until("one is gone", |server| server.running() == 1).await;
    drop(stream);
    server.until("both are gone", |server| server.running() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_make_room_and_busy_ones_do_not() {
    let server = Server::with(|settings| settings.max_connections = 1).await;
    let running = run(&server, LONG).await;
    let mut idle = begun(running.address, &[]).await;
    assert!(talk(running.address, "GET", "/v2", "").await.starts_with("HTTP/1.1 200"));
    rest(&mut idle).await;
    let mut busy = begun(running.address, &[]).await;
    busy.write_all(&generate(1)).await.unwrap();
    server.until("running", |server| server.running() == 1).await;
    let refused = talk(running.address, "GET", "/v2", "").await;
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert_eq!(server.get("/health").await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_a_hundred_requests_at_a_time_and_no_more() {
    let server = Server::start().await;
    let running = run(&server, LONG).await;
    let mut stream = begun(running.address, &[]).await;
    let settings = loop {
        match next(&mut stream).await.unwrap() {
            (SETTINGS, _, settings) if !settings.is_empty() => break settings,
            _ => {}
        }
    };
    let (settings, _) = settings.as_chunks::<6>();
    // SETTINGS_MAX_CONCURRENT_STREAMS.
    assert!(settings.contains(&[0, 3, 0, 0, 0, 100]), "{settings:?}");
}
