//! Backup locks: MariaDB's stages for the cut, MySQL's LOCK INSTANCE FOR BACKUP.
//!
//! Invariants:
//! * No call of a recipient is awaited while a lock is held that writers meet (R2). What blocks DDL
//!   alone may be held for a whole clone.
//! * Every statement under the locks runs on the connection that holds them, and the last one lets
//!   them go: whoever loses the connection before it has no point.
//! * The server itself drops a holder that is frozen or gone: wait_timeout of that connection is
//!   seconds, and a killed one's socket closes.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use tonic::Code;

use super::{
    flavor::Flavor,
    sabotage,
    server::{Server, Session, SqlError},
};
use crate::observer::{Blocked, Observer};

/// Longest wait for one lock, seconds, before all are let go: who waits for these locks stops who
/// comes after.
const LOCK_WAIT_SECONDS: u32 = 5;

/// As above, for the lock that blocks commits.
const COMMIT_LOCK_WAIT_SECONDS: u32 = 1;

/// After how many seconds of silence the server drops the holder of locks.
const HOLDER_SILENCE_SECONDS: u32 = 20;

/// As above, once commits are blocked.
const COMMIT_SILENCE_SECONDS: u32 = 2;

/// How often the server hears of the holder of locks that is at work.
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// Wait for the locks when the caller names none (clone_ddl_timeout).
pub const DDL_TIMEOUT_DEFAULT: Duration = Duration::from_secs(300);

/// Pause before the locks are tried again, and its bound.
const BACK_OFF: Duration = Duration::from_millis(500);
const BACK_OFF_MAX: Duration = Duration::from_secs(10);

/// The backup locks, on their connection. Dropped, the connection closes and with it the locks go.
#[derive(Debug)]
pub(super) struct BackupLock {
    session: Session,
    flavor: Flavor,
    /// When the server last heard of it by `keep_alive`.
    heard: Instant,
    /// BLOCK_COMMIT was asked for: commits may wait until this connection ends.
    has_asked_commit: bool,
    observer: Observer,
    /// Since when DDL waits.
    ddl_since: Option<Instant>,
    /// Since when commits wait: from the moment that the lock was asked for, they queue behind it.
    commit_since: Option<Instant>,
}

impl Drop for BackupLock {
    fn drop(&mut self) {
        self.tell_ended();
    }
}

/// What became of a try to take locks.
#[derive(Debug, thiserror::Error)]
pub(super) enum LockError {
    /// Someone else is in the way.
    #[error("{0}")]
    Busy(SqlError),
    /// It cannot be done.
    #[error("{0}")]
    Failed(#[from] Failure),
}

impl LockError {
    fn of(error: SqlError, action: &str) -> Self {
        if error.is_lock_timeout() {
            return Self::Busy(error);
        }
        Self::Failed(error.failure(action))
    }
}

impl BackupLock {
    /// Blocks DDL, and MariaDB's writes to tables without transactions.
    pub(super) fn block_ddl(server: &Server, flavor: Flavor) -> Result<Self, LockError> {
        let answer_max = Duration::from_secs(u64::from(LOCK_WAIT_SECONDS) * 4 + 60);
        let mut session = server.connect_for(answer_max)?;
        let settings = format!(
            "SET SESSION lock_wait_timeout={LOCK_WAIT_SECONDS}, wait_timeout={HOLDER_SILENCE_SECONDS}"
        );
        let run = |session: &mut Session, sql: &str| {
            session.execute(sql).map_err(|error| LockError::of(error, sql))
        };
        run(&mut session, &settings)?;
        if !sabotage::is("no-lock") {
            let statements: &[&str] = match flavor {
                Flavor::MariaDb => {
                    &["BACKUP STAGE START", "BACKUP STAGE FLUSH", "BACKUP STAGE BLOCK_DDL"]
                }
                Flavor::MySql => &["LOCK INSTANCE FOR BACKUP"],
            };
            for sql in statements {
                run(&mut session, sql)?;
            }
        }
        let now = Instant::now();
        let observer = server.observer().clone();
        Ok(Self {
            session,
            flavor,
            heard: now,
            has_asked_commit: false,
            observer,
            ddl_since: Some(now),
            commit_since: None,
        })
    }

    /// Blocks commits as well. Where they could not be blocked in time, DDL still is. MySQL needs no
    /// such block: `log_status` is of one moment.
    pub(super) fn block_commit(&mut self) -> Result<(), LockError> {
        if self.flavor == Flavor::MySql {
            return Ok(());
        }
        self.has_asked_commit = true;
        self.commit_since = Some(Instant::now());
        let blocked = self.try_block_commit();
        if let Err(LockError::Busy(_)) = &blocked {
            let settings = format!(
                "SET SESSION lock_wait_timeout={LOCK_WAIT_SECONDS}, \
                 wait_timeout={HOLDER_SILENCE_SECONDS}"
            );
            let restored = self.session.execute(&settings);
            restored.map_err(|error| LockError::of(error, &settings))?;
            self.has_asked_commit = false;
            self.tell_commits();
        }
        blocked
    }

    fn try_block_commit(&mut self) -> Result<(), LockError> {
        let settings = format!(
            "SET SESSION lock_wait_timeout={COMMIT_LOCK_WAIT_SECONDS}, \
             wait_timeout={COMMIT_SILENCE_SECONDS}"
        );
        if sabotage::is("no-lock") {
            return Ok(());
        }
        for sql in [&settings[..], "BACKUP STAGE BLOCK_COMMIT"] {
            self.session.execute(sql).map_err(|error| LockError::of(error, sql))?;
        }
        Ok(())
    }

    /// The connection that holds the locks.
    pub(super) fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Says that the holder lives, once in a while.
    pub(super) fn keep_alive(&mut self) -> Result<(), Failure> {
        if self.heard.elapsed() < KEEP_ALIVE {
            return Ok(());
        }
        self.heard = Instant::now();
        self.prove()
    }

    /// Fails where the locks have gone, with the connection that holds them.
    pub(super) fn prove(&mut self) -> Result<(), Failure> {
        let alive = self.session.execute("DO 1");
        alive.map_err(|error| error.failure("keep the backup lock"))
    }

    /// Lets all locks go; what was read under them counts only if this succeeds.
    pub(super) fn end(&mut self) -> Result<(), Failure> {
        let sql = match self.flavor {
            _ if sabotage::is("no-lock") => "DO 1",
            Flavor::MariaDb => "BACKUP STAGE END",
            Flavor::MySql => "UNLOCK INSTANCE",
        };
        self.session.execute(sql).map_err(|error| error.failure("let the backup lock go"))?;
        self.tell_ended();
        Ok(())
    }

    fn tell_commits(&mut self) {
        if let Some(since) = self.commit_since.take() {
            self.observer.blocked(Blocked::Commits, since.elapsed());
        }
    }

    /// Tells how long anyone has waited for the locks, once.
    fn tell_ended(&mut self) {
        self.tell_commits();
        if let Some(since) = self.ddl_since.take() {
            self.observer.blocked(Blocked::Ddl, since.elapsed());
        }
    }
}

/// Runs `attempt` until it is not busy, within `limit`.
pub(super) fn retry_while_busy<T>(
    limit: Duration,
    progress: &mut dyn FnMut() -> Result<(), Failure>,
    mut attempt: impl FnMut(&mut dyn FnMut() -> Result<(), Failure>) -> Result<T, LockError>,
) -> Result<T, Failure> {
    let deadline = Instant::now() + limit;
    let mut pause = BACK_OFF;
    loop {
        progress()?;
        let error = match attempt(progress) {
            Ok(done) => return Ok(done),
            Err(LockError::Failed(failure)) => return Err(failure),
            Err(LockError::Busy(error)) => error,
        };
        if Instant::now() + pause >= deadline {
            return Err(Failure::new(
                Code::Unavailable,
                "BACKUP_LOCK_TIMEOUT",
                format!(
                    "the server's backup locks could not be had in {} s ({error}): DDL, a long \
                     statement on a MyISAM or Aria table, LOCK TABLES or another backup holds them; \
                     look at SHOW PROCESSLIST, or raise clone_ddl_timeout",
                    limit.as_secs()
                ),
            )
            .mysql(1205)
            .retry_after(BACK_OFF_MAX));
        }
        tracing::info!(%error, "backup locks are taken, trying again");
        let wake = Instant::now() + pause;
        while Instant::now() < wake {
            progress()?;
            std::thread::sleep(Duration::from_millis(100));
        }
        pause = (pause * 2).min(BACK_OFF_MAX);
    }
}

/// DDL blocked for a whole clone: the lock on its connection, kept awake by a thread.
#[derive(Debug)]
pub(super) struct DdlBlock {
    shared: Arc<DdlShared>,
    keeper: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct DdlShared {
    lock: Mutex<Result<BackupLock, Failure>>,
    /// Why it was lost, for those who do not wait until its connection is free. They keep this alone:
    /// the connection ends with the block.
    lost: Arc<OnceLock<Failure>>,
    flavor: Flavor,
    ended: AtomicBool,
}

/// The lock, while nobody else uses its connection.
pub(super) struct HeldLock<'a> {
    lock: MutexGuard<'a, Result<BackupLock, Failure>>,
    flavor: Flavor,
}

impl HeldLock<'_> {
    /// The lock; an error once it was lost.
    pub(super) fn get(&mut self) -> Result<&mut BackupLock, Failure> {
        self.lock.as_mut().map_err(|failure| lost(self.flavor, failure))
    }
}

/// Tells whether DDL has been blocked all the time; it waits for nothing.
#[derive(Debug)]
pub(super) struct DdlWatch {
    lost: Arc<OnceLock<Failure>>,
    flavor: Flavor,
}

impl DdlWatch {
    /// An error once the lock was lost: some seconds after that at the latest.
    pub(super) fn check(&self) -> Result<(), Failure> {
        self.lost.get().map_or(Ok(()), |failure| Err(lost(self.flavor, failure)))
    }
}

/// DDL may have run. MySQL's has left no redo, so that this snapshot cannot be gone on with; nobody
/// has asked for the block there, and another snapshot serves. MariaDB's caller has asked for it.
fn lost(flavor: Flavor, why: &Failure) -> Failure {
    let text = format!(
        "the connection that blocks DDL for the whole clone was lost, so that DDL may have run since \
         ({})",
        why.message
    );
    match flavor {
        Flavor::MariaDb => {
            Failure::new(Code::Aborted, "DDL_BLOCK_LOST", format!("{text}; clone again"))
        }
        Flavor::MySql => Failure::new(
            Code::NotFound,
            "UNKNOWN_SNAPSHOT",
            format!("{text}: MySQL's DDL writes no redo; it needs another snapshot"),
        ),
    }
}

impl DdlBlock {
    /// Takes the locks within `limit`.
    pub(super) fn take(
        server: &Server,
        flavor: Flavor,
        limit: Duration,
        progress: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        let lock = retry_while_busy(limit, progress, |_| BackupLock::block_ddl(server, flavor))?;
        let shared = Arc::new(DdlShared {
            lock: Mutex::new(Ok(lock)),
            lost: Arc::default(),
            flavor,
            ended: AtomicBool::new(false),
        });
        let keeper = std::thread::Builder::new().name("ddl-block".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.keep_alive()
        });
        let keeper = keeper.map_err(|e| {
            Failure::new(Code::ResourceExhausted, "NO_THREAD", format!("start a thread: {e}"))
        })?;
        Ok(Self { shared, keeper: Some(keeper) })
    }

    /// Whether it serves another cut: not once commits may be blocked by it, or were.
    pub(super) fn is_reusable(&self) -> bool {
        self.lock().lock.as_ref().map_or(true, |lock| !lock.has_asked_commit)
    }

    /// The lock, for the cut.
    pub(super) fn lock(&self) -> HeldLock<'_> {
        let lock = self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
        HeldLock { lock, flavor: self.shared.flavor }
    }

    /// Who tells whether it was lost.
    pub(super) fn watch(&self) -> DdlWatch {
        DdlWatch { lost: Arc::clone(&self.shared.lost), flavor: self.shared.flavor }
    }
}

impl DdlShared {
    fn keep_alive(&self) {
        while !self.ended.load(Ordering::Relaxed) {
            std::thread::park_timeout(Duration::from_secs(2));
            let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            // It must not keep a lock on commits that nobody uses any more.
            if let Ok(held) = lock.as_mut()
                && !held.has_asked_commit
                && let Err(failure) = held.keep_alive()
            {
                tracing::warn!(error = %failure, "the lock that blocks DDL was lost");
                // It is the first: a lock that was lost is not looked at again.
                let _ = self.lost.set(failure.clone());
                *lock = Err(failure);
            }
        }
    }
}

impl Drop for DdlBlock {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(keeper) = self.keeper.take() {
            keeper.thread().unpark();
            // It ends within one statement; a panic in it has been told of.
            drop(keeper.join());
        }
    }
}
