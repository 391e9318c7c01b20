//! The server's log files while the server writes, retires and makes them.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use marcot_common::failure::Failure;
use tonic::Code;

use super::redo::{
    BLOCK_BYTES, BLOCK_HEAD_BYTES, Block, FormatError, HEADER_BYTES, Header, block_start,
    check_block,
};
use crate::innodb::redo_log::Taken;

/// Where the files are, in the data directory.
pub(in crate::innodb) const LOG_DIRECTORY: &str = "#innodb_redo";

/// Name of the one file that a clone's log is, in its data directory.
pub(in crate::innodb) const LOG_NAME: &str = "#innodb_redo/#ib_redo0";

/// Most looks at the files: the server may be writing a header, or renaming one.
const LOOKS_MAX: u32 = 50;

/// One file, as it was when it was looked at.
#[derive(Debug)]
struct LogFile {
    file: File,
    header: Header,
    bytes: u64,
}

impl LogFile {
    fn open(path: &Path) -> io::Result<Result<Self, FormatError>> {
        let file = File::open(path)?;
        let mut head = vec![0; HEADER_BYTES];
        file.read_exact_at(&mut head, 0)?;
        let bytes = file.metadata()?.len();
        Ok(Header::parse(&head).map(|header| Self { file, header, bytes }))
    }

    fn start(&self) -> u64 {
        self.header.start_lsn()
    }

    /// LSN after its last block.
    fn end(&self) -> u64 {
        self.start() + block_start(self.bytes.saturating_sub(HEADER_BYTES as u64))
    }

    fn holds(&self, lsn: u64) -> bool {
        (self.start()..self.end()).contains(&lsn)
    }
}

/// The log's files, by way of the one that is being read.
#[derive(Debug)]
pub(in crate::innodb) struct LogFiles {
    directory: PathBuf,
    current: LogFile,
    checkpoint: u64,
    capacity: u64,
}

impl LogFiles {
    /// Looks at the files of a data directory; the file at hand is the newest checkpoint's.
    pub(in crate::innodb) fn open(data_directory: &Path) -> Result<Self, Failure> {
        let directory = data_directory.join(LOG_DIRECTORY);
        let mut looks = 1;
        loop {
            match Self::look(&directory)? {
                Ok(found) => return Ok(found),
                Err(failure) if looks >= LOOKS_MAX => return Err(failure),
                Err(_) => {
                    looks += 1;
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
            }
        }
    }

    /// One look; the inner error may pass.
    fn look(directory: &Path) -> Result<Result<Self, Failure>, Failure> {
        let (files, mut capacity) = (paths(directory)?, 0);
        let mut opened = Vec::new();
        let mut checkpoint = None;
        for path in files {
            let is_spare = path.as_os_str().as_encoded_bytes().ends_with(b"_tmp");
            if is_spare {
                capacity += std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
                continue;
            }
            let file = match LogFile::open(&path) {
                Ok(Ok(file)) => file,
                Ok(Err(error)) => return Ok(Err(unknown_format(&path, &error))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => continue,
                Err(e) => return Err(Failure::io("read redo log", &path, &e)),
            };
            if file.header.is_disabled() {
                return Err(disabled());
            }
            match file.header.checkpoint() {
                Ok(found) => checkpoint = checkpoint.max(found),
                Err(error) => return Ok(Err(unknown_format(&path, &error))),
            }
            capacity += file.bytes;
            opened.push(file);
        }
        let Some(checkpoint) = checkpoint else {
            return Ok(Err(no_checkpoint(directory)));
        };
        let Some(current) = opened.into_iter().find(|file| file.holds(checkpoint)) else {
            return Ok(Err(no_checkpoint(directory)));
        };
        Ok(Ok(Self { directory: directory.to_owned(), current, checkpoint, capacity }))
    }

    /// The newest checkpoint when the files were looked at.
    pub(in crate::innodb) fn checkpoint(&self) -> u64 {
        self.checkpoint
    }

    /// Header of the file at hand.
    pub(in crate::innodb) fn header(&self) -> &Header {
        &self.current.header
    }

    /// Bytes of all files.
    pub(in crate::innodb) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Makes the file at hand the one that holds `position`: the next one once this is read, any
    /// one after it was taken for other LSNs. An error when no file holds it any more.
    fn turn_to(&mut self, position: u64) -> Result<(), Failure> {
        let mut first = u64::MAX;
        let mut capacity = 0;
        let mut found = None;
        for path in paths(&self.directory)? {
            capacity += std::fs::metadata(&path).map_or(0, |metadata| metadata.len());
            if path.as_os_str().as_encoded_bytes().ends_with(b"_tmp") {
                continue;
            }
            // One that is being made or retired holds nothing of ours.
            if let Ok(Ok(file)) = LogFile::open(&path) {
                first = first.min(file.start());
                if file.holds(position) {
                    found = Some(file);
                }
            }
        }
        self.capacity = capacity;
        match found {
            Some(file) if file.header.is_disabled() => Err(disabled()),
            Some(file) => {
                self.current = file;
                Ok(())
            }
            None if first > position => Err(Failure::new(
                Code::Aborted,
                "REDO_OVERRUN",
                format!(
                    "the redo log's files from LSN {position} on were used again before they were \
                     read, the first that is there begins at {first}; raise \
                     innodb_redo_log_capacity, which is {capacity} bytes"
                ),
            )),
            // Its file is being made.
            None => Ok(()),
        }
    }

    /// Reads blocks from that of `position` on, up to that of `flushed`; returns how many bytes.
    pub(in crate::innodb) fn read(
        &mut self,
        position: u64,
        flushed: u64,
        buffer: &mut [u8],
    ) -> Result<usize, Failure> {
        let start = block_start(position);
        let end = written_end(flushed).next_multiple_of(BLOCK_BYTES as u64);
        if end > start && !self.current.holds(start) {
            self.turn_to(start)?;
        }
        if end <= start || !self.current.holds(start) {
            return Ok(0);
        }
        let end = end.min(self.current.end());
        let length = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
        let length = length.min(buffer.len() / BLOCK_BYTES * BLOCK_BYTES);
        let offset = HEADER_BYTES as u64 + (start - self.current.start());
        match self.current.file.read_exact_at(&mut buffer[..length], offset) {
            Ok(()) => Ok(length),
            // It was made shorter, for another use.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                self.turn_to(start)?;
                Ok(0)
            }
            Err(e) => Err(Failure::io("read redo log in", &self.directory, &e)),
        }
    }

    /// Takes blocks that were read, as far as they are what belongs there and the server has
    /// flushed them.
    pub(in crate::innodb) fn take(
        &mut self,
        position: u64,
        flushed: u64,
        bytes: &[u8],
    ) -> Result<Taken, Failure> {
        let start = block_start(position);
        let written = written_end(flushed);
        let mut taken = Taken { bytes: 0, position, deletions: Vec::new(), misread: None };
        for block in bytes.chunks_exact(BLOCK_BYTES) {
            let lsn = start + taken.bytes as u64;
            let Block { used, .. } = match check_block(block, lsn) {
                Ok(block) => block,
                Err(error @ FormatError::Encrypted { .. }) => return Err(encrypted(&error)),
                Err(error) => {
                    // Retired and used again for other LSNs, or written while it was read.
                    if matches!(error, FormatError::OtherBlock { .. }) {
                        self.turn_to(lsn)?;
                    }
                    taken.misread = Some(error.to_string());
                    break;
                }
            };
            let end = (lsn + used as u64).min(written);
            if used < BLOCK_BYTES && end < written {
                let text =
                    format!("the block at LSN {lsn} ends before what the server has flushed");
                taken.misread = Some(text);
                break;
            }
            taken.bytes += BLOCK_BYTES;
            taken.position = end.max(position);
        }
        if taken.position == written {
            taken.position = flushed;
        }
        Ok(taken)
    }
}

/// End of what a log up to `lsn` has in its blocks: one that has only its head yet is not written.
pub(in crate::innodb) fn written_end(lsn: u64) -> u64 {
    if lsn % BLOCK_BYTES as u64 <= BLOCK_HEAD_BYTES as u64 { block_start(lsn) } else { lsn }
}

/// All files of the log, spare ones too, in no order.
fn paths(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |e: io::Error| Failure::io("list redo log", directory, &e);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().as_encoded_bytes().starts_with(b"#ib_redo") {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

fn unknown_format(path: &Path, error: &FormatError) -> Failure {
    Failure::precondition(
        "UNSUPPORTED_REDO_FORMAT",
        format!(
            "redo log {}: {error}; engine innodb knows that of MySQL 8.0.30 and later",
            path.display()
        ),
    )
}

fn no_checkpoint(directory: &Path) -> Failure {
    Failure::precondition(
        "UNSUPPORTED_REDO_FORMAT",
        format!("no redo log file in {} holds the last checkpoint", directory.display()),
    )
}

/// What a server without redo, or with redo that cannot be read, is refused with.
pub(in crate::innodb) fn disabled() -> Failure {
    Failure::precondition(
        "REDO_LOG_DISABLED",
        "the server writes no redo log (ALTER INSTANCE DISABLE INNODB REDO_LOG): a copy of its files \
         could not be made consistent; enable it, and clone again",
    )
    .mysql(3983)
}

fn encrypted(error: &dyn std::fmt::Display) -> Failure {
    Failure::precondition(
        "REDO_LOG_ENCRYPTED",
        format!(
            "redo log: {error} (innodb_redo_log_encrypt=ON): it cannot be checked, nor cut at a \
             point, without the server's key; switch it off, and clone again"
        ),
    )
}
