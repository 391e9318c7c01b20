//! The end of the binary log that the clone needs: at the point a transaction may be prepared in
//! InnoDB and decided only there (R4). The clone's server looks it up when it starts, as after a
//! crash.
//!
//! Its name is that of the log that the clone's server has, where the recipient knows that, or the
//! donor's: only there does the server look it up.
//!
//! Only the last file is needed: the server lets every prepared transaction be committed before it
//! begins another. It is append-only, so it is read after the locks, through a descriptor that was
//! opened under them, up to the point.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use marcot_proto::common::v1::Coordinates;
use tonic::Code;

use crate::{
    Content, FileReader, Span,
    innodb::{mariadb::binlog::path_here, sabotage, server::Facts},
};

/// First bytes of a file that is not encrypted.
const MAGIC: [u8; 4] = *b"\xfebin";

/// Where the first event, which describes the format, has its flags.
const FLAGS_OFFSET: u64 = 4 + 17;

/// In those flags: the file was not closed (LOG_EVENT_BINLOG_IN_USE_F). Without it the server does
/// not look for prepared transactions. The event's checksum is that of the event without it.
const IN_USE: u8 = 1;

/// Longest wait for bytes that the server has written down as written.
const WRITTEN_MAX: Duration = Duration::from_secs(10);

/// The file's name in a clone whose donor has its binary log elsewhere.
const DEFAULT_BASE: &str = "binlog";

/// The last binary log up to the point.
#[derive(Debug, Clone)]
pub(in crate::innodb) struct BinlogTail {
    file: Arc<File>,
    length: u64,
    /// Its path in the clone, and that of the index.
    pub(in crate::innodb) path: String,
    pub(in crate::innodb) index_path: String,
    /// The index: this file alone.
    pub(in crate::innodb) index: Vec<u8>,
}

impl BinlogTail {
    /// Opens the file that the point is in; `None` where no binary log is written. The clone's is named
    /// by `base`, where there is one.
    pub(in crate::innodb) fn open(
        facts: &Facts,
        data_directory: &Path,
        point: &Coordinates,
        base: Option<&str>,
    ) -> Result<Option<Self>, Failure> {
        if !facts.has_binlog || point.binlog_file.is_empty() {
            return Ok(None);
        }
        let name = String::from_utf8_lossy(&point.binlog_file).into_owned();
        // The server may know the data directory by another path.
        let (basename, datadir) = (facts.variable("log_bin_basename"), facts.variable("datadir"));
        let shown = path_here(basename, datadir, data_directory, &name);
        let here = shown.parent().unwrap_or(data_directory);
        let file = File::open(&shown).map_err(|e| Failure::io("open binary log", &shown, &e))?;
        let mut magic = [0; MAGIC.len()];
        file.read_exact_at(&mut magic, 0)
            .map_err(|e| Failure::io("read binary log", &shown, &e))?;
        if magic != MAGIC {
            return Err(Failure::precondition(
                "BINLOG_ENCRYPTED",
                format!(
                    "binary log {} is no plain one (binlog_encryption=ON?): its end decides prepared \
                     transactions, and cannot be read; switch encryption off, and clone again",
                    shown.display()
                ),
            ));
        }
        let deadline = Instant::now() + WRITTEN_MAX;
        while file.metadata().map_or(0, |metadata| metadata.len()) < point.binlog_position {
            if Instant::now() >= deadline {
                let text = format!(
                    "binary log {} ends before position {}, which the server says was written",
                    shown.display(),
                    point.binlog_position
                );
                return Err(Failure::new(Code::DataLoss, "BINLOG_SHORT", text));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // Relative to the data directory; elsewhere it gets the default name.
        let directory = here.strip_prefix(data_directory).ok().map(Path::to_owned);
        let directory = directory.filter(|_| base.is_none());
        let path = match &directory {
            Some(directory) => directory.join(&name),
            None => {
                let number = name.rsplit('.').next().unwrap_or("000001");
                Path::new(&format!("{}.{number}", base.unwrap_or(DEFAULT_BASE))).to_owned()
            }
        };
        let index = Path::new(facts.variable("log_bin_index"));
        let index_path = match (index.strip_prefix(datadir), &directory) {
            (Ok(inside), Some(_)) => inside.to_owned(),
            _ => path.with_extension("index"),
        };
        Ok(Some(Self {
            file: Arc::new(file),
            length: point.binlog_position,
            index: format!("./{}\n", path.display()).into_bytes(),
            path: path.display().to_string(),
            index_path: index_path.display().to_string(),
        }))
    }

    /// Bytes up to the point.
    pub(in crate::innodb) fn length(&self) -> u64 {
        self.length
    }
}

/// Reads it.
#[derive(Debug)]
pub(in crate::innodb) struct BinlogReader(pub(in crate::innodb) BinlogTail);

impl FileReader for BinlogReader {
    fn size(&self) -> u64 {
        self.0.length
    }

    fn span(&mut self, _: u64, end: u64) -> Result<Span, Failure> {
        Ok(Span { end, content: Content::Data })
    }

    fn read_exact_at(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.0.length) {
            return Err(Failure::bug("read beyond the point in the binary log"));
        }
        let read = self.0.file.read_exact_at(buffer, offset);
        read.map_err(|e| Failure::io("read binary log", Path::new(&self.0.path), &e))?;
        // The donor may have gone on to another file, and closed this one.
        if let Some(at) = FLAGS_OFFSET.checked_sub(offset).and_then(|at| usize::try_from(at).ok())
            && let Some(flags) = buffer.get_mut(at)
        {
            *flags |= IN_USE;
            if sabotage::is("closed-binlog") {
                *flags &= !IN_USE;
            }
        }
        Ok(())
    }

    fn check_unchanged(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    fn file(&self) -> Option<&File> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards R4 where the server has gone on to another file, and closed this one, before it is read:
    /// without the flag the clone's server does not look for prepared transactions in it.
    #[test]
    fn a_file_that_was_closed_meanwhile_is_in_use_in_the_clone() {
        let file = tempfile::tempfile().unwrap();
        let closed = [&MAGIC[..], &[0; 100]].concat();
        file.write_all_at(&closed, 0).unwrap();
        let mut reader = BinlogReader(BinlogTail {
            file: Arc::new(file),
            length: closed.len() as u64,
            path: "binlog.000001".to_owned(),
            index_path: "binlog.index".to_owned(),
            index: Vec::new(),
        });
        let mut expected = closed.clone();
        expected[21] = IN_USE;
        // However the parts that are read lie to the flags.
        for begin in 0..expected.len() {
            let mut read = vec![0; expected.len() - begin];
            reader.read_exact_at(&mut read, begin as u64).unwrap();
            assert_eq!(read, expected[begin..], "from {begin} on");
        }
        let mut before = [0; 21];
        reader.read_exact_at(&mut before, 0).unwrap();
        assert_eq!(before, closed[..21]);
    }
}
