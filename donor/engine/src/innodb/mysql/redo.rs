//! MySQL's redo log as it has been since 8.0.30: blocks in files that are used one after another.
//!
//! Pure: bytes in, facts out; any bytes at all are an answer or an error. The format is that of
//! storage/innobase/include/log0constants.h and log/log0files_io.cc.
//!
//! ```text
//! 0      header: format, log uuid, first LSN, creator, flags, CRC-32C
//! 512    checkpoint          1024   encryption          1536   checkpoint
//! 2048   blocks of 512 bytes, one for each 512 LSNs from the header's first on
//!
//! block: number (4), bytes used (2), first group (2), epoch (4), 496 bytes of records, CRC-32C
//! ```
//!
//! Records carry no lengths, so that mini-transactions are not told apart here. What stands for
//! them is the block: its number and epoch are its LSN's, its checksum is right, all before the
//! last are full, and the last ends where the server said that a mini-transaction ends.

/// Bytes of a block, the unit of all there is in a log file.
pub const BLOCK_BYTES: usize = 512;

/// Where blocks of records begin in a file.
pub const HEADER_BYTES: usize = 2048;

/// Where the two checkpoints are.
pub const CHECKPOINT_OFFSETS: [usize; 2] = [512, 1536];

/// Where the log's key is, if it is encrypted.
pub const ENCRYPTION_OFFSET: usize = 1024;

/// Bytes before a block's records.
pub const BLOCK_HEAD_BYTES: usize = 12;
/// And after them.
const BLOCK_TAIL_BYTES: usize = 4;

/// MySQL 8.0.30 to 9.7 (Log_format::VERSION_8_0_30).
const FORMAT: u32 = 6;

/// Bits of a header's flags.
const FLAG_NO_LOGGING: u32 = 1;
const FLAG_CRASH_UNSAFE: u32 = 2;
const FLAG_FILE_FULL: u32 = 8;

/// Set in a block's number and in its count of used bytes: a flush ended here, and the block is
/// encrypted.
const FLUSH_BIT: u32 = 0x8000_0000;
const ENCRYPT_BIT: u16 = 0x8000;

/// Block numbers come round after this many; the epoch counts how often.
const BLOCK_NUMBERS: u64 = 0x4000_0000;

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
        "redo log format is {found} (made by `{creator}`), {FORMAT} (MySQL 8.0.30 and later) is known"
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
    /// A block of other LSNs.
    #[error(
        "the block at LSN {lsn} is number {found} of epoch {found_epoch}, {expected} of {expected_epoch} belongs there"
    )]
    OtherBlock {
        /// Where it was read.
        lsn: u64,
        /// Its number.
        found: u64,
        /// Its epoch.
        found_epoch: u64,
        /// The number that belongs there.
        expected: u64,
        /// The epoch that belongs there.
        expected_epoch: u64,
    },
    /// A block that cannot be checked without its key.
    #[error("the block at LSN {lsn} is encrypted")]
    Encrypted {
        /// Where it was read.
        lsn: u64,
    },
}

/// The head of a log file.
#[derive(Clone, PartialEq, Eq)]
pub struct Header {
    bytes: [u8; HEADER_BYTES],
}

impl std::fmt::Debug for Header {
    // The rest may hold what an encrypted log's key is derived from.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Header")
            .field("start_lsn", &self.start_lsn())
            .field("flags", &self.flags())
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
        let found = be32(bytes, 0);
        if found != FORMAT {
            return Err(FormatError::UnknownFormat { found, creator: header.creator() });
        }
        check("header", &bytes[..BLOCK_BYTES])?;
        if !header.start_lsn().is_multiple_of(BLOCK_BYTES as u64) || header.start_lsn() == 0 {
            return Err(FormatError::Value { what: "first LSN", found: header.start_lsn() });
        }
        Ok(header)
    }

    /// LSN of the first block.
    #[must_use]
    pub fn start_lsn(&self) -> u64 {
        be64(&self.bytes, 8)
    }

    /// The program that made the log.
    #[must_use]
    pub fn creator(&self) -> String {
        let bytes = &self.bytes[16..48];
        let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
        bytes[..end].escape_ascii().to_string()
    }

    fn flags(&self) -> u32 {
        be32(&self.bytes, 48)
    }

    /// Whether the server writes no redo (ALTER INSTANCE DISABLE INNODB REDO_LOG).
    #[must_use]
    pub fn is_disabled(&self) -> bool {
        self.flags() & (FLAG_NO_LOGGING | FLAG_CRASH_UNSAFE) != 0
    }

    /// The later one of the file's two checkpoints; `None` when neither was ever written.
    pub fn checkpoint(&self) -> Result<Option<u64>, FormatError> {
        let read = CHECKPOINT_OFFSETS.map(|offset| {
            let block = &self.bytes[offset..offset + BLOCK_BYTES];
            if block.iter().all(|&b| b == 0) {
                return Ok(None);
            }
            check("checkpoint", block).map(|()| Some(be64(block, 8)).filter(|&lsn| lsn != 0))
        });
        match read {
            [Ok(a), Ok(b)] => Ok(a.max(b)),
            [Ok(Some(one)), Err(_)] | [Err(_), Ok(Some(one))] => Ok(Some(one)),
            [Err(error), _] | [_, Err(error)] => Err(error),
        }
    }

    /// The head of a log of one file that recovery reads from `checkpoint` on: of the same log, not
    /// full, and with this checkpoint alone.
    #[must_use]
    pub fn starting_at(&self, checkpoint: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = self.bytes;
        bytes[8..16].copy_from_slice(&block_start(checkpoint).to_be_bytes());
        let flags = self.flags() & !FLAG_FILE_FULL;
        bytes[48..52].copy_from_slice(&flags.to_be_bytes());
        seal(&mut bytes[..BLOCK_BYTES]);
        for offset in CHECKPOINT_OFFSETS {
            let block = &mut bytes[offset..offset + BLOCK_BYTES];
            block.fill(0);
            block[8..16].copy_from_slice(&checkpoint.to_be_bytes());
            seal(block);
        }
        bytes
    }
}

/// LSN of the block that `lsn` is in.
#[must_use]
pub fn block_start(lsn: u64) -> u64 {
    lsn - lsn % BLOCK_BYTES as u64
}

/// A block that was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// End of what is in it; `BLOCK_BYTES` when it is full.
    pub used: usize,
    /// Where its first group of records begins; 0 when none does.
    pub first_group: usize,
}

/// Checks the block that was read at `lsn`, the LSN of its first byte.
pub fn check_block(bytes: &[u8], lsn: u64) -> Result<Block, FormatError> {
    let Some(bytes) = bytes.first_chunk::<BLOCK_BYTES>() else {
        let found = bytes.len();
        return Err(FormatError::Short { what: "block", found, expected: BLOCK_BYTES });
    };
    let (number, epoch) = number_and_epoch(lsn);
    let found = u64::from(be32(bytes, 0) & !FLUSH_BIT);
    let found_epoch = u64::from(be32(bytes, 8));
    if (found, found_epoch) != (number, epoch) {
        return Err(FormatError::OtherBlock {
            lsn,
            found,
            found_epoch,
            expected: number,
            expected_epoch: epoch,
        });
    }
    if be16(bytes, 4) & ENCRYPT_BIT != 0 {
        return Err(FormatError::Encrypted { lsn });
    }
    check("block", bytes)?;
    let used = usize::from(be16(bytes, 4));
    let is_used = (BLOCK_HEAD_BYTES..=BLOCK_BYTES - BLOCK_TAIL_BYTES).contains(&used);
    if !is_used && used != BLOCK_BYTES {
        return Err(FormatError::Value { what: "count of used bytes", found: used as u64 });
    }
    let first_group = usize::from(be16(bytes, 6));
    if first_group != 0 && !(BLOCK_HEAD_BYTES..=used).contains(&first_group) {
        let found = first_group as u64;
        return Err(FormatError::Value { what: "offset of the first group", found });
    }
    Ok(Block { used, first_group })
}

/// The block, cut so that the log ends at `end`, which is in it: a later mini-transaction of it is
/// not there.
#[must_use]
pub fn cut_block(bytes: &[u8; BLOCK_BYTES], end: u64) -> [u8; BLOCK_BYTES] {
    let mut cut = *bytes;
    let used = usize::try_from(end % BLOCK_BYTES as u64).unwrap_or(0);
    let used = used.clamp(BLOCK_HEAD_BYTES, BLOCK_BYTES - BLOCK_TAIL_BYTES);
    cut[used..].fill(0);
    cut[4..6].copy_from_slice(&u16::try_from(used).unwrap_or(0).to_be_bytes());
    if usize::from(be16(&cut, 6)) >= used {
        cut[6..8].fill(0);
    }
    seal(&mut cut);
    cut
}

fn number_and_epoch(lsn: u64) -> (u64, u64) {
    let index = lsn / BLOCK_BYTES as u64;
    (1 + index % BLOCK_NUMBERS, 1 + index / BLOCK_NUMBERS)
}

fn check(what: &'static str, block: &[u8]) -> Result<(), FormatError> {
    let stored = be32(block, BLOCK_BYTES - BLOCK_TAIL_BYTES);
    let computed = crc32c::crc32c(&block[..BLOCK_BYTES - BLOCK_TAIL_BYTES]);
    if stored == computed {
        return Ok(());
    }
    Err(FormatError::Checksum { what, stored, computed })
}

/// Writes a block's checksum.
fn seal(block: &mut [u8]) {
    let crc = crc32c::crc32c(&block[..BLOCK_BYTES - BLOCK_TAIL_BYTES]);
    block[BLOCK_BYTES - BLOCK_TAIL_BYTES..BLOCK_BYTES].copy_from_slice(&crc.to_be_bytes());
}

fn be16(bytes: &[u8], offset: usize) -> u16 {
    bytes[offset..].first_chunk().map_or(0, |b| u16::from_be_bytes(*b))
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
