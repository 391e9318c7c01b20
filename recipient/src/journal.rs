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

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use marcot_common::failure::Failure;
use tonic::Code;

/// First bytes of a journal: name and version.
const MAGIC: &[u8; 8] = b"marcotj1";

/// Bytes of a record before its payload.
const HEAD_BYTES: usize = 9;

/// Longest payload: far more than any record has; a length beyond is damage.
const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// Largest journal that is read: it is read whole.
const JOURNAL_BYTES_MAX: u64 = 256 << 20;

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
            file.sync_all()?;
            File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
            Ok(file)
        };
        let file = create().map_err(|e| Failure::io("create journal", path, &e))?;
        Ok(Self { file, path: path.to_owned(), end: MAGIC.len() as u64 })
    }

    /// Opens a journal to go on with it; returns what it holds. A torn tail is cut off.
    pub fn open(path: &Path) -> Result<(Self, Vec<Record>), Failure> {
        let failed = |e: io::Error| Failure::io("open journal", path, &e);
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let bytes = read_all(&file, path)?;
        let (records, end) = parse(&bytes, path)?;
        if end < bytes.len() as u64 {
            tracing::warn!(
                path = %path.display(),
                cut = bytes.len() as u64 - end,
                "a journal's last record was not written whole"
            );
            file.set_len(end).and_then(|()| file.sync_all()).map_err(failed)?;
        }
        Ok((Self { file, path: path.to_owned(), end }, records))
    }

    /// What a journal holds; nothing is changed.
    pub fn read(path: &Path) -> Result<Vec<Record>, Failure> {
        let file = File::open(path).map_err(|e| Failure::io("open journal", path, &e))?;
        Ok(parse(&read_all(&file, path)?, path)?.0)
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
            .and_then(|()| self.file.sync_data())
            .map_err(|e| Failure::io("write journal", &self.path, &e))?;
        self.end += record.len() as u64;
        Ok(())
    }
}

fn checksum(length: u32, kind: u8, payload: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&length.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &[kind]), payload)
}

fn read_all(file: &File, path: &Path) -> Result<Vec<u8>, Failure> {
    let failed = |e: io::Error| Failure::io("read journal", path, &e);
    let size = file.metadata().map_err(failed)?.len();
    if size > JOURNAL_BYTES_MAX {
        return Err(corrupt(path, 0, &format!("it has {size} bytes")));
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0).map_err(failed)?;
    Ok(bytes)
}

/// All records, and where the last one ends.
fn parse(bytes: &[u8], path: &Path) -> Result<(Vec<Record>, u64), Failure> {
    if bytes.get(..MAGIC.len()) != Some(MAGIC) {
        let start = bytes[..bytes.len().min(MAGIC.len())].escape_ascii();
        return Err(corrupt(path, 0, &format!("it begins with `{start}`, not with `marcotj1`")));
    }
    let mut records = Vec::new();
    let mut at = MAGIC.len();
    while let Some((record, next)) = record_at(bytes, at) {
        records.push(record);
        at = next;
    }
    // What a crash leaves of an append has nothing behind it.
    if (at + 1..bytes.len()).any(|later| record_at(bytes, later).is_some()) {
        return Err(corrupt(path, at, "a record there is damaged, later ones are whole"));
    }
    Ok((records, at as u64))
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

fn corrupt(path: &Path, at: usize, why: &str) -> Failure {
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

    #[test]
    fn other_files_and_other_versions_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        for content in [&b""[..], b"marcotj2", b"something else"] {
            std::fs::write(&path, content).unwrap();
            let failure = Journal::open(&path).unwrap_err();
            assert_eq!(failure.reason, "JOURNAL_CORRUPT");
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
