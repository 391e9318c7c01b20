//! A live server, its load, a donor beside it and a recipient; and all that is checked of a clone.

use std::path::{Path, PathBuf};

use marcot_proto::recipient::v1::{CloneStatementRequest, State};
use marcot_tests::{
    Donor, Recipient,
    client::wait_for_end,
    load::{self, Load, check_copy, ledger_in_binlog},
    mariadb::{self, MariaDb, Options, Version},
    new_directory, recipient, wait_for,
};

/// Writers of every load here.
pub(crate) const WRITERS: usize = 4;

/// A primary with a load's tables, a donor beside it, and a recipient.
pub(crate) struct Live {
    pub(crate) options: Options,
    pub(crate) server: MariaDb,
    pub(crate) donor: Donor,
    pub(crate) recipient: Recipient,
    /// Last: what is in it is shown when a test fails.
    pub(crate) home: tempfile::TempDir,
}

/// The privileges that docs/operations.md lists.
pub(crate) const GRANTS: &str = "CREATE USER marcot@localhost IDENTIFIED BY 'secret'; \
    GRANT RELOAD, BINLOG MONITOR, PROCESS, SLAVE MONITOR ON *.* TO marcot@localhost;";

impl Live {
    pub(crate) fn start(version: Version, arguments: &[&str], bytes: u64) -> Self {
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

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// The server's log sequence number: bytes of redo written so far.
    pub(crate) fn lsn(&self) -> u64 {
        let row = self.server.query("SHOW GLOBAL STATUS LIKE 'Innodb_lsn_current'");
        row.trim().rsplit('\t').next().and_then(|n| n.parse().ok()).expect("a number")
    }

    /// Starts the stock server on a clone.
    pub(crate) fn start_clone(&self, name: &str) -> MariaDb {
        MariaDb::start_with(self.home.path(), &self.path(name), &self.options.for_clone())
    }

    /// A clone under load, checked in every way there is.
    pub(crate) async fn clone_and_check(&self, name: &str, load: Load) {
        self.clone_with(name, load, |_| ()).await;
    }

    /// As `clone_and_check`; `meanwhile` runs while the clone is under way and its recipient is
    /// frozen.
    pub(crate) async fn clone_with(&self, name: &str, load: Load, meanwhile: impl FnOnce(&Load)) {
        let before = load.acknowledged();
        let mut client = recipient(&self.recipient).await;
        let statement = self.donor.statement(&self.path(name), "");
        let request = CloneStatementRequest { statement, ..Default::default() };
        let started = client.clone_statement(request).await.expect("the clone is accepted");
        let started = started.into_inner().clone.expect("a clone");
        wait_for("a snapshot", || self.donor.0.log().contains("snapshot opened").then_some(()));
        self.recipient.0.freeze();
        meanwhile(&load);
        self.recipient.0.thaw();
        let clone = wait_for_end(&mut client, &started.name).await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", self.donor.0.log());
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
        copy.assert_replicates(&self.server);
        copy.stop();
    }
}

pub(crate) fn donor(home: &Path, data: &Path, server: &MariaDb) -> Donor {
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
