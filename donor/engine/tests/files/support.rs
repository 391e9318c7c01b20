//! A data directory, a spool directory and the engine on them.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use marcot_common::{
    entry::{Entry, FileId},
    failure::Failure,
    position::{Position, Stage},
};
use marcot_engine::{Advanced, Content, Engine, EngineConfig, Snapshot, open_engine};
use tempfile::TempDir;

pub(crate) struct Fixture {
    directory: TempDir,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("data")).unwrap();
        fs::create_dir(directory.path().join("spool")).unwrap();
        Self { directory }
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub(crate) fn spool(&self) -> PathBuf {
        self.directory.path().join("spool")
    }

    pub(crate) fn path(&self, name: impl AsRef<[u8]>) -> PathBuf {
        self.data().join(OsStr::from_bytes(name.as_ref()))
    }

    pub(crate) fn write(&self, name: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    pub(crate) fn engine(&self) -> Arc<dyn Engine> {
        open_engine(&EngineConfig {
            engine: "files".to_owned(),
            data_directory: self.data(),
            spool_directory: self.spool(),
            spool_quota: 1 << 30,
            checkpoint_timeout: Duration::from_secs(120),
            database: marcot_engine::DatabaseConfig::default(),
            observer: marcot_engine::Observer::default(),
        })
        .unwrap()
    }

    pub(crate) fn open(&self) -> Result<Box<dyn Snapshot>, Failure> {
        self.engine().open(&Default::default())
    }
}

pub(crate) fn at(round: u32) -> Position {
    Position { stage: Stage::FileCopy, round }
}

pub(crate) fn list(snapshot: &dyn Snapshot, round: u32) -> Vec<Entry> {
    let entries = snapshot.list(at(round), 0).unwrap();
    let entries: Vec<_> = entries.map(Result::unwrap).collect();
    assert!(entries.is_sorted_by(|a, b| a.path < b.path), "a list ascends strictly");
    for (number, entry) in entries.iter().enumerate() {
        assert_eq!(entry.number, number as u64);
    }
    entries
}

pub(crate) fn paths(entries: &[Entry]) -> Vec<String> {
    let shown = |e: &Entry| e.path.as_bytes().escape_ascii().to_string();
    entries.iter().map(shown).collect()
}

pub(crate) fn id_of(snapshot: &dyn Snapshot, round: u32, path: &str) -> FileId {
    let entries = list(snapshot, round);
    let is_it = |e: &&Entry| e.path.as_bytes() == path.as_bytes();
    entries.iter().find(is_it).unwrap().file_id
}

pub(crate) fn advance(snapshot: &dyn Snapshot, round: u32) -> Result<Advanced, Failure> {
    snapshot.advance(at(round), &mut |_| Ok(()))
}

/// Reads a whole listed file by its spans; what is a hole is not read.
pub(crate) fn read(snapshot: &dyn Snapshot, round: u32, id: FileId) -> Result<Vec<u8>, Failure> {
    let mut reader = snapshot.open_file(at(round), id)?;
    let mut content = vec![0; usize::try_from(reader.size()).unwrap()];
    let mut offset = 0;
    while offset < reader.size() {
        let span = reader.span(offset, reader.size().min(offset + 70_000))?;
        assert!(span.end > offset);
        if span.content == Content::Data {
            let range = usize::try_from(offset).unwrap()..usize::try_from(span.end).unwrap();
            reader.read_exact_at(&mut content[range], offset)?;
        }
        offset = span.end;
    }
    reader.check_unchanged()?;
    Ok(content)
}

/// Sets mtime back to what it was: only ctime tells of the change then.
pub(crate) fn put_mtime_back(path: &Path, before: &fs::Metadata) {
    let file = fs::File::open(path).unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
    assert_eq!(fs::metadata(path).unwrap().modified().unwrap(), before.modified().unwrap());
}

#[expect(clippy::disallowed_methods, reason = "a test plays the one who moves files about")]
pub(crate) fn rename(from: impl AsRef<Path>, to: impl AsRef<Path>) -> std::io::Result<()> {
    fs::rename(from, to)
}
