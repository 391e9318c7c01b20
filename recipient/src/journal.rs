//! An append-only file of records, each durable before what depends on it is done.
//!
//! ```text
//! header   "marcotj1"                                        8 bytes
//! record   payload's length u32, CRC-32C u32, kind u8, payload   (little-endian)
//! ```
//! The CRC-32C covers length, kind and payload. Readers pass over kinds that they do not know, so a
//! later version may add some; what would mislead an older one gets another header.
//!
//! Invariants:
//! * A record counts once `append` has returned: it is on the disk, and so is the file's name.
//! * A tail that does not parse is what a crash has left of one append: it is cut off. A record that
//!   does not parse before one that does is damage, and an error.
//! * One process writes to a journal: whoever has it open for that holds a lock (flock) on it, so
//!   that two recipients never work on the same trees, whatever their settings.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use rustix::{fs::FlockOperation, io::Errno};
use tonic::Code;

use crate::{order, sabotage};

/// First bytes of a journal: name and version.
const MAGIC: &[u8; 8] = b"marcotj1";

/// What journals of all versions begin with; one digit follows.
const NAME: &[u8; 7] = b"marcotj";

/// Bytes of a record before its payload.
const HEAD_BYTES: usize = 9;

/// Longest payload: far more than any record has; a length beyond is damage.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// Longest record.
const RECORD_BYTES_MAX: usize = HEAD_BYTES + PAYLOAD_BYTES_MAX;

/// How long a task of this process that ends may still have a journal open.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(2);

/// Between two tries to have it.
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// A record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What it is; the journal's user gives the meaning.
    pub kind: u8,
    /// Its content.
    pub payload: Vec<u8>,
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    end: u64,
}

impl Journal {
    /// Makes a new journal, durable with its name.
    pub fn create(path: &Path) -> Result<Self, Failure> {
        let create = || -> io::Result<File> {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path)?;
            file.write_all(MAGIC)?;
            order::made(path);
            if !sabotage::leaves_out("journal-create") {
                file.sync_all()?;
                let directory = path.parent().unwrap_or(Path::new("/"));
                File::open(directory)?.sync_all()?;
                order::synced(directory);
            }
            Ok(file)
        };
        let file = create().map_err(|e| Failure::io("create journal", path, &e))?;
        lock(&file, path)?;
        Ok(Self { file, path: path.to_owned(), end: MAGIC.len() as u64 })
    }

    /// Has the file system keep room for what is still to be appended, where it can: a full disk must
    /// not stop what the journal is about.
    pub fn reserve(&self, bytes: u64) {
        let flags = rustix::fs::FallocateFlags::KEEP_SIZE;
        if let Err(e) = rustix::fs::fallocate(&self.file, flags, 0, bytes) {
            tracing::debug!(error = %e, path = %self.path.display(), "no room is kept for a journal");
        }
    }

    /// Opens a journal to go on with it; returns what it holds. A torn tail is cut off.
    pub fn open(path: &Path) -> Result<(Self, Vec<Record>), Failure> {
        let mut records = Vec::new();
        let journal = Self::open_with(path, &mut |record| {
            records.push(record);
            Ok(())
        })?;
        Ok((journal, records))
    }

    /// As `open`, one record at a time.
    pub fn open_with(
        path: &Path,
        take: &mut dyn FnMut(Record) -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        let failed = |e: io::Error| Failure::io("open journal", path, &e);
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        lock(&file, path)?;
        let end = parse(&file, path, take)?;
        let size = file.metadata().map_err(failed)?.len();
        if end < size {
            tracing::warn!(
                path = %path.display(),
                cut = size - end,
                "a journal's last record was not written whole"
            );
            file.set_len(end).and_then(|()| file.sync_all()).map_err(failed)?;
            order::synced(path);
        }
        Ok(Self { file, path: path.to_owned(), end })
    }

    /// What a journal holds; nothing is changed.
    pub fn read(path: &Path) -> Result<Vec<Record>, Failure> {
        let mut records = Vec::new();
        Self::read_with(path, &mut |record| {
            records.push(record);
            Ok(())
        })?;
        Ok(records)
    }

    /// As `read`, one record at a time.
    pub fn read_with(
        path: &Path,
        take: &mut dyn FnMut(Record) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let file = File::open(path).map_err(|e| Failure::io("open journal", path, &e))?;
        parse(&file, path, take).map(|_| ())
    }

    /// Appends a record; it is on the disk when this returns.
    pub fn append(&mut self, kind: u8, payload: &[u8]) -> Result<(), Failure> {
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(Failure::bug(format!("journal record of {} bytes", payload.len())));
        }
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut record = Vec::with_capacity(HEAD_BYTES + payload.len());
        record.extend(length.to_le_bytes());
        record.extend(checksum(length, kind, payload).to_le_bytes());
        record.push(kind);
        record.extend(payload);
        // A failed write or fsync condemns the journal: its user ends, and reads it anew later.
        self.file
            .write_all_at(&record, self.end)
            .and_then(|()| match sabotage::leaves_out("journal-append") {
                true => Ok(()),
                false => self.file.sync_data(),
            })
            .map_err(|e| Failure::io("write journal", &self.path, &e))?;
        order::appended(&self.path);
        self.end += record.len() as u64;
        Ok(())
    }
}

/// Takes the journal for this process, until it is closed.
fn lock(file: &File, path: &Path) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if begun.elapsed() < LOCK_WAIT_MAX => {
                std::thread::sleep(LOCK_PAUSE);
            }
            Err(Errno::WOULDBLOCK) => {
                return Err(Failure::precondition(
                    "JOURNAL_IN_USE",
                    format!(
                        "another process has journal {} open: another marcot-recipient works on \
                         the same data directory; have only one",
                        path.display()
                    ),
                ));
            }
            // A file system without locks (some FUSE).
            Err(e) => {
                tracing::warn!(error = %e, path = %path.display(), "a journal cannot be locked");
                return Ok(());
            }
        }
    }
}

fn checksum(length: u32, kind: u8, payload: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&length.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &[kind]), payload)
}

/// Takes all records; returns where the last one ends.
fn parse(
    file: &File,
    path: &Path,
    take: &mut dyn FnMut(Record) -> Result<(), Failure>,
) -> Result<u64, Failure> {
    let failed = |e: io::Error| Failure::io("read journal", path, &e);
    let size = file.metadata().map_err(failed)?.len();
    let mut window = Window { file, size, start: 0, bytes: Vec::new() };
    window.reach(MAGIC.len()).map_err(failed)?;
    if window.bytes.get(..MAGIC.len()) != Some(MAGIC) {
        let start = &window.bytes[..window.bytes.len().min(MAGIC.len())];
        if let Some([version]) = start.strip_prefix(NAME)
            && version.is_ascii_digit()
        {
            return Err(Failure::new(
                Code::FailedPrecondition,
                "JOURNAL_VERSION",
                format!(
                    "journal {} is of version {}, this program knows version {}: start the version \
                     of marcot-recipient that has written it, nothing of it is removed",
                    path.display(),
                    char::from(*version),
                    char::from(MAGIC[NAME.len()])
                ),
            ));
        }
        let start = start.escape_ascii();
        return Err(corrupt(path, 0, &format!("it begins with `{start}`, not with `marcotj1`")));
    }
    let mut at = MAGIC.len();
    loop {
        at = window.drop_before(at);
        window.reach(at + RECORD_BYTES_MAX).map_err(failed)?;
        let Some((record, next)) = record_at(&window.bytes, at) else {
            break;
        };
        take(record)?;
        at = next;
    }
    // What a crash leaves of an append is less than a record, and has nothing behind it. A payload
    // may hold the bytes of a record (a donor chooses its paths): torn within, it is taken for
    // damage, which never loses a record that counts.
    let end = window.start + at as u64;
    let left = &window.bytes[at..];
    let is_torn = size - end < RECORD_BYTES_MAX as u64
        && !(1..left.len()).any(|later| record_at(left, later).is_some());
    if is_torn {
        Ok(end)
    } else {
        Err(corrupt(path, end, "a record there is damaged, it is not the last one"))
    }
}

/// A part of a file in memory.
struct Window<'a> {
    file: &'a File,
    size: u64,
    /// Where in the file it starts.
    start: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    /// Reads on until it has so many bytes, or all there are.
    fn reach(&mut self, count: usize) -> io::Result<()> {
        let end = self.start + self.bytes.len() as u64;
        if self.bytes.len() >= count || end >= self.size {
            return Ok(());
        }
        // More than one record at a time.
        let more = (count - self.bytes.len() + RECORD_BYTES_MAX) as u64;
        let more = usize::try_from(more.min(self.size - end)).unwrap_or(0);
        let old = self.bytes.len();
        self.bytes.resize(old + more, 0);
        self.file.read_exact_at(&mut self.bytes[old..], end)
    }

    /// Forgets what comes before `at`, when that is much; returns where `at` is then.
    fn drop_before(&mut self, at: usize) -> usize {
        if at < RECORD_BYTES_MAX {
            return at;
        }
        self.bytes.drain(..at);
        self.start += at as u64;
        0
    }
}

fn record_at(bytes: &[u8], at: usize) -> Option<(Record, usize)> {
    let head = bytes.get(at..at + HEAD_BYTES)?;
    let number = |from: usize| head[from..from + 4].first_chunk().map(|b| u32::from_le_bytes(*b));
    let (length, crc, kind) = (number(0)?, number(4)?, head[8]);
    let size = usize::try_from(length).ok().filter(|&n| n <= PAYLOAD_BYTES_MAX)?;
    let payload = bytes.get(at + HEAD_BYTES..at + HEAD_BYTES + size)?;
    if checksum(length, kind, payload) != crc {
        return None;
    }
    Some((Record { kind, payload: payload.to_vec() }, at + HEAD_BYTES + size))
}

fn corrupt(path: &Path, at: u64, why: &str) -> Failure {
    Failure::new(
        Code::DataLoss,
        "JOURNAL_CORRUPT",
        format!("journal {} is damaged at byte {at}: {why}", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(records: &[Record]) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let mut journal = Journal::create(&path).unwrap();
        for record in records {
            journal.append(record.kind, &record.payload).unwrap();
        }
        (directory, path)
    }

    fn some() -> Vec<Record> {
        let record = |kind, length: usize| Record { kind, payload: vec![kind; length] };
        vec![record(1, 0), record(2, 300), record(3, 5)]
    }

    /// Guards torn tails: wherever the last append was cut, all earlier records are there, and the
    /// journal goes on after them.
    #[test]
    fn a_tail_that_was_cut_anywhere_is_dropped() {
        let (_directory, path) = written(&some());
        let whole = std::fs::read(&path).unwrap();
        let last = HEAD_BYTES + 5;
        for cut in whole.len() - last..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut journal, records) = Journal::open(&path).unwrap();
            assert_eq!(records, some()[..2], "cut at {cut}");
            journal.append(3, &[3; 5]).unwrap();
            assert_eq!(Journal::read(&path).unwrap(), some());
        }
    }

    /// Guards against two recipients on one data directory: the second neither reads nor cuts.
    #[test]
    fn a_journal_has_one_writer() {
        let (_directory, path) = written(&some());
        let (first, _) = Journal::open(&path).unwrap();
        assert_eq!(Journal::open(&path).unwrap_err().reason, "JOURNAL_IN_USE");
        assert_eq!(Journal::read(&path).unwrap(), some());
        drop(first);
        Journal::open(&path).unwrap();
    }

    #[test]
    fn other_files_and_other_versions_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        for (content, reason) in [
            (&b""[..], "JOURNAL_CORRUPT"),
            (b"something else", "JOURNAL_CORRUPT"),
            (b"marcotj", "JOURNAL_CORRUPT"),
            (b"marcotjx", "JOURNAL_CORRUPT"),
            (b"marcotj0 and more", "JOURNAL_VERSION"),
            (b"marcotj2", "JOURNAL_VERSION"),
        ] {
            std::fs::write(&path, content).unwrap();
            let failure = Journal::open(&path).unwrap_err();
            assert_eq!(failure.reason, reason, "{failure}");
        }
    }

    proptest! {
        /// Guards the checksum: a flipped bit makes a record vanish or the journal an error, and
        /// never a record that was not written.
        #[test]
        fn no_flipped_bit_makes_another_record(bit in 0..(8 + 3 * HEAD_BYTES + 305) * 8) {
            let (_directory, path) = written(&some());
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, bytes).unwrap();
            match Journal::open(&path) {
                Ok((_, records)) => prop_assert_eq!(&records[..], &some()[..2]),
                // The digit of the version has no checksum of its own.
                Err(failure) if bit / 8 == NAME.len() => {
                    prop_assert!(failure.reason.starts_with("JOURNAL_"), "{}", failure);
                }
                Err(failure) => prop_assert_eq!(failure.reason, "JOURNAL_CORRUPT"),
            }
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("journal");
            std::fs::write(&path, [&MAGIC[..], &bytes].concat()).unwrap();
            drop(Journal::open(&path));
        }
    }
}
