//! A client's socket, and what is going on over it: waiting is bounded, and a client that has said all it has to say
//! still gets its answer.
//!
//! Whoever closes the sending half of a connection looks the same as whoever is gone, until something is sent. So the
//! first bytes of the answer, which are the same for every answer, go out at once: a client that is gone refuses them,
//! and its request is cancelled.

use std::{
    future::Future,
    io::{self, ErrorKind},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, Interest, ReadBuf},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::{Instant, Sleep, sleep_until},
};

/// What every answer over HTTP/1 begins with.
const FIRST_BYTES: &[u8] = b"HTTP/1.";

/// What a client that speaks HTTP/2 begins with, and no other (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a client may keep a connection waiting.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// From the first byte of a request's head to its last.
    pub(super) head: Duration,
    /// Between requests, and for a client that takes none of its answer.
    pub(super) idle: Duration,
}

/// What is going on over a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// No request is under way.
    Idle,
    /// A part of a request's head has come.
    Head,
    /// A request is under way, and its body has not come to its end.
    Body,
    /// A request has come, and its answer has not begun.
    Working,
    /// The answer is on its way.
    Answering,
    /// Closed, to make room for others.
    Evicted,
}

/// The phase of a connection, and since when: shared by the socket, the requests over it, and who makes room.
#[derive(Debug)]
pub(super) struct Activity(Mutex<Now>);

#[derive(Debug)]
struct Now {
    phase: Phase,
    since: Instant,
    /// Whether bytes have come after the request under way: the next one has begun.
    ahead: bool,
    /// Whether the client has yet to take some of what was sent.
    unsent: bool,
    /// Whether the reader of a body has had all that has come of it.
    starved: bool,
    /// The requests under way, where there may be several.
    streams: Option<Streams>,
    /// Who reads the socket, where the next phase is what they wait for.
    reader: Option<Waker>,
}

/// The requests under way over HTTP/2.
#[derive(Debug, Default)]
struct Streams {
    open: usize,
    /// Those that have given of their answers what the client has yet to take.
    answering: usize,
}

impl Activity {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Now {
            phase: Phase::Idle,
            since: Instant::now(),
            ahead: false,
            unsent: false,
            starved: false,
            streams: None,
            reader: None,
        })))
    }

    /// From now on requests come beside each other. The connection works while any of them does, and answers while all of
    /// them wait for the client.
    pub(super) fn multiplex(&self) {
        self.lock().change(|_| {});
    }

    /// A request has come beside others.
    pub(super) fn opened(&self) {
        self.lock().change(|streams| streams.open += 1);
    }

    /// One of them has given the client something to take, or the client has taken it.
    pub(super) fn gave(&self, something: bool) {
        self.lock().change(|streams| match something {
            true => streams.answering += 1,
            false => streams.answering -= 1,
        });
    }

    /// One of them, which has nothing to be taken, is over.
    pub(super) fn closed(&self) {
        self.lock().change(|streams| streams.open -= 1);
    }

    pub(super) fn phase(&self) -> Phase {
        self.lock().phase
    }

    /// Since when the client keeps the connection waiting; `None` while a request or its answer is under way.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        let now = self.lock();
        now.waits().then_some(now.since)
    }

    /// No request begins from now on; false where one is under way.
    pub(super) fn evict(&self) -> bool {
        let mut now = self.lock();
        let waiting = now.waits();
        if waiting {
            now.phase = Phase::Evicted;
        }
        waiting
    }

    /// A request's head has come; its body follows unless it is `complete`.
    pub(super) fn requested(&self, complete: bool) {
        let mut now = self.lock();
        (now.ahead, now.starved) = (false, false);
        now.enter(if complete { Phase::Working } else { Phase::Body });
    }

    /// The request's body has come to its end, or nobody reads on.
    pub(super) fn complete(&self) {
        let mut now = self.lock();
        if now.phase == Phase::Body {
            now.enter(Phase::Working);
            now.wake();
        }
    }

    /// The reader of the request's body has had all that has come of it, and wants more.
    pub(super) fn starves(&self) {
        let mut now = self.lock();
        now.starved = true;
        now.wake();
    }

    fn is_multiplexed(&self) -> bool {
        self.lock().streams.is_some()
    }

    /// What is going on, and whether who reads the body has had all of it; whoever asks is woken when that changes.
    fn look(&self, context: &Context<'_>) -> (Phase, bool) {
        let mut now = self.lock();
        now.reader = Some(context.waker().clone());
        (now.phase, now.starved)
    }

    pub(super) fn answers(&self) {
        self.lock().enter(Phase::Answering);
    }

    /// The request is over, in whatever way.
    pub(super) fn over(&self) {
        let mut now = self.lock();
        let next = if now.ahead { Phase::Head } else { Phase::Idle };
        now.enter(next);
        now.wake();
    }

    /// Something is sent to the client.
    fn sends(&self) {
        self.lock().unsent = true;
    }

    /// The client has taken all that was sent.
    fn sent(&self) {
        let mut now = self.lock();
        if std::mem::take(&mut now.unsent) && now.phase == Phase::Idle {
            // It had no reason to ask for more before.
            now.since = Instant::now();
            now.wake();
        }
    }

    fn received_nothing(&self) {
        self.lock().starved = false;
    }

    fn received(&self) {
        let mut now = self.lock();
        now.starved = false;
        match now.phase {
            // Not all that comes is of a request.
            _ if now.streams.is_some() => {}
            Phase::Idle => now.enter(Phase::Head),
            Phase::Working | Phase::Answering => now.ahead = true,
            Phase::Head | Phase::Body | Phase::Evicted => {}
        }
    }

    /// When the client must have sent something; whoever asks is woken where that begins to be so.
    fn due(&self, patience: Patience, context: &Context<'_>) -> Option<Instant> {
        let mut now = self.lock();
        now.reader = Some(context.waker().clone());
        match now.phase {
            Phase::Idle if now.unsent || now.streams.is_some() => None,
            Phase::Idle => now.since.checked_add(patience.idle),
            Phase::Head => now.since.checked_add(patience.head),
            Phase::Evicted => Some(now.since),
            Phase::Answering if now.streams.is_some() => now.since.checked_add(patience.idle),
            // Whoever reads a body has a clock of its own, and so has whoever writes an answer.
            Phase::Body | Phase::Working | Phase::Answering => None,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Now {
    fn enter(&mut self, phase: Phase) {
        if self.phase != Phase::Evicted {
            self.phase = phase;
            self.since = Instant::now();
        }
    }

    fn change(&mut self, streams: impl FnOnce(&mut Streams)) {
        let now = self.streams.get_or_insert_default();
        streams(now);
        let phase = match now {
            Streams { open: 0, .. } => Phase::Idle,
            Streams { open, answering } if open == answering => Phase::Answering,
            Streams { .. } => Phase::Working,
        };
        self.enter(phase);
        self.wake();
    }

    /// Whether nothing is under way.
    fn waits(&self) -> bool {
        matches!(self.phase, Phase::Idle | Phase::Head) && !self.unsent
    }

    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }
}

/// The socket of a connection.
pub(super) struct Socket {
    reads: Arc<OwnedReadHalf>,
    writes: OwnedWriteHalf,
    activity: Arc<Activity>,
    patience: Patience,
    /// The clock of reading; of no meaning in phases that have none.
    clock: Pin<Box<Sleep>>,
    /// Runs while the client takes nothing of what is sent.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Whether the client has closed its sending half.
    ended: bool,
    /// Resolves once the connection is broken, where it is watched for that.
    broken: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// How many of the first bytes of the next answer went out already.
    sent_early: usize,
    /// What was read to tell the version, and is yet to be read by who serves it.
    begun: Vec<u8>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream, activity: Arc<Activity>, patience: Patience) -> Self {
        let (reads, writes) = stream.into_split();
        Self {
            reads: Arc::new(reads),
            writes,
            activity,
            patience,
            clock: Box::pin(sleep_until(Instant::now())),
            stalled: None,
            ended: false,
            broken: None,
            sent_early: 0,
            begun: Vec::new(),
        }
    }

    /// Whether the client speaks HTTP/2: what it begins with is looked at, and left to be read.
    pub(super) async fn speaks_http2(&mut self) -> io::Result<bool> {
        let mut begun = Vec::with_capacity(PREFACE.len());
        while begun.len() < PREFACE.len() && PREFACE.starts_with(&begun) {
            let more = (PREFACE.len() - begun.len()) as u64;
            if (&mut *self).take(more).read_buf(&mut begun).await? == 0 {
                break;
            }
        }
        let speaks = begun == PREFACE;
        self.begun = begun;
        Ok(speaks)
    }

    /// Pending until the client has kept the connection waiting for too long.
    fn wait(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(due) = self.activity.due(self.patience, context) else { return Poll::Pending };
        if self.clock.deadline() != due {
            self.clock.as_mut().reset(due);
        }
        ready!(self.clock.as_mut().poll(context));
        Poll::Ready(Err(ErrorKind::TimedOut.into()))
    }

    /// The client sends no more. While it has an answer to come that is kept from who asks, and the connection is
    /// watched instead.
    fn after_the_end(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (phase, starved) = self.activity.look(context);
        match phase {
            // HTTP/2 goes on in both directions for as long as there is a connection.
            _ if self.activity.is_multiplexed() => return Poll::Ready(Ok(())),
            Phase::Working | Phase::Answering => {}
            // Of what has come a part may still be on its way to who reads the body.
            Phase::Body if !starved => return Poll::Pending,
            Phase::Idle | Phase::Head | Phase::Body | Phase::Evicted => return Poll::Ready(Ok(())),
        }
        if phase == Phase::Working && self.sent_early == 0 {
            match self.writes.try_write(FIRST_BYTES) {
                Ok(sent) => self.sent_early = sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        let broken = self.broken.get_or_insert_with(|| {
            let reads = Arc::clone(&self.reads);
            Box::pin(async move {
                let _ = reads.ready(Interest::ERROR).await;
            })
        });
        ready!(broken.as_mut().poll(context));
        self.broken = None;
        Poll::Ready(Err(ErrorKind::ConnectionReset.into()))
    }

    /// What came of sending: progress, or a client that takes nothing.
    fn sending(
        &mut self,
        context: &mut Context<'_>,
        sent: Poll<io::Result<usize>>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if sent.is_ready() {
            self.stalled = None;
            return sent;
        }
        let idle = self.patience.idle;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(idle)));
        ready!(stalled.as_mut().poll(context));
        self.stalled = None;
        // The system tells of room only once there is much of it. Whoever has taken little has made some.
        let stream: &TcpStream = OwnedWriteHalf::as_ref(&self.writes);
        Poll::Ready(SockRef::from(stream).send(bytes).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
            _ => error,
        }))
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.begun.is_empty() {
            let length = this.begun.len().min(buffer.remaining());
            buffer.put_slice(&this.begun[..length]);
            this.begun.drain(..length);
            return Poll::Ready(Ok(()));
        }
        loop {
            if this.ended {
                return this.after_the_end(context);
            }
            let stream: &TcpStream = OwnedReadHalf::as_ref(&this.reads);
            match stream.poll_read_ready(context) {
                Poll::Ready(ready) => ready?,
                Poll::Pending => return this.wait(context),
            }
            match stream.try_read(buffer.initialize_unfilled()) {
                Ok(0) if buffer.remaining() > 0 => {
                    this.ended = true;
                    // Whoever reads the body looks again: what came before the end may have completed it.
                    this.activity.received_nothing();
                }
                Ok(read) => {
                    buffer.advance(read);
                    this.activity.received();
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let early = this.sent_early.min(bytes.len());
        if early > 0 {
            this.sent_early -= early;
            return Poll::Ready(Ok(early));
        }
        this.activity.sends();
        let sent = Pin::new(&mut this.writes).poll_write(context, bytes);
        this.sending(context, sent, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = slices.iter().find(|slice| !slice.is_empty());
        let first: &[u8] = first.map_or(&[], |slice| slice);
        if self.sent_early > 0 {
            return self.poll_write(context, first);
        }
        let this = self.get_mut();
        this.activity.sends();
        let sent = Pin::new(&mut this.writes).poll_write_vectored(context, slices);
        this.sending(context, sent, first)
    }

    fn is_write_vectored(&self) -> bool {
        self.writes.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Whoever writes flushes once nothing is left to be written.
        let this = self.get_mut();
        ready!(Pin::new(&mut this.writes).poll_flush(context))?;
        this.activity.sent();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().writes).poll_shutdown(context)
    }
}
