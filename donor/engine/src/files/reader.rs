//! Reads one listed file.

use std::{fs::File, io, os::unix::fs::FileExt as _, path::PathBuf};

use marcot_common::{failure::Failure, path::RelativePath};
use rustix::{
    fs::{Advice, SeekFrom},
    io::Errno,
};
use tonic::Code;

use super::tree::{Identity, Tree, changed, failure};
use crate::{Content, FileReader, Span};

/// A listed file, bound to what was listed by its descriptor.
#[derive(Debug)]
pub(crate) struct ListedFile {
    file: File,
    path: RelativePath,
    shown: PathBuf,
    listed: Identity,
    /// The last span found, from its first byte on: saves two calls for each chunk.
    span: Option<(u64, Span)>,
    finds_holes: bool,
}

impl ListedFile {
    /// Opens `path`, if it is still what was listed.
    pub(crate) fn open(
        tree: &Tree,
        path: &RelativePath,
        listed: &Identity,
    ) -> Result<Self, Failure> {
        let file = tree.open_listed(path, listed)?;
        // Advice only: a file system without it reads all the same.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
        Ok(Self {
            file,
            path: path.clone(),
            shown: tree.shown(Some(path)),
            listed: *listed,
            span: None,
            finds_holes: true,
        })
    }

    /// The span at `offset`, up to the end of the file where it is the last.
    fn find_span(&mut self, offset: u64) -> rustix::io::Result<Span> {
        let size = self.listed.size;
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data,
            // No data from here on.
            Err(Errno::NXIO) => size,
            Err(error) => return Err(error),
        };
        if data > offset {
            return Ok(Span { end: data.min(size), content: Content::Hole });
        }
        // The end of the file counts as a hole, so there is one always; a file that was cut
        // meanwhile has none, and reading tells of it.
        let hole = match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
            Ok(hole) => hole,
            Err(Errno::NXIO) => size,
            Err(error) => return Err(error),
        };
        let end = if hole > offset { hole.min(size) } else { size };
        Ok(Span { end, content: Content::Data })
    }

    fn read_failure(&self, offset: u64, error: &io::Error) -> Failure {
        if error.raw_os_error() == Some(libc::EIO) {
            return Failure::new(
                Code::DataLoss,
                "READ_ERROR",
                format!(
                    "{} cannot be read at offset {offset}: {error}; check the disk",
                    self.shown.display()
                ),
            )
            .with("path", &self.path)
            .with("offset", offset);
        }
        Failure::io("read", &self.shown, error).with("path", &self.path)
    }
}

impl FileReader for ListedFile {
    fn size(&self) -> u64 {
        self.listed.size
    }

    fn span(&mut self, offset: u64, end: u64) -> Result<Span, Failure> {
        let known = self.span.filter(|(start, span)| (*start..span.end).contains(&offset));
        let span = match known {
            Some((_, span)) => span,
            None if !self.finds_holes => Span { end, content: Content::Data },
            None => match self.find_span(offset) {
                Ok(span) => {
                    self.span = Some((offset, span));
                    span
                }
                Err(Errno::INVAL | Errno::NOTSUP | Errno::NOSYS) => {
                    self.finds_holes = false;
                    Span { end, content: Content::Data }
                }
                Err(error) => return Err(self.read_failure(offset, &error.into())),
            },
        };
        Ok(Span { end: span.end.min(end), ..span })
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            match self.file.read_at(&mut buffer[done..], at) {
                // Shorter than listed.
                Ok(0) => return Err(changed(&self.path)),
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.read_failure(at, &error)),
            }
        }
        Ok(())
    }

    fn check_unchanged(&mut self) -> Result<(), Failure> {
        let stat = rustix::fs::fstat(&self.file)
            .map_err(|error| failure("read attributes of", &self.shown, error))?;
        if self.listed.is_same_state(&Identity::of(&stat)) {
            Ok(())
        } else {
            Err(changed(&self.path))
        }
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards READ_ERROR: /proc/self/mem answers EIO at offset 0, as a bad disk does.
    #[test]
    fn a_read_error_names_file_and_offset() {
        let mut reader = ListedFile {
            file: File::open("/proc/self/mem").unwrap(),
            path: RelativePath::new(b"db/t.ibd").unwrap(),
            shown: PathBuf::from("/data/db/t.ibd"),
            listed: Identity::NONE,
            span: None,
            finds_holes: true,
        };
        let failure = reader.read_exact_at(&mut [0; 10], 0).unwrap_err();
        assert_eq!((failure.code, &*failure.reason), (Code::DataLoss, "READ_ERROR"));
        assert!(failure.message.contains("/data/db/t.ibd"), "{failure}");
        assert!(failure.message.contains("offset 0"), "{failure}");
    }

    /// Guards the fall-back: without it a file on a file system that knows no holes (here /proc)
    /// cannot be read.
    #[test]
    fn a_file_system_without_holes_gives_data_alone() {
        let mut reader = ListedFile {
            file: File::open("/proc/self/status").unwrap(),
            path: RelativePath::new(b"f").unwrap(),
            shown: PathBuf::from("/f"),
            listed: Identity { size: 4096, ..Identity::NONE },
            span: None,
            finds_holes: true,
        };
        let data = Span { end: 4000, content: Content::Data };
        assert_eq!(reader.span(10, 4000).unwrap(), data);
        assert!(!reader.finds_holes);
    }
}
