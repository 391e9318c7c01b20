//! What the first page of a tablespace says about all its pages.

use super::{
    DATA, PageError, PageState,
    bytes::{is_zero, range, u32_at},
    mysql,
};

/// Space id and flags in the tablespace's header, `fsp0fsp.h`.
const HEADER_SPACE_ID: usize = DATA;
const HEADER_FLAGS: usize = DATA + 16;
/// Extent descriptors begin here; encryption's data follow them.
const DESCRIPTORS: usize = DATA + 112;
/// What must be there to tell the size of a page.
const HEAD_BYTES: usize = HEADER_FLAGS + 4;
/// Persistent tablespaces have smaller ids, `SRV_SPACE_ID_UPPER_BOUND`.
const SPACE_ID_LIMIT: u32 = 0xFFFF_FFF0;

/// FSP_SPACE_FLAGS, `fsp0types.h`.
mod flag {
    pub(super) const FULL_CRC32: u32 = 1 << 4;
    pub(super) const POST_ANTELOPE: u32 = 1;
    pub(super) const ATOMIC_BLOBS: u32 = 1 << 5;
    pub(super) const PAGE_COMPRESSED: u32 = 1 << 16;
    /// MySQL 5.7 and 8.0: shared, temporary, encrypted, with dictionary; and one that is unused.
    pub(super) const MYSQL: u32 = 0b1_1111 << 11;
    /// The first bit that no legacy tablespace has.
    pub(super) const LEGACY_END: u32 = 1 << 17;
}

/// Smallest page of all, a ROW_FORMAT=COMPRESSED one.
const PAGE_BYTES_MIN: usize = 1024;

/// The best known compression of full_crc32, `PAGE_ALGORITHM_LAST`.
const FULL_CRC32_COMPRESSION_MAX: u32 = 6;

/// How the pages of a tablespace are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageFormat {
    space_id: u32,
    flags: u32,
    logical_page_size: usize,
    physical_page_size: usize,
    layout: Layout,
    page_compressed: bool,
    encrypted: bool,
}

/// Where a page has its checksum, and what it covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    FullCrc32,
    Legacy,
    RowFormatCompressed,
    MySql,
    MySqlRowFormatCompressed,
}

/// Why a first page cannot be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// All zero: a file that is just being made. Size and kind of its pages are not known yet.
    #[error("the first page is all zero; the tablespace is not written yet")]
    ZeroPage,
    /// Not the whole page was given; give `needed` bytes.
    #[error("{found} bytes of the first page were given, {needed} are needed")]
    Short {
        /// Bytes given.
        found: usize,
        /// Bytes needed.
        needed: usize,
    },
    /// Flags of another server.
    #[error(
        "tablespace flags {flags:#x} have bits {bits:#x}, which MariaDB does not write: MySQL 5.7 \
         or 8.0 does"
    )]
    MySql {
        /// All flags.
        flags: u32,
        /// The bits of MySQL.
        bits: u32,
    },
    /// Flags of no server.
    #[error("tablespace flags {flags:#x} are of no MariaDB version: {field} is {value}")]
    Flags {
        /// All flags.
        flags: u32,
        /// The field that is wrong.
        field: &'static str,
        /// Its value.
        value: u32,
    },
    /// Flags of no MySQL version.
    #[error("tablespace flags {flags:#x} are of no MySQL version: {field} is {value}")]
    MySqlFlags {
        /// All flags.
        flags: u32,
        /// The field that is wrong.
        field: &'static str,
        /// Its value.
        value: u32,
    },
    /// A temporary tablespace, or MySQL's dictionary.
    #[error("the tablespace's id is {found:#x}; ids of lasting ones are below {limit:#x}")]
    SpaceIdLimit {
        /// The id.
        found: u32,
        /// The first that is too large.
        limit: u32,
    },
    /// The first page fails the check of its own format.
    #[error("first page: {0}")]
    Page(#[from] PageError),
}

impl PageFormat {
    /// Reads and checks the first page of a tablespace. `page0` may hold more than that page: give
    /// 64 KiB or the whole file, or as much as `FormatError::Short` asks for.
    pub fn from_first_page(page0: &[u8]) -> Result<Self, FormatError> {
        let mut format = Self::read(page0, Self::from_flags)?;
        let space_id = format.space_id;
        if space_id >= SPACE_ID_LIMIT {
            return Err(FormatError::SpaceIdLimit { found: space_id, limit: SPACE_ID_LIMIT });
        }
        format.encrypted =
            format.has_encryption(page0.get(..format.physical_page_size).unwrap_or_default());
        Ok(format)
    }

    /// As `from_first_page`, for MySQL 8.0 and later, where undo tablespaces and the dictionary have
    /// the highest ids.
    pub fn from_first_page_of_mysql(page0: &[u8]) -> Result<Self, FormatError> {
        Self::read(page0, mysql::from_flags)
    }

    /// The format of a `MariaDB` tablespace whose first page is not written yet, by the id and the flags
    /// that the server gives for it. Whether it is encrypted these do not say.
    pub fn of_tablespace(space_id: u32, flags: u32) -> Result<Self, FormatError> {
        Self::from_flags(flags, space_id)
    }

    fn read(
        page0: &[u8],
        from_flags: fn(u32, u32) -> Result<Self, FormatError>,
    ) -> Result<Self, FormatError> {
        if page0.len() < HEAD_BYTES {
            return Err(FormatError::Short { found: page0.len(), needed: PAGE_BYTES_MIN });
        }
        let flags = u32_at(page0, HEADER_FLAGS);
        let space_id = u32_at(page0, HEADER_SPACE_ID);
        if is_zero(range(page0, 0..PAGE_BYTES_MIN)) {
            return Err(FormatError::ZeroPage);
        }
        let format = from_flags(flags, space_id)?;
        let needed = format.physical_page_size;
        let Some(first_page) = page0.get(..needed) else {
            return Err(FormatError::Short { found: page0.len(), needed });
        };
        if format.check(first_page, 0)? == PageState::Zero {
            return Err(FormatError::ZeroPage);
        }
        // The id is in the page twice. No layout hides it in page 0.
        format.check_space_id(first_page)?;
        Ok(format)
    }

    /// A format of MySQL: logical and physical size of its pages.
    pub(super) fn of_mysql(
        space_id: u32,
        flags: u32,
        [logical_page_size, physical_page_size]: [usize; 2],
        layout: Layout,
        encrypted: bool,
    ) -> Self {
        // Which tables are compressed is in no flag: a page says it itself.
        let page_compressed = layout == Layout::MySql;
        Self {
            space_id,
            flags,
            logical_page_size,
            physical_page_size,
            layout,
            page_compressed,
            encrypted,
        }
    }

    /// The tablespace's id.
    #[must_use]
    pub fn space_id(&self) -> u32 {
        self.space_id
    }

    /// FSP_SPACE_FLAGS as they are in the file.
    #[must_use]
    pub fn flags(&self) -> u32 {
        self.flags
    }

    /// innodb_page_size of the server that made it.
    #[must_use]
    pub fn logical_page_size(&self) -> usize {
        self.logical_page_size
    }

    /// Bytes of a page in the file: smaller than the logical size for ROW_FORMAT=COMPRESSED.
    #[must_use]
    pub fn physical_page_size(&self) -> usize {
        self.physical_page_size
    }

    /// Whether it is of innodb_checksum_algorithm=full_crc32.
    #[must_use]
    pub fn is_full_crc32(&self) -> bool {
        self.layout == Layout::FullCrc32
    }

    /// Whether pages may be page_compressed. A hint: a page says it itself.
    #[must_use]
    pub fn is_page_compressed(&self) -> bool {
        self.page_compressed
    }

    /// Whether pages may be encrypted. A hint: a page says it itself.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.encrypted
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }

    pub(super) fn from_flags(flags: u32, space_id: u32) -> Result<Self, FormatError> {
        if flags & flag::FULL_CRC32 != 0 {
            Self::from_full_crc32_flags(flags, space_id)
        } else {
            Self::from_legacy_flags(flags, space_id)
        }
    }

    /// `fil_space_t::is_fcrc32_valid_flags`, `fil_space_t::logical_size`.
    fn from_full_crc32_flags(flags: u32, space_id: u32) -> Result<Self, FormatError> {
        let wrong = |field, value| FormatError::Flags { flags, field, value };
        let size = flags & 15;
        if !(3..=7).contains(&size) {
            return Err(wrong("page size", size));
        }
        let compression = flags >> 5;
        if compression > FULL_CRC32_COMPRESSION_MAX {
            return Err(wrong("compression algorithm", compression));
        }
        Ok(Self {
            space_id,
            flags,
            logical_page_size: 512 << size,
            physical_page_size: 512 << size,
            layout: Layout::FullCrc32,
            page_compressed: compression != 0,
            encrypted: false,
        })
    }

    /// `fil_space_t::is_valid_flags`. Flags that MariaDB 10.1.0 to 10.1.20 wrote wrongly are
    /// refused; any later server has rewritten them when it opened the file.
    fn from_legacy_flags(flags: u32, space_id: u32) -> Result<Self, FormatError> {
        let wrong = |field, value| FormatError::Flags { flags, field, value };
        if flags & flag::MYSQL != 0 {
            return Err(FormatError::MySql { flags, bits: flags & flag::MYSQL });
        }
        if flags >= flag::LEGACY_END {
            return Err(wrong("the part above bit 16", flags / flag::LEGACY_END));
        }
        let barracuda = flag::POST_ANTELOPE | flag::ATOMIC_BLOBS;
        if flags & barracuda == flag::ATOMIC_BLOBS {
            return Err(wrong("the row format", flags & barracuda));
        }
        let size = flags >> 6 & 15;
        // 16 KiB is written as 0.
        let size_log = if size == 0 { 5 } else { size };
        if !matches!(size, 0 | 3 | 4 | 6 | 7) {
            return Err(wrong("page size", size));
        }
        let compressed_size = flags >> 1 & 15;
        if compressed_size > size_log.min(5) {
            return Err(wrong("compressed page size", compressed_size));
        }
        if compressed_size != 0 && flags & barracuda != barracuda {
            return Err(wrong("the row format of compressed pages", flags & barracuda));
        }
        let logical_page_size = 512 << size_log;
        let (physical_page_size, layout) = match compressed_size {
            0 => (logical_page_size, Layout::Legacy),
            size => (512 << size, Layout::RowFormatCompressed),
        };
        Ok(Self {
            space_id,
            flags,
            logical_page_size,
            physical_page_size,
            layout,
            page_compressed: flags & flag::PAGE_COMPRESSED != 0,
            encrypted: false,
        })
    }

    /// `fil_space_read_crypt_data`: whether encryption's data are there and switched on.
    fn has_encryption(&self, first_page: &[u8]) -> bool {
        let extent_pages = ((1 << 20) / self.logical_page_size).max(64);
        let descriptor_bytes = 24 + extent_pages / 4;
        let descriptors = descriptor_bytes * (self.physical_page_size / extent_pages);
        // The server adds the space header's offset twice.
        let data = DATA + DESCRIPTORS + descriptors;
        range(first_page, data..data + 7) == b"s\x0e\x0cREt\x01"
    }
}
