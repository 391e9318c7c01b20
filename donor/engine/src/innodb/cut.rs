//! The cut: backup locks, what must be read under them, and the point that they fix.
//!
//! Invariants:
//! * No call of a recipient is awaited while a lock is held (R2).
//! * Every statement under the locks runs on the connection that holds them, and the last one is
//!   BACKUP STAGE END: whoever loses the connection before it has no point.
//! * The server itself drops a holder that is frozen or gone: wait_timeout of that connection is
//!   seconds, and a killed one's socket closes.
//! * On a replica no event group is half applied: its SQL threads rest, stopped and started again
//!   by a statement that the server runs to its end whatever becomes of us.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use tonic::Code;

use super::sabotage;
use super::server::{Row, Server, Session, SqlError};

/// Longest wait for one lock, seconds, before all are let go: who waits for these locks stops who
/// comes after.
const LOCK_WAIT_SECONDS: u32 = 5;

/// As above, for the lock that blocks commits.
const COMMIT_LOCK_WAIT_SECONDS: u32 = 1;

/// After how many seconds of silence the server drops the holder of locks.
const HOLDER_SILENCE_SECONDS: u32 = 20;

/// As above, once commits are blocked.
const COMMIT_SILENCE_SECONDS: u32 = 2;

/// Longest rest of a replica's SQL threads, seconds.
const REPLICA_REST_SECONDS: u32 = 60;

/// Wait for the locks when the caller names none (clone_ddl_timeout).
pub(super) const DDL_TIMEOUT_DEFAULT: Duration = Duration::from_secs(300);

/// Pause before the locks are tried again, and its bound.
const BACK_OFF: Duration = Duration::from_millis(500);
const BACK_OFF_MAX: Duration = Duration::from_secs(10);

/// The backup locks, on their connection. Dropped, the connection closes and with it the locks go.
#[derive(Debug)]
pub(super) struct BackupLock {
    session: Session,
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
    /// Blocks DDL and writes to tables without transactions.
    pub(super) fn block_ddl(server: &Server) -> Result<Self, LockError> {
        let answer_max = Duration::from_secs(u64::from(LOCK_WAIT_SECONDS) * 4 + 60);
        let mut session = server.connect_for(answer_max)?;
        let settings = format!(
            "SET SESSION lock_wait_timeout={LOCK_WAIT_SECONDS}, wait_timeout={HOLDER_SILENCE_SECONDS}"
        );
        let run = |session: &mut Session, sql: &str| {
            session.execute(sql).map_err(|error| LockError::of(error, sql))
        };
        run(&mut session, &settings)?;
        if sabotage::is("no-lock") {
            return Ok(Self { session });
        }
        for stage in ["START", "FLUSH", "BLOCK_DDL"] {
            run(&mut session, &format!("BACKUP STAGE {stage}"))?;
        }
        Ok(Self { session })
    }

    /// Blocks commits as well.
    pub(super) fn block_commit(&mut self) -> Result<(), LockError> {
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

    /// Says that the holder lives.
    pub(super) fn keep_alive(&mut self) -> Result<(), Failure> {
        let alive = self.session.execute("DO 1");
        alive.map_err(|error| error.failure("keep the backup lock"))
    }

    /// Lets all locks go; what was read under them counts only if this succeeds.
    pub(super) fn end(&mut self) -> Result<(), Failure> {
        let sql = if sabotage::is("no-lock") { "DO 1" } else { "BACKUP STAGE END" };
        let end = self.session.execute(sql);
        end.map_err(|error| error.failure("end the backup stage"))
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
                    "the server's backup locks could not be had in {} s ({error}): a long statement \
                     on a MyISAM or Aria table, LOCK TABLES or another backup holds them; look at \
                     SHOW PROCESSLIST, or raise clone_ddl_timeout",
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

/// A replica whose SQL threads rest while this lives.
#[derive(Debug)]
pub(super) struct RestingReplica {
    holder: Session,
    lock: String,
    runner: Option<JoinHandle<Result<(), SqlError>>>,
}

/// Stops the SQL threads that run; `None` when there are none.
///
/// One connection holds a named lock. Another one runs, as one compound statement on the server:
/// stop, wait for that lock, start. Whether we let the lock go, die, or are frozen beyond the
/// bound, the server starts the threads again.
pub(super) fn rest_replica(server: &Server) -> Result<Option<RestingReplica>, Failure> {
    let failed = |action: &'static str| move |error: SqlError| error.failure(action);
    let mut holder = server.connect()?;
    let running = running_threads(&mut holder)?;
    if running.is_empty() {
        return Ok(None);
    }
    let lock = format!("marcot-{}", holder.id());
    let settings = format!("SET SESSION wait_timeout={REPLICA_REST_SECONDS}");
    holder.execute(&settings).map_err(failed("prepare the replica's rest"))?;
    let got = holder.row(&format!("SELECT GET_LOCK('{lock}', 0)"));
    if got.map_err(failed("prepare the replica's rest"))?.is_none_or(|row| row.number(0) != 1) {
        return Err(Failure::bug("a named lock of this connection is taken"));
    }
    let mut runner =
        server.connect_for(Duration::from_secs(u64::from(REPLICA_REST_SECONDS) * 3))?;
    let quoted: Vec<String> =
        running.iter().map(|name| format!("'{}'", name.replace('\'', "''"))).collect();
    let each = |verb: &str| -> String {
        quoted.iter().map(|name| format!("{verb} SLAVE {name} SQL_THREAD;")).collect()
    };
    // A name may hold a backslash; with this mode a quote is all that ends a string.
    let mode = runner.execute("SET SESSION sql_mode='NO_BACKSLASH_ESCAPES'");
    mode.map_err(failed("prepare the replica's rest"))?;
    let statement = format!(
        "BEGIN NOT ATOMIC DECLARE CONTINUE HANDLER FOR SQLEXCEPTION BEGIN END; {} \
         DO GET_LOCK('{lock}', {REPLICA_REST_SECONDS}); {} END",
        each("STOP"),
        each("START")
    );
    let thread = std::thread::Builder::new().name("replica-rest".to_owned());
    let runner = thread.spawn(move || runner.execute(&statement)).map_err(|e| {
        Failure::new(Code::ResourceExhausted, "NO_THREAD", format!("start a thread: {e}"))
    })?;
    let mut resting = RestingReplica { holder, lock, runner: Some(runner) };
    let deadline = Instant::now() + Duration::from_secs(u64::from(REPLICA_REST_SECONDS) / 2);
    while running_threads(&mut resting.holder)?.iter().any(|name| running.contains(name)) {
        if resting.runner.as_ref().is_some_and(JoinHandle::is_finished) {
            let ended = resting.runner.take().and_then(|runner| runner.join().ok());
            let text = match ended {
                Some(Err(error)) => error.to_string(),
                _ => "the statement ended without stopping them".to_owned(),
            };
            return Err(Failure::precondition(
                "REPLICA_NOT_STOPPED",
                format!(
                    "the replica's SQL threads do not stop: {text}; the donor's account needs \
                     REPLICATION SLAVE ADMIN on a replica"
                ),
            ));
        }
        if Instant::now() >= deadline {
            let text = "the replica's SQL threads have not stopped in time: a long transaction is \
                        being applied";
            return Err(Failure::new(Code::Unavailable, "REPLICA_NOT_STOPPED", text));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(Some(resting))
}

/// Connections whose SQL threads run.
fn running_threads(session: &mut Session) -> Result<Vec<String>, Failure> {
    let rows = session.rows("SHOW ALL SLAVES STATUS");
    let rows = rows.map_err(|error| error.failure("ask for the replica's state"))?;
    let runs = |row: &&Row| row.named("Slave_SQL_Running") != "No";
    Ok(rows.iter().filter(runs).map(|row| row.named("Connection_name")).collect())
}

/// Fails when SQL threads run although they are to rest: the server has started them because the
/// cut took too long. Asked once commits are blocked, it proves that no event group is half
/// applied.
pub(super) fn check_rest(session: &mut Session) -> Result<(), Failure> {
    let running = running_threads(session)?;
    if running.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Code::Unavailable,
        "REPLICA_NOT_STOPPED",
        format!(
            "the replica's SQL threads run again before the cut was made (connections: {}): they \
             rest for {REPLICA_REST_SECONDS} s at most; clone again when less DDL goes on",
            running.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ")
        ),
    ))
}

impl Drop for RestingReplica {
    fn drop(&mut self) {
        // Gone or not: the server starts the threads when this connection has ended.
        let _ = self.holder.execute(&format!("DO RELEASE_LOCK('{}')", self.lock));
        if let Some(Ok(Err(error))) = self.runner.take().map(JoinHandle::join) {
            tracing::warn!(%error, "the statement that starts the replica's SQL threads has failed");
        }
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
    ended: AtomicBool,
}

/// The lock, while nobody else uses its connection.
pub(super) struct HeldLock<'a>(MutexGuard<'a, Result<BackupLock, Failure>>);

impl HeldLock<'_> {
    /// The lock; an error once it was lost.
    pub(super) fn get(&mut self) -> Result<&mut BackupLock, Failure> {
        self.0.as_mut().map_err(|failure| failure.clone())
    }
}

impl DdlBlock {
    /// Takes the locks within `limit`.
    pub(super) fn take(server: &Server, limit: Duration) -> Result<Self, Failure> {
        let lock = retry_while_busy(limit, &mut || Ok(()), |_| BackupLock::block_ddl(server))?;
        let shared =
            Arc::new(DdlShared { lock: Mutex::new(Ok(lock)), ended: AtomicBool::new(false) });
        let keeper = std::thread::Builder::new().name("ddl-block".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.keep_alive()
        });
        let keeper = keeper.map_err(|e| {
            Failure::new(Code::ResourceExhausted, "NO_THREAD", format!("start a thread: {e}"))
        })?;
        Ok(Self { shared, keeper: Some(keeper) })
    }

    /// The lock, for the cut.
    pub(super) fn lock(&self) -> HeldLock<'_> {
        HeldLock(self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl DdlShared {
    fn keep_alive(&self) {
        while !self.ended.load(Ordering::Relaxed) {
            std::thread::park_timeout(Duration::from_secs(2));
            let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            if let Ok(held) = lock.as_mut()
                && let Err(failure) = held.keep_alive()
            {
                tracing::warn!(error = %failure, "the lock that blocks DDL was lost");
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
