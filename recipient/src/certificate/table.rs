//! The newest digest of every block of a tree, on disk: memory is 24 bytes for each file, and while they
//! are counted up to three times as much, for the vector that holds them doubles as it grows.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use marcot_common::{
    entry::{Entry, FileId, Kind},
    failure::Failure,
    spool::unnamed_file,
};

use super::digests::{DIGEST_BYTES, Digest, DigestRun, blocks_of, check_run, zero_digest};
use crate::list::FileList;

/// Digests written at once where blocks are zero or unknown.
const FILL_BLOCKS: u64 = 4096;

/// What stands for a block that nobody knows.
const UNKNOWN: Digest = [0; DIGEST_BYTES];

/// Digests by file and block.
#[derive(Debug)]
pub struct DigestTable {
    file: File,
    directory: PathBuf,
    /// Ids of files with their first place in the table and their blocks, ascending.
    places: Vec<(FileId, u64, u64)>,
}

impl DigestTable {
    /// A table for the files of a list, all blocks unknown; its file lies, without a name, in
    /// `directory`.
    pub fn create(directory: &Path, list: &FileList) -> Result<Self, Failure> {
        let mut places = Vec::new();
        let mut next = 0;
        for entry in list.entries()? {
            let Entry { file_id, kind, .. } = entry?;
            if let Some(Kind::Regular { size, .. }) = kind {
                places.push((file_id, next, blocks_of(size)));
                next += blocks_of(size);
            }
        }
        places.sort_unstable();
        let file = unnamed_file(directory)
            .and_then(|file| file.set_len(next * DIGEST_BYTES as u64).map(|()| file))
            .map_err(|e| Failure::io("create a table of digests in", directory, &e))?;
        Ok(Self { file, directory: directory.to_owned(), places })
    }

    /// Takes what a run says. Files that are no more, and blocks beyond a file's end, are passed by.
    pub fn take(&self, run: &DigestRun) -> Result<(), Failure> {
        check_run(run)?;
        let Some((place, blocks)) = self.place(FileId(run.file_id)) else {
            return Ok(());
        };
        let count = run.blocks().min(blocks.saturating_sub(run.first));
        if count == 0 {
            return Ok(());
        }
        let bytes = usize::try_from(count).unwrap_or(0) * DIGEST_BYTES;
        let at = place + run.first;
        let written = match run {
            run if !run.digests.is_empty() => self.write(at, &run.digests[..bytes]),
            run if run.zero_blocks > 0 => self.fill(at, count, &zero_digest()),
            _ => self.fill(at, count, &UNKNOWN),
        };
        written.map_err(|e| Failure::io("write a table of digests in", &self.directory, &e))
    }

    /// The digest of a block; `None` when it is not known.
    pub fn get(&self, file: FileId, block: u64) -> Result<Option<Digest>, Failure> {
        let Some((place, _)) = self.place(file).filter(|(_, blocks)| block < *blocks) else {
            return Err(Failure::bug(format!("no place for block {block} of file {}", file.0)));
        };
        let mut digest = UNKNOWN;
        self.file
            .read_exact_at(&mut digest, (place + block) * DIGEST_BYTES as u64)
            .map_err(|e| Failure::io("read a table of digests in", &self.directory, &e))?;
        Ok((digest != UNKNOWN).then_some(digest))
    }

    fn place(&self, file: FileId) -> Option<(u64, u64)> {
        let found = self.places.binary_search_by_key(&file, |place| place.0).ok()?;
        self.places.get(found).map(|(_, place, blocks)| (*place, *blocks))
    }

    fn write(&self, at: u64, digests: &[u8]) -> io::Result<()> {
        self.file.write_all_at(digests, at * DIGEST_BYTES as u64)
    }

    fn fill(&self, at: u64, count: u64, digest: &Digest) -> io::Result<()> {
        let some = usize::try_from(count.min(FILL_BLOCKS)).unwrap_or(0);
        let buffer = digest.repeat(some);
        let mut done = 0;
        while done < count {
            let now = usize::try_from((count - done).min(FILL_BLOCKS)).unwrap_or(0);
            self.write(at + done, &buffer[..now * DIGEST_BYTES])?;
            done += now as u64;
        }
        Ok(())
    }
}
