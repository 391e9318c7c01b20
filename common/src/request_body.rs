//! The bodies of requests: bounded in bytes and in time, and together with all others.
//!
//! A tower layer before every handler of a daemon, whoever asks. A request is held until it is whole, and
//! health, reflection and the log-in are there for peers whom nobody knows.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::Request;
use http_body::Frame;
use tokio::time::Sleep;
use tonic::{Code, Status, body::Body};
use tower::{BoxError, Layer, Service};

use crate::{
    failure::Failure,
    login::{LOG_IN_MESSAGE_BYTES_MAX, server::LOG_INS_MAX},
};

/// Largest request of health and reflection, and of a method that there is not: a name.
pub const OPEN_REQUEST_BYTES_MAX: usize = 16 << 10;

/// Longest time from a request's head to its end: the largest one at 35 KiB/s.
pub(crate) const REQUEST_MAX: Duration = Duration::from_secs(30);

/// As long for a log-in, whose own limit of each step comes before.
const LOG_IN_MAX: Duration = Duration::from_secs(60);

/// Bytes before a message: its length and a flag.
const PREFIX_BYTES: usize = 5;

/// Most bytes of a service's requests and of log-ins that are not whole, of all callers together: those of
/// 32 streams that all ask for as much as they can.
const UNFINISHED_BYTES_MAX: usize = 16 << 20;

/// As many of health and reflection, beside those: neither kind takes room from the other.
const OPEN_UNFINISHED_BYTES_MAX: usize = UNFINISHED_BYTES_MAX / 4;

/// A request that asks for no room: a probe's always passes, whatever others hold.
const SMALL_BYTES: usize = 256;

/// What is taken of a method's requests.
#[derive(Debug, Clone, Copy)]
struct Bound {
    most: usize,
    time: Duration,
    room: Room,
}

/// What a request that is not whole is counted with.
#[derive(Debug, Clone, Copy)]
enum Room {
    /// Health and reflection.
    Open,
    /// All others.
    Service,
}

impl Bound {
    /// Requests of one message of a service for those who may call it.
    const fn of_service(bytes: usize) -> Self {
        Self { most: bytes + PREFIX_BYTES, time: REQUEST_MAX, room: Room::Service }
    }
}

/// Log-ins: two messages or three, of which one is as large as it may be.
const LOG_IN: Bound =
    Bound { most: 2 * LOG_IN_MESSAGE_BYTES_MAX, time: LOG_IN_MAX, room: Room::Service };

/// Everything else that asks nobody who he is.
const OPEN: Bound =
    Bound { most: OPEN_REQUEST_BYTES_MAX + PREFIX_BYTES, time: REQUEST_MAX, room: Room::Open };

const _: () = assert!(
    LOG_INS_MAX * LOG_IN.most <= UNFINISHED_BYTES_MAX / 2,
    "callers whom nobody knows leave half for the others"
);

/// Bytes of all requests that are not whole, by their room.
#[derive(Debug, Clone, Default)]
struct Unfinished {
    open: Arc<AtomicUsize>,
    service: Arc<AtomicUsize>,
}

impl Unfinished {
    fn held(&self, room: Room) -> &AtomicUsize {
        match room {
            Room::Open => &self.open,
            Room::Service => &self.service,
        }
    }
}

impl Room {
    const fn bytes_max(self) -> usize {
        match self {
            Self::Open => OPEN_UNFINISHED_BYTES_MAX,
            Self::Service => UNFINISHED_BYTES_MAX,
        }
    }
}

/// The layer; clones of it count together.
#[derive(Debug, Clone)]
pub struct RequestBodyLayer {
    /// Path prefixes and the bytes of their largest message, first match counts.
    sizes: &'static [(&'static str, usize)],
    unfinished: Unfinished,
}

impl RequestBodyLayer {
    /// For a daemon with a service of these sizes.
    #[must_use]
    pub fn new(sizes: &'static [(&'static str, usize)]) -> Self {
        Self { sizes, unfinished: Unfinished::default() }
    }

    fn bound(&self, path: &str) -> Bound {
        if path.starts_with("/marcot.auth.v1.AuthService/") {
            return LOG_IN;
        }
        let size = self.sizes.iter().find(|(prefix, _)| path.starts_with(prefix));
        size.map_or(OPEN, |(_, bytes)| Bound::of_service(*bytes))
    }
}

impl<S> Layer<S> for RequestBodyLayer {
    type Service = RequestBodyService<S>;

    fn layer(&self, inner: S) -> RequestBodyService<S> {
        RequestBodyService { inner, layer: self.clone() }
    }
}

/// The layer's service.
#[derive(Debug, Clone)]
pub struct RequestBodyService<S> {
    inner: S,
    layer: RequestBodyLayer,
}

impl<S, B> Service<Request<B>> for RequestBodyService<S>
where
    S: Service<Request<Body>>,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> S::Future {
        let bound = self.layer.bound(request.uri().path());
        let unfinished = self.layer.unfinished.clone();
        let bounded = |body: B| Body::new(RequestBody::new(Body::new(body), bound, unfinished));
        self.inner.call(request.map(bounded))
    }
}

/// A request's body.
struct RequestBody {
    inner: Body,
    bound: Bound,
    length: usize,
    /// The prefix of the first message, as far as it has come.
    prefix: Vec<u8>,
    unfinished: Unfinished,
    deadline: Pin<Box<Sleep>>,
}

impl RequestBody {
    fn new(inner: Body, bound: Bound, unfinished: Unfinished) -> Self {
        let deadline = Box::pin(tokio::time::sleep(bound.time));
        Self { inner, bound, length: 0, prefix: Vec::new(), unfinished, deadline }
    }

    fn take(&mut self, data: &[u8]) -> Result<(), Failure> {
        self.length += data.len();
        let held = self.unfinished.held(self.bound.room);
        let all = held.fetch_add(data.len(), Ordering::Relaxed) + data.len();
        if self.length.max(self.announced(data)) > self.bound.most {
            let text = format!("a request of more than {} bytes", self.bound.most);
            return Err(Failure::new(Code::ResourceExhausted, "REQUEST_TOO_LARGE", text));
        }
        let most = self.bound.room.bytes_max();
        if all > most && self.length > SMALL_BYTES {
            let text =
                format!("requests that are not whole hold {all} bytes, at most {most} are allowed");
            return Err(Failure::new(Code::ResourceExhausted, "CALL_LIMIT", text)
                .retry_after(Duration::from_secs(1)));
        }
        Ok(())
    }

    /// Bytes that the first message will have, once it has said so: a handler makes room for them.
    fn announced(&mut self, data: &[u8]) -> usize {
        let missing = PREFIX_BYTES - self.prefix.len();
        self.prefix.extend(data.iter().take(missing));
        match self.prefix[..] {
            [_, a, b, c, d] => {
                (u32::from_be_bytes([a, b, c, d]) as usize).saturating_add(PREFIX_BYTES)
            }
            _ => 0,
        }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        self.unfinished.held(self.bound.room).fetch_sub(self.length, Ordering::Relaxed);
    }
}

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if this.deadline.as_mut().poll(context).is_ready() {
            let text = format!(
                "{} bytes of a request came in {} s, and no end",
                this.length,
                this.bound.time.as_secs()
            );
            let late = Failure::new(Code::DeadlineExceeded, "REQUEST_TIMEOUT", text);
            return Poll::Ready(Some(Err(late.to_status())));
        }
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(failure) = this.take(data)
        {
            return Poll::Ready(Some(Err(failure.to_status())));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::{BodyExt as _, StreamBody};

    use super::*;

    fn of(pieces: Vec<usize>, most: usize, unfinished: &Unfinished) -> RequestBody {
        let pieces =
            pieces.into_iter().map(|n| Ok::<_, Infallible>(Frame::data(vec![0; n].into())));
        let body = Body::new(StreamBody::new(futures::stream::iter(pieces)));
        RequestBody::new(body, Bound::of_service(most), unfinished.clone())
    }

    async fn reason(body: RequestBody) -> String {
        let status = body.collect().await.map(|_| ()).unwrap_err();
        Failure::from_status(&status).reason.into_owned()
    }

    /// Guards memory against requests that are large, and against many of which none is whole.
    #[tokio::test]
    async fn requests_are_bounded_each_and_together() {
        let unfinished = Unfinished::default();
        assert!(of(vec![5, 100], 100, &unfinished).collect().await.is_ok());
        assert_eq!(reason(of(vec![60, 46], 100, &unfinished)).await, "REQUEST_TOO_LARGE");
        let mut held = Vec::new();
        for _ in 0..16 {
            let mut body = of(vec![1 << 20], 1 << 20, &unfinished);
            body.frame().await.unwrap().unwrap();
            held.push(body);
        }
        assert_eq!(reason(of(vec![250, 250], 500, &unfinished)).await, "CALL_LIMIT");
        held.pop();
        assert!(of(vec![250, 250], 500, &unfinished).collect().await.is_ok());
    }

    /// Guards memory that a handler would reserve: a length is refused before its bytes are there.
    #[tokio::test]
    async fn a_request_that_announces_too_much_is_refused_at_its_first_bytes() {
        let announcing = |length: u32| {
            let bytes = [&[0][..], &length.to_be_bytes()].concat();
            let pieces = bytes.chunks(2).map(|piece| Frame::data(Bytes::copy_from_slice(piece)));
            let pieces: Vec<_> = pieces.map(Ok::<_, Infallible>).collect();
            let body = Body::new(StreamBody::new(futures::stream::iter(pieces)));
            RequestBody::new(body, Bound::of_service(100), Unfinished::default())
        };
        assert!(announcing(100).collect().await.is_ok());
        assert_eq!(reason(announcing(101)).await, "REQUEST_TOO_LARGE");
        assert_eq!(reason(announcing(u32::MAX)).await, "REQUEST_TOO_LARGE");
    }

    /// A request to a path of a layer, whole at once.
    fn request(layer: &RequestBodyLayer, path: &str, bytes: usize) -> RequestBody {
        let pieces = [Ok::<_, Infallible>(Frame::data(vec![0; bytes].into()))];
        let body = Body::new(StreamBody::new(futures::stream::iter(pieces)));
        RequestBody::new(body, layer.bound(path), layer.unfinished.clone())
    }

    /// As many of the largest health requests as there is room for, none of them whole.
    async fn fill_the_open_room(layer: &RequestBodyLayer) -> Vec<RequestBody> {
        let mut held = Vec::new();
        loop {
            let mut body = request(layer, CHECK, OPEN_REQUEST_BYTES_MAX);
            if body.frame().await.unwrap().is_err() {
                return held;
            }
            held.push(body);
        }
    }

    const CHECK: &str = "/grpc.health.v1.Health/Check";

    /// Guards those who are known against those who are not: health and reflection have a room of their own
    /// for requests that are not whole.
    #[tokio::test]
    async fn callers_whom_nobody_knows_leave_room_for_the_others() {
        let layer = RequestBodyLayer::new(&[("/service/", 1 << 20)]);
        let held = fill_the_open_room(&layer).await;
        assert_eq!(held.len(), OPEN_UNFINISHED_BYTES_MAX / OPEN_REQUEST_BYTES_MAX);
        assert_eq!(reason(request(&layer, "/there/is/none", 1000)).await, "CALL_LIMIT");
        for path in ["/service/Do", "/marcot.auth.v1.AuthService/LogIn"] {
            assert!(request(&layer, path, 1000).collect().await.is_ok(), "{path}");
        }
        drop(held);
        assert!(request(&layer, "/there/is/none", 1000).collect().await.is_ok());
    }

    /// Guards a daemon against being killed for a probe that failed: its Check passes while strangers hold
    /// all the room of health, and while clones hold more than that of theirs. Without either rule the probe
    /// ends in CALL_LIMIT, and Kubernetes kills the recipient, and its server with it.
    #[tokio::test]
    async fn a_probe_passes_whatever_others_hold() {
        let layer = RequestBodyLayer::new(&[("/service/", 1 << 20)]);
        let mut clones = Vec::new();
        for _ in 0..5 {
            let mut body = request(&layer, "/service/Do", 1 << 20);
            body.frame().await.unwrap().unwrap();
            clones.push(body);
        }
        let largest = request(&layer, CHECK, OPEN_REQUEST_BYTES_MAX);
        assert!(largest.collect().await.is_ok(), "clones take none of the room of health");
        let strangers = fill_the_open_room(&layer).await;
        assert_eq!(strangers.len(), OPEN_UNFINISHED_BYTES_MAX / OPEN_REQUEST_BYTES_MAX);
        assert!(request(&layer, CHECK, 60).collect().await.is_ok());
        assert_eq!(reason(request(&layer, CHECK, 1000)).await, "CALL_LIMIT");
    }

    /// Guards against a request that never ends: the clock is the test's own.
    #[tokio::test(start_paused = true)]
    async fn a_request_that_never_ends_is_refused() {
        let silent =
            StreamBody::new(futures::stream::pending::<Result<Frame<Bytes>, Infallible>>());
        let body = RequestBody::new(Body::new(silent), OPEN, Unfinished::default());
        assert_eq!(reason(body).await, "REQUEST_TIMEOUT");
    }
}
