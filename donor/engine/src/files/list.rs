//! Lists on disk: entries with what their sources looked like.

use std::{
    fs::File,
    io::{self, BufWriter, Seek as _, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
};

use marcot_common::{
    entry::{Entry, FileId, Totals},
    failure::Failure,
    spool::{Spool, SpoolReader, SpoolWriter},
    wire,
};
use prost::Message as _;

use super::tree::Identity;

/// An entry, and its source as it was listed; all zero for an entry that removes.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) entry: Entry,
    pub(crate) identity: Identity,
}

impl Record {
    fn encode(&self, buffer: &mut Vec<u8>) {
        let id = &self.identity;
        buffer.clear();
        for word in [id.device, id.inode, id.size, id.links, id.live] {
            buffer.extend_from_slice(&word.to_le_bytes());
        }
        for (seconds, nanoseconds) in [id.modify_time, id.change_time] {
            buffer.extend_from_slice(&seconds.to_le_bytes());
            buffer.extend_from_slice(&nanoseconds.to_le_bytes());
        }
        buffer.extend_from_slice(&wire::entry_to_wire(&self.entry).encode_to_vec());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Failure> {
        let bad = || Failure::bug("a spooled list holds a record that this program did not write");
        let mut rest = bytes;
        let identity = decode_identity(&mut rest).ok_or_else(bad)?;
        let message = marcot_proto::donor::v1::FileEntry::decode(rest).map_err(|_| bad())?;
        Ok(Self { entry: wire::entry(message)?, identity })
    }
}

fn decode_identity(rest: &mut &[u8]) -> Option<Identity> {
    Some(Identity {
        device: u64::from_le_bytes(take(rest)?),
        inode: u64::from_le_bytes(take(rest)?),
        size: u64::from_le_bytes(take(rest)?),
        links: u64::from_le_bytes(take(rest)?),
        live: u64::from_le_bytes(take(rest)?),
        modify_time: (i64::from_le_bytes(take(rest)?), u32::from_le_bytes(take(rest)?)),
        change_time: (i64::from_le_bytes(take(rest)?), u32::from_le_bytes(take(rest)?)),
    })
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

/// A finished list.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    spool: Spool,
    pub(crate) totals: Totals,
}

impl Records {
    pub(crate) fn len(&self) -> u64 {
        self.spool.len()
    }

    /// Records from `number` on.
    pub(crate) fn read_from(&self, number: u64) -> Result<RecordReader, Failure> {
        let reader = self.spool.read_from(number).map_err(|e| spool_failure(&e))?;
        Ok(RecordReader { reader })
    }
}

/// Reads records in order.
#[derive(Debug)]
pub(crate) struct RecordReader {
    reader: SpoolReader,
}

impl Iterator for RecordReader {
    type Item = Result<Record, Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = self.reader.next()?;
        Some(bytes.map_err(|e| spool_failure(&e)).and_then(|b| Record::decode(&b)))
    }
}

/// Writes records; numbers them from 0 and counts them.
#[derive(Debug)]
pub(crate) struct RecordWriter {
    spool: SpoolWriter,
    buffer: Vec<u8>,
    totals: Totals,
}

impl RecordWriter {
    pub(crate) fn create(directory: &Path) -> Result<Self, Failure> {
        let spool = SpoolWriter::create(directory)
            .map_err(|e| Failure::io("create a list in", directory, &e))?;
        Ok(Self { spool, buffer: Vec::new(), totals: Totals::default() })
    }

    /// Appends, giving the entry its number.
    pub(crate) fn append(&mut self, record: &mut Record) -> Result<(), Failure> {
        record.entry.number = self.totals.entries;
        record.encode(&mut self.buffer);
        self.spool.append(&self.buffer).map_err(|e| spool_failure(&e))?;
        self.totals.add(&record.entry);
        Ok(())
    }

    pub(crate) fn finish(self) -> Result<Records, Failure> {
        Ok(Records {
            spool: self.spool.finish().map_err(|e| spool_failure(&e))?,
            totals: self.totals,
        })
    }
}

/// The list of one round, in which a file is found by its id.
#[derive(Debug)]
pub(crate) struct List {
    pub(crate) records: Records,
    // At 8 times the id: number + 1 of its entry; 0, as in the holes of the file, for none.
    numbers: File,
}

impl List {
    /// The record of a file that this list holds.
    pub(crate) fn find(&self, file: FileId) -> Result<Option<Record>, Failure> {
        let Some(offset) = file.0.checked_mul(8).filter(|&n| i64::try_from(n).is_ok()) else {
            return Ok(None);
        };
        let mut bytes = [0; 8];
        match self.numbers.read_exact_at(&mut bytes, offset) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(spool_failure(&error)),
        }
        let Some(number) = u64::from_le_bytes(bytes).checked_sub(1) else {
            return Ok(None);
        };
        let record = self.records.spool.get(number).map_err(|e| spool_failure(&e))?;
        Record::decode(&record).map(Some)
    }
}

/// Writes the list of one round.
#[derive(Debug)]
pub(crate) struct ListWriter {
    records: RecordWriter,
    numbers: NumberWriter,
}

impl ListWriter {
    pub(crate) fn create(directory: &Path) -> Result<Self, Failure> {
        let file = tempfile::tempfile_in(directory)
            .map_err(|e| Failure::io("create a list in", directory, &e))?;
        Ok(Self {
            records: RecordWriter::create(directory)?,
            numbers: NumberWriter { file: BufWriter::with_capacity(16 << 10, file), next: 0 },
        })
    }

    pub(crate) fn append(&mut self, record: &mut Record) -> Result<(), Failure> {
        self.records.append(record)?;
        self.numbers
            .put(record.entry.file_id, record.entry.number + 1)
            .map_err(|e| spool_failure(&e))
    }

    pub(crate) fn finish(self) -> Result<List, Failure> {
        let numbers = self.numbers.file.into_inner();
        Ok(List {
            records: self.records.finish()?,
            numbers: numbers.map_err(|e| spool_failure(e.error()))?,
        })
    }
}

/// Ids come mostly in order: those are written together.
#[derive(Debug)]
struct NumberWriter {
    file: BufWriter<File>,
    next: u64,
}

impl NumberWriter {
    fn put(&mut self, id: FileId, value: u64) -> io::Result<()> {
        if id.0 != self.next {
            self.file.seek(io::SeekFrom::Start(id.0.saturating_mul(8)))?;
        }
        self.next = id.0 + 1;
        self.file.write_all(&value.to_le_bytes())
    }
}

/// The spool, on this host's disk, failed.
fn spool_failure(error: &io::Error) -> Failure {
    Failure::io("use the list in", Path::new("the spool directory"), error)
}
