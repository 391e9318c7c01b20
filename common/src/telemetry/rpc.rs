//! A span and a duration for every call that a server takes, by OpenTelemetry's conventions.
//!
//! Invariants:
//! * A call is counted once, when its answer has ended: at its status, or when it is given up.
//! * A call is counted before its last frame leaves, so whoever has the answer finds the count.
//! * Labels come from the services' descriptors and the list of reasons; whatever else is called is
//!   [`UNKNOWN_METHOD`].

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};

use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet},
    metrics::{family::Family, histogram::Histogram},
};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument as _, Span, field::Empty, info_span};

use super::{
    families::{Counters, Families},
    metrics::Metrics,
    propagation::adopt,
};
use crate::failure::{Failure, reasons::OTHER};

/// The label of all methods that the server does not offer.
pub const UNKNOWN_METHOD: &str = "unknown";

/// OpenTelemetry's buckets, and some for clones and watches that go on for hours.
const BUCKETS_SECONDS: [f64; 18] = [
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 60.0, 600.0,
    3600.0, 21600.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    rpc_system_name: &'static str,
    rpc_method: Arc<str>,
    rpc_response_status_code: &'static str,
}

type DurationFamily = Family<Labels, Histogram, fn() -> Histogram>;

/// The calls of all servers of this process.
#[derive(Debug, Clone)]
pub(super) struct RpcCalls {
    durations: DurationFamily,
    failed: Counters,
}

impl Default for RpcCalls {
    fn default() -> Self {
        let durations = DurationFamily::new_with_constructor(|| Histogram::new(BUCKETS_SECONDS));
        Self { durations, failed: Counters::default() }
    }
}

impl Collector for RpcCalls {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut families = Families::new(encoder);
        families.metric(
            "rpc_server_call_duration_seconds",
            "Time from a call's arrival to the end of its answer, for streams to the last message.",
            &self.durations,
        )?;
        families.metric(
            "marcot_calls_failed_total",
            "Calls that ended in an error, refused ones among them, by reason.",
            &self.failed,
        )
    }
}

/// Opens a span for every call, child of the caller's, and counts the call when it has ended.
#[derive(Debug, Clone)]
pub struct RpcLayer {
    calls: RpcCalls,
    methods: Arc<HashMap<String, Arc<str>>>,
    unknown: Arc<str>,
}

impl RpcLayer {
    /// Knows the methods of `services`, as `marcot.donor.v1.DonorService`, of Marcot's own, health
    /// and reflection; those of other services go by [`RpcLayer::with_descriptors`].
    #[must_use]
    pub fn new(metrics: &Metrics, services: &[&str]) -> Self {
        let sets = [
            marcot_proto::FILE_DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ];
        Self::with_descriptors(metrics, services, &sets)
    }

    /// Knows those methods of `services` that stand in the encoded descriptor sets.
    #[must_use]
    pub fn with_descriptors(metrics: &Metrics, services: &[&str], sets: &[&[u8]]) -> Self {
        let mut methods = HashMap::new();
        for set in sets {
            // A set that cannot be read leaves its methods unknown: that harms a label only.
            for file in FileDescriptorSet::decode(*set).unwrap_or_default().file {
                for service in &file.service {
                    let name = format!("{}.{}", file.package(), service.name());
                    if !services.contains(&name.as_str()) {
                        continue;
                    }
                    for method in &service.method {
                        let method = format!("{name}/{}", method.name());
                        methods.insert(format!("/{method}"), Arc::from(method));
                    }
                }
            }
        }
        Self {
            calls: metrics.rpc().clone(),
            methods: Arc::new(methods),
            unknown: Arc::from(UNKNOWN_METHOD),
        }
    }
}

impl<S> Layer<S> for RpcLayer {
    type Service = RpcService<S>;

    fn layer(&self, inner: S) -> RpcService<S> {
        RpcService { inner, layer: self.clone() }
    }
}

/// What [`RpcLayer`] makes of a service.
#[derive(Debug, Clone)]
pub struct RpcService<S> {
    inner: S,
    layer: RpcLayer,
}

impl<S, B, R> Service<Request<B>> for RpcService<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    R: Body + Unpin,
{
    type Response = Response<RpcBody<R>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let layer = &self.layer;
        let method = layer.methods.get(request.uri().path()).unwrap_or(&layer.unknown);
        let span = info_span!(
            "rpc",
            otel.name = %method,
            otel.kind = "server",
            otel.status_code = Empty,
            rpc.system.name = "grpc",
            rpc.method = %method,
            rpc.response.status_code = Empty,
            error.type = Empty,
        );
        adopt(&span, request.headers());
        let mut call = Call {
            calls: layer.calls.clone(),
            method: Arc::clone(method),
            started: Instant::now(),
            span: span.clone(),
            state: State::Running,
        };
        let answer = span.in_scope(|| self.inner.call(request)).instrument(span);
        Box::pin(async move {
            match answer.await {
                Ok(response) => {
                    call.see_head(&response);
                    Ok(response.map(|inner| RpcBody { inner, call }))
                }
                Err(error) => {
                    call.finish(Code::Internal);
                    Err(error)
                }
            }
        })
    }
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Running,
    Counted,
}

/// One call, counted at its end; a call that is dropped before was given up by its caller.
#[derive(Debug)]
struct Call {
    calls: RpcCalls,
    method: Arc<str>,
    started: Instant,
    span: Span,
    state: State,
}

impl Call {
    /// An answer without messages has its status in the head.
    fn see_head<R>(&mut self, response: &Response<R>) {
        if let Some(code) = status_of(response.headers()) {
            self.note_failure(code, response.headers());
            self.finish(code);
        } else if !response.status().is_success() {
            // No gRPC answer at all; what a client makes of it is its own affair.
            self.finish(Code::Unknown);
        }
    }

    /// Counts an error by its reason, which stands beside the status.
    fn note_failure(&mut self, code: Code, headers: &HeaderMap) {
        if code == Code::Ok || self.state == State::Counted {
            return;
        }
        let failure = Status::from_header_map(headers).map(|status| Failure::from_status(&status));
        let reason = match failure {
            // Made up for a status that says none, of a service that is not ours.
            Some(Failure { reason: Cow::Borrowed(_), .. }) | None => OTHER,
            Some(failure) => failure.label(),
        };
        self.calls.failed.get_or_create(&[("reason", reason)]).inc();
        self.span.record("error.type", reason);
    }

    fn finish(&mut self, code: Code) {
        if self.state == State::Counted {
            return;
        }
        self.state = State::Counted;
        let name = code_name(code);
        self.span.record("rpc.response.status_code", name);
        if is_servers_fault(code) {
            self.span.record("otel.status_code", "ERROR");
        }
        let labels = Labels {
            rpc_system_name: "grpc",
            rpc_method: Arc::clone(&self.method),
            rpc_response_status_code: name,
        };
        let seconds = self.started.elapsed().as_secs_f64();
        self.calls.durations.get_or_create(&labels).observe(seconds);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.finish(Code::Cancelled);
    }
}

/// The body of an answer, with its call.
#[derive(Debug)]
pub struct RpcBody<R> {
    inner: R,
    call: Call,
}

impl<R: Body + Unpin> Body for RpcBody<R> {
    type Data = R::Data;
    type Error = R::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<R::Data>, R::Error>>> {
        let this = self.get_mut();
        let frame = {
            let _entered = this.call.span.enter();
            ready!(Pin::new(&mut this.inner).poll_frame(context))
        };
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref()
                    && let Some(code) = status_of(trailers)
                {
                    this.call.note_failure(code, trailers);
                    this.call.finish(code);
                }
            }
            Some(Err(_)) => this.call.finish(Code::Internal),
            // The end without a status: a client reads that as UNKNOWN.
            None => this.call.finish(Code::Unknown),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

fn status_of(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()))
}

/// The codes that mean an error of the server, not of its caller, by OpenTelemetry's conventions.
fn is_servers_fault(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

/// gRPC's own name of a code.
#[must_use]
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests;
