//! Donors that never come to an end: silence, trickles, and streams of nothing. Each is given up within
//! the time that the recipient's settings say.

use std::{sync::Arc, time::Duration};

use marcot_proto::{
    common::v1::Stage,
    donor::v1::{Chunk, FileEntry, ReadRangesRequest, read_ranges_response::Frame},
};
use marcot_tests::{
    Beside, Proxy,
    hostile::{Behaviour, CONTENT, Call, Frames, chunk, end, failed, file},
};

use crate::victim::{END_MAX, Victim};

/// Short times, so that stories end soon. A donor that stalls is found after the first, tried again for
/// the second, and found for the last time after the first once more: some 5 s.
const IMPATIENT: [&str; 6] =
    ["--stall-timeout", "1s", "--donor-timeout", "2s", "--open-timeout", "2s"];

/// Between two pieces of a trickle: nothing is silent for as long as the limit.
const TRICKLE: Duration = Duration::from_millis(100);

/// Longest wait for an answer that needs no work, 30 s, and once more after the first try, or 45 s for one
/// of a log-in; on a loaded machine.
const SILENCE_MAX: Duration = Duration::from_secs(150);

/// Guards memory against lists. Without the bound by `--entries-max` the list has no end.
#[tokio::test(flavor = "multi_thread")]
async fn an_endless_list_ends_at_the_bound_in_constant_memory() {
    let victim = Victim::start(&["--entries-max", "300000"]).await;
    let beside = Beside::start().await;
    let endless = Behaviour {
        list: Arc::new(|_| {
            Box::new((0..1_000_000_000).map(|n| file(n, format!("{n:012}").as_bytes(), 0)))
        }),
        ..Behaviour::honest()
    };
    let failure = victim.fails_within("endless", endless, Duration::from_secs(300)).await;
    assert_eq!(failure.reason, "LIST_LIMIT", "{failure:?}");
    beside.assert_completed().await;
}

/// Guards the log-in, and each call, against a donor that takes it and never answers: keepalive finds a
/// live connection. Without the limits of `in_time`, `call` and `Pulse` the clones do not end.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_never_answered_is_given_up() {
    let beside = Beside::start().await;
    let silent = async |call, reason| {
        let victim = Victim::start(&IMPATIENT).await;
        let behaviour = Behaviour { silent: Some(call), ..Behaviour::honest() };
        let failure = victim.fails_within("silence", behaviour, SILENCE_MAX).await;
        assert_eq!(failure.reason, reason, "{call:?}: {failure:?}");
    };
    tokio::join!(
        silent(Call::LogIn, "LOG_IN_TIMEOUT"),
        silent(Call::Info, "DONOR_TIMEOUT"),
        silent(Call::Open, "DONOR_TIMEOUT"),
        silent(Call::List, "STALLED"),
        silent(Call::Read, "STALLED"),
        silent(Call::Advance, "DONOR_TIMEOUT"),
    );
    beside.assert_completed().await;
}

/// Guards clones against a donor that answers all that they need, and neither renewals nor the end: what is
/// asked beside the copy is given up as well, and the copy is right. Without the limit of `call` the clone
/// waits for the answer to its last call.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_or_a_close_that_is_never_answered_holds_no_clone_up() {
    let beside = Beside::start().await;
    let silent = async |call, trickle| {
        let victim = Victim::start(&[]).await;
        let honest = Behaviour::honest();
        let behaviour = Behaviour { silent: Some(call), trickle, ..honest };
        victim.completes_within("silence", behaviour, SILENCE_MAX).await;
        victim.daemon.0.log()
    };
    let (renewed, closed) = tokio::join!(
        // Long enough for a renewal that is given up.
        silent(Call::Renew, Duration::from_secs(12)),
        silent(Call::Close, Duration::ZERO),
    );
    assert!(renewed.contains("lease was not renewed"), "{renewed}");
    assert!(closed.contains("snapshot was not closed"), "{closed}");
    beside.assert_completed().await;
}

fn mebibyte() -> FileEntry {
    file(0, b"file", 1 << 20)
}

/// Frames that answer a request's first range byte by byte; `count` of them, then the end.
fn bytes_of(request: &ReadRangesRequest, count: u64) -> Frames {
    let (file_id, from) = (request.ranges[0].file_id, request.ranges[0].offset);
    let bytes = (from..from + count).map(move |at| Frame::Chunk(chunk(file_id, at, b"x")));
    Box::new(bytes.chain([end(0, count)]))
}

/// Guards against donors that always send something: with the limit counted from the last message, and
/// patience from the last byte, none of these clones ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_trickle_is_a_stall() {
    let victim = Victim::start(&IMPATIENT).await;
    let beside = Beside::start().await;
    let list = |count: u64| -> Vec<FileEntry> {
        (0..count).map(|n| file(n, format!("{n:06}").as_bytes(), 0)).collect()
    };
    let entries = Behaviour { page: 1, trickle: TRICKLE, ..Behaviour::listing(list(10_000)) };
    let bytes = Behaviour {
        read: Arc::new(|request| bytes_of(request, 1 << 20)),
        trickle: TRICKLE,
        ..Behaviour::listing(vec![mebibyte()])
    };
    let calls = Behaviour { read: Arc::new(|request| bytes_of(request, 1)), ..bytes.clone() };
    for (name, trickle) in [("entries", entries), ("bytes", bytes), ("a byte a call", calls)] {
        let failure = victim.fails(name, trickle).await;
        assert_eq!(failure.reason, "STALLED", "{name}: {failure:?}");
        assert!(failure.message.contains("at least 65536 must"), "{name}: {failure:?}");
    }
    // One message, whose bytes trickle.
    let whole = Behaviour {
        read: Arc::new(|_| {
            let bytes = vec![7; 1 << 20];
            Box::new([Frame::Chunk(chunk(1, 0, &bytes)), end(1, 1 << 20)].into_iter())
        }),
        ..Behaviour::listing(vec![mebibyte()])
    };
    let proxy = Proxy::start(whole.serve().await);
    proxy.limit(Some(20 << 10));
    let failure = victim.fails_on("a slow network", proxy.address(), END_MAX).await;
    assert_eq!(failure.reason, "STALLED", "{failure:?}");
    beside.assert_completed().await;
}

/// Guards the stall limit of streams while the redo log flows, which is no progress of the copy: with it
/// counted as one (`follow`) the file that trickles is waited for without an end.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_flows_does_not_hide_a_stream_that_stalls() {
    let victim = Victim::start(&IMPATIENT).await;
    let beside = Beside::start().await;
    let log = FileEntry { growing: true, ..file(0, b"file", 0) };
    let behaviour = Behaviour {
        read: Arc::new(|request| {
            let (file_id, from) = (request.ranges[0].file_id, request.ranges[0].offset);
            if file_id == 2 {
                return bytes_of(request, 1 << 20);
            }
            let some = vec![7; 256 << 10];
            Box::new(
                [Frame::Chunk(chunk(file_id, from, &some)), end(0, some.len() as u64)].into_iter(),
            )
        }),
        trickle: TRICKLE,
        ..Behaviour::listing(vec![log, file(1, b"other", 1 << 20)])
    };
    let failure = victim.fails("a log that flows", behaviour).await;
    assert_eq!(failure.reason, "STALLED", "{failure:?}");
    assert!(failure.message.contains("at least 65536 must"), "{failure:?}");
    beside.assert_completed().await;
}

/// Guards what is passed over without being written. Each of these streams has no end: without the
/// refusal of empty messages and chunks, or the time of what is wrong, its clone has none either. That
/// a range fails once is checked twice, by `check_failed` and by `UnitWriter::give_up`.
#[tokio::test(flavor = "multi_thread")]
async fn streams_of_nothing_end_in_a_typed_error() {
    let victim = Victim::start(&[]).await;
    let beside = Beside::start().await;
    let for_ever =
        |frame: Frame| Behaviour::reading_by(move |_| Box::new(std::iter::repeat(frame.clone())));
    let empty = Chunk { extents: Vec::new(), ..chunk(1, 0, b"") };
    let failure = victim.fails("failures", for_ever(failed(0, 1))).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    let failure = victim.fails("empty chunks", for_ever(Frame::Chunk(empty))).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    let behaviour = Behaviour { empty_messages: u64::MAX, ..Behaviour::honest() };
    let failure = victim.fails("empty messages of a list", behaviour).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    assert!(failure.message.contains("without an entry"), "{failure:?}");
    // A right byte, then a wrong one, in call after call.
    let spoilt = Behaviour {
        read: Arc::new(|request| {
            let Some(Frame::Chunk(right)) = bytes_of(request, 1).next() else { unreachable!() };
            let mut wrong = right.clone();
            wrong.extents[0].offset += 1;
            wrong.crc32c ^= 1;
            Box::new([Frame::Chunk(right), Frame::Chunk(wrong)].into_iter())
        }),
        ..Behaviour::listing(vec![mebibyte()])
    };
    let failure = victim.fails("right and wrong by turns", spoilt).await;
    assert_eq!(failure.reason, "CHUNK_CORRUPT", "{failure:?}");
    beside.assert_completed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stages_that_never_end_or_go_back_are_bounded() {
    let victim = Victim::start(&[]).await;
    let beside = Beside::start().await;
    let back = Behaviour { advance: Arc::new(|_| (Stage::FileCopy, 1)), ..Behaviour::honest() };
    let failure = victim.fails("the same again", back).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    assert!(failure.message.contains("the donor went from"), "{failure:?}");
    let unknown =
        Behaviour { advance: Arc::new(|_| (Stage::Unspecified, 1)), ..Behaviour::honest() };
    assert_eq!(victim.fails("no stage", unknown).await.reason, "BAD_STAGE");
    let for_ever = Behaviour {
        list: Arc::new(|round| {
            let change = if round == 1 { 1 } else { 2 };
            let entry = FileEntry { change, ..file(0, b"file", CONTENT.len() as u64) };
            Box::new(std::iter::once(entry))
        }),
        advance: Arc::new(|n| (Stage::FileCopy, n + 2)),
        ..Behaviour::honest()
    };
    // Each round is made durable: ten syncs, beside whatever else writes to this disk.
    let failure = victim.fails_within("for ever", for_ever, Duration::from_secs(240)).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    assert!(failure.message.contains("more than 64 rounds"), "{failure:?}");

    // A file that can never be read, and is not listed again.
    let failure = victim.fails("vanished", Behaviour::reading(vec![failed(0, 1), end(1, 0)])).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    assert!(failure.message.contains("was not listed again"), "{failure:?}");
    beside.assert_completed().await;
}

/// Guards the stall limit of AdvanceStage: a donor whose work stands still says so over and over, and
/// is given up within the bound; one that gets on is not, however long it takes. Without the look at
/// its entries the first clone never ends. One that moves to and fro is given up for its words.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_that_only_says_that_it_works_is_given_up() {
    let victim = Victim::start(&IMPATIENT).await;
    let beside = Beside::start().await;
    let slow = Behaviour { beats: (30, |n| n), ..Behaviour::honest() };
    victim.completes("gets on for three times the limit", slow).await;
    let stands = Behaviour { beats: (u64::MAX, |_| 7), ..Behaviour::honest() };
    let failure = victim.fails("stands still", stands).await;
    assert_eq!(failure.reason, "STALLED", "{failure:?}");
    assert!(failure.message.contains("got no further for 1s"), "{failure:?}");
    let to_and_fro =
        Behaviour { beats: (u64::MAX, |n| n % 2), beat: Duration::ZERO, ..Behaviour::honest() };
    // Half a million of words, as fast as a loaded machine sends them.
    let failure = victim.fails_within("to and fro", to_and_fro, Duration::from_secs(300)).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    assert!(failure.message.contains("more than 500000 words"), "{failure:?}");
    beside.assert_completed().await;
}
