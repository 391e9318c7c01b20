//! An older copy on this host: what is equal in it need not come over the network.
//!
//! Invariants:
//! * Copy first, then compare (R7): a part of the older file is copied into staging, where nobody
//!   else writes, and what is staged is hashed. Whatever happens to the older file meanwhile, a
//!   block that the donor finds equal is equal in staging.
//! * The older copy is only read. One that cannot be read is passed by.
//! * What is staged already, of a snapshot that was lost or of a unit that was cut short, is hashed
//!   where it is, and nothing is copied over it.
//! * Only files that the list adds or replaces are looked for: what a database writes by itself
//!   (its log, its identity) comes from the donor.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    path::Path,
    sync::LazyLock,
};

use bytes::{BufMut as _, Bytes, BytesMut};
use marcot_common::{chunk::DIGEST_BYTES, failure::Failure, path::RelativePath};
use rustix::{
    fs::{FallocateFlags, Mode, OFlags, ResolveFlags, SeekFrom},
    io::Errno,
};

use crate::{
    certificate::digests::{self, Digest},
    plan::Part,
};

/// Bytes of a block: the page size of most databases, so that one changed page costs one block.
/// Digests are then a thousandth of the data.
pub const BLOCK_BYTES: u64 = 16 << 10;

/// Bytes of one read or copy.
const PIECE_BYTES: usize = 1 << 20;

/// Where equal blocks are looked for: in staging itself, then in an older copy, if there is one.
#[derive(Debug, Default)]
pub struct Reuse {
    older: Option<OwnedFd>,
}

/// What is staged of a part, as digests of its blocks.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// First byte of the first block.
    first: u64,
    digests: Bytes,
    /// Of the same bytes, digests of the certificate's blocks.
    certified: CertifiedBlocks,
    /// Whether it was staged before: of a snapshot that was lost, or of a unit that was cut short.
    is_staged: bool,
}

/// Digest of a block that reads as zero.
static ZERO_DIGEST: LazyLock<Digest> =
    LazyLock::new(|| *blake3::hash(&[0; BLOCK_BYTES as usize]).as_bytes());

/// Digests of the certificate's blocks that were read whole, one after another.
#[derive(Debug, Clone, Default)]
pub struct CertifiedBlocks {
    first: u64,
    digests: Bytes,
}

impl CertifiedBlocks {
    /// The digest of a block.
    #[must_use]
    pub fn get(&self, block: u64) -> Option<Digest> {
        let at = usize::try_from(block.checked_sub(self.first)?).ok()?;
        self.digests.chunks_exact(digests::DIGEST_BYTES).nth(at)?.try_into().ok()
    }
}

impl Known {
    /// Whether there is nothing to reuse.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// Whether it was staged before this unit began.
    #[must_use]
    pub fn is_staged(&self) -> bool {
        self.is_staged
    }

    /// Bytes of a range that come again: the donor sends blocks of which others were staged before. What
    /// reads as zero had not come.
    #[must_use]
    pub fn again(&self, offset: u64, length: u64) -> u64 {
        if !self.is_staged {
            return 0;
        }
        let end = offset.saturating_add(length);
        let skipped = offset.saturating_sub(self.first) / BLOCK_BYTES;
        let mut at = self.first + skipped * BLOCK_BYTES;
        let mut bytes = 0;
        let digests = self.digests.chunks_exact(DIGEST_BYTES);
        for digest in digests.skip(usize::try_from(skipped).unwrap_or(usize::MAX)) {
            if at >= end {
                break;
            }
            if *digest != ZERO_DIGEST[..DIGEST_BYTES] {
                bytes += (at + BLOCK_BYTES).min(end).saturating_sub(at.max(offset));
            }
            at += BLOCK_BYTES;
        }
        bytes
    }

    /// Digests of the certificate's blocks, made of the very bytes that were compared.
    #[must_use]
    pub fn certified(&self) -> CertifiedBlocks {
        self.certified.clone()
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
        Ok(Self { older: Some(root) })
    }

    /// Hashes what is staged of a part; where nothing is, copies what the older copy has of it to
    /// the staged `file`, which has its full size, and hashes it there.
    pub fn stage(&self, part: &Part, file: &File) -> io::Result<Known> {
        self.stage_by(part, file, copy)
    }

    fn stage_by(&self, part: &Part, file: &File, copy: CopyRange) -> io::Result<Known> {
        if has_data(file, part)? {
            return hash_staged(part, file);
        }
        self.try_stage(part, file, copy).or_else(|error| {
            tracing::debug!(path = %part.path, %error, "an older file is not reused");
            // Some of it may have been copied: what no digest covers must not stay.
            punch_hole(file, part.offset, part.length)?;
            Ok(Known::default())
        })
    }

    fn try_stage(&self, part: &Part, file: &File, copy: CopyRange) -> io::Result<Known> {
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
        if !has_data(file, part)? {
            return Ok(Known::default());
        }
        hash(file, first, end, part.size)
    }

    /// A regular file of the older copy, through no link.
    fn open_file(&self, path: &RelativePath) -> io::Result<Option<File>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let Some(root) = &self.older else {
            return Ok(None);
        };
        match rustix::fs::openat2(root, path.as_path(), flags, Mode::empty(), beneath) {
            Ok(fd) => {
                let file = File::from(fd);
                Ok(Some(file).filter(|file| file.metadata().is_ok_and(|m| m.is_file())))
            }
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NXIO) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// Copies a range of the first file to the same place of the second.
type CopyRange = fn(&File, &File, u64, u64) -> io::Result<()>;

/// Makes a range read as zero; where the file system cannot leave it out, zeros are written.
pub fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, offset, length) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            let zeros = vec![0; 64 << 10];
            let mut done = 0;
            while done < length {
                let part = usize::try_from(length - done).unwrap_or(zeros.len()).min(zeros.len());
                file.write_all_at(&zeros[..part], offset + done)?;
                done += part as u64;
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether a part of a staged file is not all hole.
fn has_data(file: &File, part: &Part) -> io::Result<bool> {
    match rustix::fs::seek(file, SeekFrom::Data(part.offset)) {
        Ok(data) => Ok(data < part.offset + part.length),
        Err(Errno::NXIO) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Hashes all of a part where it is.
fn hash_staged(part: &Part, file: &File) -> io::Result<Known> {
    let end = part.offset + part.length;
    if !part.offset.is_multiple_of(BLOCK_BYTES)
        || !(end == part.size || end.is_multiple_of(BLOCK_BYTES))
    {
        // What no digest covers must not stay: the part is written as one that reads as zero.
        punch_hole(file, part.offset, part.length)?;
        return Ok(Known::default());
    }
    Ok(Known { is_staged: true, ..hash(file, part.offset, end, part.size)? })
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

/// Hashes what is staged of a range: each piece is read once.
fn hash(file: &File, first: u64, end: u64, file_size: u64) -> io::Result<Known> {
    let blocks = usize::try_from((end - first).div_ceil(BLOCK_BYTES)).unwrap_or(0);
    let mut digests = BytesMut::with_capacity(blocks * DIGEST_BYTES);
    let mut certified = BytesMut::new();
    let mut buffer = vec![0; PIECE_BYTES];
    let mut at = first;
    while at < end {
        let wanted = usize::try_from(end - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        let piece = &mut buffer[..wanted];
        file.read_exact_at(piece, at)?;
        for block in piece.chunks(usize::try_from(BLOCK_BYTES).unwrap_or(PIECE_BYTES)) {
            digests.put_slice(&blake3::hash(block).as_bytes()[..DIGEST_BYTES]);
        }
        // Only the last piece can be no whole block of the certificate.
        if wanted == PIECE_BYTES || end == file_size {
            certified.put_slice(blake3::hash(piece).as_bytes());
        }
        at += wanted as u64;
    }
    // Pieces are blocks of the certificate where they begin with one.
    if !first.is_multiple_of(digests::BLOCK_BYTES) {
        certified.clear();
    }
    let certified =
        CertifiedBlocks { first: first / digests::BLOCK_BYTES, digests: certified.freeze() };
    Ok(Known { first, digests: digests.freeze(), certified, is_staged: false })
}

const _: () = assert!(PIECE_BYTES as u64 == digests::BLOCK_BYTES);

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
        let known = Reuse::open(home.path()).unwrap().stage(part, &file).unwrap();
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
        assert_eq!(known.again(0, size), 0, "an older copy's bytes come for the first time");
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
        let known = Reuse::open(home.path()).unwrap().stage(&part(9, 0, 9), &file).unwrap();
        assert_eq!(known.from(0), Bytes::new());
    }

    /// Guards what is staged already: it is hashed where it is, and no older copy is put over it.
    #[test]
    fn what_is_staged_is_hashed_where_it_is() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("d")).unwrap();
        let block = usize::try_from(BLOCK_BYTES).unwrap();
        std::fs::write(home.path().join("d/f"), vec![1; 3 * block]).unwrap();
        let file = tempfile::tempfile().unwrap();
        let size = 3 * BLOCK_BYTES;
        file.set_len(size).unwrap();
        file.write_all_at(&vec![2; block], BLOCK_BYTES).unwrap();
        let known = Reuse::open(home.path()).unwrap().stage(&part(size, 0, size), &file).unwrap();
        let (zero, two) = (digest(&vec![0; block]), digest(&vec![2; block]));
        assert_eq!(known.from(0), [zero.clone(), two, zero].concat());
        let nothing = Reuse::default().stage(&part(size, 2 * BLOCK_BYTES, 0), &file).unwrap();
        assert!(nothing.is_empty());
        // What had come before, and comes once more.
        assert_eq!(known.again(0, size), BLOCK_BYTES);
        assert_eq!(known.again(BLOCK_BYTES + 5, BLOCK_BYTES), BLOCK_BYTES - 5);
        assert_eq!(known.again(2 * BLOCK_BYTES, BLOCK_BYTES), 0);
        assert_eq!(known.again(9 * BLOCK_BYTES, BLOCK_BYTES), 0);
    }

    /// Guards an older file that fails half-way, on a bad disk: what was copied of it by then does
    /// not stay where the donor has a hole, which is not written.
    #[test]
    fn an_older_file_that_cannot_be_read_to_its_end_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("d")).unwrap();
        let size = 4 * BLOCK_BYTES;
        std::fs::write(home.path().join("d/f"), vec![7; usize::try_from(size).unwrap()]).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * size).unwrap();
        let (before, after) = (BLOCK_BYTES, 2 * size - 1);
        file.write_all_at(&[9], after).unwrap();
        let part = part(2 * size, before, size - before);
        let fails = |from: &File, to: &File, start: u64, end: u64| {
            copy(from, to, start, end - BLOCK_BYTES)?;
            Err(Errno::IO.into())
        };
        let known = Reuse::open(home.path()).unwrap().stage_by(&part, &file, fails).unwrap();
        assert!(known.is_empty());
        let mut content = vec![1; usize::try_from(2 * size).unwrap()];
        file.read_exact_at(&mut content, 0).unwrap();
        let last = content.pop();
        assert!(content.iter().all(|&byte| byte == 0), "old bytes have stayed");
        assert_eq!(last, Some(9), "what is outside of the part was touched");
    }

    /// Guards bytes that no digest covers: they do not stay.
    #[test]
    fn a_part_between_blocks_is_cleared() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100_000).unwrap();
        file.write_all_at(&[7; 5000], 1000).unwrap();
        let known = Reuse::default().stage(&part(100_000, 1000, 5000), &file).unwrap();
        assert!(known.is_empty());
        let mut left = [1; 5000];
        file.read_exact_at(&mut left, 1000).unwrap();
        assert_eq!(left, [0; 5000]);
    }
}
