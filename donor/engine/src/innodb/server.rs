//! The SQL side: connections, what the server answers, what it does not let this account do.

mod variables;

use std::{fmt, path::PathBuf, time::Duration};

use ::mysql::{
    Conn,
    DriverError::{
        CleartextPluginDisabled, OldMysqlPasswordDisabled, UnexpectedPacket, UnknownAuthPlugin,
    },
    Opts, OptsBuilder,
    prelude::Queryable as _,
};
use marcot_common::failure::Failure;
use tonic::Code;

pub(super) use self::variables::{Facts, lost_lineage};
use super::{flavor::Flavor, mariadb, mysql};
use crate::observer::Observer;

/// Longest wait for an answer that takes no lock. Status and variables come from memory.
const ANSWER_MAX: Duration = Duration::from_secs(30);

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
    observer: Observer,
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
        let observer = Observer::default();
        Ok(Self { opts: builder.into(), shown, allow_untested_version, observer })
    }

    /// The same, telling of what its users wait for.
    pub(super) fn observed_by(self, observer: Observer) -> Self {
        Self { observer, ..self }
    }

    /// Who is told.
    pub(super) fn observer(&self) -> &Observer {
        &self.observer
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
        let conn = Conn::new(opts).map_err(|error| match error {
            // The password was wrong for the first of an account's ways, and the server asks for the next.
            ::mysql::Error::DriverError(UnexpectedPacket) => {
                let message = "the account has more than one way to log in".to_owned();
                SqlError::Server { code: WAY_NOT_KNOWN, message }
            }
            error => SqlError::of(error),
        })?;
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
            ::mysql::Error::MySqlError(e) if NOT_NOW.contains(&e.code) => Failure::new(
                Code::Unavailable,
                "DATABASE_UNREACHABLE",
                format!(
                    "the database at {} takes no connection now: error {}: {}",
                    self.shown, e.code, e.message
                ),
            )
            .mysql(e.code.into())
            .retry_after(Duration::from_secs(10)),
            ::mysql::Error::DriverError(
                e @ (UnknownAuthPlugin(_) | CleartextPluginDisabled | OldMysqlPasswordDisabled),
            ) => Failure::precondition(
                "DATABASE_ACCESS_DENIED",
                format!(
                    "log in to the database at {}: {e}; check --database-user, whose account must be \
                     known by mysql_native_password, ed25519 or caching_sha2_password",
                    self.shown
                ),
            )
            .mysql(1045),
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

/// What a server answers that takes no connection just now: too many of all or of this user
/// (ER_CON_COUNT_ERROR, ER_TOO_MANY_USER_CONNECTIONS, ER_USER_LIMIT_REACHED), or on its way down.
pub(super) const NOT_NOW: [u16; 5] = [1040, 1053, 1203, 1226, 1927];

/// A way to log in that is not ours, as MySQL's clients number it (CR_AUTH_PLUGIN_CANNOT_LOAD).
pub(super) const WAY_NOT_KNOWN: u16 = 2059;

impl SqlError {
    fn of(error: ::mysql::Error) -> Self {
        match error {
            ::mysql::Error::MySqlError(e) if ENDS_CONNECTION.contains(&e.code) => {
                Self::Lost(format!("error {}: {}", e.code, e.message))
            }
            ::mysql::Error::MySqlError(e) => Self::Server { code: e.code, message: e.message },
            ::mysql::Error::DriverError(
                e @ (UnknownAuthPlugin(_) | CleartextPluginDisabled | OldMysqlPasswordDisabled),
            ) => Self::Server { code: WAY_NOT_KNOWN, message: e.to_string() },
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

    /// Gives each row to `look`; none but that one is held.
    pub(super) fn each_row(
        &mut self,
        sql: &str,
        mut look: impl FnMut(&Row),
    ) -> Result<(), SqlError> {
        for row in self.conn.query_iter(sql).map_err(SqlError::of)? {
            look(&Row::of(row.map_err(SqlError::of)?));
        }
        Ok(())
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

/// Fails unless the account may do all that a clone needs, on whichever server it is.
pub(super) fn check_privileges(session: &mut Session) -> Result<(), Failure> {
    let version = session.row("SELECT VERSION()").map_err(|e| e.failure("ask the server"))?;
    match Flavor::of_version(&version.map(|row| row.text(0)).unwrap_or_default()) {
        Flavor::MariaDb => mariadb::privileges::check_privileges(session),
        Flavor::MySql => mysql::server::check_privileges(session),
    }
}
