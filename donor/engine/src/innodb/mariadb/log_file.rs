//! The server's log file while the server writes it.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use marcot_common::failure::Failure;

use super::redo::{
    CHECKPOINT_BYTES, CHECKPOINT_OFFSETS, Checkpoint, FormatError, HEADER_BYTES, Header,
    START_OFFSET, capacity,
};

/// The log's name in the data directory.
pub(in crate::innodb) const LOG_NAME: &str = "ib_logfile0";

/// Most looks at the checkpoint blocks: the server may be writing one.
const LOOKS_MAX: u32 = 20;

/// An open log file. A resize puts another one in its place.
#[derive(Debug)]
pub(in crate::innodb) struct LogFile {
    file: File,
    path: PathBuf,
    inode: (u64, u64),
    bytes: u64,
    header: Header,
}

impl LogFile {
    /// Opens the log in `directory` and reads its header.
    pub(in crate::innodb) fn open(directory: &Path) -> Result<Self, Failure> {
        let path = directory.join(LOG_NAME);
        let read = || -> io::Result<(File, std::fs::Metadata, [u8; HEADER_BYTES])> {
            let file = File::open(&path)?;
            let metadata = file.metadata()?;
            let mut head = [0; HEADER_BYTES];
            file.read_exact_at(&mut head, 0)?;
            Ok((file, metadata, head))
        };
        let (file, metadata, head) = read().map_err(|e| Failure::io("read redo log", &path, &e))?;
        let header = Header::parse(&head).map_err(|error| unknown_format(&path, &error))?;
        let inode = (metadata.dev(), metadata.ino());
        Ok(Self { file, path, inode, bytes: metadata.len(), header })
    }

    pub(in crate::innodb) fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of records that it holds before it wraps around.
    pub(in crate::innodb) fn capacity(&self) -> u64 {
        capacity(self.bytes)
    }

    /// The byte that ends a mini-transaction whose end is at `lsn`.
    pub(in crate::innodb) fn sequence_bit(&self, lsn: u64) -> u8 {
        self.header.sequence_bit(lsn, self.bytes)
    }

    /// The newest checkpoint.
    pub(in crate::innodb) fn checkpoint(&self) -> Result<Checkpoint, Failure> {
        let mut look = 0;
        loop {
            let mut blocks = [[0; CHECKPOINT_BYTES]; 2];
            for (block, offset) in blocks.iter_mut().zip(CHECKPOINT_OFFSETS) {
                let read = self.file.read_exact_at(block, offset);
                read.map_err(|e| Failure::io("read redo log", &self.path, &e))?;
            }
            let [a, b] = &blocks;
            match Checkpoint::latest([a, b], self.header.first_lsn()) {
                Ok(checkpoint) => return Ok(checkpoint),
                Err(error) if look >= LOOKS_MAX => return Err(unknown_format(&self.path, &error)),
                Err(_) => {
                    look += 1;
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            }
        }
    }

    /// Reads records from `lsn` on. The caller makes sure that they have been written, and not yet
    /// been overwritten.
    pub(in crate::innodb) fn read(&self, lsn: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (mut lsn, mut rest) = (lsn, buffer);
        while !rest.is_empty() {
            let offset = self.header.offset(lsn, self.bytes);
            let until_end =
                usize::try_from(self.bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
            let (now, then) = rest.split_at_mut(until_end.clamp(1, rest.len()));
            self.file.read_exact_at(now, offset)?;
            lsn += now.len() as u64;
            rest = then;
        }
        Ok(())
    }

    /// Opens the log anew if another file has taken its place.
    pub(in crate::innodb) fn reopen_if_replaced(
        &self,
        directory: &Path,
    ) -> Result<Option<Self>, Failure> {
        // Between the two renames of a resize there is no such file for a moment.
        let Ok(metadata) = std::fs::metadata(directory.join(LOG_NAME)) else {
            return Ok(None);
        };
        if (metadata.dev(), metadata.ino()) == self.inode && metadata.len() == self.bytes {
            return Ok(None);
        }
        Self::open(directory).map(Some)
    }
}

fn unknown_format(path: &Path, error: &FormatError) -> Failure {
    Failure::precondition(
        "UNSUPPORTED_REDO_FORMAT",
        format!(
            "redo log {}: {error}; engine innodb knows that of MariaDB 10.8 and later",
            path.display()
        ),
    )
}

const _: () = assert!(START_OFFSET > CHECKPOINT_OFFSETS[1]);
