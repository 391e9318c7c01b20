//! Pages of tablespaces that are not full_crc32: those of older servers, of
//! innodb_checksum_algorithm=crc32, and all of ROW_FORMAT=COMPRESSED.
//!
//! Whether a page is encrypted is told by the page alone. Page 0 says it too, but on disk it may
//! be older or younger than other pages: encryption threads run beside the copy.
//!
//! The server's non-strict settings, the default among them, accept more than is accepted here:
//! it also takes a page whose first checksum is zero, as servers before MySQL 4.0.14 wrote it.

use super::{
    DATA, LSN, PageError, PageFormat, PageState, TYPE,
    bytes::{is_zero, range, u16_at, u32_at},
    checksum::{
        KEY_VERSION, NO_CHECKSUM, TRAILER_BYTES, innodb_new, innodb_old, legacy_crc32,
        row_format_compressed_adler32, row_format_compressed_crc32,
    },
    lsn, page_compressed, valid,
};

/// Checksum of the encrypted bytes.
const ENCRYPTED_CHECKSUM: usize = KEY_VERSION + 4;
/// End of key version and encrypted checksum.
const KEY_VERSION_END: usize = KEY_VERSION + 8;

/// `buf_page_is_corrupted`, second part, and `fil_space_verify_crypt_checksum`.
pub(super) fn check(format: &PageFormat, page: &[u8], number: u32) -> Result<PageState, PageError> {
    let checksum = page.len() - TRAILER_BYTES;
    if u32_at(page, 0) == 0 && u32_at(page, checksum) == 0 && is_zero_but_key_version(page) {
        return Ok(PageState::Zero);
    }
    let page_type = u16_at(page, TYPE);
    if number != 0 && page_compressed::is_page_compressed(page_type) {
        return page_compressed::check(format, page, page_type, number);
    }
    // The trailer is never encrypted.
    check_trailer(page)?;
    let state = if is_encrypted(page) { valid(page) } else { check_checksums(page)? };
    format.check_number(page, number)?;
    format.check_space_id(page)?;
    Ok(state)
}

/// `page_zip_verify_checksum`. The layout has no trailer.
pub(super) fn check_row_format_compressed(
    format: &PageFormat,
    page: &[u8],
    number: u32,
) -> Result<PageState, PageError> {
    if u32_at(page, 0) == 0 && is_zero(page) {
        return Ok(PageState::Zero);
    }
    let computed = row_format_compressed_crc32(page);
    let is_right = |stored| stored == computed || stored == row_format_compressed_adler32(page);
    let stored = u32_at(page, 0);
    let encrypted = has_key_version(page) && is_right(u32_at(page, ENCRYPTED_CHECKSUM));
    let state = if encrypted || is_right(stored) {
        valid(page)
    } else if stored == NO_CHECKSUM {
        PageState::Unchecked { lsn: lsn(page) }
    } else {
        return Err(PageError::Checksum { stored, computed });
    };
    format.check_number(page, number)?;
    format.check_space_id(page)?;
    Ok(state)
}

/// Others have something there too: an R-tree's page its split number, the first page of an old
/// system file an LSN. No checksum covers it.
fn has_key_version(page: &[u8]) -> bool {
    u32_at(page, KEY_VERSION) != 0
}

fn is_encrypted(page: &[u8]) -> bool {
    let stored = u32_at(page, ENCRYPTED_CHECKSUM);
    has_key_version(page) && (stored == legacy_crc32(page) || stored == innodb_new(page))
}

/// A page as it is in memory: neither encrypted nor page_compressed.
pub(super) fn check_plain(page: &[u8]) -> Result<PageState, PageError> {
    check_trailer(page)?;
    check_checksums(page)
}

fn check_trailer(page: &[u8]) -> Result<(), PageError> {
    let (head, tail) = (u32_at(page, LSN + 4), u32_at(page, page.len() - 4));
    if head != tail {
        return Err(PageError::Torn { head, tail });
    }
    Ok(())
}

fn check_checksums(page: &[u8]) -> Result<PageState, PageError> {
    let (head, tail) = (u32_at(page, 0), u32_at(page, page.len() - TRAILER_BYTES));
    let crc32 = legacy_crc32(page);
    if head == crc32 && tail == crc32 {
        return Ok(valid(page));
    }
    if head == NO_CHECKSUM && tail == NO_CHECKSUM {
        return Ok(PageState::Unchecked { lsn: lsn(page) });
    }
    // The oldest servers had the LSN's upper half in the trailer.
    if head == innodb_new(page) && (tail == innodb_old(page) || tail == u32_at(page, LSN)) {
        return Ok(valid(page));
    }
    let stored = if head == crc32 { tail } else { head };
    Err(PageError::Checksum { stored, computed: crc32 })
}

fn is_zero_but_key_version(page: &[u8]) -> bool {
    is_zero(range(page, 0..KEY_VERSION))
        && is_zero(range(page, KEY_VERSION_END..DATA))
        && is_zero(range(page, DATA..page.len()))
}
