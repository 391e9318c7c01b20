//! The recipient's gRPC handlers: decode, call, encode; no decisions.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::Stream;
use marcot_common::{access, failure::Failure, host, telemetry, time};
use marcot_proto::recipient::v1::{
    self as pb, recipient_service_server::RecipientService, validate_clone_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use crate::{
    job::{
        registry::{Clones, Origin},
        status,
    },
    preflight,
    request::{CloneRequest, Secrets},
    source::blocking,
};

/// Clones in a page unless asked otherwise, and at the most.
const PAGE_DEFAULT: usize = 50;
const PAGE_MAX: usize = 1000;

/// Least and most time between two messages of a watch, and unless asked otherwise.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MAX: Duration = Duration::from_secs(60);
const INTERVAL_DEFAULT: Duration = Duration::from_secs(1);

/// The recipient's service.
#[derive(Debug, Clone)]
pub struct Api {
    clones: Arc<Clones>,
}

impl Api {
    /// Serves `clones`.
    #[must_use]
    pub fn new(clones: Arc<Clones>) -> Self {
        Self { clones }
    }

    /// What ends or goes on with a clone needs what starting it has needed.
    fn require_privilege_of<T>(&self, request: &Request<T>, name: &str) -> Result<(), Failure> {
        let clone = self.clones.get(name)?;
        let own = self.clones.settings().data_directory.as_deref();
        let replaces = own.is_some_and(|own| {
            let own = own.canonicalize().unwrap_or_else(|_| own.to_owned());
            host::path_bytes(&own) == clone.destination
        });
        require_privilege(request, replaces)
    }

    /// What a clone would be, with what its checks have found; an error when one has failed.
    async fn validated(&self, checked: &CloneRequest) -> Result<pb::Clone, Failure> {
        let id = uuid::Uuid::now_v7().to_string();
        let findings =
            preflight::inspect(checked, self.clones.settings(), &id, None).await.close().await;
        let notable = findings.notable();
        if let Some(failure) = findings.into_failure() {
            return Err(failure);
        }
        Ok(pb::Clone {
            state: pb::State::NotStarted.into(),
            source: checked.source_name(),
            destination: host::path_bytes(&checked.target),
            statement: checked.statement.clone(),
            request_id: checked.request_id.clone(),
            findings: notable,
            ..pb::Clone::default()
        })
    }

    async fn start<T: Sync>(
        &self,
        request: &Request<T>,
        checked: CloneRequest,
    ) -> Result<Option<pb::Clone>, Status> {
        require_privilege(request, checked.replaces)?;
        if checked.validate_only {
            return Ok(Some(Box::pin(self.validated(&checked)).await?));
        }
        let origin = Origin {
            user: access::caller(request).user.unwrap_or_default(),
            trace_id: telemetry::propagation::current_trace_id().unwrap_or_default(),
        };
        // Before the checks: what the request has made stands in its own way.
        if let Some(known) = self.clones.known(&checked)? {
            return Ok(Some(known));
        }
        crate::target::check_first(&checked, self.clones.settings())?;
        Ok(Some(self.clones.start(checked, origin)?))
    }
}

/// A clone that replaces the server's own data needs CLONE_ADMIN; all others BACKUP_ADMIN.
fn require_privilege<T>(request: &Request<T>, replaces: bool) -> Result<(), Failure> {
    let privilege =
        if replaces { access::Privilege::CloneAdmin } else { access::Privilege::BackupAdmin };
    access::require(request, privilege)
}

/// Whether options hold a password of their own.
fn has_secret(options: Option<&pb::CloneOptions>) -> bool {
    let attach = options.and_then(|options| options.attach_replica.as_ref());
    attach.is_some_and(|attach| !attach.password.is_empty())
}

/// A password in a request must not have crossed a network in clear.
fn refuse_bare_secret<T>(request: &Request<T>) -> Result<(), Failure> {
    if access::is_confidential(request) {
        return Ok(());
    }
    Err(access::secret_in_clear("a password"))
}

type MessageStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl RecipientService for Api {
    async fn clone_instance(
        &self,
        request: Request<pb::CloneInstanceRequest>,
    ) -> Result<Response<pb::CloneInstanceResponse>, Status> {
        if !request.get_ref().password.is_empty() {
            refuse_bare_secret(&request)?;
        }
        if has_secret(request.get_ref().options.as_ref()) {
            refuse_bare_secret(&request)?;
        }
        let message = request.get_ref().clone();
        let checked = CloneRequest::from_instance(message, self.clones.settings())?;
        let clone = self.start(&request, checked).await?;
        Ok(Response::new(pb::CloneInstanceResponse { clone }))
    }

    async fn clone_local(
        &self,
        request: Request<pb::CloneLocalRequest>,
    ) -> Result<Response<pb::CloneLocalResponse>, Status> {
        if has_secret(request.get_ref().options.as_ref()) {
            refuse_bare_secret(&request)?;
        }
        let message = request.get_ref().clone();
        let checked = CloneRequest::from_local(message, self.clones.settings())?;
        let clone = self.start(&request, checked).await?;
        Ok(Response::new(pb::CloneLocalResponse { clone }))
    }

    async fn clone_statement(
        &self,
        request: Request<pb::CloneStatementRequest>,
    ) -> Result<Response<pb::CloneStatementResponse>, Status> {
        refuse_bare_secret(&request)?;
        let message = request.get_ref().clone();
        let checked = CloneRequest::from_statement(message, self.clones.settings())?;
        let clone = self.start(&request, checked).await?;
        Ok(Response::new(pb::CloneStatementResponse { clone }))
    }

    async fn validate_clone(
        &self,
        request: Request<pb::ValidateCloneRequest>,
    ) -> Result<Response<pb::ValidateCloneResponse>, Status> {
        use validate_clone_request::Request as Kind;
        let settings = self.clones.settings();
        let may_hold_secret = match &request.get_ref().request {
            Some(Kind::CloneLocal(message)) => has_secret(message.options.as_ref()),
            _ => true,
        };
        if may_hold_secret {
            refuse_bare_secret(&request)?;
        }
        let checked = match request.get_ref().request.clone() {
            Some(Kind::CloneInstance(message)) => CloneRequest::from_instance(message, settings)?,
            Some(Kind::CloneLocal(message)) => CloneRequest::from_local(message, settings)?,
            Some(Kind::CloneStatement(message)) => CloneRequest::from_statement(message, settings)?,
            None => {
                let text = "a request to validate is required";
                return Err(Failure::invalid("NO_REQUEST", text).into());
            }
        };
        require_privilege(&request, checked.replaces)?;
        let id = uuid::Uuid::now_v7().to_string();
        let findings = preflight::inspect(&checked, settings, &id, None).await.close().await;
        let valid = findings.is_valid();
        let findings = findings.all().to_vec();
        Ok(Response::new(pb::ValidateCloneResponse { findings, valid }))
    }

    async fn get_clone(
        &self,
        request: Request<pb::GetCloneRequest>,
    ) -> Result<Response<pb::GetCloneResponse>, Status> {
        let clone = self.clones.get(&request.into_inner().name)?;
        Ok(Response::new(pb::GetCloneResponse { clone: Some(clone) }))
    }

    async fn list_clones(
        &self,
        request: Request<pb::ListClonesRequest>,
    ) -> Result<Response<pb::ListClonesResponse>, Status> {
        let request = request.into_inner();
        let count = match usize::try_from(request.page_size) {
            Ok(0) => PAGE_DEFAULT,
            Ok(n) => n.min(PAGE_MAX),
            Err(_) => {
                let text =
                    format!("page_size is {}, 0 to {PAGE_MAX} are allowed", request.page_size);
                return Err(Failure::invalid("BAD_PAGE_SIZE", text).into());
            }
        };
        let token = request.page_token;
        if !token.is_empty() && !token.starts_with("clones/") {
            return Err(Failure::invalid("BAD_PAGE_TOKEN", "page_token is from no answer").into());
        }
        let before = Some(token.as_str()).filter(|token| !token.is_empty());
        let mut clones = self.clones.list(before, count + 1);
        let more = clones.len() > count;
        clones.truncate(count);
        let next = clones.last().filter(|_| more).map(|clone| clone.name.clone());
        Ok(Response::new(pb::ListClonesResponse {
            clones,
            next_page_token: next.unwrap_or_default(),
        }))
    }

    type WatchCloneStream = MessageStream<pb::WatchCloneResponse>;

    async fn watch_clone(
        &self,
        request: Request<pb::WatchCloneRequest>,
    ) -> Result<Response<Self::WatchCloneStream>, Status> {
        let request = request.into_inner();
        let interval = match request.interval {
            None => INTERVAL_DEFAULT,
            Some(interval) => time::duration_from_wire(interval)?.clamp(INTERVAL_MIN, INTERVAL_MAX),
        };
        let (clone, changes) = self.clones.watch(&request.name)?;
        // One message waits; a slow watcher misses states in between, never the last one.
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(watch(clone, changes, interval, request.resume_token, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel_clone(
        &self,
        request: Request<pb::CancelCloneRequest>,
    ) -> Result<Response<pb::CancelCloneResponse>, Status> {
        self.require_privilege_of(&request, &request.get_ref().name)?;
        let clone = self.clones.cancel(&request.into_inner().name)?;
        Ok(Response::new(pb::CancelCloneResponse { clone: Some(clone) }))
    }

    async fn pause_clone(
        &self,
        request: Request<pb::PauseCloneRequest>,
    ) -> Result<Response<pb::PauseCloneResponse>, Status> {
        self.require_privilege_of(&request, &request.get_ref().name)?;
        let clone = self.clones.pause(&request.into_inner().name)?;
        Ok(Response::new(pb::PauseCloneResponse { clone: Some(clone) }))
    }

    async fn resume_clone(
        &self,
        request: Request<pb::ResumeCloneRequest>,
    ) -> Result<Response<pb::ResumeCloneResponse>, Status> {
        let asked = request.get_ref();
        if !asked.password.is_empty() || !asked.attach_replica_password.is_empty() {
            refuse_bare_secret(&request)?;
        }
        self.require_privilege_of(&request, &asked.name)?;
        let pb::ResumeCloneRequest { name, password, attach_replica_password } =
            request.into_inner();
        let secrets = (!password.is_empty() || !attach_replica_password.is_empty()).then(|| {
            let (password, attach) =
                (Zeroizing::new(password), Zeroizing::new(attach_replica_password));
            Secrets { password, attach_replica_password: attach }
        });
        let clone = self.clones.resume(&name, secrets)?;
        Ok(Response::new(pb::ResumeCloneResponse { clone: Some(clone) }))
    }

    async fn update_clone_limits(
        &self,
        request: Request<pb::UpdateCloneLimitsRequest>,
    ) -> Result<Response<pb::UpdateCloneLimitsResponse>, Status> {
        self.require_privilege_of(&request, &request.get_ref().name)?;
        let pb::UpdateCloneLimitsRequest { name, limits } = request.into_inner();
        let clone = self.clones.update_limits(&name, &limits.unwrap_or_default())?;
        Ok(Response::new(pb::UpdateCloneLimitsResponse { clone: Some(clone) }))
    }

    async fn rollback_clone(
        &self,
        request: Request<pb::RollbackCloneRequest>,
    ) -> Result<Response<pb::RollbackCloneResponse>, Status> {
        let request = request.into_inner();
        let clone = self.clones.roll_back(&request.name, request.discard_writes).await?;
        Ok(Response::new(pb::RollbackCloneResponse { clone: Some(clone) }))
    }

    async fn accept_clone(
        &self,
        request: Request<pb::AcceptCloneRequest>,
    ) -> Result<Response<pb::AcceptCloneResponse>, Status> {
        let clone = self.clones.accept(&request.into_inner().name).await?;
        Ok(Response::new(pb::AcceptCloneResponse { clone: Some(clone) }))
    }

    async fn install_clone(
        &self,
        request: Request<pb::InstallCloneRequest>,
    ) -> Result<Response<pb::InstallCloneResponse>, Status> {
        let clone = self.clones.install(&request.into_inner().name).await?;
        Ok(Response::new(pb::InstallCloneResponse { clone: Some(clone) }))
    }

    async fn list_leftovers(
        &self,
        _: Request<pb::ListLeftoversRequest>,
    ) -> Result<Response<pb::ListLeftoversResponse>, Status> {
        let clones = Arc::clone(&self.clones);
        let leftovers = blocking(move || Ok(clones.leftovers())).await?;
        Ok(Response::new(pb::ListLeftoversResponse { leftovers }))
    }

    async fn delete_leftover(
        &self,
        request: Request<pb::DeleteLeftoverRequest>,
    ) -> Result<Response<pb::DeleteLeftoverResponse>, Status> {
        let (clones, name) = (Arc::clone(&self.clones), request.into_inner().name);
        blocking(move || clones.remove_leftover(&name)).await?;
        Ok(Response::new(pb::DeleteLeftoverResponse {}))
    }

    async fn verify_clone(
        &self,
        request: Request<pb::VerifyCloneRequest>,
    ) -> Result<Response<pb::VerifyCloneResponse>, Status> {
        let answer = self.clones.verify(&request.into_inner().name).await?;
        Ok(Response::new(answer))
    }
}

/// Sends a clone whenever it has changed, until it has ended or the watcher has gone.
async fn watch(
    mut clone: pb::Clone,
    mut changes: Option<tokio::sync::watch::Receiver<pb::Clone>>,
    interval: Duration,
    resume_token: String,
    sender: mpsc::Sender<Result<pb::WatchCloneResponse, Status>>,
) {
    let mut known = resume_token;
    let mut is_over = false;
    loop {
        let token = token_of(&clone);
        let last = status::is_over(clone.state) || is_over;
        if token != known || last {
            let message =
                pb::WatchCloneResponse { clone: Some(clone), resume_token: token.clone() };
            if sender.send(Ok(message)).await.is_err() || last {
                return;
            }
            known = token;
        }
        let Some(changes) = &mut changes else { return };
        let pause = tokio::time::sleep(interval);
        tokio::pin!(pause);
        // The end of a clone is told at once; everything else at most once an interval.
        loop {
            tokio::select! {
                () = &mut pause => break,
                () = sender.closed() => return,
                changed = changes.changed() => {
                    // Its clone runs no more: what it says now, it says for good.
                    is_over = changed.is_err();
                    if is_over || status::is_over(changes.borrow_and_update().state) {
                        break;
                    }
                }
            }
        }
        clone = changes.borrow_and_update().clone();
    }
}

/// A digest of a clone's state: equal tokens, equal states.
fn token_of(clone: &pb::Clone) -> String {
    use prost::Message as _;
    format!("{:08x}", crc32c::crc32c(&clone.encode_to_vec()))
}

#[cfg(test)]
mod tests;
