//! The only module that speaks to a donor.
//!
//! Every connection of a clone goes to one address, in one mode, to one certificate: what the first
//! one found is pinned for the others. Mode and certificate stay so for all of the clone's snapshots;
//! the address follows the donor's name when that has left it. The first connection logs in by
//! password, the others by the clone's key, which only this process holds.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use marcot_common::{
    checksum,
    chunk::{KNOWN_BLOCKS, MESSAGE_BYTES_MAX},
    connect::{ClientTls, ConnectOptions, DonorConnection, connect},
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
use prost::Message as _;
use tokio::task::AbortHandle;
use tonic::{Code, service::interceptor::InterceptedService, transport::Channel};
use tracing::{Span, warn};

use crate::{
    copy_journal::record::SnapshotOpened,
    fetch::{
        FetchContext, Seat, StreamWork,
        compression::Compression,
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

/// Longest wait for the donor to list its files, of so many entries at the most: keepalive finds a
/// donor that is gone, and no healthy disk is as slow as this.
fn open_timeout(entries_max: u64) -> Duration {
    const WALKED_PER_SECOND: u64 = 5_000;
    Duration::from_secs(15 * 60) + Duration::from_secs(entries_max / WALKED_PER_SECOND)
}

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
    compression: Compression,
    lease: Duration,
    renewal: AbortHandle,
}

impl Drop for DonorSource {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

/// A donor that has let this clone in, and said what it is.
#[derive(Debug)]
pub struct Greeted {
    client: Client,
    pinned: ConnectOptions,
    accounts: bool,
    server_info: pb::GetServerInfoResponse,
}

impl Greeted {
    /// Connects, logs in, and asks what the donor is.
    pub async fn connect(
        request: &DonorRequest,
        settings: &Settings,
        job: Option<&CloneJob>,
    ) -> Result<Self, Failure> {
        let options = ConnectOptions::new(&request.host, request.port, request.ssl_mode)
            .with_donors(Arc::clone(&settings.donors))
            .with_tls_versions(settings.donor_tls_versions)
            .with_tls(settings.donor_tls.with_fingerprint(request.fingerprint));
        // Another snapshot of the same clone: nothing that happened meanwhile makes it trust less.
        let options = match job.and_then(|job| job.pins.get()) {
            Some((encrypted, fingerprint)) => options.pinned_as(*encrypted, *fingerprint),
            None => options,
        };
        let connection = connect(&options).await?;
        let pinned = options.pinned(&connection);
        let DonorConnection { channel, security, .. } = connection;
        if let Some(job) = job {
            job.pins.get_or_init(|| (security.encrypted, security.fingerprint));
            job.status.update(|clone| {
                clone.encrypted = Some(security.encrypted);
                clone.cipher.clone_from(&security.cipher);
                let fingerprint = security.fingerprint.map(|f| Bytes::copy_from_slice(&f));
                clone.donor_fingerprint = fingerprint.unwrap_or_default();
            });
        }
        let accounts = log_in(&channel, request, &security, &options.tls).await?;
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
        Ok(Self { client, pinned, accounts, server_info })
    }

    /// What the donor says of itself.
    #[must_use]
    pub fn server_info(&self) -> &pb::GetServerInfoResponse {
        &self.server_info
    }
}

impl DonorSource {
    /// Opens a snapshot.
    pub async fn open(
        greeted: Greeted,
        request: &DonorRequest,
        snapshot: &SnapshotOptions,
        settings: &Settings,
        clone_id: &str,
        job: Option<&CloneJob>,
    ) -> Result<Self, Failure> {
        let Greeted { mut client, pinned, accounts, server_info } = greeted;
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
        let progress = job.map(|job| Arc::clone(&job.progress)).unwrap_or_default();
        // A check of what a clone would do does not wait for a donor that has gone.
        let donor_timeout = job.map_or(Duration::ZERO, |_| settings.donor_timeout);
        let mut patience = Patience::new(&progress.retries, donor_timeout);
        let mut opening = Opening { client: client.clone(), request: open.clone(), is_open: false };
        let opened = loop {
            let limit = open_timeout(settings.entries_max);
            let call = call("OpenSnapshot", limit, client.open_snapshot(open.clone()));
            let mut failure = match call.await {
                Ok(opened) => break opened,
                Err(failure) => failure,
            };
            // The same request opens the same snapshot, also when only the answer was lost.
            client = loop {
                tokio::time::sleep(patience.after(failure)?).await;
                match connect_anew(&pinned, request).await {
                    Ok(client) => break client,
                    Err(again) => failure = again,
                }
            };
            opening.client = client.clone();
        };
        opening.is_open = true;
        drop(patience);
        let connector = Connector {
            options: pinned,
            snapshot: opened.snapshot.clone(),
            key: accounts.then_some(key),
        };
        let control = Arc::new(Control {
            connector: connector.clone(),
            client: tokio::sync::Mutex::new(Some(client)),
            progress,
            donor_timeout: settings.donor_timeout,
            stall_timeout: settings.stall_timeout,
        });
        let renewal = spawn_renewal(Arc::clone(&control), lease);
        Ok(Self {
            control,
            opened: Opened {
                position: wire::position(opened.stage, opened.round)?,
                estimate: wire::totals(opened.estimate),
                left_out: opened.left_out.into_iter().take(64).collect(),
                storage_engines: storage_engines(opened.storage_engines),
            },
            snapshot: opened.snapshot,
            server_info,
            connector,
            compression: request.compression,
            lease,
            renewal,
        })
    }

    /// Goes on with a snapshot that an earlier run of this service has opened, by the clone's key:
    /// to the same address, in the same mode, to the same certificate. `UNKNOWN_SNAPSHOT` when it
    /// has ended meanwhile.
    pub async fn attach(
        request: &DonorRequest,
        record: &SnapshotOpened,
        settings: &Settings,
        progress: &Arc<Progress>,
    ) -> Result<Self, Failure> {
        let unreadable = |what: &str| {
            let text = format!("the snapshot's record has no right {what}");
            Failure::new(Code::DataLoss, "JOURNAL_CORRUPT", text)
        };
        let address = record.address.parse().map_err(|_| unreadable("address"))?;
        let array = |bytes: &[u8]| <[u8; 32]>::try_from(bytes);
        let fingerprint = match &record.fingerprint[..] {
            [] => None,
            bytes => Some(array(bytes).map_err(|_| unreadable("fingerprint"))?),
        };
        let key = match &record.key_seed[..] {
            [] => None,
            bytes => {
                let seed = array(bytes).map_err(|_| unreadable("key"))?;
                Some(Arc::new(login::CloneKey::from_seed(&seed)?))
            }
        };
        let server_info = pb::GetServerInfoResponse::decode(&record.server_info[..])
            .map_err(|_| unreadable("server"))?;
        // A list that has become shorter since then holds for it as well.
        let options = ConnectOptions::new(&request.host, request.port, request.ssl_mode)
            .with_donors(Arc::clone(&settings.donors))
            .with_tls_versions(settings.donor_tls_versions)
            .with_tls(settings.donor_tls.clone())
            .pinned_to(address, record.encrypted, fingerprint);
        let connector = Connector { options, snapshot: record.snapshot.clone(), key };
        let control = Arc::new(Control {
            connector: connector.clone(),
            client: tokio::sync::Mutex::new(None),
            progress: Arc::clone(progress),
            donor_timeout: settings.donor_timeout,
            stall_timeout: settings.stall_timeout,
        });
        let lease = Duration::from_millis(record.lease_ms).max(LEASE_MIN);
        let mut patience = control.patience();
        loop {
            let renewed = async {
                let mut client = control.client().await?;
                let request = pb::RenewLeaseRequest {
                    snapshot: record.snapshot.clone(),
                    lease_duration: Some(duration_to_wire(lease)),
                };
                call("RenewLease", CALL_TIMEOUT, client.renew_lease(request)).await
            };
            match renewed.await {
                Ok(_) => break,
                Err(failure) => control.pause_after(failure, &mut patience).await?,
            }
        }
        drop(patience);
        Ok(Self {
            // All that it said is in the clone's resource since then.
            opened: Opened {
                position: Position::FIRST,
                estimate: Totals::default(),
                left_out: std::collections::BTreeMap::new(),
                storage_engines: Vec::new(),
            },
            snapshot: record.snapshot.clone(),
            server_info,
            connector,
            compression: request.compression,
            lease,
            renewal: spawn_renewal(Arc::clone(&control), lease),
            control,
        })
    }
}

/// Names of engines are told in findings: so many, and so long, at the most.
fn storage_engines(names: Vec<String>) -> Vec<String> {
    let is_name = |name: &String| {
        (1..=64).contains(&name.len()) && name.chars().all(|c| c.is_ascii_graphic())
    };
    names.into_iter().take(64).filter(is_name).collect()
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

/// A further connection that logs in by password: no snapshot is known yet that a key is good for.
async fn connect_anew(options: &ConnectOptions, request: &DonorRequest) -> Result<Client, Failure> {
    let DonorConnection { channel, security, .. } = connect(options).await?;
    log_in(&channel, request, &security, &options.tls).await?;
    Ok(client_on(channel))
}

/// A snapshot that is being opened. Dropped before it is, it asks for its name once more and closes
/// it: a cancel may come while the answer is on its way.
struct Opening {
    client: Client,
    request: pb::OpenSnapshotRequest,
    is_open: bool,
}

impl Drop for Opening {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.is_open {
            return;
        }
        let (mut client, request) = (self.client.clone(), self.request.clone());
        runtime.spawn(async move {
            // What cannot be closed ends with its lease.
            let opened = call("OpenSnapshot", CALL_TIMEOUT, client.open_snapshot(request)).await?;
            let outcome = pb::Outcome::Cancelled.into();
            let close = pb::CloseSnapshotRequest { snapshot: opened.snapshot, outcome };
            call("CloseSnapshot", CALL_TIMEOUT, client.close_snapshot(close)).await
        });
    }
}

/// Logs in by password where the donor asks for it; says whether it does.
async fn log_in(
    channel: &Channel,
    request: &DonorRequest,
    security: &marcot_common::connect::Security,
    tls: &ClientTls,
) -> Result<bool, Failure> {
    let mut client = AuthServiceClient::new(channel.clone());
    let (user, password) = (&request.user, &request.password);
    let trust = Some(login::Trust { host: &request.host, tls });
    let result = login::log_in_with_password(&mut client, security, user, password, trust).await;
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
    Seat,
) -> BoxFuture<'a, Result<(), Failure>>;

impl DonorSource {
    /// Work on a connection of its own.
    fn work(&self, reading: Reading) -> StreamWork {
        let mut link = Link { connector: self.connector.clone(), channel: None };
        let read = ReadOptions {
            snapshot: self.snapshot.clone(),
            compression: self.compression,
            known_blocks: self.server_info.capabilities.iter().any(|name| name == KNOWN_BLOCKS),
        };
        let span = Span::current();
        Box::new(move |context, seat| {
            let _in_the_clones_trace = span.enter();
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
        Some(SnapshotOpened {
            snapshot: self.snapshot.clone(),
            key_seed: self
                .connector
                .key
                .as_ref()
                .map(|key| key.seed().to_vec())
                .unwrap_or_default(),
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

    fn stream(&self) -> StreamWork {
        self.work(|link, read, context, seat| Box::pin(copy_units(link, read, context, seat)))
    }

    fn follower(&self) -> StreamWork {
        self.work(|link, read, context, _| Box::pin(follow(link, read, context)))
    }

    async fn advance(&self, from: Position) -> Result<Advanced, Failure> {
        let control = &self.control;
        let (mut patience, mut furthest) = (control.patience(), None);
        loop {
            match self.receive_advanced(from, &mut patience, &mut furthest).await {
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
        let control = &self.control;
        let mut client = control.client().await?;
        let mut messages =
            call("ListFiles", control.stall_timeout, client.list_files(request)).await?;
        loop {
            let message = tokio::time::timeout(control.stall_timeout, messages.message())
                .await
                .map_err(|_| control.stalled("ListFiles: the donor sent nothing"))?
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
        furthest: &mut Option<u64>,
    ) -> Result<Advanced, Failure> {
        let request = pb::AdvanceStageRequest {
            snapshot: self.snapshot.clone(),
            stage: from.stage.to_wire().into(),
            round: from.round,
        };
        let control = &self.control;
        let mut client = control.client().await?;
        let mut steps = call("AdvanceStage", CALL_TIMEOUT, client.advance_stage(request)).await?;
        // A donor whose work stands still goes on saying so: what counts is what it has looked at.
        let begun = Instant::now();
        let (mut entries, mut moved) = (None, begun);
        loop {
            let left = control.stall_timeout.saturating_sub(moved.elapsed());
            let step = tokio::time::timeout(left, steps.message())
                .await
                .map_err(|_| control.stalled("AdvanceStage: the donor got no further"))?
                .map_err(|status| told("AdvanceStage", &status))?;
            match step.map(|step| step.step) {
                Some(Some(pb::advance_stage_response::Step::Progress(progress))) => {
                    let now = progress.entries;
                    if entries.replace(now) != Some(now) {
                        moved = Instant::now();
                        // A call that was made again begins anew: it counts once it gets further than
                        // the one before, or lives longer.
                        let is_further = furthest.is_none_or(|furthest| now > furthest);
                        if is_further || begun.elapsed() > control.stall_timeout {
                            patience.progress();
                        }
                        *furthest = (*furthest).max(Some(now));
                    }
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
    /// Where further connections must log in.
    key: Option<Arc<login::CloneKey>>,
}

impl Connector {
    async fn open(&self) -> Result<Channel, Failure> {
        let DonorConnection { channel, security, .. } = connect(&self.options).await?;
        if let Some(key) = &self.key {
            let mut client = AuthServiceClient::new(channel.clone());
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
