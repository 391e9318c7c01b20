//! An older copy on this host: what is equal in it need not come over the network.
//!
//! Invariants:
//! * Copy first, then compare (R7): a part of the older file is copied into staging, where nobody
//!   else writes, and what is staged is hashed. Whatever happens to the older file meanwhile, a
//!   block that the donor finds equal is equal in staging.
//! * The older copy is only read. One that cannot be read is passed by.
//! * Only files that the list adds or replaces are looked for: what a database writes by itself
//!   (its log, its identity) comes from the donor.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    path::Path,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use marcot_common::{chunk::DIGEST_BYTES, failure::Failure, path::RelativePath};
use rustix::{
    fs::{Mode, OFlags, ResolveFlags, SeekFrom},
    io::Errno,
};

use crate::plan::Part;

/// Bytes of a block: the page size of most databases, so that one changed page costs one block.
/// Digests are then a thousandth of the data.
pub const BLOCK_BYTES: u64 = 16 << 10;

/// Bytes of one read or copy.
const PIECE_BYTES: usize = 1 << 20;

/// An older copy.
#[derive(Debug)]
pub struct Reuse {
    root: OwnedFd,
}

/// What is staged of a part, as digests of its blocks.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// First byte of the first block.
    first: u64,
    digests: Bytes,
}

impl Known {
    /// Whether there is nothing to reuse.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// Digests for a range that begins at `offset`: of the first whole block from there on.
    #[must_use]
    pub fn from(&self, offset: u64) -> Bytes {
        let skipped = offset.saturating_sub(self.first).div_ceil(BLOCK_BYTES);
        let at = usize::try_from(skipped).ok().and_then(|n| n.checked_mul(DIGEST_BYTES));
        match at {
            Some(at) if at <= self.digests.len() => self.digests.slice(at..),
            _ => Bytes::new(),
        }
    }
}

impl Reuse {
    /// Opens the older copy at `path`.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| Failure::io("open the copy to reuse", path, &e.into()))?;
        Ok(Self { root })
    }

    /// Copies what the older copy has of a part to the staged `file`, and hashes it there.
    #[must_use]
    pub fn stage(&self, part: &Part, file: &File) -> Known {
        match self.try_stage(part, file) {
            Ok(known) => known,
            Err(error) => {
                tracing::debug!(path = %part.path, %error, "an older file is not reused");
                Known::default()
            }
        }
    }

    fn try_stage(&self, part: &Part, file: &File) -> io::Result<Known> {
        let Some(older) = self.open_file(&part.path)? else {
            return Ok(Known::default());
        };
        let first = part.offset.next_multiple_of(BLOCK_BYTES);
        let size = older.metadata()?.len();
        // A last block that is not whole is one only at the end of the file.
        let part_end = part.offset + part.length;
        let end = match size.min(part_end) {
            end if end == part.size => end,
            end => end - end % BLOCK_BYTES,
        };
        if end <= first {
            return Ok(Known::default());
        }
        copy(&older, file, first, end)?;
        Ok(Known { first, digests: digests(file, first, end)? })
    }

    /// A regular file of the older copy, through no link.
    fn open_file(&self, path: &RelativePath) -> io::Result<Option<File>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        match rustix::fs::openat2(&self.root, path.as_path(), flags, Mode::empty(), beneath) {
            Ok(fd) => {
                let file = File::from(fd);
                Ok(Some(file).filter(|file| file.metadata().is_ok_and(|m| m.is_file())))
            }
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// Copies a range without its holes: by the file system where it can, which shares blocks then.
fn copy(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let data = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(data) if data < end => data,
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            Err(_) => at,
        };
        let hole = match rustix::fs::seek(from, SeekFrom::Hole(data)) {
            Ok(hole) if hole > data => hole.min(end),
            _ => end,
        };
        copy_data(from, to, data, hole)?;
        at = hole;
    }
    Ok(())
}

fn copy_data(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let left = usize::try_from(end - at).unwrap_or(usize::MAX).min(16 * PIECE_BYTES);
        let (mut source, mut target) = (at, at);
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), left) {
            // Shorter than a moment ago: what is missing is zero in staging.
            Ok(0) => return Ok(()),
            Ok(copied) => at += copied as u64,
            Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOSYS) => {
                return read_and_write(from, to, at, end);
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn read_and_write(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; PIECE_BYTES];
    let mut at = start;
    while at < end {
        let wanted = usize::try_from(end - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        let read = from.read_at(&mut buffer[..wanted], at)?;
        if read == 0 {
            return Ok(());
        }
        to.write_all_at(&buffer[..read], at)?;
        at += read as u64;
    }
    Ok(())
}

fn digests(file: &File, start: u64, end: u64) -> io::Result<Bytes> {
    let blocks = usize::try_from((end - start).div_ceil(BLOCK_BYTES)).unwrap_or(0);
    let mut digests = BytesMut::with_capacity(blocks * DIGEST_BYTES);
    let mut buffer = vec![0; PIECE_BYTES];
    let mut at = start;
    while at < end {
        let wanted = usize::try_from(end - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        file.read_exact_at(&mut buffer[..wanted], at)?;
        for block in buffer[..wanted].chunks(usize::try_from(BLOCK_BYTES).unwrap_or(PIECE_BYTES)) {
            digests.put_slice(&blake3::hash(block).as_bytes()[..DIGEST_BYTES]);
        }
        at += wanted as u64;
    }
    Ok(digests.freeze())
}

#[cfg(test)]
mod tests {
    use marcot_common::entry::FileId;

    use super::*;

    fn part(size: u64, offset: u64, length: u64) -> Part {
        let path = RelativePath::new(b"d/f").unwrap();
        Part { file_id: FileId(1), path, size, offset, length, whole: None, patches: false }
    }

    /// Stages a part of `older` into a file of its final size.
    fn staged(older: &[u8], part: &Part) -> (Known, Vec<u8>) {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("d")).unwrap();
        std::fs::write(home.path().join("d/f"), older).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(part.size).unwrap();
        let known = Reuse::open(home.path()).unwrap().stage(part, &file);
        let mut content = vec![0; usize::try_from(part.size).unwrap()];
        file.read_exact_at(&mut content, 0).unwrap();
        (known, content)
    }

    fn digest(block: &[u8]) -> Vec<u8> {
        blake3::hash(block).as_bytes()[..DIGEST_BYTES].to_vec()
    }

    #[test]
    fn digests_are_those_of_what_is_staged() {
        let block = usize::try_from(BLOCK_BYTES).unwrap();
        let older: Vec<u8> = (0..2 * block + 100).map(|n| (n / 7 % 251) as u8).collect();
        let size = older.len() as u64;
        let (known, content) = staged(&older, &part(size, 0, size));
        assert_eq!(content, older);
        let all = [
            digest(&older[..block]),
            digest(&older[block..2 * block]),
            digest(&older[2 * block..]),
        ];
        assert_eq!(known.from(0), all.concat());
        assert_eq!(known.from(1), all[1..].concat());
        assert_eq!(known.from(BLOCK_BYTES), all[1..].concat());
        assert_eq!(known.from(size), Bytes::new());
    }

    /// Guards the end: a short last block of the older file is no block of a longer one.
    #[test]
    fn an_older_file_of_another_size_gives_its_whole_blocks() {
        let block = usize::try_from(BLOCK_BYTES).unwrap();
        let older = vec![7; block + 100];
        let longer = part(4 * BLOCK_BYTES, 0, 4 * BLOCK_BYTES);
        assert_eq!(staged(&older, &longer).0.from(0), digest(&older[..block]));
        let shorter = part(BLOCK_BYTES + 50, 0, BLOCK_BYTES + 50);
        let known = staged(&older, &shorter).0;
        assert_eq!(known.from(0), [digest(&older[..block]), digest(&older[..50])].concat());
        // A segment within.
        let segment = part(4 * BLOCK_BYTES, 5, BLOCK_BYTES);
        assert_eq!(staged(&older, &segment).0.from(5), Bytes::new());
    }

    #[test]
    fn what_is_no_regular_file_beneath_is_passed_by() {
        let home = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", home.path().join("d")).unwrap();
        let file = tempfile::tempfile().unwrap();
        let known = Reuse::open(home.path()).unwrap().stage(&part(9, 0, 9), &file);
        assert_eq!(known.from(0), Bytes::new());
    }
}
