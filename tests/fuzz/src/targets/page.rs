//! The page check: no panic, no page that is right in two places, no sealed page that is wrong.
//!
//! Input: layout, page number, options, then the page's bytes. Most bytes never pass a checksum, so
//! each page is checked as it is, again with the checksums that a server would write, and compressed
//! as one would compress it.

use marcot_engine::innodb::page::{PageError, PageFormat, PageState, doublewrite_pages, lsn};
use miniz_oxide::deflate::compress_to_vec_zlib;

use crate::put;

/// The parser's files.
pub const FILES: &[&str] = &[
    "donor/engine/src/innodb/page.rs",
    "donor/engine/src/innodb/page/bytes.rs",
    "donor/engine/src/innodb/page/checksum.rs",
    "donor/engine/src/innodb/page/doublewrite.rs",
    "donor/engine/src/innodb/page/format.rs",
    "donor/engine/src/innodb/page/full_crc32.rs",
    "donor/engine/src/innodb/page/legacy.rs",
    "donor/engine/src/innodb/page/mysql.rs",
    "donor/engine/src/innodb/page/page_compressed.rs",
];

/// Of full_crc32 with all page sizes and with compression, of legacy, page_compressed and
/// ROW_FORMAT=COMPRESSED tablespaces.
const FLAGS: [u32; 13] =
    [0x13, 0x14, 0x15, 0x16, 0x17, 0x35, 0, 0x21, 0xe1, 0x1_0021, 0x1_00e1, 0x23, 0x29];
const FULL_CRC32: u32 = 0x10;
const SPACE_ID: u32 = 7;

/// Bytes of a page's header.
const HEADER_BYTES: usize = 38;
const NO_CHECKSUM: u32 = 0xdead_beef;

/// How a page is put right.
mod option {
    pub(super) const ENCRYPTED: u8 = 1;
    pub(super) const COMPRESSED: u8 = 2;
    /// Compressed to be encrypted.
    pub(super) const FOR_ENCRYPTION: u8 = 4;
    /// By a server that writes no checksums.
    pub(super) const NO_CHECKSUM: u8 = 8;
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let _ = PageFormat::from_first_page(data);
    let _ = PageFormat::from_first_page_of_mysql(data);
    let _ = doublewrite_pages(data);
    let _ = lsn(data);
    let [layout, number, options, body @ ..] = data else {
        return;
    };
    if let [a, b, c, d, ..] = *body {
        of_flags(u32::from_be_bytes([a, b, c, d]));
    }
    let number = u32::from(*number) + 1;
    of_mariadb(FLAGS[usize::from(*layout) % FLAGS.len()], number, *options, body);
    of_mysql(*layout, number, *options, body);
}

/// A format by the server's word alone.
fn of_flags(flags: u32) {
    let Ok(format) = PageFormat::of_tablespace(SPACE_ID, flags) else { return };
    let (logical, physical) = (format.logical_page_size(), format.physical_page_size());
    assert!(logical.is_power_of_two() && physical.is_power_of_two());
    assert!((1024..=logical).contains(&physical) && (4096..=1 << 16).contains(&logical));
    assert_eq!((format.space_id(), format.flags()), (SPACE_ID, flags));
    assert!(!format.is_full_crc32() || logical == physical);
    assert!(!format.is_encrypted());
}

fn of_mariadb(flags: u32, number: u32, options: u8, body: &[u8]) {
    let format = format(flags);
    let mut page = page(format.physical_page_size(), body);
    check(&format, &page, number);
    assert_eq!(format.leaves_out_parts(&page), format.is_page_compressed());

    put(&mut page, 4, number);
    put(&mut page, 34, SPACE_ID);
    let compressed = seal(flags, &mut page, options & option::ENCRYPTED != 0);
    let state = check(&format, &page, number);
    assert!(compressed || matches!(state, Some(PageState::Valid { .. })), "a sealed page is right");
    if format.is_full_crc32() || compressed || options & option::ENCRYPTED != 0 {
        return;
    }
    if options & option::NO_CHECKSUM != 0 {
        let mut page = page.clone();
        put(&mut page, 0, NO_CHECKSUM);
        if format.logical_page_size() == format.physical_page_size() {
            let trailer = page.len() - 8;
            put(&mut page, trailer, NO_CHECKSUM);
        }
        let state = check(&format, &page, number);
        assert!(matches!(state, Some(PageState::Unchecked { .. } | PageState::Valid { .. })));
    }
    if options & option::COMPRESSED != 0 && format.logical_page_size() == page.len() {
        page_compressed(&format, &page, number, options & option::FOR_ENCRYPTION != 0);
    }
}

/// What page_compressed makes of a page that is right: the header, and all of it by zlib.
fn page_compressed(format: &PageFormat, page: &[u8], number: u32, for_encryption: bool) {
    let stream = compress_to_vec_zlib(page, 1);
    let mut written = page[..HEADER_BYTES].to_vec();
    put(&mut written, 0, NO_CHECKSUM);
    let page_type = if for_encryption { 37_401_u16 } else { 34_354 };
    written[24..26].copy_from_slice(&page_type.to_be_bytes());
    written[26..34].copy_from_slice(&u64::from(!for_encryption).to_be_bytes());
    written.extend(u16::try_from(stream.len()).unwrap_or(u16::MAX).to_be_bytes());
    if for_encryption {
        written.extend([0, 1]);
    }
    written.extend(stream);
    if !fits(format, &mut written, page.len(), number) {
        return;
    }
    written[16] ^= 1;
    let refused = format.check(&written, number);
    assert!(matches!(refused, Err(PageError::Header { offset: 16, .. })), "{refused:?}");
}

/// Whether a compressed page is no longer than one that is not: then it is filled up, and right.
fn fits(format: &PageFormat, written: &mut Vec<u8>, size: usize, number: u32) -> bool {
    if written.len() > size {
        return false;
    }
    written.resize(size, 0);
    let state = check(format, written, number);
    assert!(matches!(state, Some(PageState::Valid { .. })), "a compressed page is right");
    true
}

/// MySQL's tablespaces, all of which have the dictionary's bit, of 16 KiB, of 4, and compressed.
fn of_mysql(layout: u8, number: u32, options: u8, body: &[u8]) {
    const DICTIONARY: u32 = 0x4000;
    let (flags, size) = [(0x21, 16384), (0xe1, 4096), (0x29, 8192)][usize::from(layout) % 3];
    let mut first = vec![0; size];
    put(&mut first, 34, SPACE_ID);
    put(&mut first, 38, SPACE_ID);
    put(&mut first, 54, flags | DICTIONARY);
    seal(flags, &mut first, false);
    let format =
        PageFormat::from_first_page_of_mysql(&first).expect("a sealed first page is right");
    assert_eq!(format.physical_page_size(), size);
    let mut page = page(size, body);
    check(&format, &page, number);
    put(&mut page, 4, number);
    put(&mut page, 34, SPACE_ID);
    // Whether a page is as it was, or what MySQL has made of it.
    let page_type = u16::from_be_bytes([page[24], page[25]]);
    let is_plain = !matches!(page_type, 14..=17 | 34354 | 37401);
    seal(flags, &mut page, false);
    let state = check(&format, &page, number);
    assert!(!is_plain || matches!(state, Some(PageState::Valid { .. })), "a sealed page is right");
    let leaves_out = format.leaves_out_parts(&page);
    assert!(!leaves_out || matches!(page_type, 14 | 16), "{page_type}");
    if is_plain && options & option::COMPRESSED != 0 && format.logical_page_size() == size {
        compressed_by_mysql(&format, &page, number);
    }
}

/// What MySQL makes of a page that is right: its header, and what follows it by zlib.
fn compressed_by_mysql(format: &PageFormat, page: &[u8], number: u32) {
    let (header, body) = page.split_at(HEADER_BYTES);
    let stream = compress_to_vec_zlib(body, 1);
    let field = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes();
    let mut written = header.to_vec();
    // Version and algorithm, the type that it had, its bytes before and after.
    written[26..28].copy_from_slice(&[1, 1]);
    written[28..30].copy_from_slice(&header[24..26]);
    written[30..32].copy_from_slice(&field(body.len()));
    written[32..34].copy_from_slice(&field(stream.len()));
    written[24..26].copy_from_slice(&[0, 14]);
    written.extend(stream);
    if !fits(format, &mut written, page.len(), number) {
        return;
    }
    assert!(format.leaves_out_parts(&written));
}

/// A page of these bytes, and zeros behind them.
fn page(size: usize, body: &[u8]) -> Vec<u8> {
    let mut page = body[..body.len().min(size)].to_vec();
    page.resize(size, 0);
    page
}

/// The format of a first page with nothing but flags, ids and checksums.
fn format(flags: u32) -> PageFormat {
    let size = match flags {
        flags if flags & FULL_CRC32 != 0 => 512 << (flags & 15),
        0x23 => 1024,
        0x29 => 8192,
        flags if flags & 0xc0 != 0 => 4096,
        _ => 16384,
    };
    let mut first = vec![0; size];
    put(&mut first, 34, SPACE_ID);
    put(&mut first, 38, SPACE_ID);
    put(&mut first, 54, flags);
    seal(flags, &mut first, false);
    let format = PageFormat::from_first_page(&first).expect("a sealed first page is right");
    assert_eq!((format.flags(), format.physical_page_size()), (flags, size));
    format
}

fn check(format: &PageFormat, page: &[u8], number: u32) -> Option<PageState> {
    let state = format.check(page, number).ok()?;
    if state != PageState::Zero {
        assert!(format.check(page, number + 1).is_err(), "the page is right in two places");
    }
    Some(state)
}

/// Puts LSN and checksums where the layout has them. Returns whether it is a page_compressed page,
/// of which more must be right.
fn seal(flags: u32, page: &mut [u8], encrypted: bool) -> bool {
    let end = page.len();
    let page_type = u16::from_be_bytes([page[24], page[25]]);
    let lsn_half = u32::from_be_bytes([page[20], page[21], page[22], page[23]]);
    if flags & FULL_CRC32 != 0 {
        put(page, 0, encrypted.into());
        let size = if page_type & 0x8000 == 0 { end } else { usize::from(page_type & 0x7fff) << 8 };
        if size == 0 || size > end {
            return true;
        }
        if size == end {
            put(page, end - 8, lsn_half);
        }
        let checksum = crc32c::crc32c(&page[..size - 4]);
        put(page, size - 4, checksum);
        return page_type & 0x8000 != 0;
    }
    let row_format_compressed = flags >> 1 & 15 != 0;
    if !row_format_compressed {
        put(page, end - 4, lsn_half);
    }
    let checksum = if row_format_compressed {
        crc32c::crc32c(&page[4..16]) ^ crc32c::crc32c(&page[24..26]) ^ crc32c::crc32c(&page[34..])
    } else {
        crc32c::crc32c(&page[4..26]) ^ crc32c::crc32c(&page[38..end - 8])
    };
    if encrypted {
        put(page, 26, 1);
        put(page, 30, checksum);
        return matches!(page_type, 34354 | 37401) && !row_format_compressed;
    }
    if matches!(page_type, 34354 | 37401) && !row_format_compressed {
        put(page, 0, NO_CHECKSUM);
        return true;
    }
    put(page, 0, checksum);
    if !row_format_compressed {
        put(page, end - 8, checksum);
    }
    false
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    // Of each layout pages of the types that are told apart: plain, page_compressed, with encryption,
    // and in full_crc32 of 256 bytes.
    let mut seeds = Vec::new();
    for layout in 0..13 {
        for page_type in [17_855_u16, 34_354, 37_401, 0x8001, 8] {
            let mut page = vec![0; 120];
            page[24..26].copy_from_slice(&page_type.to_be_bytes());
            // Stored bytes and algorithm, where a page is compressed.
            page[33] = 1;
            page[38..42].copy_from_slice(&[0, 16, 0x78, 0x9c]);
            seeds.push([&[layout, 1, 0][..], &page].concat());
        }
        for options in [option::ENCRYPTED, option::COMPRESSED, option::NO_CHECKSUM, 6] {
            seeds.push([&[layout, 1, options][..], &[7; 90]].concat());
        }
    }
    seeds.extend(seeds_of_compressed_pages());
    seeds.extend(seeds_of_flags());
    seeds.extend(seeds_of_doublewrite_buffers());
    seeds
}

/// Pages that say of what is compressed in them what cannot be.
fn seeds_of_compressed_pages() -> Vec<Vec<u8>> {
    let zeros = compress_to_vec_zlib(&[0; 16_384], 1);
    let few = compress_to_vec_zlib(&[7; 9], 1);
    let whole = compress_to_vec_zlib(&[7; 16_384 - HEADER_BYTES], 1);
    // Of MariaDB: type, algorithm, stored bytes less those of the stream, stream.
    let of_mariadb = |page_type: u16, algorithm: u8, more: usize, stream: &[u8]| {
        let mut page = vec![0; HEADER_BYTES];
        page[24..26].copy_from_slice(&page_type.to_be_bytes());
        page[33] = algorithm;
        let stored = u16::try_from(stream.len() + more).unwrap_or(u16::MAX);
        [&[6, 1, 0][..], &page, &stored.to_be_bytes(), stream].concat()
    };
    // Of MySQL: type, algorithm, bytes before, stored bytes, stream.
    let of_mysql = |page_type: u8, algorithm: u8, before: u16, stored: usize, stream: &[u8]| {
        let mut page = vec![0; HEADER_BYTES];
        page[25] = page_type;
        page[27] = algorithm;
        page[30..32].copy_from_slice(&before.to_be_bytes());
        page[32..34].copy_from_slice(&u16::try_from(stored).unwrap_or(u16::MAX).to_be_bytes());
        [&[0, 1, 0][..], &page, stream].concat()
    };
    let with_algorithm = [&[0, 1][..], &zeros].concat();
    // Encrypted: a key's version, and a checksum that is left out.
    let mut encrypted = of_mariadb(37_401, 0, 0, &with_algorithm);
    encrypted[3 + 29] = 1;
    let mut unchecked = encrypted.clone();
    put(&mut unchecked, 3 + 30, NO_CHECKSUM);
    vec![
        of_mariadb(34_354, 1, 0, &zeros),
        of_mariadb(34_354, 1, 0, &few),
        of_mariadb(34_354, 1, 1, &zeros),
        of_mariadb(34_354, 3, 0, &zeros),
        of_mariadb(34_354, 7, 0, &zeros),
        of_mariadb(34_354, 1, 0, &[]),
        of_mariadb(37_401, 0, 0, &with_algorithm),
        encrypted,
        unchecked,
        of_mysql(14, 1, 16_346, whole.len(), &whole),
        of_mysql(14, 1, 16_346, few.len(), &few),
        of_mysql(14, 1, 16_346, 3, &whole),
        of_mysql(14, 1, 16_345, whole.len(), &whole),
        of_mysql(14, 2, 16_346, whole.len(), &whole),
        of_mysql(14, 3, 16_346, whole.len(), &whole),
        of_mysql(14, 1, 16_346, 0, &whole),
        of_mysql(15, 0, 0, 0, &[]),
        of_mysql(16, 0, 0, 0, &[]),
        [&[2, 1, 0][..], &[0; 24], &[0, 17]].concat(),
    ]
}

/// First pages of no server's flags, and some that are right but for one thing.
fn seeds_of_flags() -> Vec<Vec<u8>> {
    const WRONG: [u32; 17] = [
        0x12, 0x18, 0xf3, 0x800, 0x4000, 0x2_0000, 0x20, 0x40, 0x61, 0x2d, 0x2f, 0x03, 0xa1,
        0x8000, 0x61_0000, 0x2021, 0x4029,
    ];
    let of_flags = |flags: u32| {
        let mut page = vec![0; 1024];
        put(&mut page, 3, flags);
        put(&mut page, 54, flags);
        page
    };
    let first = |space_id: u32, again: u32, number: u32| {
        let mut page = vec![0; 4096];
        put(&mut page, 4, number);
        put(&mut page, 34, space_id);
        put(&mut page, 38, again);
        put(&mut page, 54, 0x13);
        seal(0x13, &mut page, false);
        page
    };
    let mut seeds: Vec<_> = WRONG.map(of_flags).into();
    seeds.extend([
        first(SPACE_ID, SPACE_ID, 0),
        first(SPACE_ID, SPACE_ID + 1, 0),
        first(SPACE_ID, SPACE_ID, 1),
        first(u32::MAX, u32::MAX, 0),
        first(SPACE_ID, SPACE_ID, 0)[..2000].to_vec(),
        vec![0; 4096],
        vec![1; 40],
    ]);
    seeds
}

/// Pages 5 of system tablespaces: the buffer's place is 200 bytes before their end.
fn seeds_of_doublewrite_buffers() -> Vec<Vec<u8>> {
    const MAGIC: u32 = 536_853_855;
    let page = |magic: u32, first: u32, second: u32, again: u32| {
        let mut page = vec![0; 4096];
        for (at, second) in [(4096 - 190, second), (4096 - 178, again)] {
            put(&mut page, at, magic);
            put(&mut page, at + 4, first);
            put(&mut page, at + 8, second);
        }
        page
    };
    vec![
        page(MAGIC, 256, 512, 512),
        page(MAGIC, 256, 512, 513),
        page(MAGIC, 255, 512, 512),
        page(MAGIC, 256, u32::MAX, u32::MAX),
        page(1, 256, 512, 512),
        page(0, 256, 512, 512),
    ]
}
