//! Files that change until commits are blocked: Aria's log, statistics and log tables.
//!
//! They are read before any lock is taken, and again while only DDL is blocked, so that little is
//! left to read once commits are: what has changed since, and of files that only grow, their end.
//!
//! Order, as Aria's recovery wants it: control file, then data, then logs; and the control file
//! must be the same afterwards, for a checkpoint in between would make it newer than the rest.

use std::{fs::File, ops::Range, os::unix::fs::FileExt as _};

use marcot_common::{entry::Attributes, failure::Failure, path::RelativePath};
use tonic::Code;

use super::{
    classify::is_aria_log,
    stash::{Stash, Stashed},
    tablespace::open_any,
};
use crate::files::{
    clock,
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

/// Told of the work now and then; an error from it stops it.
pub(super) type Told<'a> = &'a mut dyn FnMut() -> Result<(), Failure>;

/// A file that was read late.
#[derive(Debug, Clone)]
pub(super) struct LateFile {
    pub(super) path: RelativePath,
    pub(super) attributes: Attributes,
    pub(super) stashed: Stashed,
    identity: Identity,
    /// Whether any write since the read has another ctime.
    is_settled: bool,
    /// Bytes that its copy has room for.
    capacity: u64,
}

/// All of them, and where their bytes are.
#[derive(Debug)]
pub(super) struct LateFiles {
    files: Vec<LateFile>,
    stash: Stash,
}

/// Fails when there is more of `paths` than may be kept.
pub(super) fn check_size(
    tree: &Tree,
    paths: &[RelativePath],
    bytes_max: u64,
) -> Result<(), Failure> {
    let mut bytes = 0;
    let mut largest = (0, None);
    for path in paths {
        let Ok(file) = open_any(tree, path) else { continue };
        let size = identity(&file, tree, path)?.size;
        bytes += size;
        if size >= largest.0 {
            largest = (size, Some(path));
        }
    }
    let (size, Some(path)) = largest else { return Ok(()) };
    if bytes <= bytes_max {
        return Ok(());
    }
    Err(Failure::precondition(
        "LOCKED_SET_TOO_LARGE",
        format!(
            "log tables, statistics and Aria's log have {bytes} bytes ({path} has {size}), which are \
             kept in the spool as of the clone's point: --spool-quota allows {bytes_max}; truncate \
             the log table, or raise it"
        ),
    )
    .with("bytes", bytes))
}

impl LateFiles {
    /// Reads all of `paths`; no lock is held.
    pub(super) fn read(
        tree: &Tree,
        paths: Vec<RelativePath>,
        stash: Stash,
        told: Told<'_>,
    ) -> Result<Self, Failure> {
        let mut late = Self { files: Vec::with_capacity(paths.len()), stash };
        late.add(tree, paths, told)?;
        Ok(late)
    }

    /// Reads those of `paths` that were not read.
    pub(super) fn add(
        &mut self,
        tree: &Tree,
        mut paths: Vec<RelativePath>,
        told: Told<'_>,
    ) -> Result<(), Failure> {
        paths.retain(|path| self.files.iter().all(|file| file.path != *path));
        paths.sort_by_key(|path| (rank(path), path.clone()));
        for path in paths {
            let read = read_whole(tree, &path, &mut self.stash, told)?;
            self.files.extend(read);
        }
        Ok(())
    }

    /// Reads again what has changed; those that are not there any more go.
    pub(super) fn read_again(&mut self, tree: &Tree, told: Told<'_>) -> Result<(), Failure> {
        for _ in 0..CONTROL_READS_MAX {
            // In their order: the control file first, the logs last.
            self.files.sort_by_key(|file| (rank(&file.path), file.path.clone()));
            let mut kept = Vec::with_capacity(self.files.len());
            for mut file in std::mem::take(&mut self.files) {
                if file.read_again(tree, &mut self.stash, told)? {
                    kept.push(file);
                }
            }
            self.files = kept;
            self.find_new_logs(tree, told)?;
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
    fn find_new_logs(&mut self, tree: &Tree, told: Told<'_>) -> Result<(), Failure> {
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
            match read_whole(tree, &path, &mut self.stash, told)? {
                Some(file) => self.files.push(file),
                None => return Ok(()),
            }
        }
    }

    /// The files, in no order.
    pub(super) fn files(&self) -> impl Iterator<Item = LateFile> {
        self.files.iter().cloned()
    }

    /// Bytes that they have, without the room for more.
    pub(super) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.stashed.length).sum()
    }
}

impl LateFile {
    /// Whether it is still there.
    fn read_again(
        &mut self,
        tree: &Tree,
        stash: &mut Stash,
        told: Told<'_>,
    ) -> Result<bool, Failure> {
        let file = match open_any(tree, &self.path) {
            Ok(file) => file,
            // Aria has purged a log that it needs no more; so does the clone not.
            Err(failure) if failure.reason == "FILE_VANISHED" => return Ok(false),
            Err(failure) => return Err(failure),
        };
        let now = identity(&file, tree, &self.path)?;
        // A write in the tick in which it was read has left no trace.
        if self.is_settled && now.is_same_state(&self.identity) {
            return Ok(true);
        }
        let is_settled = clock::is_past(now.change_time);
        let old = self.identity.size;
        let is_longer = grows(&self.path) && (old..=self.capacity).contains(&now.size);
        if is_longer && self.begins_alike(&file, tree)? {
            let start = old.saturating_sub(END_BYTES);
            copy(&file, tree, &self.path, stash, &self.stashed, start..now.size, told)?;
            let head = START_BYTES.min(now.size);
            copy(&file, tree, &self.path, stash, &self.stashed, 0..head, told)?;
            self.stashed.length = now.size;
        } else {
            (self.stashed, self.capacity) = reserve(stash, &self.path, now.size)?;
            copy(&file, tree, &self.path, stash, &self.stashed, 0..now.size, told)?;
        }
        (self.identity, self.is_settled) = (now, is_settled);
        Ok(true)
    }

    /// Whether a log table was only appended to: one that was emptied and filled again has the same
    /// inode. Aria's logs are never emptied, and their head changes.
    fn begins_alike(&self, file: &File, tree: &Tree) -> Result<bool, Failure> {
        if is_aria_log(self.path.as_bytes()) {
            return Ok(true);
        }
        let length = usize::try_from(self.identity.size.min(START_BYTES)).unwrap_or(0);
        let (mut now, mut then) = (vec![0; length], vec![0; length]);
        let read = file.read_exact_at(&mut now, 0);
        read.map_err(|e| Failure::io("read", &tree.shown(Some(&self.path)), &e))?;
        self.stashed.read(&mut then, 0)?;
        Ok(now == then)
    }
}

/// Reads a file; `None` when it has gone.
fn read_whole(
    tree: &Tree,
    path: &RelativePath,
    stash: &mut Stash,
    told: Told<'_>,
) -> Result<Option<LateFile>, Failure> {
    let file = match open_any(tree, path) {
        Ok(file) => file,
        Err(failure) if failure.reason == "FILE_VANISHED" => return Ok(None),
        Err(failure) => return Err(failure),
    };
    // First what it looks like, then its bytes: a later change shows.
    let identity = identity(&file, tree, path)?;
    let is_settled = clock::is_past(identity.change_time);
    let attributes = attributes_of_file(&file, &tree.shown(Some(path)))?;
    let (stashed, capacity) = reserve(stash, path, identity.size)?;
    copy(&file, tree, path, stash, &stashed, 0..identity.size, told)?;
    Ok(Some(LateFile { path: path.clone(), attributes, stashed, identity, is_settled, capacity }))
}

/// Room for a file, and how much it is: one that grows has some more.
fn reserve(stash: &mut Stash, path: &RelativePath, size: u64) -> Result<(Stashed, u64), Failure> {
    let more = if grows(path) { ROOM_BYTES.min(stash.left().saturating_sub(size) / 4) } else { 0 };
    let mut stashed = stash.reserve(size + more)?;
    stashed.length = size;
    Ok((stashed, size + more))
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
    range: Range<u64>,
    told: Told<'_>,
) -> Result<(), Failure> {
    let mut buffer = vec![0; READ_BYTES];
    let (mut at, end) = (range.start, range.end);
    while at < end {
        told()?;
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const LOG: &str = "mysql/general_log.CSV";
    const OTHER: &str = "mysql/slow_log.CSV";
    const MIB: usize = 1 << 20;

    /// A tree with two log tables, and what was read of them.
    struct Site {
        directory: tempfile::TempDir,
        tree: Tree,
        late: LateFiles,
    }

    impl Site {
        fn new(log_bytes: usize) -> Self {
            let directory = tempfile::tempdir().unwrap();
            std::fs::create_dir(directory.path().join("mysql")).unwrap();
            std::fs::write(directory.path().join(LOG), rows(log_bytes, 1)).unwrap();
            std::fs::write(directory.path().join(OTHER), rows(100, 2)).unwrap();
            clock::settle(0);
            let tree = Tree::open(directory.path()).unwrap();
            let paths = [LOG, OTHER].map(|p| RelativePath::new(p.as_bytes()).unwrap()).to_vec();
            let stash = Stash::create(directory.path(), 1 << 30).unwrap();
            let late = LateFiles::read(&tree, paths, stash, &mut || Ok(())).unwrap();
            Self { directory, tree, late }
        }

        fn append(&self, bytes: &[u8]) {
            let path = self.directory.path().join(LOG);
            let mut file = File::options().append(true).open(path).unwrap();
            file.write_all(bytes).unwrap();
            clock::settle(0);
        }

        /// How many pieces were read.
        fn read_again(&mut self) -> usize {
            let mut pieces = 0;
            let mut told = || {
                pieces += 1;
                Ok(())
            };
            self.late.read_again(&self.tree, &mut told).unwrap();
            pieces
        }

        fn assert_right(&self) {
            for file in self.late.files() {
                let right = std::fs::read(self.directory.path().join(file.path.as_path())).unwrap();
                let mut copy = vec![0; usize::try_from(file.stashed.length).unwrap()];
                file.stashed.read(&mut copy, 0).unwrap();
                assert!(copy == right, "{}", file.path);
            }
        }
    }

    fn rows(bytes: usize, seed: u8) -> Vec<u8> {
        (0..bytes).map(|i| (i / 7 % 251) as u8 ^ seed).collect()
    }

    /// Guards the time under the locks: of a log table that grows its end is read, not all of it.
    #[test]
    fn of_a_file_that_grows_its_end_is_read_again() {
        let mut site = Site::new(8 * MIB);
        assert_eq!(site.read_again(), 0, "nothing has changed");
        site.append(&rows(MIB, 3));
        let pieces = site.read_again();
        assert!((1..=4).contains(&pieces), "{pieces} pieces");
        site.assert_right();
    }

    /// Guards a copy's room: what grows beyond it, by little and little, gets another place. Without
    /// the bound it would be written over the next file's copy.
    #[test]
    fn a_file_that_grows_beyond_its_room_is_read_anew() {
        let mut site = Site::new(MIB);
        for seed in 0..4 {
            site.append(&rows(7 * MIB, seed));
            site.read_again();
            site.assert_right();
        }
    }

    /// Guards the head: a log table that was emptied and has grown again has the same inode.
    #[test]
    fn a_log_table_that_was_emptied_and_filled_is_read_anew() {
        let mut site = Site::new(4 * MIB);
        let path = site.directory.path().join(LOG);
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(0).unwrap();
        site.append(&rows(5 * MIB, 9));
        site.read_again();
        site.assert_right();
    }

    /// Guards files that were read in the tick of their last write, which a later one in it does not
    /// change: told apart by times alone, that write is lost.
    #[test]
    fn a_file_read_in_the_tick_of_its_last_write_is_read_again() {
        for (is_settled, is_read) in [(true, false), (false, true)] {
            let mut site = Site::new(MIB);
            let path = site.directory.path().join(LOG);
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(&[7; 100], MIB as u64 - 100).unwrap();
            clock::settle(0);
            // As if that write had been in the same tick.
            let now = identity(&file, &site.tree, &RelativePath::new(LOG.as_bytes()).unwrap());
            let log = &mut site.late.files[0];
            assert_eq!(log.path.as_bytes(), LOG.as_bytes());
            (log.identity, log.is_settled) = (now.unwrap(), is_settled);
            assert_eq!(site.read_again() > 0, is_read);
        }
    }

    /// Guards R2's violation: what does not fit is named before a byte moves.
    #[test]
    fn log_tables_that_do_not_fit_are_named() {
        let site = Site::new(MIB);
        let paths = [LOG, OTHER].map(|p| RelativePath::new(p.as_bytes()).unwrap());
        let size = MIB as u64 + 100;
        assert!(check_size(&site.tree, &paths, size).is_ok());
        let failure = check_size(&site.tree, &paths, size - 1).unwrap_err();
        assert_eq!(failure.reason, "LOCKED_SET_TOO_LARGE");
        for text in [size.to_string(), (size - 1).to_string(), LOG.to_owned()] {
            assert!(failure.message.contains(&text), "{failure}");
        }
    }
}
