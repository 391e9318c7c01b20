//! Makes a server that runs on a clone a replica of the donor's server, from the clone's coordinates.

use std::fmt;

use marcot_common::failure::Failure;
use marcot_proto::common::v1::Coordinates;

use super::server::{DatabaseConfig, Row, Server};

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

/// How far a replica is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReplicaState {
    /// Whether it has applied all that it knows of, and is connected.
    pub has_caught_up: bool,
    /// What it has applied, to be compared with an earlier answer.
    pub applied: String,
    /// Why it does not go on.
    pub error: Option<String>,
}

/// Sets the coordinates and starts replication.
pub fn attach(
    config: &DatabaseConfig,
    at: &Coordinates,
    source: &ReplicationSource,
) -> Result<(), Failure> {
    let mut session = Server::new(config)?.connect()?;
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
        return Err(Failure::precondition(
            "NO_COORDINATES",
            "the donor's server writes no binary log, or is not known: the clone cannot be attached \
             as its replica",
        ));
    }
    statements.extend([change, "START SLAVE".to_owned()]);
    for sql in statements {
        // The statement itself may hold the password.
        let verb = sql.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
        session.execute(&sql).map_err(|e| e.failure(&format!("attach the replica: {verb}")))?;
    }
    Ok(())
}

/// Asks a replica how far it is.
pub fn state(config: &DatabaseConfig) -> Result<ReplicaState, Failure> {
    let mut session = Server::new(config)?.connect()?;
    let row = session.row("SHOW SLAVE STATUS").map_err(|e| e.failure("ask the replica"))?;
    let Some(row) = row else {
        return Ok(ReplicaState {
            error: Some("the server is no replica".to_owned()),
            ..ReplicaState::default()
        });
    };
    Ok(ReplicaState {
        has_caught_up: has_caught_up(&row),
        applied: format!(
            "{}:{}",
            row.named("Relay_Master_Log_File"),
            row.named("Exec_Master_Log_Pos")
        ),
        error: ["Last_IO_Error", "Last_SQL_Error"]
            .into_iter()
            .map(|column| row.named(column))
            .find(|error| !error.is_empty()),
    })
}

fn has_caught_up(row: &Row) -> bool {
    row.named("Slave_IO_Running") == "Yes"
        && row.named("Slave_SQL_Running") == "Yes"
        && row.named("Seconds_Behind_Master") == "0"
        && row.named("Master_Log_File") == row.named("Relay_Master_Log_File")
        && row.named("Read_Master_Log_Pos") == row.named("Exec_Master_Log_Pos")
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}
