//! A donor's list of one (stage, round), checked and kept on disk; and the whole tree's list that
//! the rounds add up to.
//!
//! Invariants:
//! * Numbers have no gaps and paths strictly ascend, so no path is there twice.
//! * In a first round each entry's directory came before it, and is a directory.
//! * Memory is bounded whatever the donor lists.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
};

use marcot_common::{
    entry::{Change, Entry, FileId, Kind, Totals},
    failure::Failure,
    path::RelativePath,
    position::Position,
    spool::{Spool, SpoolReader, SpoolWriter},
    wire,
};
use marcot_proto::donor::v1 as pb;
use prost::Message as _;
use tonic::Code;

/// Most names of hard-linked files, and most renames between two rounds: the only parts of a list
/// that are held in memory, some 64 bytes each.
const HELD_IN_MEMORY_MAX: usize = 256 << 10;

/// Most bytes of the paths of hard-linked files: 64 for each of as many as there may be.
const HELD_BYTES_MAX: usize = 16 << 20;

/// Most bytes of a list on this host's disk: so many, and so many for each of its entries. Twenty times
/// what an entry of a database's has, and less than its path, its attributes and a link's target may
/// have together: a list fills no disk before its files do.
const LIST_BYTES_MIN: u64 = 64 << 20;
const ENTRY_BYTES_MEAN: u64 = 4 << 10;

/// A finished list.
#[derive(Debug, Clone)]
pub struct FileList {
    spool: Spool,
    totals: Totals,
    directory: PathBuf,
}

impl FileList {
    /// Counts of the list.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// All entries in ascending order.
    pub fn entries(&self) -> Result<Entries, Failure> {
        let reader = self.spool.read_from(0).map_err(|e| self.unreadable(&e))?;
        Ok(Entries { reader, directory: self.directory.clone() })
    }

    /// All entries in descending order: what is in a directory comes before the directory.
    pub fn entries_backwards(&self) -> impl Iterator<Item = Result<Entry, Failure>> + '_ {
        (0..self.spool.len()).rev().map(|number| self.entry(number))
    }

    /// One entry.
    pub fn entry(&self, number: u64) -> Result<Entry, Failure> {
        let record = self.spool.get(number).map_err(|e| self.unreadable(&e))?;
        decode(&record)
    }

    /// Gives the list's file a name, durable when this returns.
    pub fn keep_as(&self, path: &Path) -> Result<(), Failure> {
        self.spool.keep_as(path).map_err(|e| Failure::io("keep the list of files as", path, &e))
    }

    /// Opens a list that was kept in `directory`; it must be the one that has these totals.
    pub fn open(directory: &Path, name: &str, totals: Totals) -> Result<Self, Failure> {
        let path = directory.join(name);
        let spool = Spool::open(&path, totals.entries)
            .map_err(|e| Failure::io("read the list of files in", &path, &e))?;
        let list = Self { spool, totals, directory: directory.to_owned() };
        let mut counted = Totals::default();
        for entry in list.entries()? {
            counted.add(&entry?);
        }
        // The journal does not keep it: only preflight asks.
        counted.largest_bytes = totals.largest_bytes;
        if counted != totals {
            return Err(Failure::new(
                Code::DataLoss,
                "JOURNAL_CORRUPT",
                format!(
                    "the list of files {} holds {counted:?}, the journal beside it says {totals:?}",
                    path.display()
                ),
            ));
        }
        Ok(list)
    }

    fn unreadable(&self, error: &io::Error) -> Failure {
        Failure::io("read the list of files in", &self.directory, error)
    }

    /// The regular files that hard links name, by id.
    pub fn link_targets(&self) -> Result<HashMap<FileId, RelativePath>, Failure> {
        let mut wanted = HashSet::new();
        for entry in self.entries()? {
            if let Some(Kind::HardLink { file_id }) = entry?.kind {
                wanted.insert(file_id);
                check_held(wanted.len(), "hard-linked files")?;
            }
        }
        let mut found = HashMap::new();
        if wanted.is_empty() {
            return Ok(found);
        }
        let mut bytes = 0;
        for entry in self.entries()? {
            let entry = entry?;
            if matches!(entry.kind, Some(Kind::Regular { .. })) && wanted.contains(&entry.file_id) {
                bytes += entry.path.as_bytes().len();
                if bytes > HELD_BYTES_MAX {
                    return Err(Failure::new(
                        Code::ResourceExhausted,
                        "LIST_LIMIT",
                        format!(
                            "the paths of hard-linked files have more than {HELD_BYTES_MAX} bytes"
                        ),
                    ));
                }
                found.insert(entry.file_id, entry.path);
            }
        }
        Ok(found)
    }
}

/// Entries of a list, in ascending order.
#[derive(Debug)]
pub struct Entries {
    reader: SpoolReader,
    directory: PathBuf,
}

impl Iterator for Entries {
    type Item = Result<Entry, Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        let record = self.reader.next()?;
        Some(match record {
            Ok(record) => decode(&record),
            Err(e) => Err(Failure::io("read the list of files in", &self.directory, &e)),
        })
    }
}

fn decode(record: &[u8]) -> Result<Entry, Failure> {
    let message = pb::FileEntry::decode(record)
        .map_err(|e| Failure::bug(format!("the list of files cannot be decoded: {e}")))?;
    wire::entry(message)
}

fn check_held(count: usize, what: &str) -> Result<(), Failure> {
    if count > HELD_IN_MEMORY_MAX {
        return Err(Failure::new(
            Code::ResourceExhausted,
            "LIST_LIMIT",
            format!("the donor lists more than {HELD_IN_MEMORY_MAX} {what}"),
        ));
    }
    Ok(())
}

/// Writes a list without a look at it.
#[derive(Debug)]
struct ListWriter {
    writer: SpoolWriter,
    totals: Totals,
    bytes: u64,
    directory: PathBuf,
}

impl ListWriter {
    fn create(directory: &Path) -> Result<Self, Failure> {
        let writer = SpoolWriter::create(directory)
            .map_err(|e| Failure::io("create the list of files in", directory, &e))?;
        Ok(Self { writer, totals: Totals::default(), bytes: 0, directory: directory.to_owned() })
    }

    fn append(&mut self, entry: &Entry) -> Result<(), Failure> {
        self.totals.add(entry);
        let record = wire::entry_to_wire(entry).encode_to_vec();
        self.bytes += record.len() as u64;
        let most = LIST_BYTES_MIN + self.totals.entries.saturating_mul(ENTRY_BYTES_MEAN);
        if self.bytes > most {
            return Err(Failure::new(
                Code::ResourceExhausted,
                "LIST_LIMIT",
                format!(
                    "the list of files has {} bytes at its entry {}, where {most} are allowed, \
                     {ENTRY_BYTES_MEAN} for each",
                    self.bytes, entry.number
                ),
            ));
        }
        self.writer
            .append(&record)
            .map_err(|e| Failure::io("write the list of files in", &self.directory, &e))?;
        Ok(())
    }

    fn finish(self) -> Result<FileList, Failure> {
        let spool = self
            .writer
            .finish()
            .map_err(|e| Failure::io("write the list of files in", &self.directory, &e))?;
        Ok(FileList { spool, totals: self.totals, directory: self.directory })
    }
}

/// Receives a list and checks it as it comes.
#[derive(Debug)]
pub struct ListReceiver {
    writer: ListWriter,
    position: Position,
    entries_max: u64,
    next_number: u64,
    last: Option<RelativePath>,
    /// Directories on the way to the last entry.
    open_directories: Vec<RelativePath>,
}

impl ListReceiver {
    /// Receives the list of `position`; its file goes to `directory`. A list of more than
    /// `entries_max` entries is refused.
    pub fn create(directory: &Path, position: Position, entries_max: u64) -> Result<Self, Failure> {
        Ok(Self {
            writer: ListWriter::create(directory)?,
            position,
            entries_max,
            next_number: 0,
            last: None,
            open_directories: Vec::new(),
        })
    }

    /// Number of the entry that is awaited.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        self.next_number
    }

    /// Counts so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.writer.totals
    }

    /// Takes one entry.
    pub fn push(&mut self, entry: &Entry) -> Result<(), Failure> {
        let bad = |why: String| Failure::peer_misbehaved(format!("list of files: {why}"));
        if entry.number != self.next_number {
            return Err(bad(format!(
                "entry {} where {} was awaited",
                entry.number, self.next_number
            )));
        }
        if self.next_number >= self.entries_max {
            return Err(Failure::new(
                Code::ResourceExhausted,
                "LIST_LIMIT",
                format!(
                    "the donor lists more than {} entries, as many as this file system has inodes \
                     for or --entries-max allows",
                    self.entries_max
                ),
            ));
        }
        if let Some(last) = &self.last
            && *last >= entry.path
        {
            return Err(bad(format!("{} comes after {last}", entry.path)));
        }
        let first_round = self.position == Position::FIRST;
        if first_round && entry.change != Change::Add {
            return Err(bad(format!("{} is {:?} in a first round", entry.path, entry.change)));
        }
        self.check_directory(entry, first_round)?;
        self.writer.append(entry)?;
        self.next_number += 1;
        self.last = Some(entry.path.clone());
        Ok(())
    }

    fn check_directory(&mut self, entry: &Entry, first_round: bool) -> Result<(), Failure> {
        while self.open_directories.last().is_some_and(|open| !entry.path.is_below(open)) {
            self.open_directories.pop();
        }
        let parent = entry.path.parent();
        if first_round && parent.as_ref() != self.open_directories.last() {
            return Err(Failure::peer_misbehaved(format!(
                "list of files: {} is in no listed directory",
                entry.path
            )));
        }
        if entry.kind == Some(Kind::Directory) {
            self.open_directories.push(entry.path.clone());
        }
        Ok(())
    }

    /// Ends the list, whose counts must agree with the donor's.
    pub fn finish(self, donor: Totals) -> Result<FileList, Failure> {
        let list = self.writer.finish()?;
        if list.totals.entries != donor.entries
            || list.totals.files != donor.files
            || list.totals.size_bytes != donor.size_bytes
        {
            return Err(Failure::peer_misbehaved(format!(
                "list of files: {:?} came, the donor counts {donor:?}",
                list.totals
            )));
        }
        Ok(list)
    }
}

/// What `merge` does to a staged tree as it goes along.
pub trait TreeChange {
    /// The path is gone, with all that is in it.
    fn remove(&mut self, path: &RelativePath) -> Result<(), Failure>;
    /// The file is about to be renamed: take it out of the way.
    fn set_aside(&mut self, file: FileId, path: &RelativePath) -> Result<(), Failure>;
}

/// Applies a later round's list to the list of the whole tree, in constant memory.
pub fn merge(
    whole: &FileList,
    round: &FileList,
    changes: &mut dyn TreeChange,
) -> Result<FileList, Failure> {
    let mut renamed = HashSet::new();
    for entry in round.entries()? {
        let entry = entry?;
        if entry.change == Change::Rename {
            renamed.insert(entry.file_id);
            check_held(renamed.len(), "renamed files in one round")?;
        }
    }
    let mut merged = ListWriter::create(&whole.directory)?;
    let mut number = 0;
    let mut append = |mut entry: Entry| {
        entry.number = number;
        entry.change = Change::Add;
        number += 1;
        merged.append(&entry)
    };
    let mut old = whole.entries()?.peekable();
    let mut new = round.entries()?.peekable();
    // A directory that is gone, or is no directory any more: what the old list has below goes too.
    let mut gone: Option<RelativePath> = None;
    loop {
        let take_new = match (old.peek(), new.peek()) {
            (None, None) => break,
            (Some(_), None) => false,
            (None, Some(_)) => true,
            (Some(Ok(old)), Some(Ok(new))) => new.path <= old.path,
            // An error ends the merge below.
            (Some(Err(_)), _) => false,
            (_, Some(Err(_))) => true,
        };
        if !take_new {
            let Some(entry) = old.next().transpose()? else {
                continue;
            };
            if gone.as_ref().is_some_and(|gone| entry.path.is_below(gone)) {
                continue;
            }
            if renamed.contains(&entry.file_id) {
                changes.set_aside(entry.file_id, &entry.path)?;
                continue;
            }
            append(entry)?;
            continue;
        }
        let Some(mut entry) = new.next().transpose()? else {
            continue;
        };
        let same = matches!(old.peek(), Some(Ok(old)) if old.path == entry.path);
        let replaced = if same { old.next().transpose()? } else { None };
        if let Some(replaced) = &replaced {
            if renamed.contains(&replaced.file_id) {
                changes.set_aside(replaced.file_id, &replaced.path)?;
            } else if must_go(replaced, &entry) {
                changes.remove(&replaced.path)?;
            }
            if replaced.kind == Some(Kind::Directory) && entry.kind != Some(Kind::Directory) {
                gone = Some(entry.path.clone());
            }
        }
        match entry.change {
            Change::Remove if replaced.is_none() => {
                return Err(Failure::peer_misbehaved(format!(
                    "list of files: {} is removed and was never listed",
                    entry.path
                )));
            }
            Change::Remove => {}
            Change::Truncate | Change::Patch => {
                let kept = replaced.and_then(|replaced| match (replaced.kind, &entry.kind) {
                    (Some(Kind::Regular { .. }), Some(Kind::Regular { .. })) => Some(()),
                    _ => None,
                });
                if kept.is_none() {
                    return Err(Failure::peer_misbehaved(format!(
                        "list of files: {} is cut or patched and is no listed file",
                        entry.path
                    )));
                }
                entry.growing = false;
                append(entry)?;
            }
            Change::Add | Change::Replace | Change::Rename => {
                entry.growing = false;
                append(entry)?;
            }
        }
    }
    merged.finish()
}

/// Whether what stands at a path must be removed before the new entry can be made.
fn must_go(replaced: &Entry, entry: &Entry) -> bool {
    let directories =
        matches!((&replaced.kind, &entry.kind), (Some(Kind::Directory), Some(Kind::Directory)));
    !matches!(entry.change, Change::Truncate | Change::Patch) && !directories
}

#[cfg(test)]
mod tests;
