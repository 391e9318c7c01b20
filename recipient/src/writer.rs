//! Writes one unit into staging, in order, and makes it durable.
//!
//! Invariants:
//! * Every byte of every part is written once, in order: whatever else a donor sends is an error.
//! * At most `SEGMENT_BYTES` of a unit are not yet durable.
//! * No write is under way when a part is synced, gets its attributes, or is read again.
//! * When `finish` returns, all of the unit is durable but for what it reports as unfinished.

pub mod direct;

use std::{fs::File, io::IoSlice};

use bytes::Bytes;
use marcot_common::failure::Failure;

use crate::{
    certificate::digests::{PartHasher, read_unknown},
    copy_journal::{record::UnitDone, unit_record},
    plan::{Part, SEGMENT_BYTES, Unit},
    progress::Progress,
    reuse::{Known, Reuse, punch_hole},
    staging::Staging,
    writer::direct::DirectWriter,
};

/// Dirty bytes after which writing back begins: the disk works while the network does.
const WRITE_BACK_BYTES: u64 = 8 << 20;

/// Least bytes of a part that is written past the page cache: shorter ones are a few writes.
const DIRECT_BYTES_MIN: u64 = 1 << 20;

/// Most parts of a unit that are made durable one by one; with more, one syncfs is cheaper.
const SYNCED_SINGLY_MAX: usize = 4;

/// Most slices in one pwritev call, below the kernel's IOV_MAX of 1024.
const SLICES_MAX: usize = 512;

/// A file that could not be read in this round; the next round must list it again.
#[derive(Debug, Clone)]
pub struct Unfinished {
    /// The file, and where it was to go.
    pub part: Part,
    /// Why.
    pub failure: Failure,
}

impl Unfinished {
    /// Bytes that it holds.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        // The path is its key as well.
        2 * self.part.path.as_bytes().len() + self.failure.message.len()
    }
}

/// Takes what a ReadRanges call sends, in order.
pub trait ChunkSink: Send {
    /// Writes the next bytes. `pieces` hold exactly `length` bytes.
    fn write(
        &mut self,
        file_id: u64,
        offset: u64,
        length: u64,
        pieces: &[Bytes],
    ) -> Result<(), Failure>;

    /// Passes over a hole.
    fn skip_hole(&mut self, file_id: u64, offset: u64, length: u64) -> Result<(), Failure>;

    /// Passes over what an earlier round has written.
    fn keep(&mut self, file_id: u64, offset: u64, length: u64) -> Result<(), Failure>;

    /// Gives a file up, the present one or the one just finished: the next round must list it
    /// again. The donor finds a change only after it has sent the last byte.
    fn give_up(&mut self, file_id: u64, failure: Failure) -> Result<(), Failure>;
}

/// Stages what an older copy has of a unit's files, and hashes what is staged of each of its parts.
pub fn known_of(staging: &Staging, unit: &Unit, reuse: &Reuse) -> Result<Vec<Known>, Failure> {
    let known = unit.parts.iter().map(|part| {
        // What a part patches is there already.
        if part.patches || part.length == 0 {
            return Ok(Known::default());
        }
        let file = staging.open_file(&part.path, part.size)?;
        reuse.stage(part, &file).map_err(|e| staging.failed("read", &part.path, e))
    });
    known.collect()
}

/// Makes what is staged of a unit read as zero, but for what it patches: where the donor has a hole nothing
/// is written.
pub fn clear(staging: &Staging, unit: &Unit) -> Result<(), Failure> {
    for part in unit.parts.iter().filter(|part| !part.patches && part.length > 0) {
        let file = staging.open_file(&part.path, part.size)?;
        punch_hole(&file, part.offset, part.length)
            .map_err(|e| staging.failed("clear", &part.path, e))?;
    }
    Ok(())
}

/// Writes a unit.
#[derive(Debug)]
pub struct UnitWriter<'a> {
    staging: &'a Staging,
    progress: &'a Progress,
    unit: &'a Unit,
    /// Index of the part that is being written.
    index: usize,
    /// Bytes of it that are done.
    done: u64,
    file: Option<File>,
    dirty_bytes: u64,
    write_back_from: u64,
    unfinished: Vec<Unfinished>,
    /// What the unit's record will say.
    record: UnitDone,
    /// Hashes the present part; `None` before its first byte, or when nobody asks.
    hasher: Option<PartHasher>,
    hashes: bool,
    /// Of each part, what an older copy has given; empty without one.
    known: Vec<Known>,
    /// What writes large new files, if the stream has it.
    disk: Option<&'a mut DirectWriter>,
    /// Whether it writes the present part.
    is_direct: bool,
}

impl<'a> UnitWriter<'a> {
    /// Begins a unit.
    pub fn new(staging: &'a Staging, progress: &'a Progress, unit: &'a Unit) -> Self {
        Self {
            staging,
            progress,
            unit,
            index: 0,
            done: 0,
            file: None,
            dirty_bytes: 0,
            write_back_from: 0,
            unfinished: Vec::new(),
            record: unit_record(unit),
            hasher: None,
            hashes: false,
            known: Vec::new(),
            disk: None,
            is_direct: false,
        }
    }

    /// Writes large new files past the page cache.
    #[must_use]
    pub fn with_disk(self, disk: Option<&'a mut DirectWriter>) -> Self {
        Self { disk, ..self }
    }

    /// Hashes what it writes, for the record.
    #[must_use]
    pub fn with_digests(self, hashes: bool) -> Self {
        Self { hashes, ..self }
    }

    /// The hasher of the present part.
    fn hasher(&mut self, part: &Part) -> Option<&mut PartHasher> {
        if !self.hashes {
            return None;
        }
        let begin = || PartHasher::new(part.file_id.0, part.size, part.offset);
        Some(self.hasher.get_or_insert_with(begin))
    }

    /// What is staged of each part, by `known_of`.
    #[must_use]
    pub fn with_known(self, known: Vec<Known>) -> Self {
        Self { known, ..self }
    }

    /// Digests of what is staged of the part of that index, from `offset` on.
    #[must_use]
    pub fn known(&self, index: usize, offset: u64) -> Bytes {
        self.known.get(index).map(|known| known.from(offset)).unwrap_or_default()
    }

    /// Whether the present part is in a file that has content already.
    fn patches(&self, part: &Part) -> bool {
        part.patches || self.known.get(self.index).is_some_and(|known| !known.is_empty())
    }

    /// The part that is next, and the offset in its file; `None` when all are done.
    pub fn awaited(&mut self) -> Result<Option<(&'a Part, u64)>, Failure> {
        while let Some(part) = self.unit.parts.get(self.index) {
            if self.done < part.length {
                return Ok(Some((part, part.offset + self.done)));
            }
            self.open(part)?;
            self.close(part)?;
        }
        Ok(None)
    }

    /// Bytes of data that were written so far.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.record.data_bytes
    }

    /// Index of the part that is next among those that have bytes.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// The file to copy into directly, for a copy by the file system.
    pub fn file(&mut self) -> Result<Option<&File>, Failure> {
        let Some((part, _)) = self.awaited()? else {
            return Ok(None);
        };
        self.open(part).map(Some)
    }

    /// Counts bytes that were copied into `file` directly.
    pub fn copied(&mut self, length: u64) -> Result<(), Failure> {
        let Some((part, _)) = self.awaited()? else {
            return Err(Failure::bug("copied beyond the unit"));
        };
        self.advance(part, length, length)
    }

    /// Makes the unit durable; returns its record, and the files that could not be read.
    pub fn finish(mut self) -> Result<(UnitDone, Vec<Unfinished>), Failure> {
        if let Some((part, offset)) = self.awaited()? {
            return Err(Failure::peer_misbehaved(format!(
                "{} ended at byte {offset} of {}",
                part.path,
                part.offset + part.length
            )));
        }
        if self.unit.parts.len() > SYNCED_SINGLY_MAX {
            self.staging.sync()?;
        }
        Ok((self.record, self.unfinished))
    }

    fn check(&mut self, file_id: u64, offset: u64, length: u64) -> Result<&'a Part, Failure> {
        let Some((part, awaited)) = self.awaited()? else {
            return Err(Failure::peer_misbehaved(format!(
                "{length} bytes of file {file_id} came after the last range"
            )));
        };
        let left = part.offset + part.length - awaited;
        if part.file_id.0 != file_id || offset != awaited || length == 0 || length > left {
            return Err(Failure::peer_misbehaved(format!(
                "bytes {offset}+{length} of file {file_id} came where at most {left} bytes of file \
                 {} at {awaited} were awaited",
                part.file_id.0
            )));
        }
        Ok(part)
    }

    fn open(&mut self, part: &Part) -> Result<&File, Failure> {
        if self.file.is_none() {
            let file = self.staging.open_file(&part.path, part.size)?;
            self.is_direct = self.begin_direct(part, &file)?;
            self.file = Some(file);
            self.write_back_from = part.offset;
        }
        self.file.as_ref().ok_or_else(|| Failure::bug("no file is open"))
    }

    /// Whether the part is written past the page cache from here on.
    fn begin_direct(&mut self, part: &Part, file: &File) -> Result<bool, Failure> {
        if part.length < DIRECT_BYTES_MIN || self.patches(part) {
            return Ok(false);
        }
        let Some(disk) = &mut self.disk else { return Ok(false) };
        let Some(direct) = self.staging.open_direct(&part.path)? else { return Ok(false) };
        let file = file.try_clone().map_err(|e| self.staging.failed("open", &part.path, e))?;
        disk.begin(direct, file);
        Ok(true)
    }

    /// Waits until the kernel has all that was written of the part.
    fn settle(&mut self, part: &Part) -> Result<(), Failure> {
        match &mut self.disk {
            Some(disk) if self.is_direct => {
                disk.settle().map_err(|e| self.staging.failed("write", &part.path, e))
            }
            _ => Ok(()),
        }
    }

    /// Writes pieces; returns the offset after them.
    fn write_pieces(&mut self, pieces: &[Bytes], mut at: u64) -> std::io::Result<u64> {
        if let (Some(disk), true) = (&mut self.disk, self.is_direct) {
            for piece in pieces {
                disk.write(at, piece)?;
                at += piece.len() as u64;
            }
            return Ok(at);
        }
        let Some(file) = &self.file else { return Ok(at) };
        for group in pieces.chunks(SLICES_MAX) {
            at = write_all_at(file, group, at)?;
        }
        Ok(at)
    }

    fn advance(&mut self, part: &'a Part, length: u64, data: u64) -> Result<(), Failure> {
        self.done += length;
        self.dirty_bytes += data;
        self.progress.data_bytes.add(data);
        self.record.data_bytes += data;
        let at = part.offset + self.done;
        if self.dirty_bytes >= SEGMENT_BYTES {
            self.settle(part)?;
        }
        if let Some(file) = &self.file {
            if self.dirty_bytes >= SEGMENT_BYTES {
                sync(file, part)?;
                self.dirty_bytes = 0;
                self.write_back_from = at;
            } else if at - self.write_back_from >= WRITE_BACK_BYTES && data > 0 && !self.is_direct {
                marcot_common::os::start_write_back(file, self.write_back_from, at);
                self.write_back_from = at;
            }
        }
        if self.done == part.length {
            self.close(part)?;
        }
        Ok(())
    }

    /// Ends the present part.
    fn close(&mut self, part: &Part) -> Result<(), Failure> {
        self.settle(part)?;
        self.is_direct = false;
        if let Some(file) = self.file.take() {
            if let Some(hasher) = self.hasher.take() {
                // While it is in memory: a block that changes on this disk later is noticed then.
                let end = part.offset + part.length;
                let runs = read_unknown(&file, part.size, end, hasher.finish())
                    .map_err(|e| self.staging.failed("read", &part.path, e))?;
                self.record.digests.extend(runs);
            }
            if let Some(entry) = &part.whole {
                self.staging.finish_file(&file, entry)?;
            }
            if part.offset + part.length == part.size {
                self.progress.files_copied.add(1);
                self.record.files += 1;
            }
            if self.unit.parts.len() <= SYNCED_SINGLY_MAX {
                sync(&file, part)?;
            }
        }
        self.index += 1;
        self.done = 0;
        self.dirty_bytes = 0;
        Ok(())
    }
}

impl ChunkSink for UnitWriter<'_> {
    fn write(
        &mut self,
        file_id: u64,
        offset: u64,
        length: u64,
        pieces: &[Bytes],
    ) -> Result<(), Failure> {
        let part = self.check(file_id, offset, length)?;
        let staging = self.staging;
        self.open(part)?;
        let at = self.write_pieces(pieces, offset).map_err(|e| {
            let shown = staging.tree().join(part.path.as_path());
            Failure::io("write", &shown, &e)
        })?;
        if at != offset + length {
            return Err(Failure::bug(format!("{} bytes written, {length} asked", at - offset)));
        }
        self.progress.came_again(self.known.get(self.index).map_or(0, |k| k.again(offset, length)));
        if let Some(hasher) = self.hasher(part) {
            for piece in pieces {
                hasher.data(piece);
            }
        }
        self.advance(part, length, length)
    }

    /// A fresh file reads as zero there, an older one is made to.
    fn skip_hole(&mut self, file_id: u64, offset: u64, length: u64) -> Result<(), Failure> {
        let part = self.check(file_id, offset, length)?;
        let (staging, patches) = (self.staging, self.patches(part));
        let file = self.open(part)?;
        if patches {
            punch_hole(file, offset, length).map_err(|e| {
                let shown = staging.tree().join(part.path.as_path());
                Failure::io("punch a hole in", &shown, &e)
            })?;
        }
        if let Some(hasher) = self.hasher(part) {
            hasher.zeros(length);
        }
        self.progress.hole_bytes.add(length);
        self.record.hole_bytes += length;
        self.advance(part, length, 0)
    }

    fn keep(&mut self, file_id: u64, offset: u64, length: u64) -> Result<(), Failure> {
        let part = self.check(file_id, offset, length)?;
        if !self.patches(part) {
            return Err(Failure::peer_misbehaved(format!(
                "{} is copied for the first time, its bytes at {offset} are said to be unchanged",
                part.path
            )));
        }
        self.open(part)?;
        let certified = self.known.get(self.index).map(Known::certified).unwrap_or_default();
        if let Some(hasher) = self.hasher(part) {
            if part.patches {
                hasher.kept(length);
            } else {
                hasher.reused(length, |block| certified.get(block));
            }
        }
        if part.patches {
            return self.advance(part, length, 0);
        }
        self.progress.reused_bytes.add(length);
        self.record.reused_bytes += length;
        if self.known.get(self.index).is_some_and(Known::is_staged) {
            self.progress.was_here(length);
        }
        // It was copied on this host, and is to be made durable as all else.
        self.advance(part, length, length)
    }

    fn give_up(&mut self, file_id: u64, failure: Failure) -> Result<(), Failure> {
        self.awaited()?;
        let parts = &self.unit.parts;
        let present = parts.get(self.index).filter(|part| part.file_id.0 == file_id);
        if let Some(part) = present {
            self.file = None;
            self.is_direct = false;
            self.hasher = None;
            self.dirty_bytes = 0;
            self.unfinished.push(Unfinished { part: part.clone(), failure });
            self.index += 1;
            self.done = 0;
            return Ok(());
        }
        let finished = parts[..self.index].iter().rev().find(|part| part.length > 0);
        let has_failed = self.unfinished.last().is_some_and(|last| last.part.file_id.0 == file_id);
        let finished = finished.filter(|_| self.done == 0 && !has_failed);
        match finished.filter(|part| part.file_id.0 == file_id) {
            Some(part) => {
                self.unfinished.push(Unfinished { part: part.clone(), failure });
                Ok(())
            }
            None => Err(Failure::peer_misbehaved(format!(
                "file {file_id} failed while it was not being read"
            ))),
        }
    }
}

fn sync(file: &File, part: &Part) -> Result<(), Failure> {
    // A failed fsync is never tried again: the kernel has dropped the pages that it speaks of.
    file.sync_data().map_err(|e| Failure::io("sync", part.path.as_path(), &e))
}

/// Writes all pieces; returns the offset after them.
pub(crate) fn write_all_at(file: &File, pieces: &[Bytes], mut offset: u64) -> std::io::Result<u64> {
    let mut slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
    let mut left = &mut slices[..];
    while !left.is_empty() {
        let written = rustix::io::pwritev(file, left, offset)?;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        offset += written as u64;
        IoSlice::advance_slices(&mut left, written);
    }
    Ok(offset)
}

#[cfg(test)]
mod tests;
