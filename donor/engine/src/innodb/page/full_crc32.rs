//! Pages of tablespaces made with innodb_checksum_algorithm=full_crc32, MariaDB's default.

use super::{
    LSN, PageError, PageFormat, PageState, TYPE,
    bytes::{is_zero, u16_at, u32_at},
    valid,
};

/// In the page's type: page_compressed, and the other bits are the size / 256.
const COMPRESSED: u16 = 1 << 15;
const CHECKSUM_BYTES: usize = 4;
/// Nonzero in an encrypted page. The checksum is that of the encrypted bytes: no key is needed.
const KEY_VERSION: usize = 0;
/// The LSN's lower half once more, this far from the end.
const END_LSN: usize = 8;

/// `buf_page_is_corrupted`, first part, then the page's identity as `buf_page_t::read_complete`
/// looks at it.
pub(super) fn check(format: &PageFormat, page: &[u8], number: u32) -> Result<PageState, PageError> {
    let size = stored_size(page)?;
    let compressed = size < page.len();
    let (covered, rest) = page.split_at(size - CHECKSUM_BYTES);
    let stored = u32_at(rest, 0);
    // The CRC of zeros is not zero, so that a page of zeros is no valid page.
    if stored == 0 && is_zero(page) {
        return Ok(PageState::Zero);
    }
    let computed = crc32c::crc32c(covered);
    if stored != computed {
        return Err(PageError::Checksum { stored, computed });
    }
    format.check_number(page, number)?;
    // Compression takes all behind the type, encryption too: the space's id cannot be seen.
    if !compressed && u32_at(page, KEY_VERSION) == 0 {
        format.check_space_id(page)?;
        let (head, tail) = (u32_at(page, LSN + 4), u32_at(page, page.len() - END_LSN));
        if head != tail {
            return Err(PageError::Torn { head, tail });
        }
    }
    Ok(valid(page))
}

/// `buf_page_full_crc32_size`, except that a size that holds no header is refused: the server
/// would read before the page.
fn stored_size(page: &[u8]) -> Result<usize, PageError> {
    let page_type = u16_at(page, TYPE);
    if page_type & COMPRESSED == 0 {
        return Ok(page.len());
    }
    let found = usize::from(page_type & !COMPRESSED) << 8;
    if found == 0 || found >= page.len() {
        return Err(PageError::StoredSize { found, limit: page.len() - 256 });
    }
    Ok(found)
}
