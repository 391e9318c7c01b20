//! A donor that is not Marcot's: honest with one small file, but for what a test spoils.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt as _};
use marcot_common::{
    failure::Failure,
    login::server::{LogInService, NoKeys},
};
use marcot_proto::{
    auth::v1::{
        LogInRequest, LogInResponse,
        auth_service_server::{AuthService, AuthServiceServer},
    },
    common::v1::{Codec, ConsistencyLevel, Stage},
    donor::v1::{
        AdvanceProgress, AdvanceStageRequest, AdvanceStageResponse, Advanced, Chunk,
        CloseSnapshotRequest, CloseSnapshotResponse, EntryChange, Extent, FileEntry, FileType,
        GetServerInfoRequest, GetServerInfoResponse, HashRangesRequest, HashRangesResponse,
        ListEnd, ListFilesRequest, ListFilesResponse, ListSnapshotsRequest, ListSnapshotsResponse,
        OpenSnapshotRequest, OpenSnapshotResponse, RangeFailure, ReadEnd, ReadRangesRequest,
        ReadRangesResponse, RenewLeaseRequest, RenewLeaseResponse, Totals, advance_stage_response,
        donor_service_server::{DonorService, DonorServiceServer},
        read_ranges_response::Frame,
    },
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// What the honest file holds.
pub const CONTENT: &[u8] = b"honest content";

/// A list, as a function of the round; it may be endless.
pub type ListEntries = dyn Fn(u32) -> Box<dyn Iterator<Item = FileEntry> + Send> + Send + Sync;

/// The frames of a ReadRanges call; they may be endless.
pub type ReadFrames = dyn Fn(&ReadRangesRequest) -> Frames + Send + Sync;

/// See `ReadFrames`.
pub type Frames = Box<dyn Iterator<Item = Frame> + Send>;

/// A call that a donor may leave unanswered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// LogIn.
    LogIn,
    /// GetServerInfo.
    Info,
    /// OpenSnapshot.
    Open,
    /// RenewLease.
    Renew,
    /// CloseSnapshot.
    Close,
    /// ListFiles.
    List,
    /// ReadRanges.
    Read,
    /// AdvanceStage.
    Advance,
}

/// What an advance answers, by its count from 0.
pub type Advance = dyn Fn(u32) -> (Stage, u32) + Send + Sync;

/// A donor's behaviour.
#[derive(Clone)]
pub struct Behaviour {
    /// Entries of each round.
    pub list: Arc<ListEntries>,
    /// Counts at the list's end; `None` for the right ones.
    pub totals: Option<Totals>,
    /// CRC-32C of each message of a list.
    pub entries_crc32c: Option<u32>,
    /// Answers to ReadRanges.
    pub read: Arc<ReadFrames>,
    /// Answers to AdvanceStage.
    pub advance: Arc<Advance>,
    /// Words of progress before each of them: how many, `beat` apart, and the entries that each tells.
    pub beats: (u64, fn(u64) -> u64),
    /// Between two of them.
    pub beat: Duration,
    /// Before each message of a list, and each frame.
    pub trickle: Duration,
    /// Entries of a list's message.
    pub page: usize,
    /// Empty messages before a list's first one.
    pub empty_messages: u64,
    /// What is never answered.
    pub silent: Option<Call>,
    /// What is said of the server, spoilt.
    pub info: fn(&mut GetServerInfoResponse),
    /// What is said of the snapshot, spoilt.
    pub opened: fn(&mut OpenSnapshotResponse),
}

/// Between two words of progress, unless a behaviour has another time.
pub const BEAT: Duration = Duration::from_millis(100);

/// Entries of a list's message, unless a behaviour has another count.
const PAGE: usize = 1000;

/// A regular file's entry.
#[must_use]
pub fn file(number: u64, path: &[u8], size: u64) -> FileEntry {
    FileEntry {
        number,
        file_id: number + 1,
        change: EntryChange::Add.into(),
        path: path.to_vec().into(),
        r#type: FileType::Regular.into(),
        size_bytes: size,
        allocated_bytes: size,
        mode: 0o640,
        ..FileEntry::default()
    }
}

/// A directory's entry.
#[must_use]
pub fn directory(number: u64, path: &[u8]) -> FileEntry {
    FileEntry { r#type: FileType::Directory.into(), mode: 0o750, ..file(number, path, 0) }
}

/// A symbolic link's entry.
#[must_use]
pub fn symlink(number: u64, path: &[u8], target: &[u8]) -> FileEntry {
    let link_target = target.to_vec().into();
    FileEntry { r#type: FileType::Symlink.into(), link_target, ..file(number, path, 0) }
}

/// The right chunk for one file's range.
#[must_use]
pub fn chunk(file_id: u64, offset: u64, content: &[u8]) -> Chunk {
    let length = content.len() as u64;
    Chunk {
        stage: Stage::FileCopy.into(),
        round: 1,
        codec: Codec::None.into(),
        raw_length: u32::try_from(length).expect("a small chunk"),
        crc32c: crc32c::crc32c(content),
        extents: vec![Extent { file_id, offset, length, hole: false, unchanged: false }],
        payload: content.to_vec().into(),
        ..Chunk::default()
    }
}

/// The right end after `bytes` of `ranges` ranges.
#[must_use]
pub fn end(ranges: u32, bytes: u64) -> Frame {
    Frame::End(ReadEnd {
        ranges_done: ranges,
        raw_bytes: bytes,
        payload_bytes: bytes,
        ..ReadEnd::default()
    })
}

/// A range that could not be read since its file is gone.
#[must_use]
pub fn failed(range: u32, file_id: u64) -> Frame {
    let why = Failure::new(tonic::Code::NotFound, "FILE_VANISHED", "it was here a moment ago");
    Frame::Failure(RangeFailure { range, file_id, failure: Some(why.to_wire()) })
}

impl Behaviour {
    /// Honest: one file, read rightly, and done.
    #[must_use]
    pub fn honest() -> Self {
        Self {
            list: Arc::new(|_| Box::new(std::iter::once(file(0, b"file", CONTENT.len() as u64)))),
            totals: None,
            entries_crc32c: None,
            read: Arc::new(|request| {
                let mut frames = Vec::new();
                let mut bytes = 0;
                for range in &request.ranges {
                    let from = usize::try_from(range.offset).unwrap_or(0).min(CONTENT.len());
                    let length = usize::try_from(range.length).unwrap_or(0);
                    let to = (from + length).min(CONTENT.len());
                    bytes += (to - from) as u64;
                    let chunk = chunk(range.file_id, range.offset, &CONTENT[from..to]);
                    frames.push(Frame::Chunk(Chunk { round: request.round, ..chunk }));
                }
                let ranges = u32::try_from(request.ranges.len()).unwrap_or(u32::MAX);
                frames.push(end(ranges, bytes));
                Box::new(frames.into_iter())
            }),
            advance: Arc::new(|_| (Stage::Done, 1)),
            beats: (0, |n| n),
            beat: BEAT,
            trickle: Duration::ZERO,
            page: PAGE,
            empty_messages: 0,
            silent: None,
            info: |_| {},
            opened: |_| {},
        }
    }

    /// With this list in every round.
    #[must_use]
    pub fn listing(entries: Vec<FileEntry>) -> Self {
        Self { list: Arc::new(move |_| Box::new(entries.clone().into_iter())), ..Self::honest() }
    }

    /// With these frames for every ReadRanges call.
    #[must_use]
    pub fn reading(frames: Vec<Frame>) -> Self {
        Self::reading_by(move |_| Box::new(frames.clone().into_iter()))
    }

    /// With the frames that a function of the request makes.
    #[must_use]
    pub fn reading_by(read: impl Fn(&ReadRangesRequest) -> Frames + Send + Sync + 'static) -> Self {
        Self { read: Arc::new(read), ..Self::honest() }
    }

    /// Waits for ever where this call is to go unanswered.
    async fn answers(&self, call: Call) {
        if self.silent == Some(call) {
            std::future::pending::<()>().await;
        }
    }

    /// Serves this behaviour in plaintext on loopback for as long as the runtime lives.
    pub async fn serve(self) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let (_, health) = tonic_health::server::health_reporter();
        let log_in: Option<LogInService> =
            (self.silent != Some(Call::LogIn)).then(|| LogInService::new(None, Arc::new(NoKeys)));
        let silent = log_in.is_none().then(|| AuthServiceServer::new(SilentLogIn));
        let donor = HostileDonor { behaviour: self, advances: Arc::default() };
        let server = Server::builder()
            .add_service(health)
            .add_optional_service(log_in.map(AuthServiceServer::new))
            .add_optional_service(silent)
            .add_service(DonorServiceServer::new(donor).max_encoding_message_size(64 << 20));
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        tokio::spawn(server.serve_with_incoming(incoming));
        address
    }
}

/// Takes log-ins, and says nothing.
struct SilentLogIn;

#[tonic::async_trait]
impl AuthService for SilentLogIn {
    type LogInStream = Messages<LogInResponse>;

    async fn log_in(
        &self,
        _: Request<Streaming<LogInRequest>>,
    ) -> Result<Response<Self::LogInStream>, Status> {
        std::future::pending().await
    }
}

struct HostileDonor {
    behaviour: Behaviour,
    advances: Arc<AtomicU32>,
}

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Messages, each after a pause.
fn trickled<T: Send + 'static>(
    messages: impl Iterator<Item = T> + Send + 'static,
    pause: Duration,
) -> Messages<T> {
    Box::pin(futures::stream::iter(messages).then(move |message| async move {
        wait(pause).await;
        Ok(message)
    }))
}

async fn wait(pause: Duration) {
    if !pause.is_zero() {
        tokio::time::sleep(pause).await;
    }
}

#[tonic::async_trait]
impl DonorService for HostileDonor {
    async fn get_server_info(
        &self,
        _: Request<GetServerInfoRequest>,
    ) -> Result<Response<GetServerInfoResponse>, Status> {
        self.behaviour.answers(Call::Info).await;
        let mut info = GetServerInfoResponse::default();
        (self.behaviour.info)(&mut info);
        Ok(Response::new(info))
    }

    async fn open_snapshot(
        &self,
        _: Request<OpenSnapshotRequest>,
    ) -> Result<Response<OpenSnapshotResponse>, Status> {
        self.behaviour.answers(Call::Open).await;
        let mut opened = OpenSnapshotResponse {
            snapshot: "snapshots/1".to_owned(),
            stage: Stage::FileCopy.into(),
            round: 1,
            ..OpenSnapshotResponse::default()
        };
        (self.behaviour.opened)(&mut opened);
        Ok(Response::new(opened))
    }

    async fn list_snapshots(
        &self,
        _: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        Ok(Response::new(ListSnapshotsResponse::default()))
    }

    type ListFilesStream = Messages<ListFilesResponse>;

    async fn list_files(
        &self,
        request: Request<ListFilesRequest>,
    ) -> Result<Response<Self::ListFilesStream>, Status> {
        self.behaviour.answers(Call::List).await;
        let mut entries = (self.behaviour.list)(request.get_ref().round);
        let (fixed, size) = (self.behaviour.totals, self.behaviour.page);
        let mut totals = Totals::default();
        let mut count = move |entry: &FileEntry| {
            totals.entries += 1;
            if entry.r#type() == FileType::Regular && entry.change() != EntryChange::Remove {
                totals.files += 1;
                totals.size_bytes = totals.size_bytes.wrapping_add(entry.size_bytes);
            }
            totals
        };
        let mut counted = Totals::default();
        // A call that was cut goes on where it was.
        for entry in entries.by_ref().take(request.get_ref().start_number as usize) {
            counted = count(&entry);
        }
        let mut ended = false;
        let mut empty = self.behaviour.empty_messages;
        let entries_crc32c = self.behaviour.entries_crc32c;
        let messages = std::iter::from_fn(move || {
            if empty > 0 {
                empty -= 1;
                return Some(ListFilesResponse::default());
            }
            if ended {
                return None;
            }
            let page: Vec<_> = entries.by_ref().take(size).collect();
            for entry in &page {
                counted = count(entry);
            }
            ended = page.len() < size;
            let end =
                ended.then(|| ListEnd { totals: Some(fixed.unwrap_or(counted)), growing: false });
            Some(ListFilesResponse { entries: page, end, entries_crc32c })
        });
        Ok(Response::new(trickled(messages, self.behaviour.trickle)))
    }

    type ReadRangesStream = Messages<ReadRangesResponse>;

    async fn read_ranges(
        &self,
        request: Request<ReadRangesRequest>,
    ) -> Result<Response<Self::ReadRangesStream>, Status> {
        self.behaviour.answers(Call::Read).await;
        let frames = (self.behaviour.read)(request.get_ref());
        let frames = frames.map(|frame| ReadRangesResponse { frame: Some(frame) });
        Ok(Response::new(trickled(frames, self.behaviour.trickle)))
    }

    type HashRangesStream = Messages<HashRangesResponse>;

    async fn hash_ranges(
        &self,
        _: Request<HashRangesRequest>,
    ) -> Result<Response<Self::HashRangesStream>, Status> {
        Err(Status::unimplemented("no digests"))
    }

    type AdvanceStageStream = Messages<AdvanceStageResponse>;

    async fn advance_stage(
        &self,
        _: Request<AdvanceStageRequest>,
    ) -> Result<Response<Self::AdvanceStageStream>, Status> {
        self.behaviour.answers(Call::Advance).await;
        let (stage, round) =
            (self.behaviour.advance)(self.advances.fetch_add(1, Ordering::Relaxed));
        let advanced = Advanced {
            stage: stage.into(),
            round,
            consistency_level: ConsistencyLevel::QuiescentFiles.into(),
            ..Advanced::default()
        };
        let step = Some(advance_stage_response::Step::Advanced(advanced));
        let end = futures::stream::iter([Ok(AdvanceStageResponse { step })]);
        let (count, entries) = self.behaviour.beats;
        let beat = self.behaviour.beat;
        let beats = futures::stream::iter(0..count).then(move |n| async move {
            wait(beat).await;
            let progress = AdvanceProgress { entries: entries(n), ..AdvanceProgress::default() };
            let step = Some(advance_stage_response::Step::Progress(progress));
            Ok(AdvanceStageResponse { step })
        });
        Ok(Response::new(Box::pin(beats.chain(end))))
    }

    async fn renew_lease(
        &self,
        _: Request<RenewLeaseRequest>,
    ) -> Result<Response<RenewLeaseResponse>, Status> {
        self.behaviour.answers(Call::Renew).await;
        Ok(Response::new(RenewLeaseResponse::default()))
    }

    async fn close_snapshot(
        &self,
        _: Request<CloseSnapshotRequest>,
    ) -> Result<Response<CloseSnapshotResponse>, Status> {
        self.behaviour.answers(Call::Close).await;
        Ok(Response::new(CloseSnapshotResponse {}))
    }
}
