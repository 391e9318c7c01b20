//! Real MariaDB and MySQL servers on data directories of their own, reached by their sockets.

use std::{
    fs::File,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use ::mysql::{Conn, OptsBuilder, prelude::Queryable as _};

use crate::{mariadb, mysql, wait_for};

/// A server program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    /// Debian 12's own, from a tree as well.
    #[default]
    V10_11,
    /// Debian trixie's, from the tree that `tests/tools/server_tree.sh` makes.
    V11_8,
    /// MySQL, from Debian sid's tree.
    MySql9_7,
}

/// Both versions of MariaDB that engine innodb knows.
pub const VERSIONS: [Version; 2] = [Version::V10_11, Version::V11_8];

impl Version {
    /// Whether it is MySQL.
    #[must_use]
    pub fn is_mysql(self) -> bool {
        self == Self::MySql9_7
    }

    /// What `tests/tools/server_tree.sh` has made for this version.
    pub(crate) fn tree(self) -> PathBuf {
        let name = match self {
            Self::V10_11 => "mariadb-bookworm",
            Self::V11_8 => "mariadb-trixie",
            Self::MySql9_7 => "mysql-sid",
        };
        // Absolute: MySQL's server changes its directory.
        let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/servers").join(name);
        tree.canonicalize().unwrap_or(tree)
    }

    pub(crate) fn share(self) -> PathBuf {
        match self {
            Self::V10_11 | Self::MySql9_7 => self.tree().join("usr/share/mysql"),
            Self::V11_8 => self.tree().join("usr/share/mariadb"),
        }
    }

    /// Runs a program that prints binary logs; that of the older MariaDB runs on this machine.
    #[must_use]
    pub fn binlog_command(self) -> Command {
        match self {
            Self::MySql9_7 => self.program("usr/bin/mysqlbinlog"),
            _ => Command::new(Self::V10_11.tree().join("usr/bin/mariadb-binlog")),
        }
    }

    /// A program of the tree.
    pub(crate) fn program(self, path: &str) -> Command {
        let tree = self.tree();
        // The tree's own loader and libraries: its glibc may be newer than this machine's. Before
        // trixie the loader and some libraries were not below usr.
        let loader = ["usr/lib64", "lib64", "lib/x86_64-linux-gnu"]
            .map(|directory| tree.join(directory).join("ld-linux-x86-64.so.2"))
            .into_iter()
            .find(|path| path.exists())
            .expect("the tree has a loader: `make test` makes the tree");
        let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"]
            .map(|directory| tree.join(directory).display().to_string());
        let mut command = Command::new(loader);
        command.arg("--library-path").arg(libraries.join(":")).arg(tree.join(path));
        command
    }

    fn command(self) -> Command {
        let mut command = match self {
            Self::V10_11 | Self::V11_8 => self.program("usr/sbin/mariadbd"),
            Self::MySql9_7 => self.program("usr/sbin/mysqld"),
        };
        command.args(["--no-defaults", "--user=root"]);
        command.arg(format!("--lc-messages-dir={}", self.share().display()));
        let plugins = self.tree().join("usr/lib/mysql/plugin");
        command.arg(format!("--plugin-dir={}", plugins.display()));
        if self.is_mysql() {
            mysql::complete(self, &mut command);
        }
        command
    }
}

/// How a server runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which server.
    pub version: Version,
    /// More arguments of mariadbd; those that concern files are needed at the bootstrap too.
    pub arguments: Vec<String>,
    /// Whether accounts are asked for; root needs no password.
    pub accounts: bool,
    /// A TCP port on loopback, for replication.
    pub port: Option<u16>,
}

impl Default for Options {
    fn default() -> Self {
        Self { version: Version::V10_11, arguments: Vec::new(), accounts: false, port: None }
    }
}

impl Options {
    /// Of a version, with accounts, a binary log and more arguments: what a primary is.
    #[must_use]
    pub fn primary(version: Version, arguments: &[&str]) -> Self {
        let mut all = vec!["--log-bin=bin".to_owned(), "--server-id=1".to_owned()];
        if version.is_mysql() {
            all.extend(["--gtid-mode=ON", "--enforce-gtid-consistency=ON"].map(str::to_owned));
        }
        // Durability is not what most rows are about, and two cores are slow enough.
        all.extend(["--innodb-flush-log-at-trx-commit=2", "--sync-binlog=0"].map(str::to_owned));
        all.extend(arguments.iter().map(ToString::to_string));
        Self { version, arguments: all, accounts: true, port: Some(free_port()) }
    }

    /// As this one, with other arguments after its own.
    #[must_use]
    pub fn with(&self, arguments: &[&str]) -> Self {
        let mut other = self.clone();
        other.arguments.extend(arguments.iter().map(ToString::to_string));
        other
    }

    /// The same server for a clone: another id and port.
    #[must_use]
    pub fn for_clone(&self) -> Self {
        let skip =
            if self.version.is_mysql() { "--skip-replica-start" } else { "--skip-slave-start" };
        let mut other = self.with(&["--server-id=2", skip]);
        other.port = self.port.map(|_| free_port());
        other
    }
}

/// A port that was free a moment ago, below those that the system gives to whoever asks for any:
/// a daemon that starts meanwhile would take it.
#[must_use]
pub fn free_port() -> u16 {
    const FIRST: u32 = 12_000;
    const COUNT: u32 = 20_000;
    loop {
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + std::process::id().wrapping_mul(61).wrapping_add(number * 7) % COUNT;
        let port = u16::try_from(port).expect("below 32768");
        // Kept for this process's life: others look while this one's server is down.
        let name = SocketAddr::from_abstract_name(format!("marcot-port-{port}")).expect("short");
        let Ok(held) = UnixListener::bind_addr(&name) else { continue };
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            PORTS.lock().expect("no holder panics").push(held);
            return port;
        }
    }
}

/// A running server; it is killed when it is dropped.
#[derive(Debug)]
pub struct Database {
    version: Version,
    child: Child,
    data_directory: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    /// Its TCP port.
    pub port: Option<u16>,
}

/// Makes an empty data directory for a server that will run with `options`.
pub fn install_with(data_directory: &Path, options: &Options) {
    if options.version.is_mysql() {
        mysql::install(data_directory, options);
    } else {
        mariadb::install_with(data_directory, options);
    }
}

pub(crate) fn command(data_directory: &Path, options: &Options) -> Command {
    let mut command = options.version.command();
    // Servers that share one directory for temporary tables remove each other's.
    let temporary = data_directory.with_extension("tmp");
    std::fs::create_dir_all(&temporary).expect("writable");
    command
        .arg(format!("--tmpdir={}", temporary.display()))
        .arg("--innodb-buffer-pool-size=64M")
        .args(match options.version {
            Version::MySql9_7 => mysql::SIZES,
            _ => mariadb::SIZES,
        })
        .arg(format!("--datadir={}", data_directory.display()))
        .args(&options.arguments);
    command
}

/// Program and arguments of a server for others to run.
#[must_use]
pub fn command_line(data_directory: &Path, options: &Options, socket: &Path) -> Vec<String> {
    let mut command = command(data_directory, options);
    if !options.accounts {
        command.arg("--skip-grant-tables");
    }
    match options.port {
        Some(port) => command.args(["--bind-address=127.0.0.1", &format!("--port={port}")]),
        None => command.arg("--skip-networking"),
    };
    command.arg(format!("--socket={}", socket.display()));
    let pid_file = data_directory.with_extension("pid");
    command.arg(format!("--pid-file={}", pid_file.display()));
    let program = std::iter::once(command.get_program());
    program.chain(command.get_args()).map(|text| text.to_string_lossy().into_owned()).collect()
}

/// A path for a socket: at most 107 bytes, and the build's directory may be deep.
#[must_use]
pub fn new_socket() -> PathBuf {
    let number = STARTED.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("m{}-{number}.sock", std::process::id()))
}

/// Asks whatever server listens on a socket, as root; rows come tab-separated.
pub fn ask(socket: &Path, sql: &str) -> Result<String, String> {
    let output = Command::new("mariadb")
        .args(["--no-defaults", "--batch", "--skip-column-names", "--user=root"])
        // A server that hangs while it starts takes connections and greets nobody.
        .arg("--connect-timeout=30")
        .arg(format!("--socket={}", socket.display()))
        .arg(format!("--execute={sql}"))
        .output()
        .expect("mariadb is there: `make test` installs mariadb-client-core");
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

/// Rows 1 to `count` of a column `seq`, to select from. MySQL has no such engine: `prepare` fills a
/// table.
#[must_use]
pub fn sequence(version: Version, count: u64) -> String {
    match version {
        Version::MySql9_7 => {
            format!("(SELECT seq FROM mix.numbers WHERE seq <= {count}) AS numbers")
        }
        _ => format!("mysql.seq_1_to_{count}"),
    }
}

/// Makes each socket's name another one.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// Names of the ports that this process has.
static PORTS: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

impl Database {
    /// Starts a server and waits until it answers. Its socket and log go to `home`.
    #[must_use]
    pub fn start(home: &Path, data_directory: &Path) -> Self {
        Self::start_with(home, data_directory, &Options::default())
    }

    /// As `start`, with options.
    #[must_use]
    pub fn start_with(home: &Path, data_directory: &Path, options: &Options) -> Self {
        let mut server = Self::spawn(home, data_directory, options);
        server.wait_for_answer();
        server
    }

    /// Starts the server again, which has been killed or stopped, on the same socket and port.
    pub fn start_again(&mut self, home: &Path, options: &Options) {
        let mut again = Self::spawn_on(home, &self.data_directory, options, self.socket.clone());
        std::mem::swap(&mut self.child, &mut again.child);
        std::mem::swap(&mut self.log, &mut again.log);
        // What is dropped removes its socket, and this one is in use.
        again.socket = PathBuf::new();
        drop(again);
        self.wait_for_answer();
    }

    fn wait_for_answer(&mut self) {
        wait_for("mariadbd to answer", || {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                panic!("mariadbd ended with {status}:\n{}", self.log());
            }
            self.try_query("SELECT 1").ok()
        });
    }

    fn spawn(home: &Path, data_directory: &Path, options: &Options) -> Self {
        Self::spawn_on(home, data_directory, options, new_socket())
    }

    fn spawn_on(home: &Path, data_directory: &Path, options: &Options, socket: PathBuf) -> Self {
        let number = STARTED.load(Ordering::Relaxed);
        let log = home.join(format!("mariadbd-{number}.log"));
        let mut command = command(data_directory, options);
        if !options.accounts {
            command.arg("--skip-grant-tables");
        }
        match options.port {
            Some(port) => command.args(["--bind-address=127.0.0.1", &format!("--port={port}")]),
            None => command.arg("--skip-networking"),
        };
        let child = command
            .arg(format!("--socket={}", socket.display()))
            .arg(format!("--pid-file={}", home.join(format!("mariadbd-{number}.pid")).display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).expect("home is writable"))
            .spawn()
            .expect("the server is there: `make test` installs it");
        let data_directory = data_directory.to_owned();
        let (version, port) = (options.version, options.port);
        Self { version, child, data_directory, socket, log, port }
    }

    /// Starts a server that is expected to end by itself, and returns what it logged.
    #[must_use]
    pub fn start_and_fail(home: &Path, data_directory: &Path, options: &Options) -> String {
        let mut server = Self::spawn(home, data_directory, options);
        wait_for("mariadbd to end", || {
            assert!(server.try_query("SELECT 1").is_err(), "mariadbd runs:\n{}", server.log());
            server.child.try_wait().expect("our own child")
        });
        server.log()
    }

    /// Starts a server that must not come to run, until it logs `text`; it is killed then.
    #[must_use]
    pub fn start_until_log(
        home: &Path,
        data_directory: &Path,
        options: &Options,
        text: &str,
    ) -> String {
        let mut server = Self::spawn(home, data_directory, options);
        wait_for(&format!("mariadbd to log `{text}`"), || {
            assert!(server.try_query("SELECT 1").is_err(), "mariadbd runs:\n{}", server.log());
            let has_ended = server.child.try_wait().expect("our own child").is_some();
            (has_ended || server.log().contains(text)).then_some(())
        });
        server.kill();
        server.log()
    }

    /// Starts a server that may not come to run.
    #[must_use]
    pub fn begin(home: &Path, data_directory: &Path, options: &Options) -> Self {
        Self::spawn(home, data_directory, options)
    }

    /// Whether its process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_some()
    }

    /// Which server it is.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Rows 1 to `count` of a column `seq`, to select from.
    #[must_use]
    pub fn sequence(&self, count: u64) -> String {
        sequence(self.version, count)
    }

    /// Its data directory.
    #[must_use]
    pub fn data_directory(&self) -> &Path {
        &self.data_directory
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A connection as root.
    pub fn try_connect(&self) -> Result<Conn, ::mysql::Error> {
        let socket = self.socket.display().to_string();
        let options = OptsBuilder::new().socket(Some(socket)).user(Some("root")).stmt_cache_size(0);
        // A server's short timeout is for others.
        Conn::new(options.init(vec!["SET SESSION wait_timeout=28800"]))
    }

    /// A connection as root.
    #[must_use]
    pub fn connect(&self) -> Conn {
        self.try_connect().expect("the server takes connections")
    }

    /// Runs statements and returns the rows, tab-separated.
    #[must_use]
    pub fn query(&self, sql: &str) -> String {
        self.try_query(sql).unwrap_or_else(|e| panic!("{sql}: {e}"))
    }

    /// As `query`, or the server's error.
    pub fn try_query(&self, sql: &str) -> Result<String, String> {
        ask(&self.socket, sql)
    }

    /// Base tables of all schemas, quoted.
    #[must_use]
    pub fn tables(&self) -> Vec<String> {
        let tables = self.query(
            "SELECT CONCAT('`', table_schema, '`.`', table_name, '`') FROM information_schema.tables \
             WHERE table_type IN ('BASE TABLE', 'SEQUENCE') AND table_schema NOT IN \
             ('information_schema', 'performance_schema', 'sys') ORDER BY 1",
        );
        tables.lines().map(str::to_owned).collect()
    }

    /// CHECKSUM TABLE of every base table, by name.
    #[must_use]
    pub fn checksums(&self) -> String {
        self.query(&format!("CHECKSUM TABLE {}", self.tables().join(", ")))
    }

    /// As `checksums`, without what each server keeps for itself: its statistics, how far it has
    /// replicated, and the load's schema that is kept out of the binary log.
    #[must_use]
    pub fn replicated_checksums(&self) -> String {
        const OWN: [&str; 7] = [
            // Components are installed on each server by itself.
            "mysql.component",
            "mysql.gtid_",
            "mysql.innodb_",
            "mysql.slave_",
            "mysql.server_cost",
            "mysql.general_log",
            "unlogged.",
        ];
        let all = self.checksums();
        let lines = all.lines().filter(|line| !OWN.iter().any(|own| line.starts_with(own)));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Views and triggers: they are files that no table's checksum covers.
    #[must_use]
    pub fn definitions(&self) -> String {
        let own = "('sys', 'mysql', 'information_schema', 'performance_schema')";
        let all = self.query(&format!(
            "SELECT table_schema, table_name, view_definition, definer FROM information_schema.views \
             WHERE table_schema NOT IN {own} ORDER BY 1, 2; \
             SELECT trigger_schema, trigger_name, event_object_table, event_manipulation, \
             action_timing, action_statement, definer, created FROM information_schema.triggers \
             WHERE trigger_schema NOT IN {own} ORDER BY 1, 2"
        ));
        assert!(all.lines().count() >= 2, "the load's view and trigger are not there: {all}");
        all
    }

    /// Fails, and names the tables, unless this replica holds what `primary` holds.
    ///
    /// Where checksums differ the rows decide: CHECKSUM TABLE of a table with virtual columns may
    /// differ from one server to the next with all rows the same.
    pub fn assert_replicates(&self, primary: &Self) {
        assert_eq!(self.definitions(), primary.definitions(), "views and triggers");
        let (own, other) = (self.replicated_checksums(), primary.replicated_checksums());
        assert_eq!(own.lines().count(), other.lines().count(), "{own}\n--- primary\n{other}");
        for (line, _) in own.lines().zip(other.lines()).filter(|(a, b)| a != b) {
            let table = line.split('\t').next().unwrap_or_default();
            let rows = |server: &Self| server.query(&format!("SELECT * FROM {table} ORDER BY 1"));
            let (own, other) = (rows(self), rows(primary));
            let differ: Vec<_> = own.lines().zip(other.lines()).filter(|(a, b)| a != b).collect();
            let first = differ.first();
            assert!(own == other, "{table}: {} rows differ: {first:.600?}", differ.len());
        }
    }

    /// What the server has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Lines of its log that are errors.
    #[must_use]
    pub fn errors(&self) -> Vec<String> {
        let log = self.log();
        log.lines().filter(|line| line.contains("[ERROR]")).map(str::to_owned).collect()
    }

    /// Shuts the server down and waits for its end.
    pub fn stop(mut self) {
        self.shut_down();
    }

    /// As `stop`, for a server that is to be started again.
    pub fn shut_down(&mut self) {
        drop(self.try_query("SHUTDOWN"));
        let status = wait_for("mariadbd to end", || self.child.try_wait().expect("our own child"));
        assert!(status.success(), "mariadbd ended with {status}:\n{}", self.log());
    }

    /// Kills the server without a word.
    pub fn kill(&mut self) {
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
    }

    /// Makes this server a replica of `primary` by GTID from `position` on. MySQL knows the position
    /// itself.
    pub fn replicate(&self, primary: &Self, position: &str) {
        if self.version.is_mysql() {
            return mysql::replicate(self, primary);
        }
        drop(primary.query(
            "CREATE OR REPLACE USER repl@'127.0.0.1' IDENTIFIED BY 'repl'; \
             GRANT REPLICATION SLAVE ON *.* TO repl@'127.0.0.1'",
        ));
        self.replicate_as_known(primary, position);
    }

    /// As `replicate`, from a server that knows the account: a replica has it from its primary.
    pub fn replicate_as_known(&self, primary: &Self, position: &str) {
        let port = primary.port.expect("the primary has a port");
        drop(self.query(&format!(
            "STOP SLAVE; RESET SLAVE ALL; SET GLOBAL gtid_slave_pos='{position}'; \
             CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT={port}, MASTER_USER='repl', \
             MASTER_PASSWORD='repl', MASTER_USE_GTID=slave_pos; START SLAVE"
        )));
    }

    /// Makes a MariaDB a replica from a file and position of the primary's binary log on, without
    /// GTIDs, and waits until it has applied all that `primary` has now.
    pub fn replicate_from_file(&self, primary: &Self, file: &str, position: u64) {
        drop(primary.query(
            "CREATE OR REPLACE USER repl@'127.0.0.1' IDENTIFIED BY 'repl'; \
             GRANT REPLICATION SLAVE ON *.* TO repl@'127.0.0.1'",
        ));
        let port = primary.port.expect("the primary has a port");
        drop(self.query(&format!(
            "CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT={port}, MASTER_USER='repl', \
             MASTER_PASSWORD='repl', MASTER_USE_GTID=no, MASTER_LOG_FILE='{file}', \
             MASTER_LOG_POS={position}; START SLAVE"
        )));
        let status = primary.query("SHOW MASTER STATUS");
        let mut target = status.split('\t');
        let (file, position) = (target.next().unwrap_or(""), target.next().unwrap_or(""));
        let mut conn = self.connect();
        let wait = format!("SELECT MASTER_POS_WAIT('{file}', {position}, 300)");
        let waited: Option<i64> = conn.query_first(wait).expect("the replica answers");
        // It tells how many events were waited for, -1 where the time was not enough.
        let waited = waited.map(|events| events.min(0));
        assert_caught_up(&mut conn, "SHOW SLAVE STATUS", waited, &format!("{file}:{position}"));
    }

    /// Waits until this replica has applied all that `primary` has now.
    pub fn catch_up(&self, primary: &Self) {
        if self.version.is_mysql() {
            return mysql::catch_up(self, primary);
        }
        let target = primary.query("SELECT @@gtid_binlog_pos");
        let mut conn = self.connect();
        let wait = format!("SELECT MASTER_GTID_WAIT('{}', 300)", target.trim());
        let waited: Option<i64> = conn.query_first(wait).expect("the replica answers");
        assert_caught_up(&mut conn, "SHOW SLAVE STATUS", waited, &target);
    }
}

/// Fails, and says why, unless a replica that was waited for has come to `target`.
pub(crate) fn assert_caught_up(conn: &mut Conn, show: &str, waited: Option<i64>, target: &str) {
    let status: Option<::mysql::Row> = conn.query_first(show).expect("the replica answers");
    let status = status.expect("it is a replica");
    let errors: Vec<String> = ["Last_IO_Error", "Last_SQL_Error"]
        .map(|column| status.get(column).expect("a text"))
        .into_iter()
        .filter(|error: &String| !error.is_empty())
        .collect();
    assert_eq!(waited, Some(0), "the replica does not reach {target}: {errors:?}");
    assert_eq!(errors, Vec::<String>::new());
}

impl Drop for Database {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        drop(std::fs::remove_file(&self.socket));
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(60).collect();
            eprintln!("--- {}", self.log.display());
            for line in tail.iter().rev() {
                eprintln!("{line}");
            }
        }
    }
}
