//! Frames of a ReadRanges answer and the chunks in them: no panic, the same frames however the
//! network cuts them, and no chunk that is longer than it says, or not what its checksum is of.
//!
//! Input: bytes of a piece, how the stream ends, then the stream. Chunks are checked as they are, and
//! with checksums and lengths put right.

use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body::{Body as _, Frame};
use marcot_common::{
    checksum,
    chunk::{CHUNK_BYTES_MAX, EXTENTS_MAX},
    position::{Position, Stage},
};
use marcot_proto::{
    common::v1 as pbc,
    donor::v1::{self as pb, read_ranges_response::Frame as Message},
};
use marcot_recipient::{
    fetch::decode::{FrameReader, ReadFrame, check_chunk, take_pieces},
    stall::Pulse,
};
use prost::Message as _;
use tokio::runtime::{Builder, Runtime};
use tonic::body::Body;

/// The parser's files.
pub const FILES: &[&str] = &["recipient/src/fetch/decode.rs"];

const POSITION: Position = Position { stage: Stage::FileCopy, round: 1 };

/// Longest chunk that is made right: more is more of the same.
const MENDED_BYTES_MAX: u64 = 1 << 16;

/// A body that comes in pieces.
struct Pieces {
    left: VecDeque<Bytes>,
    trailers: Option<HeaderMap>,
}

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.left.pop_front().map(Frame::data);
        let frame = piece.or_else(|| self.trailers.take().map(Frame::trailers));
        Poll::Ready(frame.map(Ok))
    }
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let [size, end, stream @ ..] = data else { return };
    let whole = read(stream, stream.len().max(1), *end);
    let cut = read(stream, usize::from(*size).max(1), *end);
    assert_eq!(whole.0.len(), cut.0.len(), "the network's cuts made other frames");
    assert_eq!(whole.1, cut.1, "the network's cuts made another end");
    for (frame, other) in whole.0.into_iter().zip(cut.0) {
        match (frame, other) {
            (ReadFrame::Chunk(header, payload), ReadFrame::Chunk(other, pieces)) => {
                assert_eq!(header, other);
                assert_eq!(joined(&payload), joined(&pieces));
                chunk(header, pieces);
            }
            (ReadFrame::Failure(one), ReadFrame::Failure(other)) => assert_eq!(one, other),
            (ReadFrame::End(one), ReadFrame::End(other)) => assert_eq!(one, other),
            _ => panic!("the network's cuts made another frame"),
        }
    }
}

/// All frames of a stream, and whether it ended well.
fn read(stream: &[u8], piece_bytes: usize, end: u8) -> (Vec<ReadFrame>, bool) {
    thread_local! {
        static RUNTIME: Runtime = Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime without threads");
    }
    let left: VecDeque<Bytes> = stream.chunks(piece_bytes).map(Bytes::copy_from_slice).collect();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(if end & 1 == 0 { "0" } else { "13" }));
    let body = Pieces { left, trailers: (end & 2 == 0).then_some(trailers.clone()) };
    assert!(!body.is_end_stream());
    let mut response = http::Response::new(Body::new(body));
    if end & 4 == 0 {
        response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    }
    if end & 8 != 0 {
        response.headers_mut().extend(trailers);
    }
    let mut pulse = Pulse::new(Duration::from_secs(1));
    let Ok(mut reader) = FrameReader::new(response, &mut pulse) else {
        return (Vec::new(), false);
    };
    let mut frames = Vec::new();
    let ended_well = RUNTIME.with(|runtime| {
        runtime.block_on(async {
            loop {
                match reader.next().await {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            }
        })
    });
    let received = reader.take_network_bytes();
    assert!(received <= stream.len() as u64 && reader.take_network_bytes() == 0);
    assert!(!ended_well || received == stream.len() as u64);
    reader.came(received);
    (frames, ended_well)
}

fn joined(pieces: &VecDeque<Bytes>) -> Vec<u8> {
    pieces.iter().flat_map(|piece| piece.iter().copied()).collect()
}

fn chunk(header: pb::Chunk, payload: VecDeque<Bytes>) {
    check(header.clone(), payload.clone());
    let data: Option<u64> = header
        .extents
        .iter()
        .filter(|extent| !extent.hole && !extent.unchanged)
        .try_fold(0_u64, |sum, extent| sum.checked_add(extent.length));
    let Some(length) = data.filter(|&length| length <= MENDED_BYTES_MAX) else { return };
    let mut header = header;
    (header.stage, header.round) = (POSITION.stage.to_wire().into(), POSITION.round);
    header.raw_length = u32::try_from(length).expect("it is short");
    let bytes = joined(&payload);
    let raw_bytes = usize::try_from(length).expect("it is short");
    let raw = if header.codec == i32::from(pbc::Codec::Zstd) {
        zstd::bulk::decompress(&bytes, raw_bytes).unwrap_or_default()
    } else {
        bytes.iter().copied().chain(std::iter::repeat(0)).take(raw_bytes).collect()
    };
    header.crc32c = crc32c::crc32c(&raw);
    if header.header_crc32c.is_some() {
        header.header_crc32c = Some(checksum::of_chunk_header(&header));
    }
    let is_plain = header.codec == i32::from(pbc::Codec::None);
    let payload = if is_plain { VecDeque::from([Bytes::from(raw.clone())]) } else { payload };
    let is_right = !header.extents.iter().any(|extent| extent.hole && extent.unchanged)
        && (1..=EXTENTS_MAX).contains(&header.extents.len());
    let is_taken = check(header, payload);
    assert!(is_taken || !is_plain || !is_right, "a chunk that is right is refused");
}

/// Checks a chunk; returns whether it is right.
fn check(header: pb::Chunk, payload: VecDeque<Bytes>) -> bool {
    let Ok(checked) = check_chunk(header.clone(), payload, POSITION) else {
        return false;
    };
    let raw = joined(&checked.pieces);
    assert!(raw.len() as u64 <= CHUNK_BYTES_MAX && raw.len() == header.raw_length as usize);
    assert_eq!(crc32c::crc32c(&raw), header.crc32c);
    assert!((1..=EXTENTS_MAX).contains(&checked.extents.len()));
    let (mut pieces, mut taken) = (checked.pieces, Vec::new());
    for extent in checked.extents.iter().filter(|extent| !extent.hole && !extent.unchanged) {
        let part = take_pieces(&mut pieces, extent.length);
        assert_eq!(part.iter().map(Bytes::len).sum::<usize>() as u64, extent.length);
        taken.extend(part.concat());
    }
    // Of a chunk without a byte one piece may be left, which is empty.
    assert!(joined(&pieces).is_empty() && taken == raw, "extents name each byte once");
    assert!(take_pieces(&mut pieces, 1).concat().is_empty());
    true
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let extent =
        |offset: u64, length: u64| pb::Extent { file_id: 3, offset, length, ..Default::default() };
    let raw: Vec<u8> = b"0123456789".repeat(30);
    let mut plain = pb::Chunk {
        stage: pbc::Stage::FileCopy.into(),
        round: 1,
        codec: pbc::Codec::None.into(),
        raw_length: 300,
        crc32c: crc32c::crc32c(&raw),
        extents: vec![
            extent(0, 100),
            pb::Extent { hole: true, ..extent(100, 4096) },
            extent(4196, 200),
            pb::Extent { unchanged: true, ..extent(8192, 4096) },
        ],
        payload: Bytes::from(raw.clone()),
        ..Default::default()
    };
    plain.header_crc32c = Some(checksum::of_chunk_header(&plain));
    let compressed = zstd::bulk::compress(&raw, 3).expect("it is short");
    let zstd =
        pb::Chunk { codec: pbc::Codec::Zstd.into(), payload: compressed.into(), ..plain.clone() };
    let bare = pb::Chunk { header_crc32c: None, ..zstd.clone() };
    let failure = pb::RangeFailure {
        range: 1,
        file_id: 3,
        failure: Some(pbc::Failure { reason: "FILE_GONE".to_owned(), ..Default::default() }),
    };
    let end = pb::ReadEnd { ranges_done: 2, raw_bytes: 300, ..Default::default() };
    let message = |frame: Message| {
        let bytes = pb::ReadRangesResponse { frame: Some(frame) }.encode_to_vec();
        let length = u32::try_from(bytes.len()).expect("it is short");
        [&[0][..], &length.to_be_bytes(), &bytes].concat()
    };
    let chunk = |chunk: &pb::Chunk| message(Message::Chunk(chunk.clone()));
    let input = |head: [u8; 2], messages: &[Vec<u8>]| [head.to_vec(), messages.concat()].concat();
    let end = message(Message::End(end));
    let failure = message(Message::Failure(failure));
    let other = |change: fn(&mut pb::Chunk)| {
        let mut spoilt = plain.clone();
        change(&mut spoilt);
        input([255, 0], &[chunk(&spoilt)])
    };
    vec![
        input([7, 0], &[chunk(&plain), end.clone()]),
        input([64, 0], &[chunk(&zstd), chunk(&bare), failure, end.clone()]),
        input([1, 2], &[chunk(&bare)]),
        input([9, 1], std::slice::from_ref(&end)),
        input([9, 4], std::slice::from_ref(&end)),
        input([9, 9], std::slice::from_ref(&end)),
        input([3, 0], &[vec![1, 0, 0, 0, 0]]),
        input([3, 0], &[vec![0, 0xff, 0, 0, 0]]),
        input([3, 0], &[vec![0, 0, 0, 0, 2, 0x22, 0]]),
        input([3, 0], &[vec![0, 0, 0, 0, 0], vec![0, 0, 0, 1, 0, 10]]),
        other(|chunk| chunk.round = 2),
        other(|chunk| chunk.stage = 99),
        other(|chunk| chunk.raw_length += 1),
        other(|chunk| chunk.raw_length = 3 << 20),
        other(|chunk| chunk.crc32c ^= 1),
        other(|chunk| chunk.header_crc32c = Some(1)),
        other(|chunk| chunk.codec = 77),
        other(|chunk| chunk.codec = pbc::Codec::Zstd.into()),
        other(|chunk| chunk.payload = Bytes::from_static(b"x")),
        other(|chunk| chunk.extents[1].unchanged = true),
        other(|chunk| chunk.extents.clear()),
    ]
}
