//! What the account must be allowed to do on a MariaDB server.

use marcot_common::failure::Failure;

use crate::innodb::server::{Session, SqlError};

/// Fails unless the account may do all that a clone needs; takes no lock.
pub(in crate::innodb) fn check_privileges(session: &mut Session) -> Result<(), Failure> {
    // Without a backup under way this is error 4146, after the privilege has been checked.
    match session.execute("BACKUP STAGE END") {
        Ok(()) | Err(SqlError::Server { code: 4145 | 4146, .. }) => {}
        Err(error) => return Err(error.failure("take backup locks (needs RELOAD)")),
    }
    for (sql, action) in [
        ("SHOW MASTER STATUS", "read binary log coordinates (needs BINLOG MONITOR)"),
        (
            "SELECT SPACE FROM information_schema.INNODB_SYS_TABLESPACES LIMIT 1",
            "list tablespaces (needs PROCESS)",
        ),
        ("SHOW ALL SLAVES STATUS", "ask whether it is a replica (needs SLAVE MONITOR)"),
    ] {
        session.rows(sql).map_err(|error| error.failure(action))?;
    }
    let replicates = session.row("SHOW ALL SLAVES STATUS");
    if replicates.map_err(|error| error.failure("ask whether it is a replica"))?.is_some() {
        check_replica_privilege(session)?;
    }
    Ok(())
}

/// Fails unless the account may stop and start a replica's SQL threads; changes nothing.
fn check_replica_privilege(session: &mut Session) -> Result<(), Failure> {
    // A setting that the same privilege guards: it is asked for before the value, which is wrong.
    match session.execute("SET GLOBAL slave_ddl_exec_mode='marcot asks for its privilege'") {
        Ok(()) | Err(SqlError::Server { code: 1231, .. }) => Ok(()),
        Err(error) => {
            let action = "rest a replica's SQL threads for the cut (needs REPLICATION SLAVE ADMIN)";
            Err(error.failure(action))
        }
    }
}
