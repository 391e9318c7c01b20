//! A server whose data a clone replaces: its own data hold the mark `old`, the donor's `new`.

mod hooks;

use std::{
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use marcot_proto::recipient::v1::{
    Clone, CloneInstanceRequest, CloneOptions, recipient_service_client::RecipientServiceClient,
};
use tonic::transport::Channel;

use crate::{
    Donor, Recipient,
    client::wait_for_end,
    mariadb::{self, MariaDb, Options, Version},
    new_directory, recipient, target_directory, wait_for,
};

/// Rows of each table: some pages of each.
const ROWS: u32 = 2000;

/// All of it.
pub struct Site {
    /// How the server is started.
    pub options: Options,
    /// Its data directory.
    pub data: PathBuf,
    /// Its socket.
    pub socket: PathBuf,
    /// The recipient's state directory.
    pub state: PathBuf,
    /// A donor of a stopped server's data.
    pub donor: Donor,
    /// Last: what is in it is shown when a test fails.
    pub home: tempfile::TempDir,
}

impl Site {
    /// Makes both data directories, and starts the donor.
    #[must_use]
    pub fn new() -> Self {
        Self::with_donor_changed_by(|_| {})
    }

    /// As `new`, with the donor's data directory changed before it is served.
    #[must_use]
    pub fn with_donor_changed_by(change: impl FnOnce(&Path)) -> Self {
        let home = new_directory();
        let options = Options { port: Some(mariadb::free_port()), accounts: true, ..options() };
        let (data, source) = (home.path().join("own"), home.path().join("source"));
        mariadb::install_with(&data, &options);
        let server = MariaDb::start_with(home.path(), &data, &options);
        drop(server.query(&format!(
            "CREATE USER app@'127.0.0.1' IDENTIFIED BY 'app'; \
             GRANT ALL PRIVILEGES ON *.* TO app@'127.0.0.1'; \
             CREATE DATABASE app; CREATE TABLE app.mark (mark TEXT) ENGINE=InnoDB; \
             INSERT INTO app.mark VALUES ('old'); \
             CREATE TABLE app.rows (id INT PRIMARY KEY, mark TEXT, filler TEXT) ENGINE=InnoDB; \
             INSERT INTO app.rows SELECT seq, 'old', REPEAT('x', 200) FROM app.seq_1_to_{ROWS}; \
             CREATE TABLE app.aria (id INT PRIMARY KEY, mark TEXT) ENGINE=Aria; \
             INSERT INTO app.aria SELECT seq, 'old' FROM app.seq_1_to_{ROWS}"
        )));
        server.stop();
        copy_tree(&data, &source);
        let server = MariaDb::start_with(home.path(), &source, &options);
        drop(server.query(
            "UPDATE app.mark SET mark='new'; UPDATE app.rows SET mark='new'; \
             UPDATE app.aria SET mark='new'; CREATE DATABASE only_new; \
             CREATE TABLE only_new.t (id INT) ENGINE=InnoDB",
        ));
        server.stop();
        change(&source);
        let donor = Donor::start(home.path(), &source, &[]);
        let state = home.path().join("state");
        Self { options, data, socket: mariadb::new_socket(), state, donor, home }
    }

    /// A path in the directory of it all.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// The server's command.
    #[must_use]
    pub fn command(&self) -> Vec<String> {
        mariadb::command_line(&self.data, &self.options, &self.socket)
    }

    /// A recipient that supervises the server, with more options.
    #[must_use]
    pub fn supervise(&self, options: &[&str]) -> Recipient {
        self.supervise_with(options, &[])
    }

    /// As `supervise`, with more variables in its environment.
    #[must_use]
    pub fn supervise_with(&self, options: &[&str], environment: &[(&str, &str)]) -> Recipient {
        let recipient = self.start(options, environment);
        self.wait_for_server();
        recipient
    }

    /// As `supervise`, where the server is not to run.
    #[must_use]
    pub fn supervise_stopped(&self, options: &[&str]) -> Recipient {
        self.start(options, &[])
    }

    /// As `supervise_stopped`, where another command runs the server.
    #[must_use]
    pub fn supervise_command(&self, options: &[&str], command: &[String]) -> Recipient {
        self.start_command(options, command, &[])
    }

    /// A recipient that is to refuse to run, with another state directory: its exit code, and what it
    /// has said.
    #[must_use]
    pub fn supervise_until_it_ends(&self, state: &Path) -> (Option<i32>, String) {
        let mut command = Command::new(target_directory().join("marcot-recipient"));
        command.args(["supervise", "--listen", "127.0.0.1:0"]);
        command.args(self.arguments(state)).arg("--").args(self.command());
        let output = command.output().expect("marcot-recipient is built");
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    }

    fn start(&self, options: &[&str], environment: &[(&str, &str)]) -> Recipient {
        self.start_command(options, &self.command(), environment)
    }

    fn start_command(
        &self,
        options: &[&str],
        command: &[String],
        environment: &[(&str, &str)],
    ) -> Recipient {
        let arguments = self.arguments(&self.state);
        let all: Vec<&str> =
            arguments.iter().map(String::as_str).chain(options.iter().copied()).collect();
        Recipient::supervise(self.home.path(), &all, command, environment)
    }

    fn arguments(&self, state: &Path) -> Vec<String> {
        let shown = |path: &Path| path.display().to_string();
        [
            ("--data-directory", shown(&self.data)),
            ("--database-socket", shown(&self.socket)),
            ("--state-directory", shown(state)),
            ("--database-user", "root".to_owned()),
            ("--recovery-timeout", "60s".to_owned()),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect()
    }

    /// Where a clone is staged.
    #[must_use]
    pub fn staging(&self, form: &str, id: &str) -> PathBuf {
        let parent = match form {
            "move" => self.data.join(".marcot-install"),
            _ => self.data.parent().expect("a parent").to_owned(),
        };
        parent.join(format!(".marcot-{id}"))
    }

    /// Waits until the server answers.
    pub fn wait_for_server(&self) {
        wait_for("the server to answer", || mariadb::ask(&self.socket, "SELECT 1").ok());
    }

    /// As `wait_for_server`; an error when it does not answer within `limit`.
    pub fn wait_for_server_within(&self, limit: Duration) -> Result<(), String> {
        let begun = Instant::now();
        while let Err(why) = mariadb::ask(&self.socket, "SELECT 1") {
            if begun.elapsed() >= limit {
                return Err(format!("the server does not answer: {why}"));
            }
            std::thread::park_timeout(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Asks the server.
    #[must_use]
    pub fn ask(&self, sql: &str) -> String {
        mariadb::ask(&self.socket, sql).unwrap_or_else(|e| panic!("{sql}: {e}"))
    }

    /// What all tables say they are, `old` or `new`; anything else is a mix.
    #[must_use]
    pub fn mark(&self) -> String {
        let counts = self.ask(
            "SELECT mark, COUNT(*) FROM (SELECT mark FROM app.mark UNION ALL \
             SELECT mark FROM app.rows UNION ALL SELECT mark FROM app.aria) AS marks GROUP BY mark; \
             SELECT COUNT(*) FROM information_schema.TABLES WHERE TABLE_SCHEMA='only_new'",
        );
        let total = 1 + 2 * ROWS;
        for (mark, only_new) in [("old", 0), ("new", 1)] {
            if counts == format!("{mark}\t{total}\n{only_new}\n") {
                return mark.to_owned();
            }
        }
        format!("a mix: {counts}")
    }

    /// CHECK TABLE of every table: the lines that do not say OK.
    #[must_use]
    pub fn damaged_tables(&self) -> String {
        let tables = self.ask(
            "SELECT CONCAT('`', TABLE_SCHEMA, '`.`', TABLE_NAME, '`') FROM information_schema.TABLES \
             WHERE TABLE_TYPE='BASE TABLE' AND TABLE_SCHEMA NOT IN \
             ('information_schema', 'performance_schema')",
        );
        let tables: Vec<&str> = tables.lines().collect();
        assert!(tables.len() > 20, "those of `app` and of `mysql`: {tables:?}");
        let lines = self.ask(&format!("CHECK TABLE {}", tables.join(", ")));
        let bad = lines.lines().filter(|line| !line.ends_with("\tOK"));
        bad.collect::<Vec<_>>().join("\n")
    }

    /// Whether the server takes connections over the network.
    #[must_use]
    pub fn takes_connections(&self) -> bool {
        let port = self.options.port.expect("it has one");
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    }

    /// Asks for a clone that replaces the server's data.
    pub async fn begin(
        &self,
        client: &mut RecipientServiceClient<Channel>,
        options: CloneOptions,
    ) -> Result<Clone, tonic::Status> {
        let request = CloneInstanceRequest {
            host: "127.0.0.1".to_owned(),
            port: self.donor.port().into(),
            user: "clone".to_owned(),
            password: "secret".to_owned(),
            options: Some(options),
            ..Default::default()
        };
        Ok(client.clone_instance(request).await?.into_inner().clone.expect("a clone"))
    }

    /// Replaces the server's data, to the clone's end.
    pub async fn replace(&self, at: &Recipient) -> (RecipientServiceClient<Channel>, Clone) {
        let mut client = recipient(at).await;
        let clone = self.begin(&mut client, CloneOptions::default()).await;
        let clone = clone.expect("the clone is accepted");
        let clone = wait_for_end(&mut client, &clone.name).await;
        (client, clone)
    }

    /// The process that runs a server on the data directory.
    #[must_use]
    pub fn server_pid(&self) -> Option<u32> {
        server_pid(&self.data)
    }

    /// What a clone has left beside the data directory, or in it.
    #[must_use]
    pub fn leftovers(&self) -> Vec<PathBuf> {
        let inner = self.data.join(".marcot-install");
        let beside = self.data.parent().expect("a parent").to_owned();
        [beside, inner]
            .iter()
            .filter_map(|directory| std::fs::read_dir(directory).ok())
            .flat_map(|entries| entries.flatten())
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(".marcot-"))
            .map(|entry| entry.path())
            .collect()
    }
}

impl Default for Site {
    fn default() -> Self {
        Self::new()
    }
}

/// The process that runs a server on a data directory.
#[must_use]
pub fn server_pid(data_directory: &Path) -> Option<u32> {
    let file = std::fs::File::open(data_directory.join("ibdata1")).ok()?;
    let pid = marcot_common::file_lock::holder(file.as_fd()).ok()??;
    u32::try_from(pid).ok().filter(|&pid| pid > 0)
}

fn options() -> Options {
    let arguments = ["--ignore-db-dirs=.marcot-install", "--ignore-db-dirs=lost+found"]
        .map(str::to_owned)
        .to_vec();
    Options { version: Version::V10_11, arguments, ..Options::default() }
}

/// Copies a tree, sharing blocks where the file system can.
pub fn copy_tree(from: &Path, to: &Path) {
    let status = Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(to).status();
    assert!(status.expect("cp is there").success(), "copy {}", from.display());
}
