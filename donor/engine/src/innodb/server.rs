//! The SQL side: connections, what the server says of itself, what it does not let this account do.

use std::{collections::HashSet, fmt, path::PathBuf, time::Duration};

use ::mysql::{Conn, Opts, OptsBuilder, prelude::Queryable as _};
use marcot_common::failure::Failure;
use tonic::Code;

use super::{flavor::Flavor, mariadb, mysql};

/// Longest wait for an answer that takes no lock. Status and variables come from memory.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Versions whose copies have been tested: (major, minor).
const MARIADB_VERSIONS: &[(u16, u16)] = &[(10, 11), (11, 8)];
const MYSQL_VERSIONS: &[(u16, u16)] = &[(9, 7)];

/// The first version of MySQL whose redo log is the one that is known here: (major, minor, patch).
const MYSQL_FIRST: (u16, u16, u16) = (8, 0, 30);

/// How to reach the database.
#[derive(Clone, Default)]
pub struct DatabaseConfig {
    /// Its Unix socket.
    pub socket: Option<PathBuf>,
    /// Or a URL, `mysql://user@127.0.0.1:3306`; over TCP on this host only.
    pub url: Option<String>,
    /// Account.
    pub user: Option<String>,
    /// Its password.
    pub password: Option<String>,
    /// Take a MySQL server of a version that no test has run.
    pub allow_untested_version: bool,
}

impl fmt::Debug for DatabaseConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A URL may hold a password as well.
        f.debug_struct("DatabaseConfig").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// Opens connections.
#[derive(Clone)]
pub(super) struct Server {
    opts: Opts,
    shown: String,
    allow_untested_version: bool,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Server({})", self.shown)
    }
}

impl Server {
    /// Checks how the database is to be reached.
    pub(super) fn new(config: &DatabaseConfig) -> Result<Self, Failure> {
        let missing = || {
            Failure::invalid(
                "NO_DATABASE",
                "engine innodb talks to the server: give --database-socket or --database-url",
            )
        };
        let (mut builder, shown) = match (&config.socket, &config.url) {
            (Some(socket), _) => {
                let text = socket.display().to_string();
                (OptsBuilder::new().socket(Some(text.clone())), text)
            }
            (None, Some(url)) => {
                // The URL itself is not shown: it may hold a password.
                let opts = Opts::from_url(url).map_err(|e| {
                    Failure::invalid("BAD_DATABASE_URL", format!("--database-url: {e}"))
                })?;
                let host = opts.get_ip_or_hostname().to_string();
                if opts.get_socket().is_none() && !opts.addr_is_loopback() {
                    let text = format!(
                        "--database-url names host {host}, only this host's loopback is allowed: the \
                         donor runs beside the server, whose files it reads"
                    );
                    return Err(Failure::invalid("BAD_DATABASE_URL", text));
                }
                let shown = format!("{host}:{}", opts.get_tcp_port());
                (OptsBuilder::from_opts(opts), shown)
            }
            (None, None) => return Err(missing()),
        };
        if config.user.is_some() {
            builder = builder.user(config.user.clone());
        }
        if config.password.is_some() {
            builder = builder.pass(config.password.clone());
        }
        let builder = builder
            .prefer_socket(false)
            .tcp_connect_timeout(Some(Duration::from_secs(10)))
            .write_timeout(Some(ANSWER_MAX))
            .stmt_cache_size(0);
        let allow_untested_version = config.allow_untested_version;
        Ok(Self { opts: builder.into(), shown, allow_untested_version })
    }

    /// Opens a connection whose answers are awaited for up to `answer_max`.
    pub(super) fn connect_for(&self, answer_max: Duration) -> Result<Session, Failure> {
        let opts = OptsBuilder::from_opts(self.opts.clone()).read_timeout(Some(answer_max));
        let conn = Conn::new(opts).map_err(|error| self.unreachable(&error))?;
        Ok(Session { conn, shown: self.shown.clone() })
    }

    /// Opens a connection as another user than the donor's own.
    pub(super) fn connect_as(
        &self,
        user: &str,
        password: &str,
        answer_max: Duration,
    ) -> Result<Session, SqlError> {
        let opts = OptsBuilder::from_opts(self.opts.clone())
            .user(Some(user))
            .pass(Some(password))
            .read_timeout(Some(answer_max));
        let conn = Conn::new(opts).map_err(SqlError::of)?;
        Ok(Session { conn, shown: self.shown.clone() })
    }

    /// Opens a connection.
    pub(super) fn connect(&self) -> Result<Session, Failure> {
        self.connect_for(ANSWER_MAX)
    }

    /// Whether a MySQL server may be of a version that no test has run.
    pub(super) fn allows_untested_version(&self) -> bool {
        self.allow_untested_version
    }

    fn unreachable(&self, error: &::mysql::Error) -> Failure {
        match error {
            ::mysql::Error::MySqlError(e) => Failure::precondition(
                "DATABASE_ACCESS_DENIED",
                format!(
                    "log in to the database at {}: error {}: {}; check --database-user and \
                     --database-password-file",
                    self.shown, e.code, e.message
                ),
            )
            .mysql(1045),
            other => Failure::new(
                Code::Unavailable,
                "DATABASE_UNREACHABLE",
                format!(
                    "connect to the database at {}: {other}; is the server running?",
                    self.shown
                ),
            )
            .mysql(2002)
            .retry_after(Duration::from_secs(10)),
        }
    }
}

/// One connection.
pub(super) struct Session {
    conn: Conn,
    shown: String,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({})", self.shown)
    }
}

/// What the server answered to a statement.
#[derive(Debug, thiserror::Error)]
pub(super) enum SqlError {
    /// An error of the server's own.
    #[error("error {code}: {message}")]
    Server {
        /// MySQL's number.
        code: u16,
        /// Its text.
        message: String,
    },
    /// The connection has ended: the server is gone, or has dropped it.
    #[error("{0}")]
    Lost(String),
}

/// What a server that is being shut down, or an operator's KILL, answers before it hangs up:
/// ER_SERVER_SHUTDOWN, ER_CONNECTION_KILLED.
const ENDS_CONNECTION: [u16; 2] = [1053, 1927];

impl SqlError {
    fn of(error: ::mysql::Error) -> Self {
        match error {
            ::mysql::Error::MySqlError(e) if ENDS_CONNECTION.contains(&e.code) => {
                Self::Lost(format!("error {}: {}", e.code, e.message))
            }
            ::mysql::Error::MySqlError(e) => Self::Server { code: e.code, message: e.message },
            other => Self::Lost(other.to_string()),
        }
    }

    /// Whether a lock could not be had in time (1205) or is another backup's.
    pub(super) fn is_lock_timeout(&self) -> bool {
        matches!(self, Self::Server { code: 1205 | 1213, .. })
    }

    /// As a failure of `action`.
    pub(super) fn failure(&self, action: &str) -> Failure {
        match self {
            // For a table it is 1142, for a function 1370.
            Self::Server { code: code @ (1227 | 1142 | 1370), message } => Failure::precondition(
                "DATABASE_PRIVILEGE_MISSING",
                format!(
                    "{action}: {message}; grant it to the donor's account (docs/operations.md lists \
                     all that it needs)"
                ),
            )
            .mysql((*code).into()),
            Self::Server { code, message } => Failure::precondition(
                "DATABASE_ERROR",
                format!("{action}: the server answered error {code}: {message}"),
            )
            .mysql((*code).into()),
            Self::Lost(text) => Failure::new(
                Code::Unavailable,
                "DATABASE_LOST",
                format!("{action}: the connection to the database was lost: {text}"),
            )
            .mysql(2013),
        }
    }
}

/// Log sequence numbers of one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Lsn {
    /// End of what has been generated.
    pub(super) current: u64,
    /// End of what is on the disk.
    pub(super) flushed: u64,
    /// The last checkpoint.
    pub(super) checkpoint: u64,
}

impl Session {
    /// The connection's id in the server.
    pub(super) fn id(&self) -> u32 {
        self.conn.connection_id()
    }

    /// Runs a statement that gives no rows.
    pub(super) fn execute(&mut self, sql: &str) -> Result<(), SqlError> {
        self.conn.query_drop(sql).map_err(SqlError::of)
    }

    /// All rows, each as its column names and values; NULL is `None`.
    pub(super) fn rows(&mut self, sql: &str) -> Result<Vec<Row>, SqlError> {
        let rows: Vec<::mysql::Row> = self.conn.query(sql).map_err(SqlError::of)?;
        Ok(rows.into_iter().map(Row::of).collect())
    }

    /// The first row.
    pub(super) fn row(&mut self, sql: &str) -> Result<Option<Row>, SqlError> {
        Ok(self.rows(sql)?.into_iter().next())
    }

    /// InnoDB's log sequence numbers.
    pub(super) fn lsn(&mut self) -> Result<Lsn, SqlError> {
        let rows = self.rows(
            "SHOW GLOBAL STATUS WHERE Variable_name IN ('Innodb_lsn_current', 'Innodb_lsn_flushed', \
             'Innodb_lsn_last_checkpoint', 'Innodb_redo_log_current_lsn', \
             'Innodb_redo_log_flushed_to_disk_lsn', 'Innodb_redo_log_checkpoint_lsn')",
        )?;
        let mut lsn = Lsn::default();
        for row in rows {
            let value = row.number(1);
            match row.text(0).to_ascii_lowercase().as_str() {
                "innodb_lsn_current" | "innodb_redo_log_current_lsn" => lsn.current = value,
                "innodb_lsn_flushed" | "innodb_redo_log_flushed_to_disk_lsn" => lsn.flushed = value,
                "innodb_lsn_last_checkpoint" | "innodb_redo_log_checkpoint_lsn" => {
                    lsn.checkpoint = value
                }
                _ => {}
            }
        }
        Ok(lsn)
    }

    /// Ids of the tablespaces that the server has open or knows. A file of any other id is one
    /// that the server does not write, such as one about to be imported.
    pub(super) fn tablespace_ids(&mut self, flavor: Flavor) -> Result<HashSet<u32>, SqlError> {
        let rows = self.rows(match flavor {
            Flavor::MariaDb => "SELECT SPACE FROM information_schema.INNODB_SYS_TABLESPACES",
            // The system's own is not among them.
            Flavor::MySql => {
                "SELECT SPACE FROM information_schema.INNODB_TABLESPACES UNION SELECT 0"
            }
        })?;
        Ok(rows.iter().filter_map(|row| u32::try_from(row.number(0)).ok()).collect())
    }
}

/// A row of text.
#[derive(Debug)]
pub(super) struct Row {
    columns: Vec<(String, Option<Vec<u8>>)>,
}

impl Row {
    fn of(row: ::mysql::Row) -> Self {
        let names: Vec<String> =
            row.columns_ref().iter().map(|c| c.name_str().into_owned()).collect();
        let values = row.unwrap().into_iter().map(|value| match value {
            ::mysql::Value::NULL => None,
            ::mysql::Value::Bytes(bytes) => Some(bytes),
            ::mysql::Value::Int(n) => Some(n.to_string().into_bytes()),
            ::mysql::Value::UInt(n) => Some(n.to_string().into_bytes()),
            other => Some(other.as_sql(true).into_bytes()),
        });
        Self { columns: names.into_iter().zip(values).collect() }
    }

    /// A column by number; empty when it is NULL or not there.
    pub(super) fn bytes(&self, column: usize) -> &[u8] {
        self.columns.get(column).and_then(|(_, value)| value.as_deref()).unwrap_or_default()
    }

    /// As text.
    pub(super) fn text(&self, column: usize) -> String {
        String::from_utf8_lossy(self.bytes(column)).into_owned()
    }

    /// As a number; 0 when it is none.
    pub(super) fn number(&self, column: usize) -> u64 {
        self.text(column).trim().parse().unwrap_or(0)
    }

    /// A column by name, in any case.
    pub(super) fn named(&self, name: &str) -> String {
        let index = self.columns.iter().position(|(n, _)| n.eq_ignore_ascii_case(name));
        index.map(|index| self.text(index)).unwrap_or_default()
    }
}

/// What the server is, as far as a copy depends on it.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// Kind of server.
    pub(super) flavor: Flavor,
    /// Version string.
    pub(super) version: String,
    /// `server_uid`: the same for one installation.
    pub(super) server_uid: String,
    /// `server_id`.
    pub(super) server_id: u32,
    /// Page size, bytes.
    pub(super) page_size: u32,
    /// Whether a binary log is written.
    pub(super) has_binlog: bool,
    /// All variables asked for, by name.
    pub(super) variables: Vec<(String, String)>,
}

/// Variables that say where files are, or what the copy is.
const VARIABLES: &[&str] = &[
    "version",
    "server_uid",
    "server_uuid",
    "server_id",
    "log_bin",
    "datadir",
    "innodb_page_size",
    "innodb_data_home_dir",
    "innodb_data_file_path",
    "innodb_temp_data_file_path",
    "innodb_log_group_home_dir",
    "innodb_undo_directory",
    "innodb_buffer_pool_filename",
    "aria_log_dir_path",
    "log_bin_basename",
    "log_bin_index",
    "relay_log",
    "relay_log_basename",
    "relay_log_index",
    "relay_log_info_file",
    "general_log_file",
    "slow_query_log_file",
    "log_error",
    "pid_file",
    "socket",
    "tmpdir",
    "innodb_tmpdir",
    "slave_load_tmpdir",
    "character_set_server",
    "collation_server",
    "wsrep_on",
    "innodb_encrypt_log",
    "ignore_db_dirs",
    "lower_case_table_names",
    "replica_load_tmpdir",
    "innodb_temp_tablespaces_dir",
    "innodb_redo_log_encrypt",
    "binlog_encryption",
    "gtid_mode",
    "version_compile_os",
    "version_compile_machine",
    "character_set_filesystem",
    "innodb_undo_tablespaces",
    "max_allowed_packet",
    "read_only",
    "super_read_only",
    "plugin_dir",
];

impl Facts {
    /// Asks the server, and refuses one that this engine does not know, with all that is wrong.
    pub(super) fn ask(server: &Server, session: &mut Session) -> Result<Self, Failure> {
        let facts = Self::read(session)?;
        match Failure::all_of(facts.problems(server.allows_untested_version())) {
            Some(failure) => Err(failure),
            None => Ok(facts),
        }
    }

    /// Asks whatever server it is.
    pub(super) fn read(session: &mut Session) -> Result<Self, Failure> {
        let failed = |e: SqlError| e.failure("ask for the server's variables");
        let names: Vec<String> = VARIABLES.iter().map(|name| format!("'{name}'")).collect();
        let sql = format!("SHOW GLOBAL VARIABLES WHERE Variable_name IN ({})", names.join(","));
        let rows = session.rows(&sql).map_err(failed)?;
        let lower = |row: &Row| (row.text(0).to_ascii_lowercase(), row.text(1));
        Ok(Self::of(rows.iter().map(lower).collect()))
    }

    fn of(variables: Vec<(String, String)>) -> Self {
        let mut facts = Self {
            flavor: Flavor::MariaDb,
            version: String::new(),
            server_uid: String::new(),
            server_id: 0,
            page_size: 0,
            has_binlog: false,
            variables,
        };
        facts.version = facts.variable("version").to_owned();
        facts.flavor = Flavor::of_version(&facts.version);
        facts.server_uid = match facts.flavor {
            Flavor::MariaDb => facts.variable("server_uid").to_owned(),
            Flavor::MySql => facts.variable("server_uuid").to_owned(),
        };
        facts.server_id = facts.variable("server_id").parse().unwrap_or(0);
        facts.page_size = facts.variable("innodb_page_size").parse().unwrap_or(0);
        facts.has_binlog = facts.variable("log_bin") == "ON";
        facts
    }

    /// A variable; empty when the server has none of that name.
    pub(super) fn variable(&self, name: &str) -> &str {
        self.variables.iter().find(|(n, _)| n == name).map_or("", |(_, value)| value)
    }

    /// Fails unless the server is the one whose answers these were: another one's pages and log say
    /// nothing of the same database. A snapshot of it is another snapshot.
    pub(super) fn check_lineage(&self, now: &Self) -> Result<(), Failure> {
        for name in
            ["server_uid", "server_uuid", "server_id", "version", "innodb_page_size", "log_bin"]
        {
            let (then, now) = (self.variable(name), now.variable(name));
            if then != now {
                return Err(lost_lineage(format!("its {name} was `{then}` and is `{now}`")));
            }
        }
        Ok(())
    }

    /// All that this engine does not clone about it.
    pub(super) fn problems(&self, allow_untested_version: bool) -> Vec<Failure> {
        let mut problems: Vec<Failure> =
            self.check_version(allow_untested_version).err().into_iter().collect();
        if self.flavor == Flavor::MySql {
            problems.extend(mysql::server::problems(self));
        }
        if self.variable("wsrep_on").eq_ignore_ascii_case("ON") {
            problems.push(Failure::precondition(
                "GALERA",
                "the server is a node of a Galera cluster (wsrep_on=ON), which this engine does not \
                 clone; clone an asynchronous replica instead",
            ));
        }
        if !matches!(self.page_size, 4096 | 8192 | 16384 | 32768 | 65536) {
            let text = format!("innodb_page_size is {}", self.page_size);
            problems.push(Failure::precondition("UNSUPPORTED_PAGE_SIZE", text));
        }
        problems
    }

    fn check_version(&self, allow_untested: bool) -> Result<(), Failure> {
        let version = parse_version(&self.version);
        let tested = match self.flavor {
            Flavor::MariaDb => MARIADB_VERSIONS,
            Flavor::MySql => MYSQL_VERSIONS,
        };
        if version.is_some_and(|(major, minor, _)| tested.contains(&(major, minor))) {
            return Ok(());
        }
        let is_near = self.flavor == Flavor::MySql && version >= Some(MYSQL_FIRST);
        if is_near && allow_untested {
            tracing::warn!(version = %self.version, "no test has run this version of MySQL");
            return Ok(());
        }
        let next = match is_near {
            true => "; it may be tried with --allow-untested-version",
            false => "",
        };
        Err(Failure::precondition(
            "UNSUPPORTED_SERVER_VERSION",
            format!(
                "the server is `{}`; engine innodb knows MariaDB 10.11 and 11.8, and MySQL 9.7{next}",
                self.version
            ),
        ))
    }
}

/// The server is not, or not as, the one that a snapshot was opened of.
pub(super) fn lost_lineage(why: String) -> Failure {
    Failure::new(
        Code::NotFound,
        "UNKNOWN_SNAPSHOT",
        format!("the server was exchanged while it was cloned: {why}; it needs another snapshot"),
    )
}

/// Fails unless the account may do all that a clone needs, on whichever server it is.
pub(super) fn check_privileges(session: &mut Session) -> Result<(), Failure> {
    let version = session.row("SELECT VERSION()").map_err(|e| e.failure("ask the server"))?;
    match Flavor::of_version(&version.map(|row| row.text(0)).unwrap_or_default()) {
        Flavor::MariaDb => mariadb::privileges::check_privileges(session),
        Flavor::MySql => mysql::server::check_privileges(session),
    }
}

/// Major, minor and patch number.
fn parse_version(version: &str) -> Option<(u16, u16, u16)> {
    let mut parts = version.split(['.', '-']);
    let mut part = || parts.next()?.parse().ok();
    Some((part()?, part()?, part().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a server answers, with one variable changed.
    fn facts(name: &str, value: &str) -> Result<Facts, Failure> {
        let all = [
            ("version", "10.11.14-MariaDB-0+deb12u2-log"),
            ("server_uid", "uid-a"),
            ("server_id", "1"),
            ("log_bin", "ON"),
            ("innodb_page_size", "16384"),
            ("wsrep_on", "OFF"),
        ];
        let changed = |(n, v): (&str, &str)| {
            (n.to_owned(), if n == name { value.to_owned() } else { v.to_owned() })
        };
        let facts = Facts::of(all.map(changed).to_vec());
        Failure::all_of(facts.problems(false)).map_or(Ok(facts), Err)
    }

    /// Guards the list of versions: the log and the pages of any other were never tried.
    #[test]
    fn a_server_of_another_version_is_refused_with_both_values() {
        for version in ["10.11.14-MariaDB", "11.8.3-MariaDB-ubu"] {
            assert!(facts("version", version).is_ok(), "{version}");
        }
        for version in ["10.6.22-MariaDB", "10.12.1-MariaDB", "11.4.7-MariaDB", "10.11.1", "x", ""]
        {
            let failure = facts("version", version).unwrap_err();
            assert_eq!(failure.reason, "UNSUPPORTED_SERVER_VERSION", "{version}");
            for text in [version, "10.11 and 11.8"] {
                assert!(failure.message.contains(text), "{failure}");
            }
        }
    }

    /// Guards the refusal of a cluster's node: its write sets are in no binary log position.
    #[test]
    fn a_node_of_a_galera_cluster_is_refused() {
        assert_eq!(facts("wsrep_on", "ON").unwrap_err().reason, "GALERA");
    }

    #[test]
    fn a_page_size_that_innodb_does_not_have_is_refused() {
        let failure = facts("innodb_page_size", "1024").unwrap_err();
        assert_eq!(failure.reason, "UNSUPPORTED_PAGE_SIZE", "{failure}");
        assert!(failure.message.contains("1024"), "{failure}");
    }

    /// Guards R6: pages and redo of two servers, or of two configurations, are never put together.
    #[test]
    fn a_server_that_took_the_place_of_another_needs_another_snapshot() {
        let then = facts("", "").unwrap();
        assert!(then.check_lineage(&facts("", "").unwrap()).is_ok());
        for (name, value) in [
            ("server_uid", "uid-b"),
            ("server_id", "2"),
            ("version", "10.11.15-MariaDB"),
            ("log_bin", "OFF"),
            ("innodb_page_size", "8192"),
        ] {
            let failure = then.check_lineage(&facts(name, value).unwrap()).unwrap_err();
            assert_eq!(failure.reason, "UNKNOWN_SNAPSHOT", "{name}");
            for text in [name, value, then.variable(name)] {
                assert!(failure.message.contains(text), "{failure}");
            }
        }
    }
}
