//! A stream from a donor: its own connection, ReadRanges calls, checked bytes into staging.

use std::{sync::Arc, time::Instant};

use bytes::{BufMut as _, Bytes, BytesMut};
use marcot_common::{failure::Failure, telemetry::propagation::inject};
use marcot_proto::{common::v1 as pbc, donor::v1 as pb};
use prost::Message as _;
use tokio::task::JoinHandle;
use tonic::{body::Body, transport::Channel};
use tower::{Service as _, ServiceExt as _};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::{
    FOLLOW_BYTES, FOLLOW_PAUSE, FetchContext, Seat,
    compression::{Chooser, Compression},
    decode::{CheckedChunk, FrameReader, ReadFrame, check_chunk, take_pieces},
    stopped,
};
use crate::{
    donor_client::Link,
    growing::GrowingWriter,
    plan::Unit,
    retry::Patience,
    reuse::{BLOCK_BYTES, Known, Reuse},
    writer::{ChunkSink, UnitWriter, known_of},
};

/// Calls in a row that may end without a byte; a donor that is merely draining sends some.
const EMPTY_CALLS_MAX: u32 = 3;

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
    let mut patience = context.patience();
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
            let read = read_call(link, &request, context, &mut writer).await;
            let written = writer.finish(&context.growing, context.journal.as_deref())?;
            if read.is_ok() || written > 0 {
                patience.progress();
            }
            if let Err(failure) = read {
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
    let Some(reuse) = context.reuse.as_ref().filter(|_| options.known_blocks) else {
        while let Some(unit) = context.next_unit(seat)? {
            let writer = UnitWriter::new(&context.staging, &context.progress, &unit);
            let writer = writer.with_disk(disk.as_mut());
            copy_unit(link, options, context, &mut chooser, &unit, writer).await?;
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
        copy_unit(link, options, context, &mut chooser, &unit, writer).await?;
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

/// What a call that was cut has written stays; the next one goes on after it.
async fn copy_unit(
    link: &mut Link,
    options: &ReadOptions,
    context: &FetchContext,
    chooser: &mut Chooser,
    unit: &Unit,
    writer: UnitWriter<'_>,
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
        let read = read_call(link, &request, context, &mut writer).await;
        let after = writer.awaited()?.map(|(_, offset)| offset);
        let moved = after.is_none_or(|offset| (writer.index(), offset) != before);
        if moved {
            empty_calls = 0;
            patience.progress();
        }
        match read {
            Ok(()) if moved => {}
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
    writer: &mut dyn ChunkSink,
) -> Result<(), Failure> {
    let read = async {
        let channel = link.channel().await?;
        let mut frames = FrameReader::new(call(channel, request).await?, context.stall_timeout)?;
        let read = read_frames(&mut frames, context, writer).await;
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

/// All frames of a call, to its end frame and status.
async fn read_frames(
    frames: &mut FrameReader,
    context: &FetchContext,
    writer: &mut dyn ChunkSink,
) -> Result<(), Failure> {
    let mut end: Option<pb::ReadEnd> = None;
    let (mut raw_bytes, mut failed) = (0, 0);
    loop {
        // A paused clone reads nothing: the donor waits, and nothing is sent twice.
        context.gate.pass().await;
        let Some(frame) = frames.next().await? else { break };
        if end.is_some() {
            return Err(Failure::peer_misbehaved("ReadRanges: a frame came after the end"));
        }
        let mut written = 0;
        match frame {
            ReadFrame::Chunk(header, payload) => {
                let chunk = check_chunk(header, payload, context.position)?;
                written = write_chunk(chunk, writer)?;
                context.progress.verified_bytes.add(written);
                raw_bytes += written;
            }
            ReadFrame::Failure(failure) => {
                failed += 1;
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

fn write_chunk(mut chunk: CheckedChunk, writer: &mut dyn ChunkSink) -> Result<u64, Failure> {
    let mut bytes = 0;
    for extent in &chunk.extents {
        if extent.hole {
            writer.skip_hole(extent.file_id, extent.offset, extent.length)?;
        } else if extent.unchanged {
            writer.keep(extent.file_id, extent.offset, extent.length)?;
        } else {
            let pieces = take_pieces(&mut chunk.pieces, extent.length);
            writer.write(extent.file_id, extent.offset, extent.length, &pieces)?;
            bytes += extent.length;
        }
    }
    Ok(bytes)
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
    inject(&Span::current().context(), &mut traced);
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
