//! Pages of MySQL 8.0 and later: legacy pages without what MariaDB has put into them, and with what
//! MySQL has.
//!
//! An encrypted page has its checksum encrypted with it: only its number and its space can be
//! checked without the key. Whoever reads such pages must read them until two reads agree.

use miniz_oxide::inflate::{
    TINFLStatus,
    core::{
        DecompressorOxide, decompress,
        inflate_flags::{TINFL_FLAG_PARSE_ZLIB_HEADER, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF},
    },
};

use super::{
    DATA, PageError, PageFormat, PageState, TYPE,
    bytes::{is_zero, range, u16_at, u32_at},
    checksum::TRAILER_BYTES,
    format::{FormatError, Layout},
    legacy, lsn,
};

/// FSP_SPACE_FLAGS, `fsp0types.h`.
mod flag {
    pub(super) const POST_ANTELOPE: u32 = 1;
    pub(super) const ATOMIC_BLOBS: u32 = 1 << 5;
    pub(super) const ENCRYPTION: u32 = 1 << 13;
    /// The first bit that no tablespace has; the one before it says that it has a dictionary (SDI).
    pub(super) const END: u32 = 1 << 15;
}

/// Page types, `fil0fil.h`.
const COMPRESSED: u16 = 14;
const ENCRYPTED: u16 = 15;
const COMPRESSED_AND_ENCRYPTED: u16 = 16;
const ENCRYPTED_RTREE: u16 = 17;

/// In a compressed page, in place of fields that only page 0 has: algorithm, the type that it had,
/// its bytes before and after (`FIL_PAGE_VERSION` and what follows).
const ALGORITHM: usize = 27;
const ORIGINAL_TYPE: usize = 28;
const ORIGINAL_BYTES: usize = 30;
const COMPRESSED_BYTES: usize = 32;

/// `Compression::ZLIB`, and the last algorithm that is known, LZ4.
const ZLIB: u8 = 1;
const ALGORITHM_MAX: u64 = 2;

/// Whether the server may have punched a hole behind what a page was compressed to.
pub(super) fn leaves_out_parts(page: &[u8]) -> bool {
    matches!(u16_at(page, TYPE), COMPRESSED | COMPRESSED_AND_ENCRYPTED)
}

/// `fsp_flags_is_valid`.
pub(super) fn from_flags(flags: u32, space_id: u32) -> Result<PageFormat, FormatError> {
    let wrong = |field, value| FormatError::MySqlFlags { flags, field, value };
    if flags >= flag::END {
        return Err(wrong("the part above bit 14", flags / flag::END));
    }
    let barracuda = flag::POST_ANTELOPE | flag::ATOMIC_BLOBS;
    if flags & barracuda == flag::ATOMIC_BLOBS {
        return Err(wrong("the row format", flags & barracuda));
    }
    let size = flags >> 6 & 15;
    if !matches!(size, 0 | 3 | 4 | 6 | 7) {
        return Err(wrong("page size", size));
    }
    // 16 KiB is written as 0.
    let size_log = if size == 0 { 5 } else { size };
    let compressed_size = flags >> 1 & 15;
    if compressed_size > size_log.min(5) {
        return Err(wrong("compressed page size", compressed_size));
    }
    let logical = 512 << size_log;
    let (physical, layout) = match compressed_size {
        0 => (logical, Layout::MySql),
        size => (512 << size, Layout::MySqlRowFormatCompressed),
    };
    let is_encrypted = flags & flag::ENCRYPTION != 0;
    Ok(PageFormat::of_mysql(space_id, flags, [logical, physical], layout, is_encrypted))
}

/// A page of a tablespace without ROW_FORMAT=COMPRESSED.
pub(super) fn check(format: &PageFormat, page: &[u8], number: u32) -> Result<PageState, PageError> {
    if u32_at(page, 0) == 0 && u32_at(page, page.len() - TRAILER_BYTES) == 0 && is_zero(page) {
        return Ok(PageState::Zero);
    }
    let state = match u16_at(page, TYPE) {
        ENCRYPTED | COMPRESSED_AND_ENCRYPTED | ENCRYPTED_RTREE => {
            PageState::Unchecked { lsn: lsn(page) }
        }
        COMPRESSED => check_compressed(page)?,
        _ => legacy::check_plain(page)?,
    };
    format.check_number(page, number)?;
    format.check_space_id(page)?;
    Ok(state)
}

/// A page of a ROW_FORMAT=COMPRESSED tablespace.
pub(super) fn check_row_format_compressed(
    format: &PageFormat,
    page: &[u8],
    number: u32,
) -> Result<PageState, PageError> {
    if !matches!(u16_at(page, TYPE), ENCRYPTED | ENCRYPTED_RTREE) {
        return legacy::check_row_format_compressed(format, page, number);
    }
    format.check_number(page, number)?;
    format.check_space_id(page)?;
    Ok(PageState::Unchecked { lsn: lsn(page) })
}

/// `os_file_decompress_page`: the page is that of its header and of what is compressed behind it.
fn check_compressed(page: &[u8]) -> Result<PageState, PageError> {
    let limit = page.len() - DATA;
    let stored = usize::from(u16_at(page, COMPRESSED_BYTES));
    if stored == 0 || stored > limit {
        return Err(PageError::StoredSize { found: stored, limit });
    }
    match page[ALGORITHM] {
        ZLIB => {}
        // LZ4 is not decompressed here.
        2 => return Ok(PageState::Unchecked { lsn: lsn(page) }),
        found => return Err(PageError::Algorithm { found: found.into(), limit: ALGORITHM_MAX }),
    }
    let original = usize::from(u16_at(page, ORIGINAL_BYTES));
    if original != limit {
        return Err(PageError::Expanded { found: original, expected: limit });
    }
    let mut inside = page.to_vec();
    let flags = TINFL_FLAG_PARSE_ZLIB_HEADER | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let stream = range(page, DATA..DATA + stored);
    let (status, _, found) =
        decompress(&mut DecompressorOxide::new(), stream, &mut inside[DATA..], 0, flags);
    if status != TINFLStatus::Done {
        return Err(PageError::Stream { stream_bytes: stream.len() });
    }
    if found != limit {
        return Err(PageError::Expanded { found, expected: limit });
    }
    inside[TYPE..TYPE + 2].copy_from_slice(&page[ORIGINAL_TYPE..ORIGINAL_TYPE + 2]);
    legacy::check_plain(&inside)
}
