//! Makes a server that runs on a clone a replica of the donor's server, from the clone's coordinates.

use std::{cmp::Ordering, fmt};

use marcot_common::failure::Failure;
use marcot_proto::common::v1::Coordinates;

use super::{
    flavor::Flavor,
    server::{DatabaseConfig, Row, Server, SqlError},
};

/// Where a replica replicates from.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ReplicationSource {
    /// Host of the donor's database server.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Account with REPLICATION SLAVE.
    pub user: String,
    /// Its password.
    pub password: String,
}

impl fmt::Debug for ReplicationSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'@'{}':{}", self.user, self.host, self.port)
    }
}

/// A place in the binary logs of a source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// Name of the file.
    pub file: String,
    /// Byte in it.
    pub position: u64,
}

impl Ord for Applied {
    fn cmp(&self, other: &Self) -> Ordering {
        // The number at a name's end has six digits, or more.
        let key = |at: &Self| (at.file.len(), at.file.clone(), at.position);
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for Applied {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Applied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.position)
    }
}

/// How far a replica is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReplicaState {
    /// Whether both of its threads run, and are connected.
    pub runs: bool,
    /// Whether it has read all that its source has at this moment.
    pub has_read_all: bool,
    /// What it has read.
    pub read: Applied,
    /// What it has applied.
    pub applied: Applied,
    /// Why it does not go on.
    pub error: Option<String>,
}

/// Fails where the coordinates are none that the donor's server can be replicated from.
pub fn check_attachable(at: &Coordinates) -> Result<(), Failure> {
    if at.binlog_lacks_replicated {
        return Err(Failure::precondition(
            "NO_COORDINATES",
            "the donor's server is a replica with log_slave_updates (log_replica_updates) off: its \
             binary log lacks what it replicates, so the clone is not attached to it; attach it to \
             the donor's own source",
        ));
    }
    if at.gtid_executed.is_empty() && at.binlog_file.is_empty() {
        return Err(no_coordinates());
    }
    Ok(())
}

fn no_coordinates() -> Failure {
    Failure::precondition(
        "NO_COORDINATES",
        "the donor's server writes no binary log, or is not known: the clone cannot be attached \
         as its replica",
    )
}

/// Sets the coordinates and starts replication.
pub fn attach(
    config: &DatabaseConfig,
    at: &Coordinates,
    source: &ReplicationSource,
) -> Result<(), Failure> {
    check_attachable(at)?;
    let mut session = Server::new(config)?.connect()?;
    let version = session.row("SELECT VERSION()").map_err(|e| e.failure("ask the server"))?;
    let version = version.map(|row| row.text(0)).unwrap_or_default();
    let statements = match Flavor::of_version(&version) {
        Flavor::MariaDb => statements_of_mariadb(at, source),
        Flavor::MySql => statements_of_mysql(at, source),
    }
    .ok_or_else(no_coordinates)?;
    for sql in statements {
        // The statement itself may hold the password.
        let verb = sql.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        session.execute(&sql).map_err(|e| e.failure(&format!("attach the replica: {verb}")))?;
    }
    Ok(())
}

fn statements_of_mariadb(at: &Coordinates, source: &ReplicationSource) -> Option<Vec<String>> {
    let mut change = format!(
        "CHANGE MASTER TO MASTER_HOST={}, MASTER_PORT={}, MASTER_USER={}, MASTER_PASSWORD={}",
        quoted(&source.host),
        source.port,
        quoted(&source.user),
        quoted(&source.password)
    );
    let mut statements = vec!["STOP SLAVE".to_owned(), "RESET SLAVE ALL".to_owned()];
    if !at.gtid_executed.is_empty() {
        statements.push(format!("SET GLOBAL gtid_slave_pos={}", quoted(&at.gtid_executed)));
        change.push_str(", MASTER_USE_GTID=slave_pos");
    } else if !at.binlog_file.is_empty() {
        let file = String::from_utf8_lossy(&at.binlog_file);
        change.push_str(&format!(
            ", MASTER_LOG_FILE={}, MASTER_LOG_POS={}",
            quoted(&file),
            at.binlog_position
        ));
    } else {
        return None;
    }
    statements.extend([change, "START SLAVE".to_owned()]);
    Some(statements)
}

/// The clone itself knows its GTIDs. Without TLS the password goes encrypted by the source's key.
fn statements_of_mysql(at: &Coordinates, source: &ReplicationSource) -> Option<Vec<String>> {
    let mut change = format!(
        "CHANGE REPLICATION SOURCE TO SOURCE_HOST={}, SOURCE_PORT={}, SOURCE_USER={}, \
         SOURCE_PASSWORD={}, GET_SOURCE_PUBLIC_KEY=1",
        quoted(&source.host),
        source.port,
        quoted(&source.user),
        quoted(&source.password)
    );
    if at.binlog_file.is_empty() {
        return None;
    }
    if at.gtid_executed.is_empty() {
        let file = String::from_utf8_lossy(&at.binlog_file);
        change.push_str(&format!(
            ", SOURCE_LOG_FILE={}, SOURCE_LOG_POS={}",
            quoted(&file),
            at.binlog_position
        ));
    } else {
        change.push_str(", SOURCE_AUTO_POSITION=1");
    }
    let stop = ["STOP REPLICA", "RESET REPLICA ALL"].map(str::to_owned);
    Some(stop.into_iter().chain([change, "START REPLICA".to_owned()]).collect())
}

/// Asks a replica how far it is.
pub fn state(config: &DatabaseConfig) -> Result<ReplicaState, Failure> {
    let mut session = Server::new(config)?.connect()?;
    // MySQL has another name for it since 8.0.22, and since 8.4 only that.
    let row = match session.row("SHOW REPLICA STATUS") {
        Err(SqlError::Server { code: 1064, .. }) => session.row("SHOW SLAVE STATUS"),
        other => other,
    };
    let row = row.map_err(|e| e.failure("ask the replica"))?;
    let Some(row) = row else {
        return Ok(ReplicaState {
            error: Some("the server is no replica".to_owned()),
            ..ReplicaState::default()
        });
    };
    Ok(state_of(&row))
}

fn state_of(row: &Row) -> ReplicaState {
    let at = |file: &str, position: &str| Applied {
        file: named(row, file),
        position: named(row, position).parse().unwrap_or(0),
    };
    let io_runs = named(row, "Slave_IO_Running") == "Yes";
    let read = at("Master_Log_File", "Read_Master_Log_Pos");
    ReplicaState {
        runs: io_runs && named(row, "Slave_SQL_Running") == "Yes",
        // "Waiting for master to send event": it has been told all that there is.
        has_read_all: io_runs
            && !read.file.is_empty()
            && named(row, "Slave_IO_State").starts_with("Waiting for"),
        read,
        applied: at("Relay_Master_Log_File", "Exec_Master_Log_Pos"),
        error: ["Last_IO_Error", "Last_SQL_Error"]
            .into_iter()
            .map(|column| row.named(column))
            .find(|error| !error.is_empty()),
    }
}

/// A column by MariaDB's name, or MySQL's.
fn named(row: &Row, name: &str) -> String {
    let found = row.named(name);
    if !found.is_empty() {
        return found;
    }
    row.named(&name.replace("Slave", "Replica").replace("Master", "Source"))
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards the replica of a replica: with the look taken out it is attached to a log that lacks
    /// what the donor replicates, and goes on without an error.
    #[test]
    fn a_clone_is_not_attached_to_a_log_that_lacks_what_was_replicated() {
        let at = Coordinates {
            gtid_executed: "0-7-9".to_owned(),
            binlog_file: bytes::Bytes::from_static(b"bin.000002"),
            ..Coordinates::default()
        };
        assert!(check_attachable(&at).is_ok());
        let lacks = Coordinates { binlog_lacks_replicated: true, ..at };
        let database = DatabaseConfig::default();
        // The server is not asked: there is none.
        let refused = attach(&database, &lacks, &ReplicationSource::default()).unwrap_err();
        for failure in [refused, check_attachable(&lacks).unwrap_err()] {
            assert_eq!(failure.reason, "NO_COORDINATES");
            assert!(failure.message.contains("log_slave_updates"), "{failure}");
        }
        let failure = check_attachable(&Coordinates::default()).unwrap_err();
        assert!(failure.message.contains("no binary log"), "{failure}");
    }

    /// Guards the end of a catch-up: files of a source come in the order of their numbers, also once
    /// these have a digit more.
    #[test]
    fn places_in_binary_logs_have_an_order() {
        let at = |file: &str, position| Applied { file: file.to_owned(), position };
        let ascending = [
            Applied::default(),
            at("bin.000002", 4),
            at("bin.000002", 300),
            at("bin.000010", 4),
            at("bin.999999", 4),
            at("bin.1000000", 4),
        ];
        assert!(ascending.is_sorted());
        assert!(at("bin.000002", 300) < at("bin.000010", 4));
    }
}
