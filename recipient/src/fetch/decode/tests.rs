//! Frames read off bodies that the network has cut anywhere.

use std::convert::Infallible;

use http_body::Frame as BodyFrame;
use http_body_util::StreamBody;
use proptest::prelude::*;
use tonic::Code;

use super::*;

fn chunk(payload: &[u8]) -> pb::Chunk {
    pb::Chunk {
        stage: 1,
        round: 1,
        codec: pbc::Codec::None.into(),
        raw_length: u32::try_from(payload.len()).unwrap(),
        crc32c: crc32c::crc32c(payload),
        digest: Bytes::from_static(b"digest of some bytes"),
        extents: vec![
            pb::Extent {
                file_id: 300,
                offset: 1 << 40,
                length: payload.len() as u64,
                hole: false,
                unchanged: false,
            },
            pb::Extent { file_id: 301, offset: 0, length: 5, hole: true, unchanged: false },
        ],
        header_crc32c: None,
        payload: Bytes::copy_from_slice(payload),
    }
}

fn message(frame: read_ranges_response::Frame) -> Vec<u8> {
    let bytes = pb::ReadRangesResponse { frame: Some(frame) }.encode_to_vec();
    let length = u32::try_from(bytes.len()).unwrap();
    [&[0][..], &length.to_be_bytes(), &bytes].concat()
}

/// A response whose body comes in pieces of these lengths, the last one over and over.
fn response(bytes: &[u8], cuts: &[usize], status: Code) -> http::Response<Body> {
    let mut frames = Vec::new();
    let mut rest = Bytes::copy_from_slice(bytes);
    let mut cuts = cuts.iter().chain(std::iter::repeat(cuts.last().unwrap()));
    while !rest.is_empty() {
        let n = (*cuts.next().unwrap()).clamp(1, rest.len());
        frames.push(Ok::<_, Infallible>(BodyFrame::data(rest.split_to(n))));
    }
    let mut trailers = http::HeaderMap::new();
    Status::new(status, "as the test has it").add_header(&mut trailers).unwrap();
    frames.push(Ok(BodyFrame::trailers(trailers)));
    let body = Body::new(StreamBody::new(futures::stream::iter(frames)));
    http::Response::builder().header("content-type", "application/grpc").body(body).unwrap()
}

#[derive(Debug, PartialEq)]
enum Read {
    Chunk(pb::Chunk),
    Failure(pb::RangeFailure),
    End(pb::ReadEnd),
}

fn read(response: http::Response<Body>) -> Result<Vec<Read>, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let mut pulse = Pulse::new(std::time::Duration::from_secs(5));
        let mut reader = FrameReader::new(response, &mut pulse)?;
        let mut frames = Vec::new();
        while let Some(frame) = reader.next().await? {
            frames.push(match frame {
                ReadFrame::Chunk(header, pieces) => {
                    let payload: Vec<u8> = pieces.iter().flatten().copied().collect();
                    Read::Chunk(pb::Chunk { payload: payload.into(), ..header })
                }
                ReadFrame::Failure(failure) => Read::Failure(failure),
                ReadFrame::End(end) => Read::End(end),
            });
        }
        Ok(frames)
    })
}

fn stream() -> (Vec<u8>, Vec<Read>) {
    let end = pb::ReadEnd { ranges_done: 3, raw_bytes: 1000, ..pb::ReadEnd::default() };
    let failure = pb::RangeFailure { range: 1, file_id: 7, failure: None };
    let chunks = [chunk(&[7; 600]), chunk(b""), chunk(&[9; 400])];
    let mut bytes = Vec::new();
    let mut expected = Vec::new();
    for chunk in chunks {
        bytes.extend(message(read_ranges_response::Frame::Chunk(chunk.clone())));
        expected.push(Read::Chunk(chunk));
    }
    bytes.extend(message(read_ranges_response::Frame::Failure(failure.clone())));
    expected.push(Read::Failure(failure));
    bytes.extend(message(read_ranges_response::Frame::End(end)));
    expected.push(Read::End(end));
    (bytes, expected)
}

#[test]
fn frames_are_read_however_the_network_cuts_them() {
    let (bytes, expected) = stream();
    for cut in 1..bytes.len() {
        for cuts in [vec![cut], vec![cut, bytes.len()]] {
            let frames = read(response(&bytes, &cuts, Code::Ok)).unwrap();
            assert_eq!(frames, expected, "cut at {cuts:?}");
        }
    }
}

#[test]
fn a_body_that_ends_early_is_an_error_wherever_it_ends() {
    let (bytes, _) = stream();
    let mut boundaries = vec![0];
    while let Some(prefix) = bytes.get(boundaries[boundaries.len() - 1]..).filter(|b| b.len() > 5) {
        let length = u32::from_be_bytes(prefix[1..5].try_into().unwrap()) as usize;
        boundaries.push(boundaries[boundaries.len() - 1] + 5 + length);
    }
    for end in 1..bytes.len() {
        let result = read(response(&bytes[..end], &[64], Code::Ok));
        assert_eq!(result.is_ok(), boundaries.contains(&end), "{end}");
    }
}

#[test]
fn a_status_in_the_trailers_is_the_donors_error() {
    let (bytes, _) = stream();
    let failure = read(response(&bytes, &[100], Code::Unavailable)).unwrap_err();
    assert_eq!((failure.code, failure.mysql_error), (Code::Unavailable, Some(3862)));
}

#[test]
fn compressed_and_oversized_messages_are_refused() {
    let (mut bytes, _) = stream();
    bytes[0] = 1;
    let failure = read(response(&bytes, &[100], Code::Ok)).unwrap_err();
    assert!(failure.message.contains("compressed by gRPC"), "{failure}");
    bytes[0] = 0;
    bytes[1..5].copy_from_slice(&u32::MAX.to_be_bytes());
    let failure = read(response(&bytes, &[100], Code::Ok)).unwrap_err();
    assert!(failure.message.contains("4294967295 bytes"), "{failure}");
}

/// Guards memory: what is two bytes each on the wire is forty in memory, so it is counted before it is
/// decoded; and chunks of nothing, which would be a stream without an end.
#[test]
fn countless_extents_and_chunks_of_nothing_are_refused() {
    let extents = |count| {
        let extents = vec![pb::Extent::default(); count];
        let chunk = pb::Chunk { extents, payload: Bytes::new(), ..chunk(b"") };
        response(&message(read_ranges_response::Frame::Chunk(chunk)), &[1 << 20], Code::Ok)
    };
    assert_eq!(read(extents(EXTENTS_MAX)).unwrap().len(), 1);
    let failure = read(extents(EXTENTS_MAX + 1)).unwrap_err();
    assert!(failure.message.contains("chunk of 8193 extents"), "{failure}");
    let text = "x".repeat(OTHER_BYTES_MAX);
    let why = pbc::Failure { message: text, ..pbc::Failure::default() };
    let failed = pb::RangeFailure { range: 0, file_id: 1, failure: Some(why) };
    let frame = message(read_ranges_response::Frame::Failure(failed));
    let failure = read(response(&frame, &[1 << 20], Code::Ok)).unwrap_err();
    assert!(failure.message.contains("that is no chunk"), "{failure}");
    let position = wire::position(1, 1).unwrap();
    let empty = pb::Chunk { extents: Vec::new(), ..chunk(b"") };
    let failure = check_chunk(empty, VecDeque::new(), position).unwrap_err();
    assert!(failure.message.contains("in 0 extents"), "{failure}");
}

/// Guards against a chunk whose few bytes come in much: a frame of zstd may hold parts to be skipped.
#[test]
fn what_grows_by_compression_is_refused() {
    let skipped = [&0x184d_2a50_u32.to_le_bytes()[..], &9_u32.to_le_bytes(), &[0; 9]].concat();
    let payload = [skipped, zstd::bulk::compress(b"data", 1).unwrap()].concat();
    let codec = pbc::Codec::Zstd.into();
    let header = pb::Chunk { codec, payload: Bytes::new(), ..chunk(b"data") };
    let position = wire::position(1, 1).unwrap();
    let failure = check_chunk(header, VecDeque::from([payload.into()]), position).unwrap_err();
    assert!(failure.message.contains("bytes of zstd for 4 of data"), "{failure}");
}

proptest! {
    /// Bytes that no donor sends are errors, and never a panic or a hang.
    #[test]
    fn any_bytes_are_frames_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 1usize..50) {
        drop(read(response(&bytes, &[cut], Code::Ok)));
        let length = u32::try_from(bytes.len()).unwrap();
        let framed = [&[0][..], &length.to_be_bytes(), &bytes].concat();
        drop(read(response(&framed, &[cut], Code::Ok)));
        let chunk = [&framed[..5], &[CHUNK_KEY][..], &bytes].concat();
        drop(read(response(&chunk, &[cut], Code::Ok)));
    }
}

/// Guards what a chunk says of its bytes: a hole that has become bytes of an earlier round passes
/// every other check, and the older bytes would stay.
#[test]
fn a_header_that_was_changed_on_its_way_is_refused() {
    let position = wire::position(1, 1).unwrap();
    let check = |header: &pb::Chunk| {
        let payload = VecDeque::from([header.payload.clone()]);
        check_chunk(header.clone(), payload, position)
    };
    let mut header = chunk(b"bytes");
    header.header_crc32c = Some(checksum::of_chunk_header(&header));
    check(&header).unwrap();
    (header.extents[1].hole, header.extents[1].unchanged) = (false, true);
    let failure = check(&header).unwrap_err();
    assert_eq!(failure.reason, "PEER_MISBEHAVED");
    assert!(failure.message.contains("chunk's header has CRC-32C"), "{failure}");
}
