//! Where the doublewrite buffer lies in the system tablespace.
//!
//! Its pages are copies of pages of other places and other tablespaces, torn ones among them: they
//! pass no check, and a clone has no use for them.

use std::ops::Range;

use super::bytes::u32_at;

/// Number of the page that says it, FSP_TRX_SYS_PAGE_NO.
pub const TRX_SYS_PAGE: u32 = 5;

/// From the page's end: `TRX_SYS_DOUBLEWRITE` in `trx0sys.h`.
const HEADER: usize = 200;
/// In the header, behind a file segment's: magic, first block, second block, and all once more.
const MAGIC: usize = 10;
const REPEAT: usize = 12;
const MAGIC_NUMBER: u32 = 536_853_855;
const PAGE_BYTES_MIN: usize = 4096;

/// Why the doublewrite buffer cannot be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DoublewriteError {
    /// Neither a doublewrite buffer nor nothing.
    #[error("the doublewrite buffer's header begins with {found:#010x}, not {MAGIC_NUMBER:#010x}")]
    Magic {
        /// In place of the magic number.
        found: u32,
    },
    /// No page of the system tablespace.
    #[error("{found} bytes are no page of a system tablespace: 4, 8, 16, 32 or 64 KiB")]
    Length {
        /// Bytes given.
        found: usize,
    },
    /// The header's two copies differ.
    #[error(
        "the doublewrite buffer is at page {first} in one copy of its header, {second} in another"
    )]
    Copies {
        /// In the first copy.
        first: u32,
        /// In the second copy.
        second: u32,
    },
    /// It would lie where other pages are.
    #[error(
        "the doublewrite buffer is at pages {first} and {second}; it begins at {extent} or later"
    )]
    Place {
        /// Its first block.
        first: u32,
        /// Its second block.
        second: u32,
        /// Pages of one extent; the first one holds the space's own pages.
        extent: u32,
    },
}

/// The doublewrite buffer's two ranges of pages, from page 5 of the system tablespace, as
/// `buf_dblwr_t::init_or_load_pages` reads them; both are empty where innodb_doublewrite was off
/// from the beginning. That page is never encrypted.
pub fn doublewrite_pages(trx_sys_page: &[u8]) -> Result<[Range<u32>; 2], DoublewriteError> {
    let page_bytes = trx_sys_page.len();
    if !page_bytes.is_power_of_two() || !(PAGE_BYTES_MIN..=1 << 16).contains(&page_bytes) {
        return Err(DoublewriteError::Length { found: page_bytes });
    }
    let field = |offset| u32_at(trx_sys_page, page_bytes - HEADER + MAGIC + offset);
    match field(0) {
        MAGIC_NUMBER => {}
        0 => return Ok([0..0, 0..0]),
        found => return Err(DoublewriteError::Magic { found }),
    }
    for offset in [0, 4, 8] {
        let (first, second) = (field(offset), field(REPEAT + offset));
        if first != second {
            return Err(DoublewriteError::Copies { first, second });
        }
    }
    // FSP_EXTENT_SIZE: one MiB, and 64 pages where a page is 16 KiB or more.
    let extent = u32::try_from((1 << 20) / page_bytes).unwrap_or(0).max(64);
    let (first, second) = (field(4), field(8));
    let (Some(first_end), Some(second_end)) =
        (first.checked_add(extent), second.checked_add(extent))
    else {
        return Err(DoublewriteError::Place { first, second, extent });
    };
    if first < extent || second < first_end {
        return Err(DoublewriteError::Place { first, second, extent });
    }
    Ok([first..first_end, second..second_end])
}
