//! Follows the server's redo log into a file of the spool directory, so that the log's wrap-around
//! takes nothing from a clone, however slow its recipient.
//!
//! ```text
//! the log (circular, or many files) --thread--> spool: from the smallest start of all clones on
//! ```
//!
//! Invariants:
//! * Nothing is read beyond what the server had flushed before the read: what lies there may look
//!   like records and change afterwards.
//! * What was read counts only if the server had not come round to it after the read. MariaDB: this
//!   is told by LSN, for the lap's bit is the same every second lap. MySQL: each block says its LSN.
//! * All in the spool has its checksum right. MariaDB: it ends on the end of a mini-transaction, and
//!   each ends as in a log's first lap. MySQL: its last block is written again until it is full.
//! * One follower serves all snapshots. When it has lost the log it starts over as another
//!   generation; what a snapshot took from an earlier one is of no use to it any more.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use rustix::fs::FallocateFlags;
use tonic::Code;

use super::{
    deletions::{DeletedSpaces, Deletion, Deletions},
    flavor::Flavor,
    mysql::consumer,
    redo_log::{Head, RedoLog},
    server::{Server, Session, SqlError},
};

/// Bytes of one read of the log: holds the longest mini-transaction many times.
const READ_BYTES: usize = 8 << 20;

/// Shortest and longest pause between two looks at the log.
const PAUSE_MIN: Duration = Duration::from_millis(2);
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// How often the same bytes are read when they do not parse: a read may meet a write.
const READS_MAX: u32 = 200;

/// Longest wait for the follower to reach what is on the server's disk already.
const REACH_MAX: Duration = Duration::from_secs(60);

/// Follows the log while at least one snapshot needs it.
#[derive(Debug)]
pub(super) struct Follower {
    shared: Arc<Shared>,
    server: Server,
    directory: PathBuf,
    spool_directory: PathBuf,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Most bytes that the spool may hold.
    quota: u64,
}

#[derive(Debug, Default)]
struct State {
    generation: u64,
    running: bool,
    /// Where each snapshot begins, by its number.
    needs: BTreeMap<u64, Need>,
    next_need: u64,
    spool: Option<Arc<RedoSpool>>,
    capacity: u64,
    /// End of what the spool holds.
    end: u64,
    /// What lies before is not in the spool any more.
    dropped_to: u64,
    /// Of the present generation.
    deletions: Deletions,
    /// Why the present generation has ended.
    failure: Option<Failure>,
}

#[derive(Debug)]
struct Need {
    start: u64,
    generation: u64,
    failure: Option<Failure>,
}

/// Redo in a file without a name.
#[derive(Debug)]
pub(super) struct RedoSpool {
    file: File,
    base: u64,
    directory: PathBuf,
}

impl RedoSpool {
    fn create(directory: &Path, base: u64) -> Result<Self, Failure> {
        let file = tempfile::tempfile_in(directory)
            .map_err(|e| Failure::io("create the redo spool in", directory, &e))?;
        Ok(Self { file, base, directory: directory.to_owned() })
    }

    /// One that holds `bytes`.
    #[cfg(test)]
    pub(super) fn holding(directory: &Path, base: u64, bytes: &[u8]) -> Self {
        let spool = Self::create(directory, base).unwrap();
        spool.write(base, bytes).unwrap();
        spool
    }

    fn write(&self, lsn: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all_at(bytes, lsn - self.base).map_err(|e| self.failed(&e))
    }

    /// Reads records of the first lap.
    pub(super) fn read(&self, lsn: u64, buffer: &mut [u8]) -> Result<(), Failure> {
        let offset = lsn.checked_sub(self.base).ok_or_else(|| {
            Failure::bug(format!("redo at {lsn} was asked for, the spool begins at {}", self.base))
        })?;
        self.file.read_exact_at(buffer, offset).map_err(|e| self.failed(&e))
    }

    /// Frees what lies before `lsn`.
    fn drop_before(&self, lsn: u64) {
        let length = lsn.saturating_sub(self.base) & !0xfff;
        if length > 0 {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Where the file system cannot, the bytes stay until the spool goes.
            let _ = rustix::fs::fallocate(&self.file, flags, 0, length);
        }
    }

    fn failed(&self, error: &io::Error) -> Failure {
        Failure::io("use the redo spool in", &self.directory, error)
    }
}

/// A snapshot's hold on the log from its checkpoint on.
#[derive(Debug)]
pub(super) struct Hold {
    shared: Arc<Shared>,
    need: u64,
    /// The log's head, with the checkpoint that recovery begins at.
    pub(super) head: Head,
    /// Bytes that the server's log holds.
    pub(super) capacity: u64,
    spool: Arc<RedoSpool>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.needs.remove(&self.need);
        if let Some(least) = state.least() {
            state.drop_before(least);
        }
        self.shared.changed.notify_all();
    }
}

impl Hold {
    /// Where its recovery begins.
    pub(super) fn checkpoint(&self) -> u64 {
        self.head.checkpoint()
    }

    /// The spool that holds its redo.
    pub(super) fn spool(&self) -> Arc<RedoSpool> {
        Arc::clone(&self.spool)
    }

    /// End of what has been followed; an error once the log was lost.
    pub(super) fn end(&self) -> Result<u64, Failure> {
        let state = self.shared.lock();
        self.check(&state)?;
        Ok(state.end)
    }

    /// Tablespaces that recovery from its checkpoint takes for deleted, as far as the log has been
    /// followed, and up to `end` where that is given; an error once the log was lost.
    pub(super) fn deleted(&self, end: Option<u64>) -> Result<DeletedSpaces, Failure> {
        let state = self.shared.lock();
        self.check(&state)?;
        Ok(state.deletions.between(self.checkpoint(), end.unwrap_or(u64::MAX)))
    }

    /// Whether its redo is lost, so that only pages can close the gap.
    pub(super) fn is_lost(&self) -> bool {
        self.check(&self.shared.lock()).is_err()
    }

    fn check(&self, state: &State) -> Result<(), Failure> {
        let need = state.needs.get(&self.need);
        let need = need.ok_or_else(|| Failure::bug("a hold on the redo log has gone"))?;
        match (&need.failure, &state.failure) {
            (Some(failure), _) => Err(failure.clone()),
            (None, Some(failure)) if need.generation == state.generation => Err(failure.clone()),
            (None, _) if need.generation != state.generation => Err(Failure::new(
                Code::Aborted,
                "REDO_OVERRUN",
                "the redo log that this clone began with was lost; it is followed anew",
            )),
            _ => Ok(()),
        }
    }

    /// Waits until the log has been followed up to `lsn`, which the server has flushed.
    pub(super) fn wait_for(
        &self,
        lsn: u64,
        progress: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let deadline = Instant::now() + REACH_MAX;
        let mut state = self.shared.lock();
        loop {
            self.check(&state)?;
            if state.end >= lsn {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Failure::new(
                    Code::Unavailable,
                    "REDO_STALLED",
                    format!(
                        "the redo log was followed up to LSN {}, LSN {lsn} was not reached in {} s",
                        state.end,
                        REACH_MAX.as_secs()
                    ),
                ));
            }
            self.shared.changed.notify_all();
            let waited = self.shared.changed.wait_timeout(state, PAUSE_MAX);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
            progress()?;
            state = self.shared.lock();
        }
    }
}

impl State {
    /// Where the first of the clones begins that still use this generation.
    fn least(&self) -> Option<u64> {
        let uses = |need: &&Need| need.generation == self.generation && need.failure.is_none();
        self.needs.values().filter(uses).map(|need| need.start).min()
    }

    /// Whether a clone that begins at `lsn` can use what is followed.
    fn serves(&self, lsn: u64) -> bool {
        self.running
            && self.failure.is_none()
            && lsn >= self.dropped_to
            && self.spool.as_ref().is_some_and(|spool| spool.base <= lsn)
            && self.needs.values().any(|need| need.generation == self.generation)
    }

    /// Frees what lies before `lsn`.
    fn drop_before(&mut self, lsn: u64) {
        if let Some(spool) = &self.spool {
            spool.drop_before(lsn);
            self.dropped_to = self.dropped_to.max(lsn);
            self.deletions.drop_before(lsn);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is whole before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Follower {
    /// Nothing is followed yet. `directory` holds the log, the spool goes to `spool_directory` and
    /// holds at most `quota` bytes.
    pub(super) fn new(
        server: Server,
        directory: &Path,
        spool_directory: &Path,
        quota: u64,
    ) -> Self {
        let shared = Shared { state: Mutex::default(), changed: Condvar::new(), quota };
        Self {
            shared: Arc::new(shared),
            server,
            directory: directory.to_owned(),
            spool_directory: spool_directory.to_owned(),
        }
    }

    /// Takes hold of the log from the newest checkpoint on. Pages read from now on carry at least
    /// all changes from before it.
    pub(super) fn hold(&self, flavor: Flavor) -> Result<Hold, Failure> {
        let mut state = self.shared.lock();
        // The newest checkpoint may be newer than what has been followed, and its log may have been
        // resized: a follower that cannot reach it is left, another one starts there.
        let mut log = RedoLog::open(flavor, &self.directory)?;
        let mut head = log.head()?;
        if !state.serves(head.start()) {
            let mut session = self.server.connect()?;
            let is_consumer = match flavor {
                Flavor::MariaDb => false,
                Flavor::MySql => {
                    let is_consumer = consumer::register(&mut session)?;
                    // From here on nothing after this checkpoint goes.
                    log = RedoLog::open(flavor, &self.directory)?;
                    head = log.head()?;
                    is_consumer
                }
            };
            state.generation += 1;
            state.running = true;
            state.failure = None;
            let spool = Arc::new(RedoSpool::create(&self.spool_directory, head.start())?);
            state.spool = Some(Arc::clone(&spool));
            state.capacity = log.capacity();
            state.end = head.start();
            state.dropped_to = head.start();
            state.deletions = Deletions::default();
            let follow = Follow {
                shared: Arc::clone(&self.shared),
                server: self.server.clone(),
                directory: self.directory.clone(),
                generation: state.generation,
                spool,
                position: head.start(),
                log,
                session,
                is_consumer,
                advanced: 0,
            };
            let thread = std::thread::Builder::new().name("redo-follower".to_owned());
            thread.spawn(move || follow.run()).map_err(|e| {
                Failure::new(Code::ResourceExhausted, "NO_THREAD", format!("start a thread: {e}"))
            })?;
        }
        let number = state.next_need;
        state.next_need += 1;
        let generation = state.generation;
        state.needs.insert(number, Need { start: head.start(), generation, failure: None });
        let spool = state.spool.clone().ok_or_else(|| Failure::bug("no redo spool"))?;
        let capacity = state.capacity;
        drop(state);
        let shared = Arc::clone(&self.shared);
        Ok(Hold { shared, need: number, head, capacity, spool })
    }
}

/// The follower's thread.
struct Follow {
    shared: Arc<Shared>,
    server: Server,
    directory: PathBuf,
    generation: u64,
    spool: Arc<RedoSpool>,
    position: u64,
    log: RedoLog,
    session: Session,
    /// Whether the server keeps for us what was not read yet.
    is_consumer: bool,
    /// How far it was told that we are.
    advanced: u64,
}

impl Follow {
    fn run(mut self) {
        let mut buffer = vec![0; READ_BYTES];
        let mut misreads = 0;
        let mut pause = PAUSE_MIN;
        loop {
            {
                let mut state = self.shared.lock();
                if state.generation != self.generation {
                    return;
                }
                if !state.needs.values().any(|n| n.generation == self.generation) {
                    state.running = false;
                    return;
                }
            }
            let begun = Instant::now();
            let before = self.position;
            let step = self.step(&mut buffer, &mut misreads);
            let mut state = self.shared.lock();
            if state.generation != self.generation {
                return;
            }
            match step {
                Ok(deletions) => {
                    state.end = self.position;
                    state.deletions.extend(deletions);
                }
                Err(failure) => {
                    tracing::warn!(lsn = self.position, error = %failure, "the redo log was lost");
                    state.failure = Some(failure);
                    state.running = false;
                }
            }
            self.keep_quota(&mut state);
            self.shared.changed.notify_all();
            if state.failure.is_some() {
                return;
            }
            let read = self.position - before;
            pause = next_pause(pause, read, self.log.capacity(), begun.elapsed());
            if read < READ_BYTES as u64 {
                let waited = self.shared.changed.wait_timeout(state, pause);
                drop(waited.unwrap_or_else(PoisonError::into_inner));
            }
        }
    }

    /// Follows the log up to what the server has flushed; what it deletes there.
    fn step(&mut self, buffer: &mut [u8], misreads: &mut u32) -> Result<Vec<Deletion>, Failure> {
        let flushed = self.lsn()?.flushed;
        self.log.refresh(&self.directory, self.position)?;
        self.shared.lock().capacity = self.log.capacity();
        if flushed <= self.position {
            self.advance_consumer()?;
            return Ok(Vec::new());
        }
        let read = self.log.read(self.position, flushed, buffer, &self.directory)?;
        let buffer = &mut buffer[..read];
        // MySQL's blocks say themselves whether they were used again.
        if !self.is_mysql() {
            let current = self.lsn()?.current;
            self.log.check_overrun(self.position, current)?;
        }
        let taken = self.log.take(self.position, flushed, buffer)?;
        let start = self.log.read_start(self.position);
        self.spool.write(start, &buffer[..taken.bytes])?;
        let is_on = taken.position > self.position;
        self.position = taken.position;
        match taken.misread {
            // A read may meet a write, or a resize: look again, a bounded number of times.
            Some(why) if !is_on => {
                *misreads += 1;
                if *misreads >= READS_MAX {
                    return Err(Failure::new(
                        Code::DataLoss,
                        "REDO_UNREADABLE",
                        format!(
                            "the redo log at LSN {}, flushed up to {flushed}, does not parse: {why}",
                            self.position
                        ),
                    ));
                }
            }
            _ => *misreads = 0,
        }
        self.advance_consumer()?;
        Ok(taken.deletions)
    }

    /// Lets the server use again what was read.
    fn advance_consumer(&mut self) -> Result<(), Failure> {
        if !self.is_consumer {
            return Ok(());
        }
        let lsn = self.log.read_start(self.position);
        if lsn == self.advanced {
            return Ok(());
        }
        self.advanced = lsn;
        match consumer::advance(&mut self.session, lsn) {
            Ok(()) => Ok(()),
            // The registration has gone with it; `lsn` connects anew.
            Err(SqlError::Lost(_)) => {
                self.is_consumer = false;
                Ok(())
            }
            Err(error) => Err(error.failure("advance the redo log consumer")),
        }
    }

    /// LSNs now; a lost connection is made anew once, for a server may drop an idle one.
    fn lsn(&mut self) -> Result<super::server::Lsn, Failure> {
        let lsn = match self.session.lsn() {
            Err(SqlError::Lost(_)) => {
                self.session = self.server.connect()?;
                if self.is_mysql() {
                    self.is_consumer = consumer::register(&mut self.session)?;
                }
                self.session.lsn()
            }
            other => other,
        };
        let lsn = lsn.map_err(|e| e.failure("ask for the log sequence number"))?;
        if lsn.current < self.position {
            let text =
                format!("the server is at LSN {}, {} was followed", lsn.current, self.position);
            return Err(Failure::new(Code::Aborted, "REDO_OVERRUN", text));
        }
        Ok(lsn)
    }

    fn is_mysql(&self) -> bool {
        matches!(self.log, RedoLog::MySql(_))
    }

    /// A snapshot over the quota fails alone: the one that keeps most.
    fn keep_quota(&self, state: &mut State) {
        let (end, quota) = (state.end, self.shared.quota);
        let mut freed = false;
        for need in state.needs.values_mut() {
            let held = end.saturating_sub(need.start);
            if need.generation == self.generation && need.failure.is_none() && held > quota {
                need.failure = Some(Failure::new(
                    Code::ResourceExhausted,
                    "REDO_SPOOL_FULL",
                    format!(
                        "{held} bytes of redo are to be kept for this clone, --spool-quota allows \
                             {quota}"
                    ),
                ));
                freed = true;
            }
        }
        if freed {
            state.drop_before(state.least().unwrap_or(end));
        }
    }
}

/// A pause in which at most a sixteenth of the log is written.
fn next_pause(last: Duration, read: u64, capacity: u64, took: Duration) -> Duration {
    if read == 0 {
        return (last * 2).clamp(PAUSE_MIN, PAUSE_MAX);
    }
    let per_second = u128::from(read) * 1_000_000 / (took + last).as_micros().max(1);
    let micros = u128::from(capacity / 16) * 1_000_000 / per_second.max(1);
    Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX)).clamp(PAUSE_MIN, PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards R5: what was freed for want of room reads as zeros. With `dropped_to` not asked, the
    /// next clone would join, and end in REDO_INVALID after all of its copy.
    #[test]
    fn a_spool_that_was_freed_serves_only_those_who_begin_later() {
        let directory = tempfile::tempdir().unwrap();
        let spool = RedoSpool::create(directory.path(), 100).unwrap();
        let need = |failure| Need { start: 100, generation: 1, failure };
        let mut state = State {
            generation: 1,
            running: true,
            spool: Some(Arc::new(spool)),
            end: 5000,
            needs: BTreeMap::from([(0, need(None))]),
            ..State::default()
        };
        assert!(!state.serves(99) && state.serves(100) && state.serves(4000));
        let full = Failure::new(Code::ResourceExhausted, "REDO_SPOOL_FULL", "full");
        state.needs.insert(0, need(Some(full)));
        assert_eq!(state.least(), None);
        state.drop_before(5000);
        assert!(!state.serves(4000) && state.serves(5000));
        state.needs.insert(1, Need { start: 40, generation: 0, failure: None });
        assert_eq!(state.least(), None, "one of another generation reads another spool");
        state.failure = Some(Failure::bug("lost"));
        assert!(!state.serves(5000));
    }
}
