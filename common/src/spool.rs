//! A numbered list of records on disk, so that no list of files is held whole in memory.
//!
//! Invariants:
//! * A record is read as it was written, or is an error: each carries its CRC-32C.
//! * Memory is one buffer, whatever the number of records.
//!
//! Two files without names (they vanish with the process): records, each as length, CRC-32C and
//! bytes; and the offset of every record, for reading from any number on, in either direction.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::Path,
    sync::Arc,
};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};

/// Longest record, bytes: an entry with the longest path, target and attributes fits.
pub const RECORD_BYTES_MAX: usize = 128 << 10;

const HEADER_BYTES: usize = 8;
const INDEX_BYTES: u64 = 8;

/// Writes a spool.
#[derive(Debug)]
pub struct SpoolWriter {
    records: BufWriter<File>,
    index: BufWriter<File>,
    offset: u64,
    count: u64,
}

impl SpoolWriter {
    /// Creates a spool whose files lie, without names, in `directory`.
    pub fn create(directory: &Path) -> io::Result<Self> {
        Ok(Self {
            records: BufWriter::with_capacity(64 << 10, unnamed_file(directory)?),
            index: BufWriter::with_capacity(16 << 10, unnamed_file(directory)?),
            offset: 0,
            count: 0,
        })
    }

    /// Appends a record and returns its number, from 0.
    pub fn append(&mut self, record: &[u8]) -> io::Result<u64> {
        let length =
            u32::try_from(record.len())
                .ok()
                .filter(|&n| n as usize <= RECORD_BYTES_MAX)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "record too long"))?;
        self.records.write_all(&length.to_le_bytes())?;
        self.records.write_all(&crc32c::crc32c(record).to_le_bytes())?;
        self.records.write_all(record)?;
        self.index.write_all(&self.offset.to_le_bytes())?;
        self.offset += (HEADER_BYTES + record.len()) as u64;
        self.count += 1;
        Ok(self.count - 1)
    }

    /// Ends the list.
    pub fn finish(self) -> io::Result<Spool> {
        let records = self.records.into_inner().map_err(io::IntoInnerError::into_error)?;
        let index = self.index.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(Spool { records: Arc::new(records), index: Arc::new(index), count: self.count })
    }
}

/// A finished list; clones share the files.
#[derive(Debug, Clone)]
pub struct Spool {
    records: Arc<File>,
    index: Arc<File>,
    count: u64,
}

impl Spool {
    /// Number of records.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.count
    }

    /// Whether there is no record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Reads one record.
    pub fn get(&self, number: u64) -> io::Result<Vec<u8>> {
        let mut cursor = Cursor { file: &self.records, offset: self.offset_of(number)? };
        read_record(&mut cursor)
    }

    /// Reads records from `number` on, in order.
    pub fn read_from(&self, number: u64) -> io::Result<SpoolReader> {
        let offset = if number >= self.count { 0 } else { self.offset_of(number)? };
        let shared = SharedCursor { file: Arc::clone(&self.records), offset };
        Ok(SpoolReader {
            source: BufReader::with_capacity(64 << 10, shared),
            left: self.count.saturating_sub(number),
        })
    }

    /// Gives the records a name, durable when this returns; `open` reads them back.
    pub fn keep_as(&self, path: &Path) -> io::Result<()> {
        let unnamed = format!("/proc/self/fd/{}", self.records.as_raw_fd());
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let flags = AtFlags::SYMLINK_FOLLOW;
        match rustix::fs::linkat(CWD, unnamed.as_str(), CWD, path, flags) {
            Ok(()) => self.records.sync_all()?,
            // Where a file without a name has had one, it takes no other.
            Err(_) => {
                let mut source =
                    BufReader::new(SharedCursor { file: Arc::clone(&self.records), offset: 0 });
                let mut copy =
                    File::options().write(true).create_new(true).mode(0o600).open(path)?;
                io::copy(&mut source, &mut copy)?;
                copy.sync_all()?;
            }
        }
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    }

    /// Opens what `keep_as` has named, of so many records; each of them is looked at.
    pub fn open(path: &Path, count: u64) -> io::Result<Self> {
        let records = Arc::new(File::open(path)?);
        let directory = path.parent().unwrap_or(Path::new("/"));
        let mut index = BufWriter::with_capacity(16 << 10, unnamed_file(directory)?);
        let mut source = BufReader::with_capacity(
            64 << 10,
            SharedCursor { file: Arc::clone(&records), offset: 0 },
        );
        let mut offset = 0u64;
        for _ in 0..count {
            index.write_all(&offset.to_le_bytes())?;
            offset += (HEADER_BYTES + read_record(&mut source)?.len()) as u64;
        }
        if records.metadata()?.len() != offset {
            let text = format!("a list of {count} records does not end at byte {offset}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let index = index.into_inner().map_err(io::IntoInnerError::into_error)?;
        Ok(Self { records, index: Arc::new(index), count })
    }

    fn offset_of(&self, number: u64) -> io::Result<u64> {
        if number >= self.count {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no such record"));
        }
        let mut bytes = [0; 8];
        self.index.read_exact_at(&mut bytes, number * INDEX_BYTES)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// Reads records in order.
#[derive(Debug)]
pub struct SpoolReader {
    source: BufReader<SharedCursor>,
    left: u64,
}

impl Iterator for SpoolReader {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        let record = read_record(&mut self.source);
        if record.is_err() {
            self.left = 0;
        }
        Some(record)
    }
}

fn read_record(source: &mut impl io::Read) -> io::Result<Vec<u8>> {
    let mut header = [0; HEADER_BYTES];
    source.read_exact(&mut header)?;
    let [l0, l1, l2, l3, c0, c1, c2, c3] = header;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let expected = u32::from_le_bytes([c0, c1, c2, c3]);
    if length > RECORD_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "spool record has a bad length"));
    }
    let mut record = vec![0; length];
    source.read_exact(&mut record)?;
    let actual = crc32c::crc32c(&record);
    if actual != expected {
        let text = format!("spool record has CRC-32C {actual:08x}, {expected:08x} was written");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(record)
}

struct Cursor<'a> {
    file: &'a File,
    offset: u64,
}

impl io::Read for Cursor<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

#[derive(Debug)]
struct SharedCursor {
    file: Arc<File>,
    offset: u64,
}

impl io::Read for SharedCursor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

/// Opens a file without a name for reading and writing; on file systems without O_TMPFILE it is unlinked at once.
pub fn unnamed_file(directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Ok(File::from(fd)),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            let path = directory.join(format!(".marcot-spool-{}", uuid::Uuid::new_v4()));
            let file = File::options().read(true).write(true).create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_from_any_number_and_singly() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = SpoolWriter::create(directory.path()).unwrap();
        for n in 0..1000u32 {
            assert_eq!(writer.append(&n.to_le_bytes()).unwrap(), u64::from(n));
        }
        let spool = writer.finish().unwrap();
        assert_eq!(spool.len(), 1000);
        assert_eq!(spool.get(999).unwrap(), 999u32.to_le_bytes());
        let tail: Vec<_> = spool.read_from(997).unwrap().map(Result::unwrap).collect();
        assert_eq!(tail, [997u32, 998, 999].map(|n| n.to_le_bytes().to_vec()));
        assert!(spool.get(1000).is_err());
        assert_eq!(spool.read_from(1000).unwrap().count(), 0);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "no names are left");
    }

    /// Guards a list that outlives its process: cut, longer, or damaged, it is an error.
    #[test]
    fn a_named_spool_is_read_back_whole_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("list");
        let mut writer = SpoolWriter::create(directory.path()).unwrap();
        for n in 0..100u32 {
            writer.append(&n.to_le_bytes()).unwrap();
        }
        let spool = writer.finish().unwrap();
        std::fs::write(&path, b"an older one").unwrap();
        spool.keep_as(&path).unwrap();
        drop(spool);
        let opened = Spool::open(&path, 100).unwrap();
        assert_eq!(opened.get(57).unwrap(), 57u32.to_le_bytes());
        assert_eq!(opened.read_from(98).unwrap().count(), 2);
        assert!(Spool::open(&path, 99).is_err());
        assert!(Spool::open(&path, 101).is_err());
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[500] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(Spool::open(&path, 100).is_err());
    }

    /// Guards the record's CRC-32C: without the comparison this test fails.
    #[test]
    fn a_flipped_bit_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = SpoolWriter::create(directory.path()).unwrap();
        writer.append(b"record").unwrap();
        let spool = writer.finish().unwrap();
        spool.records.write_all_at(b"R", HEADER_BYTES as u64).unwrap();
        assert_eq!(spool.get(0).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
