//! Reads ReadRanges frames off a response body without copying payloads.
//!
//! A payload stays in the pieces that the network delivered; they go to the disk as they are.

use std::collections::VecDeque;

use bytes::{Buf as _, Bytes, BytesMut};
use http_body_util::BodyExt as _;
use marcot_common::{
    checksum,
    chunk::{CHUNK_BYTES_MAX, EXTENTS_MAX, MESSAGE_BYTES_MAX},
    failure::Failure,
    position::Position,
    wire,
};
use marcot_proto::{
    common::v1 as pbc,
    donor::v1::{self as pb, read_ranges_response},
};
use prost::Message as _;
use tonic::{Status, body::Body};

use crate::stall::Pulse;

/// Bytes of a gRPC message's prefix.
const PREFIX_BYTES: usize = 5;

/// Most bytes of a message before its payload: `EXTENTS_MAX` extents of at most 35 bytes.
const HEAD_BYTES_MAX: usize = 320 << 10;

/// Most bytes of a message that is no chunk: the texts of one failure, and a few numbers. What is shorter
/// in bytes than in memory is so thirty times at the most.
const OTHER_BYTES_MAX: usize = 64 << 10;

const CHUNK_KEY: u8 = (1 << 3) | 2;
const EXTENT_KEY: u64 = (7 << 3) | 2;
const PAYLOAD_KEY: u64 = (15 << 3) | 2;

/// A frame, checked as far as it can be by itself.
#[derive(Debug)]
pub enum ReadFrame {
    /// Bytes: the message without its payload, and the payload's pieces.
    Chunk(pb::Chunk, VecDeque<Bytes>),
    /// A range that cannot be read.
    Failure(pb::RangeFailure),
    /// The last frame.
    End(pb::ReadEnd),
}

/// Reads frames.
pub struct FrameReader<'a> {
    body: Body,
    /// Ends a donor that lives and sends next to nothing: a chunk comes as soon as there is one, and
    /// keepalive finds a dead connection sooner.
    pulse: &'a mut Pulse,
    pieces: VecDeque<Bytes>,
    buffered: usize,
    network_bytes: u64,
}

impl<'a> FrameReader<'a> {
    /// Reads a response; one that is an error already is that error.
    pub fn new(response: http::Response<Body>, pulse: &'a mut Pulse) -> Result<Self, Failure> {
        if let Some(status) = Status::from_header_map(response.headers())
            && status.code() != tonic::Code::Ok
        {
            return Err(Failure::from_status(&status).from_donor());
        }
        let grpc = response
            .headers()
            .get(http::header::CONTENT_TYPE)
            .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
        if response.status() != http::StatusCode::OK || !grpc {
            return Err(Failure::peer_misbehaved(format!(
                "ReadRanges was answered by HTTP {} that is no gRPC",
                response.status()
            )));
        }
        Ok(Self {
            body: response.into_body(),
            pulse,
            pieces: VecDeque::new(),
            buffered: 0,
            network_bytes: 0,
        })
    }

    /// Bytes received since the last call, framing included.
    pub fn take_network_bytes(&mut self) -> u64 {
        std::mem::take(&mut self.network_bytes)
    }

    /// So many bytes were told to be as they are here, or none.
    pub fn came(&mut self, bytes: u64) {
        self.pulse.came(bytes);
    }

    /// The next frame; `None` at the stream's end.
    pub async fn next(&mut self) -> Result<Option<ReadFrame>, Failure> {
        while self.buffered < PREFIX_BYTES {
            if !self.receive().await? {
                return match self.buffered {
                    0 => Ok(None),
                    n => Err(bad(format!("stream ended after {n} bytes of a message"))),
                };
            }
        }
        let mut prefix = [0; PREFIX_BYTES];
        self.copy_out(&mut prefix);
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        if prefix[0] != 0 {
            return Err(bad("message is compressed by gRPC, which is refused on data".to_owned()));
        }
        if length > MESSAGE_BYTES_MAX {
            return Err(bad(format!(
                "message of {length} bytes, at most {MESSAGE_BYTES_MAX} are allowed"
            )));
        }
        self.read_message(length).await.map(Some)
    }

    async fn read_message(&mut self, length: usize) -> Result<ReadFrame, Failure> {
        loop {
            let front =
                self.pieces.front().map_or(&[][..], |piece| &piece[..piece.len().min(length)]);
            match find_payload(front, length)? {
                Head::Chunk { fields, payload } => {
                    let mut header = pb::Chunk::decode(&front[fields.clone()])
                        .map_err(|e| bad(format!("chunk: {e}")))?;
                    header.payload = Bytes::new();
                    self.skip(length - payload);
                    let pieces = self.take(payload).await?;
                    return Ok(ReadFrame::Chunk(header, pieces));
                }
                Head::Other if length > OTHER_BYTES_MAX => {
                    return Err(bad(format!(
                        "message of {length} bytes that is no chunk, at most {OTHER_BYTES_MAX} are \
                         allowed"
                    )));
                }
                Head::Other if front.len() == length => {
                    let message = pb::ReadRangesResponse::decode(front)
                        .map_err(|e| bad(format!("frame: {e}")))?;
                    self.skip(length);
                    return match message.frame {
                        Some(read_ranges_response::Frame::Failure(f)) => Ok(ReadFrame::Failure(f)),
                        Some(read_ranges_response::Frame::End(end)) => Ok(ReadFrame::End(end)),
                        _ => Err(bad("frame is of no known kind".to_owned())),
                    };
                }
                Head::Other | Head::Incomplete if front.len() >= HEAD_BYTES_MAX => {
                    let n = front.len();
                    return Err(bad(format!(
                        "a message has no payload within its first {n} bytes"
                    )));
                }
                Head::Other | Head::Incomplete => self.lengthen_front(length).await?,
            }
        }
    }

    /// Makes the first piece longer, by copying: only heads that the network has cut need it.
    async fn lengthen_front(&mut self, length: usize) -> Result<(), Failure> {
        let wanted = if self.pieces.is_empty() { 1 } else { 2 };
        while self.pieces.len() < wanted {
            if !self.receive().await? {
                return Err(bad("stream ended within a message".to_owned()));
            }
        }
        if wanted == 1 {
            return Ok(());
        }
        let first = self.pieces.pop_front().unwrap_or_default();
        let mut joined = BytesMut::from(&first[..]);
        let more = length.min(HEAD_BYTES_MAX).saturating_sub(joined.len()).max(1);
        if let Some(second) = self.pieces.front_mut() {
            joined.extend_from_slice(&second.split_to(more.min(second.len())));
            if second.is_empty() {
                self.pieces.pop_front();
            }
        }
        self.pieces.push_front(joined.freeze());
        Ok(())
    }

    /// Takes the next `length` bytes as the pieces that they came in.
    async fn take(&mut self, mut length: usize) -> Result<VecDeque<Bytes>, Failure> {
        let mut taken = VecDeque::with_capacity(4);
        while length > 0 {
            let Some(piece) = self.pieces.front_mut() else {
                if !self.receive().await? {
                    return Err(bad(format!("stream ended {length} bytes before a payload's end")));
                }
                continue;
            };
            let part = piece.split_to(length.min(piece.len()));
            if piece.is_empty() {
                self.pieces.pop_front();
            }
            length -= part.len();
            self.buffered -= part.len();
            self.pulse.came(part.len() as u64);
            taken.push_back(part);
        }
        Ok(taken)
    }

    /// Receives one piece; false at the end of a stream that ended well.
    async fn receive(&mut self) -> Result<bool, Failure> {
        loop {
            match self.pulse.wait("ReadRanges", self.body.frame()).await? {
                None => return Ok(false),
                Some(Err(status)) => return Err(Failure::from_status(&status).from_donor()),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => {
                        self.buffered += data.len();
                        self.network_bytes += data.len() as u64;
                        self.pieces.push_back(data);
                        return Ok(true);
                    }
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        let status = Status::from_header_map(&trailers)
                            .unwrap_or_else(|| Status::unknown("stream ended without a status"));
                        if status.code() != tonic::Code::Ok {
                            return Err(Failure::from_status(&status).from_donor());
                        }
                    }
                },
            }
        }
    }

    fn copy_out(&mut self, target: &mut [u8]) {
        let mut filled = 0;
        while filled < target.len() {
            let Some(piece) = self.pieces.front_mut() else {
                return;
            };
            let n = piece.len().min(target.len() - filled);
            piece.copy_to_slice(&mut target[filled..filled + n]);
            filled += n;
            self.buffered -= n;
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
    }

    fn skip(&mut self, mut n: usize) {
        self.buffered -= n;
        while n > 0 {
            let Some(piece) = self.pieces.front_mut() else {
                return;
            };
            let m = n.min(piece.len());
            piece.advance(m);
            n -= m;
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
    }
}

enum Head {
    /// A chunk: where its fields other than the payload are, and how long the payload is.
    Chunk { fields: std::ops::Range<usize>, payload: usize },
    /// Not a chunk: it is read as a whole.
    Other,
    /// More bytes are needed to tell.
    Incomplete,
}

/// Looks for the payload in a message of `length` bytes, of which `front` has come.
fn find_payload(front: &[u8], length: usize) -> Result<Head, Failure> {
    let mut at = Cursor { bytes: front, position: 0 };
    let Some(&key) = front.first() else {
        return if length == 0 { Ok(Head::Other) } else { Ok(Head::Incomplete) };
    };
    if key != CHUNK_KEY {
        return Ok(Head::Other);
    }
    at.position = 1;
    let Some(chunk_bytes) = at.varint()? else {
        return Ok(Head::Incomplete);
    };
    let start = at.position;
    if usize::try_from(chunk_bytes).ok().and_then(|n| n.checked_add(start)) != Some(length) {
        return Err(bad(format!("chunk of {chunk_bytes} bytes in a message of {length}")));
    }
    let mut extents = 0;
    loop {
        let fields = start..at.position;
        if fields.len() > HEAD_BYTES_MAX || extents > EXTENTS_MAX {
            return Err(bad(format!(
                "chunk of {extents} extents in {} bytes; at most {EXTENTS_MAX} and {HEAD_BYTES_MAX} \
                 are allowed",
                fields.len()
            )));
        }
        if at.position == length {
            return Ok(Head::Chunk { fields, payload: 0 });
        }
        let Some(key) = at.varint()? else {
            return Ok(Head::Incomplete);
        };
        if key == PAYLOAD_KEY {
            let Some(payload) = at.varint()? else {
                return Ok(Head::Incomplete);
            };
            let payload = usize::try_from(payload).unwrap_or(usize::MAX);
            if at.position.checked_add(payload) != Some(length) {
                return Err(bad(format!("payload of {payload} bytes is not a chunk's last field")));
            }
            return Ok(Head::Chunk { fields, payload });
        }
        extents += usize::from(key == EXTENT_KEY);
        let Some(()) = at.skip_field(key)? else {
            return Ok(Head::Incomplete);
        };
        if at.position > length {
            return Err(bad("a chunk's field is longer than the chunk".to_owned()));
        }
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl Cursor<'_> {
    /// Reads a varint; `None` when it is cut.
    fn varint(&mut self) -> Result<Option<u64>, Failure> {
        let mut value = 0;
        for shift in (0..70).step_by(7) {
            let Some(&byte) = self.bytes.get(self.position) else {
                return Ok(None);
            };
            self.position += 1;
            if shift == 63 && byte > 1 {
                break;
            }
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(Some(value));
            }
        }
        Err(bad("a number is too long".to_owned()))
    }

    fn skip_field(&mut self, key: u64) -> Result<Option<()>, Failure> {
        let length = match key & 7 {
            0 => return Ok(self.varint()?.map(|_| ())),
            1 => 8,
            5 => 4,
            2 => match self.varint()? {
                Some(n) => usize::try_from(n).unwrap_or(usize::MAX),
                None => return Ok(None),
            },
            other => return Err(bad(format!("a field has wire type {other}"))),
        };
        let end = self.position.checked_add(length);
        match end.filter(|&end| end <= MESSAGE_BYTES_MAX) {
            Some(end) if end <= self.bytes.len() => {
                self.position = end;
                Ok(Some(()))
            }
            Some(_) => Ok(None),
            None => Err(bad("a field is longer than a message may be".to_owned())),
        }
    }
}

/// A chunk whose raw bytes have been checked.
#[derive(Debug)]
pub struct CheckedChunk {
    /// What the bytes are, in order.
    pub extents: Vec<pb::Extent>,
    /// Raw bytes.
    pub pieces: VecDeque<Bytes>,
}

/// Decodes a chunk and checks it: position, lengths, checksum.
pub fn check_chunk(
    header: pb::Chunk,
    payload: VecDeque<Bytes>,
    position: Position,
) -> Result<CheckedChunk, Failure> {
    let got = wire::position(header.stage, header.round)?;
    if got != position {
        return Err(bad(format!("chunk of {got} came while {position} is read")));
    }
    let raw_length = u64::from(header.raw_length);
    // An empty chunk says nothing: a stream of them would be one without an end.
    if raw_length > CHUNK_BYTES_MAX || !(1..=EXTENTS_MAX).contains(&header.extents.len()) {
        return Err(bad(format!(
            "chunk of {raw_length} bytes in {} extents; at most {CHUNK_BYTES_MAX}, and 1 to \
             {EXTENTS_MAX}, are allowed",
            header.extents.len()
        )));
    }
    if header.extents.iter().any(|e| e.hole && e.unchanged) {
        return Err(bad("an extent is both a hole and unchanged".to_owned()));
    }
    let mut data = header.extents.iter().filter(|e| !e.hole && !e.unchanged);
    let named = data.try_fold(0u64, |sum, extent| sum.checked_add(extent.length));
    if named != Some(raw_length) {
        return Err(bad(format!("chunk of {raw_length} bytes names {named:?} bytes of data")));
    }
    let payload_bytes: usize = payload.iter().map(Bytes::len).sum();
    let pieces = match pbc::Codec::try_from(header.codec) {
        Ok(pbc::Codec::None) if payload_bytes as u64 == raw_length => payload,
        Ok(pbc::Codec::None) => {
            return Err(bad(format!("{payload_bytes} bytes of payload for {raw_length} of data")));
        }
        // Nothing is sent compressed that does not shrink by it.
        Ok(pbc::Codec::Zstd) if payload_bytes as u64 > raw_length => {
            return Err(bad(format!("{payload_bytes} bytes of zstd for {raw_length} of data")));
        }
        Ok(pbc::Codec::Zstd) => decompress(&payload, header.raw_length as usize)?,
        _ => return Err(bad(format!("chunk has unknown codec {}", header.codec))),
    };
    if let Some(told) = header.header_crc32c {
        let sum = checksum::of_chunk_header(&header);
        if sum != told {
            return Err(bad(format!(
                "chunk's header has CRC-32C {sum:08x}, the donor says {told:08x}"
            )));
        }
    }
    let crc = pieces.iter().fold(0, |crc, piece| crc32c::crc32c_append(crc, piece));
    if crc != header.crc32c {
        let text = match header.extents.first() {
            Some(extent) => format!("of file {} at offset {} ", extent.file_id, extent.offset),
            None => String::new(),
        };
        return Err(Failure::new(
            tonic::Code::DataLoss,
            "CHUNK_CORRUPT",
            format!(
                "chunk {text}has CRC-32C {crc:08x}, the donor says {:08x}: it was changed on its \
                 way; clone again, over TLS if it was not",
                header.crc32c
            ),
        )
        .mysql(3863));
    }
    Ok(CheckedChunk { extents: header.extents, pieces })
}

/// Decompresses into exactly `raw_length` bytes, so that no chunk is a bomb.
fn decompress(payload: &VecDeque<Bytes>, raw_length: usize) -> Result<VecDeque<Bytes>, Failure> {
    let mut joined = BytesMut::with_capacity(payload.iter().map(Bytes::len).sum());
    for piece in payload {
        joined.extend_from_slice(piece);
    }
    let raw = zstd::bulk::decompress(&joined, raw_length)
        .map_err(|e| bad(format!("chunk of {raw_length} bytes does not decompress: {e}")))?;
    if raw.len() != raw_length {
        return Err(bad(format!("chunk decompresses to {} bytes, not {raw_length}", raw.len())));
    }
    Ok(VecDeque::from([Bytes::from(raw)]))
}

/// Takes the next `length` bytes off a row of pieces.
#[must_use]
pub fn take_pieces(pieces: &mut VecDeque<Bytes>, mut length: u64) -> Vec<Bytes> {
    let mut taken = Vec::with_capacity(pieces.len());
    while length > 0 {
        let Some(piece) = pieces.front_mut() else {
            break;
        };
        let n = usize::try_from(length).map_or(piece.len(), |length| length.min(piece.len()));
        let part = piece.split_to(n);
        if piece.is_empty() {
            pieces.pop_front();
        }
        length -= n as u64;
        taken.push(part);
    }
    taken
}

fn bad(why: String) -> Failure {
    Failure::peer_misbehaved(format!("ReadRanges: {why}"))
}

#[cfg(test)]
mod tests;
