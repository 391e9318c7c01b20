//! Files that change until commits are blocked: Aria's log, statistics and log tables.
//!
//! They are read while only DDL is blocked, so that little is left to read once commits are: what
//! has changed since, and of files that only grow, their end.
//!
//! Order, as Aria's recovery wants it: control file, then data, then logs; and the control file
//! must be the same afterwards, for a checkpoint in between would make it newer than the rest.

use std::{fs::File, os::unix::fs::FileExt as _};

use marcot_common::{entry::Attributes, failure::Failure, path::RelativePath};
use tonic::Code;

use super::{
    classify::is_aria_log,
    stash::{Stash, Stashed},
    tablespace::open_any,
};
use crate::files::{
    tree::{Identity, Tree},
    walk::attributes_of_file,
};

/// Room that a growing file has in the stash beyond its first size.
const ROOM_BYTES: u64 = 16 << 20;

/// Bytes before a growing file's old end that are read again: its last pages may have been
/// written again. Aria writes its log by buffers of 1 MiB (TRANSLOG_WRITE_BUFFER).
const END_BYTES: u64 = 2 << 20;

/// Bytes at a growing file's start that are read again: an Aria log has its header there.
const START_BYTES: u64 = 64 << 10;

/// Bytes of one read.
const READ_BYTES: usize = 1 << 20;

/// Most looks at the control file: Aria's checkpoint comes every 30 s.
const CONTROL_READS_MAX: u32 = 5;

const CONTROL: &[u8] = b"aria_log_control";

/// A file that was read late.
#[derive(Debug)]
pub(super) struct LateFile {
    pub(super) path: RelativePath,
    pub(super) attributes: Attributes,
    pub(super) stashed: Stashed,
    identity: Identity,
    room: u64,
}

/// All of them.
#[derive(Debug)]
pub(super) struct LateFiles {
    files: Vec<LateFile>,
}

impl LateFiles {
    /// Reads all of `paths`.
    pub(super) fn read(
        tree: &Tree,
        mut paths: Vec<RelativePath>,
        stash: &mut Stash,
    ) -> Result<Self, Failure> {
        paths.sort_by_key(|path| (rank(path), path.clone()));
        let mut files = Vec::with_capacity(paths.len());
        for path in paths {
            files.extend(read_whole(tree, &path, stash)?);
        }
        Ok(Self { files })
    }

    /// Reads again what has changed. Commits are blocked.
    pub(super) fn read_again(&mut self, tree: &Tree, stash: &mut Stash) -> Result<(), Failure> {
        for _ in 0..CONTROL_READS_MAX {
            for file in &mut self.files {
                file.read_again(tree, stash)?;
            }
            self.find_new_logs(tree, stash)?;
            let is_same =
                self.files.iter().filter(|f| f.path.as_bytes() == CONTROL).all(|control| {
                    open_any(tree, &control.path)
                        .and_then(|file| identity(&file, tree, &control.path))
                        .is_ok_and(|now| now.is_same_state(&control.identity))
                });
            if is_same {
                return Ok(());
            }
        }
        Err(Failure::new(
            Code::Aborted,
            "FILE_CHANGED",
            format!("aria_log_control has changed in each of {CONTROL_READS_MAX} looks"),
        ))
    }

    /// Aria begins another log file when the last one is full.
    fn find_new_logs(&mut self, tree: &Tree, stash: &mut Stash) -> Result<(), Failure> {
        loop {
            let last =
                self.files.iter().filter(|f| is_aria_log(f.path.as_bytes())).filter_map(|f| {
                    String::from_utf8_lossy(&f.path.as_bytes()["aria_log.".len()..])
                        .parse::<u64>()
                        .ok()
                });
            let Some(next) = last.max().map(|n| format!("aria_log.{:08}", n + 1)) else {
                return Ok(());
            };
            let Ok(path) = RelativePath::new(next.as_bytes()) else {
                return Ok(());
            };
            match read_whole(tree, &path, stash)? {
                Some(file) => self.files.push(file),
                None => return Ok(()),
            }
        }
    }

    /// The files, in no order.
    pub(super) fn into_files(self) -> impl Iterator<Item = LateFile> {
        self.files.into_iter()
    }
}

impl LateFile {
    fn read_again(&mut self, tree: &Tree, stash: &mut Stash) -> Result<(), Failure> {
        let file = match open_any(tree, &self.path) {
            Ok(file) => file,
            // Aria has purged a log that it needs no more; so does the clone not.
            Err(failure) if failure.reason == "FILE_VANISHED" => return Ok(()),
            Err(failure) => return Err(failure),
        };
        let now = identity(&file, tree, &self.path)?;
        if now.is_same_state(&self.identity) {
            return Ok(());
        }
        let old = self.identity.size;
        if grows(&self.path) && now.size >= old && now.size <= old + self.room {
            let start = old.saturating_sub(END_BYTES);
            copy(&file, tree, &self.path, stash, &self.stashed, start, now.size)?;
            copy(&file, tree, &self.path, stash, &self.stashed, 0, START_BYTES.min(now.size))?;
            self.stashed.length = now.size;
        } else {
            self.stashed = stash.reserve(now.size)?;
            copy(&file, tree, &self.path, stash, &self.stashed, 0, now.size)?;
        }
        self.identity = now;
        Ok(())
    }
}

/// Reads a file; `None` when it has gone.
fn read_whole(
    tree: &Tree,
    path: &RelativePath,
    stash: &mut Stash,
) -> Result<Option<LateFile>, Failure> {
    let file = match open_any(tree, path) {
        Ok(file) => file,
        Err(failure) if failure.reason == "FILE_VANISHED" => return Ok(None),
        Err(failure) => return Err(failure),
    };
    // First what it looks like, then its bytes: a later change shows.
    let identity = identity(&file, tree, path)?;
    let attributes = attributes_of_file(&file, &tree.shown(Some(path)))?;
    let room = if grows(path) { ROOM_BYTES } else { 0 };
    let mut stashed = stash.reserve(identity.size + room)?;
    stashed.length = identity.size;
    copy(&file, tree, path, stash, &stashed, 0, identity.size)?;
    Ok(Some(LateFile { path: path.clone(), attributes, stashed, identity, room }))
}

fn identity(file: &File, tree: &Tree, path: &RelativePath) -> Result<Identity, Failure> {
    let stat = rustix::fs::fstat(file)
        .map_err(|e| Failure::io("read attributes of", &tree.shown(Some(path)), &e.into()))?;
    Ok(Identity::of(&stat))
}

fn copy(
    file: &File,
    tree: &Tree,
    path: &RelativePath,
    stash: &Stash,
    stashed: &Stashed,
    start: u64,
    end: u64,
) -> Result<(), Failure> {
    let mut buffer = vec![0; READ_BYTES];
    let mut at = start;
    while at < end {
        let length = usize::try_from(end - at).unwrap_or(READ_BYTES).min(READ_BYTES);
        let read = file.read_at(&mut buffer[..length], at);
        let read = read.map_err(|e| Failure::io("read", &tree.shown(Some(path)), &e))?;
        if read == 0 {
            return Err(crate::files::tree::changed(path));
        }
        stash.write_at(stashed, at, &buffer[..read])?;
        at += read as u64;
    }
    Ok(())
}

/// Whether a file is only ever written at its end.
fn grows(path: &RelativePath) -> bool {
    is_aria_log(path.as_bytes()) || path.as_bytes().ends_with(b".CSV")
}

fn rank(path: &RelativePath) -> u8 {
    match path.as_bytes() {
        CONTROL => 0,
        bytes if is_aria_log(bytes) => 2,
        _ => 1,
    }
}
