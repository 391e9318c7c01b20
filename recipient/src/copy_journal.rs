//! What a clone has copied so far, beside the staged tree: a recipient that was killed goes on from
//! there when it is started again.
//!
//! Invariants:
//! * A unit is recorded once all of it is durable, and never before; all units of a round are
//!   recorded before the donor is told that the round is durable, so a round of which one is missing
//!   has not been passed there.
//! * What was copied is told by the numbers of the donor's frozen list, which is kept with it: the
//!   same list is cut into the same units.
//! * Whatever cannot be read, or does not fit, is no progress: it is copied again.
//!
//! Cost: a record and an fdatasync for each unit; 32 bytes for each MiB, some 45 for each small file.

pub mod record;

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Instant,
};

use marcot_common::{entry::FileId, failure::Failure, position::Position};
use prost::Message as _;

use self::record::{
    At, Begun, Grown, ListKept, RecordKind, RoundBegun, SnapshotOpened, UnitDone, Unread, decode,
};
use crate::{
    certificate::{
        digests::{BLOCK_BYTES, DigestRun},
        table::DigestTable,
    },
    growing::GrowingFile,
    journal::{Journal, PAYLOAD_BYTES_MAX, Record},
    list::FileList,
    plan::{FinishedUnits, Unit},
    progress::{Counter, Progress},
    writer::Unfinished,
};

/// Name of the journal in the staging directory.
pub const FILE_NAME: &str = "copy-journal";

/// Starts that were cut short, with nothing copied between them, before a clone is given up: it is what
/// stops the recipient.
const STARTS_MAX: u32 = 5;

/// The journal of a clone that runs.
#[derive(Debug)]
pub struct CopyJournal {
    journal: Mutex<Journal>,
    directory: PathBuf,
    cost: Cost,
}

/// What a journal has cost so far.
#[derive(Debug, Default)]
struct Cost {
    records: Counter,
    bytes: Counter,
    micros: Counter,
}

impl CopyJournal {
    /// Begins a journal in a staging directory.
    pub fn create(
        directory: &Path,
        begun: &Begun,
        snapshot: &SnapshotOpened,
    ) -> Result<Self, Failure> {
        let journal = Journal::create(&directory.join(FILE_NAME))?;
        let this = Self::new(journal, directory);
        this.append(RecordKind::Begun, begun)?;
        this.append(RecordKind::SnapshotOpened, snapshot)?;
        Ok(this)
    }

    /// Opens the journal of a staging directory to go on with it.
    pub fn open(directory: &Path) -> Result<(Self, CopyFound), Failure> {
        let mut reading = Reading::default();
        let path = directory.join(FILE_NAME);
        let journal = Journal::open_with(&path, &mut |record| reading.take(record))?;
        let found = reading.finish()?;
        let this = Self::new(journal, directory);
        this.append_bytes(RecordKind::WentOn, &[])?;
        Ok((this, found))
    }

    fn new(journal: Journal, directory: &Path) -> Self {
        let (journal, directory) = (Mutex::new(journal), directory.to_owned());
        Self { journal, directory, cost: Cost::default() }
    }

    /// This run of the clone ends by itself, and another may go on: a donor that is away stops no recipient.
    pub fn ended(&self) -> Result<(), Failure> {
        self.append_bytes(RecordKind::Ended, &[])
    }

    /// The server is about to be stopped for data that are to be discarded, or is to be no more.
    pub fn note_server(&self, away: bool) -> Result<(), Failure> {
        self.append_bytes(if away { RecordKind::Away } else { RecordKind::Back }, &[])
    }

    /// Tells what it has cost: of this run of the service.
    pub fn log_cost(&self) {
        let Cost { records, bytes, micros } = &self.cost;
        tracing::info!(
            records = records.get(),
            bytes = bytes.get(),
            ms = micros.get() / 1000,
            "the copy's journal"
        );
    }

    /// A later round's list is about to change the tree.
    pub fn shaping(&self, position: Position) -> Result<(), Failure> {
        self.append(RecordKind::Shaping, &At::from(position))
    }

    /// The tree has the shape of the round's list.
    pub fn round_begun(
        &self,
        position: Position,
        list: &FileList,
        whole: &FileList,
        growing: &[GrowingFile],
        progress: &Progress,
    ) -> Result<(), Failure> {
        let name = |what: &str| format!("{what}-{}-{}", At::from(position).stage, position.round);
        let kept = |what: &str, list: &FileList| -> Result<ListKept, Failure> {
            list.keep_as(&self.directory.join(name(what)))?;
            Ok(ListKept::new(name(what), list.totals()))
        };
        let record = RoundBegun {
            at: Some(position.into()),
            list: Some(kept("list", list)?),
            whole: Some(kept("whole", whole)?),
            growing: growing.iter().map(Grown::from).collect(),
            unfinished: progress.unfinished().iter().map(Unread::from).collect(),
        };
        if record.encoded_len() > PAYLOAD_BYTES_MAX {
            // Thousands of files that changed: whoever goes on has to begin again.
            return Ok(());
        }
        self.append(RecordKind::RoundBegun, &record)?;
        self.remove_lists_but(&record);
        Ok(())
    }

    /// A unit is durable.
    pub fn unit_done(&self, done: &UnitDone) -> Result<(), Failure> {
        self.append(RecordKind::UnitDone, done)
    }

    /// A file is about to have another size: the last block of the shorter one is another block.
    pub fn resized(&self, file: FileId, old: u64, new: u64) -> Result<(), Failure> {
        let size = old.min(new);
        if old == new || size.is_multiple_of(BLOCK_BYTES) {
            return Ok(());
        }
        let (file_id, first) = (file.0, size / BLOCK_BYTES);
        let run = DigestRun { file_id, first, unknown_blocks: 1, ..DigestRun::default() };
        self.append(RecordKind::Changed, &run)
    }

    /// More of a growing file is durable.
    pub fn grown(&self, file: &GrowingFile, digests: Vec<DigestRun>) -> Result<(), Failure> {
        self.append(RecordKind::Grown, &Grown { digests, ..Grown::from(file) })
    }

    fn append(&self, kind: RecordKind, message: &impl prost::Message) -> Result<(), Failure> {
        self.append_bytes(kind, &message.encode_to_vec())
    }

    fn append_bytes(&self, kind: RecordKind, payload: &[u8]) -> Result<(), Failure> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        let appended = journal.append(kind as u8, payload);
        drop(journal);
        self.cost.records.add(1);
        self.cost.bytes.add(payload.len() as u64);
        self.cost.micros.add(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX));
        appended
    }

    /// Lists of earlier rounds are of no use any more; what stays is only room.
    fn remove_lists_but(&self, record: &RoundBegun) {
        let kept: Vec<_> =
            [&record.list, &record.whole].into_iter().flatten().map(|kept| &kept.file).collect();
        let Ok(entries) = std::fs::read_dir(&self.directory) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_list = name.starts_with("list-") || name.starts_with("whole-");
            if is_list && !kept.contains(&&name) {
                drop(std::fs::remove_file(entry.path()));
            }
        }
    }
}

/// What a journal tells of a copy.
#[derive(Debug, Default)]
pub struct CopyFound {
    /// What was asked for.
    pub begun: Begun,
    /// The snapshot.
    pub snapshot: SnapshotOpened,
    /// The round that was being copied; `None` when the tree's shape is not known.
    pub round: Option<RoundFound>,
    /// Where the journal is damaged: what comes after it is not known, and another snapshot compares
    /// what is staged.
    pub damage: Option<Failure>,
}

/// A round that was being copied.
#[derive(Debug)]
pub struct RoundFound {
    /// Which.
    pub position: Position,
    /// Its list.
    pub list: ListKept,
    /// The whole tree's list.
    pub whole: ListKept,
    /// Files that grow, or have grown.
    pub growing: Vec<GrowingFile>,
    /// Files that could not be read in earlier rounds.
    pub unfinished: Vec<Unfinished>,
    /// What of it is durable.
    pub finished: FinishedUnits,
    /// Sums over all units of all rounds.
    pub done: UnitDone,
}

impl CopyFound {
    /// Reads what a journal holds; nothing is changed. One that is damaged behind its first records
    /// still tells whose copy this is.
    pub fn look(directory: &Path) -> Result<Self, Failure> {
        let mut reading = Reading::default();
        let path = directory.join(FILE_NAME);
        match Journal::read_with(&path, &mut |record| reading.take(record)) {
            Err(failure) if failure.reason == "JOURNAL_CORRUPT" && reading.has_snapshot => {
                reading.found.round = None;
                reading.found.damage = Some(failure);
            }
            read => read?,
        }
        reading.finish()
    }
}

/// A journal that is being read.
#[derive(Debug, Default)]
struct Reading {
    found: CopyFound,
    has_snapshot: bool,
    /// Starts since something was copied last, or a run ended by itself.
    starts: u32,
    done: UnitDone,
}

impl Reading {
    fn take(&mut self, Record { kind, payload }: Record) -> Result<(), Failure> {
        let Self { found, done, .. } = self;
        match kind {
            k if k == RecordKind::Begun as u8 => found.begun = decode(&payload)?,
            k if k == RecordKind::SnapshotOpened as u8 => {
                found.snapshot = decode(&payload)?;
                self.has_snapshot = true;
            }
            k if k == RecordKind::Shaping as u8 => found.round = None,
            k if k == RecordKind::RoundBegun as u8 => {
                self.starts = 0;
                found.round = round_found(decode(&payload)?, done);
            }
            k if k == RecordKind::UnitDone as u8 => {
                self.starts = 0;
                let unit: UnitDone = decode(&payload)?;
                // Its digests are read when the copy is whole.
                let unit = UnitDone { digests: Vec::new(), ..unit };
                add(done, &unit);
                if let Some(round) = &mut found.round {
                    round.unfinished.extend(unit.unfinished.iter().filter_map(Unread::file));
                    add(&mut round.done, &unit);
                    round.finished.insert(unit);
                }
            }
            k if k == RecordKind::Grown as u8 => {
                self.starts = 0;
                let grown: Grown = decode(&payload)?;
                let files = found.round.iter_mut().flat_map(|round| &mut round.growing);
                for file in files.filter(|file| file.file_id.0 == grown.file_id) {
                    file.durable = grown.durable;
                }
            }
            k if k == RecordKind::WentOn as u8 => self.starts += 1,
            k if k == RecordKind::Ended as u8 => self.starts = 0,
            // Of a later version; it says nothing that may not be passed over.
            _ => {}
        }
        Ok(())
    }

    fn finish(self) -> Result<CopyFound, Failure> {
        if !self.has_snapshot {
            return Err(Failure::new(
                tonic::Code::Aborted,
                "RECIPIENT_RESTARTED",
                "the recipient stopped before anything was copied; clone again",
            ));
        }
        let starts = self.starts;
        if starts >= STARTS_MAX {
            return Err(Failure::new(
                tonic::Code::Aborted,
                "RECIPIENT_RESTARTED",
                format!(
                    "the recipient stopped {starts} times in a row before anything more was copied; \
                     look into its log for what stops it, and clone again"
                ),
            ));
        }
        Ok(self.found)
    }
}

/// Whether the journal in a staging directory tells of a snapshot: one that a stop has left before that is no
/// copy's.
#[must_use]
pub fn tells_of_a_snapshot(directory: &Path) -> bool {
    let mut kinds = Vec::new();
    // Of a large journal the rest is not read.
    let read = Journal::read_with(&directory.join(FILE_NAME), &mut |record| {
        kinds.push(record.kind);
        if kinds.len() < 2 { Ok(()) } else { Err(Failure::bug("two records are enough")) }
    });
    // One that cannot be read is another matter.
    kinds.get(1).map_or(read.is_err() && !kinds.is_empty(), |&kind| {
        kind == RecordKind::SnapshotOpened as u8
    })
}

/// Whether the journal in a staging directory says that a server was stopped, and not that it runs again.
#[must_use]
pub fn is_away(directory: &Path) -> bool {
    let mut is_away = false;
    let read = Journal::read_with(&directory.join(FILE_NAME), &mut |record| {
        is_away = match record.kind {
            k if k == RecordKind::Away as u8 => true,
            k if k == RecordKind::Back as u8 => false,
            _ => is_away,
        };
        Ok(())
    });
    // Where it is damaged, what comes before tells.
    drop(read);
    is_away
}

/// Records that it runs again.
pub fn note_back(directory: &Path) -> Result<(), Failure> {
    let mut journal = Journal::open_with(&directory.join(FILE_NAME), &mut |_| Ok(()))?;
    journal.append(RecordKind::Back as u8, &[])
}

/// Brings a table of digests up to what a journal holds, in the order in which it was written.
pub fn read_digests(directory: &Path, table: &DigestTable) -> Result<(), Failure> {
    Journal::read_with(&directory.join(FILE_NAME), &mut |Record { kind, payload }| {
        if kind == RecordKind::UnitDone as u8 {
            let unit: UnitDone = decode(&payload)?;
            return unit.digests.iter().try_for_each(|run| table.take(run));
        }
        if kind == RecordKind::Grown as u8 {
            let grown: Grown = decode(&payload)?;
            return grown.digests.iter().try_for_each(|run| table.take(run));
        }
        if kind == RecordKind::Changed as u8 {
            return table.take(&decode(&payload)?);
        }
        Ok(())
    })
}

fn round_found(record: RoundBegun, done: &UnitDone) -> Option<RoundFound> {
    Some(RoundFound {
        position: record.at?.position()?,
        list: record.list?,
        whole: record.whole?,
        growing: record.growing.iter().map(Grown::file).collect::<Option<_>>()?,
        unfinished: record.unfinished.iter().map(Unread::file).collect::<Option<_>>()?,
        finished: FinishedUnits::default(),
        done: done.clone(),
    })
}

fn add(sum: &mut UnitDone, unit: &UnitDone) {
    sum.data_bytes = sum.data_bytes.saturating_add(unit.data_bytes);
    sum.hole_bytes = sum.hole_bytes.saturating_add(unit.hole_bytes);
    sum.reused_bytes = sum.reused_bytes.saturating_add(unit.reused_bytes);
    sum.files = sum.files.saturating_add(unit.files);
}

/// The record of a unit, but for what was counted.
#[must_use]
pub fn unit_record(unit: &Unit) -> UnitDone {
    UnitDone {
        first: unit.first,
        last: unit.last,
        offset: unit.offset(),
        length: unit.length(),
        ..UnitDone::default()
    }
}

/// Lists that a round was copied by, read back; an error when they are not what was recorded.
pub fn open_lists(directory: &Path, round: &RoundFound) -> Result<(FileList, FileList), Failure> {
    let open = |kept: &ListKept| FileList::open(directory, &kept.file, kept.totals());
    Ok((open(&round.list)?, open(&round.whole)?))
}

#[cfg(test)]
mod tests;
