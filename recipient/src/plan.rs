//! What is fetched, cut into units: pure, from a list.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use marcot_common::{
    chunk::{DIGEST_BYTES, READ_REQUEST_BYTES_MAX},
    entry::{Change, Entry, FileId, Kind},
    failure::Failure,
    path::RelativePath,
};

use crate::{
    copy_journal::record::UnitDone,
    growing::GrowingFiles,
    list::{Entries, FileList},
    reuse::BLOCK_BYTES,
};

/// Files up to this size travel packed.
const SMALL_BYTES_MAX: u64 = 1 << 20;

/// Most files and most bytes of one unit of small files: they are made durable together.
const UNIT_FILES_MAX: usize = 2048;
const UNIT_BYTES_MAX: u64 = 16 << 20;

/// Most bytes of paths and attributes in one unit, which is held in memory: a thousand for each of its
/// files.
const UNIT_HELD_BYTES_MAX: usize = 2 << 20;

/// Most bytes of paths in one unit: its record tells, for each of its files, a digest or why it could not be
/// read, and fits into one of the journal's.
const UNIT_PATH_BYTES_MAX: usize = 384 << 10;

/// Bytes of data in one part of a large file, of all streams together, unless a part would have less
/// than `SEGMENT_BYTES_MIN`: all of a unit is durable and recorded before the next one starts, so that
/// this much is copied again by a recipient that was killed, or 8 MiB for each of more than 6 streams.
pub const SEGMENT_BYTES: u64 = 48 << 20;

/// Least bytes of a part: shorter ones are more calls and fsyncs than data.
const SEGMENT_BYTES_MIN: u64 = 8 << 20;

/// Most bytes of a part, holes included. What is staged of one is hashed at one time, and its digests
/// travel in one request.
const SEGMENT_SPAN_MAX: u64 = 512 << 20;

const _: () = assert!(
    SEGMENT_SPAN_MAX / BLOCK_BYTES * DIGEST_BYTES as u64 <= READ_REQUEST_BYTES_MAX as u64 / 2
);

/// Parts begin at multiples of this: of the pages of any database, and of blocks that are compared.
const SEGMENT_ALIGN: u64 = 1 << 20;

/// Most bytes of data that so many streams have under way, none of it recorded yet: parts of large
/// files, or units of small ones.
#[must_use]
pub fn under_way_bytes_max(streams: usize) -> u64 {
    let streams = streams.max(1);
    let unit = segment_bytes_max(streams).max(UNIT_BYTES_MAX + SMALL_BYTES_MAX);
    unit.saturating_mul(u64::try_from(streams).unwrap_or(u64::MAX))
}

/// A file, or a part of one, that is to be copied.
#[derive(Debug, Clone)]
pub struct Part {
    /// The file's id on the donor.
    pub file_id: FileId,
    /// Where it goes.
    pub path: RelativePath,
    /// The whole file's size.
    pub size: u64,
    /// First byte of the part.
    pub offset: u64,
    /// Bytes of the part; 0 for an empty file.
    pub length: u64,
    /// The entry, when the part is the whole file: its attributes can be set at once.
    pub whole: Option<Box<Entry>>,
    /// Whether the file is there already and only parts of it are written.
    pub patches: bool,
}

/// What one stream copies at a time.
#[derive(Debug, Default)]
pub struct Unit {
    /// In ascending order.
    pub parts: Vec<Part>,
    /// Number of its first entry in the list.
    pub first: u64,
    /// Number of its last entry.
    pub last: u64,
}

impl Unit {
    /// Where its first part begins.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.parts.first().map_or(0, |part| part.offset)
    }

    /// Bytes of all its parts.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.parts.iter().map(|part| part.length).sum()
    }
}

/// Units of a round that are durable, by first entry and offset.
#[derive(Debug, Clone, Default)]
pub struct FinishedUnits(HashMap<(u64, u64), UnitDone>);

impl FinishedUnits {
    /// Adds one.
    pub fn insert(&mut self, done: UnitDone) {
        self.0.insert((done.first, done.offset), done);
    }

    /// Whether a unit is one of them: the very same.
    #[must_use]
    pub fn contains(&self, unit: &Unit) -> bool {
        let done = self.0.get(&(unit.first, unit.offset()));
        done.is_some_and(|done| (done.last, done.length) == (unit.last, unit.length()))
    }

    /// Takes one out: the very same.
    pub fn take(&mut self, unit: &Unit) -> Option<UnitDone> {
        self.contains(unit).then(|| self.0.remove(&(unit.first, unit.offset())))?
    }

    /// Those that nobody has taken out.
    pub fn into_rest(self) -> impl Iterator<Item = UnitDone> {
        self.0.into_values()
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Whether large files are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Into segments: several streams may work on one file.
    Segments,
    /// Not at all: a file system clones whole files.
    WholeFiles,
}

/// Cuts a list into units as streams ask for them.
#[derive(Debug)]
pub struct FetchPlan {
    state: Mutex<Cutter>,
    is_drained: AtomicBool,
}

#[derive(Debug)]
struct Cutter {
    entries: Entries,
    growing: Arc<GrowingFiles>,
    cut: Cut,
    segment_max: u64,
    finished: FinishedUnits,
    /// A large file that is being cut: its entry, its size, the next offset, bytes of a segment.
    large: Option<(Entry, u64, u64, u64)>,
    /// A file that did not fit into the last unit.
    next: Option<(Entry, u64)>,
}

impl FetchPlan {
    /// Plans what the list asks to be read, for so many streams, but for what is `finished`.
    pub fn new(
        list: &FileList,
        growing: &Arc<GrowingFiles>,
        cut: Cut,
        streams: usize,
        finished: FinishedUnits,
    ) -> Result<Self, Failure> {
        let cutter = Cutter {
            entries: list.entries()?,
            growing: Arc::clone(growing),
            cut,
            segment_max: segment_bytes_max(streams),
            finished,
            large: None,
            next: None,
        };
        Ok(Self { state: Mutex::new(cutter), is_drained: AtomicBool::new(false) })
    }

    /// The next unit; `None` when all are given out.
    pub fn next(&self) -> Result<Option<Unit>, Failure> {
        let next = self.state.lock().unwrap_or_else(PoisonError::into_inner).next();
        if !matches!(next, Ok(Some(_))) {
            self.is_drained.store(true, Ordering::Relaxed);
        }
        next
    }

    /// Whether all units are given out, as far as anybody has asked.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.is_drained.load(Ordering::Relaxed)
    }
}

impl Cutter {
    fn next(&mut self) -> Result<Option<Unit>, Failure> {
        loop {
            match self.next_of_all()? {
                Some(unit) if self.finished.contains(&unit) => {}
                next => return Ok(next),
            }
        }
    }

    fn next_of_all(&mut self) -> Result<Option<Unit>, Failure> {
        if let Some(unit) = self.next_segment() {
            return Ok(Some(unit));
        }
        let mut unit = Unit::default();
        let (mut bytes, mut held, mut paths) = (0, 0, 0);
        while unit.parts.len() < UNIT_FILES_MAX
            && bytes < UNIT_BYTES_MAX
            && held < UNIT_HELD_BYTES_MAX
            && paths < UNIT_PATH_BYTES_MAX
        {
            let Some((entry, allocated)) = self.next_file()? else {
                break;
            };
            let size = entry.content_bytes();
            // Of a file that has grown the first bytes are here.
            let from = match entry.change {
                Change::Patch => self.growing.durable_bytes(entry.file_id).min(size),
                _ => 0,
            };
            if size <= SMALL_BYTES_MAX {
                bytes += size;
                held += entry.held_bytes();
                paths += entry.path.as_bytes().len();
                if unit.parts.is_empty() {
                    unit.first = entry.number;
                }
                unit.last = entry.number;
                unit.parts.push(Part {
                    file_id: entry.file_id,
                    path: entry.path.clone(),
                    size,
                    offset: from,
                    length: size - from,
                    patches: entry.change == Change::Patch,
                    whole: Some(Box::new(entry)),
                });
            } else if unit.parts.is_empty() {
                let segment = match self.cut {
                    Cut::Segments => segment_bytes(size, allocated, self.segment_max),
                    Cut::WholeFiles => size,
                };
                self.large = Some((entry, size, from, segment));
                return Ok(self.next_segment());
            } else {
                self.next = Some((entry, allocated));
                break;
            }
        }
        Ok(Some(unit).filter(|unit| !unit.parts.is_empty()))
    }

    fn next_segment(&mut self) -> Option<Unit> {
        let (entry, size, offset, segment) = self.large.take()?;
        // A file that has grown may go on within a block; from then on no two parts share one.
        let length = (segment - offset % SEGMENT_ALIGN).min(size - offset);
        let whole = (length == size).then(|| Box::new(entry.clone()));
        let part = Part {
            file_id: entry.file_id,
            path: entry.path.clone(),
            size,
            offset,
            length,
            whole,
            patches: entry.change == Change::Patch,
        };
        let (next, number) = (offset + length, entry.number);
        if next < size {
            self.large = Some((entry, size, next, segment));
        }
        Some(Unit { parts: vec![part], first: number, last: number })
    }

    /// The next regular file whose content is to be read, and its allocated bytes.
    fn next_file(&mut self) -> Result<Option<(Entry, u64)>, Failure> {
        if let Some(next) = self.next.take() {
            return Ok(Some(next));
        }
        for entry in self.entries.by_ref() {
            let entry = entry?;
            if entry.growing {
                continue;
            }
            if let (
                Change::Add | Change::Replace | Change::Patch,
                Some(Kind::Regular { allocated, .. }),
            ) = (entry.change, &entry.kind)
            {
                let allocated = *allocated;
                return Ok(Some((entry, allocated)));
            }
        }
        Ok(None)
    }
}

/// Most bytes of data in one part of a large file.
fn segment_bytes_max(streams: usize) -> u64 {
    let share = SEGMENT_BYTES / u64::try_from(streams.max(1)).unwrap_or(u64::MAX);
    (share - share % SEGMENT_ALIGN).max(SEGMENT_BYTES_MIN)
}

/// Bytes of a file, holes included, that hold about `most` bytes of data: one call for each
/// 48 MiB of a hole of a terabyte would be 21,846 calls for nothing.
fn segment_bytes(size: u64, allocated: u64, most: u64) -> u64 {
    let holes = size / allocated.max(most);
    most.saturating_mul(holes.clamp(1, SEGMENT_SPAN_MAX / most))
}

#[cfg(test)]
mod tests;
