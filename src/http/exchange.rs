//! The requests over a connection, each from its head to the last byte of its answer.

use std::{
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    Router,
    body::{Body, Bytes, HttpBody},
    extract::ConnectInfo,
    http::{Response, Version},
};
use hyper::body::{Frame, Incoming, SizeHint};
use tower::ServiceExt;

use super::socket::Activity;

/// How much of an answer is given to a connection that several share before more is.
pub(super) const PIECE_BYTES: usize = 64 << 10;

/// Marks the requests over a connection that is only for probes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Crowded;

/// Who answers the requests of one connection.
#[derive(Clone)]
pub(super) struct Exchanges {
    pub(super) router: Router,
    pub(super) activity: Arc<Activity>,
    pub(super) peer: SocketAddr,
    pub(super) for_probes: bool,
}

impl Exchanges {
    /// Answers a request, which counts from now on.
    pub(super) fn answer(
        &self,
        request: hyper::Request<Incoming>,
    ) -> impl Future<Output = Result<Response<Answer>, Infallible>> + Send + use<> {
        let activity = &self.activity;
        let mut exchange = Exchange::new(activity, &request);
        let mut request =
            request.map(|body| Body::new(Received { body, activity: Arc::clone(activity) }));
        request.extensions_mut().insert(ConnectInfo(self.peer));
        if self.for_probes {
            request.extensions_mut().insert(Crowded);
        }
        let router = self.router.clone();
        async move {
            let response = router.oneshot(request).await?;
            exchange.answers();
            Ok(response.map(|body| Answer { body, rest: Bytes::new(), exchange }))
        }
    }
}

/// One request over a connection.
struct Exchange {
    activity: Arc<Activity>,
    /// Whether others are beside it.
    beside_others: bool,
    /// Whether the client has yet to take what was given; known where others are beside it.
    given: bool,
}

impl Exchange {
    fn new(activity: &Arc<Activity>, request: &hyper::Request<Incoming>) -> Self {
        let beside_others = request.version() == Version::HTTP_2;
        if beside_others {
            activity.opened();
        } else {
            activity.requested(request.body().is_end_stream());
        }
        Self { activity: Arc::clone(activity), beside_others, given: false }
    }

    fn answers(&mut self) {
        if self.beside_others {
            self.gives(true);
        } else {
            self.activity.answers();
        }
    }

    fn gives(&mut self, something: bool) {
        if self.beside_others && self.given != something {
            self.given = something;
            self.activity.gave(something);
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if self.beside_others {
            self.gives(false);
            self.activity.closed();
        } else {
            self.activity.over();
        }
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

/// An answer's body, with the exchange that ends when it does. Where others are beside it, it comes in pieces: who asks
/// for the next has taken the last.
pub(super) struct Answer {
    body: Body,
    /// What of a frame is left.
    rest: Bytes,
    exchange: Exchange,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        this.exchange.gives(false);
        if this.rest.is_empty() {
            match Pin::new(&mut this.body).poll_frame(context) {
                Poll::Ready(Some(Ok(frame))) if this.exchange.beside_others => {
                    match frame.into_data() {
                        Ok(data) => this.rest = data,
                        Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                    }
                }
                other => return other,
            }
        }
        this.exchange.gives(true);
        let piece = this.rest.split_to(this.rest.len().min(PIECE_BYTES));
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (body, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(body.lower() + rest);
        if let Some(upper) = body.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}
