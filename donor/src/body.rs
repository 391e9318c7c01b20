//! ReadRanges without copies: gRPC messages as a header and the payload's own bytes.
//!
//! The wire is ordinary gRPC, as any generated client reads it. The generated server would copy
//! each payload twice, into the message and into its buffer, so this one method is served here.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body::Frame as BodyFrame;
use http_body_util::BodyExt as _;
use marcot_common::{
    chunk::{MESSAGE_BYTES_MAX, RANGES_MAX},
    failure::Failure,
    fields,
};
use marcot_proto::donor::v1::{
    self as pb, donor_service_server::DonorServiceServer, read_ranges_response,
};
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::{Status, body::Body, server::NamedService};
use tower::Service;

use crate::{api::Api, chunk_reader::Frame};

/// Path of the method that is served here.
pub const READ_RANGES: &str = "/marcot.donor.v1.DonorService/ReadRanges";

/// Largest request of any other kind: names, a key, and some numbers.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;

/// Number of `ReadRangesRequest.ranges`.
const RANGES_FIELD: u64 = 4;

/// Bytes of a gRPC message's prefix: a flag for compression, and the length.
const PREFIX_BYTES: usize = 5;

/// The donor's service: the generated one, and ReadRanges.
#[derive(Clone, Debug)]
pub struct ZeroCopyService {
    api: Api,
    generated: DonorServiceServer<Api>,
}

impl ZeroCopyService {
    /// Serves `api`.
    #[must_use]
    pub fn new(api: Api) -> Self {
        let generated = DonorServiceServer::new(api.clone())
            .max_decoding_message_size(REQUEST_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Self { api, generated }
    }
}

impl NamedService for ZeroCopyService {
    const NAME: &'static str = <DonorServiceServer<Api> as NamedService>::NAME;
}

impl Service<http::Request<Body>> for ZeroCopyService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != READ_RANGES {
            return Box::pin(self.generated.call(request));
        }
        let api = self.api.clone();
        Box::pin(async move {
            Ok(match serve(&api, request).await {
                Ok(response) => response,
                Err(failure) => failure.to_status().into_http(),
            })
        })
    }
}

async fn serve(api: &Api, request: http::Request<Body>) -> Result<http::Response<Body>, Failure> {
    let (parts, body) = request.into_parts();
    let message = read_message(body).await?;
    // Counted before they are made: sixty bytes of memory for two on the wire.
    let count = fields::count(&message, RANGES_FIELD).unwrap_or(0);
    if count > RANGES_MAX {
        let text = format!("{count} ranges asked for, 1 to {RANGES_MAX} are allowed");
        return Err(Failure::invalid("BAD_RANGE", text));
    }
    let request = pb::ReadRangesRequest::decode(message)
        .map_err(|e| Failure::invalid("BAD_MESSAGE", format!("ReadRangesRequest: {e}")))?;
    let frames = api.start_reading(&parts.extensions, request)?;
    let body = FrameBody { frames, payload: None, state: BodyState::Streaming };
    let response = http::Response::builder()
        .header(http::header::CONTENT_TYPE, "application/grpc")
        .body(Body::new(body));
    response.map_err(|e| Failure::bug(e.to_string()))
}

/// Reads the one message of a unary request.
async fn read_message(body: Body) -> Result<Bytes, Failure> {
    let bad = |why: &str| Failure::invalid("BAD_MESSAGE", format!("request body {why}"));
    let whole = body.collect().await.map_err(|status| Failure::from_status(&status))?;
    let bytes = whole.to_bytes();
    if bytes.len() < PREFIX_BYTES {
        return Err(bad("is shorter than a message"));
    }
    if bytes[0] != 0 {
        return Err(Failure::unimplemented("gRPC-level compression of requests"));
    }
    let length = u32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]) as usize;
    if bytes.len() != PREFIX_BYTES + length {
        return Err(bad("is not one whole message"));
    }
    Ok(bytes.slice(PREFIX_BYTES..))
}

enum BodyState {
    Streaming,
    Ended,
}

/// The response's body: for each frame a header, then the payload as it is.
struct FrameBody {
    frames: mpsc::Receiver<Result<Frame, Failure>>,
    payload: Option<Bytes>,
    state: BodyState,
}

impl http_body::Body for FrameBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<BodyFrame<Bytes>, Status>>> {
        if let Some(payload) = self.payload.take() {
            return Poll::Ready(Some(Ok(BodyFrame::data(payload))));
        }
        if matches!(self.state, BodyState::Ended) {
            return Poll::Ready(None);
        }
        let next = ready!(self.frames.poll_recv(context));
        let frame = match next {
            Some(Ok(Frame::Chunk(header, payload, _))) => {
                let bytes = encode_chunk(&header, payload.len());
                self.payload = Some(payload).filter(|p| !p.is_empty());
                BodyFrame::data(bytes)
            }
            Some(Ok(Frame::Failure(failure))) => {
                BodyFrame::data(encode(read_ranges_response::Frame::Failure(failure)))
            }
            Some(Ok(Frame::End(end))) => {
                BodyFrame::data(encode(read_ranges_response::Frame::End(end)))
            }
            Some(Err(failure)) => {
                self.state = BodyState::Ended;
                trailers(&failure.to_status())
            }
            None => {
                self.state = BodyState::Ended;
                trailers(&Status::ok(""))
            }
        };
        Poll::Ready(Some(Ok(frame)))
    }
}

fn trailers(status: &Status) -> BodyFrame<Bytes> {
    let mut headers = http::HeaderMap::new();
    if status.add_header(&mut headers).is_err() {
        headers.insert("grpc-status", http::HeaderValue::from_static("13"));
    }
    BodyFrame::trailers(headers)
}

fn encode(frame: read_ranges_response::Frame) -> Bytes {
    let message = pb::ReadRangesResponse { frame: Some(frame) };
    let mut bytes = BytesMut::with_capacity(PREFIX_BYTES + message.encoded_len());
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
    message.encode_raw(&mut bytes);
    bytes.freeze()
}

/// Encodes all of a chunk's message but its payload's bytes, which must follow.
fn encode_chunk(header: &pb::Chunk, payload_bytes: usize) -> Bytes {
    const CHUNK_KEY: u8 = (1 << 3) | 2;
    const PAYLOAD_KEY: u8 = (15 << 3) | 2;
    let field_bytes = match payload_bytes {
        0 => 0,
        n => 1 + prost::length_delimiter_len(n) + n,
    };
    let chunk_bytes = header.encoded_len() + field_bytes;
    let message_bytes = 1 + prost::length_delimiter_len(chunk_bytes) + chunk_bytes;
    let mut bytes = BytesMut::with_capacity(32 + header.encoded_len());
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(message_bytes).unwrap_or(u32::MAX));
    bytes.put_u8(CHUNK_KEY);
    put_varint(&mut bytes, chunk_bytes);
    header.encode_raw(&mut bytes);
    if payload_bytes > 0 {
        bytes.put_u8(PAYLOAD_KEY);
        put_varint(&mut bytes, payload_bytes);
    }
    bytes.freeze()
}

fn put_varint(bytes: &mut BytesMut, mut value: usize) {
    while value >= 0x80 {
        bytes.put_u8((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.put_u8(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards the wire's compatibility: what is built by hand here is what prost would write.
    #[test]
    fn a_chunk_is_encoded_as_generated_code_does() {
        for payload in [&b""[..], b"x", &[7; 127], &[8; 128], &[9; 70_000]] {
            let header = pb::Chunk {
                stage: 1,
                round: 2,
                codec: 1,
                raw_length: u32::try_from(payload.len()).unwrap(),
                crc32c: 0xdead_beef,
                digest: Bytes::from_static(b"digest"),
                extents: vec![pb::Extent {
                    file_id: 5,
                    offset: 6,
                    length: 7,
                    hole: true,
                    unchanged: false,
                }],
                header_crc32c: None,
                payload: Bytes::new(),
            };
            let whole = pb::Chunk { payload: Bytes::copy_from_slice(payload), ..header.clone() };
            let expected = encode(read_ranges_response::Frame::Chunk(whole));
            let mut built = encode_chunk(&header, payload.len()).to_vec();
            built.extend_from_slice(payload);
            assert_eq!(built, expected);
        }
    }
}
