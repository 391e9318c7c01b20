//! The layer around a real health server, over a real connection.

use std::sync::Mutex;

use opentelemetry::trace::TraceContextExt as _;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Response as Answer, Status,
    metadata::MetadataMap,
    service::{Interceptor as _, interceptor::InterceptedService},
    transport::{Channel, Server},
};
use tonic_health::{
    pb::{
        HealthCheckRequest, HealthCheckResponse,
        health_client::HealthClient,
        health_server::{Health, HealthServer},
    },
    server::WatchStream,
};

use super::*;
use crate::telemetry::{
    LogFormat,
    logs::tests::quiet,
    propagation::{TraceInterceptor, current_trace_id, extract, trace_id_of},
};

const SERVICE: &str = "grpc.health.v1.Health";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// A server with the layer; ends with the guard.
async fn serve<H: Health>(metrics: &Metrics, health: H) -> (Channel, DropGuard) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let server = Server::builder()
        .layer(RpcLayer::new(metrics, &[SERVICE]))
        .add_service(HealthServer::new(health))
        .serve_with_incoming_shutdown(
            TcpListenerStream::new(listener),
            stop.clone().cancelled_owned(),
        );
    tokio::spawn(server);
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    (channel.connect().await.unwrap(), stop.drop_guard())
}

fn real_health() -> (tonic_health::server::HealthReporter, impl Health) {
    let reporter = tonic_health::server::HealthReporter::new();
    let service = tonic_health::server::HealthService::from_health_reporter(reporter.clone());
    (reporter, service)
}

fn request(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

/// How often a method ended with a code.
fn count(metrics: &Metrics, method: &str, code: &str) -> u64 {
    let text = metrics.encode().unwrap();
    let line = format!(
        "rpc_server_call_duration_seconds_count{{rpc_system_name=\"grpc\",rpc_method=\"{method}\",\
         rpc_response_status_code=\"{code}\"}} "
    );
    text.lines().find_map(|l| l.strip_prefix(&line)).map_or(0, |n| n.parse().unwrap())
}

#[tokio::test]
async fn calls_are_counted_by_method_and_code() {
    let metrics = Metrics::new("donor");
    let (_reporter, health) = real_health();
    let (channel, _stop) = serve(&metrics, health).await;
    let mut client = HealthClient::new(channel);
    for _ in 0..3 {
        client.check(request("")).await.unwrap();
    }
    client.check(request("no.such")).await.unwrap_err();
    let check = "grpc.health.v1.Health/Check";
    assert_eq!(count(&metrics, check, "OK"), 3);
    assert_eq!(count(&metrics, check, "NOT_FOUND"), 1);
    assert_eq!(count(&metrics, check, "CANCELLED"), 0);
}

/// A health service that refuses everything.
struct Refusing(&'static str);

#[tonic::async_trait]
impl Health for Refusing {
    type WatchStream = WatchStream;

    async fn check(
        &self,
        _: tonic::Request<HealthCheckRequest>,
    ) -> Result<Answer<HealthCheckResponse>, Status> {
        Err(Failure::new(Code::PermissionDenied, self.0, "no").to_status())
    }

    async fn watch(
        &self,
        _: tonic::Request<HealthCheckRequest>,
    ) -> Result<Answer<Self::WatchStream>, Status> {
        Err(Status::internal("no reason"))
    }
}

/// Guards the bound on time series, and that refusals are seen: a reason that is on no list is OTHER.
#[tokio::test]
async fn failed_calls_are_counted_by_reason() {
    let metrics = Metrics::new("donor");
    for reason in ["NOT_LOGGED_IN", "MADE_UP"] {
        let (channel, _stop) = serve(&metrics, Refusing(reason)).await;
        let mut client = HealthClient::new(channel);
        client.check(request("")).await.unwrap_err();
        client.check(request("")).await.unwrap_err();
        client.watch(request("")).await.unwrap_err();
    }
    let text = metrics.encode().unwrap();
    for (reason, count) in [("NOT_LOGGED_IN", 2), ("OTHER", 4)] {
        let line = format!("marcot_calls_failed_total{{reason=\"{reason}\"}} {count}\n");
        assert!(text.contains(&line), "{line} is not in {text}");
    }
    assert!(!text.contains("MADE_UP"));
}

#[tokio::test]
async fn a_stream_is_counted_when_it_ends_and_not_before() {
    let metrics = Metrics::new("donor");
    let (mut reporter, health) = real_health();
    let (channel, _stop) = serve(&metrics, health).await;
    let watch = "grpc.health.v1.Health/Watch";
    let mut client = HealthClient::new(channel);
    let mut stream = client.watch(request("")).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap();
    assert_eq!(count(&metrics, watch, "OK"), 0);
    reporter.clear_service_status("").await;
    assert!(stream.message().await.unwrap().is_none());
    assert_eq!(count(&metrics, watch, "OK"), 1);
}

/// A body that never ends, or ends without trailers.
struct Endless;

impl Body for Endless {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, Status>>> {
        Poll::Pending
    }
}

/// Calls `path` on a service that answers with `body`.
async fn answer<R: Body + Unpin + Send + 'static>(
    metrics: &Metrics,
    path: &str,
    body: R,
) -> Response<RpcBody<R>> {
    let mut body = Some(body);
    let inner = tower::service_fn(move |_: Request<()>| {
        let body = body.take().unwrap();
        async move { Ok::<_, std::convert::Infallible>(Response::new(body)) }
    });
    let mut service = RpcLayer::new(metrics, &[SERVICE]).layer(inner);
    service.call(Request::get(path).body(()).unwrap()).await.unwrap()
}

#[tokio::test]
async fn a_caller_who_leaves_is_counted_as_cancelled() {
    let metrics = Metrics::new("donor");
    let watch = "grpc.health.v1.Health/Watch";
    let response = answer(&metrics, &format!("/{watch}"), Endless).await;
    assert_eq!(count(&metrics, watch, "CANCELLED"), 0);
    drop(response);
    assert_eq!(count(&metrics, watch, "CANCELLED"), 1);
}

#[tokio::test]
async fn an_answer_without_a_status_is_counted_as_unknown_code() {
    use http_body_util::{BodyExt as _, Empty};
    let metrics = Metrics::new("donor");
    let check = "grpc.health.v1.Health/Check";
    let response = answer(&metrics, &format!("/{check}"), Empty::<bytes::Bytes>::new()).await;
    response.into_body().collect().await.unwrap();
    assert_eq!(count(&metrics, check, "UNKNOWN"), 1);
}

#[tokio::test]
async fn callers_cannot_make_labels() {
    let metrics = Metrics::new("donor");
    for path in ["/grpc.health.v1.Health/Check1", "/a.B/C", "/", "/marcot.donor.v1.DonorService/X"]
    {
        drop(answer(&metrics, path, Endless).await);
    }
    assert_eq!(count(&metrics, UNKNOWN_METHOD, "CANCELLED"), 4);
    let text = metrics.encode().unwrap();
    assert_eq!(text.matches("rpc_server_call_duration_seconds_count").count(), 1, "{text}");
}

/// The trace that a handler was in, and what it would send on.
type Sight = (Option<String>, MetadataMap);

/// A handler that keeps what it saw last.
#[derive(Debug, Default, Clone)]
struct Seen(Arc<Mutex<Option<Sight>>>);

#[tonic::async_trait]
impl Health for Seen {
    type WatchStream = WatchStream;

    async fn check(
        &self,
        _: tonic::Request<HealthCheckRequest>,
    ) -> Result<Answer<HealthCheckResponse>, Status> {
        // Behind a point where the task may have slept, as real handlers are.
        tokio::task::yield_now().await;
        let next = TraceInterceptor.call(tonic::Request::new(()))?;
        *self.0.lock().unwrap() = Some((current_trace_id(), next.metadata().clone()));
        Ok(Answer::new(HealthCheckResponse::default()))
    }

    async fn watch(
        &self,
        _: tonic::Request<HealthCheckRequest>,
    ) -> Result<Answer<WatchStream>, Status> {
        Err(Status::unimplemented("not here"))
    }
}

#[tokio::test]
async fn the_callers_trace_goes_through_the_handler_to_the_next_service() {
    // Logs are nearly off: the trace must not hang on them.
    let (subscriber, _lines) = quiet(LogFormat::Json, "error");
    let seen = Seen::default();
    let handler = seen.clone();
    // One thread runs this test's client and server, so both have this subscriber.
    let _subscriber = tracing::subscriber::set_default(subscriber);
    let (channel, _stop) = serve(&Metrics::new("donor"), handler).await;
    let mut call = tonic::Request::new(request(""));
    call.metadata_mut().insert("traceparent", PARENT.parse().unwrap());
    HealthClient::new(channel).check(call).await.unwrap();
    let (in_handler, sent_on) = seen.0.lock().unwrap().take().unwrap();
    assert_eq!(in_handler.as_deref(), Some(TRACE));
    let context = extract(&sent_on);
    assert_eq!(trace_id_of(&context).as_deref(), Some(TRACE));
    let span = context.span().span_context().span_id().to_string();
    assert_ne!(span, "00f067aa0ba902b7", "the next parent is the handler's span");
}

#[tokio::test]
async fn a_call_without_a_trace_begins_one_and_a_client_passes_its_own_on() {
    let (subscriber, _lines) = quiet(LogFormat::Json, "error");
    let seen = Seen::default();
    let handler = seen.clone();
    let _subscriber = tracing::subscriber::set_default(subscriber);
    let (channel, _stop) = serve(&Metrics::new("donor"), handler).await;
    HealthClient::new(channel.clone()).check(request("")).await.unwrap();
    let begun = seen.0.lock().unwrap().take().unwrap().0;
    assert_eq!(begun.map(|id| id.len()), Some(32));
    let callers = async {
        let traced = InterceptedService::new(channel, TraceInterceptor);
        HealthClient::new(traced).check(request("")).await.unwrap();
        current_trace_id()
    }
    .instrument(info_span!("caller"))
    .await;
    assert!(callers.is_some());
    assert_eq!(seen.0.lock().unwrap().take().unwrap().0, callers);
}
