//! The server's life: from a listener to the last byte of the last request in flight.

use std::{future::Future, io, time::Duration};

use tokio::{
    net::TcpListener,
    time::{Instant, sleep, timeout_at},
};

use super::{App, connections::Connections, socket::Patience};

/// How long a shutdown may take.
#[derive(Debug, Clone, Copy, Default)]
pub struct Shutdown {
    /// While the server is not ready any more, and takes requests all the same: a load balancer learns of it late.
    pub delay: Duration,
    /// After that, for what is in flight.
    pub drain: Duration,
}

/// Serves until `stop` resolves, then shuts down.
///
/// Readiness goes first. After `shutdown.delay` new work is refused with 503, as are requests whose bodies are still on their way and
/// whoever waits for a model to be loaded, while what is in flight finishes; then the listener closes. This takes
/// at most `shutdown.drain`; what is still running then is abandoned.
///
/// # Errors
/// Never, so far: what the listener fails at passes.
pub async fn serve(
    listener: TcpListener,
    app: App,
    stop: impl Future<Output = ()> + Send + 'static,
    shutdown: Shutdown,
) -> io::Result<()> {
    let settings = &app.settings;
    let patience = Patience { head: settings.head_timeout, idle: settings.idle_timeout };
    let router = super::router(app.clone());
    let connections = Connections::new(router, settings.max_connections, patience);
    let mut accepting = Box::pin(connections.accept(&listener));

    tokio::select! {
        () = &mut accepting => return Ok(()),
        () = stop => {}
    }
    app.stopping.cancel();
    if !shutdown.delay.is_zero() {
        tracing::info!(
            seconds = shutdown.delay.as_secs(),
            "told to stop; not ready any more, requests are taken for so long"
        );
        tokio::select! {
            () = &mut accepting => return Ok(()),
            () = sleep(shutdown.delay) => {}
        }
    }
    let now = Instant::now();
    let until = now.checked_add(shutdown.drain).unwrap_or(now);
    app.draining.cancel();
    app.engine.drain();
    app.in_flight.close();
    tracing::info!(in_flight = app.in_flight.len(), "draining");

    let finished = async {
        tokio::select! {
            () = &mut accepting => {}
            () = app.in_flight.wait() => {}
        }
    };
    let in_time = timeout_at(until, finished).await.is_ok();
    drop(accepting);
    drop(listener);
    connections.close.cancel();
    connections.tasks.close();
    if !in_time || timeout_at(until, connections.tasks.wait()).await.is_err() {
        tracing::warn!(
            in_flight = app.in_flight.len(),
            connections = connections.tasks.len(),
            "drain time is over, requests abandoned"
        );
        connections.abandon();
    }
    Ok(())
}
