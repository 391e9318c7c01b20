//! Files read while the server's locks are held, kept on this host's disk, served after release.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use marcot_common::failure::Failure;
use tonic::Code;

use crate::{Content, FileReader, Span};

/// Bytes of one read.
const READ_BYTES: usize = 1 << 20;

/// A bounded store of copies.
#[derive(Debug)]
pub(super) struct Stash {
    file: Arc<File>,
    directory: PathBuf,
    end: u64,
    bytes_max: u64,
}

/// A file's copy in a stash.
#[derive(Debug, Clone)]
pub(super) struct Stashed {
    file: Arc<File>,
    directory: PathBuf,
    offset: u64,
    /// Its bytes.
    pub(super) length: u64,
}

impl Stash {
    /// Keeps at most `bytes_max` bytes in a file without a name in `directory`.
    pub(super) fn create(directory: &Path, bytes_max: u64) -> Result<Self, Failure> {
        let file = tempfile::tempfile_in(directory)
            .map_err(|e| Failure::io("create a file in", directory, &e))?;
        Ok(Self { file: Arc::new(file), directory: directory.to_owned(), end: 0, bytes_max })
    }

    /// Bytes that may still be taken.
    pub(super) fn left(&self) -> u64 {
        self.bytes_max.saturating_sub(self.end)
    }

    /// Copies all of a reader; `told` is called for each piece.
    pub(super) fn take(
        &mut self,
        reader: &mut dyn FileReader,
        told: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Stashed, Failure> {
        let length = reader.size();
        let stashed = self.reserve(length)?;
        let mut buffer = vec![0; READ_BYTES];
        let mut done = 0;
        while done < length {
            told()?;
            let part = usize::try_from(length - done).unwrap_or(READ_BYTES).min(READ_BYTES);
            reader.read_exact_at(&mut buffer[..part], done)?;
            self.write(stashed.offset + done, &buffer[..part])?;
            done += part as u64;
        }
        reader.check_unchanged()?;
        Ok(stashed)
    }

    /// Copies bytes.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<Stashed, Failure> {
        let stashed = self.reserve(bytes.len() as u64)?;
        self.write(stashed.offset, bytes)?;
        Ok(stashed)
    }

    /// Makes room for `length` bytes, which read as zero until they are written.
    pub(super) fn reserve(&mut self, length: u64) -> Result<Stashed, Failure> {
        let end = self.end.saturating_add(length);
        if end > self.bytes_max {
            return Err(Failure::new(
                Code::ResourceExhausted,
                "LOCKED_SET_TOO_LARGE",
                format!(
                    "{end} bytes would have to be read while the server's DDL is blocked, {} are \
                     allowed",
                    self.bytes_max
                ),
            )
            .with("bytes", end));
        }
        let offset = self.end;
        self.file.set_len(end).map_err(|e| self.failed(&e))?;
        self.end = end;
        let (file, directory) = (Arc::clone(&self.file), self.directory.clone());
        Ok(Stashed { file, directory, offset, length })
    }

    /// Writes bytes of a reserved copy.
    pub(super) fn write_at(
        &self,
        stashed: &Stashed,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Failure> {
        self.write(stashed.offset + offset, bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all_at(bytes, offset).map_err(|e| self.failed(&e))
    }

    fn failed(&self, error: &io::Error) -> Failure {
        Failure::io("use a file in", &self.directory, error)
    }
}

impl Stashed {
    /// Fills `buffer` from `offset` on.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        let end = offset.checked_add(buffer.len() as u64).filter(|&end| end <= self.length);
        if end.is_none() {
            return Err(Failure::bug("read beyond a stashed file"));
        }
        let read = self.file.read_exact_at(buffer, self.offset + offset);
        read.map_err(|e| Failure::io("use a file in", &self.directory, &e))
    }
}

/// Reads a stashed copy.
#[derive(Debug)]
pub(super) struct StashReader(pub(super) Stashed);

impl FileReader for StashReader {
    fn size(&self) -> u64 {
        self.0.length
    }

    fn span(&mut self, _: u64, end: u64) -> Result<Span, Failure> {
        Ok(Span { end, content: Content::Data })
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        self.0.read(buffer, offset)
    }

    fn check_unchanged(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn file(&self) -> Option<&File> {
        None
    }
}
