//! The server's life: from a listener to the last byte of the last request in flight.

use std::{future::Future, io, time::Duration};

use tokio::{net::TcpListener, time::Instant};
use tokio_util::sync::CancellationToken;

use super::App;

/// Serves until `shutdown` resolves, then drains.
///
/// Readiness goes first and new work is refused with 503, while what is in flight finishes; then
/// the listener closes. All of it takes at most `drain`; what is still running then is abandoned.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    app: App,
    shutdown: impl Future<Output = ()> + Send + 'static,
    drain: Duration,
) -> io::Result<()> {
    let close = CancellationToken::new();
    let server = axum::serve(listener, super::router(app.clone()))
        .with_graceful_shutdown(close.clone().cancelled_owned());
    let server = async move { server.await };
    tokio::pin!(server);

    tokio::select! {
        ended = &mut server => return ended,
        () = shutdown => {}
    }
    let until = Instant::now() + drain;
    app.draining.cancel();
    app.engine.drain();
    app.in_flight.close();
    tracing::info!(in_flight = app.in_flight.len(), "draining");

    let drained = async {
        tokio::select! {
            ended = &mut server => return ended,
            () = app.in_flight.wait() => {}
        }
        close.cancel();
        server.await
    };
    match tokio::time::timeout_at(until, drained).await {
        Ok(ended) => ended,
        Err(_) => {
            tracing::warn!(
                in_flight = app.in_flight.len(),
                "drain time is over, requests abandoned"
            );
            Ok(())
        }
    }
}
