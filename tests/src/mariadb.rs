//! A real MariaDB server on a data directory of its own, reached by its socket.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use crate::wait_for;

/// A running server; it is killed when it is dropped.
#[derive(Debug)]
pub struct MariaDb {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

/// Makes an empty data directory, as mariadb-install-db does.
pub fn install(data_directory: &Path) {
    std::fs::create_dir_all(data_directory.join("mysql")).expect("writable");
    let share = Path::new("/usr/share/mysql");
    let mut child = command(data_directory)
        .args(["--bootstrap", "--silent-startup", "--skip-log-bin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("mariadbd is there: `make test` installs mariadb-server-core");
    let mut input = child.stdin.take().expect("a pipe");
    writeln!(input, "use mysql;").expect("the server reads");
    for file in ["mariadb_system_tables.sql", "mysql_system_tables.sql"] {
        if let Ok(sql) = std::fs::read(share.join(file)) {
            input.write_all(&sql).expect("the server reads");
        }
    }
    for file in ["mariadb_system_tables_data.sql", "mysql_system_tables_data.sql"] {
        if let Ok(sql) = std::fs::read(share.join(file)) {
            input.write_all(&sql).expect("the server reads");
        }
    }
    drop(input);
    let output = child.wait_with_output().expect("our own child");
    assert!(output.status.success(), "bootstrap: {}", String::from_utf8_lossy(&output.stderr));
}

fn command(data_directory: &Path) -> Command {
    let mut command = Command::new("/usr/sbin/mariadbd");
    command
        .args(["--no-defaults", "--user=root", "--skip-networking", "--skip-grant-tables"])
        .args(["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M"])
        .args(["--lc-messages-dir=/usr/share/mysql", "--aria-pagecache-buffer-size=8M"])
        .arg(format!("--datadir={}", data_directory.display()));
    command
}

impl MariaDb {
    /// Starts a server and waits until it answers. Its socket and log go to `home`.
    #[must_use]
    pub fn start(home: &Path, data_directory: &Path) -> Self {
        let number = std::fs::read_dir(home).expect("home is readable").count();
        // A socket's path is at most 107 bytes, and the build's directory may be deep.
        let socket = std::env::temp_dir().join(format!("m{}-{number}.sock", std::process::id()));
        let log = home.join(format!("mariadbd-{number}.log"));
        let child = command(data_directory)
            .arg(format!("--socket={}", socket.display()))
            .arg(format!("--pid-file={}", home.join(format!("mariadbd-{number}.pid")).display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).expect("home is writable"))
            .spawn()
            .expect("mariadbd is there: `make test` installs mariadb-server-core");
        let mut server = Self { child, socket, log };
        wait_for("mariadbd to answer", || {
            if let Some(status) = server.child.try_wait().expect("our own child") {
                panic!("mariadbd ended with {status}:\n{}", server.log());
            }
            server.try_query("SELECT 1").ok()
        });
        server
    }

    /// Runs statements and returns the rows, tab-separated.
    #[must_use]
    pub fn query(&self, sql: &str) -> String {
        self.try_query(sql).unwrap_or_else(|e| panic!("{sql}: {e}"))
    }

    fn try_query(&self, sql: &str) -> Result<String, String> {
        let output = Command::new("mariadb")
            .args(["--no-defaults", "--batch", "--skip-column-names", "--user=root"])
            .arg(format!("--socket={}", self.socket.display()))
            .arg(format!("--execute={sql}"))
            .output()
            .expect("mariadb is there: `make test` installs mariadb-client-core");
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    /// CHECKSUM TABLE of every base table, by name.
    #[must_use]
    pub fn checksums(&self) -> String {
        let tables = self.query(
            "SELECT CONCAT('`', table_schema, '`.`', table_name, '`') FROM information_schema.tables \
             WHERE table_type = 'BASE TABLE' AND table_schema NOT IN \
             ('information_schema', 'performance_schema') ORDER BY 1",
        );
        let tables: Vec<_> = tables.lines().collect();
        self.query(&format!("CHECKSUM TABLE {}", tables.join(", ")))
    }

    /// What the server has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Shuts the server down and waits for its end.
    pub fn stop(mut self) {
        drop(self.try_query("SHUTDOWN"));
        let status = wait_for("mariadbd to end", || self.child.try_wait().expect("our own child"));
        assert!(status.success(), "mariadbd ended with {status}:\n{}", self.log());
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        drop(std::fs::remove_file(&self.socket));
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log());
        }
    }
}
