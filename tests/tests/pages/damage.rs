//! Damaged, misplaced and torn pages do not pass (R3).
//!
//! What a check cannot see is listed in `unseen`, and nothing else passes.

use std::{collections::HashMap, ops::Range};

use marcot_engine::innodb::page::{FormatError, PageError, PageFormat, PageState};
use marcot_tests::mariadb::Version;
use miniz_oxide::inflate::decompress_to_vec_zlib;

use crate::made::{ALGORITHMS, Made, Random};

/// Pages of one tablespace that are damaged, from all over it.
const SAMPLE: usize = 12;

/// Calls `test` for servers of both algorithms and three page sizes: with and without
/// ROW_FORMAT=COMPRESSED, extents of either formula.
fn for_all_servers(test: impl Fn(&Made)) {
    for algorithm in ALGORITHMS {
        for page_bytes in [4096, 16384, 65536] {
            let made = Made::new(Version::V10_11, page_bytes, algorithm);
            made.fill();
            test(&made);
        }
    }
}

/// Bytes of a page that no reader without the key looks at, the server included, and the LSN of a
/// ROW_FORMAT=COMPRESSED page, which its checksum leaves out.
fn unseen(format: &PageFormat, page: &[u8], number: u32) -> [Range<usize>; 3] {
    const NONE: Range<usize> = 0..0;
    let u16_at = |at: usize| u16::from_be_bytes([page[at], page[at + 1]]);
    let page_type = u16_at(24);
    let end = page.len();
    if format.is_full_crc32() {
        let size = usize::from(page_type & 0x7fff) << 8;
        return if page_type & 0x8000 != 0 { [size..end, NONE, NONE] } else { [NONE; 3] };
    }
    let encrypted = number != 0 && page[26..30] != [0; 4];
    let row_format_compressed = format.flags() >> 1 & 15 != 0;
    match (row_format_compressed, page_type) {
        (true, _) if encrypted => [0..4, 16..24, 26..30],
        (true, _) => [16..24, 26..34, NONE],
        // Compressed size at 38; page_compressed and encrypted: algorithm behind it.
        (false, 37401) => [26..30, 42 + usize::from(u16_at(38))..end, NONE],
        (false, 34354) => [40 + usize::from(u16_at(38))..end, NONE, NONE],
        (false, _) if encrypted => [0..4, 26..30, end - 8..end - 4],
        (false, _) => [26..34, NONE, NONE],
    }
}

/// Whether two pages differ in nothing but what is unseen in the first.
fn look_alike(format: &PageFormat, page: &[u8], other: &[u8], number: u32) -> bool {
    let (mut page, mut other) = (page.to_vec(), other.to_vec());
    for range in unseen(format, &page.clone(), number) {
        page[range.clone()].fill(0);
        other[range].fill(0);
    }
    page == other
}

/// Whether two legacy page_compressed pages hold the same one: a compressed stream can say the same
/// in many ways, and its last byte may end in bits that say nothing.
fn hold_the_same_page(damaged: &[u8], page: &[u8]) -> bool {
    let inside = |page: &[u8]| {
        let size = usize::from(u16::from_be_bytes([page[38], page[39]]));
        decompress_to_vec_zlib(page.get(40..40 + size)?).ok()
    };
    let is_alike = damaged[..40] == page[..40] && page[24..26] == 34354_u16.to_be_bytes();
    is_alike && inside(page).is_some() && inside(damaged) == inside(page)
}

fn sample<'a>(pages: &[(u32, &'a [u8])], random: &mut Random) -> Vec<(u32, &'a [u8])> {
    let step = pages.len() / SAMPLE + 1;
    pages.iter().skip(random.below(step)).step_by(step).copied().collect()
}

/// Goal: no damaged byte is copied.
/// Method: one bit is flipped, in every byte of header and trailer and in bytes all over the page.
/// Guards the checksums, the comparison of both LSNs, and those of a page_compressed page's header.
#[test]
fn a_flipped_bit_is_seen() {
    let random = Random::new();
    for_all_servers(|made| {
        let mut random = random.fork(made.page_bytes());
        let mut flips = 0;
        for tablespace in made.tablespaces() {
            for (number, page) in sample(&tablespace.written(), &mut random) {
                let unseen = unseen(&tablespace.format, page, number);
                let within: Vec<usize> = (0..40).map(|_| random.below(page.len())).collect();
                for byte in (0..44).chain(page.len() - 8..page.len()).chain(within) {
                    let mut damaged = page.to_vec();
                    damaged[byte] ^= 1 << random.below(8);
                    let result = tablespace.check(&damaged, number);
                    let is_unseen = unseen.iter().any(|range| range.contains(&byte));
                    let is_unseen = is_unseen || hold_the_same_page(&damaged, page);
                    // A page_compressed page of another algorithm cannot be looked into.
                    let passed = matches!(result, Ok(PageState::Valid { .. } | PageState::Zero));
                    assert_eq!(
                        passed,
                        passed && is_unseen,
                        "{} page {number}, byte {byte}: {result:?}",
                        tablespace.name
                    );
                    flips += 1;
                }
            }
        }
        assert!(flips > 10_000, "{flips}");
    });
}

/// Goal: a sound page in a wrong place is not copied.
/// Method: pages are checked as the next page, and as one of another tablespace of the same layout.
/// Guards the comparisons of page number and tablespace id.
#[test]
fn a_page_of_another_place_is_seen() {
    for_all_servers(|made| {
        let all = made.tablespaces();
        let (mut moved, mut foreign, mut hidden) = (0, 0, 0);
        for tablespace in &all {
            let flags = tablespace.format.flags();
            let other = all.iter().find(|other| {
                other.format.flags() == flags
                    && other.format.space_id() != tablespace.format.space_id()
            });
            for (number, page) in tablespace.written() {
                let result = tablespace.check(page, number + 1);
                let error = PageError::Number { found: number, expected: number + 1 };
                // The first page has more to say about where it is than its number.
                assert!(result == Err(error) || number == 0, "{}: {result:?}", tablespace.name);
                assert!(result.is_err(), "{}: {result:?}", tablespace.name);
                moved += 1;
                let Some(other) = other else {
                    continue;
                };
                let result = other.check(page, number);
                if hides_its_space(&tablespace.format, page) {
                    assert!(result.is_ok(), "{}: {result:?}", tablespace.name);
                    hidden += 1;
                    continue;
                }
                let found = tablespace.format.space_id();
                let expected = other.format.space_id();
                let error = PageError::Space { found, expected };
                assert_eq!(result, Err(error), "{} page {number}", tablespace.name);
                foreign += 1;
            }
        }
        println!("{}: {moved} moved, {foreign} foreign, {hidden} hide it", made.page_bytes());
        assert!(moved > 300 && foreign > 200, "{moved} {foreign}");
    });
}

/// A full_crc32 page that is encrypted or compressed has its tablespace's id in what is.
fn hides_its_space(format: &PageFormat, page: &[u8]) -> bool {
    format.is_full_crc32() && (page[0..4] != [0; 4] || page[24] & 0x80 != 0)
}

/// Goal: a page met in the middle of a write is not copied.
/// Method: all rows are changed; of every page that was there before and after, the head of one
/// and the tail of the other are put together, at each sector (512 bytes up to 4 KiB, else 4 KiB).
/// Guards checksums and LSNs. A page whose two halves differ in nothing that is seen is not torn.
#[test]
fn a_torn_page_is_seen() {
    let random = Random::new();
    for_all_servers(|made| {
        let mut random = random.fork(made.page_bytes());
        let old = made.tablespaces();
        made.change();
        let new = made.tablespaces();
        let mut torn_pages = 0;
        for (old, new) in old.iter().zip(&new) {
            assert_eq!((&old.name, old.format), (&new.name, new.format));
            let before: HashMap<_, _> = old.written().into_iter().collect();
            let changed: Vec<_> = new
                .written()
                .into_iter()
                .filter(|(number, page)| before.get(number).is_some_and(|old| old != page))
                .collect();
            for (number, after) in sample(&changed, &mut random) {
                let before = before[&number];
                let sector = if after.len() <= 4096 { 512 } else { 4096 };
                for at in (sector..after.len()).step_by(sector) {
                    for (head, tail) in [(before, after), (after, before)] {
                        let torn = [&head[..at], &tail[at..]].concat();
                        let is_whole = look_alike(&new.format, head, &torn, number)
                            || look_alike(&new.format, tail, &torn, number);
                        let result = new.check(&torn, number);
                        assert_eq!(
                            result.is_ok(),
                            is_whole,
                            "{} page {number} at {at}: {result:?}",
                            new.name
                        );
                        torn_pages += u32::from(!is_whole);
                    }
                }
            }
        }
        println!("{}: {torn_pages} torn pages", made.page_bytes());
        assert!(torn_pages > 500, "{torn_pages}");
    });
}

/// Goal: a tablespace is never read by flags or an id that are wrong.
/// Method: every bit of the first page's flags and ids is flipped, and the first page cut short.
/// Guards that page 0 is checked before it is believed.
#[test]
fn a_damaged_first_page_tells_no_format() {
    for_all_servers(|made| {
        for tablespace in made.tablespaces().iter().filter(|tablespace| tablespace.first == 0) {
            let page = tablespace.written()[0].1;
            assert_eq!(PageFormat::from_first_page(page), Ok(tablespace.format));
            for bit in (34 * 8..42 * 8).chain(54 * 8..58 * 8) {
                let mut damaged = page.to_vec();
                damaged[bit / 8] ^= 0x80 >> (bit % 8);
                let result = PageFormat::from_first_page(&damaged);
                assert!(result.is_err(), "{} bit {bit}: {result:?}", tablespace.name);
            }
            let short = PageFormat::from_first_page(&page[..page.len() - 1]);
            let (found, needed) = (page.len() - 1, page.len());
            assert_eq!(short, Err(FormatError::Short { found, needed }));
            let zero = PageFormat::from_first_page(&vec![0; page.len()]);
            assert_eq!(zero, Err(FormatError::ZeroPage));
        }
    });
}
