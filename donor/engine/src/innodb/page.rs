//! Checks one page of an InnoDB tablespace: that its bytes are what the server wrote, and that
//! it is the page of that number and of that tablespace (R3: a right checksum is not the right
//! page).
//!
//! What is covered in each layout by a checksum or a comparison, by byte, and what is not:
//!
//! | layout | covered | not covered |
//! |---|---|---|
//! | full_crc32, also encrypted | all | |
//! | full_crc32 page_compressed | up to the size it says | what follows; no reader looks |
//! | legacy | all but | 26..34 |
//! | legacy, encrypted | all but | 26..30, 0..4, end-8..end-4 |
//! | legacy page_compressed, zlib | header, the page inside | what follows; no reader looks |
//! | the same, encrypted | all but | 26..30, what follows |
//! | ROW_FORMAT=COMPRESSED | all but | 16..24, 26..34 |
//! | the same, encrypted | all but | 16..24, 26..30, 0..4 |
//!
//! 16..24 is the LSN; 26..30 a key version; the other two are checksums of the plain text. The
//! tablespace's id cannot be seen in full_crc32 pages that are encrypted or page_compressed.
//!
//! Rules are those of MariaDB 10.11, each with the function that it comes from; pages of 11.8 pass
//! them too.

mod bytes;
mod checksum;
mod doublewrite;
mod format;
mod full_crc32;
mod legacy;
mod mysql;
mod page_compressed;

pub use doublewrite::{DoublewriteError, TRX_SYS_PAGE, doublewrite_pages};
pub use format::{FormatError, PageFormat};

use bytes::{u32_at, u64_at};
use format::Layout;

/// Offsets in the header of every page, `fil0fil.h`.
const PAGE_NUMBER: usize = 4;
const LSN: usize = 16;
const TYPE: usize = 24;
const SPACE_ID: usize = 34;
/// End of that header.
const DATA: usize = 38;

/// A page that can be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// All zero: allocated in the file, never written since.
    Zero,
    /// Its checksum, number and space are right.
    Valid {
        /// LSN of the newest change in it.
        lsn: u64,
    },
    /// Its number and space are right, but it carries no checksum that can be computed here:
    /// innodb_checksum_algorithm=none wrote it, or a page compression other than zlib.
    Unchecked {
        /// LSN of the newest change in it.
        lsn: u64,
    },
}

/// What is wrong with a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PageError {
    /// The caller gave more or less than one page.
    #[error("{found} bytes were given as a page, pages of this tablespace have {expected}")]
    Length {
        /// Bytes given.
        found: usize,
        /// Bytes of a page.
        expected: usize,
    },
    /// The bytes are not those that were written.
    #[error("the page's checksum is {stored:#010x}, its bytes give {computed:#010x}")]
    Checksum {
        /// What the page says.
        stored: u32,
        /// What its bytes give.
        computed: u32,
    },
    /// Head and tail are of two writes.
    #[error(
        "the page is torn: the LSN's lower half is {head:#010x} in its head, {tail:#010x} in its \
         tail"
    )]
    Torn {
        /// In the head.
        head: u32,
        /// In the tail.
        tail: u32,
    },
    /// A sound page of another place.
    #[error("the page says that it is page {found}, it was read as page {expected}")]
    Number {
        /// What the page says.
        found: u32,
        /// Where it was read.
        expected: u32,
    },
    /// A sound page of another tablespace.
    #[error(
        "the page says that it is of tablespace {found}, it was read from tablespace {expected}"
    )]
    Space {
        /// What the page says.
        found: u32,
        /// Where it was read.
        expected: u32,
    },
    /// page_compressed by nothing that is known.
    #[error("the page's compression algorithm is {found}, the last one known is {limit}")]
    Algorithm {
        /// What the page says.
        found: u64,
        /// The last one known.
        limit: u64,
    },
    /// page_compressed by zlib, and not to be decompressed.
    #[error("the page's {stream_bytes} compressed bytes are no zlib stream of a page")]
    Stream {
        /// Compressed bytes.
        stream_bytes: usize,
    },
    /// page_compressed, and what was compressed is no page.
    #[error("the page decompresses to {found} bytes, a page has {expected}")]
    Expanded {
        /// Bytes of what was compressed.
        found: usize,
        /// Bytes of a page.
        expected: usize,
    },
    /// page_compressed, and the header is not that of the page inside.
    #[error(
        "the page has {found:#010x} at byte {offset} of its header, the page compressed in it has \
         {inside:#010x}"
    )]
    Header {
        /// Where in the header.
        offset: usize,
        /// In the page.
        found: u32,
        /// In the page compressed in it.
        inside: u32,
    },
    /// page_compressed, and to more than fits.
    #[error("the page says that it is compressed to {found} bytes, at most {limit} fit")]
    StoredSize {
        /// What the page says.
        found: usize,
        /// The most that it could be.
        limit: usize,
    },
}

impl PageFormat {
    /// Checks a page that was read as number `number` of its tablespace. Files of the system
    /// tablespace but the first begin at a later number.
    pub fn check(&self, page: &[u8], number: u32) -> Result<PageState, PageError> {
        let expected = self.physical_page_size();
        if page.len() != expected {
            return Err(PageError::Length { found: page.len(), expected });
        }
        match self.layout() {
            Layout::FullCrc32 => full_crc32::check(self, page, number),
            Layout::Legacy => legacy::check(self, page, number),
            Layout::RowFormatCompressed => legacy::check_row_format_compressed(self, page, number),
            Layout::MySql => mysql::check(self, page, number),
            Layout::MySqlRowFormatCompressed => {
                mysql::check_row_format_compressed(self, page, number)
            }
        }
    }

    /// Whether the server may have left out parts of this page in its file.
    pub fn leaves_out_parts(&self, page: &[u8]) -> bool {
        match self.layout() {
            Layout::MySql => mysql::leaves_out_parts(page),
            _ => self.is_page_compressed(),
        }
    }

    fn check_number(&self, page: &[u8], expected: u32) -> Result<(), PageError> {
        let found = u32_at(page, PAGE_NUMBER);
        if found != expected {
            return Err(PageError::Number { found, expected });
        }
        Ok(())
    }

    fn check_space_id(&self, page: &[u8]) -> Result<(), PageError> {
        let (found, expected) = (u32_at(page, SPACE_ID), self.space_id());
        if found != expected {
            return Err(PageError::Space { found, expected });
        }
        Ok(())
    }
}

/// The LSN of the newest change in a page of any layout; it is never encrypted or compressed.
#[must_use]
pub fn lsn(page: &[u8]) -> u64 {
    u64_at(page, LSN)
}

fn valid(page: &[u8]) -> PageState {
    PageState::Valid { lsn: lsn(page) }
}

#[cfg(test)]
mod tests;
