//! Donors that send what no right donor sends. Each ends in a typed error, nothing is written outside
//! of staging, and nothing is left.
//!
//! Guarded mechanisms, each seen to fail its cases when it was taken out: the order check of
//! `ListReceiver::push`, the CRC-32C of `check_chunk`, the coverage check of `UnitWriter::check`. Paths
//! are refused twice, by `RelativePath::new` (guarded by its own test) and as lying in no listed
//! directory: with either one taken out, the other still refuses them.

use std::{os::unix::fs::MetadataExt as _, sync::Arc};

use marcot_proto::{
    common::v1::{Codec, Stage},
    donor::v1::{
        Chunk, Extent, FileEntry, OpenSnapshotResponse, RangeFailure, ServerPlugin, Totals,
        read_ranges_response::Frame,
    },
    recipient::v1::State,
};
use marcot_tests::{
    Beside, clone_and_wait,
    hostile::{Behaviour, CONTENT, chunk, directory, end, failed, file, symlink},
    recipient,
};

use crate::victim::Victim;

#[tokio::test(flavor = "multi_thread")]
async fn an_honest_donor_that_is_not_ours_is_cloned() {
    let victim = Victim::start(&[]).await;
    let mut behaviour = Behaviour::listing(vec![FileEntry {
        mode: 0o6755,
        ..file(0, b"file", CONTENT.len() as u64)
    }]);
    behaviour.totals = None;
    let donor = behaviour.serve().await;
    let mut client = recipient(&victim.daemon).await;
    let clone = clone_and_wait(&mut client, &victim.statement(donor)).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let copy = victim.target().join("file");
    assert_eq!(std::fs::read(&copy).unwrap(), CONTENT);
    // Setuid and setgid never travel, whoever asks for them.
    assert_eq!(copy.metadata().unwrap().mode() & 0o7777, 0o755);
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_lists_end_in_a_typed_error_and_write_nothing() {
    let victim = Victim::start(&[]).await;
    let beside = Beside::start().await;
    let f = |number, path: &[u8]| file(number, path, 0);
    let with = |entry: FileEntry, spoil: fn(&mut FileEntry)| {
        let mut entry = entry;
        spoil(&mut entry);
        vec![entry]
    };
    let lists: Vec<(&str, Vec<FileEntry>)> = vec![
        ("parent", vec![f(0, b"../canary")]),
        ("deep parent", vec![directory(0, b"a"), f(1, b"a/../../canary")]),
        ("absolute", vec![f(0, b"/tmp/marcot-hostile")]),
        ("NUL", vec![f(0, b"a\0b")]),
        ("empty path", vec![f(0, b"")]),
        ("dot", vec![f(0, b"./a")]),
        ("endless name", vec![f(0, &[b'x'; 256])]),
        ("absolute link", vec![symlink(0, b"link", b"/etc")]),
        ("climbing link", vec![symlink(0, b"link", b"../beside")]),
        ("below a link", vec![directory(0, b"a"), symlink(1, b"b", b"a"), f(2, b"b/x")]),
        ("below a file", vec![f(0, b"a"), f(1, b"a/x")]),
        ("orphan", vec![f(0, b"no/x")]),
        ("duplicate", vec![f(0, b"a"), f(1, b"a")]),
        ("descending", vec![f(0, b"b"), f(1, b"a")]),
        ("gap in numbers", vec![f(0, b"a"), f(2, b"b")]),
        ("no id", with(f(0, b"a"), |e| e.file_id = 0)),
        ("no type", with(f(0, b"a"), |e| e.r#type = 0)),
        ("unknown type", with(f(0, b"a"), |e| e.r#type = 77)),
        ("no change", with(f(0, b"a"), |e| e.change = 0)),
        ("removal in a first round", with(f(0, b"a"), |e| e.change = 5)),
        ("huge size", with(f(0, b"a"), |e| e.size_bytes = u64::MAX)),
        (
            "link to nothing",
            with(f(0, b"a"), |e| {
                e.r#type = 4;
                e.link_file_id = 99;
            }),
        ),
        (
            "security attribute",
            with(f(0, b"a"), |e| {
                e.extended_attributes.push(marcot_proto::donor::v1::ExtendedAttribute {
                    name: b"security.capability".to_vec().into(),
                    value: b"\x01".to_vec().into(),
                });
            }),
        ),
    ];
    for (name, entries) in lists {
        let failure = victim.fails(name, Behaviour::listing(entries)).await;
        assert_eq!(failure.reason, "PEER_MISBEHAVED", "{name}: {failure:?}");
        assert_eq!(failure.error_number, 3863, "{name}");
    }
    // A first round's entries lie in listed directories; a later one's in what is staged.
    let later = Behaviour {
        list: Arc::new(|round| {
            let entries = match round {
                1 => vec![directory(0, b"a"), symlink(1, b"b", b"a")],
                _ => vec![FileEntry { file_id: 9, ..file(0, b"b/x", CONTENT.len() as u64) }],
            };
            Box::new(entries.into_iter())
        }),
        advance: Arc::new(|n| if n == 0 { (Stage::FileCopy, 2) } else { (Stage::Done, 1) }),
        ..Behaviour::honest()
    };
    let failure = victim.fails("below a link, later", later).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    let wrong = Behaviour {
        totals: Some(Totals { entries: 7, ..Totals::default() }),
        ..Behaviour::honest()
    };
    assert_eq!(victim.fails("wrong totals", wrong).await.reason, "PEER_MISBEHAVED");
    let changed = Behaviour { entries_crc32c: Some(1), ..Behaviour::honest() };
    assert_eq!(victim.fails("wrong checksum", changed).await.reason, "MESSAGE_CORRUPT");
    beside.assert_completed().await;
}

/// Guards what is told before a list: counts that no disk holds, names that would fill logs, answers that
/// would fill memory once they are decoded.
#[tokio::test(flavor = "multi_thread")]
async fn hostile_answers_about_a_server_or_a_snapshot_end_in_a_typed_error() {
    let victim = Victim::start(&[]).await;
    let beside = Beside::start().await;
    let opened: [(&str, fn(&mut OpenSnapshotResponse), &str); 4] = [
        (
            "an estimate of all bytes there can be",
            |o| {
                let size_bytes = u64::MAX;
                o.estimate =
                    Some(Totals { size_bytes, allocated_bytes: u64::MAX, ..Totals::default() });
            },
            "DISK_SPACE",
        ),
        ("no name", |o| o.snapshot.clear(), "PEER_MISBEHAVED"),
        ("a name without an end", |o| o.snapshot = "x".repeat(200_000), "PEER_MISBEHAVED"),
        (
            "countless engines",
            |o| o.storage_engines = vec![String::new(); 1 << 20],
            "PEER_MISBEHAVED",
        ),
    ];
    for (name, spoil, reason) in opened {
        let behaviour = Behaviour { opened: spoil, ..Behaviour::honest() };
        let failure = victim.fails(name, behaviour).await;
        assert_eq!(failure.reason, reason, "{name}: {failure:?}");
    }
    let countless = Behaviour {
        info: |info| info.collations = vec![String::new(); 1 << 20],
        ..Behaviour::honest()
    };
    let failure = victim.fails("countless collations", countless).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    // In 512 KiB there is room for what is small on the wire only.
    let many = Behaviour {
        info: |info| info.server_plugins = vec![ServerPlugin::default(); 170_000],
        ..Behaviour::honest()
    };
    let failure = victim.fails("many plugins", many).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    beside.assert_completed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_bytes_end_in_a_typed_error_or_are_of_no_effect() {
    let victim = Victim::start(&[]).await;
    let beside = Beside::start().await;
    let length = CONTENT.len() as u64;
    let good = || chunk(1, 0, CONTENT);
    let spoiled = |spoil: fn(&mut Chunk)| {
        let mut chunk = chunk(1, 0, CONTENT);
        spoil(&mut chunk);
        vec![Frame::Chunk(chunk), end(1, CONTENT.len() as u64)]
    };
    let bomb = zstd::bulk::compress(&vec![0; 100 << 20], 1).unwrap();
    let bomb = Chunk {
        codec: Codec::Zstd.into(),
        raw_length: 1 << 20,
        extents: vec![Extent {
            file_id: 1,
            offset: 0,
            length: 1 << 20,
            hole: false,
            unchanged: false,
        }],
        payload: bomb.into(),
        ..good()
    };
    let cases: Vec<(&str, Vec<Frame>, &str)> = vec![
        ("wrong checksum", spoiled(|c| c.crc32c ^= 1), "CHUNK_CORRUPT"),
        (
            "flipped bit",
            spoiled(|c| c.payload = b"honest contenu".to_vec().into()),
            "CHUNK_CORRUPT",
        ),
        ("wrong round", spoiled(|c| c.round = 2), "PEER_MISBEHAVED"),
        ("wrong stage", spoiled(|c| c.stage = Stage::RedoCopy.into()), "PEER_MISBEHAVED"),
        ("no codec", spoiled(|c| c.codec = 0), "PEER_MISBEHAVED"),
        ("unknown codec", spoiled(|c| c.codec = 9), "PEER_MISBEHAVED"),
        ("wrong length", spoiled(|c| c.raw_length += 1), "PEER_MISBEHAVED"),
        ("other file", spoiled(|c| c.extents[0].file_id = 2), "PEER_MISBEHAVED"),
        ("other offset", spoiled(|c| c.extents[0].offset = 1), "PEER_MISBEHAVED"),
        (
            "empty extent",
            spoiled(|c| c.extents.insert(0, Extent { file_id: 1, ..Default::default() })),
            "PEER_MISBEHAVED",
        ),
        ("hole over all", spoiled(|c| c.extents[0].hole = true), "PEER_MISBEHAVED"),
        (
            "endless hole",
            spoiled(|c| {
                c.extents = vec![Extent {
                    file_id: 1,
                    offset: 0,
                    length: u64::MAX,
                    hole: true,
                    unchanged: false,
                }];
                c.raw_length = 0;
                c.payload.clear();
                c.crc32c = 0;
            }),
            "PEER_MISBEHAVED",
        ),
        ("chunk of nothing", vec![Frame::Chunk(Chunk::default()), end(1, 0)], "BAD_STAGE"),
        (
            "empty chunk",
            spoiled(|c| {
                c.extents.clear();
                c.raw_length = 0;
                c.payload.clear();
                c.crc32c = 0;
            }),
            "PEER_MISBEHAVED",
        ),
        (
            "failure of a range that was not asked for",
            vec![failed(7, 1), end(1, 0)],
            "PEER_MISBEHAVED",
        ),
        ("failure of another file", vec![failed(0, 9), end(1, 0)], "PEER_MISBEHAVED"),
        ("two failures of a range", vec![failed(0, 1), failed(0, 1), end(1, 0)], "PEER_MISBEHAVED"),
        ("bomb", vec![Frame::Chunk(bomb), end(1, 1 << 20)], "PEER_MISBEHAVED"),
        ("no zstd", spoiled(|c| c.codec = Codec::Zstd.into()), "PEER_MISBEHAVED"),
        ("nothing", vec![], "PEER_MISBEHAVED"),
        ("never a byte", vec![end(0, 0)], "PEER_MISBEHAVED"),
        ("huge message", spoiled(|c| c.payload = vec![0; 5 << 20].into()), "PEER_MISBEHAVED"),
        (
            "failure of nothing",
            vec![Frame::Failure(RangeFailure::default()), end(1, 0)],
            "PEER_MISBEHAVED",
        ),
    ];
    for (name, frames, reason) in cases {
        let failure = victim.fails(name, Behaviour::reading(frames)).await;
        assert_eq!(failure.reason, reason, "{name}: {failure:?}");
    }
    // A call that goes wrong after its last byte was cut, and nothing is left to be asked for.
    for (name, frames) in [
        ("no end", vec![Frame::Chunk(good())]),
        ("twice", vec![Frame::Chunk(good()), Frame::Chunk(good()), end(1, 2 * length)]),
        ("after the end", vec![Frame::Chunk(good()), end(1, length), Frame::Chunk(good())]),
        ("wrong count", vec![Frame::Chunk(good()), end(1, length + 1)]),
    ] {
        victim.completes(name, Behaviour::reading(frames)).await;
    }
    beside.assert_completed().await;
}
