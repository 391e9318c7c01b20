//! A stream from a donor: its own connection, ReadRanges calls, checked bytes into staging.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use marcot_common::{failure::Failure, telemetry::propagation::inject_current};
use marcot_proto::{
    common::v1 as pbc,
    donor::v1::{self as pb, donor_service_client::DonorServiceClient},
};
use prost::Message as _;
use tokio::task::JoinHandle;
use tonic::{body::Body, transport::Channel};
use tower::{Service as _, ServiceExt as _};
use tracing::Instrument as _;

use super::{
    FOLLOW_BYTES, FOLLOW_PAUSE, FetchContext, Seat,
    compression::{Chooser, Compression},
    decode::{CheckedChunk, FrameReader, ReadFrame, check_chunk, take_pieces},
    end_batch, stopped,
};
use crate::{
    donor_client::Link,
    growing::GrowingWriter,
    plan::Unit,
    retry::Patience,
    reuse::{BLOCK_BYTES, Known, Reuse},
    stall::{Pulse, RANGE_BYTES},
    writer::{ChunkSink, UnitWriter, clear, known_of},
};

/// Calls in a row that may end without a byte; a donor that is merely draining sends some.
const EMPTY_CALLS_MAX: u32 = 3;

/// Longest wait for the donor to take note of a pause: it needs no work.
const PAUSE_ANSWER_MAX: Duration = Duration::from_secs(30);

/// What a stream asks its donor for.
#[derive(Debug, Clone)]
pub struct ReadOptions {
    /// `snapshots/{id}`.
    pub snapshot: String,
    /// How chunks are compressed.
    pub compression: Compression,
    /// Whether the donor compares blocks with digests of what is here.
    pub known_blocks: bool,
}

impl ReadOptions {
    /// A request for ranges; `level` of zstd, if chunks may be compressed.
    fn request(
        &self,
        context: &FetchContext,
        ranges: Vec<pb::Range>,
        level: Option<i32>,
    ) -> pb::ReadRangesRequest {
        pb::ReadRangesRequest {
            snapshot: self.snapshot.clone(),
            stage: context.position.stage.to_wire().into(),
            round: context.position.round,
            ranges,
            codecs: match level {
                Some(_) => vec![pbc::Codec::None.into(), pbc::Codec::Zstd.into()],
                None => vec![pbc::Codec::None.into()],
            },
            compression_level: level.unwrap_or(0),
            known_block_bytes: if self.known_blocks { BLOCK_BYTES } else { 0 },
            ..pb::ReadRangesRequest::default()
        }
    }
}

/// Reads files that grow until all else of the round is copied.
pub async fn follow(
    link: &mut Link,
    options: &ReadOptions,
    context: &FetchContext,
) -> Result<(), Failure> {
    let (mut patience, mut pulse) = (context.patience(), Pulse::new(context.stall_timeout));
    // Redo comes as fast as it is written; what is tried out on files is not tried again here.
    let level = Chooser::new(options.compression).level();
    loop {
        let is_last = context.copied.is_cancelled();
        let mut bytes = 0;
        for file in context.growing.growing() {
            let (file_id, offset) = (file.file_id.0, file.durable);
            let length = FOLLOW_BYTES;
            let request = options.request(context, vec![range(file_id, offset, length)], level);
            let (staging, progress) = (&context.staging, &context.progress);
            let mut writer =
                GrowingWriter::open(staging, progress, &context.growing, file, length)?;
            let span = context.batch_span(&options.snapshot, file_id, offset, 1);
            let read = read_call(link, &request, context, &mut pulse, &mut writer);
            let read = read.instrument(span.clone()).await;
            let written = writer.finish(&context.growing, context.journal.as_deref())?;
            end_batch(&span, written, &read);
            if written > 0 {
                patience.right();
            }
            if read.is_ok() {
                // All that was there has come, be it nothing.
                pulse.moved();
            }
            // Redo that flows says nothing of the copy: streams that stand still must not be waited for as
            // long as the server writes.
            if pulse.take_moved() {
                patience.answered();
            }
            if let Err(failure) = read {
                if is_last && failure.reason == "STAGE_PASSED" {
                    // All else is here, and the last list has the rest.
                    return Ok(());
                }
                pause_after(failure, &mut patience, link, context).await?;
            }
            bytes += written;
        }
        if is_last {
            return Ok(());
        }
        if bytes < FOLLOW_BYTES {
            tokio::select! {
                () = tokio::time::sleep(FOLLOW_PAUSE) => {}
                () = context.copied.cancelled() => {}
                () = context.stop.cancelled() => return Err(stopped()),
            }
        }
    }
}

/// Copies units until the plan has no more. Where there is something to compare, the next unit is
/// hashed on another thread while this one receives the present one.
pub async fn copy_units(
    link: &mut Link,
    options: &ReadOptions,
    context: &FetchContext,
    seat: Seat,
) -> Result<(), Failure> {
    let mut disk = FetchContext::disk();
    let mut chooser = Chooser::new(options.compression);
    let mut pulse = Pulse::new(context.stall_timeout);
    let Some(reuse) = context.reuse.as_ref().filter(|_| options.known_blocks) else {
        while let Some(unit) = context.next_unit(seat)? {
            if context.reuse.is_some() {
                // This donor compares nothing, so nothing that is staged is known to be right.
                clear(&context.staging, &unit)?;
            }
            let writer = UnitWriter::new(&context.staging, &context.progress, &unit);
            let writer = writer.with_disk(disk.as_mut());
            let state = (&mut chooser, &mut pulse);
            copy_batch(link, options, context, state, &unit, writer).await?;
        }
        return Ok(());
    };
    let mut next = hash_next(context, reuse, seat)?;
    while let Some(hashing) = next {
        let hashed = hashing.await;
        let (unit, known) =
            hashed.unwrap_or_else(|e| Err(Failure::bug(format!("hashing stopped: {e}"))))?;
        next = hash_next(context, reuse, seat)?;
        let writer = UnitWriter::new(&context.staging, &context.progress, &unit);
        let writer = writer.with_disk(disk.as_mut()).with_known(known);
        let state = (&mut chooser, &mut pulse);
        copy_batch(link, options, context, state, &unit, writer).await?;
    }
    Ok(())
}

/// A unit, and what is staged of its parts.
type Hashed = (Unit, Vec<Known>);

/// Begins to hash what is staged of the plan's next unit. The stream's runtime waits for it: nothing is
/// written to staging after the stream's end.
fn hash_next(
    context: &FetchContext,
    reuse: &Arc<Reuse>,
    seat: Seat,
) -> Result<Option<JoinHandle<Result<Hashed, Failure>>>, Failure> {
    let Some(unit) = context.next_unit(seat)? else { return Ok(None) };
    let (staging, reuse) = (Arc::clone(&context.staging), Arc::clone(reuse));
    Ok(Some(tokio::task::spawn_blocking(move || {
        let known = known_of(&staging, &unit, &reuse)?;
        Ok((unit, known))
    })))
}

/// Copies a unit, in a span of its own.
async fn copy_batch(
    link: &mut Link,
    options: &ReadOptions,
    context: &FetchContext,
    state: (&mut Chooser, &mut Pulse),
    unit: &Unit,
    writer: UnitWriter<'_>,
) -> Result<(), Failure> {
    let (span, mut bytes) = (context.unit_span(&options.snapshot, unit), 0);
    let copy = Box::pin(copy_unit(link, options, context, state, unit, writer, &mut bytes));
    let result = copy.instrument(span.clone()).await;
    end_batch(&span, bytes, &result);
    result
}

/// What a call that was cut has written stays; the next one goes on after it.
async fn copy_unit(
    link: &mut Link,
    options: &ReadOptions,
    context: &FetchContext,
    (chooser, pulse): (&mut Chooser, &mut Pulse),
    unit: &Unit,
    writer: UnitWriter<'_>,
    bytes: &mut u64,
) -> Result<(), Failure> {
    let mut writer = writer.with_digests(context.journal.is_some());
    let mut patience = context.patience();
    let mut empty_calls = 0;
    let (begin, level) = (Instant::now(), chooser.level());
    while let Some((part, offset)) = writer.awaited()? {
        let first = writer.index();
        let mut ranges = vec![range(part.file_id.0, offset, part.offset + part.length - offset)];
        ranges[0].known_digests = writer.known(first, offset);
        for (index, part) in unit.parts.iter().enumerate().skip(first + 1) {
            if part.length > 0 {
                let known_digests = writer.known(index, part.offset);
                let range = range(part.file_id.0, part.offset, part.length);
                ranges.push(pb::Range { known_digests, ..range });
            }
        }
        let request = options.request(context, ranges, level);
        let before = (writer.index(), offset);
        let read = read_call(link, &request, context, pulse, &mut writer).await;
        *bytes = writer.data_bytes();
        let after = writer.awaited()?.map(|(_, offset)| offset);
        let moved = after.is_none_or(|offset| (writer.index(), offset) != before);
        if moved {
            empty_calls = 0;
            patience.right();
        }
        let parts = (writer.index() - first) as u64;
        pulse.came(parts.saturating_mul(RANGE_BYTES));
        if pulse.take_moved() {
            patience.progress();
        }
        match read {
            // A pause may have ended it before its first byte.
            Ok(()) if moved || !context.gate.is_open() => {}
            Ok(()) => {
                empty_calls += 1;
                if empty_calls >= EMPTY_CALLS_MAX {
                    return Err(Failure::peer_misbehaved(format!(
                        "{EMPTY_CALLS_MAX} ReadRanges calls in a row ended without a byte"
                    )));
                }
            }
            Err(failure) => pause_after(failure, &mut patience, link, context).await?,
        }
    }
    chooser.measured(writer.data_bytes(), begin.elapsed());
    context.finish(writer)
}

fn range(file_id: u64, offset: u64, length: u64) -> pb::Range {
    pb::Range { file_id, offset, length, known_digests: Bytes::new() }
}

/// Waits before the next try, on a new connection; fails when there is to be none.
async fn pause_after(
    failure: Failure,
    patience: &mut Patience<'_>,
    link: &mut Link,
    context: &FetchContext,
) -> Result<(), Failure> {
    let pause = patience.after(failure)?;
    link.drop_connection();
    let slept = context.stop.run_until_cancelled(tokio::time::sleep(pause)).await;
    slept.ok_or_else(stopped)
}

/// One ReadRanges call, until the clone is stopped.
async fn read_call(
    link: &mut Link,
    request: &pb::ReadRangesRequest,
    context: &FetchContext,
    pulse: &mut Pulse,
    writer: &mut dyn ChunkSink,
) -> Result<(), Failure> {
    let read = async {
        pass_gate(context).await;
        let ends_reads = link.ends_reads();
        let channel = link.channel().await?;
        let pause = if ends_reads { Pause::Ends(channel.clone()) } else { Pause::Waits };
        let answer = pulse.wait("ReadRanges", call(channel, request)).await??;
        let mut frames = FrameReader::new(answer, pulse)?;
        let read = read_frames(&mut frames, request, context, pause, writer).await;
        // What came of a chunk that was cut, or wrong, comes again.
        let left = frames.take_network_bytes();
        context.progress.network_bytes.add(left);
        if read.is_err() {
            context.progress.resent_bytes.add(left);
        }
        read
    };
    context.stop.run_until_cancelled(read).await.unwrap_or_else(|| Err(stopped()))
}

/// Waits while the clone is paused.
async fn pass_gate(context: &FetchContext) {
    context.gate.pass().await;
}

/// What a pause does to a call that runs.
enum Pause {
    /// An older donor waits until the rest is taken, for as long as its `--caller-timeout`.
    Waits,
    /// It is asked for its end over this connection.
    Ends(Channel),
    /// Its end was asked for: what is on its way is taken.
    Asked,
}

impl Pause {
    /// The clone is paused.
    async fn begin(self, context: &FetchContext, snapshot: &str) -> Self {
        match self {
            Self::Waits => {
                pass_gate(context).await;
                Self::Waits
            }
            Self::Ends(channel) => {
                // Beside the frames, which share its window. One that fails lets the call run to its end.
                tokio::spawn(end_reads(channel, snapshot.to_owned()).in_current_span());
                Self::Asked
            }
            Self::Asked => Self::Asked,
        }
    }
}

/// Has the donor end the snapshot's calls at their next chunk.
async fn end_reads(channel: Channel, snapshot: String) {
    let request = pb::RenewLeaseRequest { snapshot, end_reads: true, ..Default::default() };
    let mut client = DonorServiceClient::new(channel);
    match tokio::time::timeout(PAUSE_ANSWER_MAX, client.renew_lease(request)).await {
        Ok(Ok(_)) => {}
        Ok(Err(status)) => tracing::debug!(error = %status, "the donor knows of no pause"),
        Err(_) => tracing::debug!("the donor does not answer to a pause"),
    }
}

/// All frames of a call, to its end frame and status.
async fn read_frames(
    frames: &mut FrameReader<'_>,
    request: &pb::ReadRangesRequest,
    context: &FetchContext,
    mut pause: Pause,
    writer: &mut dyn ChunkSink,
) -> Result<(), Failure> {
    let mut end: Option<pb::ReadEnd> = None;
    let (mut raw_bytes, mut failed) = (0, 0);
    loop {
        // A paused clone asks for nothing more, and nothing is sent twice.
        if !context.gate.is_open() {
            pause = pause.begin(context, &request.snapshot).await;
        }
        let Some(frame) = frames.next().await? else { break };
        if end.is_some() {
            return Err(Failure::peer_misbehaved("ReadRanges: a frame came after the end"));
        }
        let mut written = 0;
        match frame {
            ReadFrame::Chunk(header, payload) => {
                let chunk = check_chunk(header, payload, context.position)?;
                let (data, covered) = write_chunk(chunk, writer)?;
                written = data;
                frames.came(covered);
                context.progress.verified_bytes.add(written);
                raw_bytes += written;
            }
            ReadFrame::Failure(failure) => {
                failed = check_failed(&failure, &request.ranges, failed)?;
                give_up(&failure, writer)?;
            }
            ReadFrame::End(frame) => end = Some(frame),
        }
        let received = frames.take_network_bytes();
        context.progress.network_bytes.add(received);
        // What is not read waits on the donor: its socket is full by then.
        context.limits.pass(written, received, &context.progress).await;
    }
    let Some(end) = end else {
        return Err(Failure::peer_misbehaved("ReadRanges: the stream ended without its end frame"));
    };
    if failed == 0 && end.raw_bytes != raw_bytes {
        return Err(Failure::peer_misbehaved(format!(
            "ReadRanges: {raw_bytes} bytes came, the end frame counts {}",
            end.raw_bytes
        )));
    }
    Ok(())
}

/// Writes a chunk; returns its bytes of data, and those that stand for none.
fn write_chunk(mut chunk: CheckedChunk, writer: &mut dyn ChunkSink) -> Result<(u64, u64), Failure> {
    let (mut bytes, mut covered) = (0, 0_u64);
    for extent in &chunk.extents {
        if extent.hole {
            writer.skip_hole(extent.file_id, extent.offset, extent.length)?;
            covered = covered.saturating_add(extent.length);
        } else if extent.unchanged {
            writer.keep(extent.file_id, extent.offset, extent.length)?;
            covered = covered.saturating_add(extent.length);
        } else {
            let pieces = take_pieces(&mut chunk.pieces, extent.length);
            writer.write(extent.file_id, extent.offset, extent.length, &pieces)?;
            bytes += extent.length;
        }
    }
    Ok((bytes, covered))
}

/// A range fails once, after those before it: else failures would be a stream without an end. Returns the
/// first range that may still fail.
fn check_failed(
    failure: &pb::RangeFailure,
    ranges: &[pb::Range],
    from: usize,
) -> Result<usize, Failure> {
    let index = usize::try_from(failure.range).unwrap_or(usize::MAX);
    match ranges.get(index) {
        Some(range) if index >= from && range.file_id == failure.file_id => Ok(index + 1),
        _ => Err(Failure::peer_misbehaved(format!(
            "ReadRanges: range {index} of file {} failed, where ranges {from} to {} were awaited",
            failure.file_id,
            ranges.len()
        ))),
    }
}

fn give_up(failure: &pb::RangeFailure, writer: &mut dyn ChunkSink) -> Result<(), Failure> {
    let why = failure.failure.as_ref().map(Failure::from_wire);
    let why = why.ok_or_else(|| Failure::peer_misbehaved("ReadRanges: a failure says nothing"))?;
    match why.reason.as_ref() {
        // The file is another one by now; the next round lists it again.
        "FILE_VANISHED" | "FILE_CHANGED" => writer.give_up(failure.file_id, why),
        _ => Err(why.from_donor()),
    }
}

/// Sends one ReadRanges request; the response's body is read as raw frames.
async fn call(
    channel: &mut Channel,
    message: &pb::ReadRangesRequest,
) -> Result<http::Response<Body>, Failure> {
    let mut bytes = BytesMut::with_capacity(5 + message.encoded_len());
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
    message.encode_raw(&mut bytes);
    let body = Body::new(http_body_util::Full::<Bytes>::new(bytes.freeze()));
    let mut request = http::Request::new(body);
    *request.method_mut() = http::Method::POST;
    *request.version_mut() = http::Version::HTTP_2;
    *request.uri_mut() =
        http::Uri::from_static("http://donor/marcot.donor.v1.DonorService/ReadRanges");
    let mut traced = tonic::metadata::MetadataMap::new();
    inject_current(&mut traced);
    let headers = request.headers_mut();
    headers.extend(traced.into_headers());
    headers.insert(http::header::TE, http::HeaderValue::from_static("trailers"));
    headers.insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/grpc"));
    let unreachable = |e: tonic::transport::Error| {
        let text = format!("ReadRanges: {}", marcot_common::failure::chain(&e));
        Failure::new(tonic::Code::Unavailable, "PEER_UNREACHABLE", text).mysql(2013).from_donor()
    };
    channel.ready().await.map_err(unreachable)?.call(request).await.map_err(unreachable)
}
