//! The ListFiles call, whose messages are looked at before they are decoded.

use bytes::Buf as _;
use http::uri::PathAndQuery;
use marcot_common::{failure::Failure, fields};
use marcot_proto::donor::v1 as pb;
use prost::Message as _;
use tonic::{
    Request, Response, Status, Streaming,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

use super::Service;

const METHOD: &str = "/marcot.donor.v1.DonorService/ListFiles";

/// Most bytes of one message: a donor's holds 64 KiB of entries, earlier ones' 256 KiB, and one more of
/// 128 KiB at most.
pub(super) const LIST_MESSAGE_BYTES_MAX: usize = 512 << 10;

/// Most entries of one message: some 200 bytes each in memory, and a donor's has 10,000 at most, of
/// 25 bytes each.
const ENTRIES_MAX: usize = 16 << 10;

/// Number of `ListFilesResponse.entries`.
const ENTRIES_FIELD: u64 = 1;

/// Calls ListFiles.
pub(super) async fn list_files(
    service: &mut tonic::client::Grpc<Service>,
    request: pb::ListFilesRequest,
) -> Result<Response<Streaming<pb::ListFilesResponse>>, Status> {
    service.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let path = PathAndQuery::from_static(METHOD);
    service.server_streaming(Request::new(request), path, ListCodec).await
}

#[derive(Debug, Clone, Copy)]
struct ListCodec;

impl Codec for ListCodec {
    type Encode = pb::ListFilesRequest;
    type Decode = pb::ListFilesResponse;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for ListCodec {
    type Item = pb::ListFilesRequest;
    type Error = Status;

    fn encode(&mut self, item: Self::Item, target: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(target).map_err(|e| Status::internal(e.to_string()))
    }
}

impl Decoder for ListCodec {
    type Item = pb::ListFilesResponse;
    type Error = Status;

    fn decode(&mut self, source: &mut DecodeBuf<'_>) -> Result<Option<Self::Item>, Status> {
        let bytes = source.copy_to_bytes(source.remaining());
        decode(&bytes[..], bytes.clone()).map(Some).map_err(|failure| failure.to_status())
    }
}

fn decode(bytes: &[u8], message: bytes::Bytes) -> Result<pb::ListFilesResponse, Failure> {
    let bad = |why: String| Failure::peer_misbehaved(format!("ListFiles: {why}"));
    let count = fields::count(bytes, ENTRIES_FIELD);
    let count = count.ok_or_else(|| bad("what came is no message".to_owned()))?;
    if count > ENTRIES_MAX {
        let text = format!("{count} entries in one message, at most {ENTRIES_MAX} are allowed");
        return Err(bad(text));
    }
    pb::ListFilesResponse::decode(message).map_err(|e| bad(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards memory: 512 KiB of empty entries would be 50 MiB. Without the count they are decoded.
    #[test]
    fn a_message_of_countless_entries_is_refused_before_it_is_decoded() {
        let empty = |count| [0x0a, 0].repeat(count);
        let failure = decode(&empty(ENTRIES_MAX + 1), bytes::Bytes::new()).unwrap_err();
        assert_eq!(failure.reason, "PEER_MISBEHAVED");
        assert!(failure.message.contains("16385 entries in one message"), "{failure}");
        let bytes = bytes::Bytes::from(empty(ENTRIES_MAX));
        assert_eq!(decode(&bytes, bytes.clone()).unwrap().entries.len(), ENTRIES_MAX);
        let failure = decode(b"\x0a\x07", bytes::Bytes::new()).unwrap_err();
        assert_eq!(failure.reason, "PEER_MISBEHAVED");
    }
}
