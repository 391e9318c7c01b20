//! Pages of MariaDB's tablespaces: what they are, and whether they are right.
//!
//! Pure: bytes in, facts out; any bytes at all are an answer or an error. The rules are those that
//! the server follows when it reads a page: `buf_page_is_corrupted` (buf/buf0buf.cc),
//! `fil_space_t::is_valid_flags` (include/fil0fil.h), `page_zip_verify_checksum`
//! (page/page0zip.cc), `fil_space_verify_crypt_checksum` (fil/fil0crypt.cc).
//!
//! | kind | checksum | number | space id |
//! |---|---|---|---|
//! | full_crc32 | CRC-32C of all, at the end of what is stored | plain | plain, unless encrypted or page_compressed |
//! | crc32 | two CRC-32C, of header and body, combined; twice in the page | plain | plain |
//! | ROW_FORMAT=COMPRESSED | three CRC-32C, combined | plain | plain |
//! | crc32 and page_compressed | none on the disk | plain | plain |

use std::ops::Range;

const OFFSET: usize = 4;
const LSN: usize = 16;
const TYPE: usize = 24;
const KEY_VERSION: usize = 26;
const SPACE_ID: usize = 34;
const DATA: usize = 38;

/// FSP_SPACE_FLAGS in a tablespace's first page.
const SPACE_FLAGS: usize = DATA + 16;

const FULL_CRC32: u32 = 1 << 4;
const LEGACY_PAGE_COMPRESSION: u32 = 1 << 16;
const LEGACY_FLAGS: u32 = (1 << 17) - 1;

/// Set in a full_crc32 page's type: the rest of it is the stored size in units of 256 bytes.
const STORED_SIZE: u16 = 1 << 15;

const PAGE_COMPRESSED: u16 = 34354;
const PAGE_COMPRESSED_ENCRYPTED: u16 = 37401;

/// Where innodb_checksum_algorithm=none was, pages have this in place of a checksum.
const NO_CHECKSUM: u32 = 0xdead_beef;

/// The server's page sizes.
const PAGE_BYTES: Range<usize> = 4096..65537;

/// Why a tablespace's first page tells no format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Nothing has been written there yet.
    #[error("the first page is empty")]
    ZeroPage,
    /// Fewer bytes than a page has.
    #[error("the file has {found} bytes, its first page {expected}")]
    Short {
        /// Bytes there.
        found: usize,
        /// Bytes needed.
        expected: usize,
    },
    /// Flags that no MariaDB server writes.
    #[error("tablespace flags are 0x{flags:08x}, which MariaDB does not write")]
    Flags {
        /// The flags.
        flags: u32,
    },
    /// The first page is wrong by its own format.
    #[error(transparent)]
    Page(#[from] PageError),
    /// No doublewrite buffer where the system tablespace has it.
    #[error("the doublewrite buffer's header has {found:08x} and pages {first} and {second}")]
    Doublewrite {
        /// What stands where the magic number is expected.
        found: u32,
        /// First block.
        first: u32,
        /// Second block.
        second: u32,
    },
}

/// Why a page is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// Not a page's length.
    #[error("it has {found} bytes, a page has {expected}")]
    Length {
        /// Bytes there.
        found: usize,
        /// Bytes of a page.
        expected: usize,
    },
    /// The checksum does not fit.
    #[error("checksum {stored:08x} is stored, {computed:08x} is computed")]
    Checksum {
        /// As stored.
        stored: u32,
        /// As computed.
        computed: u32,
    },
    /// Head and tail are of two writes.
    #[error("it is torn: LSN {head:08x} at its head, {tail:08x} at its tail")]
    Torn {
        /// Low half of the LSN in the head.
        head: u32,
        /// As stored in the tail.
        tail: u32,
    },
    /// A stored size that no page has.
    #[error("its stored size is {found}, a page has {page}")]
    StoredSize {
        /// The size.
        found: usize,
        /// Bytes of a page.
        page: usize,
    },
    /// A right page in a wrong place.
    #[error("it is page {found}, page {expected} is expected")]
    Number {
        /// As stored.
        found: u32,
        /// By its place in the file.
        expected: u32,
    },
    /// A right page in a wrong file.
    #[error("it is of space {found}, space {expected} is expected")]
    Space {
        /// As stored.
        found: u32,
        /// By the first page.
        expected: u32,
    },
}

/// A page that is not wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// Never written, or freed.
    Zero,
    /// All checks hold.
    Valid {
        /// Its last change.
        lsn: u64,
    },
    /// Number and space are right, and there is no checksum to check: two equal reads are all that
    /// can be had.
    Unchecked {
        /// Its last change.
        lsn: u64,
    },
}

/// How the pages of one tablespace are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageFormat {
    space_id: u32,
    flags: u32,
    logical: usize,
    physical: usize,
}

impl PageFormat {
    /// Reads page 0, which must be right itself. `bytes` may hold more than the page.
    pub fn from_first_page(bytes: &[u8]) -> Result<Self, FormatError> {
        let Some(head) = bytes.get(..SPACE_FLAGS + 4) else {
            return Err(FormatError::Short { found: bytes.len(), expected: PAGE_BYTES.start });
        };
        if head.iter().all(|&b| b == 0) {
            return Err(FormatError::ZeroPage);
        }
        let flags = be32(head, SPACE_FLAGS);
        let (logical, physical) = sizes(flags).ok_or(FormatError::Flags { flags })?;
        let format = Self { space_id: be32(head, SPACE_ID), flags, logical, physical };
        let Some(page) = bytes.get(..physical) else {
            return Err(FormatError::Short { found: bytes.len(), expected: physical });
        };
        format.check(page, 0)?;
        Ok(format)
    }

    /// The tablespace's id.
    #[must_use]
    pub fn space_id(&self) -> u32 {
        self.space_id
    }

    /// FSP_SPACE_FLAGS.
    #[must_use]
    pub fn flags(&self) -> u32 {
        self.flags
    }

    /// Bytes of a page in memory: innodb_page_size.
    #[must_use]
    pub fn logical_page_size(&self) -> usize {
        self.logical
    }

    /// Bytes of a page in the file: less than in memory for ROW_FORMAT=COMPRESSED.
    #[must_use]
    pub fn physical_page_size(&self) -> usize {
        self.physical
    }

    /// Whether one checksum covers all of a page.
    #[must_use]
    pub fn is_full_crc32(&self) -> bool {
        self.flags & FULL_CRC32 != 0
    }

    /// Whether parts of pages are left out of the file (page_compressed).
    #[must_use]
    pub fn is_page_compressed(&self) -> bool {
        if self.is_full_crc32() {
            return self.flags >> 5 & 7 != 0;
        }
        self.flags & LEGACY_PAGE_COMPRESSION != 0
    }

    fn is_row_compressed(&self) -> bool {
        !self.is_full_crc32() && self.physical_is_zip()
    }

    fn physical_is_zip(&self) -> bool {
        self.flags >> 1 & 15 != 0
    }

    /// Checks a page by its place: number `number` of its tablespace.
    pub fn check(&self, page: &[u8], number: u32) -> Result<PageState, PageError> {
        if page.len() != self.physical {
            return Err(PageError::Length { found: page.len(), expected: self.physical });
        }
        if is_zero(page) {
            return Ok(PageState::Zero);
        }
        let knows = if self.is_full_crc32() {
            self.check_full_crc32(page)?
        } else {
            self.check_legacy(page)?
        };
        let found = be32(page, OFFSET);
        if found != number {
            return Err(PageError::Number { found, expected: number });
        }
        let found = be32(page, SPACE_ID);
        if knows.space && found != self.space_id {
            return Err(PageError::Space { found, expected: self.space_id });
        }
        let lsn = lsn(page);
        Ok(if knows.checksum { PageState::Valid { lsn } } else { PageState::Unchecked { lsn } })
    }

    fn check_full_crc32(&self, page: &[u8]) -> Result<Knows, PageError> {
        let kind = be16(page, TYPE);
        let is_compressed = kind & STORED_SIZE != 0;
        let size = if is_compressed { usize::from(kind & !STORED_SIZE) << 8 } else { page.len() };
        // A compressed page that is not smaller is stored as it is.
        if size < DATA + 8 || size > page.len() || (is_compressed && size == page.len()) {
            return Err(PageError::StoredSize { found: size, page: page.len() });
        }
        let (stored, computed) = (be32(page, size - 4), crc32c::crc32c(&page[..size - 4]));
        if stored != computed {
            return Err(PageError::Checksum { stored, computed });
        }
        let is_encrypted = be32(page, 0) != 0;
        if !is_compressed && !is_encrypted {
            let (head, tail) = (be32(page, LSN + 4), be32(page, size - 8));
            if head != tail {
                return Err(PageError::Torn { head, tail });
            }
        }
        Ok(Knows { space: !is_compressed && !is_encrypted, checksum: true })
    }

    fn check_legacy(&self, page: &[u8]) -> Result<Knows, PageError> {
        let kind = be16(page, TYPE);
        let is_compressed = matches!(kind, PAGE_COMPRESSED | PAGE_COMPRESSED_ENCRYPTED)
            && self.flags & LEGACY_PAGE_COMPRESSION != 0;
        if is_compressed {
            return Ok(Knows { space: true, checksum: false });
        }
        let is_zip = self.is_row_compressed();
        let computed = if is_zip { zip_checksum(page) } else { legacy_checksum(page) };
        // An encrypted page has a checksum of what is stored beside the key's version.
        if be32(page, KEY_VERSION) != 0 && be32(page, KEY_VERSION + 4) == computed {
            return Ok(Knows { space: true, checksum: true });
        }
        let stored = be32(page, 0);
        if is_zip {
            return match stored {
                NO_CHECKSUM => Ok(Knows { space: true, checksum: false }),
                _ if stored == computed => Ok(Knows { space: true, checksum: true }),
                _ => Err(PageError::Checksum { stored, computed }),
            };
        }
        let end = page.len();
        let (head, tail) = (be32(page, LSN + 4), be32(page, end - 4));
        if head != tail {
            return Err(PageError::Torn { head, tail });
        }
        let second = be32(page, end - 8);
        if (stored, second) == (NO_CHECKSUM, NO_CHECKSUM) {
            return Ok(Knows { space: true, checksum: false });
        }
        if stored == computed && second == computed {
            return Ok(Knows { space: true, checksum: true });
        }
        // innodb_checksum_algorithm=innodb, the default until 10.2: two sums of other kinds.
        if stored == fold_checksum(page) && second == old_checksum(page) {
            return Ok(Knows { space: true, checksum: true });
        }
        let wrong = if stored == computed { second } else { stored };
        Err(PageError::Checksum { stored: wrong, computed })
    }
}

/// What can be told of a page.
struct Knows {
    space: bool,
    checksum: bool,
}

/// Bytes of a page in memory and in the file, by the flags; `None` for flags that are not valid.
fn sizes(flags: u32) -> Option<(usize, usize)> {
    let bytes = |shift: u32| match shift {
        3..=7 => Some(512usize << shift),
        _ => None,
    };
    if flags & FULL_CRC32 != 0 {
        // Size in bits 0 to 3, compression algorithm in 5 to 7; the rest is zero.
        if flags >> 8 != 0 {
            return None;
        }
        let logical = bytes(flags & 15)?;
        return Some((logical, logical));
    }
    if flags & !LEGACY_FLAGS != 0 || flags & 0b100001 == 0b100000 {
        return None;
    }
    // Bits 10 to 15 are reserved but for the first, which a DATA DIRECTORY of old has set.
    if flags >> 10 & 0b11_1110 != 0 {
        return None;
    }
    let logical = match flags >> 6 & 15 {
        0 => 16384,
        5 => return None,
        shift => bytes(shift)?,
    };
    match flags >> 1 & 15 {
        0 => Some((logical, logical)),
        // Both other bits belong to ROW_FORMAT=COMPRESSED.
        _ if flags & 0b100001 != 0b100001 => None,
        shift => {
            let physical = 512usize.checked_shl(shift)?;
            (physical <= logical).then_some((logical, physical))
        }
    }
}

/// The last change of a page of any kind; 0 for fewer bytes than a header has.
#[must_use]
pub fn lsn(page: &[u8]) -> u64 {
    page.get(LSN..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_be_bytes(*b))
}

/// Number of the page that holds the doublewrite buffer's place (TRX_SYS_PAGE_NO).
pub const TRX_SYS_PAGE: u32 = 5;

/// Pages of the system tablespace that are the doublewrite buffer: pages of any table lie there,
/// in a clone they have no use. Both are empty where there is none.
pub fn doublewrite_pages(trx_sys_page: &[u8]) -> Result<[Range<u32>; 2], FormatError> {
    let length = trx_sys_page.len();
    if !PAGE_BYTES.contains(&length) {
        return Err(FormatError::Short { found: length, expected: PAGE_BYTES.start });
    }
    let header = &trx_sys_page[length - 200..];
    let found = be32(header, 10);
    // Made without a doublewrite buffer.
    if found == 0 {
        return Ok([0..0, 0..0]);
    }
    let (first, second) = (be32(header, 14), be32(header, 18));
    // One extent each: of 1 MiB up to pages of 16 KiB, of 64 pages beyond (FSP_EXTENT_SIZE).
    let extent = u32::try_from((1 << 20) / length).unwrap_or(64).max(64);
    let ends = [first, second].map(|start| start.checked_add(extent));
    match ends {
        [Some(a), Some(b)] if found == MAGIC && first != 0 => Ok([first..a, second..b]),
        _ => Err(FormatError::Doublewrite { found, first, second }),
    }
}

/// TRX_SYS_DOUBLEWRITE_MAGIC_N.
const MAGIC: u32 = 536_853_855;

fn legacy_checksum(page: &[u8]) -> u32 {
    crc32c::crc32c(&page[OFFSET..KEY_VERSION]) ^ crc32c::crc32c(&page[DATA..page.len() - 8])
}

fn zip_checksum(page: &[u8]) -> u32 {
    crc32c::crc32c(&page[OFFSET..LSN])
        ^ crc32c::crc32c(&page[TYPE..TYPE + 2])
        ^ crc32c::crc32c(&page[SPACE_ID..])
}

/// `ut_fold_binary` of header and body (buf_calc_page_new_checksum).
fn fold_checksum(page: &[u8]) -> u32 {
    fold(&page[OFFSET..KEY_VERSION]).wrapping_add(fold(&page[DATA..page.len() - 8]))
}

/// `ut_fold_binary` of the first bytes (buf_calc_page_old_checksum).
fn old_checksum(page: &[u8]) -> u32 {
    fold(&page[..KEY_VERSION])
}

fn fold(bytes: &[u8]) -> u32 {
    // ut_fold_ulint_pair; only the low 32 bits of each step reach the result's.
    bytes.iter().fold(0u32, |fold, &byte| {
        let mixed = fold ^ u32::from(byte) ^ 1_653_893_711;
        (mixed.wrapping_shl(8).wrapping_add(fold) ^ 1_463_735_687).wrapping_add(byte.into())
    })
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&b| b == 0)
}

/// Reads 2 bytes; `bytes` has them.
fn be16(bytes: &[u8], offset: usize) -> u16 {
    bytes[offset..].first_chunk().map_or(0, |b| u16::from_be_bytes(*b))
}

/// Reads 4 bytes; `bytes` has them.
fn be32(bytes: &[u8], offset: usize) -> u32 {
    bytes[offset..].first_chunk().map_or(0, |b| u32::from_be_bytes(*b))
}
