//! Clones of live MariaDB servers under a write load: the clone starts by the stock server's crash
//! recovery, holds exactly the transactions up to its coordinates, and catches up as a replica.

use std::path::{Path, PathBuf};

use marcot_proto::recipient::v1::{Clone, State};
use marcot_tests::{
    Donor, Recipient, clone_and_wait,
    load::{self, Load, LoadOptions, check_copy, ledger_in_binlog},
    mariadb::{self, MariaDb, Options, Version},
    new_directory, recipient,
};

const WRITERS: usize = 4;

/// A primary with a load's tables, a donor beside it, and a recipient.
struct Live {
    home: tempfile::TempDir,
    options: Options,
    server: MariaDb,
    donor: Donor,
    recipient: Recipient,
}

/// The privileges that docs/operations.md lists.
const GRANTS: &str = "CREATE USER marcot@localhost IDENTIFIED BY 'secret'; \
    GRANT RELOAD, BINLOG MONITOR, PROCESS, SLAVE MONITOR ON *.* TO marcot@localhost;";

impl Live {
    fn start(version: Version, arguments: &[&str], bytes: u64) -> Self {
        let home = new_directory();
        let data = home.path().join("data");
        let here = home.path().display().to_string();
        let arguments: Vec<String> =
            arguments.iter().map(|argument| argument.replace("{home}", &here)).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let options = Options::primary(version, &arguments);
        mariadb::install_with(&data, &options);
        let server = MariaDb::start_with(home.path(), &data, &options);
        drop(server.query(GRANTS));
        load::prepare(&server, bytes);
        let donor = donor(home.path(), &data, &server);
        let recipient = Recipient::start(home.path(), &[]);
        Self { home, options, server, donor, recipient }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    async fn clone_to(&self, name: &str) -> Clone {
        let mut client = recipient(&self.recipient).await;
        let statement = self.donor.statement(&self.path(name), "");
        let clone = clone_and_wait(&mut client, &statement).await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", self.donor.0.log());
        clone
    }

    /// Starts the stock server on a clone.
    fn start_clone(&self, name: &str) -> MariaDb {
        MariaDb::start_with(self.home.path(), &self.path(name), &self.options.for_clone())
    }

    /// A clone under load, checked in every way there is.
    async fn clone_and_check(&self, name: &str, load: Load) {
        let before = load.acknowledged();
        let clone = self.clone_to(name).await;
        let ended = load.acknowledged();
        load.wait_for_commits(50);
        let report = load.stop();
        eprintln!("{report:?}");
        let copy = self.start_clone(name);
        let held = check_copy(&copy, WRITERS);
        for writer in 0..WRITERS {
            let (least, most) = (before[writer], ended[writer] + 1);
            assert!((least..=most).contains(&held[writer]), "{least}..={most}: {}", held[writer]);
        }
        let point = clone.coordinates.expect("a live clone has coordinates");
        let file = String::from_utf8_lossy(&point.binlog_file).into_owned();
        let logged = ledger_in_binlog(&self.path("data"), &file, point.binlog_position);
        assert_eq!(held.iter().sum::<u64>(), logged, "ledger rows, and those in the binary log");
        assert!(copy.log().contains(&format!("End of log at LSN={}", point.lsn)), "{}", copy.log());
        copy.replicate(&self.server, &point.gtid_executed);
        copy.catch_up(&self.server);
        assert_eq!(copy.replicated_checksums(), self.server.replicated_checksums());
        copy.stop();
    }
}

fn donor(home: &Path, data: &Path, server: &MariaDb) -> Donor {
    let password = home.join("password");
    std::fs::write(&password, "secret\n").expect("a writable home");
    let (socket, password) =
        (server.socket().display().to_string(), password.display().to_string());
    let options = [
        ["--engine", "innodb"],
        ["--database-socket", &socket],
        ["--database-user", "marcot"],
        ["--database-password-file", &password],
    ];
    Donor::start(home, data, &options.concat())
}

/// A clone of a busy server, in both versions.
///
/// Guards the engine as a whole: position, redo and pages fit one another.
async fn a_busy_server_is_cloned(version: Version) {
    let live = Live::start(version, &[], 40 << 20);
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(200);
    live.clone_and_check("clone", load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_mariadb_10_11_is_cloned() {
    a_busy_server_is_cloned(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_mariadb_11_8_is_cloned() {
    a_busy_server_is_cloned(Version::V11_8).await;
}

/// Tables come and go, are renamed, truncated and altered while they are copied.
#[tokio::test(flavor = "multi_thread")]
async fn tables_that_come_and_go_arrive_as_they_are_at_the_point() {
    let live = Live::start(Version::V10_11, &[], 40 << 20);
    let options = LoadOptions { writers: WRITERS, ddl: true, ..Default::default() };
    let load = Load::start(&live.server, options);
    load.wait_for_commits(200);
    live.clone_and_check("clone", load).await;
}
