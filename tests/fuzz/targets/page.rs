//! The page check: no panic, no page that is right in two places, no sealed page that is wrong.
//!
//! Input: layout, page number, options, then the page's bytes. Most bytes never pass a checksum, so
//! each page is checked as it is, and again with the checksums that a server would write.

#![no_main]

use libfuzzer_sys::fuzz_target;
use marcot_fuzz::{
    innodb::page::{PageFormat, PageState, doublewrite_pages, lsn},
    put,
};

/// Of full_crc32 with all page sizes and with compression, of legacy, page_compressed and
/// ROW_FORMAT=COMPRESSED tablespaces.
const FLAGS: [u32; 13] =
    [0x13, 0x14, 0x15, 0x16, 0x17, 0x35, 0, 0x21, 0xe1, 0x1_0021, 0x1_00e1, 0x23, 0x29];
const FULL_CRC32: u32 = 0x10;
const SPACE_ID: u32 = 7;

fuzz_target!(|data: &[u8]| {
    let _ = PageFormat::from_first_page(data);
    let _ = PageFormat::from_first_page_of_mysql(data);
    of_mysql(data);
    let _ = doublewrite_pages(data);
    let _ = lsn(data);
    let [layout, number, options, body @ ..] = data else {
        return;
    };
    let flags = FLAGS[usize::from(*layout) % FLAGS.len()];
    let format = format(flags);
    let number = u32::from(*number) + 1;
    let mut page = vec![0; format.physical_page_size()];
    let length = body.len().min(page.len());
    page[..length].copy_from_slice(&body[..length]);
    check(&format, &page, number);

    put(&mut page, 4, number);
    put(&mut page, 34, SPACE_ID);
    let encrypted = options & 1 != 0;
    let compressed = seal(flags, &mut page, encrypted);
    let state = check(&format, &page, number);
    assert!(compressed || matches!(state, Some(PageState::Valid { .. })), "a sealed page is right");
});

/// MySQL's tablespaces, all of which have the dictionary's bit, of 16 KiB, of 4, and compressed.
fn of_mysql(data: &[u8]) {
    const DICTIONARY: u32 = 0x4000;
    let [layout, number, body @ ..] = data else { return };
    let (flags, size) = [(0x21, 16384), (0xe1, 4096), (0x29, 8192)][usize::from(*layout) % 3];
    let mut first = vec![0; size];
    put(&mut first, 34, SPACE_ID);
    put(&mut first, 38, SPACE_ID);
    put(&mut first, 54, flags | DICTIONARY);
    seal(flags, &mut first, false);
    let format =
        PageFormat::from_first_page_of_mysql(&first).expect("a sealed first page is right");
    assert_eq!(format.physical_page_size(), size);
    let number = u32::from(*number) + 1;
    let mut page = vec![0; size];
    let length = body.len().min(size);
    page[..length].copy_from_slice(&body[..length]);
    check(&format, &page, number);
    put(&mut page, 4, number);
    put(&mut page, 34, SPACE_ID);
    let page_type = u16::from_be_bytes([page[24], page[25]]);
    seal(flags, &mut page, false);
    let state = check(&format, &page, number);
    let is_plain = !matches!(page_type, 14..=17 | 34354 | 37401);
    assert!(!is_plain || matches!(state, Some(PageState::Valid { .. })), "a sealed page is right");
    let _ = format.leaves_out_parts(&page);
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
        put(page, 0, 0xdead_beef);
        return true;
    }
    put(page, 0, checksum);
    if !row_format_compressed {
        put(page, end - 8, checksum);
    }
    false
}
