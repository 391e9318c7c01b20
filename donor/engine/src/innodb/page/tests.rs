//! What no server of today writes, and what nothing writes. Pages of servers are in
//! `tests/tests/pages`.

use proptest::prelude::*;

use super::{
    checksum::{KEY_VERSION, NO_CHECKSUM, legacy_crc32, row_format_compressed_crc32},
    *,
};

const PAGE: usize = 16384;
const LEGACY_16K: u32 = 0;
const FULL_CRC32_16K: u32 = 0x15;
const ROW_FORMAT_COMPRESSED_8K: u32 = 0b10_1001;

fn put(page: &mut [u8], offset: usize, value: u32) {
    page[offset..offset + 4].copy_from_slice(&value.to_be_bytes());
}

/// A page of space 7 with some content, all but its checksums.
fn page(flags: u32, number: u32) -> Vec<u8> {
    let mut page: Vec<u8> = (0..PAGE).map(|i| (i * 7 % 251) as u8).collect();
    page[..DATA].fill(0);
    put(&mut page, PAGE_NUMBER, number);
    put(&mut page, LSN, 1);
    put(&mut page, LSN + 4, 0x1234_5678);
    put(&mut page, SPACE_ID, 7);
    if number == 0 {
        put(&mut page, DATA, 7);
        put(&mut page, DATA + 16, flags);
    }
    put(&mut page, PAGE - 8, 0);
    put(&mut page, PAGE - 4, 0x1234_5678);
    page
}

fn sealed_full_crc32(number: u32) -> Vec<u8> {
    let mut page = page(FULL_CRC32_16K, number);
    put(&mut page, PAGE - 8, 0x1234_5678);
    let checksum = crc32c::crc32c(&page[..PAGE - 4]);
    put(&mut page, PAGE - 4, checksum);
    page
}

fn sealed_legacy(flags: u32, number: u32) -> Vec<u8> {
    let mut page = page(flags, number);
    let checksum = legacy_crc32(&page);
    put(&mut page, 0, checksum);
    put(&mut page, PAGE - 8, checksum);
    page
}

fn legacy() -> PageFormat {
    PageFormat::from_first_page(&sealed_legacy(LEGACY_16K, 0)).unwrap()
}

/// As page 5 is written whose content is `inside`.
fn page_compressed(inside: &[u8]) -> Vec<u8> {
    let stream = miniz_oxide::deflate::compress_to_vec_zlib(inside, 6);
    let mut page = vec![0; PAGE];
    page[..DATA].copy_from_slice(&sealed_legacy(LEGACY_16K, 5)[..DATA]);
    put(&mut page, 0, NO_CHECKSUM);
    page[TYPE..TYPE + 2].copy_from_slice(&34354_u16.to_be_bytes());
    put(&mut page, KEY_VERSION + 4, 1);
    page[DATA..DATA + 2].copy_from_slice(&u16::try_from(stream.len()).unwrap().to_be_bytes());
    page[DATA + 2..][..stream.len()].copy_from_slice(&stream);
    page
}

fn row_format_compressed() -> PageFormat {
    let mut first = page(ROW_FORMAT_COMPRESSED_8K, 0);
    first.truncate(8192);
    let checksum = row_format_compressed_crc32(&first);
    put(&mut first, 0, checksum);
    PageFormat::from_first_page(&first).unwrap()
}

const VALID: Result<PageState, PageError> = Ok(PageState::Valid { lsn: 0x1_1234_5678 });
const UNCHECKED: Result<PageState, PageError> = Ok(PageState::Unchecked { lsn: 0x1_1234_5678 });

#[test]
fn a_full_crc32_page_names_what_is_wrong() {
    let format = PageFormat::from_first_page(&sealed_full_crc32(0)).unwrap();
    assert_eq!((format.space_id(), format.flags()), (7, FULL_CRC32_16K));
    let good = sealed_full_crc32(5);
    assert_eq!(format.check(&good, 5), VALID);
    assert_eq!(format.check(&good, 6), Err(PageError::Number { found: 5, expected: 6 }));
    assert_eq!(
        format.check(&good[1..], 5),
        Err(PageError::Length { found: PAGE - 1, expected: PAGE })
    );
    let mut damaged = good.clone();
    damaged[100] ^= 1;
    let computed = crc32c::crc32c(&damaged[..PAGE - 4]);
    let stored = crc32c::crc32c(&good[..PAGE - 4]);
    assert_eq!(format.check(&damaged, 5), Err(PageError::Checksum { stored, computed }));
    assert_eq!(format.check(&[0; PAGE], 5), Ok(PageState::Zero));
    let mut torn_before_it_was_summed = good;
    put(&mut torn_before_it_was_summed, PAGE - 8, 1);
    let checksum = crc32c::crc32c(&torn_before_it_was_summed[..PAGE - 4]);
    put(&mut torn_before_it_was_summed, PAGE - 4, checksum);
    let error = PageError::Torn { head: 0x1234_5678, tail: 1 };
    assert_eq!(format.check(&torn_before_it_was_summed, 5), Err(error));
}

/// A size that holds no header makes the server read before the page.
#[test]
fn a_full_crc32_page_of_an_impossible_size_is_refused() {
    let format = PageFormat::from_first_page(&sealed_full_crc32(0)).unwrap();
    for (found, marked) in [(0, 0x8000_u16), (PAGE, 0x8040), (0x7f_ff00, 0xffff)] {
        let mut page = sealed_full_crc32(5);
        page[TYPE..TYPE + 2].copy_from_slice(&marked.to_be_bytes());
        assert_eq!(format.check(&page, 5), Err(PageError::StoredSize { found, limit: PAGE - 256 }));
    }
}

/// innodb_checksum_algorithm=innodb was the rule once, and such pages stay until they change. The
/// numbers come from the server's formulas in 64-bit integers, computed in another language.
#[test]
fn checksums_of_old_servers_are_known() {
    let (new, old) = (0x598c_c9f3, 0x50f2_f2c7);
    let mut page = page(LEGACY_16K, 5);
    put(&mut page, 0, new);
    // The oldest servers had the LSN's upper half for a second checksum.
    for second in [old, 1] {
        put(&mut page, PAGE - 8, second);
        assert_eq!(legacy().check(&page, 5), VALID, "{second:#x}");
    }
    for (first, second) in [(new, new), (new ^ 1, old), (0, 1), (NO_CHECKSUM, old)] {
        put(&mut page, 0, first);
        put(&mut page, PAGE - 8, second);
        let computed = legacy_crc32(&page);
        let error = PageError::Checksum { stored: first, computed };
        assert_eq!(legacy().check(&page, 5), Err(error), "{first:#x} {second:#x}");
    }
    let format = row_format_compressed();
    page.truncate(8192);
    for (checksum, result) in [
        (0x13b8_8ad3, VALID),
        (row_format_compressed_crc32(&page), VALID),
        (NO_CHECKSUM, UNCHECKED),
    ] {
        put(&mut page, 0, checksum);
        assert_eq!(format.check(&page, 5), result, "{checksum:#x}");
    }
}

/// innodb_checksum_algorithm=none: the server takes such pages unless it is told to be strict.
#[test]
fn a_page_without_a_checksum_is_unchecked_and_still_has_its_place() {
    let mut page = page(LEGACY_16K, 5);
    put(&mut page, 0, NO_CHECKSUM);
    put(&mut page, PAGE - 8, NO_CHECKSUM);
    assert_eq!(legacy().check(&page, 5), UNCHECKED);
    assert_eq!(legacy().check(&page, 6), Err(PageError::Number { found: 5, expected: 6 }));
    put(&mut page, SPACE_ID, 8);
    assert_eq!(legacy().check(&page, 5), Err(PageError::Space { found: 8, expected: 7 }));
    put(&mut page, PAGE - 4, 1);
    assert_eq!(legacy().check(&page, 5), Err(PageError::Torn { head: 0x1234_5678, tail: 1 }));
}

/// An LSN in the first page of each system file, an R-tree's split number: where encrypted pages
/// have their key version, others have what no checksum covers.
#[test]
fn a_plain_page_may_have_anything_for_a_key_version() {
    for (number, page_type) in [(0, 8), (5, 17855), (5, 17854)] {
        let mut page = page(LEGACY_16K, number);
        page[TYPE..TYPE + 2].copy_from_slice(&u16::to_be_bytes(page_type));
        let checksum = legacy_crc32(&page);
        put(&mut page, 0, checksum);
        put(&mut page, PAGE - 8, checksum);
        page[KEY_VERSION..KEY_VERSION + 8].fill(0xff);
        assert_eq!(legacy().check(&page, number), VALID, "{number} {page_type}");
    }
    let mut zero_but_lsn = [0; PAGE];
    zero_but_lsn[KEY_VERSION..KEY_VERSION + 8].fill(1);
    assert_eq!(legacy().check(&zero_but_lsn, 0), Ok(PageState::Zero));
    assert_eq!(PageFormat::from_first_page(&zero_but_lsn), Err(FormatError::ZeroPage));
}

/// Where no holes can be punched, what an earlier write left stands behind a compressed page.
#[test]
fn what_stands_behind_a_compressed_page_is_not_looked_at() {
    let mut page = page(LEGACY_16K, 5);
    page[TYPE..TYPE + 2].copy_from_slice(&37401_u16.to_be_bytes());
    put(&mut page, 0, NO_CHECKSUM);
    put(&mut page, KEY_VERSION, 1);
    page[DATA..DATA + 2].copy_from_slice(&100_u16.to_be_bytes());
    let end = DATA + 4 + 100;
    let mut written = page.clone();
    written[end..].fill(0);
    put(&mut page, KEY_VERSION + 4, legacy_crc32(&written));
    assert_eq!(legacy().check(&page, 5), VALID);
    page[end - 1] ^= 1;
    assert!(matches!(legacy().check(&page, 5), Err(PageError::Checksum { .. })));
}

/// Of a compression that is not zlib only header and place can be told.
#[test]
fn a_page_compressed_by_a_plugin_is_unchecked() {
    let mut page = page(LEGACY_16K, 5);
    page[TYPE..TYPE + 2].copy_from_slice(&34354_u16.to_be_bytes());
    put(&mut page, 0, NO_CHECKSUM);
    page[DATA..DATA + 2].copy_from_slice(&100_u16.to_be_bytes());
    for algorithm in 2..=6 {
        put(&mut page, KEY_VERSION + 4, algorithm);
        assert_eq!(legacy().check(&page, 5), UNCHECKED);
    }
    for found in [0, 7] {
        put(&mut page, KEY_VERSION + 4, found);
        let found = u64::from(found);
        assert_eq!(legacy().check(&page, 5), Err(PageError::Algorithm { found, limit: 6 }));
    }
    put(&mut page, KEY_VERSION + 4, 1);
    assert_eq!(legacy().check(&page, 5), Err(PageError::Stream { stream_bytes: 100 }));
    page[DATA..DATA + 2].fill(0xff);
    assert_eq!(
        legacy().check(&page, 5),
        Err(PageError::StoredSize { found: 0xffff, limit: PAGE - 40 })
    );
}

/// What is compressed must be the page whose header stands before it.
#[test]
fn a_compressed_page_that_holds_another_is_refused() {
    let whole = sealed_legacy(LEGACY_16K, 5);
    assert_eq!(legacy().check(&page_compressed(&whole), 5), VALID);
    let found = PAGE - 1;
    assert_eq!(
        legacy().check(&page_compressed(&whole[1..]), 5),
        Err(PageError::Expanded { found, expected: PAGE })
    );
    assert_eq!(
        legacy().check(&page_compressed(&sealed_legacy(LEGACY_16K, 6)), 5),
        Err(PageError::Header { offset: PAGE_NUMBER, found: 5, inside: 6 })
    );
    let mut damaged = whole;
    damaged[100] ^= 1;
    assert!(matches!(
        legacy().check(&page_compressed(&damaged), 5),
        Err(PageError::Checksum { .. })
    ));
}

/// Flags decide how all else is read, so every field is held against what servers write.
#[test]
fn flags_of_other_servers_are_refused() {
    let flags = |flags| {
        let mut first = page(flags, 0);
        first.resize(65536, 0);
        PageFormat::from_first_page(&first)
    };
    // MySQL 8.0: dictionary in the file; 5.7: encrypted.
    for (value, bits) in [(0x4021, 0x4000), (0x2021, 0x2000)] {
        assert_eq!(flags(value), Err(FormatError::MySql { flags: value, bits }));
    }
    for (value, field, wrong) in [
        (0x12, "page size", 2),
        (0x18, "page size", 8),
        (0x15 | 7 << 5, "compression algorithm", 7),
        (0x15 | 1 << 16, "compression algorithm", 1 << 11),
        (1 << 17, "the part above bit 16", 1),
        (0x20, "the row format", 0x20),
        (5 << 6, "page size", 5),
        (0b10_1001 | 3 << 6, "compressed page size", 4),
        (0b0_1001, "the row format of compressed pages", 1),
    ] {
        let error = FormatError::Flags { flags: value, field, value: wrong };
        assert_eq!(flags(value), Err(error), "{value:#x}");
    }
}

#[test]
fn a_first_page_of_two_ids_is_refused() {
    let sealed = |page_id, header_id| {
        let mut first = page(LEGACY_16K, 0);
        put(&mut first, SPACE_ID, page_id);
        put(&mut first, DATA, header_id);
        let checksum = legacy_crc32(&first);
        put(&mut first, 0, checksum);
        put(&mut first, PAGE - 8, checksum);
        PageFormat::from_first_page(&first)
    };
    assert!(sealed(7, 7).is_ok());
    let error = PageError::Space { found: 7, expected: 8 };
    assert_eq!(sealed(7, 8), Err(FormatError::Page(error)));
    let (found, limit) = (0xffff_fffe, 0xffff_fff0);
    assert_eq!(sealed(found, found), Err(FormatError::SpaceIdLimit { found, limit }));
}

#[test]
fn the_doublewrite_buffer_is_where_page_5_says() {
    let mut page = vec![0; 4096];
    assert_eq!(doublewrite_pages(&page), Ok([0..0, 0..0]));
    for (offset, value) in [(0, 536_853_855), (4, 256), (8, 512)] {
        put(&mut page, 4096 - 190 + offset, value);
        put(&mut page, 4096 - 178 + offset, value);
    }
    assert_eq!(doublewrite_pages(&page), Ok([256..512, 512..768]));
    put(&mut page, 4096 - 178 + 4, 257);
    let error = DoublewriteError::Copies { first: 256, second: 257 };
    assert_eq!(doublewrite_pages(&page), Err(error));
    for (first, second) in [(64, 512), (256, 300), (256, u32::MAX)] {
        for copy in [190, 178] {
            put(&mut page, 4096 - copy + 4, first);
            put(&mut page, 4096 - copy + 8, second);
        }
        let error = DoublewriteError::Place { first, second, extent: 256 };
        assert_eq!(doublewrite_pages(&page), Err(error));
    }
    put(&mut page, 4096 - 190, 1);
    assert_eq!(doublewrite_pages(&page), Err(DoublewriteError::Magic { found: 1 }));
    assert_eq!(doublewrite_pages(&[]), Err(DoublewriteError::Length { found: 0 }));
}

/// One core on warm pages; a terabyte goes through here. Run it with
/// `cargo test --release -p marcot-engine --lib check_rates -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement, of release builds"]
fn check_rates() {
    let full_crc32 = PageFormat::from_first_page(&sealed_full_crc32(0)).unwrap();
    let compressed = page_compressed(&sealed_legacy(LEGACY_16K, 5));
    for (name, format, page) in [
        ("full_crc32", full_crc32, sealed_full_crc32(5)),
        ("legacy", legacy(), sealed_legacy(LEGACY_16K, 5)),
        ("legacy page_compressed", legacy(), compressed),
        ("zero", full_crc32, vec![0; PAGE]),
    ] {
        let begin = std::time::Instant::now();
        let mut pages = 0;
        while begin.elapsed().as_millis() < 500 {
            for _ in 0..64 {
                assert!(format.check(std::hint::black_box(&page), 5).is_ok());
            }
            pages += 64;
        }
        let rate = f64::from(pages) * PAGE as f64 / 1_048_576.0 / begin.elapsed().as_secs_f64();
        println!("{name}: {rate:.0} MiB/s");
    }
}

/// Flags of every layout, and any.
fn any_flags() -> impl Strategy<Value = u32> {
    prop_oneof![
        (3..8_u32, 0..7_u32).prop_map(|(size, algorithm)| size | 0x10 | algorithm << 5),
        prop_oneof![Just(0), Just(0x21), Just(0x1_0021), Just(0xe1)],
        (1..6_u32).prop_map(|size| 0x21 | size << 1),
        any::<u32>(),
    ]
}

proptest! {
    /// Goal: no bytes on the donor's disk end the copy by a panic.
    #[test]
    fn arbitrary_bytes_never_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..5000),
        flags in any_flags(),
        page_type in prop_oneof![Just(34354_u16), Just(37401), any::<u16>()],
        no_checksum in any::<bool>(),
        number in any::<u32>(),
    ) {
        let _ = PageFormat::from_first_page(&bytes);
        let _ = doublewrite_pages(&bytes);
        if let Ok(format) = PageFormat::from_flags(flags, 7) {
            bytes.resize(format.physical_page_size(), 1);
            if no_checksum {
                put(&mut bytes, 0, NO_CHECKSUM);
            }
            bytes[TYPE..TYPE + 2].copy_from_slice(&page_type.to_be_bytes());
            let _ = format.check(&bytes, number);
        }
        let _ = lsn(&bytes);
    }
}
