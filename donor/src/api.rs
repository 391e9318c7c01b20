//! The donor's gRPC handlers: decode, call, encode; no decisions.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::Stream;
use marcot_common::{
    access,
    binlog::{self, BINLOG_BASE},
    checksum,
    chunk::{self, END_READS, KNOWN_BLOCKS},
    failure::Failure,
    host,
    login::BOUND_SNAPSHOTS,
    telemetry::spans::{BYTES, CLONE, SNAPSHOT, set_number},
    time,
    wire::{self, attributes_to_wire, entry_to_wire, totals_to_wire},
};
use marcot_engine::{SnapshotOptions, server_facts::ServerFacts};
use marcot_proto::{
    common::v1 as pbc,
    donor::v1::{self as pb, donor_service_server::DonorService},
};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};
use tracing::{Instrument as _, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::{
    caps::Caps,
    chunk_reader::{BufferPool, CallerGone, ChunkReader, Frame, ReadPlan},
    kindness::Kindness,
    lease::{self, Caller, Ending, Held, LEASE_DEFAULT, LEASE_MAX, LEASE_MIN, Leases, OpenRequest},
    outbox::Outbox,
    places::{Places, lender},
    queue::WAIT_MAX,
};

/// Frames that wait between the disk and the network, per call: one to read while one is sent.
const FRAMES_QUEUED: usize = 2;

/// Messages of a list that wait for the network.
const LIST_MESSAGES_QUEUED: usize = 2;

/// How often an advance tells that it is at work.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(2);

/// What the service answers about itself.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Whether callers must log in.
    pub accounts: bool,
    /// Whether TLS is configured.
    pub tls: bool,
}

/// The donor's service.
#[derive(Debug, Clone)]
pub struct Api {
    leases: Arc<Leases>,
    pool: Arc<BufferPool>,
    identity: Identity,
    sent_bytes: Arc<AtomicU64>,
    caps: Arc<Caps>,
    kindness: Arc<Kindness>,
    places: Places,
    /// How long a caller may take nothing of what it has asked for.
    caller_timeout: Duration,
}

impl Api {
    /// Serves the snapshots of `leases`.
    #[must_use]
    pub fn new(
        leases: Arc<Leases>,
        identity: Identity,
        caps: Caps,
        caller_timeout: Duration,
    ) -> Self {
        let (sent_bytes, caps, kindness) = (Arc::default(), Arc::new(caps), Arc::default());
        let (pool, places) = (Arc::default(), Places::default());
        Self { leases, pool, identity, sent_bytes, caps, kindness, places, caller_timeout }
    }

    /// What is known of the server's commits.
    #[must_use]
    pub fn kindness(&self) -> Arc<Kindness> {
        Arc::clone(&self.kindness)
    }

    /// Where the messages of a call go.
    fn outbox<T>(
        &self,
        sender: mpsc::Sender<T>,
        extensions: &http::Extensions,
        held: &Held,
    ) -> Outbox<T> {
        let connection = access::connection(extensions);
        Outbox::new(sender, connection, self.caller_timeout).until(held.ended.clone())
    }

    /// What all clones together may take.
    #[must_use]
    pub fn caps(&self) -> Arc<Caps> {
        Arc::clone(&self.caps)
    }

    /// Payload bytes sent since the start.
    #[must_use]
    pub fn sent_bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.sent_bytes)
    }

    /// Starts a ReadRanges call; its frames arrive on the channel.
    pub fn start_reading(
        &self,
        extensions: &http::Extensions,
        request: pb::ReadRangesRequest,
    ) -> Result<mpsc::Receiver<Result<Frame, Failure>>, Failure> {
        let held = self.leases.find(&request.snapshot, &access::http_caller(extensions).into())?;
        let span = told_of(&held);
        let plan = ReadPlan::new(request)?;
        let places = self.places.read(&held)?;
        let (sender, receiver) = mpsc::channel(FRAMES_QUEUED);
        let outbox = Arc::new(self.outbox(sender, extensions, &held));
        let lend = lender(Arc::clone(&held), Arc::clone(&outbox));
        let snapshot = Arc::clone(&held.snapshot);
        let reader = ChunkReader::new(snapshot, Arc::clone(&self.pool), lend, plan);
        let begun = held.reads_ended();
        let is_enough = {
            let held = Arc::clone(&held);
            move || held.reads_ended() != begun
        };
        let reader = reader.until(Box::new(is_enough));
        let (sent_total, counts) = (Arc::clone(&self.sent_bytes), Arc::clone(self.leases.counts()));
        let caps = Arc::clone(&self.caps);
        tokio::task::spawn_blocking(move || {
            let _places = places;
            let mut raw_bytes = 0;
            let result = reader.run(&mut |frame| {
                if held.ended.is_cancelled() {
                    return Err(CallerGone);
                }
                held.note_use();
                if let Frame::Chunk(chunk, payload, covered) = &frame {
                    let bytes = payload.len() as u64;
                    let stops = || held.ended.is_cancelled() || outbox.is_closed();
                    caps.pass_blocking(chunk.raw_length.into(), bytes, stops);
                    held.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
                    sent_total.fetch_add(bytes, Ordering::Relaxed);
                    counts.raw_bytes.inc_by(chunk.raw_length.into());
                    raw_bytes += u64::from(chunk.raw_length);
                    held.note_taken(*covered);
                }
                outbox.send_blocking(Ok(frame))
            });
            set_number(&span, BYTES, raw_bytes);
            if result.is_err() && held.ended.is_cancelled() {
                let why = held.has_ended();
                // Whoever takes nothing more must not keep what it holds.
                drop(held);
                // The caller may have gone as well; then nobody is left to tell.
                drop(outbox.send_last_blocking(Err(why)));
            }
        });
        Ok(receiver)
    }

    fn held<T>(&self, request: &Request<T>, name: &str) -> Result<Arc<Held>, Failure> {
        self.leases.find(name, &caller(request)).inspect(|held| drop(told_of(held)))
    }
}

/// The call's span, which says whose snapshot it is about.
fn told_of(held: &Held) -> Span {
    let span = Span::current();
    span.set_attribute(SNAPSHOT, held.name.clone());
    span.set_attribute(CLONE, held.request.clone.clone());
    span
}

fn caller<T>(request: &Request<T>) -> Caller {
    access::caller(request).into()
}

impl From<access::Caller> for Caller {
    fn from(caller: access::Caller) -> Self {
        let access::Caller { user, snapshot, peer, connection, has_logged_in } = caller;
        Self { user, snapshot, peer, connection, has_logged_in }
    }
}

type MessageStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl DonorService for Api {
    async fn get_server_info(
        &self,
        _: Request<pb::GetServerInfoRequest>,
    ) -> Result<Response<pb::GetServerInfoResponse>, Status> {
        let place = self.places.facts()?;
        let engine = self.leases.engine();
        let directory = engine.data_directory();
        let identity = host::file_identity(directory)
            .map_err(|e| Failure::io("look at data directory", directory, &e))?;
        let describe = {
            let engine = Arc::clone(engine);
            move || {
                let _place = place;
                engine.describe()
            }
        };
        let server = tokio::task::spawn_blocking(describe)
            .await
            .map_err(|e| Failure::bug(format!("the engine stopped: {e}")))??;
        let authentication = if self.identity.accounts {
            pb::Authentication::Accounts
        } else {
            pb::Authentication::None
        };
        Ok(Response::new(pb::GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            engine: engine.name().to_owned(),
            os: host::OS.to_owned(),
            machine: std::env::consts::ARCH.to_owned(),
            capabilities: [BINLOG_BASE, BOUND_SNAPSHOTS, KNOWN_BLOCKS, END_READS, "zstd"]
                .map(str::to_owned)
                .into(),
            digest_algorithms: vec![pbc::DigestAlgorithm::Xxh3128.into()],
            chunk_bytes_max: chunk::CHUNK_BYTES_MAX,
            ranges_max: u32::try_from(chunk::RANGES_MAX).unwrap_or(u32::MAX),
            readers_max: u32::try_from(lease::READERS_MAX).unwrap_or(u32::MAX),
            host_id: Bytes::copy_from_slice(&host::host_id()),
            data_directory: host::path_bytes(directory),
            data_directory_device: identity.0,
            data_directory_inode: identity.1,
            authentication: authentication.into(),
            tls: self.identity.tls,
            lease_duration_max: Some(time::duration_to_wire(LEASE_MAX)),
            ..server_info(server)
        }))
    }

    async fn open_snapshot(
        &self,
        request: Request<pb::OpenSnapshotRequest>,
    ) -> Result<Response<pb::OpenSnapshotResponse>, Status> {
        let caller = caller(&request);
        if let Some(snapshot) = &caller.snapshot {
            let text = format!(
                "this connection has logged in by the key of {snapshot}; a new one \
                                needs the account's password"
            );
            let failure = Failure::new(Code::PermissionDenied, "KEY_LOG_IN", text);
            return Err(failure.mysql(1045).into());
        }
        let open = open_request(request.into_inner(), caller)?;
        let held = self.leases.open(open).await?;
        told_of(&held);
        let position = held.snapshot.position();
        let estimate = held.snapshot.totals(position)?;
        Ok(Response::new(pb::OpenSnapshotResponse {
            snapshot: held.name.clone(),
            lease_expire_time: Some(time::timestamp(held.expire_time())),
            stage: position.stage.to_wire().into(),
            round: position.round,
            estimate: Some(totals_to_wire(estimate)),
            left_out: held.snapshot.left_out().into_iter().collect(),
            storage_engines: held.snapshot.storage_engines(),
        }))
    }

    async fn list_snapshots(
        &self,
        _: Request<pb::ListSnapshotsRequest>,
    ) -> Result<Response<pb::ListSnapshotsResponse>, Status> {
        // All of them fit in one page: there are at most `--snapshots-max`.
        let snapshots = self.leases.all().iter().map(|held| describe(held)).collect();
        Ok(Response::new(pb::ListSnapshotsResponse { snapshots, next_page_token: String::new() }))
    }

    type ListFilesStream = MessageStream<pb::ListFilesResponse>;

    async fn list_files(
        &self,
        request: Request<pb::ListFilesRequest>,
    ) -> Result<Response<Self::ListFilesStream>, Status> {
        let held = self.held(&request, &request.get_ref().snapshot)?;
        let (sender, receiver) = mpsc::channel(LIST_MESSAGES_QUEUED);
        let outbox = self.outbox(sender, request.extensions(), &held);
        let request = request.into_inner();
        let position = wire::position(request.stage, request.round)?;
        let places = self.places.walk(&held.lists, "ListFiles")?;
        tokio::task::spawn_blocking(move || {
            let _places = places;
            let listed = list(&held, position, request.start_number, &outbox);
            drop(held);
            if let Err(failure) = listed {
                drop(outbox.send_last_blocking(Err(failure.to_status())));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type ReadRangesStream = MessageStream<pb::ReadRangesResponse>;

    /// Never called: `body::ZeroCopyService` serves this method.
    async fn read_ranges(
        &self,
        _: Request<pb::ReadRangesRequest>,
    ) -> Result<Response<Self::ReadRangesStream>, Status> {
        Err(Failure::bug("ReadRanges reached the generated service").into())
    }

    type HashRangesStream = MessageStream<pb::HashRangesResponse>;

    async fn hash_ranges(
        &self,
        _: Request<pb::HashRangesRequest>,
    ) -> Result<Response<Self::HashRangesStream>, Status> {
        Err(Failure::unimplemented("HashRanges").into())
    }

    type AdvanceStageStream = MessageStream<pb::AdvanceStageResponse>;

    async fn advance_stage(
        &self,
        request: Request<pb::AdvanceStageRequest>,
    ) -> Result<Response<Self::AdvanceStageStream>, Status> {
        let held = self.held(&request, &request.get_ref().snapshot)?;
        let (sender, receiver) = mpsc::channel(1);
        let outbox = self.outbox(sender, request.extensions(), &held);
        let request = request.into_inner();
        let position = wire::position(request.stage, request.round)?;
        let places = self.places.walk(&held.advances, "AdvanceStage")?;
        let work = async move {
            let _places = places;
            let answer = advance(&held, position, &outbox).await;
            drop(held);
            drop(outbox.send_last(answer.map_err(|failure| failure.to_status())).await);
        };
        tokio::spawn(work.in_current_span());
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn renew_lease(
        &self,
        request: Request<pb::RenewLeaseRequest>,
    ) -> Result<Response<pb::RenewLeaseResponse>, Status> {
        let held = self.held(&request, &request.get_ref().snapshot)?;
        let pb::RenewLeaseRequest { lease_duration: lease, end_reads, .. } = request.into_inner();
        self.leases.renew(&held, lease.map(lease_duration).transpose()?);
        if end_reads {
            held.end_reads();
        }
        Ok(Response::new(pb::RenewLeaseResponse {
            lease_expire_time: Some(time::timestamp(held.expire_time())),
            held_back_reason: self.kindness.told().reason().unwrap_or_default(),
        }))
    }

    async fn close_snapshot(
        &self,
        request: Request<pb::CloseSnapshotRequest>,
    ) -> Result<Response<pb::CloseSnapshotResponse>, Status> {
        let why = match pb::Outcome::try_from(request.get_ref().outcome) {
            Ok(pb::Outcome::Completed) => Ending::Completed,
            Ok(pb::Outcome::Failed) => Ending::Failed,
            Ok(pb::Outcome::Cancelled) => Ending::Cancelled,
            _ => {
                let value = request.get_ref().outcome;
                let text = format!("outcome {value} is not known");
                return Err(Failure::invalid("BAD_OUTCOME", text).into());
            }
        };
        // A snapshot that is gone is what the caller wants.
        if let Ok(held) = self.held(&request, &request.get_ref().snapshot) {
            self.leases.close(&held.name, why);
        }
        Ok(Response::new(pb::CloseSnapshotResponse {}))
    }
}

/// What the database server says of itself.
fn server_info(server: ServerFacts) -> pb::GetServerInfoResponse {
    let text = |name: &str| server.variable(name).to_owned();
    let plugins = server.plugins.clone().unwrap_or_default();
    pb::GetServerInfoResponse {
        server_version: text("version"),
        page_size_bytes: server.variable("innodb_page_size").parse().unwrap_or(0),
        character_set_server: text("character_set_server"),
        collation_server: text("collation_server"),
        collations: server.collations.clone().unwrap_or_default(),
        plugins: plugins.iter().map(|plugin| plugin.name.clone()).collect(),
        server_plugins: plugins
            .into_iter()
            .map(|plugin| pb::ServerPlugin {
                name: plugin.name,
                r#type: plugin.kind,
                library: plugin.library,
            })
            .collect(),
        encryption: server.encryption.clone().map(|encryption| pb::Encryption {
            tablespaces: encryption.tablespaces,
            key_ids: encryption.key_ids,
            redo_log: encryption.redo_log,
        }),
        undo_files: server.undo_files.clone().unwrap_or_default(),
        variables: server.variables.into_iter().collect(),
        ..pb::GetServerInfoResponse::default()
    }
}

fn open_request(message: pb::OpenSnapshotRequest, caller: Caller) -> Result<OpenRequest, Failure> {
    let public_key = <[u8; 32]>::try_from(&message.public_key[..]).map_err(|_| {
        let length = message.public_key.len();
        Failure::invalid("BAD_KEY", format!("public_key has {length} bytes, an Ed25519 key has 32"))
    })?;
    let lease = message.lease_duration.map(lease_duration).transpose()?.unwrap_or(LEASE_DEFAULT);
    for (name, value, most) in
        [("request_id", &message.request_id, 128), ("clone", &message.clone, 256)]
    {
        if value.len() > most || value.chars().any(char::is_control) {
            let text = format!(
                "{name} has {} bytes or a control character, at most {most} bytes \
                                of text are allowed",
                value.len()
            );
            return Err(Failure::invalid("BAD_REQUEST_ID", text));
        }
    }
    let ddl_timeout = message.ddl_timeout.map(time::duration_from_wire).transpose()?;
    let queue_wait = message.queue_wait.map(time::duration_from_wire).transpose()?;
    let queue_wait = queue_wait.unwrap_or_default();
    if queue_wait > WAIT_MAX {
        let text = format!("queue_wait of {queue_wait:?}; 0 to {WAIT_MAX:?} are allowed");
        return Err(Failure::invalid("BAD_QUEUE_WAIT", text));
    }
    let binlog_base = Some(message.binlog_base).filter(|base| !base.is_empty());
    if let Some(base) = binlog_base.as_deref().filter(|base| !binlog::is_base(base)) {
        let text = format!(
            "binlog_base is `{}`; a name without a directory, of at most {} bytes, is allowed",
            base.chars().take(40).collect::<String>().escape_debug(),
            binlog::BASE_BYTES_MAX
        );
        return Err(Failure::invalid("BAD_BINLOG_BASE", text));
    }
    Ok(OpenRequest {
        public_key,
        lease,
        request_id: message.request_id,
        clone: message.clone,
        // Who has logged in once can do so again: nothing is asked of it that it cannot do.
        bound: message.bound || caller.has_logged_in,
        caller,
        queue_wait,
        options: SnapshotOptions {
            block_ddl: message.block_ddl,
            ddl_timeout,
            binlog_base,
            ..SnapshotOptions::default()
        },
    })
}

fn lease_duration(duration: prost_types::Duration) -> Result<Duration, Failure> {
    let lease = time::duration_from_wire(duration)?;
    if !(LEASE_MIN..=LEASE_MAX).contains(&lease) {
        return Err(Failure::invalid(
            "BAD_LEASE",
            format!("lease of {lease:?}; {LEASE_MIN:?} to {LEASE_MAX:?} are allowed"),
        ));
    }
    Ok(lease)
}

fn describe(held: &Held) -> pb::Snapshot {
    let position = held.snapshot.position();
    pb::Snapshot {
        name: held.name.clone(),
        clone: held.request.clone.clone(),
        user: held.request.caller.user.clone().unwrap_or_default(),
        peer: held.request.caller.peer.map(|p| p.to_string()).unwrap_or_default(),
        create_time: Some(time::timestamp(held.create_time)),
        lease_expire_time: Some(time::timestamp(held.expire_time())),
        stage: position.stage.to_wire().into(),
        round: position.round,
        sent_bytes: held.sent_bytes.load(Ordering::Relaxed),
        blocks_ddl: held.snapshot.blocks_ddl(),
        read_deadline: Some(time::timestamp(held.read_deadline())),
    }
}

/// Sends a list in messages of bounded size; returns early when the caller has gone.
fn list(
    held: &Held,
    position: marcot_common::position::Position,
    start: u64,
    outbox: &Outbox<Result<pb::ListFilesResponse, Status>>,
) -> Result<(), Failure> {
    let totals = held.snapshot.totals(position)?;
    let mut message = pb::ListFilesResponse::default();
    let mut entries = Vec::new();
    let mut bytes = 0;
    for entry in held.snapshot.list(position, start)? {
        let entry = entry?;
        let encoded = entry_to_wire(&entry);
        bytes += encoded.encoded_len() + 8;
        message.entries.push(encoded);
        entries.push(entry);
        if bytes >= chunk::LIST_MESSAGE_BYTES {
            bytes = 0;
            message.entries_crc32c = Some(checksum::of_entries(&entries));
            entries.clear();
            held.note_taken(message.encoded_len() as u64);
            let sent = match held.ended.is_cancelled() {
                true => Err(CallerGone),
                false => outbox.send_blocking(Ok(std::mem::take(&mut message))),
            };
            if sent.is_err() {
                return if held.ended.is_cancelled() { Err(held.has_ended()) } else { Ok(()) };
            }
        }
    }
    message.entries_crc32c = Some(checksum::of_entries(&entries));
    message.end = Some(pb::ListEnd { totals: Some(totals_to_wire(totals)), growing: false });
    drop(outbox.send_blocking(Ok(message)));
    Ok(())
}

/// Runs an advance on a thread of its own and tells of its progress meanwhile.
async fn advance(
    held: &Arc<Held>,
    from: marcot_common::position::Position,
    outbox: &Outbox<Result<pb::AdvanceStageResponse, Status>>,
) -> Result<pb::AdvanceStageResponse, Failure> {
    let _one_at_a_time = held.advance.lock().await;
    let _at_work = held.begin_work()?;
    let entries = Arc::new(AtomicU64::new(0));
    let gone = CancellationToken::new();
    let _stops_the_work = gone.clone().drop_guard();
    let work = tokio::task::spawn_blocking({
        let (held, entries, gone) = (Arc::clone(held), Arc::clone(&entries), gone.clone());
        move || {
            held.snapshot.advance(from, &mut |count| {
                entries.store(count, Ordering::Relaxed);
                if gone.is_cancelled() || held.ended.is_cancelled() {
                    return Err(held.has_ended());
                }
                Ok(())
            })
        }
    });
    tokio::pin!(work);
    let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
    let advanced = loop {
        tokio::select! {
            result = &mut work => {
                break result.map_err(|e| Failure::bug(format!("the engine stopped: {e}")))??;
            }
            () = outbox.closed(), if !gone.is_cancelled() => gone.cancel(),
            _ = tick.tick() => {
                let progress = pb::AdvanceProgress {
                    activity: "compare the data directory with its list".to_owned(),
                    entries: entries.load(Ordering::Relaxed),
                };
                let step = pb::advance_stage_response::Step::Progress(progress);
                held.note_use();
                outbox.offer(Ok(pb::AdvanceStageResponse { step: Some(step) }));
            }
        }
    };
    let mut message = pb::Advanced {
        stage: advanced.position.stage.to_wire().into(),
        round: advanced.position.round,
        totals: Some(totals_to_wire(advanced.totals)),
        consistency_level: advanced.consistency_level.into(),
        coordinates: advanced.coordinates,
        root: advanced.root.as_ref().map(attributes_to_wire),
        crc32c: None,
    };
    message.crc32c = Some(checksum::of_advanced(&message, advanced.root.as_ref()));
    let step = pb::advance_stage_response::Step::Advanced(message);
    Ok(pb::AdvanceStageResponse { step: Some(step) })
}
