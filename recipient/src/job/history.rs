//! Past clones, kept across restarts of the recipient: one file each in the state directory.

use std::{
    io,
    path::{Path, PathBuf},
};

use marcot_common::{durable::write_atomically, failure::Failure};
use marcot_proto::recipient::v1 as pb;
use prost::Message as _;
use tracing::warn;

/// Clones that are remembered; the oldest goes when one more ends.
pub const CLONES_MAX: usize = 1000;

/// First bytes of a record: a name and a version, before CRC-32C and the message.
const MAGIC: &[u8; 8] = b"marcotc1";

/// The state directory's records of clones.
#[derive(Debug)]
pub struct History {
    directory: PathBuf,
}

impl History {
    /// Opens, or makes, the records below `state_directory`.
    pub fn open(state_directory: &Path) -> Result<Self, Failure> {
        let directory = state_directory.join("clones");
        std::fs::create_dir_all(&directory)
            .map_err(|e| Failure::io("create directory", &directory, &e))?;
        Ok(Self { directory })
    }

    /// All clones, oldest first. A record that cannot be read is named in the log and passed over.
    pub fn load(&self) -> Result<Vec<pb::Clone>, Failure> {
        let failed = |e: io::Error| Failure::io("read directory", &self.directory, &e);
        let mut clones = Vec::new();
        for entry in std::fs::read_dir(&self.directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_none_or(|extension| extension != "clone") {
                continue;
            }
            match read_record(&path) {
                Ok(clone) => clones.push(clone),
                Err(why) => warn!(path = %path.display(), why, "record of a clone is unreadable"),
            }
        }
        clones.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(clones)
    }

    /// Writes a clone's record, durable when this returns.
    pub fn save(&self, clone: &pb::Clone) -> Result<(), Failure> {
        let message = clone.encode_to_vec();
        let mut record = MAGIC.to_vec();
        record.extend(crc32c::crc32c(&message).to_le_bytes());
        record.extend(message);
        let path = self.path(&clone.name);
        write_atomically(&path, &record, 0o600)
            .map_err(|e| Failure::io("write the record of a clone to", &path, &e))
    }

    /// Forgets a clone.
    pub fn remove(&self, name: &str) {
        let path = self.path(name);
        if let Err(e) = std::fs::remove_file(&path) {
            warn!(path = %path.display(), error = %e, "record of a clone stays");
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        let id = name.rsplit('/').next().unwrap_or(name);
        self.directory.join(format!("{id}.clone"))
    }
}

fn read_record(path: &Path) -> Result<pb::Clone, String> {
    let record = std::fs::read(path).map_err(|e| e.to_string())?;
    let rest = record.strip_prefix(MAGIC).ok_or("it has another format or version")?;
    let (crc, message) = rest.split_first_chunk::<4>().ok_or("it is cut")?;
    let (expected, actual) = (u32::from_le_bytes(*crc), crc32c::crc32c(message));
    if expected != actual {
        return Err(format!("it has CRC-32C {actual:08x}, {expected:08x} was written"));
    }
    pb::Clone::decode(message).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_are_read_back_and_damaged_records_are_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::open(directory.path()).unwrap();
        for id in ["b", "a", "c"] {
            let name = format!("clones/{id}");
            history.save(&pb::Clone { name, files_copied: 7, ..Default::default() }).unwrap();
        }
        let path = directory.path().join("clones/b.clone");
        let mut record = std::fs::read(&path).unwrap();
        let last = record.len() - 1;
        record[last] ^= 1;
        std::fs::write(&path, record).unwrap();
        let names: Vec<_> = history.load().unwrap().into_iter().map(|c| c.name).collect();
        assert_eq!(names, ["clones/a", "clones/c"]);
    }
}
