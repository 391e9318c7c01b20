//! An OTLP collector in this process: it keeps the spans that it is sent, or never answers.
//!
//! It has a runtime of its own, so a test that waits does not hold it up.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use futures::StreamExt as _;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span as WireSpan, span::SpanKind, status::StatusCode},
};
use tokio::{net::TcpListener, runtime::Runtime};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use crate::wait_for;

/// A span as it has arrived.
#[derive(Debug, Clone)]
pub struct Span {
    /// `service.name` of who sent it.
    pub service: String,
    /// Its name.
    pub name: String,
    /// 32 hexadecimal digits.
    pub trace: String,
    /// 16 hexadecimal digits.
    pub id: String,
    /// That of its parent; empty for the first one of a trace.
    pub parent: String,
    /// Whether it is a call's, at the end that makes it.
    pub is_client: bool,
    /// Attributes, as text.
    pub attributes: BTreeMap<String, String>,
    /// What its status says, where that is an error.
    pub error: Option<String>,
    /// Nanoseconds since 1970.
    pub begin: u64,
    /// Nanoseconds since 1970.
    pub end: u64,
}

impl Span {
    /// An attribute; panics when it is not there.
    #[must_use]
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).unwrap_or_else(|| panic!("no {name} in {self:?}"))
    }
}

/// What it does with spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Habit {
    Keeps,
    Hangs,
}

/// A collector; it ends when it is dropped.
pub struct Collector {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// Taken when it is dropped.
    runtime: Option<Runtime>,
}

#[derive(Debug, Default)]
struct Shared {
    spans: Mutex<Vec<Span>>,
    connections: AtomicUsize,
    calls: AtomicUsize,
}

struct Service {
    shared: Arc<Shared>,
    habit: Habit,
}

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.shared.calls.fetch_add(1, Ordering::SeqCst);
        if self.habit == Habit::Hangs {
            std::future::pending::<()>().await;
        }
        let mut spans = self.shared.spans.lock().unwrap_or_else(PoisonError::into_inner);
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|resource| resource.attributes);
            let attributes = texts(attributes.unwrap_or_default());
            let service = attributes.get("service.name").cloned().unwrap_or_default();
            let scopes = resource.scope_spans.into_iter();
            spans.extend(scopes.flat_map(|scope| scope.spans).map(|span| read(&service, span)));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn read(service: &str, span: WireSpan) -> Span {
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let is_client = span.kind() == SpanKind::Client;
    let error = span.status.filter(|status| status.code() == StatusCode::Error);
    Span {
        service: service.to_owned(),
        name: span.name,
        trace: hex(&span.trace_id),
        id: hex(&span.span_id),
        parent: hex(&span.parent_span_id),
        is_client,
        attributes: texts(span.attributes),
        error: error.map(|status| status.message),
        begin: span.start_time_unix_nano,
        end: span.end_time_unix_nano,
    }
}

fn texts(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value: Value| match value {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    };
    let pairs = attributes.into_iter().filter_map(|pair| {
        let value = pair.value.and_then(|value| value.value)?;
        Some((pair.key, text(value)))
    });
    pairs.collect()
}

impl Collector {
    /// One that keeps all spans.
    #[must_use]
    pub fn start() -> Self {
        Self::with_habit(Habit::Keeps)
    }

    /// One that takes connections and calls, and answers none of them.
    #[must_use]
    pub fn hanging() -> Self {
        Self::with_habit(Habit::Hangs)
    }

    fn with_habit(habit: Habit) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let shared = Arc::new(Shared::default());
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        listener.set_nonblocking(true).expect("our own socket");
        let address = listener.local_addr().expect("it is bound");
        let listener = {
            let _within = runtime.enter();
            TcpListener::from_std(listener).expect("our own socket")
        };
        let counted = Arc::clone(&shared);
        let incoming = TcpListenerStream::new(listener).inspect(move |_| {
            counted.connections.fetch_add(1, Ordering::SeqCst);
        });
        let service = TraceServiceServer::new(Service { shared: Arc::clone(&shared), habit });
        runtime.spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { address, shared, runtime: Some(runtime) }
    }

    /// Variables by which a daemon exports to it, at once.
    #[must_use]
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", self.address)),
            ("OTEL_BSP_SCHEDULE_DELAY", "50".to_owned()),
        ]
    }

    /// What has arrived so far.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        self.shared.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a span.
    pub fn wait_for_span(&self, what: &str, is_it: impl Fn(&Span) -> bool) -> Span {
        wait_for(what, || self.spans().into_iter().find(|span| is_it(span)))
    }

    /// Connections taken so far.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Exports that were asked for so far.
    #[must_use]
    pub fn calls(&self) -> usize {
        self.shared.calls.load(Ordering::SeqCst)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
