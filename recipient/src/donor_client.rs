//! The only module that speaks to a donor: a clone's connections, and what is read from its snapshot.

mod advance;
mod lists;
mod opening;

use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
    time::Duration,
};

use futures::future::BoxFuture;
use marcot_common::{
    checksum,
    chunk::{END_READS, KNOWN_BLOCKS},
    connect::{ConnectOptions, DonorConnection, connect},
    entry::Totals,
    failure::Failure,
    login,
    position::Position,
    telemetry::propagation::TraceInterceptor,
    wire,
};
use marcot_engine::Advanced;
use marcot_proto::{
    auth::v1::auth_service_client::AuthServiceClient,
    common::v1 as pbc,
    donor::v1::{self as pb, donor_service_client::DonorServiceClient},
};
use prost::Message as _;
use tokio::{sync::Semaphore, task::AbortHandle};
use tonic::{
    Code, Streaming, client::Grpc, service::interceptor::InterceptedService, transport::Channel,
};
use tracing::warn;

use self::advance::AdvanceWatch;
pub use self::opening::Greeted;
use crate::{
    copy_journal::record::SnapshotOpened,
    fetch::{
        FetchContext, Seat, StreamWork,
        compression::Compression,
        remote::{ReadOptions, copy_units, follow},
    },
    list::{FileList, ListReceiver},
    plan::Cut,
    progress::Progress,
    retry::Patience,
    settings::CONCURRENCY_MAX,
    source::{Opened, Source},
    stall::Pulse,
};

/// Longest wait for an answer that needs no work.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Largest answer that is neither a list nor data: what a server says of itself, and a GTID set. In
/// memory it is forty times as much at the most.
const ANSWER_BYTES_MAX: usize = 512 << 10;

/// Calls belong to the caller's trace.
type Service = InterceptedService<Channel, TraceInterceptor>;

/// A client; the call whose answers are large has bounds of its own.
#[derive(Debug, Clone)]
struct Client {
    calls: DonorServiceClient<Service>,
    lists: Grpc<Service>,
}

impl Deref for Client {
    type Target = DonorServiceClient<Service>;

    fn deref(&self) -> &Self::Target {
        &self.calls
    }
}

impl DerefMut for Client {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.calls
    }
}

impl Client {
    /// In the place of the generated call.
    async fn list_files(
        &mut self,
        request: pb::ListFilesRequest,
    ) -> Result<tonic::Response<Streaming<pb::ListFilesResponse>>, tonic::Status> {
        lists::list_files(&mut self.lists, request).await
    }
}

/// A snapshot on a donor.
#[derive(Debug)]
pub struct DonorSource {
    control: Arc<Control>,
    snapshot: String,
    opened: Opened,
    server_info: pb::GetServerInfoResponse,
    connector: Connector,
    compression: Compression,
    lease: Duration,
    renewal: AbortHandle,
}

impl Drop for DonorSource {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

/// What an attached snapshot needs to know of its donor: the comparison has been made.
fn kept(info: &pb::GetServerInfoResponse) -> pb::GetServerInfoResponse {
    pb::GetServerInfoResponse {
        version: info.version.clone(),
        capabilities: info.capabilities.clone(),
        chunk_bytes_max: info.chunk_bytes_max,
        ranges_max: info.ranges_max,
        readers_max: info.readers_max,
        lease_duration_max: info.lease_duration_max,
        ..pb::GetServerInfoResponse::default()
    }
}

fn client_on(channel: Channel) -> Client {
    let service = InterceptedService::new(channel, TraceInterceptor);
    let lists = Grpc::new(service.clone()).max_decoding_message_size(lists::LIST_MESSAGE_BYTES_MAX);
    let calls = DonorServiceClient::new(service).max_decoding_message_size(ANSWER_BYTES_MAX);
    Client { calls, lists }
}

fn auth_client(channel: &Channel) -> AuthServiceClient<Channel> {
    AuthServiceClient::new(channel.clone())
        .max_decoding_message_size(login::LOG_IN_ANSWER_BYTES_MAX)
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
    // So our own side calls a message that is larger than it may be.
    if failure.reason == "PEER_ERROR" && status.code() == Code::OutOfRange {
        failure = Failure::peer_misbehaved(format!("{name}: {}", failure.message));
    }
    failure.from_donor()
}

/// What a stream does.
type Reading = for<'a> fn(
    &'a mut Link,
    &'a ReadOptions,
    &'a FetchContext,
    Seat,
) -> BoxFuture<'a, Result<(), Failure>>;

impl DonorSource {
    /// Work on a connection of its own.
    fn work(&self, reading: Reading) -> StreamWork {
        let has = |wanted: &str| self.server_info.capabilities.iter().any(|name| name == wanted);
        let (connector, ends_reads) = (self.connector.clone(), has(END_READS));
        let mut link = Link { connector, channel: None, ends_reads };
        let read = ReadOptions {
            snapshot: self.snapshot.clone(),
            compression: self.compression,
            known_blocks: has(KNOWN_BLOCKS),
        };
        Box::new(move |context, seat| {
            // One thread for the connection and the disk: nothing is handed over between cores.
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| Failure::bug(format!("start a stream's runtime: {e}")))?;
            runtime.block_on(reading(&mut link, &read, context, seat))
        })
    }
}

#[tonic::async_trait]
impl Source for DonorSource {
    fn opened(&self) -> Opened {
        self.opened.clone()
    }

    fn record(&self) -> Option<SnapshotOpened> {
        let (address, encrypted, fingerprint) = self.connector.options.pins()?;
        let seed = self.connector.key.as_ref().map(|key| key.seed().to_vec()).unwrap_or_default();
        let (key_seed, bound_key_seed) = match self.connector.accounts {
            true => (seed, Vec::new()),
            false => (Vec::new(), seed),
        };
        Some(SnapshotOpened {
            snapshot: self.snapshot.clone(),
            key_seed,
            bound_key_seed,
            address: address.to_string(),
            encrypted,
            fingerprint: fingerprint.map(|f| f.to_vec()).unwrap_or_default(),
            lease_ms: u64::try_from(self.lease.as_millis()).unwrap_or(u64::MAX),
            server_info: kept(&self.server_info).encode_to_vec(),
            ..SnapshotOpened::default()
        })
    }

    fn cut(&self) -> Cut {
        Cut::Segments
    }

    fn streams_max(&self) -> usize {
        match self.server_info.readers_max {
            // It does not say.
            0 => CONCURRENCY_MAX,
            readers => usize::try_from(readers).unwrap_or(CONCURRENCY_MAX),
        }
    }

    async fn list(
        &self,
        position: Position,
        mut receiver: ListReceiver,
    ) -> Result<FileList, Failure> {
        let control = &self.control;
        let (mut patience, mut pulse) = (control.patience(), Pulse::new(control.stall_timeout));
        loop {
            let before = receiver.next_number();
            let received = self.receive_list(position, &mut pulse, &mut receiver).await;
            if receiver.next_number() > before {
                patience.right();
            }
            if pulse.take_moved() {
                patience.progress();
            }
            match received {
                Ok(totals) => return receiver.finish(totals),
                Err(failure) => control.pause_after(failure, &mut patience).await?,
            }
        }
    }

    fn stream(&self) -> StreamWork {
        self.work(|link, read, context, seat| Box::pin(copy_units(link, read, context, seat)))
    }

    fn follower(&self) -> StreamWork {
        self.work(|link, read, context, _| Box::pin(follow(link, read, context)))
    }

    async fn advance(&self, from: Position) -> Result<Advanced, Failure> {
        let control = &self.control;
        let mut patience = control.patience();
        let mut watch = AdvanceWatch::new(control.stall_timeout);
        loop {
            let received = self.receive_advanced(from, &mut patience, &mut watch).await;
            match received {
                Ok(advanced) => return Ok(advanced),
                Err(failure) => {
                    watch.check_whole()?;
                    control.pause_after(failure, &mut patience).await?;
                }
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
        pulse: &mut Pulse,
        receiver: &mut ListReceiver,
    ) -> Result<Totals, Failure> {
        let request = pb::ListFilesRequest {
            snapshot: self.snapshot.clone(),
            stage: position.stage.to_wire().into(),
            round: position.round,
            start_number: receiver.next_number(),
        };
        let control = &self.control;
        let mut client = control.client().await?;
        let told = |status: tonic::Status| told("ListFiles", &status);
        let answer = pulse.wait("ListFiles", client.list_files(request)).await?;
        let mut messages = answer.map_err(told)?.into_inner();
        loop {
            let message = pulse.wait("ListFiles", messages.message()).await?.map_err(told)?;
            let Some(message) = message else {
                return Err(Failure::peer_misbehaved(
                    "ListFiles: the stream ended without its end",
                ));
            };
            if message.entries.is_empty() && message.end.is_none() {
                return Err(Failure::peer_misbehaved("ListFiles: a message without an entry"));
            }
            pulse.came(message.encoded_len() as u64);
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
        watch: &mut AdvanceWatch,
    ) -> Result<Advanced, Failure> {
        let request = pb::AdvanceStageRequest {
            snapshot: self.snapshot.clone(),
            stage: from.stage.to_wire().into(),
            round: from.round,
        };
        let control = &self.control;
        let mut client = control.client().await?;
        let mut steps = call("AdvanceStage", CALL_TIMEOUT, client.advance_stage(request)).await?;
        let mut calling = watch.call();
        loop {
            let step = tokio::time::timeout(watch.left(&calling), steps.message())
                .await
                .map_err(|_| control.stalled("AdvanceStage: the donor got no further"))?
                .map_err(|status| told("AdvanceStage", &status))?;
            match step.map(|step| step.step) {
                Some(Some(pb::advance_stage_response::Step::Progress(progress))) => {
                    watch.word(&mut calling, progress.entries, patience)?;
                }
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
    /// What further connections log in by; `None`: an older donor without accounts asks nobody.
    key: Option<Arc<login::CloneKey>>,
    /// Whether another snapshot needs the account's password.
    accounts: bool,
    /// Of the clone's connections, those that may log in at one time.
    log_ins: Arc<Semaphore>,
}

/// Log-ins of one clone at one time: half of what a donor takes from one address, from which other clones
/// may log in as well. Each takes moments.
const LOG_INS_MAX: usize = 8;

impl Connector {
    async fn open(&self) -> Result<Channel, Failure> {
        let DonorConnection { channel, security, .. } = connect(&self.options).await?;
        if let Some(key) = &self.key {
            // Closed by nobody.
            let _turn = self.log_ins.acquire().await.ok();
            let mut client = auth_client(&channel);
            login::log_in_with_key(&mut client, &security, &self.snapshot, key).await.map_err(
                |failure| match failure.reason.as_ref() {
                    // Whoever knew the key has ended.
                    "ACCESS_DENIED" => Failure::new(
                        Code::NotFound,
                        "UNKNOWN_SNAPSHOT",
                        format!(
                            "{} has ended: the donor service was restarted, or the lease ran out",
                            self.snapshot
                        ),
                    )
                    .from_donor(),
                    _ => failure.from_donor(),
                },
            )?;
        }
        Ok(channel)
    }
}

/// A stream's connection, made when it is needed.
#[derive(Debug)]
pub struct Link {
    connector: Connector,
    channel: Option<Channel>,
    /// Whether the donor ends calls when it is asked to.
    ends_reads: bool,
}

impl Link {
    /// Whether calls end at their next chunk when the donor is asked for it.
    #[must_use]
    pub fn ends_reads(&self) -> bool {
        self.ends_reads
    }

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
    stall_timeout: Duration,
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

    fn stalled(&self, what: &str) -> Failure {
        let text = format!("{what} for {:?}", self.stall_timeout);
        Failure::new(Code::Unavailable, "STALLED", text).mysql(1159).from_donor()
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
