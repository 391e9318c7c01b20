//! Peers whom nobody knows, at what both daemons offer to anyone: health and reflection. Clones go on beside.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use marcot_common::failure::Failure;
use marcot_tests::{Beside, Pair, Watch, beside, clone_and_wait, process::Daemon};
use tonic::{
    Status,
    body::Body,
    transport::{Channel, Endpoint},
};
use tower::{Service as _, ServiceExt as _};

const CHECK: &str = "/grpc.health.v1.Health/Check";
const OPEN_TO_ALL: [&str; 3] = [
    CHECK,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// Calls at one time: what a connection may have.
const STREAMS: usize = 128;

/// `request_body::OPEN_REQUEST_BYTES_MAX`.
const REQUEST_BYTES_MAX: usize = 16 << 10;

/// `request_body::REQUEST_MAX`.
const REQUEST_MAX: Duration = Duration::from_secs(30);

/// Longest that the rest may take on a loaded machine.
const REST_MAX: Duration = Duration::from_secs(60);

/// The end of a call that announces a message, sends some of its bytes, and then nothing any more.
async fn end_of(mut channel: Channel, path: &str, announced: usize, sent: usize) -> Status {
    const PIECE: &[u8] = &[0; 64 << 10];
    let prefix = [&[0][..], &u32::try_from(announced).unwrap().to_be_bytes()].concat();
    let whole = stream::repeat(Bytes::from_static(PIECE)).take(sent / PIECE.len());
    let rest = stream::iter([Bytes::from_static(&PIECE[..sent % PIECE.len()])]);
    let pieces = stream::iter([Bytes::from(prefix)]).chain(whole).chain(rest);
    let frames = pieces.map(|bytes| Ok::<_, Status>(Frame::data(bytes)));
    let request = http::Request::post(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(StreamBody::new(frames.chain(stream::pending()))))
        .unwrap();
    let answer = channel.ready().await.unwrap().call(request).await.unwrap();
    if let Some(status) = Status::from_header_map(answer.headers()) {
        return status;
    }
    let mut body = answer.into_body();
    while let Some(frame) = body.frame().await {
        match frame.map(Frame::into_trailers) {
            Ok(Ok(trailers)) => return Status::from_header_map(&trailers).expect("a status"),
            Ok(Err(_)) => {}
            Err(status) => return status,
        }
    }
    panic!("{path} ended without a status");
}

/// Ends of as many calls at one time as a connection may have.
async fn ends_of(
    daemon: &Daemon,
    paths: &[&'static str],
    announced: usize,
    sent: usize,
) -> Vec<(&'static str, Failure)> {
    let endpoint = Endpoint::from_shared(format!("http://{}", daemon.address)).unwrap();
    let channel = endpoint.connect().await.unwrap();
    let calls = paths.iter().copied().cycle().take(STREAMS).map(|path| {
        let channel = channel.clone();
        async move { (path, Failure::from_status(&end_of(channel, path, announced, sent).await)) }
    });
    let all = futures::future::join_all(calls);
    tokio::time::timeout(REQUEST_MAX + REST_MAX, all).await.expect("every call has an end")
}

/// Reflection ends without a word: its service is tonic's own.
fn assert_reasons(ends: &[(&'static str, Failure)], reason: &str) {
    for (path, failure) in ends.iter().filter(|(path, _)| *path == CHECK) {
        assert_eq!(failure.reason, reason, "{path}: {failure}");
    }
}

async fn harms_nobody(which: impl Fn(&Pair) -> &Daemon) {
    let pair = Pair::start_with(&[], &[], beside::fill).await;
    let first = pair.donor.statement(&pair.home().join("first"), "REQUIRE NO SSL");
    clone_and_wait(&mut pair.client.clone(), &first).await;
    let daemon = which(&pair);
    let watch = Watch::begin(daemon);
    let beside = Beside::of(pair.client.clone(), pair.donor.port(), pair.home());
    for path in OPEN_TO_ALL {
        let ends = ends_of(daemon, &[path], 4 << 20, (4 << 20) - 1).await;
        assert_reasons(&ends, "REQUEST_TOO_LARGE");
    }
    let begun = Instant::now();
    let ends = ends_of(daemon, &OPEN_TO_ALL, REQUEST_BYTES_MAX, REQUEST_BYTES_MAX - 1).await;
    assert_reasons(&ends, "REQUEST_TIMEOUT");
    assert!(begun.elapsed() >= REQUEST_MAX, "{:?}", begun.elapsed());
    beside.assert_completed().await;
    watch.assert_harmless("calls of strangers", REQUEST_MAX + REST_MAX);
}

/// Guards a donor's memory against who has not logged in. Without `RequestBodyLayer` before health and
/// reflection, each of these calls holds 4 MiB, or 16 KiB, for as long as the connection lives.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_hold_next_to_nothing_of_a_donor() {
    harms_nobody(|pair| &pair.donor.0).await;
}

/// The same of a recipient.
#[tokio::test(flavor = "multi_thread")]
async fn strangers_hold_next_to_nothing_of_a_recipient() {
    harms_nobody(|pair| &pair.recipient.0).await;
}
