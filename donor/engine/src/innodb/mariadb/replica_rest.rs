//! A replica's SQL threads rest for the cut, so that no event group is half applied (R4): stopped
//! and started again by a statement that the server runs to its end whatever becomes of us.

use std::{
    thread::JoinHandle,
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use tonic::Code;

use crate::innodb::server::{Row, Server, Session, SqlError};

/// Longest rest of a replica's SQL threads, seconds.
const REPLICA_REST_SECONDS: u32 = 60;

/// Longest wait for them to stop: half of it, so that a cut has the other half.
const STOP_MAX: Duration = Duration::from_secs(REPLICA_REST_SECONDS as u64 / 2);

/// Between two looks whether they have stopped, or run again.
const LOOK_PAUSE: Duration = Duration::from_millis(2);

/// How often a cancel is looked for meanwhile.
const CANCEL_PAUSE: Duration = Duration::from_millis(200);

/// Longest wait for the server to start them again: it takes milliseconds, but for a server that
/// has not stopped them yet.
const START_MAX: Duration = Duration::from_secs(5);

/// A replica whose SQL threads rest while this lives.
#[derive(Debug)]
pub(in crate::innodb) struct RestingReplica {
    holder: Session,
    lock: String,
    /// Those whose SQL threads rest.
    connections: Vec<String>,
    runner: Option<JoinHandle<Result<(), SqlError>>>,
}

/// Stops the SQL threads that run; `None` when there are none.
///
/// One connection holds a named lock. Another one runs, as one compound statement on the server:
/// stop, wait for that lock, start. Whether we let the lock go, die, or are frozen beyond the
/// bound, the server starts the threads again. An error of `told` ends the wait for them to stop.
pub(in crate::innodb) fn rest_replica(
    server: &Server,
    told: &mut dyn FnMut() -> Result<(), Failure>,
) -> Result<Option<RestingReplica>, Failure> {
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
    let connections = running.clone();
    let mut resting = RestingReplica { holder, lock, connections, runner: Some(runner) };
    let begun = Instant::now();
    let mut told_at = begun;
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
        if begun.elapsed() >= STOP_MAX {
            let text = format!(
                "the replica's SQL threads have not stopped in {} s: a long transaction is being \
                 applied, or DDL that clone_block_ddl keeps waiting; clone again when it has ended",
                STOP_MAX.as_secs()
            );
            return Err(Failure::new(Code::Unavailable, "REPLICA_NOT_STOPPED", text));
        }
        if told_at.elapsed() >= CANCEL_PAUSE {
            told_at = Instant::now();
            told()?;
        }
        std::thread::sleep(LOOK_PAUSE);
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
/// applied. Another try may end better.
pub(in crate::innodb) fn check_rest(session: &mut Session) -> Result<(), Failure> {
    let running = running_threads(session)?;
    if running.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        Code::Aborted,
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
        let begun = Instant::now();
        while self.runner.as_ref().is_some_and(|runner| !runner.is_finished()) {
            if begun.elapsed() >= START_MAX {
                // Not to be killed: only this statement starts what it stops.
                tracing::warn!(
                    connections = self.connections.join(", "),
                    "the replica's SQL threads have not stopped yet; the server starts them again \
                     once they have"
                );
                return;
            }
            std::thread::sleep(LOOK_PAUSE);
        }
        if let Some(Ok(Err(error))) = self.runner.take().map(JoinHandle::join) {
            tracing::warn!(%error, "the statement that starts the replica's SQL threads has failed");
        }
        // The statement goes on whatever START SLAVE answers, so that one connection's failure does
        // not leave the others at rest.
        match running_threads(&mut self.holder) {
            Ok(running) => {
                let at_rest = self.connections.iter().filter(|name| !running.contains(name));
                let named: Vec<String> = at_rest.map(|name| format!("'{name}'")).collect();
                if !named.is_empty() {
                    tracing::warn!(
                        connections = named.join(", "),
                        "the replica's SQL threads do not run again after the cut; START SLAVE"
                    );
                }
            }
            Err(error) => tracing::warn!(%error, "whether the replica's SQL threads run again"),
        }
    }
}
