//! MariaDB's redo log as it has been since 10.8: one file, records in mini-transactions.
//!
//! Pure: bytes in, facts out; any bytes at all are an answer or an error. The format is that of
//! storage/innobase/log/log0recv.cc and include/log0log.h, include/mtr0log.h.
//!
//! ```text
//! 0      header: format, first LSN, creator, what an encrypted log needs, CRC-32C
//! 4096   checkpoint block          8192   checkpoint block
//! 12288  mini-transactions; the file is circular from here on
//!
//! mini-transaction: records, one byte that ends it (0 or 1, by the lap), in an encrypted log
//!                   a nonce of 8 bytes, CRC-32C of records and nonce
//! ```

use std::fmt;

/// Where records begin in a log file.
pub const START_OFFSET: u64 = 12288;

/// Bytes of the header that carry something.
pub const HEADER_BYTES: usize = 512;

/// Bytes of a checkpoint that carry something.
pub const CHECKPOINT_BYTES: usize = 64;

/// Where the two checkpoints are.
pub const CHECKPOINT_OFFSETS: [u64; 2] = [4096, 8192];

/// Longest mini-transaction (recv_sys_t::MTR_SIZE_MAX), its end not counted.
pub const MTR_BYTES_MAX: usize = 1 << 20;

/// Bytes that a log needs after its last record, so that recovery finds an end there.
pub const TAIL_BYTES: u64 = 4096;

const FORMAT_10_8: u32 = 0x5068_7973;
const FORMAT_ENCRYPTED_11: u32 = 0xf09f_979d;

/// First bytes of a FILE_CHECKPOINT record that carries an LSN, and of a FILE_MODIFY record.
const FILE_CHECKPOINT: u8 = 0xf0 + 2 + 8;
const FILE_MODIFY: u8 = 0xb0;

/// Kind of a FILE_DELETE record.
const FILE_DELETE: u8 = 0x90;

/// Kind of an INIT_PAGE record, without the bit for the same page.
const INIT_PAGE: u8 = 0x10;

/// Set in a record that speaks of the page of the one before it, or of a file.
const SAME_PAGE: u8 = 0x80;

/// Why bytes are no part of a redo log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer bytes than the structure has.
    #[error("{what} has {found} bytes, {expected} are needed")]
    Short {
        /// The structure.
        what: &'static str,
        /// Bytes there.
        found: usize,
        /// Bytes needed.
        expected: usize,
    },
    /// A format that is not known.
    #[error(
        "redo log format is 0x{found:08x} (made by `{creator}`), 0x{FORMAT_10_8:08x} and \
         0x{FORMAT_ENCRYPTED_11:08x} (MariaDB 10.8 and later) are known"
    )]
    UnknownFormat {
        /// The format's number.
        found: u32,
        /// The creator that the header names, cleaned.
        creator: String,
    },
    /// A checksum that does not fit.
    #[error("{what} has CRC-32C {stored:08x}, computed is {computed:08x}")]
    Checksum {
        /// The structure.
        what: &'static str,
        /// As stored.
        stored: u32,
        /// As computed.
        computed: u32,
    },
    /// A value out of its bounds.
    #[error("{what} is {found}")]
    Value {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
    },
}

/// The head of a log file.
#[derive(Clone, PartialEq, Eq)]
pub struct Header {
    bytes: [u8; HEADER_BYTES],
}

impl fmt::Debug for Header {
    // The rest holds what an encrypted log's key is derived from.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Header")
            .field("first_lsn", &self.first_lsn())
            .field("encrypted", &self.is_encrypted())
            .finish_non_exhaustive()
    }
}

impl Header {
    /// Reads and checks a header.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            let found = bytes.len();
            return Err(FormatError::Short { what: "header", found, expected: HEADER_BYTES });
        };
        let header = Self { bytes: *bytes };
        let format = be32(bytes, 0);
        if format != FORMAT_10_8 && format != FORMAT_ENCRYPTED_11 {
            return Err(FormatError::UnknownFormat { found: format, creator: header.creator() });
        }
        check("header", be32(bytes, 508), crc32c::crc32c(&bytes[..508]))?;
        if be32(bytes, 4) != 0 {
            return Err(FormatError::Value {
                what: "header's second word",
                found: be32(bytes, 4).into(),
            });
        }
        if header.first_lsn() < START_OFFSET {
            return Err(FormatError::Value { what: "first LSN", found: header.first_lsn() });
        }
        Ok(header)
    }

    /// LSN of the first byte after the header, in the file's first lap.
    #[must_use]
    pub fn first_lsn(&self) -> u64 {
        be64(&self.bytes, 8)
    }

    /// The program that made the log.
    #[must_use]
    pub fn creator(&self) -> String {
        let bytes = &self.bytes[16..48];
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        bytes[..end].escape_ascii().to_string()
    }

    /// Whether records are encrypted: each mini-transaction then carries a nonce.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        // Before format 11 an encrypted log had the plain log's format and a key here.
        be32(&self.bytes, 0) == FORMAT_ENCRYPTED_11 || be32(&self.bytes, 48) != 0
    }

    /// Whether what records say of a tablespace's id is encrypted as well. In the older format the
    /// id stands before what is encrypted: the key is derived from it.
    #[must_use]
    pub fn hides_ids(&self) -> bool {
        be32(&self.bytes, 0) == FORMAT_ENCRYPTED_11
    }

    /// The same header for a log whose first byte is at another LSN.
    #[must_use]
    pub fn starting_at(&self, lsn: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = self.bytes;
        bytes[8..16].copy_from_slice(&lsn.to_be_bytes());
        let crc = crc32c::crc32c(&bytes[..508]);
        bytes[508..].copy_from_slice(&crc.to_be_bytes());
        bytes
    }

    /// Where an LSN is in a file of `file_bytes`.
    #[must_use]
    pub fn offset(&self, lsn: u64, file_bytes: u64) -> u64 {
        START_OFFSET + lsn.saturating_sub(self.first_lsn()) % capacity(file_bytes)
    }

    /// The byte that ends a mini-transaction whose end is at `lsn`.
    #[must_use]
    pub fn sequence_bit(&self, lsn: u64, file_bytes: u64) -> u8 {
        let lap = lsn.saturating_sub(self.first_lsn()) / capacity(file_bytes);
        u8::from(lap.is_multiple_of(2))
    }
}

/// Bytes of records that a log file of `file_bytes` holds; at least 1.
#[must_use]
pub fn capacity(file_bytes: u64) -> u64 {
    file_bytes.saturating_sub(START_OFFSET).max(1)
}

/// A checkpoint: all pages changed before `lsn` are on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Recovery begins here.
    pub lsn: u64,
    /// Here, at or after `lsn`, are the records that name files and end the checkpoint.
    pub end_lsn: u64,
}

impl Checkpoint {
    /// Reads and checks one checkpoint block.
    pub fn parse(bytes: &[u8], first_lsn: u64) -> Result<Self, FormatError> {
        let Some(bytes) = bytes.first_chunk::<CHECKPOINT_BYTES>() else {
            let found = bytes.len();
            return Err(FormatError::Short {
                what: "checkpoint",
                found,
                expected: CHECKPOINT_BYTES,
            });
        };
        check("checkpoint", be32(bytes, 60), crc32c::crc32c(&bytes[..60]))?;
        let (lsn, end_lsn) = (be64(bytes, 0), be64(bytes, 8));
        if lsn < first_lsn {
            return Err(FormatError::Value { what: "checkpoint LSN", found: lsn });
        }
        if end_lsn < lsn {
            return Err(FormatError::Value { what: "checkpoint's end LSN", found: end_lsn });
        }
        if bytes[16..60].iter().any(|&b| b != 0) {
            return Err(FormatError::Value { what: "checkpoint's reserved part", found: 1 });
        }
        Ok(Self { lsn, end_lsn })
    }

    /// The later one of a log file's two checkpoints; an error when neither can be read.
    pub fn latest(blocks: [&[u8]; 2], first_lsn: u64) -> Result<Self, FormatError> {
        let [a, b] = blocks.map(|block| Self::parse(block, first_lsn));
        match (a, b) {
            (Ok(a), Ok(b)) => Ok(if b.lsn >= a.lsn { b } else { a }),
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one),
            (Err(error), Err(_)) => Err(error),
        }
    }

    /// The block as it stands in a file.
    #[must_use]
    pub fn to_bytes(self) -> [u8; CHECKPOINT_BYTES] {
        let mut bytes = [0; CHECKPOINT_BYTES];
        bytes[..8].copy_from_slice(&self.lsn.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.end_lsn.to_be_bytes());
        let crc = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_be_bytes());
        bytes
    }
}

/// A mini-transaction at the start of some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mtr {
    /// Bytes of its records; the byte that ends it comes next.
    pub record_bytes: usize,
    /// All of its bytes.
    pub bytes: usize,
    /// The byte that ends it.
    pub sequence_bit: u8,
}

/// What stands at the start of some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// A mini-transaction whose checksum is right.
    Mtr(Mtr),
    /// The beginning of one, or nothing.
    Cut,
    /// No mini-transaction.
    Bad(BadMtr),
}

/// Why bytes are no mini-transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadMtr {
    /// No record where one must be: the end of a log looks like this.
    #[error("there is no record")]
    Empty,
    /// Longer than a mini-transaction may be.
    #[error("it is longer than {MTR_BYTES_MAX} bytes")]
    TooLong,
    /// A length that cannot be read.
    #[error("a record's length is malformed")]
    Length,
    /// The checksum does not fit.
    #[error("it has CRC-32C {stored:08x}, computed is {computed:08x}")]
    Checksum {
        /// As stored.
        stored: u32,
        /// As computed.
        computed: u32,
    },
}

/// Reads the mini-transaction at the start of `bytes`. Whether its end is of the right lap is for
/// the caller to say.
#[must_use]
pub fn parse_mtr(bytes: &[u8], encrypted: bool) -> Parsed {
    let mut at = 0;
    loop {
        let Some(&byte) = bytes.get(at) else {
            return Parsed::Cut;
        };
        if byte <= 1 {
            break;
        }
        match record_bytes(&bytes[at..]) {
            Ok(Some(length)) => at += length,
            Ok(None) => return Parsed::Cut,
            Err(bad) => return Parsed::Bad(bad),
        }
        if at > MTR_BYTES_MAX {
            return Parsed::Bad(BadMtr::TooLong);
        }
    }
    if at == 0 {
        return Parsed::Bad(BadMtr::Empty);
    }
    let nonce_bytes = if encrypted { 8 } else { 0 };
    let end = at + 1 + nonce_bytes + 4;
    let Some(tail) = bytes.get(at + 1..end) else {
        return Parsed::Cut;
    };
    let computed = crc32c::crc32c_append(crc32c::crc32c(&bytes[..at]), &tail[..nonce_bytes]);
    let stored = be32(tail, nonce_bytes);
    if stored != computed {
        return Parsed::Bad(BadMtr::Checksum { stored, computed });
    }
    Parsed::Mtr(Mtr { record_bytes: at, bytes: end, sequence_bit: bytes[at] })
}

/// Bytes of the record at the start of `bytes`, which are not empty; `None` when its head is cut.
fn record_bytes(bytes: &[u8]) -> Result<Option<usize>, BadMtr> {
    let short = usize::from(bytes[0] & 0xf);
    if short != 0 {
        return Ok(Some(1 + short));
    }
    let Some(&lead) = bytes.get(1) else {
        return Ok(None);
    };
    // The length's own length stands in its first byte's leading ones; each form goes on where the
    // shorter one ends (mlog_encode_varint).
    let (more, least, bits) = match lead.leading_ones() {
        0 => (0, 0, lead),
        1 => (1, 1 << 7, lead & 0x3f),
        2 => (2, (1 << 7) + (1 << 14), lead & 0x1f),
        // Longer forms stand for more than a mini-transaction may have.
        3 | 4 => return Err(BadMtr::TooLong),
        _ => return Err(BadMtr::Length),
    };
    let Some(rest) = bytes.get(2..2 + more) else {
        return Ok(None);
    };
    let value =
        rest.iter().fold(usize::from(bits), |value, &b| value << 8 | usize::from(b)) + least;
    if value >= MTR_BYTES_MAX {
        return Err(BadMtr::TooLong);
    }
    // It counts from its own first byte on.
    Ok(Some(1 + value + 15))
}

/// Calls `each` for every tablespace that a mini-transaction's records say is deleted: with its id,
/// or with nothing where ids are hidden.
pub fn deleted_spaces(records: &[u8], hides_ids: bool, each: &mut dyn FnMut(Option<u32>)) {
    let mut at = 0;
    // A record with this bit speaks of a file, until one of a page has come: then it speaks of the
    // same page (recv_sys_t::parse, got_page_op).
    while let Some(&byte) = records.get(at).filter(|&&byte| byte & 0x80 != 0) {
        let Ok(Some(length)) = record_bytes(&records[at..]) else { return };
        if byte & 0xf0 == FILE_DELETE {
            let head = length_bytes(&records[at..]);
            let id = records.get(at + head..).and_then(varint);
            each(id.filter(|_| !hides_ids));
        }
        at += length;
    }
}

/// Calls `each` for every tablespace whose first page a mini-transaction's records make: with its id,
/// which must not be hidden.
pub fn made_spaces(records: &[u8], each: &mut dyn FnMut(u32)) {
    let mut at = 0;
    let mut first_page_of = None;
    while let Some(&byte) = records.get(at) {
        let record = &records[at..];
        let Ok(Some(length)) = record_bytes(record) else { return };
        if byte & SAME_PAGE == 0 {
            let id = record.get(length_bytes(record)..).unwrap_or_default();
            let number = id.get(varint_bytes(id)..).unwrap_or_default();
            first_page_of = varint(id).filter(|_| varint(number) == Some(0));
        }
        if byte & 0x70 == INIT_PAGE
            && let Some(space) = first_page_of
        {
            each(space);
        }
        at += length;
    }
}

/// Bytes that tell a record's kind and length.
fn length_bytes(record: &[u8]) -> usize {
    match (record[0] & 0xf, record.get(1)) {
        (0, Some(lead)) => 2 + lead.leading_ones() as usize,
        _ => 1,
    }
}

/// A number as records have it (mlog_decode_varint).
fn varint(bytes: &[u8]) -> Option<u32> {
    let lead = *bytes.first()?;
    let (more, least, bits) = match lead.leading_ones() {
        0 => (0, 0, lead),
        1 => (1, 1 << 7, lead & 0x3f),
        2 => (2, (1 << 7) + (1 << 14), lead & 0x1f),
        3 => (3, (1 << 7) + (1 << 14) + (1 << 21), lead & 0x0f),
        4 => (4, (1 << 7) + (1 << 14) + (1 << 21) + (1 << 28), 0),
        _ => return None,
    };
    let rest = bytes.get(1..=more)?;
    let value = rest.iter().fold(u64::from(bits), |value, &b| value << 8 | u64::from(b));
    u32::try_from(value + least).ok()
}

/// Bytes that a number has.
fn varint_bytes(bytes: &[u8]) -> usize {
    bytes.first().map_or(0, |lead| 1 + lead.leading_ones() as usize)
}

/// What a walk along a log has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Walked {
    /// Bytes of whole mini-transactions.
    pub bytes: usize,
    /// How many they are.
    pub mtrs: u64,
    /// What stands after them.
    pub then: Parsed,
}

/// Walks along whole mini-transactions of a log in its first lap.
#[must_use]
pub fn walk(bytes: &[u8], encrypted: bool) -> Walked {
    let mut walked = Walked { bytes: 0, mtrs: 0, then: Parsed::Cut };
    loop {
        match parse_mtr(&bytes[walked.bytes..], encrypted) {
            Parsed::Mtr(mtr) if mtr.sequence_bit == 1 => {
                walked.bytes += mtr.bytes;
                walked.mtrs += 1;
            }
            then => return Walked { then, ..walked },
        }
    }
}

/// Whether the records at a checkpoint's end LSN are what recovery looks for there: files named,
/// then the end of the checkpoint at `lsn`. `None` when more bytes are needed to tell.
#[must_use]
pub fn ends_checkpoint(bytes: &[u8], lsn: u64, encrypted: bool) -> Option<bool> {
    let mut at = 0;
    loop {
        let rest = &bytes[at..];
        let mtr = match parse_mtr(rest, encrypted) {
            Parsed::Mtr(mtr) => mtr,
            Parsed::Cut => return None,
            Parsed::Bad(_) => return Some(false),
        };
        let mut record = 0;
        while record < mtr.record_bytes {
            match rest[record] {
                // In an encrypted log only the first byte can be read.
                FILE_CHECKPOINT if encrypted => return Some(true),
                FILE_CHECKPOINT if rest.len() >= record + 11 && be64(rest, record + 3) == lsn => {
                    return Some(true);
                }
                FILE_CHECKPOINT => {}
                byte if byte & 0xf0 == FILE_MODIFY => {}
                _ => return Some(false),
            }
            match record_bytes(&rest[record..]) {
                Ok(Some(length)) => record += length,
                _ => return Some(false),
            }
        }
        at += mtr.bytes;
    }
}

fn check(what: &'static str, stored: u32, computed: u32) -> Result<(), FormatError> {
    if stored == computed {
        return Ok(());
    }
    Err(FormatError::Checksum { what, stored, computed })
}

/// Reads 4 bytes; `bytes` has them.
fn be32(bytes: &[u8], offset: usize) -> u32 {
    bytes[offset..].first_chunk().map_or(0, |b| u32::from_be_bytes(*b))
}

/// Reads 8 bytes; `bytes` has them.
fn be64(bytes: &[u8], offset: usize) -> u64 {
    bytes[offset..].first_chunk().map_or(0, |b| u64::from_be_bytes(*b))
}

#[cfg(test)]
mod tests;
