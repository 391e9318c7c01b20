//! The only module that speaks to a donor.
//!
//! Every connection of a clone goes to one address, in one mode, to one certificate: what the first
//! one found is pinned for the others. The first logs in by password, the others by the clone's
//! key, which only this process holds.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use marcot_common::{
    chunk::MESSAGE_BYTES_MAX,
    connect::{ConnectOptions, DonorConnection, connect},
    entry::Totals,
    failure::Failure,
    login,
    position::Position,
    telemetry::propagation::TraceInterceptor,
    time::duration_to_wire,
    wire,
};
use marcot_engine::{Advanced, SnapshotOptions};
use marcot_proto::{
    auth::v1::auth_service_client::AuthServiceClient,
    common::v1 as pbc,
    donor::v1::{self as pb, donor_service_client::DonorServiceClient},
};
use tokio::task::AbortHandle;
use tonic::{Code, service::interceptor::InterceptedService, transport::Channel};
use tracing::{Span, warn};

use crate::{
    fetch::{
        FetchContext, StreamWork,
        decode::SILENCE_MAX,
        remote::{ReadOptions, copy_units, follow},
        stopped,
    },
    job::CloneJob,
    list::{FileList, ListReceiver},
    plan::Cut,
    request::DonorRequest,
    settings::Settings,
    source::{Opened, Source},
};

/// Lease of a snapshot; renewed at a third of it.
const LEASE: Duration = Duration::from_secs(60);

/// Longest wait for the donor to list its files: a walk of some million files.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Longest wait for an answer that needs no work.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A client whose calls belong to the caller's trace.
type Client = DonorServiceClient<InterceptedService<Channel, TraceInterceptor>>;

/// A snapshot on a donor.
#[derive(Debug)]
pub struct DonorSource {
    client: Client,
    snapshot: String,
    opened: Opened,
    server_info: pb::GetServerInfoResponse,
    pinned: ConnectOptions,
    /// Whether further connections must log in.
    accounts: bool,
    key: Arc<login::CloneKey>,
    compression_level: Option<i32>,
    renewal: AbortHandle,
}

impl Drop for DonorSource {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

impl DonorSource {
    /// Connects, logs in, and opens a snapshot.
    pub async fn open(
        request: &DonorRequest,
        snapshot: &SnapshotOptions,
        settings: &Settings,
        clone_id: &str,
        job: Option<&CloneJob>,
    ) -> Result<Self, Failure> {
        let options = ConnectOptions::new(&request.host, request.port, request.ssl_mode)
            .with_tls(settings.donor_tls.with_fingerprint(request.fingerprint));
        let connection = connect(&options).await?;
        let pinned = options.pinned(&connection);
        let DonorConnection { channel, security, .. } = connection;
        if let Some(job) = job {
            job.status.update(|clone| {
                clone.encrypted = Some(security.encrypted);
                clone.cipher.clone_from(&security.cipher);
                let fingerprint = security.fingerprint.map(|f| Bytes::copy_from_slice(&f));
                clone.donor_fingerprint = fingerprint.unwrap_or_default();
            });
        }
        let accounts = log_in(&channel, request, &security).await?;
        let mut client = DonorServiceClient::with_interceptor(channel, TraceInterceptor)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let server_info = call(
            "GetServerInfo",
            CALL_TIMEOUT,
            client.get_server_info(pb::GetServerInfoRequest {}),
        )
        .await?;
        if let Some(job) = job {
            job.status.update(|clone| clone.donor_version.clone_from(&server_info.version));
        }
        let key = Arc::new(login::CloneKey::generate()?);
        let open = pb::OpenSnapshotRequest {
            public_key: Bytes::copy_from_slice(key.public_key()),
            lease_duration: Some(duration_to_wire(LEASE)),
            request_id: uuid::Uuid::new_v4().to_string(),
            clone: format!("clones/{clone_id}"),
            block_ddl: snapshot.block_ddl,
            ddl_timeout: snapshot.ddl_timeout.map(duration_to_wire),
            ..pb::OpenSnapshotRequest::default()
        };
        let opened = call("OpenSnapshot", OPEN_TIMEOUT, client.open_snapshot(open)).await?;
        let renewal = spawn_renewal(client.clone(), opened.snapshot.clone());
        Ok(Self {
            client,
            opened: Opened {
                position: wire::position(opened.stage, opened.round)?,
                estimate: wire::totals(opened.estimate),
                left_out: opened.left_out.into_iter().take(64).collect(),
            },
            snapshot: opened.snapshot,
            server_info,
            pinned,
            accounts,
            key,
            compression_level: request.compression_level,
            renewal,
        })
    }

    /// What the donor says of itself.
    #[must_use]
    pub fn server_info(&self) -> &pb::GetServerInfoResponse {
        &self.server_info
    }
}

/// Logs in by password where the donor asks for it; says whether it does.
async fn log_in(
    channel: &Channel,
    request: &DonorRequest,
    security: &marcot_common::connect::Security,
) -> Result<bool, Failure> {
    let mut client = AuthServiceClient::new(channel.clone());
    let result =
        login::log_in_with_password(&mut client, security, &request.user, &request.password).await;
    match result {
        Ok(_) => Ok(true),
        // What has no log-in at all is told by its next answer.
        Err(failure) if matches!(failure.reason.as_ref(), "NO_ACCOUNTS" | "PEER_LACKS_METHOD") => {
            Ok(false)
        }
        Err(failure) => Err(failure.from_donor()),
    }
}

fn spawn_renewal(mut client: Client, snapshot: String) -> AbortHandle {
    let task = tokio::spawn(async move {
        let mut tick = tokio::time::interval(LEASE / 3);
        loop {
            tick.tick().await;
            let request = pb::RenewLeaseRequest {
                snapshot: snapshot.clone(),
                lease_duration: Some(duration_to_wire(LEASE)),
            };
            // A lost lease shows in the calls that need it; here it is only told early.
            if let Err(failure) =
                call("RenewLease", CALL_TIMEOUT, client.renew_lease(request)).await
            {
                warn!(%snapshot, error = %failure, "lease was not renewed");
            }
        }
    });
    task.abort_handle()
}

async fn call<T>(
    name: &str,
    timeout: Duration,
    answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(timeout, answer).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(told(name, &status)),
        Err(_) => Err(Failure::new(
            Code::DeadlineExceeded,
            "DONOR_TIMEOUT",
            format!("{name} was not answered within {} s", timeout.as_secs()),
        )
        .mysql(1159)
        .from_donor()),
    }
}

/// What the donor answered; a method that it lacks says what it is not.
fn told(name: &str, status: &tonic::Status) -> Failure {
    let mut failure = Failure::from_status(status);
    if failure.reason == "PEER_LACKS_METHOD" {
        failure.message =
            format!("the peer answers gRPC, but has no {name}: it is no Marcot donor");
    }
    failure.from_donor()
}

/// What a stream does on its connection.
type Reading =
    for<'a> fn(Channel, &'a ReadOptions, &'a FetchContext) -> BoxFuture<'a, Result<(), Failure>>;

impl DonorSource {
    /// Work on a connection of its own.
    fn stream(&self, reading: Reading) -> StreamWork {
        let connection = StreamConnection {
            options: self.pinned.clone(),
            snapshot: self.snapshot.clone(),
            key: self.accounts.then(|| Arc::clone(&self.key)),
        };
        let read = ReadOptions {
            snapshot: self.snapshot.clone(),
            compression_level: self.compression_level,
        };
        let span = Span::current();
        Box::new(move |context| {
            let _in_the_clones_trace = span.enter();
            // One thread for the connection and the disk: nothing is handed over between cores.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| Failure::bug(format!("start a stream's runtime: {e}")))?;
            runtime.block_on(async {
                let opened = context.stop.run_until_cancelled(connection.open()).await;
                let channel = opened.unwrap_or_else(|| Err(stopped()))?;
                reading(channel, &read, context).await
            })
        })
    }
}

#[tonic::async_trait]
impl Source for DonorSource {
    fn opened(&self) -> Opened {
        self.opened.clone()
    }

    fn cut(&self) -> Cut {
        Cut::Segments
    }

    async fn list(
        &self,
        position: Position,
        mut receiver: ListReceiver,
    ) -> Result<FileList, Failure> {
        let request = pb::ListFilesRequest {
            snapshot: self.snapshot.clone(),
            stage: position.stage.to_wire().into(),
            round: position.round,
            start_number: 0,
        };
        let mut client = self.client.clone();
        let mut messages = call("ListFiles", OPEN_TIMEOUT, client.list_files(request)).await?;
        loop {
            let message = tokio::time::timeout(SILENCE_MAX, messages.message())
                .await
                .map_err(|_| silent("ListFiles"))?
                .map_err(|status| told("ListFiles", &status))?;
            let Some(message) = message else {
                return Err(Failure::peer_misbehaved(
                    "ListFiles: the stream ended without its end",
                ));
            };
            for entry in message.entries {
                receiver.push(&wire::entry(entry)?)?;
            }
            if let Some(end) = message.end {
                let totals: Totals = wire::totals(end.totals);
                return receiver.finish(totals);
            }
        }
    }

    fn streams(&self, count: usize) -> Vec<StreamWork> {
        let work =
            || self.stream(|channel, read, context| Box::pin(copy_units(channel, read, context)));
        std::iter::repeat_with(work).take(count).collect()
    }

    fn follower(&self) -> StreamWork {
        self.stream(|channel, read, context| Box::pin(follow(channel, read, context)))
    }

    async fn advance(&self, from: Position) -> Result<Advanced, Failure> {
        let request = pb::AdvanceStageRequest {
            snapshot: self.snapshot.clone(),
            stage: from.stage.to_wire().into(),
            round: from.round,
        };
        let mut client = self.client.clone();
        let mut steps = call("AdvanceStage", CALL_TIMEOUT, client.advance_stage(request)).await?;
        loop {
            let step = tokio::time::timeout(SILENCE_MAX, steps.message())
                .await
                .map_err(|_| silent("AdvanceStage"))?
                .map_err(|status| told("AdvanceStage", &status))?;
            match step.map(|step| step.step) {
                Some(Some(pb::advance_stage_response::Step::Progress(_))) => {}
                Some(Some(pb::advance_stage_response::Step::Advanced(advanced))) => {
                    return advanced_from_wire(advanced);
                }
                _ => {
                    let text = "AdvanceStage: the stream ended without a result";
                    return Err(Failure::peer_misbehaved(text));
                }
            }
        }
    }

    async fn close(&self, outcome: pb::Outcome) {
        self.renewal.abort();
        let request =
            pb::CloseSnapshotRequest { snapshot: self.snapshot.clone(), outcome: outcome.into() };
        let mut client = self.client.clone();
        if let Err(failure) =
            call("CloseSnapshot", CALL_TIMEOUT, client.close_snapshot(request)).await
        {
            warn!(
                snapshot = %self.snapshot,
                error = %failure,
                "snapshot was not closed; its lease ends it"
            );
        }
    }
}

/// What a stream needs to make its own connection.
struct StreamConnection {
    options: ConnectOptions,
    snapshot: String,
    key: Option<Arc<login::CloneKey>>,
}

impl StreamConnection {
    async fn open(&self) -> Result<Channel, Failure> {
        let DonorConnection { channel, security, .. } = connect(&self.options).await?;
        if let Some(key) = &self.key {
            let mut client = AuthServiceClient::new(channel.clone());
            login::log_in_with_key(&mut client, &security, &self.snapshot, key)
                .await
                .map_err(Failure::from_donor)?;
        }
        Ok(channel)
    }
}

fn silent(name: &str) -> Failure {
    let text = format!("{name}: the donor sent nothing for {} s", SILENCE_MAX.as_secs());
    Failure::new(Code::Unavailable, "STALLED", text).mysql(1159).from_donor()
}

fn advanced_from_wire(advanced: pb::Advanced) -> Result<Advanced, Failure> {
    let root = advanced.root.map(|root| {
        wire::attributes(root)
            .map_err(|why| Failure::peer_misbehaved(format!("the data directory {why}")))
    });
    Ok(Advanced {
        position: wire::position(advanced.stage, advanced.round)?,
        totals: wire::totals(advanced.totals),
        consistency_level: pbc::ConsistencyLevel::try_from(advanced.consistency_level)
            .unwrap_or(pbc::ConsistencyLevel::Unspecified),
        coordinates: advanced.coordinates,
        root: root.transpose()?,
    })
}
