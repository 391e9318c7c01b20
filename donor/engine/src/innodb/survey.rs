//! Walks the data directory of a live server: tells tablespaces from other files, and marks each
//! tablespace by what it is, so that the next walk finds out when another one has taken its place.

use std::{collections::BTreeSet, fs::File, os::fd::BorrowedFd, os::unix::fs::FileExt as _};

use marcot_common::{entry::Kind, failure::Failure, path::RelativePath};
use rustix::fs::{AtFlags, StatxFlags};

use super::{
    classify::{Class, Classifier},
    flavor::Flavor,
    known::{FoundSpaces, Known, Unwritten},
    mariadb::frm::{FRM_BYTES, TableEngine, table_engine},
    mysql::{
        self,
        sdi::{SDI_BYTES_MAX, foreign_engine},
    },
    redo_log, sabotage,
    tablespace::first_page,
};
use crate::files::{
    tree::Identity,
    walk::{Found, Judge},
};

/// Bytes of a tablespace's first page up to the end of what is looked at.
const HEAD_BYTES: usize = 4096;

/// The smallest page: KEY_BLOCK_SIZE=1.
const PAGE_BYTES_MIN: u64 = 1024;

/// Most tables that one error names.
const FOREIGN_MAX: usize = 20;

/// Set in a mark: neither the file's first page nor the server says what it is, so that it is copied
/// as it is, and again each time it is listed.
const UNSETTLED: u64 = 1 << 63;

/// Set in a mark: the redo log from the LSN on that the other bits are (LSNs have 62 bits at most).
const REDO: u64 = 1 << 62;

/// The redo log that a clone is to have, as far as it has been followed.
#[derive(Debug, Clone, Copy)]
pub(super) struct RedoSoFar {
    /// Where it begins.
    pub(super) checkpoint: u64,
    /// Bytes of the composed file.
    pub(super) size: u64,
}

/// What a mark (`Identity::live`) says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    /// No tablespace of the server.
    None,
    /// Of this space id.
    Settled(u32),
    /// A tablespace whose first page is empty, and that the server did not know before the walk.
    Unsettled,
    /// The redo log from this LSN on.
    Redo(u64),
}

impl Mark {
    /// Reads `Identity::live`.
    pub(super) fn of(live: u64) -> Self {
        match live {
            0 => Self::None,
            n if n & UNSETTLED != 0 => Self::Unsettled,
            n if n & REDO != 0 => Self::Redo(n & !REDO),
            n => u32::try_from(n - 1).map_or(Self::Unsettled, Self::Settled),
        }
    }
}

/// Judges what one walk finds.
#[derive(Debug)]
pub(super) struct Survey<'a> {
    classifier: &'a Classifier,
    /// Tablespaces that the server knew before the walk.
    known: &'a Known,
    /// Those of them whose first page is not written yet.
    pub(super) unwritten: Unwritten,
    /// What was found of them.
    pub(super) spaces: FoundSpaces,
    redo: RedoSoFar,
    /// Whether it is in the list.
    redo_listed: bool,
    /// Makes the mark of each unsettled file of each walk another one.
    unsettled: &'a mut u64,
    /// Files to be read once commits are blocked.
    pub(super) late: Vec<RelativePath>,
    /// Tables whose engine's files are not known, and the engine; the first few.
    foreign: Vec<(RelativePath, String)>,
    /// Engines of all other tables.
    pub(super) engines: BTreeSet<&'static str>,
}

impl<'a> Survey<'a> {
    pub(super) fn new(
        classifier: &'a Classifier,
        known: &'a Known,
        redo: RedoSoFar,
        unsettled: &'a mut u64,
    ) -> Self {
        Self {
            classifier,
            known,
            unwritten: Unwritten::default(),
            spaces: FoundSpaces::default(),
            redo,
            redo_listed: false,
            unsettled,
            late: Vec::new(),
            foreign: Vec::new(),
            engines: BTreeSet::new(),
        }
    }

    /// Fails when tables were found that this engine cannot copy.
    pub(super) fn check_engines(&self) -> Result<(), Failure> {
        if self.foreign.is_empty() {
            return Ok(());
        }
        let named: Vec<String> =
            self.foreign.iter().map(|(table, engine)| format!("{table} ({engine})")).collect();
        Err(Failure::precondition(
            "UNSUPPORTED_TABLE_ENGINE",
            format!(
                "tables in engines whose files are not known here: {}; drop or convert them, or \
                 clone with the server's own means",
                named.join(", ")
            ),
        ))
    }

    fn note_engine(&mut self, path: &RelativePath, file: BorrowedFd<'_>) -> Result<(), Failure> {
        let mut bytes = vec![0; FRM_BYTES];
        let file = owned(path, file)?;
        let filled = read_up_to(&file, &mut bytes)
            .map_err(|e| Failure::io("read table definition", path.as_path(), &e))?;
        match table_engine(&bytes[..filled]) {
            TableEngine::Other(engine) if self.foreign.len() < FOREIGN_MAX => {
                self.foreign.push((path.clone(), engine));
            }
            TableEngine::Copied(engine) => {
                self.engines.insert(engine);
            }
            TableEngine::Other(_) | TableEngine::None => {}
        }
        Ok(())
    }

    fn note_engine_of_sdi(
        &mut self,
        path: &RelativePath,
        file: BorrowedFd<'_>,
    ) -> Result<(), Failure> {
        let file = owned(path, file)?;
        let length = file.metadata().map_or(0, |metadata| metadata.len());
        let mut bytes =
            vec![0; usize::try_from(length).unwrap_or(SDI_BYTES_MAX).min(SDI_BYTES_MAX)];
        let filled = read_up_to(&file, &mut bytes)
            .map_err(|e| Failure::io("read table definition", path.as_path(), &e))?;
        if let Some(engine) = foreign_engine(&bytes[..filled])
            && self.foreign.len() < FOREIGN_MAX
        {
            self.foreign.push((path.clone(), engine));
        }
        Ok(())
    }

    fn mark(
        &mut self,
        class: Class,
        file: BorrowedFd<'_>,
        shown: &RelativePath,
    ) -> Result<u64, Failure> {
        if matches!(class, Class::System(index) if index > 0) {
            return Ok(1);
        }
        if sabotage::is("page-after-point") && shown.as_bytes().starts_with(b"bank/") {
            *self.unsettled += 1;
            return Ok(UNSETTLED | *self.unsettled);
        }
        let file = owned(shown, file)?;
        let mut head = [0; HEAD_BYTES];
        let filled = read_up_to(&file, &mut head)
            .map_err(|e| Failure::io("read tablespace", shown.as_path(), &e))?;
        if head[..filled].iter().all(|&b| b == 0) {
            return Ok(self.without_first_page(shown, filled == 0));
        }
        let space = head[34..].first_chunk().map_or(0, |b| u32::from_be_bytes(*b));
        if self.known.has(space) {
            return Ok(self.settled(space));
        }
        // Not open in the server, or damaged: only a page that is right as a whole can tell.
        match first_page(&file, shown, shown.as_path(), self.classifier.flavor()) {
            Ok(Some(format)) if self.known.has(format.space_id()) => {
                Ok(self.settled(format.space_id()))
            }
            // Nobody writes it by redo, it is a file as any other.
            Ok(Some(_)) => Ok(0),
            Ok(None) => Ok(self.without_first_page(shown, false)),
            Err(_) if is_removed(&file) => Ok(0),
            Err(failure) => Err(failure),
        }
    }

    fn settled(&mut self, space: u32) -> u64 {
        self.spaces.ids.insert(space);
        u64::from(space) + 1
    }

    /// The mark of a file whose first page is all zero.
    fn without_first_page(&mut self, shown: &RelativePath, is_empty: bool) -> u64 {
        if let Some(named) = self.known.named(shown) {
            self.unwritten.insert(named);
            return self.settled(named.format.space_id());
        }
        self.spaces.has_unsettled = true;
        // One that is empty was being made as the server ended, nobody knows it.
        if !is_empty {
            self.spaces.note_unnamed(shown);
        }
        *self.unsettled += 1;
        UNSETTLED | *self.unsettled
    }
}

impl Judge for Survey<'_> {
    fn leaves_out(&mut self, path: &RelativePath, is_directory: bool) -> Option<&'static str> {
        let class =
            if is_directory { self.classifier.directory(path) } else { self.classifier.file(path) };
        match class {
            Class::LeftOut(reason) => Some(reason),
            // Sabotage: the log that it cuts short must not be there already.
            Class::Redo if sabotage::is("old-redo") || self.redo_listed => Some("redo_log"),
            Class::Late => {
                self.late.push(path.clone());
                Some("")
            }
            _ => None,
        }
    }

    fn look(&mut self, mut found: Found, file: BorrowedFd<'_>) -> Result<Option<Found>, Failure> {
        let class = self.classifier.file(&found.path);
        if found.path.name().ends_with(b".frm") {
            self.note_engine(&found.path, file)?;
        }
        if self.classifier.flavor() == Flavor::MySql && mysql::classify::is_definition(&found.path)
        {
            self.note_engine_of_sdi(&found.path, file)?;
        }
        if matches!(class, Class::Table | Class::System(_)) {
            self.engines.insert("InnoDB");
        }
        if class == Class::Redo {
            // Not the file at hand, which may be replaced by a resize or retired: what is composed
            // of it, once, under a name of its own.
            self.redo_listed = true;
            found.path = RelativePath::new(redo_log::log_name(self.classifier.flavor()).as_bytes())
                .map_err(|e| Failure::bug(format!("name of the redo log: {e}")))?;
            found.identity = Identity { live: REDO | self.redo.checkpoint, ..Identity::NONE };
            found.kind = Kind::Regular { size: self.redo.size, allocated: self.redo.size };
            found.growing = true;
            return Ok(Some(found));
        }
        if !class.is_tablespace() {
            return Ok(Some(found));
        }
        let mark = self.mark(class, file, &found.path)?;
        if mark != 0 {
            found.identity = found.identity.live(mark, birth(file));
            if let Kind::Regular { size, .. } = &mut found.kind {
                *size = whole_pages(*size);
            }
        }
        Ok(Some(found))
    }
}

/// The size without what is beyond the last whole page: that is being written, redo has it. A table
/// of pages of 1 or 2 KiB may end within a block of 4 KiB (fil_space_extend_must_retry).
pub(super) fn whole_pages(size: u64) -> u64 {
    size - size % PAGE_BYTES_MIN
}

/// When a file was created; all zero on a file system that does not say. Inodes are used again at
/// once, so without it a file that took another's place within one clone may go unseen.
fn birth(file: BorrowedFd<'_>) -> (i64, u32) {
    match rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::BTIME) {
        Ok(stat) if stat.stx_mask & StatxFlags::BTIME.bits() != 0 => {
            (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)
        }
        _ => (0, 0),
    }
}

/// Whether no name leads to an open file any more.
fn is_removed(file: &File) -> bool {
    rustix::fs::fstat(file).is_ok_and(|stat| stat.st_nlink == 0)
}

fn owned(path: &RelativePath, file: BorrowedFd<'_>) -> Result<File, Failure> {
    let owned = file.try_clone_to_owned().map(File::from);
    owned.map_err(|e| Failure::io("read", path.as_path(), &e))
}

fn read_up_to(file: &File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards the last pages of KEY_BLOCK_SIZE=1 and 2: cut to blocks of 4 KiB they are lost.
    #[test]
    fn a_last_page_of_one_kib_is_listed() {
        assert_eq!(whole_pages(65536 + 1024), 65536 + 1024);
        assert_eq!(whole_pages(65536 + 1023), 65536);
    }
}
