//! The only module that speaks to a donor.
//!
//! Every connection of a clone goes to one address, in one mode, to one certificate: what the first
//! one found is pinned for the others. The first logs in by password, the others by the clone's
//! key, which only this process holds.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use marcot_common::{
    checksum,
    chunk::{KNOWN_BLOCKS, MESSAGE_BYTES_MAX},
    connect::{ConnectOptions, DonorConnection, connect},
    entry::Totals,
    failure::Failure,
    login,
    position::Position,
    telemetry::propagation::TraceInterceptor,
    time::{self, duration_to_wire},
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
    },
    job::CloneJob,
    list::{FileList, ListReceiver},
    plan::Cut,
    progress::Progress,
    request::DonorRequest,
    retry::Patience,
    settings::Settings,
    source::{Opened, Source},
};

/// Shortest lease of a snapshot: a recipient that misses two renewals keeps it.
const LEASE_MIN: Duration = Duration::from_secs(60);

/// Between two renewals of the lease.
const RENEW_INTERVAL: Duration = Duration::from_secs(20);

/// Longest wait for the donor to list its files: a walk of some million files.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Longest wait for an answer that needs no work.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A client whose calls belong to the caller's trace.
type Client = DonorServiceClient<InterceptedService<Channel, TraceInterceptor>>;

/// A snapshot on a donor.
#[derive(Debug)]
pub struct DonorSource {
    control: Arc<Control>,
    snapshot: String,
    opened: Opened,
    server_info: pb::GetServerInfoResponse,
    connector: Connector,
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
        let mut client = client_on(channel);
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
        let lease = lease(settings.donor_timeout, &server_info);
        let open = pb::OpenSnapshotRequest {
            public_key: Bytes::copy_from_slice(key.public_key()),
            lease_duration: Some(duration_to_wire(lease)),
            request_id: uuid::Uuid::new_v4().to_string(),
            clone: format!("clones/{clone_id}"),
            block_ddl: snapshot.block_ddl,
            ddl_timeout: snapshot.ddl_timeout.map(duration_to_wire),
            ..pb::OpenSnapshotRequest::default()
        };
        let opened = call("OpenSnapshot", OPEN_TIMEOUT, client.open_snapshot(open)).await?;
        let connector = Connector {
            options: pinned,
            snapshot: opened.snapshot.clone(),
            key: accounts.then_some(key),
        };
        let control = Arc::new(Control {
            connector: connector.clone(),
            client: tokio::sync::Mutex::new(Some(client)),
            progress: job.map(|job| Arc::clone(&job.progress)).unwrap_or_default(),
            donor_timeout: settings.donor_timeout,
        });
        let renewal = spawn_renewal(Arc::clone(&control), lease);
        Ok(Self {
            control,
            opened: Opened {
                position: wire::position(opened.stage, opened.round)?,
                estimate: wire::totals(opened.estimate),
                left_out: opened.left_out.into_iter().take(64).collect(),
            },
            snapshot: opened.snapshot,
            server_info,
            connector,
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

/// How long the donor keeps the snapshot of a recipient that is gone.
fn lease(donor_timeout: Duration, donor: &pb::GetServerInfoResponse) -> Duration {
    let most = donor.lease_duration_max.and_then(|most| time::duration_from_wire(most).ok());
    donor_timeout.max(LEASE_MIN).min(most.unwrap_or(LEASE_MIN))
}

fn spawn_renewal(control: Arc<Control>, lease: Duration) -> AbortHandle {
    let task = tokio::spawn(async move {
        let mut tick = tokio::time::interval(RENEW_INTERVAL.min(lease / 3));
        loop {
            tick.tick().await;
            let request = pb::RenewLeaseRequest {
                snapshot: control.connector.snapshot.clone(),
                lease_duration: Some(duration_to_wire(lease)),
            };
            let renewed = async {
                let mut client = control.client().await?;
                call("RenewLease", CALL_TIMEOUT, client.renew_lease(request)).await
            };
            // A lost lease shows in the calls that need it; here it is only told early.
            if let Err(failure) = renewed.await {
                let snapshot = &control.connector.snapshot;
                warn!(%snapshot, error = %failure, "lease was not renewed");
                control.drop_connection().await;
            }
        }
    });
    task.abort_handle()
}

fn client_on(channel: Channel) -> Client {
    DonorServiceClient::with_interceptor(channel, TraceInterceptor)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
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

/// What a stream does.
type Reading = for<'a> fn(
    &'a mut Link,
    &'a ReadOptions,
    &'a FetchContext,
) -> BoxFuture<'a, Result<(), Failure>>;

impl DonorSource {
    /// Work on a connection of its own.
    fn stream(&self, reading: Reading) -> StreamWork {
        let mut link = Link { connector: self.connector.clone(), channel: None };
        let read = ReadOptions {
            snapshot: self.snapshot.clone(),
            compression_level: self.compression_level,
            known_blocks: self.server_info.capabilities.iter().any(|name| name == KNOWN_BLOCKS),
        };
        let span = Span::current();
        Box::new(move |context| {
            let _in_the_clones_trace = span.enter();
            // One thread for the connection and the disk: nothing is handed over between cores.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| Failure::bug(format!("start a stream's runtime: {e}")))?;
            runtime.block_on(reading(&mut link, &read, context))
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
        let control = &self.control;
        let mut patience = control.patience();
        loop {
            let before = receiver.next_number();
            let received = self.receive_list(position, &mut receiver).await;
            if receiver.next_number() > before {
                patience.progress();
            }
            match received {
                Ok(totals) => return receiver.finish(totals),
                Err(failure) => control.pause_after(failure, &mut patience).await?,
            }
        }
    }

    fn streams(&self, count: usize) -> Vec<StreamWork> {
        let work = || self.stream(|link, read, context| Box::pin(copy_units(link, read, context)));
        std::iter::repeat_with(work).take(count).collect()
    }

    fn follower(&self) -> StreamWork {
        self.stream(|link, read, context| Box::pin(follow(link, read, context)))
    }

    async fn advance(&self, from: Position) -> Result<Advanced, Failure> {
        let control = &self.control;
        let mut patience = control.patience();
        loop {
            match self.receive_advanced(from, &mut patience).await {
                Ok(advanced) => return Ok(advanced),
                Err(failure) => control.pause_after(failure, &mut patience).await?,
            }
        }
    }

    async fn close(&self, outcome: pb::Outcome) {
        self.renewal.abort();
        let request =
            pb::CloseSnapshotRequest { snapshot: self.snapshot.clone(), outcome: outcome.into() };
        let closed = async {
            let mut client = self.control.client().await?;
            call("CloseSnapshot", CALL_TIMEOUT, client.close_snapshot(request)).await
        };
        if let Err(failure) = closed.await {
            warn!(
                snapshot = %self.snapshot,
                error = %failure,
                "snapshot was not closed; its lease ends it"
            );
        }
    }
}

impl DonorSource {
    /// Receives a list from where `receiver` stands to its end.
    async fn receive_list(
        &self,
        position: Position,
        receiver: &mut ListReceiver,
    ) -> Result<Totals, Failure> {
        let request = pb::ListFilesRequest {
            snapshot: self.snapshot.clone(),
            stage: position.stage.to_wire().into(),
            round: position.round,
            start_number: receiver.next_number(),
        };
        let mut client = self.control.client().await?;
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
            let entries = message.entries.into_iter().map(wire::entry);
            let entries = entries.collect::<Result<Vec<_>, _>>()?;
            check_sum("a list", message.entries_crc32c, || checksum::of_entries(&entries))?;
            for entry in entries {
                receiver.push(&entry)?;
            }
            if let Some(end) = message.end {
                return Ok(wire::totals(end.totals));
            }
        }
    }

    async fn receive_advanced(
        &self,
        from: Position,
        patience: &mut Patience<'_>,
    ) -> Result<Advanced, Failure> {
        let request = pb::AdvanceStageRequest {
            snapshot: self.snapshot.clone(),
            stage: from.stage.to_wire().into(),
            round: from.round,
        };
        let mut client = self.control.client().await?;
        let mut steps = call("AdvanceStage", CALL_TIMEOUT, client.advance_stage(request)).await?;
        loop {
            let step = tokio::time::timeout(SILENCE_MAX, steps.message())
                .await
                .map_err(|_| silent("AdvanceStage"))?
                .map_err(|status| told("AdvanceStage", &status))?;
            match step.map(|step| step.step) {
                Some(Some(pb::advance_stage_response::Step::Progress(_))) => patience.progress(),
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
}

/// What it takes to make a further connection.
#[derive(Debug, Clone)]
struct Connector {
    options: ConnectOptions,
    snapshot: String,
    /// Where further connections must log in.
    key: Option<Arc<login::CloneKey>>,
}

impl Connector {
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

/// A stream's connection, made when it is needed.
#[derive(Debug)]
pub struct Link {
    connector: Connector,
    channel: Option<Channel>,
}

impl Link {
    /// The connection.
    pub async fn channel(&mut self) -> Result<&mut Channel, Failure> {
        let channel = match self.channel.take() {
            Some(channel) => channel,
            None => self.connector.open().await?,
        };
        Ok(self.channel.insert(channel))
    }

    /// The next call goes over a new connection.
    pub fn drop_connection(&mut self) {
        self.channel = None;
    }
}

/// The connection for all but data, made anew when it was lost.
#[derive(Debug)]
struct Control {
    connector: Connector,
    client: tokio::sync::Mutex<Option<Client>>,
    progress: Arc<Progress>,
    donor_timeout: Duration,
}

impl Control {
    async fn client(&self) -> Result<Client, Failure> {
        let mut held = self.client.lock().await;
        if let Some(client) = held.as_ref() {
            return Ok(client.clone());
        }
        let client = client_on(self.connector.open().await?);
        *held = Some(client.clone());
        Ok(client)
    }

    async fn drop_connection(&self) {
        *self.client.lock().await = None;
    }

    fn patience(&self) -> Patience<'_> {
        Patience::new(&self.progress.retries, self.donor_timeout)
    }

    /// Waits before the next try, on a new connection; fails when there is to be none.
    async fn pause_after(
        &self,
        failure: Failure,
        patience: &mut Patience<'_>,
    ) -> Result<(), Failure> {
        let pause = patience.after(failure)?;
        self.drop_connection().await;
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

fn silent(name: &str) -> Failure {
    let text = format!("{name}: the donor sent nothing for {} s", SILENCE_MAX.as_secs());
    Failure::new(Code::Unavailable, "STALLED", text).mysql(1159).from_donor()
}

fn advanced_from_wire(advanced: pb::Advanced) -> Result<Advanced, Failure> {
    let root = advanced.root.clone().map(|root| {
        wire::attributes(root)
            .map_err(|why| Failure::peer_misbehaved(format!("the data directory {why}")))
    });
    let root = root.transpose()?;
    let sum = || checksum::of_advanced(&advanced, root.as_ref());
    check_sum("a consistent point", advanced.crc32c, sum)?;
    Ok(Advanced {
        position: wire::position(advanced.stage, advanced.round)?,
        totals: wire::totals(advanced.totals),
        consistency_level: pbc::ConsistencyLevel::try_from(advanced.consistency_level)
            .unwrap_or(pbc::ConsistencyLevel::Unspecified),
        coordinates: advanced.coordinates,
        root,
    })
}

fn check_sum(what: &str, told: Option<u32>, sum: impl FnOnce() -> u32) -> Result<(), Failure> {
    let Some(told) = told else { return Ok(()) };
    let sum = sum();
    if sum == told {
        return Ok(());
    }
    Err(Failure::new(
        Code::DataLoss,
        "MESSAGE_CORRUPT",
        format!(
            "{what} has CRC-32C {sum:08x}, the donor says {told:08x}: it was changed on its way; \
             clone again, over TLS if it was not"
        ),
    )
    .mysql(3863))
}
