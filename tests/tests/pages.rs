//! The page check on pages of real servers, of every kind: all are right as they are, and any
//! change of one is found.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::path::{Path, PathBuf};

use marcot_engine::innodb::page::{FormatError, PageFormat, PageState, doublewrite_pages};
use marcot_tests::{
    mariadb::{self, MariaDb, Options, Version},
    new_directory,
};

/// Tables whose pages are laid out differently; those that a page size does not allow are passed
/// over by the server with an error that `start` ignores.
const TABLES: &str = "CREATE DATABASE d; USE d; SET SESSION innodb_strict_mode=0;
CREATE TABLE plain (id INT PRIMARY KEY, v TEXT, KEY (v(20)));
CREATE TABLE redundant (id INT PRIMARY KEY, v TEXT) ROW_FORMAT=REDUNDANT;
CREATE TABLE zip1 (id INT PRIMARY KEY, v TEXT) ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=1;
CREATE TABLE zip4 (id INT PRIMARY KEY, v TEXT) ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=4;
CREATE TABLE zip16 (id INT PRIMARY KEY, v TEXT) ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=16;
CREATE TABLE sparse (id INT PRIMARY KEY, v TEXT) PAGE_COMPRESSED=1;
CREATE TABLE long_columns (id INT PRIMARY KEY, v LONGTEXT);
INSERT INTO plain SELECT seq, REPEAT(MD5(seq), 6) FROM mysql.seq_1_to_2000;
INSERT INTO redundant SELECT * FROM plain; INSERT INTO zip1 SELECT * FROM plain;
INSERT INTO zip4 SELECT * FROM plain; INSERT INTO zip16 SELECT * FROM plain;
INSERT INTO sparse SELECT id, REPEAT('ab', 300) FROM plain;
INSERT INTO long_columns SELECT id, REPEAT(v, 300) FROM plain WHERE id < 20;
DELETE FROM plain WHERE id % 3 = 0; UPDATE zip4 SET v = REVERSE(v);";

struct Tablespace {
    path: PathBuf,
    format: PageFormat,
    bytes: Vec<u8>,
    empty: [std::ops::Range<u32>; 2],
}

impl Tablespace {
    fn pages(&self) -> impl Iterator<Item = (u32, &[u8])> {
        let pages = self.bytes.chunks_exact(self.format.physical_page_size());
        (0..).zip(pages).filter(|(number, _)| !self.empty.iter().any(|r| r.contains(number)))
    }
}

/// All tablespaces of a stopped server with such arguments.
fn tablespaces(home: &Path, arguments: &[&str]) -> Vec<Tablespace> {
    let keys = home.join("keys");
    let key = "1;a7addd9adea9978fda19f21e6be987880e68ac92632ca052e5bb42b1a506939a\n";
    std::fs::write(&keys, key).unwrap();
    let data = home.join("data");
    let arguments: Vec<String> = arguments
        .iter()
        .map(|argument| argument.replace("{keys}", &keys.display().to_string()))
        .chain(["--innodb-undo-tablespaces=2".to_owned()])
        .collect();
    let options = Options { version: Version::V10_11, arguments, ..Options::default() };
    mariadb::install_with(&data, &options);
    let server = MariaDb::start_with(home, &data, &options);
    for statement in TABLES.split_inclusive(';') {
        // KEY_BLOCK_SIZE is not to be had with large pages.
        drop(
            server.try_query(
                &format!("USE mysql; {statement}")
                    .replace("USE mysql; CREATE DATABASE", "CREATE DATABASE")
                    .replace("USE mysql;", "USE d;"),
            ),
        );
    }
    assert!(server.query("SELECT COUNT(*) FROM d.plain").trim() == "1334");
    server.stop();
    let mut found = Vec::new();
    for directory in [data.clone(), data.join("mysql"), data.join("d")] {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if !(name == "ibdata1" || name.starts_with("undo") || name.ends_with(".ibd")) {
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            let format = PageFormat::from_first_page(&bytes)
                .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let mut empty = [0..0, 0..0];
            if name == "ibdata1" {
                let page = format.physical_page_size();
                empty = doublewrite_pages(&bytes[5 * page..6 * page]).unwrap();
                assert!(!empty[0].is_empty(), "a server has a doublewrite buffer by default");
            }
            found.push(Tablespace { path, format, bytes, empty });
        }
    }
    found
}

/// A generator for places to change; any will do.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(self.0 >> 33).unwrap() % n
    }
}

/// Bytes of a page that no checksum covers, which the server does not look at either: a full_crc32
/// page_compressed page ends before its frame does; older checksums leave out LSN and key version
/// of ROW_FORMAT=COMPRESSED and FILE_FLUSH_LSN of all pages, and page_compressed pages have none.
fn is_covered(space: &Tablespace, page: &[u8], at: usize) -> bool {
    let kind = u16::from_be_bytes([page[24], page[25]]);
    if space.format.is_full_crc32() {
        let is_compressed = kind & 0x8000 != 0;
        return !is_compressed || at < usize::from(kind & 0x7fff) << 8;
    }
    if space.format.logical_page_size() != space.format.physical_page_size()
        || space.format.flags() >> 1 & 15 != 0
    {
        // An encrypted page's first checksum is that of what it was before.
        let is_encrypted = page[26..30] != [0; 4];
        let left_out = (16..24).contains(&at) || (26..34).contains(&at);
        return !(left_out || is_encrypted && at < 4);
    }
    let is_compressed = space.format.is_page_compressed() && matches!(kind, 34354 | 37401);
    let is_encrypted = page[26..30] != [0; 4];
    let end = page.len();
    !is_compressed && !(26..34).contains(&at) && !(is_encrypted && (at < 4 || at >= end - 8))
}

fn every_change_is_found(spaces: &[Tablespace]) {
    let mut random = Random(1);
    let (mut flips, mut tears, mut moves) = (0, 0, 0);
    for space in spaces {
        let shown = space.path.display();
        let pages: Vec<(u32, &[u8])> = space.pages().collect();
        let mut last: Option<&[u8]> = None;
        for &(number, page) in &pages {
            let state = space.format.check(page, number);
            let state = state.unwrap_or_else(|e| panic!("{shown}, page {number}: {e}"));
            if state == PageState::Zero {
                continue;
            }
            for _ in 0..4 {
                let (at, bit) = (random.below(page.len()), random.below(8));
                let mut changed = page.to_vec();
                changed[at] ^= 1 << bit;
                if is_covered(space, page, at) {
                    flips += 1;
                    let found = space.format.check(&changed, number);
                    assert!(found.is_err(), "{shown}, page {number}: bit {bit} of byte {at}");
                }
            }
            let moved = space.format.check(page, number + 1).unwrap_err();
            assert!(
                moved.to_string().contains("it was read as page"),
                "{shown}, page {number}: {moved}"
            );
            moves += 1;
            let has_sum = matches!(state, PageState::Valid { .. });
            if let Some(last) = last.filter(|_| has_sum && page.len() >= 4096) {
                for cut in [512, page.len() / 2, page.len() - 512] {
                    let mut torn = page.to_vec();
                    torn[cut..].copy_from_slice(&last[cut..]);
                    if torn != page
                        && (cut..page.len())
                            .any(|at| torn[at] != page[at] && is_covered(space, page, at))
                    {
                        tears += 1;
                        let found = space.format.check(&torn, number);
                        assert!(found.is_err(), "{shown}, page {number} torn at {cut}");
                    }
                }
            }
            last = Some(page);
        }
        if let Some(other) = spaces.iter().find(|other| {
            other.format.flags() == space.format.flags()
                && other.format.space_id() != space.format.space_id()
        }) {
            let foreign = other.pages().filter(|(n, _)| *n > 3).find_map(|(n, page)| {
                let is_plain = page[..4] == [0; 4] && page[24] & 0x80 == 0;
                let told = is_plain || !space.format.is_full_crc32();
                (told && page.iter().any(|&b| b != 0)).then_some((n, page))
            });
            if let Some((number, page)) = foreign {
                let found = space.format.check(page, number).unwrap_err();
                assert!(found.to_string().contains("of tablespace"), "{shown}: {found}");
            }
        }
    }
    assert!(
        flips > 500 && tears > 50 && moves > 200,
        "{flips} flips, {tears} tears, {moves} moves"
    );
    eprintln!("{} tablespaces, {flips} flips, {tears} tears, {moves} moves", spaces.len());
}

/// Guards the checks of checksum, page number and space id, for each kind of page: without each of
/// the three, its part fails.
#[test]
fn pages_of_every_kind_are_right_and_every_change_of_them_is_found() {
    for arguments in [
        &[][..],
        &["--innodb-page-size=4k"],
        &["--innodb-page-size=64k"],
        &["--innodb-checksum-algorithm=crc32"],
        &[
            "--plugin-load-add=file_key_management",
            "--file-key-management-filename={keys}",
            "--innodb-encrypt-tables=FORCE",
        ],
        &[
            "--plugin-load-add=file_key_management",
            "--file-key-management-filename={keys}",
            "--innodb-encrypt-tables=FORCE",
            "--innodb-checksum-algorithm=crc32",
        ],
    ] {
        eprintln!("{arguments:?}");
        let home = new_directory();
        every_change_is_found(&tablespaces(home.path(), arguments));
    }
}

#[test]
fn a_first_page_that_tells_nothing_is_a_typed_error() {
    assert_eq!(PageFormat::from_first_page(&[0; 16384]), Err(FormatError::ZeroPage));
    assert!(matches!(PageFormat::from_first_page(&[1; 100]), Err(FormatError::Flags { .. })));
    assert!(matches!(PageFormat::from_first_page(&[1; 20]), Err(FormatError::Short { .. })));
}

proptest::proptest! {
    /// Any bytes at all are an answer.
    #[test]
    fn no_bytes_make_the_page_check_panic(
        mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..9000),
        flags in 0u32..1 << 17,
        number in proptest::num::u32::ANY,
    ) {
        if bytes.len() > 60 {
            bytes[54..58].copy_from_slice(&flags.to_be_bytes());
        }
        if let Ok(format) = PageFormat::from_first_page(&bytes) {
            let page = bytes.get(..format.physical_page_size()).unwrap_or(&bytes);
            proptest::prop_assert!(format.check(page, number).is_ok() == (number == 0));
        }
        proptest::prop_assert!(doublewrite_pages(&bytes).is_err() || bytes.len() >= 4096);
    }
}
