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
//! * A clone whose point is fixed keeps its redo up to there, whatever becomes of the log and of
//!   other clones. What was freed is never read.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use tonic::Code;

use super::{
    deletions::{DeletedSpaces, Deletion, Deletions},
    flavor::Flavor,
    mysql::consumer::Consumer,
    redo_log::{Head, RedoLog},
    redo_spool::RedoSpool,
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
    /// What comes after it is not needed.
    point: Option<u64>,
    generation: u64,
    /// How far its generation was followed, once there is another one.
    followed: Option<u64>,
    failure: Option<Failure>,
}

impl Need {
    fn new(start: u64, generation: u64) -> Self {
        Self { start, point: None, generation, followed: None, failure: None }
    }

    /// Whether it needs all that this generation still follows.
    fn goes_on(&self, generation: u64) -> bool {
        self.generation == generation && self.failure.is_none() && self.point.is_none()
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
        state.free();
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

    /// End of what has been followed of its redo, an error once the log was lost. Its checkpoint may
    /// be newer than what an earlier clone's follower has come to: there is none of it then.
    pub(super) fn end(&self) -> Result<u64, Failure> {
        let state = self.shared.lock();
        self.check(&state)?;
        Ok(state.end.max(self.checkpoint()))
    }

    /// How far its log was followed, be it lost or not: the server had flushed all of that.
    pub(super) fn followed(&self) -> u64 {
        let state = self.shared.lock();
        let followed = state.needs.get(&self.need).and_then(|need| need.followed);
        followed.unwrap_or(state.end)
    }

    /// What it is given from now on ends at `lsn`, which has been followed: that stays, whatever
    /// becomes of the log.
    pub(super) fn fix(&self, lsn: u64) -> Result<(), Failure> {
        let mut state = self.shared.lock();
        self.check(&state)?;
        if state.end < lsn {
            return Err(Failure::bug(format!("{lsn} is fixed, {} was followed", state.end)));
        }
        if let Some(need) = state.needs.get_mut(&self.need) {
            need.point = Some(lsn);
        }
        state.free();
        self.shared.changed.notify_all();
        Ok(())
    }

    /// An error once redo of it may have been freed.
    pub(super) fn check_kept(&self) -> Result<(), Failure> {
        let state = self.shared.lock();
        let need = state.needs.get(&self.need);
        need.and_then(|need| need.failure.clone()).map_or(Ok(()), Err)
    }

    /// Whether the server is MariaDB or MySQL.
    pub(super) fn flavor(&self) -> Flavor {
        match self.head {
            Head::MariaDb { .. } => Flavor::MariaDb,
            Head::MySql { .. } => Flavor::MySql,
        }
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
            (None, _) if need.point.is_some() => Ok(()),
            (None, Some(failure)) if need.generation == state.generation => Err(failure.clone()),
            (None, _) if need.generation != state.generation => Err(Failure::new(
                Code::Aborted,
                "REDO_OVERRUN",
                "the redo log that this clone began with was lost; it is followed anew",
            )),
            _ => Ok(()),
        }
    }

    /// Waits until the log has been followed up to `lsn`, which the server has written, and flushes within
    /// `late`.
    pub(super) fn wait_for(
        &self,
        lsn: u64,
        late: Duration,
        progress: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let limit = REACH_MAX + late;
        let deadline = Instant::now() + limit;
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
                        "the redo log was followed up to LSN {}, LSN {lsn} was not reached in {} s; \
                         the disk that the server writes it to may stand still",
                        state.end,
                        limit.as_secs()
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
    /// Where the first of the clones begins that go on with this generation.
    fn least(&self) -> Option<u64> {
        let go_on = self.needs.values().filter(|need| need.goes_on(self.generation));
        go_on.map(|need| need.start).min()
    }

    /// Whether a clone that begins at `lsn` can use what is followed.
    fn serves(&self, lsn: u64) -> bool {
        self.running
            && self.failure.is_none()
            && lsn >= self.dropped_to
            && self.spool.as_ref().is_some_and(|spool| spool.base() <= lsn)
            && self.least().is_some()
    }

    /// Another generation begins: how far the last one came stays with its clones.
    fn leave_generation(&mut self) {
        for need in self.needs.values_mut() {
            need.followed.get_or_insert(self.end);
        }
        self.generation += 1;
    }

    /// Frees what lies before all clones that go on; of it, those whose point is fixed keep what
    /// they will read.
    fn free(&mut self) {
        let Some(spool) = &self.spool else { return };
        let until = self.least().unwrap_or(self.end);
        let is_fixed = |need: &&Need| need.generation == self.generation && need.failure.is_none();
        let fixed = self.needs.values().filter(is_fixed);
        let mut kept: Vec<(u64, u64)> =
            fixed.filter_map(|need| Some((need.start, need.point?))).collect();
        kept.sort_unstable();
        let mut from = spool.base();
        for (start, point) in kept {
            spool.free(from, start.min(until));
            from = from.max(point);
        }
        spool.free(from, until);
        self.dropped_to = self.dropped_to.max(until);
        self.deletions.drop_before(until);
    }

    /// A snapshot over the quota fails alone: the one that keeps most.
    fn keep_quota(&mut self, quota: u64) {
        let (generation, end) = (self.generation, self.end);
        let mut is_over = false;
        for need in self.needs.values_mut().filter(|need| need.goes_on(generation)) {
            let held = end.saturating_sub(need.start);
            if held > quota {
                need.failure = Some(Failure::new(
                    Code::ResourceExhausted,
                    "REDO_SPOOL_FULL",
                    format!(
                        "{held} bytes of redo are to be kept for this clone, --spool-quota allows \
                         {quota}"
                    ),
                ));
                is_over = true;
            }
        }
        if is_over {
            self.free();
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
            let consumer = match flavor {
                Flavor::MariaDb => None,
                Flavor::MySql => {
                    let consumer = Consumer::register(&mut session)?;
                    // From here on nothing after this checkpoint goes.
                    log = RedoLog::open(flavor, &self.directory)?;
                    head = log.head()?;
                    Some(consumer)
                }
            };
            state.leave_generation();
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
                consumer,
            };
            let thread = std::thread::Builder::new().name("redo-follower".to_owned());
            thread.spawn(move || follow.run()).map_err(|e| {
                Failure::new(Code::ResourceExhausted, "NO_THREAD", format!("start a thread: {e}"))
            })?;
        }
        let number = state.next_need;
        state.next_need += 1;
        let generation = state.generation;
        let need = Need::new(head.start(), generation);
        state.needs.insert(number, need);
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
    /// MySQL: whether the server keeps for us what was not read yet.
    consumer: Option<Consumer>,
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
                // Those over the quota are not served by what comes, nor are those whose point is
                // fixed: it would fill the spool for nobody.
                if state.least().is_none() {
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
            state.keep_quota(self.shared.quota);
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
        let lsn = self.log.read_start(self.position);
        match &mut self.consumer {
            Some(consumer) => consumer.advance(&mut self.session, lsn),
            None => Ok(()),
        }
    }

    /// LSNs now; a lost connection is made anew once, for a server may drop an idle one.
    fn lsn(&mut self) -> Result<super::server::Lsn, Failure> {
        let lsn = match self.session.lsn() {
            Err(SqlError::Lost(_)) => {
                self.session = self.server.connect()?;
                if let Some(consumer) = &mut self.consumer {
                    consumer.connected(&mut self.session)?;
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
    use crate::innodb::{
        mysql::redo::{HEADER_BYTES, Header},
        redo_file::RedoFile,
        redo_spool::FREED_BYTES,
    };

    /// Guards R5: what was freed for want of room reads as zeros. With `dropped_to` not asked, the
    /// next clone would join, and end in REDO_INVALID after all of its copy.
    #[test]
    fn a_spool_that_was_freed_serves_only_those_who_begin_later() {
        let directory = tempfile::tempdir().unwrap();
        let spool = RedoSpool::create(directory.path(), 100).unwrap();
        let need = |failure| Need { failure, ..Need::new(100, 1) };
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
        state.free();
        state.needs.insert(1, need(None));
        assert!(!state.serves(4000) && state.serves(5000));
        let earlier = Need { generation: 0, start: 40, ..need(None) };
        state.needs = BTreeMap::from([(1, earlier)]);
        assert_eq!(state.least(), None, "one of another generation reads another spool");
        state.needs.insert(2, need(None));
        state.failure = Some(Failure::bug("lost"));
        assert!(!state.serves(5000));
    }

    /// A block of the spool, and where each begins.
    const BLOCK: u64 = FREED_BYTES;
    const BASE: u64 = 1000;

    fn at(block: u64) -> u64 {
        BASE + block * BLOCK
    }

    /// The head of any log.
    fn header() -> Header {
        let mut bytes = [0; HEADER_BYTES];
        bytes[3] = 6;
        bytes[14] = 2;
        let crc = crc32c::crc32c(&bytes[..508]);
        bytes[508..512].copy_from_slice(&crc.to_be_bytes());
        Header::parse(&bytes).unwrap()
    }

    /// A log of 16 blocks that was followed to its end, and holds that begin at those blocks.
    fn followed<const N: usize>(starts: [u64; N]) -> (tempfile::TempDir, [Hold; N]) {
        let directory = tempfile::tempdir().unwrap();
        let bytes = vec![7; usize::try_from(16 * BLOCK).unwrap()];
        let spool = Arc::new(RedoSpool::holding(directory.path(), BASE, &bytes));
        let need = |start| Need::new(at(start), 1);
        let state = State {
            generation: 1,
            running: true,
            spool: Some(Arc::clone(&spool)),
            end: at(16),
            needs: (0..).zip(starts.map(need)).collect(),
            ..State::default()
        };
        let shared = Shared { state: Mutex::new(state), changed: Condvar::new(), quota: 0 };
        let shared = Arc::new(shared);
        let mut numbers = 0..;
        let holds = starts.map(|start| Hold {
            shared: Arc::clone(&shared),
            need: numbers.next().unwrap(),
            head: Head::MySql { header: Box::new(header()), checkpoint: at(start) },
            capacity: 0,
            spool: Arc::clone(&spool),
        });
        (directory, holds)
    }

    /// Which blocks of a spool can still be read.
    fn readable(spool: &RedoSpool) -> Vec<u64> {
        let mut block = [0; FREED_BYTES as usize];
        let is_readable = |n: &u64| match spool.read(at(*n), &mut block) {
            Ok(()) => {
                assert!(block.iter().all(|&b| b == 7), "block {n} was freed");
                true
            }
            Err(failure) => {
                assert_eq!(failure.reason, "REDO_OVERRUN", "{failure}");
                false
            }
        };
        (0..16).filter(is_readable).collect()
    }

    /// Guards the redo of a clone whose point is fixed: only what lies before the point counts, and
    /// neither the quota nor another clone frees it. With what comes after it counted the clone is
    /// given zeros, and nobody is told.
    #[test]
    fn what_comes_after_a_clones_point_costs_it_nothing() {
        let (_directory, [fixed, other]) = followed([2, 6]);
        fixed.fix(at(9)).unwrap();
        assert_eq!(fixed.shared.lock().least(), Some(at(6)));
        // One more clone goes on, and outgrows the quota.
        fixed.shared.lock().keep_quota(9 * BLOCK);
        assert_eq!(other.end().unwrap_err().reason, "REDO_SPOOL_FULL");
        assert!(fixed.check_kept().is_ok() && other.check_kept().is_err());
        assert_eq!(readable(&fixed.spool), Vec::from_iter(2..9));
        // And neither is the log's loss its own.
        fixed.shared.lock().failure = Some(Failure::bug("lost"));
        assert!(!fixed.is_lost() && other.is_lost());
        drop(other);
        assert_eq!(readable(&fixed.spool), Vec::from_iter(2..9));
        assert_eq!(fixed.shared.lock().least(), None, "the follower ends");
        let spool = fixed.spool();
        drop(fixed);
        assert!(readable(&spool).is_empty());
    }

    /// Guards the room: between the parts that clones with a point keep, and before one that goes
    /// on, nothing stays. Without it a paused clone keeps all that others need after it.
    #[test]
    fn a_clone_with_a_point_keeps_its_part_and_no_more() {
        let (_directory, [first, second, third]) = followed([1, 5, 12]);
        first.fix(at(3)).unwrap();
        second.fix(at(7) + 1).unwrap();
        assert_eq!(readable(&first.spool), Vec::from_iter([1, 2, 5, 6, 7, 12, 13, 14, 15]));
        drop(first);
        assert_eq!(readable(&third.spool), Vec::from_iter([5, 6, 7, 12, 13, 14, 15]));
        assert!(!third.shared.lock().serves(at(11)) && third.shared.lock().serves(at(12)));
    }

    /// Guards the sizes of a clone that joins a follower which has not come to its checkpoint yet: it
    /// has a log without records then. With the end of what was followed taken as its own, that lies
    /// before its beginning, and its log is of nearly 2^64 bytes.
    #[test]
    fn a_clone_that_begins_after_what_was_followed_has_no_redo_yet() {
        let (_directory, [first, next]) = followed([2, 18]);
        assert_eq!(first.end().unwrap(), at(16));
        assert!(next.shared.lock().serves(at(18)));
        assert_eq!(next.end().unwrap(), at(18));
        let log = RedoFile::so_far(&Arc::new(next));
        assert_eq!(log.size(), HEADER_BYTES as u64);
    }

    /// Guards the lineage across another clone's generation: what the first one had followed stays
    /// known. With the follower's present end taken for it, a server that was set back, and that
    /// another clone follows by now, is taken for the same one.
    #[test]
    fn how_far_a_log_was_followed_outlives_its_generation() {
        let (_directory, [first]) = followed([2]);
        let mut state = first.shared.lock();
        state.leave_generation();
        state.end = at(3);
        drop(state);
        assert_eq!(first.followed(), at(16));
        let mut state = first.shared.lock();
        state.leave_generation();
        drop(state);
        assert_eq!(first.followed(), at(16), "of its own generation");
    }

    /// Guards the end of a clone over its quota: without the look at its failure the follower writes
    /// on into the spool, beyond the quota, for as long as the clone is paused.
    #[test]
    fn nothing_is_followed_for_a_clone_over_its_quota() {
        let (_directory, [over]) = followed([0]);
        over.shared.lock().keep_quota(15 * BLOCK);
        let state = over.shared.lock();
        assert!(state.least().is_none() && !state.serves(at(16)));
    }
}
