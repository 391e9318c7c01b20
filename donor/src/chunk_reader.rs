//! Reads ranges of a snapshot into frames: positional read, checksum, compression.
//!
//! Invariants:
//! * Over all frames the extents cover the ranges in order, each byte once, until a range fails.
//! * At most one buffer is filled at a time; small files share it, a large range starts a new one.
//! * A buffer counts against what may be held for its snapshot until the last of its bytes has left.
//! * A call ends at its bound of bytes or time with a `ReadEnd` that says where to go on.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use marcot_common::{
    checksum,
    chunk::{
        BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, CALL_BYTES_MAX, CHUNK_BYTES, CHUNK_BYTES_MAX,
        CHUNK_BYTES_MIN, DIGEST_BYTES, EXTENTS_MAX, RANGES_MAX,
    },
    entry::FileId,
    failure::Failure,
    position::Position,
    wire,
};
use marcot_engine::{Content, FileReader, Snapshot};
use marcot_proto::{common::v1 as pbc, donor::v1 as pb};
use tokio::sync::OwnedSemaphorePermit;

/// Longest life of one call: shorter than the customary 60 s limit of proxies on one stream.
const CALL_DURATION_MAX: Duration = Duration::from_secs(45);

/// Data that does not shrink by this much is sent as it is: decoding it would cost more.
const SHRINK_NUMERATOR: usize = 15;
const SHRINK_DENOMINATOR: usize = 16;

/// A frame before it is encoded; a chunk's payload stays apart so that it is not copied.
#[derive(Debug)]
pub enum Frame {
    /// Bytes: the message without its payload, the payload, and how many bytes of files that do not grow
    /// it stands for.
    Chunk(pb::Chunk, Bytes, u64),
    /// A range that cannot be read.
    Failure(pb::RangeFailure),
    /// The last frame.
    End(pb::ReadEnd),
}

/// A checked ReadRanges request.
#[derive(Debug)]
pub struct ReadPlan {
    position: Position,
    ranges: Vec<pb::Range>,
    compression_level: Option<i32>,
    digest: bool,
    chunk_bytes: usize,
    bytes_max: u64,
    known_block_bytes: u64,
}

impl ReadPlan {
    /// Checks what came from the wire.
    pub fn new(request: pb::ReadRangesRequest) -> Result<Self, Failure> {
        let position = wire::position(request.stage, request.round)?;
        if request.ranges.is_empty() || request.ranges.len() > RANGES_MAX {
            return Err(Failure::invalid(
                "BAD_RANGE",
                format!("{} ranges asked for, 1 to {RANGES_MAX} are allowed", request.ranges.len()),
            ));
        }
        for range in &request.ranges {
            let end = range.offset.checked_add(range.length);
            if range.length == 0 || end.is_none_or(|end| i64::try_from(end).is_err()) {
                return Err(Failure::invalid(
                    "BAD_RANGE",
                    format!(
                        "range of file {} at offset {} has length {}",
                        range.file_id, range.offset, range.length
                    ),
                ));
            }
        }
        let chunk_bytes = match request.chunk_bytes {
            0 => CHUNK_BYTES,
            n if (CHUNK_BYTES_MIN..=CHUNK_BYTES_MAX).contains(&n) => n,
            n => {
                return Err(Failure::invalid(
                    "BAD_RANGE",
                    format!(
                        "chunk_bytes is {n}, {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX} are allowed"
                    ),
                ));
            }
        };
        let block = request.known_block_bytes;
        let is_block =
            block.is_power_of_two() && (BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block);
        let known = request.ranges.iter().find(|range| !range.known_digests.is_empty());
        if let Some(range) = known
            && (!is_block || !range.known_digests.len().is_multiple_of(DIGEST_BYTES))
        {
            return Err(Failure::invalid(
                "BAD_KNOWN_BLOCKS",
                format!(
                    "{} bytes of known digests for blocks of {block} bytes; digests have \
                     {DIGEST_BYTES} bytes, blocks a power of two from {BLOCK_BYTES_MIN} to \
                     {BLOCK_BYTES_MAX}",
                    range.known_digests.len()
                ),
            ));
        }
        let digest = match pbc::DigestAlgorithm::try_from(request.digest_algorithm) {
            Ok(pbc::DigestAlgorithm::Unspecified) => false,
            Ok(pbc::DigestAlgorithm::Xxh3128) => true,
            _ => {
                return Err(Failure::invalid(
                    "UNKNOWN_DIGEST",
                    format!("digest algorithm {} is not offered", request.digest_algorithm),
                ));
            }
        };
        let zstd = request.codecs.contains(&pbc::Codec::Zstd.into());
        if !(-7..=19).contains(&request.compression_level) {
            return Err(Failure::invalid(
                "BAD_COMPRESSION_LEVEL",
                format!("compression level is {}, -7 to 19 are allowed", request.compression_level),
            ));
        }
        let level = if request.compression_level == 0 { 1 } else { request.compression_level };
        Ok(Self {
            position,
            ranges: request.ranges,
            compression_level: zstd.then_some(level),
            digest,
            chunk_bytes: usize::try_from(chunk_bytes).unwrap_or(1 << 20),
            bytes_max: match request.bytes_max {
                0 => CALL_BYTES_MAX,
                n => n.min(CALL_BYTES_MAX),
            },
            known_block_bytes: block,
        })
    }
}

/// The caller has gone; nobody reads what would still be sent.
#[derive(Debug)]
pub struct CallerGone;

/// Waits until so many bytes may be held for the caller.
pub type Lend = Box<dyn Fn(usize) -> Result<Lent, CallerGone> + Send>;

/// Bytes that are held for a snapshot, and for its peer.
#[derive(Debug)]
pub struct Lent(pub [OwnedSemaphorePermit; 2]);

/// Reads one call's ranges.
pub struct ChunkReader {
    snapshot: Arc<dyn Snapshot>,
    pool: Arc<BufferPool>,
    lend: Lend,
    plan: ReadPlan,
    chunk: OpenChunk,
    end: pb::ReadEnd,
    /// Whether the caller asks for no more.
    is_enough: Box<dyn Fn() -> bool + Send>,
}

#[derive(Debug, Default)]
struct OpenChunk {
    buffer: Vec<u8>,
    lent: Option<Lent>,
    filled: usize,
    extents: Vec<pb::Extent>,
    /// Bytes of files that do not grow.
    covered: u64,
}

impl ChunkReader {
    /// Prepares a call; nothing is read yet.
    #[must_use]
    pub fn new(
        snapshot: Arc<dyn Snapshot>,
        pool: Arc<BufferPool>,
        lend: Lend,
        plan: ReadPlan,
    ) -> Self {
        Self {
            snapshot,
            pool,
            lend,
            plan,
            chunk: OpenChunk::default(),
            end: pb::ReadEnd::default(),
            is_enough: Box::new(|| false),
        }
    }

    /// Ends the call, as its bounds do, once the caller asks for no more.
    #[must_use]
    pub fn until(self, is_enough: Box<dyn Fn() -> bool + Send>) -> Self {
        Self { is_enough, ..self }
    }

    /// Reads all ranges up to the call's bounds and hands each frame to `emit`, which blocks while
    /// the caller is slow.
    pub fn run(
        mut self,
        emit: &mut dyn FnMut(Frame) -> Result<(), CallerGone>,
    ) -> Result<(), CallerGone> {
        let deadline = Instant::now() + CALL_DURATION_MAX;
        let ranges = std::mem::take(&mut self.plan.ranges);
        let mut open: Option<(u64, Box<dyn FileReader>)> = None;
        let mut stopped = false;
        for (index, range) in ranges.iter().enumerate() {
            if stopped {
                break;
            }
            let outcome = self.read_range(range, &mut open, deadline, emit)?;
            match outcome {
                Ok(Progress::Finished) => self.end.ranges_done += 1,
                Ok(Progress::Stopped { done }) => {
                    self.end.offset_done = done;
                    stopped = true;
                }
                Err(failure) => {
                    open = None;
                    self.flush(emit)?;
                    emit(Frame::Failure(pb::RangeFailure {
                        range: u32::try_from(index).unwrap_or(u32::MAX),
                        file_id: range.file_id,
                        failure: Some(failure.to_wire()),
                    }))?;
                    self.end.ranges_done += 1;
                }
            }
        }
        self.flush(emit)?;
        emit(Frame::End(self.end))
    }

    fn read_range(
        &mut self,
        range: &pb::Range,
        open: &mut Option<(u64, Box<dyn FileReader>)>,
        deadline: Instant,
        emit: &mut dyn FnMut(Frame) -> Result<(), CallerGone>,
    ) -> Result<Result<Progress, Failure>, CallerGone> {
        if open.as_ref().is_none_or(|(id, _)| *id != range.file_id) {
            match self.snapshot.open_file(self.plan.position, FileId(range.file_id)) {
                Ok(reader) => *open = Some((range.file_id, reader)),
                Err(failure) => return Ok(Err(failure)),
            }
        }
        let Some((_, reader)) = open.as_mut() else {
            return Ok(Err(Failure::bug("no file is open")));
        };
        let mut end = range.offset + range.length;
        if reader.is_growing() {
            // What is not there yet is asked for again.
            end = end.min(reader.size());
        }
        if end > reader.size() {
            let text = format!(
                "range of file {} ends at {end}, the file has {} bytes",
                range.file_id,
                reader.size()
            );
            return Ok(Err(Failure::new(tonic::Code::OutOfRange, "BAD_RANGE", text)));
        }
        // A large range starts on a buffer of its own, so that its writes stay aligned.
        if range.length >= self.plan.chunk_bytes as u64 {
            self.flush(emit)?;
        }
        let unit = reader.unit().max(1);
        let mut offset = range.offset;
        while offset < end {
            let may_stop = offset.is_multiple_of(unit);
            if may_stop && (self.sent_enough() || Instant::now() >= deadline || (self.is_enough)())
            {
                return Ok(Ok(Progress::Stopped { done: offset - range.offset }));
            }
            // What is read together goes into one buffer.
            let room = (self.plan.chunk_bytes - self.chunk.filled) as u64;
            if may_stop && unit > 1 && room < unit {
                self.flush(emit)?;
            }
            let read = match self.known_block(range, offset, end) {
                Some((digest, block_end)) => {
                    if self.chunk.filled as u64 + (block_end - offset)
                        > self.plan.chunk_bytes as u64
                    {
                        self.flush(emit)?;
                    }
                    self.read_block(range.file_id, reader.as_mut(), offset, block_end, digest)
                }
                None => self.read_some(range.file_id, reader.as_mut(), offset, end),
            };
            match read {
                Ok(next) => {
                    if !reader.is_growing() {
                        self.chunk.covered += next - offset;
                    }
                    offset = next;
                }
                Err(failure) => return Ok(Err(failure)),
            }
            if self.chunk.filled == self.plan.chunk_bytes || self.chunk.extents.len() >= EXTENTS_MAX
            {
                self.flush(emit)?;
            }
        }
        Ok(reader.check_unchanged().map(|()| Progress::Finished))
    }

    /// The digest that the caller has for the block at `offset`, and the block's end; `None` where
    /// no block begins.
    fn known_block<'r>(
        &self,
        range: &'r pb::Range,
        offset: u64,
        end: u64,
    ) -> Option<(&'r [u8], u64)> {
        let block = self.plan.known_block_bytes;
        if range.known_digests.is_empty() || !offset.is_multiple_of(block) {
            return None;
        }
        let first = range.offset.div_ceil(block);
        let at = usize::try_from(offset / block - first).ok()?.checked_mul(DIGEST_BYTES)?;
        let digest = range.known_digests.get(at..at + DIGEST_BYTES)?;
        Some((digest, (offset + block).min(end)))
    }

    /// Reads a block that the caller may have already; returns where to go on.
    fn read_block(
        &mut self,
        file_id: u64,
        reader: &mut dyn FileReader,
        offset: u64,
        block_end: u64,
        known: &[u8],
    ) -> Result<u64, Failure> {
        let span = reader.span(offset, block_end)?;
        // A hole costs nothing, and pages that an earlier round has given even less.
        if span.content != Content::Data || span.end < block_end {
            return self.read_some(file_id, reader, offset, block_end);
        }
        self.take_buffer()?;
        let length = block_end - offset;
        let room = &mut self.chunk.buffer[self.chunk.filled..];
        let Some(bytes) = usize::try_from(length).ok().and_then(|length| room.get_mut(..length))
        else {
            return self.read_some(file_id, reader, offset, block_end);
        };
        reader.read_exact_at(bytes, offset)?;
        let is_known = blake3::hash(bytes).as_bytes()[..DIGEST_BYTES] == *known;
        if !is_known {
            self.chunk.filled += bytes.len();
            self.end.raw_bytes += length;
        }
        self.add_extent(pb::Extent { file_id, offset, length, hole: false, unchanged: is_known });
        Ok(block_end)
    }

    /// Reads up to the end of the span or of the buffer; returns where to go on.
    fn read_some(
        &mut self,
        file_id: u64,
        reader: &mut dyn FileReader,
        offset: u64,
        end: u64,
    ) -> Result<u64, Failure> {
        let span = reader.span(offset, end)?;
        if span.end <= offset || span.end > end {
            return Err(Failure::bug(format!("span at {offset} ends at {}", span.end)));
        }
        let mut length = span.end - offset;
        if span.content != Content::Data {
            if span.content == Content::Hole {
                self.end.hole_bytes += length;
            }
        } else {
            self.take_buffer()?;
            let room = &mut self.chunk.buffer[self.chunk.filled..];
            length = length.min(room.len() as u64);
            let unit = reader.unit().max(1);
            if length < span.end - offset && length >= unit {
                length -= (offset + length) % unit;
            }
            let take = usize::try_from(length).unwrap_or(room.len());
            reader.read_exact_at(&mut room[..take], offset)?;
            self.chunk.filled += take;
            self.end.raw_bytes += length;
        }
        let (hole, unchanged) = (span.content == Content::Hole, span.content == Content::Unchanged);
        self.add_extent(pb::Extent { file_id, offset, length, hole, unchanged });
        Ok(offset + length)
    }

    /// Takes a buffer, unless there is one.
    fn take_buffer(&mut self) -> Result<(), Failure> {
        if self.chunk.buffer.is_empty() {
            let gone =
                |_| Failure::new(tonic::Code::Cancelled, "CALLER_GONE", "the caller has gone");
            self.chunk.lent = Some((self.lend)(self.plan.chunk_bytes).map_err(gone)?);
            self.chunk.buffer = self.pool.take(self.plan.chunk_bytes);
        }
        Ok(())
    }

    fn add_extent(&mut self, extent: pb::Extent) {
        match self.chunk.extents.last_mut() {
            Some(last)
                if last.file_id == extent.file_id
                    && last.hole == extent.hole
                    && last.unchanged == extent.unchanged
                    && last.offset + last.length == extent.offset =>
            {
                last.length += extent.length;
            }
            _ => self.chunk.extents.push(extent),
        }
    }

    fn sent_enough(&self) -> bool {
        self.end.raw_bytes >= self.plan.bytes_max
    }

    /// Sends what the buffer holds.
    fn flush(
        &mut self,
        emit: &mut dyn FnMut(Frame) -> Result<(), CallerGone>,
    ) -> Result<(), CallerGone> {
        let chunk = std::mem::take(&mut self.chunk);
        if chunk.extents.is_empty() {
            self.pool.give_back(chunk.buffer);
            return Ok(());
        }
        let raw = &chunk.buffer[..chunk.filled];
        let crc32c = crc32c::crc32c(raw);
        let digest = if self.plan.digest {
            Bytes::copy_from_slice(&xxhash_rust::xxh3::xxh3_128(raw).to_be_bytes())
        } else {
            Bytes::new()
        };
        let compressed = self.plan.compression_level.and_then(|level| {
            zstd::bulk::compress(raw, level)
                .ok()
                .filter(|c| c.len() * SHRINK_DENOMINATOR <= raw.len() * SHRINK_NUMERATOR)
        });
        let (codec, payload) = match compressed {
            Some(compressed) => {
                self.pool.give_back(chunk.buffer);
                let lent = LentBytes { bytes: compressed, _lent: chunk.lent };
                (pbc::Codec::Zstd, Bytes::from_owner(lent))
            }
            None => (pbc::Codec::None, self.pool.freeze(chunk.buffer, chunk.filled, chunk.lent)),
        };
        self.end.payload_bytes += payload.len() as u64;
        let mut header = pb::Chunk {
            stage: self.plan.position.stage.to_wire().into(),
            round: self.plan.position.round,
            codec: codec.into(),
            raw_length: u32::try_from(chunk.filled).unwrap_or(u32::MAX),
            crc32c,
            digest,
            extents: chunk.extents,
            header_crc32c: None,
            payload: Bytes::new(),
        };
        header.header_crc32c = Some(checksum::of_chunk_header(&header));
        emit(Frame::Chunk(header, payload, chunk.covered))
    }
}

enum Progress {
    Finished,
    Stopped { done: u64 },
}

/// Buffers that are used again: a fresh megabyte costs a page fault for each of its pages.
#[derive(Debug, Default)]
pub struct BufferPool {
    free: Mutex<Vec<Vec<u8>>>,
}

/// Most buffers that wait for use: one for each stream of a clone and what its queue holds.
const FREE_BUFFERS_MAX: usize = 16;

impl BufferPool {
    fn take(&self, length: usize) -> Vec<u8> {
        let mut buffer =
            self.free.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        if buffer.len() != length {
            buffer.resize(length, 0);
        }
        buffer
    }

    fn give_back(&self, buffer: Vec<u8>) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if !buffer.is_empty() && free.len() < FREE_BUFFERS_MAX {
            free.push(buffer);
        }
    }

    fn freeze(self: &Arc<Self>, buffer: Vec<u8>, filled: usize, lent: Option<Lent>) -> Bytes {
        if filled == 0 {
            self.give_back(buffer);
            return Bytes::new();
        }
        Bytes::from_owner(PooledBytes { buffer, filled, pool: Arc::clone(self), _lent: lent })
    }
}

/// Bytes on their way out; their buffer returns to the pool once they are sent.
struct PooledBytes {
    buffer: Vec<u8>,
    filled: usize,
    pool: Arc<BufferPool>,
    _lent: Option<Lent>,
}

/// Compressed bytes on their way out.
struct LentBytes {
    bytes: Vec<u8>,
    _lent: Option<Lent>,
}

impl AsRef<[u8]> for LentBytes {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsRef<[u8]> for PooledBytes {
    fn as_ref(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }
}

impl Drop for PooledBytes {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.buffer));
    }
}
