//! Asks a server for what a donor's and a recipient's are compared by. It takes no lock, and changes
//! nothing.

use marcot_common::failure::Failure;

use super::{
    flavor::Flavor,
    server::{DatabaseConfig, Facts, Row, Server, Session, SqlError},
};
use crate::server_facts::{Encryption, Plugin, ServerFacts};

/// Most plugins, collations, key ids and files that are told: far more than any server has.
const PLUGINS_MAX: usize = 1024;
const COLLATIONS_MAX: usize = 4096;
const KEY_IDS_MAX: usize = 256;
const UNDO_FILES_MAX: usize = 128;

/// Most names in one warning.
const NAMES_MAX: usize = 10;

/// What a running server on this host says.
pub fn ask(config: &DatabaseConfig) -> Result<ServerFacts, Failure> {
    let server = Server::new(config)?;
    let mut session = server.connect()?;
    let facts = Facts::read(&mut session)?;
    complete(&mut session, facts)
}

/// Adds what is in no variable.
pub(super) fn complete(session: &mut Session, facts: Facts) -> Result<ServerFacts, Failure> {
    let flavor = facts.flavor;
    let encrypts_log = ["innodb_encrypt_log", "innodb_redo_log_encrypt"]
        .iter()
        .any(|name| facts.variable(name).eq_ignore_ascii_case("ON"));
    Ok(ServerFacts {
        collations: Some(collations(session).map_err(|e| e.failure("list collations"))?),
        plugins: Some(plugins(session).map_err(|e| e.failure("list plugins"))?),
        // These need PROCESS, which the account of a recipient may lack.
        encryption: encryption(session, flavor, encrypts_log).ok(),
        undo_files: undo_files(session, flavor).ok().flatten(),
        // This one needs SELECT on the table.
        keyring_component: keyring_component(session, flavor).ok().flatten(),
        variables: facts.variables.into_iter().collect(),
    })
}

fn collations(session: &mut Session) -> Result<Vec<String>, SqlError> {
    // With a row for each character set that a collation is for, 11.8 names it several times.
    let rows = session.rows(
        "SELECT DISTINCT COLLATION_NAME FROM information_schema.COLLATIONS WHERE COLLATION_NAME IS \
         NOT NULL",
    )?;
    Ok(sorted(rows.iter().map(|row| row.text(0)), COLLATIONS_MAX))
}

fn plugins(session: &mut Session) -> Result<Vec<Plugin>, SqlError> {
    let rows = session.rows(
        "SELECT PLUGIN_NAME, PLUGIN_TYPE, PLUGIN_LIBRARY FROM information_schema.PLUGINS WHERE \
         PLUGIN_STATUS = 'ACTIVE'",
    )?;
    let plugin = |row: &Row| Plugin { name: row.text(0), kind: row.text(1), library: row.text(2) };
    let mut plugins: Vec<Plugin> = rows.iter().take(PLUGINS_MAX).map(plugin).collect();
    plugins.sort();
    Ok(plugins)
}

fn encryption(
    session: &mut Session,
    flavor: Flavor,
    redo_log: bool,
) -> Result<Encryption, SqlError> {
    let rows = session.rows(match flavor {
        Flavor::MariaDb => {
            "SELECT CURRENT_KEY_ID, COUNT(*) FROM \
             information_schema.INNODB_TABLESPACES_ENCRYPTION WHERE ENCRYPTION_SCHEME <> 0 GROUP BY \
             CURRENT_KEY_ID ORDER BY CURRENT_KEY_ID"
        }
        // It has one master key.
        Flavor::MySql => {
            "SELECT NULL, COUNT(*) FROM information_schema.INNODB_TABLESPACES WHERE ENCRYPTION = 'Y'"
        }
    })?;
    let ids = rows.iter().filter_map(|row| u32::try_from(row.number(0)).ok());
    Ok(Encryption {
        tablespaces: rows.iter().map(|row| row.number(1)).sum(),
        key_ids: ids.filter(|&id| id > 0).take(KEY_IDS_MAX).collect(),
        redo_log,
    })
}

/// MariaDB's have fixed names in one directory.
fn undo_files(session: &mut Session, flavor: Flavor) -> Result<Option<Vec<String>>, SqlError> {
    if flavor == Flavor::MariaDb {
        return Ok(None);
    }
    let rows = session
        .rows("SELECT FILE_NAME FROM information_schema.FILES WHERE FILE_TYPE = 'UNDO LOG'")?;
    Ok(Some(sorted(rows.iter().map(|row| row.text(0)), UNDO_FILES_MAX)))
}

/// Without a component the table is empty.
fn keyring_component(session: &mut Session, flavor: Flavor) -> Result<Option<bool>, SqlError> {
    if flavor == Flavor::MariaDb {
        return Ok(None);
    }
    let rows = session.rows(
        "SELECT STATUS_VALUE FROM performance_schema.keyring_component_status WHERE STATUS_KEY = \
         'Component_status'",
    )?;
    Ok(Some(rows.iter().any(|row| row.text(0).eq_ignore_ascii_case("Active"))))
}

fn sorted(names: impl Iterator<Item = String>, most: usize) -> Vec<String> {
    let mut names: Vec<String> = names.take(most).collect();
    names.sort();
    names
}

/// What a server is part of, and would lose or leave behind when its data are replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// Sources that it replicates from now, `HOST:PORT`.
    pub sources: Vec<String>,
    /// Replicas that read its binary log now.
    pub replicas: u64,
    /// Tablespaces whose files are not in its data directory; the first few.
    pub outside: Vec<String>,
    /// What the account may not ask, and what would have been seen.
    pub not_told: Vec<String>,
}

/// Asks a server whose data are to be replaced.
pub fn ask_surroundings(config: &DatabaseConfig) -> Result<Surroundings, Failure> {
    let mut session = Server::new(config)?.connect()?;
    let version = session.row("SELECT VERSION()").map_err(|e| e.failure("ask the server"))?;
    let flavor = Flavor::of_version(&version.map(|row| row.text(0)).unwrap_or_default());
    let mut found = Surroundings::default();
    let Surroundings { sources, replicas, outside, not_told } = &mut found;
    let mut note = |what: &str, error: &SqlError| not_told.push(format!("{what}: {error}"));
    let sql = match flavor {
        Flavor::MariaDb => "SHOW ALL SLAVES STATUS",
        Flavor::MySql => "SHOW REPLICA STATUS",
    };
    match session.rows(sql) {
        Ok(rows) => *sources = rows.iter().filter_map(running_source).take(NAMES_MAX).collect(),
        Err(error) => note("whether it is a replica", &error),
    }
    match session.row(
        "SELECT COUNT(*) FROM information_schema.PROCESSLIST WHERE COMMAND LIKE 'Binlog Dump%'",
    ) {
        Ok(row) => *replicas = row.map_or(0, |row| row.number(0)),
        Err(error) => note("whether others replicate from it", &error),
    }
    let sql = match flavor {
        Flavor::MariaDb => {
            "SELECT NAME, FILENAME FROM information_schema.INNODB_SYS_TABLESPACES WHERE FILENAME NOT \
             LIKE './%' AND FILENAME LIKE '%/%'"
        }
        Flavor::MySql => {
            "SELECT TABLESPACE_NAME, FILE_NAME FROM information_schema.FILES WHERE ENGINE = 'InnoDB' \
             AND FILE_TYPE <> 'TEMPORARY' AND FILE_NAME NOT LIKE './%'"
        }
    };
    match session.rows(sql) {
        Ok(rows) => {
            let shown = |row: &Row| format!("{} in {}", row.text(0), row.text(1));
            *outside = rows.iter().take(NAMES_MAX).map(shown).collect();
        }
        Err(error) => note("whether it has tables outside its data directory", &error),
    }
    Ok(found)
}

fn running_source(row: &Row) -> Option<String> {
    let named = |one: &str, other: &str| match row.named(one) {
        value if value.is_empty() => row.named(other),
        value => value,
    };
    let runs = |value: String| value.eq_ignore_ascii_case("Yes");
    let is_running = runs(named("Slave_IO_Running", "Replica_IO_Running"))
        || runs(named("Slave_SQL_Running", "Replica_SQL_Running"));
    is_running.then(|| {
        let host = named("Master_Host", "Source_Host");
        format!("{host}:{}", named("Master_Port", "Source_Port"))
    })
}
