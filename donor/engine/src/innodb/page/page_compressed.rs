//! Legacy pages of page_compressed tables: a header, and a compressed legacy page.
//!
//! The server gives them no checksum of their own; it finds out when it decompresses, and so does
//! this for zlib, the default. The other algorithms are plugins of the server; to follow them, five
//! libraries would have to read what a damaged page says. Encrypted pages do carry a checksum,
//! which the server writes and does not read.

use miniz_oxide::inflate::{
    TINFLStatus,
    core::{
        DecompressorOxide, decompress,
        inflate_flags::{TINFL_FLAG_PARSE_ZLIB_HEADER, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF},
    },
};

use super::{
    DATA, PAGE_NUMBER, PageError, PageFormat, PageState, SPACE_ID, TYPE,
    bytes::{is_zero, range, u16_at, u32_at, u64_at},
    checksum::{KEY_VERSION, NO_CHECKSUM, innodb_new, legacy_crc32},
    legacy, lsn, valid,
};

const PAGE_COMPRESSED: u16 = 34354;
const PAGE_COMPRESSED_ENCRYPTED: u16 = 37401;

/// Of the compressed bytes, then the algorithm if the page is made to be encrypted.
const SIZE_BYTES: usize = 2;
const ALGORITHM_BYTES: usize = 2;
/// Where pages have it, in 8 bytes, that are not to be encrypted: `FIL_PAGE_COMP_ALGO`.
const ALGORITHM: usize = 26;
/// `PAGE_ZLIB_ALGORITHM`.
const ZLIB: u64 = 1;
/// `PAGE_ALGORITHM_LAST`.
const ALGORITHM_MAX: u64 = 6;

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
    let end = start + found;
    let state = if for_encryption && u32_at(page, KEY_VERSION) != 0 {
        check_encrypted(page, end)?
    } else {
        let algorithm = if for_encryption {
            u64::from(u16_at(page, DATA + SIZE_BYTES))
        } else {
            u64_at(page, ALGORITHM)
        };
        match algorithm {
            ZLIB => check_zlib(page, &page[start..end])?,
            2..=ALGORITHM_MAX => PageState::Unchecked { lsn: lsn(page) },
            found => return Err(PageError::Algorithm { found, limit: ALGORITHM_MAX }),
        }
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

/// What is compressed is a whole page as it would be stored, checksum and header included.
fn check_zlib(page: &[u8], stream: &[u8]) -> Result<PageState, PageError> {
    let mut inside = vec![0; page.len()];
    let flags = TINFL_FLAG_PARSE_ZLIB_HEADER | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (status, read, found) =
        decompress(&mut DecompressorOxide::new(), stream, &mut inside, 0, flags);
    // zlib's own checksum is within; behind it there is nothing.
    if status != TINFLStatus::Done || read != stream.len() {
        return Err(PageError::Stream { stream_bytes: stream.len() });
    }
    if found != page.len() {
        return Err(PageError::Expanded { found, expected: page.len() });
    }
    let state = legacy::check_plain(&inside)?;
    for offset in (PAGE_NUMBER..TYPE).step_by(4).chain([SPACE_ID]) {
        let (found, inside) = (u32_at(page, offset), u32_at(&inside, offset));
        if found != inside {
            return Err(PageError::Header { offset, found, inside });
        }
    }
    Ok(state)
}
