//! Whether a server that has just started on a data directory is whole: it answers, all schemas are
//! there, and the first row of every table can be read.

use std::{path::Path, time::Duration};

use marcot_common::failure::Failure;

use super::{
    paths,
    server::{DatabaseConfig, Row, Server, Session, SqlError},
};

/// Engines whose tables lie elsewhere, or nowhere: a read says nothing of this server.
const REMOTE_ENGINES: [&str; 4] = ["FEDERATED", "SPIDER", "CONNECT", "PERFORMANCE_SCHEMA"];

/// Schemas that a server makes up itself.
const VIRTUAL_SCHEMAS: [&str; 3] = ["information_schema", "performance_schema", "sys"];

/// What a healthy server has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerHealth {
    /// Its version.
    pub version: String,
    /// Schemas that it shows.
    pub schemas: u64,
    /// Tables of which the first row was read.
    pub tables_read: u64,
}

/// Whether the server answers at all, within `answer_max`. A MariaDB that starts, or hangs, may take
/// connections and greet nobody.
pub fn answers(config: &DatabaseConfig, answer_max: Duration) -> Result<(), Failure> {
    Server::new(config)?.connect_for(answer_max).map(drop)
}

/// Reads the first row of every table of the server on a data directory. `schemas` are names that
/// must be there.
pub fn check(
    config: &DatabaseConfig,
    data_directory: &Path,
    schemas: &[String],
) -> Result<ServerHealth, Failure> {
    let mut session = Server::new(config)?.connect()?;
    paths::check(&mut session, data_directory)?;
    let present = texts(&mut session, "SHOW DATABASES")?;
    let is_lost =
        |schema: &&String| !present.iter().any(|name| name.eq_ignore_ascii_case(schema.as_str()));
    if let Some(lost) = schemas.iter().find(is_lost) {
        return Err(unhealthy(format!(
            "schema {lost} has a directory, and the server does not show it"
        )));
    }
    let version = texts(&mut session, "SELECT VERSION()")?.concat();
    let rows = session
        .rows(
            "SELECT TABLE_SCHEMA, TABLE_NAME, ENGINE, TABLE_COMMENT FROM information_schema.TABLES \
             WHERE TABLE_TYPE = 'BASE TABLE'",
        )
        .map_err(|e| e.failure("list the tables"))?;
    let mut tables_read = 0;
    for row in &rows {
        let (schema, table, engine) = (row.text(0), row.text(1), row.text(2).to_uppercase());
        if VIRTUAL_SCHEMAS.contains(&schema.as_str()) || REMOTE_ENGINES.contains(&&*engine) {
            continue;
        }
        if engine.is_empty() {
            return Err(unhealthy(format!("{schema}.{table} cannot be opened: {}", row.text(3))));
        }
        let sql = format!("SELECT * FROM {}.{} LIMIT 1", quoted(&schema), quoted(&table));
        session.rows(&sql).map_err(|e| match e {
            // It takes long, or the server has gone: not what a table that cannot be read is answered by.
            SqlError::Lost(_) => e.failure(&format!("read the first row of {schema}.{table}")),
            SqlError::Server { .. } => unhealthy(format!("the first row of {schema}.{table}: {e}")),
        })?;
        tables_read += 1;
    }
    if tables_read == 0 {
        return Err(unhealthy(
            "the account sees no table; it needs SELECT on *.* in the clone as well".to_owned(),
        ));
    }
    Ok(ServerHealth { version, schemas: present.len() as u64, tables_read })
}

fn texts(session: &mut Session, sql: &str) -> Result<Vec<String>, Failure> {
    let rows = session.rows(sql).map_err(|e| e.failure("ask the server"))?;
    Ok(rows.iter().map(|row: &Row| row.text(0)).collect())
}

fn quoted(name: &str) -> String {
    format!("`{}`", name.replace('`', "``"))
}

fn unhealthy(why: String) -> Failure {
    Failure::precondition("SERVER_NOT_HEALTHY", why)
}

/// What a server says of itself that decides whether its data can be replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replaceable {
    /// Whether it is a node of a Galera cluster.
    pub is_galera: bool,
    /// Whether it is a member of a group (Group Replication), or is joining one.
    pub is_in_group: bool,
    /// Directories that it does not take for schemas (ignore_db_dirs); `None` of MySQL, which has no such
    /// variable.
    pub ignored_directories: Option<Vec<String>>,
    /// Whether it takes no writes but a replica's.
    pub is_read_only: bool,
}

/// Asks a server that runs on the data that are to be replaced.
pub fn ask_replaceable(config: &DatabaseConfig) -> Result<Replaceable, Failure> {
    let mut session = Server::new(config)?.connect()?;
    let rows = session
        .rows(
            "SHOW GLOBAL VARIABLES WHERE Variable_name IN \
             ('wsrep_on', 'group_replication_group_name', 'ignore_db_dirs', 'read_only', \
              'super_read_only')",
        )
        .map_err(|e| e.failure("ask the server"))?;
    let mut found = Replaceable::default();
    let mut has_group_plugin = false;
    for row in &rows {
        let value = row.text(1);
        match row.text(0).as_str() {
            "wsrep_on" => found.is_galera = value.eq_ignore_ascii_case("ON"),
            "group_replication_group_name" => has_group_plugin = true,
            "ignore_db_dirs" => {
                found.ignored_directories = Some(value.split(',').map(str::to_owned).collect());
            }
            // MariaDB has more words for it than ON.
            "read_only" | "super_read_only" => {
                found.is_read_only |= !value.eq_ignore_ascii_case("OFF");
            }
            _ => {}
        }
    }
    if has_group_plugin {
        let members = texts(
            &mut session,
            "SELECT MEMBER_STATE FROM performance_schema.replication_group_members",
        )?;
        found.is_in_group = members.iter().any(|state| !state.is_empty() && state != "OFFLINE");
    }
    Ok(found)
}
