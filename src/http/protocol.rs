//! A connection served to its end, over HTTP/1 or HTTP/2, whichever its client speaks.

use std::{future::Future, pin::pin, sync::Arc, task::Poll, time::Duration};

use hyper::{
    rt::Executor,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, sleep_until};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    exchange::{Exchanges, PIECE_BYTES},
    socket::{Activity, Phase, Socket},
};

/// What a connection holds of what it has read and not passed on, and so of a head at most.
const BUFFER_BYTES: usize = 64 << 10;

/// The most requests at a time over HTTP/2: as few as RFC 9113, 6.5.2, advises at least.
const STREAMS: u32 = 100;

/// What of their bodies, together, may have come over HTTP/2 and wait to be read.
const WINDOW_BYTES: u32 = 256 << 10;

/// The most bytes of a head over HTTP/2.
const HEAD_BYTES: u32 = 16 << 10;

/// How long a client may take to hear that its connection ends.
const GOODBYE: Duration = Duration::from_secs(1);

/// Serves a connection to its end; once `close` is cancelled that is the end of the requests under way. A connection
/// without one ends after `idle`.
pub(super) async fn serve(
    mut socket: Socket,
    exchanges: Exchanges,
    idle: Duration,
    tasks: TaskTracker,
    close: CancellationToken,
) {
    let http2 = tokio::select! {
        http2 = socket.speaks_http2() => http2,
        // A request that is not here yet never will be.
        () = close.cancelled() => return,
    };
    match http2 {
        Ok(true) => serve_http2(socket, exchanges, idle, tasks, close).await,
        Ok(false) => serve_http1(socket, exchanges, close).await,
        Err(error) => tracing::debug!(%error, "connection ended"),
    }
}

async fn serve_http1(socket: Socket, exchanges: Exchanges, close: CancellationToken) {
    let activity = Arc::clone(&exchanges.activity);
    let mut http = http1::Builder::new();
    // The socket has clocks of its own, which tell an idle connection from a slow head.
    http.header_read_timeout(None).keep_alive(!exchanges.for_probes).max_buf_size(BUFFER_BYTES);
    let service = service_fn(move |request| exchanges.answer(request));
    let mut connection = pin!(http.serve_connection(TokioIo::new(socket), service));
    tokio::select! {
        ended = &mut connection => return trace(ended),
        () = close.cancelled() => {}
    }
    if matches!(activity.phase(), Phase::Idle | Phase::Head | Phase::Evicted) {
        // An answer may still be on its way through the socket; a request that is not here yet never will be.
        connection.as_mut().graceful_shutdown();
        let flushed = std::future::poll_fn(|context| {
            let ended = connection.as_mut().poll(context);
            if activity.phase() == Phase::Head { Poll::Ready(None) } else { ended.map(Some) }
        });
        return if let Some(ended) = flushed.await {
            trace(ended)
        };
    }
    connection.as_mut().graceful_shutdown();
    trace(connection.await);
}

async fn serve_http2(
    socket: Socket,
    exchanges: Exchanges,
    idle: Duration,
    tasks: TaskTracker,
    close: CancellationToken,
) {
    let activity = Arc::clone(&exchanges.activity);
    activity.multiplex();
    let mut http = http2::Builder::new(Tracked(tasks));
    http.max_concurrent_streams(STREAMS)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .max_send_buf_size(PIECE_BYTES)
        .max_header_list_size(HEAD_BYTES);
    let service = service_fn(move |request| exchanges.answer(request));
    let mut connection = pin!(http.serve_connection(TokioIo::new(socket), service));
    tokio::select! {
        ended = &mut connection => return trace(ended),
        () = close.cancelled() => {}
        () = idle_for(&activity, idle) => {}
    }
    // The client is told which of its requests are still answered, so that it sends the others elsewhere.
    connection.as_mut().graceful_shutdown();
    tokio::select! {
        ended = &mut connection => trace(ended),
        () = idle_for(&activity, GOODBYE) => {}
    }
}

/// Resolves once no request has been under way for so long.
async fn idle_for(activity: &Activity, duration: Duration) {
    loop {
        let since = activity.waiting_since();
        let now = Instant::now();
        let Some(due) = since.unwrap_or(now).checked_add(duration) else {
            return std::future::pending().await;
        };
        if since.is_some() && due <= now {
            return;
        }
        sleep_until(due).await;
    }
}

/// Spawns the requests of a connection among the server's own tasks, so that a shutdown waits for them.
#[derive(Clone)]
struct Tracked(TaskTracker);

impl<F> Executor<F> for Tracked
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, future: F) {
        self.0.spawn(future);
    }
}

fn trace(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}
