//! Donors that send what no right donor sends. Each ends in a typed error, nothing is written outside
//! of staging, and nothing is left.
//!
//! Guarded mechanisms, each seen to fail its cases when it was taken out: the order check of
//! `ListReceiver::push`, the CRC-32C of `check_chunk`, the coverage check of `UnitWriter::check`. Paths
//! are refused twice, by `RelativePath::new` (guarded by its own test) and as lying in no listed
//! directory: with either one taken out, the other still refuses them.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::{os::unix::fs::MetadataExt as _, path::Path, sync::Arc};

use marcot_proto::{
    common::v1::{Codec, Failure, Stage},
    donor::v1::{Chunk, Extent, FileEntry, RangeFailure, Totals, read_ranges_response::Frame},
    recipient::v1::State,
};
use marcot_tests::{
    Recipient, clone_and_wait, clone_error,
    hostile::{Behaviour, CONTENT, chunk, directory, end, file, symlink},
    new_directory, recipient, tree,
};

struct Victim {
    home: tempfile::TempDir,
    daemon: Recipient,
    before: Vec<String>,
}

impl Victim {
    fn new(options: &[&str]) -> Self {
        let home = new_directory();
        std::fs::write(home.path().join("canary"), "sings").unwrap();
        std::fs::create_dir(home.path().join("beside")).unwrap();
        let daemon = Recipient::start(home.path(), options);
        let before = everything(home.path());
        Self { home, daemon, before }
    }

    fn target(&self) -> std::path::PathBuf {
        self.home.path().join("copy")
    }

    fn statement(&self, donor: std::net::SocketAddr) -> String {
        format!(
            "CLONE INSTANCE FROM 'u'@'127.0.0.1':{} IDENTIFIED BY '' DATA DIRECTORY = '{}' \
             REQUIRE NO SSL",
            donor.port(),
            self.target().display()
        )
    }

    /// The failure that `behaviour` ends in; asserts that nothing is left of it.
    async fn fails(&self, name: &str, behaviour: Behaviour) -> Failure {
        let donor = behaviour.serve().await;
        let mut client = recipient(&self.daemon).await;
        let failure = clone_error(&mut client, &self.statement(donor)).await;
        assert_eq!(everything(self.home.path()), self.before, "{name} left something");
        let canary = std::fs::read_to_string(self.home.path().join("canary")).unwrap();
        assert_eq!(canary, "sings", "{name}");
        failure
    }

    /// All bytes were right, and what else came is of no effect.
    async fn completes(&self, name: &str, behaviour: Behaviour) {
        let donor = behaviour.serve().await;
        let mut client = recipient(&self.daemon).await;
        let clone = clone_and_wait(&mut client, &self.statement(donor)).await;
        assert_eq!(clone.state(), State::Completed, "{name}: {clone:?}");
        assert_eq!(std::fs::read(self.target().join("file")).unwrap(), CONTENT, "{name}");
        std::fs::remove_dir_all(self.target()).unwrap();
        assert_eq!(everything(self.home.path()), self.before, "{name} left something");
    }
}

/// All names below a directory, but for the recipient's own history and log.
fn everything(home: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut left = vec![home.to_owned()];
    while let Some(directory) = left.pop() {
        for name in tree::names(&directory) {
            let path = directory.join(&name);
            if name == "state" || name.ends_with(".log") {
                continue;
            }
            if path.symlink_metadata().unwrap().is_dir() {
                left.push(path.clone());
            }
            names.push(path.display().to_string());
        }
    }
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn an_honest_donor_that_is_not_ours_is_cloned() {
    let victim = Victim::new(&[]);
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
    let victim = Victim::new(&[]);
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
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_list_ends_at_the_bound_in_constant_memory() {
    let victim = Victim::new(&["--entries-max", "300000"]);
    let rss = victim.daemon.0.peak_rss_bytes();
    let endless = Behaviour {
        list: Arc::new(|_| {
            Box::new((0..1_000_000_000).map(|n| file(n, format!("{n:012}").as_bytes(), 0)))
        }),
        ..Behaviour::honest()
    };
    let failure = victim.fails("endless", endless).await;
    assert_eq!(failure.reason, "LIST_LIMIT", "{failure:?}");
    let grown = victim.daemon.0.peak_rss_bytes() - rss;
    assert!(grown <= 32 << 20, "the recipient grew by {grown} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_bytes_end_in_a_typed_error_or_are_of_no_effect() {
    let victim = Victim::new(&[]);
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
}

#[tokio::test(flavor = "multi_thread")]
async fn stages_that_never_end_or_go_back_are_bounded() {
    let victim = Victim::new(&[]);
    let back = Behaviour { advance: Arc::new(|_| (Stage::FileCopy, 1)), ..Behaviour::honest() };
    assert_eq!(victim.fails("the same again", back).await.reason, "PEER_MISBEHAVED");
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
    let failure = victim.fails("for ever", for_ever).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    assert!(failure.message.contains("more than 64 rounds"), "{failure:?}");

    // A file that can never be read, and is not listed again.
    let vanished = marcot_common::failure::Failure::new(
        tonic::Code::NotFound,
        "FILE_VANISHED",
        "it was here a moment ago",
    );
    let frames = vec![
        Frame::Failure(RangeFailure { range: 0, file_id: 1, failure: Some(vanished.to_wire()) }),
        end(1, 0),
    ];
    let failure = victim.fails("vanished for good", Behaviour::reading(frames)).await;
    assert_eq!(failure.reason, "PEER_MISBEHAVED", "{failure:?}");
    assert!(failure.message.contains("was not listed again"), "{failure:?}");
}

/// Guards the stall limit of AdvanceStage: a donor whose work stands still says so over and over, and
/// is given up within the bound; one that gets on is not, however long it takes. Without the look at
/// its entries the first clone never ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_that_only_says_that_it_works_is_given_up() {
    let victim = Victim::new(&["--stall-timeout", "1s", "--donor-timeout", "2s"]);
    let slow = Behaviour { beats: (30, |n| n), ..Behaviour::honest() };
    victim.completes("gets on for three times the limit", slow).await;
    let stands = Behaviour { beats: (u64::MAX, |_| 7), ..Behaviour::honest() };
    let donor = stands.serve().await;
    let mut client = recipient(&victim.daemon).await;
    let begun = std::time::Instant::now();
    let failure = clone_error(&mut client, &victim.statement(donor)).await;
    assert_eq!(failure.reason, "STALLED", "{failure:?}");
    assert!(failure.message.contains("got no further for 1s"), "{failure:?}");
    let took = begun.elapsed();
    assert!(took < std::time::Duration::from_secs(20), "it took {took:?}");
}
