//! What is fetched, cut into units: pure, from a list.

use std::sync::{Arc, Mutex, PoisonError};

use marcot_common::{
    entry::{Change, Entry, FileId, Kind},
    failure::Failure,
    path::RelativePath,
};

use crate::{
    growing::GrowingFiles,
    list::{Entries, FileList},
};

/// Files up to this size travel packed.
const SMALL_BYTES_MAX: u64 = 1 << 20;

/// Most files and most bytes of one unit of small files: they are made durable together.
const UNIT_FILES_MAX: usize = 2048;
const UNIT_BYTES_MAX: u64 = 32 << 20;

/// Bytes of data in one part of a large file; all of a unit is durable before the next one starts,
/// so no stream ever has more than this that is not.
pub const SEGMENT_BYTES: u64 = 64 << 20;

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
}

#[derive(Debug)]
struct Cutter {
    entries: Entries,
    growing: Arc<GrowingFiles>,
    cut: Cut,
    /// A large file that is being cut: its entry, its size, the next offset, bytes of a segment.
    large: Option<(Entry, u64, u64, u64)>,
    /// A file that did not fit into the last unit.
    next: Option<(Entry, u64)>,
}

impl FetchPlan {
    /// Plans what the list asks to be read.
    pub fn new(list: &FileList, growing: &Arc<GrowingFiles>, cut: Cut) -> Result<Self, Failure> {
        let growing = Arc::clone(growing);
        let cutter = Cutter { entries: list.entries()?, growing, cut, large: None, next: None };
        Ok(Self { state: Mutex::new(cutter) })
    }

    /// The next unit; `None` when all are given out.
    pub fn next(&self) -> Result<Option<Unit>, Failure> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).next()
    }
}

impl Cutter {
    fn next(&mut self) -> Result<Option<Unit>, Failure> {
        if let Some(unit) = self.next_segment() {
            return Ok(Some(unit));
        }
        let mut unit = Unit::default();
        let mut bytes = 0;
        while unit.parts.len() < UNIT_FILES_MAX && bytes < UNIT_BYTES_MAX {
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
                    Cut::Segments => segment_bytes(size, allocated),
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
        let length = segment.min(size - offset);
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
        let next = offset + length;
        if next < size {
            self.large = Some((entry, size, next, segment));
        }
        Some(Unit { parts: vec![part] })
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

/// Bytes of a file, holes included, that hold about `SEGMENT_BYTES` of data: one call for each
/// 64 MiB of a hole of a terabyte would be 16,384 calls for nothing.
fn segment_bytes(size: u64, allocated: u64) -> u64 {
    let holes = size / allocated.max(SEGMENT_BYTES);
    SEGMENT_BYTES.saturating_mul(holes.clamp(1, 1024))
}

#[cfg(test)]
mod tests;
