//! Connections: how many there are, and what is served over each.
//!
//! Every connection takes a file descriptor, and whoever only connects takes one as well. So there is a limit; at it the
//! connection that has waited longest without a request makes room for the next. Where all have requests under way, a
//! few more are taken for those who ask whether the server is well; anybody else is told there to come back.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{Router, extract::Request, http::StatusCode, middleware::Next, response::IntoResponse};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    auth,
    error::Problem,
    exchange::{Crowded, Exchanges},
    protocol,
    socket::{Activity, Patience, Socket},
};

/// Connections beyond the limit, for those who ask whether the server is well.
const PROBES: usize = 8;

/// How long such a connection lives at most.
const PROBE_LIFE: Duration = Duration::from_secs(5);

/// File descriptors that are left to model folders, the database and whatever else is opened.
const FILES: usize = 24;

/// The limit where the operator names none and the system allows more.
const MOST: usize = 4096;

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
        let exchanges = Exchanges {
            router: self.router.clone(),
            activity: Arc::clone(&activity),
            peer,
            for_probes,
        };
        let serving = protocol::serve(
            Socket::new(stream, Arc::clone(&activity), self.patience),
            exchanges,
            self.patience.idle,
            self.tasks.clone(),
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
