//! The server's life: from a listener to the last byte of the last request in flight.

use std::{future::Future, io, time::Duration};

use tokio::{
    net::TcpListener,
    time::{Instant, timeout_at},
};

use super::{App, connections::Connections, socket::Patience};

/// Serves until `shutdown` resolves, then drains.
///
/// Readiness goes first and new work is refused with 503, as are requests whose bodies are still on their way and
/// whoever waits for a model to be loaded, while what is in flight finishes; then the listener closes. All of it takes
/// at most `drain`; what is still running then is abandoned.
///
/// # Errors
/// Never, so far: what the listener fails at passes.
pub async fn serve(
    listener: TcpListener,
    app: App,
    shutdown: impl Future<Output = ()> + Send + 'static,
    drain: Duration,
) -> io::Result<()> {
    let settings = &app.settings;
    let patience = Patience { head: settings.head_timeout, idle: settings.idle_timeout };
    let router = super::router(app.clone());
    let connections = Connections::new(router, settings.max_connections, patience);
    let mut accepting = Box::pin(connections.accept(&listener));

    tokio::select! {
        () = &mut accepting => return Ok(()),
        () = shutdown => {}
    }
    let now = Instant::now();
    let until = now.checked_add(drain).unwrap_or(now);
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
