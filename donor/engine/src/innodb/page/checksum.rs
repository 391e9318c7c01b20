//! Checksums of pages, from `buf0checksum.cc` and `page_zip_calc_checksum`.

use super::{DATA, LSN, PAGE_NUMBER, SPACE_ID, TYPE, bytes::range};

/// innodb_checksum_algorithm=none wrote this in place of each checksum, `buf0buf.h`.
pub(super) const NO_CHECKSUM: u32 = 0xDEAD_BEEF;

/// Where the key version is in a legacy page, and a field that old servers wrote late: no
/// checksum covers it.
pub(super) const KEY_VERSION: usize = 26;
/// The trailer of a legacy page: the second checksum, the LSN's lower half.
pub(super) const TRAILER_BYTES: usize = 8;

/// CRC-32C of a legacy page, `buf_calc_page_crc32`.
pub(super) fn legacy_crc32(page: &[u8]) -> u32 {
    let end = page.len().saturating_sub(TRAILER_BYTES);
    crc32c::crc32c(range(page, PAGE_NUMBER..KEY_VERSION)) ^ crc32c::crc32c(range(page, DATA..end))
}

/// CRC-32C of a ROW_FORMAT=COMPRESSED page, `page_zip_calc_checksum`.
pub(super) fn row_format_compressed_crc32(page: &[u8]) -> u32 {
    crc32c::crc32c(range(page, PAGE_NUMBER..LSN))
        ^ crc32c::crc32c(range(page, TYPE..TYPE + 2))
        ^ crc32c::crc32c(range(page, SPACE_ID..page.len()))
}

/// What innodb_checksum_algorithm=innodb wrote into a ROW_FORMAT=COMPRESSED page: Adler-32.
pub(super) fn row_format_compressed_adler32(page: &[u8]) -> u32 {
    let parts = [PAGE_NUMBER..LSN, TYPE..TYPE + 2, SPACE_ID..page.len()];
    let (mut a, mut b) = (1, 0);
    for byte in parts.into_iter().flat_map(|part| range(page, part)) {
        a = (a + u32::from(*byte)) % 65521;
        b = (b + a) % 65521;
    }
    b << 16 | a
}

/// What innodb_checksum_algorithm=innodb wrote at the head, `buf_calc_page_new_checksum`.
pub(super) fn innodb_new(page: &[u8]) -> u32 {
    let end = page.len().saturating_sub(TRAILER_BYTES);
    fold(range(page, PAGE_NUMBER..KEY_VERSION)).wrapping_add(fold(range(page, DATA..end)))
}

/// What innodb_checksum_algorithm=innodb wrote in the trailer, `buf_calc_page_old_checksum`.
pub(super) fn innodb_old(page: &[u8]) -> u32 {
    fold(range(page, 0..KEY_VERSION))
}

/// `ut_fold_binary`, of which only the lower 32 bits are stored; they depend on nothing above.
fn fold(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0_u32, |fold, byte| {
        let byte = u32::from(*byte);
        let mixed = (fold ^ byte ^ 1_653_893_711) << 8;
        (mixed.wrapping_add(fold) ^ 1_463_735_687).wrapping_add(byte)
    })
}
