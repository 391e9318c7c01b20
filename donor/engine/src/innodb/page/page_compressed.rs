//! Legacy pages of page_compressed tables: a header, and a compressed legacy page.
//!
//! The server gives them no checksum of their own; it finds out when it decompresses. The encrypted
//! ones do carry one, which the server writes and does not read.

use super::{
    DATA, PageError, PageFormat, PageState,
    bytes::{is_zero, range, u16_at, u32_at},
    checksum::{KEY_VERSION, NO_CHECKSUM, innodb_new, legacy_crc32},
    lsn, valid,
};

const PAGE_COMPRESSED: u16 = 34354;
const PAGE_COMPRESSED_ENCRYPTED: u16 = 37401;

/// Of the compressed bytes, then the algorithm if the page is made to be encrypted.
const SIZE_BYTES: usize = 2;
const ALGORITHM_BYTES: usize = 2;

/// Whether a page of this type is one. Page 0 of a file never is.
pub(super) fn is_page_compressed(page_type: u16) -> bool {
    matches!(page_type, PAGE_COMPRESSED | PAGE_COMPRESSED_ENCRYPTED)
}

/// `fil_page_decompress_for_non_full_crc32`, up to where it would need the algorithm or the key.
pub(super) fn check(
    format: &PageFormat,
    page: &[u8],
    page_type: u16,
    number: u32,
) -> Result<PageState, PageError> {
    let stored = u32_at(page, 0);
    if stored != NO_CHECKSUM {
        return Err(PageError::Checksum { stored, computed: NO_CHECKSUM });
    }
    let for_encryption = page_type == PAGE_COMPRESSED_ENCRYPTED;
    let start = DATA + SIZE_BYTES + if for_encryption { ALGORITHM_BYTES } else { 0 };
    let found = usize::from(u16_at(page, DATA));
    if found == 0 || found > page.len() - start {
        return Err(PageError::StoredSize { found, limit: page.len() - start });
    }
    let state = if for_encryption && u32_at(page, KEY_VERSION) != 0 {
        check_encrypted(page, start + found)?
    } else {
        PageState::Unchecked { lsn: lsn(page) }
    };
    format.check_number(page, number)?;
    format.check_space_id(page)?;
    Ok(state)
}

/// The checksum that `fil_encrypt_buf_for_non_full_checksum` stores. It is of a page that is zero
/// from `end` on; in the file anything may be there, where holes cannot be punched.
fn check_encrypted(page: &[u8], end: usize) -> Result<PageState, PageError> {
    let stored = u32_at(page, KEY_VERSION + 4);
    let mut computed = legacy_crc32(page);
    if stored == computed {
        return Ok(valid(page));
    }
    if stored == NO_CHECKSUM {
        return Ok(PageState::Unchecked { lsn: lsn(page) });
    }
    let mut written = page.to_vec();
    if !is_zero(range(page, end..page.len())) {
        written[end..].fill(0);
        computed = legacy_crc32(&written);
    }
    if stored != computed && stored != innodb_new(&written) {
        return Err(PageError::Checksum { stored, computed });
    }
    Ok(valid(page))
}
