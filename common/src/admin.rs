//! The admin port: plaintext and read-only, for kubelet's probes and for scrapes.
//!
//! | what | says |
//! |---|---|
//! | `/healthz`, health of "" | the process lives |
//! | `/readyz`, health of the named services | new work is taken; 503 with the reason if not |
//! | `/metrics` | OpenMetrics text, or Prometheus's older format for who does not ask for it |
//! | `/` | the status page, for a person |
//!
//! Invariants:
//! * Whether work runs plays no part: a service is ready while a clone runs.
//! * Nothing here changes anything, and nothing secret is shown: there is no log-in.

use std::{fmt, io, sync::Arc, time::Duration};

use axum::{
    Router,
    http::{
        HeaderMap, StatusCode,
        header::{ACCEPT, CONTENT_TYPE},
    },
    response::{IntoResponse as _, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};
use tokio_util::sync::CancellationToken;
use tonic::server::NamedService as _;
use tonic_health::pb::health_server::HealthServer;
use tower::Layer as _;

use crate::{
    request_body::{OPEN_REQUEST_BYTES_MAX, RequestBodyLayer},
    telemetry::metrics::{CONTENT_TYPE as OPEN_METRICS, Metrics, PLAIN_CONTENT_TYPE},
};

mod health;
pub(crate) mod status_page;

pub use health::HealthByReadiness;
pub use status_page::{Rates, SAMPLE_INTERVAL, Shown, StatusPage};

/// How long open connections may go on after the end: watchers of health never leave by themselves.
const LAST_CALLS_MAX: Duration = Duration::from_secs(1);

/// Whether a service takes new work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadyState {
    /// Not yet.
    Starting,
    /// Yes.
    Ready,
    /// No more. Final.
    Draining,
}

impl ReadyState {
    /// Whether one state may follow another: `Starting -> Ready -> Draining`, no way back.
    #[must_use]
    pub fn allows(self, next: Self) -> bool {
        matches!(
            (self, next),
            (Self::Starting, Self::Ready) | (Self::Starting | Self::Ready, Self::Draining)
        )
    }
}

impl fmt::Display for ReadyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining: no new work is taken",
        })
    }
}

/// The service's word on [`ReadyState`]; clones share it.
#[derive(Debug, Clone)]
pub struct Readiness(Arc<watch::Sender<ReadyState>>);

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Readiness {
    /// Not ready yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(ReadyState::Starting)))
    }

    /// New work is taken from now on; nothing after a drain has begun.
    pub fn set_ready(&self) {
        self.advance(ReadyState::Ready);
    }

    /// No new work is taken any more.
    pub fn set_draining(&self) {
        self.advance(ReadyState::Draining);
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> ReadyState {
        *self.0.borrow()
    }

    /// The state now and its changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<ReadyState> {
        self.0.subscribe()
    }

    fn advance(&self, next: ReadyState) {
        self.0.send_if_modified(|state| {
            let allowed = state.allows(next);
            if allowed {
                *state = next;
            }
            allowed
        });
    }
}

/// grpc.health.v1 for any port: "" lives, `services` follow the readiness.
#[must_use]
pub fn health_service(
    readiness: &Readiness,
    services: &[&'static str],
) -> HealthServer<HealthByReadiness> {
    HealthServer::new(HealthByReadiness::new(readiness.clone(), services))
        .max_decoding_message_size(OPEN_REQUEST_BYTES_MAX)
}

/// What the admin port answers; every other path is 404.
pub fn router(
    metrics: Arc<Metrics>,
    readiness: &Readiness,
    services: &[&'static str],
    bodies: &RequestBodyLayer,
) -> Router {
    let health = bodies.layer(health_service(readiness, services));
    let readiness = readiness.clone();
    Router::new()
        .route("/healthz", get(async || "alive\n"))
        .route("/readyz", get(async move || ready(readiness.state())))
        .route("/metrics", get(async move |headers: HeaderMap| scrape(&metrics, &headers)))
        .route_service(&format!("/{}/{{*method}}", HealthServer::<HealthByReadiness>::NAME), health)
}

/// Serves the admin port on `listener` until `stop`, and then for a moment longer.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    stop: CancellationToken,
) -> io::Result<()> {
    let stopped = stop.clone();
    let serving = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
    tokio::select! {
        result = serving => result,
        () = async {
            stopped.cancelled().await;
            tokio::time::sleep(LAST_CALLS_MAX).await;
        } => Ok(()),
    }
}

fn ready(state: ReadyState) -> Response {
    let code = match state {
        ReadyState::Ready => StatusCode::OK,
        ReadyState::Starting | ReadyState::Draining => StatusCode::SERVICE_UNAVAILABLE,
    };
    (code, format!("{state}\n")).into_response()
}

fn scrape(metrics: &Metrics, headers: &HeaderMap) -> Response {
    let accepts = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let is_open = accepts.into_iter().any(|accept| accept.contains("application/openmetrics-text"));
    let (text, kind) = match is_open {
        true => (metrics.encode(), OPEN_METRICS),
        false => (metrics.encode_plain(), PLAIN_CONTENT_TYPE),
    };
    match text {
        Ok(text) => ([(CONTENT_TYPE, kind)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "metrics cannot be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[cfg(test)]
mod tests;
