//! Connections: how many there are, and what is served over each.
//!
//! Every connection takes a file descriptor, and whoever only connects takes one as well. So there is a limit; at it the
//! connection that has waited longest without a request makes room for the next. Where all have requests under way, a
//! few more are taken for those who ask whether the server is well; anybody else is told there to come back.

use std::{
    collections::HashMap,
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes, HttpBody},
    extract::{ConnectInfo, Request},
    http::StatusCode,
    middleware::Next,
    response::IntoResponse,
};
use hyper::{
    body::{Frame, Incoming, SizeHint},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt;

use super::{
    auth,
    error::Problem,
    socket::{Activity, Patience, Phase, Socket},
};

/// Connections beyond the limit, for those who ask whether the server is well.
const PROBES: usize = 8;

/// How long such a connection lives at most.
const PROBE_LIFE: Duration = Duration::from_secs(5);

/// File descriptors that are left to model folders, the database and whatever else is opened.
const FILES: usize = 24;

/// The limit where the operator names none and the system allows more.
const MOST: usize = 4096;

/// What a connection holds of what it has read and not passed on, and so of a head at most.
const BUFFER_BYTES: usize = 64 << 10;

/// How long nothing is accepted after the system had no descriptor for it.
const RECOVERY: Duration = Duration::from_millis(50);

/// The most connections at a time: those asked for, else as many as the system's limit on open files leaves.
///
/// # Errors
/// A sentence when that limit leaves too few.
pub fn most_connections(asked: Option<usize>) -> Result<usize, String> {
    let Some(files) = open_files_limit() else { return Ok(asked.unwrap_or(MOST)) };
    let open = std::fs::read_dir("/proc/self/fd").map_or(32, Iterator::count);
    let left = files.saturating_sub(open + FILES + PROBES);
    match asked {
        Some(asked) if asked > left => Err(format!(
            "--max-connections {asked}: the limit of {files} open files leaves {left}; raise it with `ulimit -n`, or ask for fewer"
        )),
        Some(asked) => Ok(asked),
        None if left == 0 => Err(format!(
            "the limit of {files} open files leaves none for connections; raise it with `ulimit -n` to {} or more",
            open + FILES + PROBES + 1
        )),
        None => Ok(left.min(MOST)),
    }
}

/// The soft limit, where this system tells it.
fn open_files_limit() -> Option<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// All connections of the server.
pub(super) struct Connections {
    router: Router,
    patience: Patience,
    ordinary: Arc<Semaphore>,
    probes: Arc<Semaphore>,
    open: Arc<Mutex<Open>>,
    /// One for every connection.
    pub(super) tasks: TaskTracker,
    /// Cancelled when connections are to end once what is under way is.
    pub(super) close: CancellationToken,
}

#[derive(Default)]
struct Open {
    next: u64,
    connections: HashMap<u64, Connection>,
}

struct Connection {
    activity: Arc<Activity>,
    task: AbortHandle,
    for_probes: bool,
}

impl Connections {
    pub(super) fn new(router: Router, limit: usize, patience: Patience) -> Self {
        Self {
            router,
            patience,
            ordinary: Arc::new(Semaphore::new(limit)),
            probes: Arc::new(Semaphore::new(PROBES)),
            open: Arc::default(),
            tasks: TaskTracker::new(),
            close: CancellationToken::new(),
        }
    }

    /// Accepts until told to close.
    pub(super) async fn accept(&self, listener: &TcpListener) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.close.cancelled() => return,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let place = tokio::select! {
                        place = self.place() => place,
                        () = self.close.cancelled() => return,
                    };
                    if let Some((permit, for_probes)) = place {
                        self.begin(stream, peer, permit, for_probes);
                    }
                }
                Err(error) if of_the_client(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "no connection accepted");
                    self.evict();
                    tokio::time::sleep(RECOVERY).await;
                }
            }
        }
    }

    /// Room for a connection, and whether it is only for probes. Waits for one to end only when all have requests
    /// under way, those for probes as well.
    async fn place(&self) -> Option<(OwnedSemaphorePermit, bool)> {
        if let Ok(permit) = Arc::clone(&self.ordinary).try_acquire_owned() {
            return Some((permit, false));
        }
        let (ordinary, probes) = (Arc::clone(&self.ordinary), Arc::clone(&self.probes));
        match self.evict() {
            Some(true) => return Some((probes.acquire_owned().await.ok()?, true)),
            Some(false) => return Some((ordinary.acquire_owned().await.ok()?, false)),
            None => {}
        }
        tokio::select! {
            permit = ordinary.acquire_owned() => Some((permit.ok()?, false)),
            permit = probes.acquire_owned() => Some((permit.ok()?, true)),
        }
    }

    /// Closes the connection that has waited longest without a request, if there is one, and tells whether it was for
    /// probes.
    fn evict(&self) -> Option<bool> {
        let open = self.lock();
        let waiting = open.connections.values().filter_map(|connection| {
            Some(((connection.for_probes, connection.activity.waiting_since()?), connection))
        });
        let (_, oldest) = waiting.min_by_key(|(order, _)| *order)?;
        oldest.activity.evict().then(|| oldest.task.abort())?;
        Some(oldest.for_probes)
    }

    /// Ends all of them, whatever is under way.
    pub(super) fn abandon(&self) {
        self.lock().connections.values().for_each(|connection| connection.task.abort());
    }

    fn begin(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        permit: OwnedSemaphorePermit,
        for_probes: bool,
    ) {
        let activity = Activity::new();
        let mut open = self.lock();
        let id = open.next;
        open.next += 1;
        let entry = Entry { id, open: Arc::clone(&self.open), _permit: permit };
        let serving = serve(
            self.router.clone(),
            Socket::new(stream, Arc::clone(&activity), self.patience),
            Arc::clone(&activity),
            peer,
            for_probes,
            self.close.clone(),
        );
        let task = self.tasks.spawn(async move {
            let _entry = entry;
            if for_probes {
                let _ = tokio::time::timeout(PROBE_LIFE, serving).await;
            } else {
                serving.await;
            }
        });
        let task = task.abort_handle();
        open.connections.insert(id, Connection { activity, task, for_probes });
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place; dropped when it ends, in whatever way.
struct Entry {
    id: u64,
    open: Arc<Mutex<Open>>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).connections.remove(&self.id);
    }
}

/// Whether a client went away before its connection was accepted.
fn of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionRefused | ConnectionAborted | ConnectionReset)
}

/// Serves one connection to its end; once `close` is cancelled that is the end of the request under way.
fn serve(
    router: Router,
    socket: Socket,
    activity: Arc<Activity>,
    peer: SocketAddr,
    for_probes: bool,
    close: CancellationToken,
) -> impl Future<Output = ()> + Send {
    let requests = Arc::clone(&activity);
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let exchange = Exchange::new(&requests, request.body().is_end_stream());
        let mut request =
            request.map(|body| Body::new(Received { body, activity: Arc::clone(&requests) }));
        request.extensions_mut().insert(ConnectInfo(peer));
        if for_probes {
            request.extensions_mut().insert(Crowded);
        }
        let router = router.clone();
        async move {
            let response = router.oneshot(request).await?;
            exchange.0.answers();
            Ok::<_, Infallible>(response.map(|body| Answer { body, _exchange: exchange }))
        }
    });
    async move {
        let mut http = http1::Builder::new();
        // The socket has clocks of its own, which tell an idle connection from a slow head.
        http.header_read_timeout(None).keep_alive(!for_probes).max_buf_size(BUFFER_BYTES);
        let connection = http.serve_connection(TokioIo::new(socket), service);
        tokio::pin!(connection);
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
}

fn trace(ended: hyper::Result<()>) {
    if let Err(error) = ended {
        tracing::debug!(%error, "connection ended");
    }
}

/// One request over a connection, from its head to the last byte of its answer.
struct Exchange(Arc<Activity>);

impl Exchange {
    fn new(activity: &Arc<Activity>, complete: bool) -> Self {
        activity.requested(complete);
        Self(Arc::clone(activity))
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.0.over();
    }
}

/// A request's body, whose end is noted.
struct Received {
    body: Incoming,
    activity: Arc<Activity>,
}

impl HttpBody for Received {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let frame = Pin::new(&mut this.body).poll_frame(context);
        match frame {
            Poll::Ready(None) => this.activity.complete(),
            Poll::Ready(_) if this.body.is_end_stream() => this.activity.complete(),
            Poll::Ready(_) => {}
            Poll::Pending => this.activity.starves(),
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        self.activity.complete();
    }
}

/// An answer's body, with the exchange that ends when it does.
struct Answer {
    body: Body,
    _exchange: Exchange,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Marks the requests over a connection that is only for probes.
#[derive(Debug, Clone, Copy)]
struct Crowded;

/// Middleware: 503 for all but probes where there are too many connections.
pub(super) async fn check_room(request: Request, next: Next) -> axum::response::Response {
    let crowded = request.extensions().get::<Crowded>().is_some();
    if !crowded || auth::is_probe(request.uri().path()) {
        return next.run(request).await;
    }
    let message = "there are as many connections as the server takes (--max-connections), all with requests under way; come back after Retry-After";
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "too_many_connections", message)
        .retry_after(Duration::from_secs(1))
        .into_response()
}
