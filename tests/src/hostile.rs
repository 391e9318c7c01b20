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
use marcot_common::login::server::{LogInService, NoKeys};
use marcot_proto::{
    auth::v1::auth_service_server::AuthServiceServer,
    common::v1::{Codec, ConsistencyLevel, Stage},
    donor::v1::{
        AdvanceProgress, AdvanceStageRequest, AdvanceStageResponse, Advanced, Chunk,
        CloseSnapshotRequest, CloseSnapshotResponse, EntryChange, Extent, FileEntry, FileType,
        GetServerInfoRequest, GetServerInfoResponse, HashRangesRequest, HashRangesResponse,
        ListEnd, ListFilesRequest, ListFilesResponse, ListSnapshotsRequest, ListSnapshotsResponse,
        OpenSnapshotRequest, OpenSnapshotResponse, ReadEnd, ReadRangesRequest, ReadRangesResponse,
        RenewLeaseRequest, RenewLeaseResponse, Totals, advance_stage_response,
        donor_service_server::{DonorService, DonorServiceServer},
        read_ranges_response::Frame,
    },
};
use tonic::{Request, Response, Status, transport::Server};

/// What the honest file holds.
pub const CONTENT: &[u8] = b"honest content";

/// A list, as a function of the round; it may be endless.
pub type ListEntries = dyn Fn(u32) -> Box<dyn Iterator<Item = FileEntry> + Send> + Send + Sync;

/// The frames of a ReadRanges call.
pub type ReadFrames = dyn Fn(&ReadRangesRequest) -> Vec<Frame> + Send + Sync;

/// What an advance answers, by its count from 0.
pub type Advance = dyn Fn(u32) -> (Stage, u32) + Send + Sync;

/// A donor's behaviour.
#[derive(Clone)]
pub struct Behaviour {
    /// Entries of each round.
    pub list: Arc<ListEntries>,
    /// Counts at the list's end; `None` for the right ones.
    pub totals: Option<Totals>,
    /// Answers to ReadRanges.
    pub read: Arc<ReadFrames>,
    /// Answers to AdvanceStage.
    pub advance: Arc<Advance>,
    /// Words of progress before each of them: how many, `BEAT` apart, and the entries that each tells.
    pub beats: (u64, fn(u64) -> u64),
}

/// Between two words of progress.
pub const BEAT: Duration = Duration::from_millis(100);

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

impl Behaviour {
    /// Honest: one file, read rightly, and done.
    #[must_use]
    pub fn honest() -> Self {
        Self {
            list: Arc::new(|_| Box::new(std::iter::once(file(0, b"file", CONTENT.len() as u64)))),
            totals: None,
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
                frames
            }),
            advance: Arc::new(|_| (Stage::Done, 1)),
            beats: (0, |n| n),
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
        Self { read: Arc::new(move |_| frames.clone()), ..Self::honest() }
    }

    /// Serves this behaviour in plaintext on loopback for as long as the runtime lives.
    pub async fn serve(self) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let (_, health) = tonic_health::server::health_reporter();
        let donor = HostileDonor { behaviour: self, advances: Arc::default() };
        let server = Server::builder()
            .add_service(health)
            .add_service(AuthServiceServer::new(LogInService::new(None, Arc::new(NoKeys))))
            .add_service(DonorServiceServer::new(donor).max_encoding_message_size(64 << 20));
        let incoming = tonic::transport::server::TcpIncoming::from(listener);
        tokio::spawn(server.serve_with_incoming(incoming));
        address
    }
}

struct HostileDonor {
    behaviour: Behaviour,
    advances: Arc<AtomicU32>,
}

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl DonorService for HostileDonor {
    async fn get_server_info(
        &self,
        _: Request<GetServerInfoRequest>,
    ) -> Result<Response<GetServerInfoResponse>, Status> {
        Ok(Response::new(GetServerInfoResponse::default()))
    }

    async fn open_snapshot(
        &self,
        _: Request<OpenSnapshotRequest>,
    ) -> Result<Response<OpenSnapshotResponse>, Status> {
        Ok(Response::new(OpenSnapshotResponse {
            snapshot: "snapshots/1".to_owned(),
            stage: Stage::FileCopy.into(),
            round: 1,
            ..OpenSnapshotResponse::default()
        }))
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
        let mut entries = (self.behaviour.list)(request.get_ref().round);
        let fixed = self.behaviour.totals;
        let mut totals = Totals::default();
        let mut ended = false;
        let messages = std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let page: Vec<_> = entries.by_ref().take(1000).collect();
            for entry in &page {
                totals.entries += 1;
                if entry.r#type() == FileType::Regular && entry.change() != EntryChange::Remove {
                    totals.files += 1;
                    totals.size_bytes = totals.size_bytes.wrapping_add(entry.size_bytes);
                }
            }
            ended = page.len() < 1000;
            let end =
                ended.then(|| ListEnd { totals: Some(fixed.unwrap_or(totals)), growing: false });
            Some(Ok(ListFilesResponse { entries: page, end, entries_crc32c: None }))
        });
        Ok(Response::new(Box::pin(futures::stream::iter(messages))))
    }

    type ReadRangesStream = Messages<ReadRangesResponse>;

    async fn read_ranges(
        &self,
        request: Request<ReadRangesRequest>,
    ) -> Result<Response<Self::ReadRangesStream>, Status> {
        let frames = (self.behaviour.read)(request.get_ref());
        let frames = frames.into_iter().map(|frame| Ok(ReadRangesResponse { frame: Some(frame) }));
        Ok(Response::new(Box::pin(futures::stream::iter(frames))))
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
        let beats = futures::stream::iter(0..count).then(move |n| async move {
            tokio::time::sleep(BEAT).await;
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
        Ok(Response::new(RenewLeaseResponse::default()))
    }

    async fn close_snapshot(
        &self,
        _: Request<CloseSnapshotRequest>,
    ) -> Result<Response<CloseSnapshotResponse>, Status> {
        Ok(Response::new(CloseSnapshotResponse {}))
    }
}
