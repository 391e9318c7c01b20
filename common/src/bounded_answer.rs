//! Reflection's calls have an end, whether their callers read or not.
//!
//! Its handler reads no request while an answer waits for its caller, so that no clock of the request is
//! looked at: what was sent is held for as long as the caller's connection lives.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body::Frame;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status, body::Body, server::NamedService};
use tower::Service;

use crate::{failure::Failure, request_body::REQUEST_MAX};

/// Longest time from an answer's head to its end: that of the request, and as long for what it asked.
const ANSWER_MAX: Duration = REQUEST_MAX.saturating_mul(2);

/// A service whose answers end after `ANSWER_MAX`.
#[derive(Debug, Clone)]
pub(crate) struct BoundedAnswer<S>(pub(crate) S);

impl<S: NamedService> NamedService for BoundedAnswer<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for BoundedAnswer<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let answer = self.0.call(request);
        Box::pin(async move { Ok(answer.await?.map(|body| Body::new(Answer::new(body)))) })
    }
}

/// An answer's body. Its time is not its reader's: who takes nothing never asks for it.
struct Answer {
    /// `None` once its time was over: the handler's end of it is closed by that, and it ends.
    inner: Arc<Mutex<Option<Body>>>,
    _clock: AbortOnDropHandle<()>,
}

impl Answer {
    fn new(body: Body) -> Self {
        let inner = Arc::new(Mutex::new(Some(body)));
        let late = Arc::clone(&inner);
        let clock = tokio::spawn(async move {
            tokio::time::sleep(ANSWER_MAX).await;
            drop(late.lock().unwrap_or_else(PoisonError::into_inner).take());
        });
        Self { inner, _clock: AbortOnDropHandle::new(clock) }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(body) = &mut *inner else {
            let text = format!("the answer was not taken in {} s", ANSWER_MAX.as_secs());
            let late = Failure::new(Code::DeadlineExceeded, "REQUEST_TIMEOUT", text);
            return Poll::Ready(Some(Err(late.to_status())));
        };
        Pin::new(body).poll_frame(context)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures::StreamExt as _;
    use http_body_util::{BodyExt as _, StreamBody};
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    /// Guards memory against callers of reflection that take no answer: the handler's end is closed, so
    /// that it lets go of the request. Without the clock it waits for as long as the connection lives. The
    /// test's own clock runs.
    #[tokio::test(start_paused = true)]
    async fn an_answer_that_nobody_takes_ends() {
        let (handler, answers) = mpsc::channel::<Frame<Bytes>>(1);
        let frames = ReceiverStream::new(answers).map(Ok::<_, Infallible>);
        let mut body = Answer::new(Body::new(StreamBody::new(frames)));
        handler.send(Frame::data(Bytes::from_static(b"one"))).await.unwrap();
        let closed = tokio::time::timeout(ANSWER_MAX * 2, handler.closed());
        closed.await.expect("the handler is told");
        let status = body.frame().await.expect("an end").unwrap_err();
        assert_eq!(Failure::from_status(&status).reason, "REQUEST_TIMEOUT");
    }
}
