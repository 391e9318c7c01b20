//! grpc.health.v1, answered from the readiness itself, so that it is never behind.

use std::{pin::Pin, sync::Arc};

use futures::stream::{self, Stream, StreamExt as _};
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_server::Health,
};

use super::{Readiness, ReadyState};

/// The service of health: see [`super::health_service`].
#[derive(Debug)]
pub struct HealthByReadiness {
    readiness: Readiness,
    services: Arc<[&'static str]>,
}

/// What a name of a service stands for.
enum Subject {
    Process,
    Service,
    Unknown,
}

impl HealthByReadiness {
    pub(super) fn new(readiness: Readiness, services: &[&'static str]) -> Self {
        Self { readiness, services: services.into() }
    }

    fn subject(&self, name: &str) -> Subject {
        match name {
            // kubelet's liveness probe: a drain must not look like a dead process.
            "" => Subject::Process,
            name if self.services.contains(&name) => Subject::Service,
            _ => Subject::Unknown,
        }
    }
}

#[tonic::async_trait]
impl Health for HealthByReadiness {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match self.subject(&request.get_ref().service) {
            Subject::Process => Ok(Response::new(answer(ServingStatus::Serving))),
            Subject::Service => Ok(Response::new(answer(status(self.readiness.state())))),
            Subject::Unknown => Err(Status::not_found("no such service here")),
        }
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        // The protocol's word: an unknown service is told as such, and the stream stays open.
        let fixed = match self.subject(&request.get_ref().service) {
            Subject::Service => None,
            Subject::Process => Some(ServingStatus::Serving),
            Subject::Unknown => Some(ServingStatus::ServiceUnknown),
        };
        if let Some(status) = fixed {
            let once = stream::once(async move { Ok(answer(status)) });
            return Ok(Response::new(once.chain(stream::pending()).boxed()));
        }
        let mut states = self.readiness.subscribe();
        states.mark_changed();
        let changes = stream::unfold((states, None), async |(mut states, told)| {
            loop {
                states.changed().await.ok()?;
                let now = status(*states.borrow_and_update());
                if told != Some(now) {
                    return Some((Ok(answer(now)), (states, Some(now))));
                }
            }
        });
        Ok(Response::new(changes.boxed()))
    }
}

fn status(state: ReadyState) -> ServingStatus {
    match state {
        ReadyState::Ready => ServingStatus::Serving,
        ReadyState::Starting | ReadyState::Draining => ServingStatus::NotServing,
    }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}
