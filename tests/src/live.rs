//! A live server, its load, a donor beside it and a recipient; and all that is checked of a clone.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use crate::{
    Donor, Recipient, bench,
    client::{assert_intact, clone_error, slowly, wait_for_end},
    database::{Database, Options, Version, install_with},
    invariants::{check_copy, ledger_in_binlog, prepare},
    killer::Blow,
    load::{Load, Moment, Report, check_prepared},
    mysql, new_directory,
    proxy::Proxy,
    recipient, wait_for,
};
use marcot_proto::{
    common::v1::Failure,
    recipient::v1::{
        Clone, CloneInstanceRequest, CloneLimits, CloneStatementRequest, State,
        UpdateCloneLimitsRequest, recipient_service_client::RecipientServiceClient,
    },
};
use tonic::transport::Channel;

/// Writers of every load here.
pub const WRITERS: usize = 4;

/// A primary with a load's tables, a donor beside it, and a recipient.
pub struct Live {
    /// How the server was started.
    pub options: Options,
    /// The primary.
    pub server: Database,
    /// Beside it.
    pub donor: Donor,
    /// Where clones are asked for.
    pub recipient: Recipient,
    /// Last: what is in it is shown when a test fails.
    pub home: tempfile::TempDir,
}

/// The privileges that docs/operations.md lists.
pub const GRANTS: &str = "CREATE USER marcot@localhost IDENTIFIED BY 'secret'; \
    GRANT RELOAD, BINLOG MONITOR, PROCESS, SLAVE MONITOR ON *.* TO marcot@localhost;";

impl Live {
    /// Starts all of it. In arguments of the server `{home}` stands for the directory of it all.
    #[must_use]
    pub fn start(version: Version, arguments: &[&str], bytes: u64) -> Self {
        let home = new_directory();
        let data = home.path().join("data");
        let here = home.path().display().to_string();
        let arguments: Vec<String> =
            arguments.iter().map(|argument| argument.replace("{home}", &here)).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let options = Options::primary(version, &arguments);
        install_with(&data, &options);
        let server = Database::start_with(home.path(), &data, &options);
        drop(server.query(if version.is_mysql() { mysql::GRANTS } else { GRANTS }));
        prepare(&server, bytes);
        let donor = donor(home.path(), &data, &server);
        // CLONE LOCAL reads the same server.
        let directory = data.display().to_string();
        let options_of_local =
            [vec!["--data-directory".to_owned(), directory], engine_options(home.path(), &server)];
        let options_of_local = options_of_local.concat();
        let mut borrowed: Vec<&str> = options_of_local.iter().map(String::as_str).collect();
        // Under load a stream may wait longer for its turn than in other stories.
        borrowed.extend(["--donor-timeout", "10s"]);
        let recipient = Recipient::start(home.path(), &borrowed);
        Self { options, server, donor, recipient, home }
    }

    /// A path in the directory of it all.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// The server's log sequence number: bytes of redo written so far.
    #[must_use]
    pub fn lsn(&self) -> u64 {
        let row = self.server.query(
            "SHOW GLOBAL STATUS WHERE Variable_name IN ('Innodb_lsn_current', \
             'Innodb_redo_log_current_lsn')",
        );
        row.trim().rsplit('\t').next().and_then(|n| n.parse().ok()).expect("a number")
    }

    /// Starts the stock server on a clone.
    #[must_use]
    pub fn start_clone(&self, name: &str) -> Database {
        Database::start_with(self.home.path(), &self.path(name), &self.options.for_clone())
    }

    /// Starts the recipient again, after it was killed.
    pub fn restart_recipient(&mut self) {
        self.recipient = Recipient::start(self.home.path(), &["--donor-timeout", "60s"]);
    }

    /// Starts the server again, after it was killed or shut down, where the donor finds it.
    pub fn restart_server(&mut self) {
        self.server.start_again(self.home.path(), &self.options);
        // A kill may have come while they were written: they know no crash recovery.
        drop(self.server.query("REPAIR TABLE mix.csv, mix.isam"));
    }

    /// Starts the donor again, after it was killed.
    pub fn restart_donor(&mut self) {
        self.donor = donor(self.home.path(), &self.path("data"), &self.server);
    }

    /// Puts a proxy between donor and server.
    #[must_use]
    pub fn proxy_database(&mut self) -> Proxy {
        self.proxy_database_with(&[])
    }

    /// As `proxy_database`; the donor has more options.
    #[must_use]
    pub fn proxy_database_with(&mut self, more: &[&str]) -> Proxy {
        let port = self.server.port.expect("a primary has a port");
        let proxy = Proxy::start(([127, 0, 0, 1], port).into());
        self.donor = donor_by_port(self.home.path(), &self.path("data"), proxy.port(), more);
        proxy
    }

    /// Connections of the donor that the server has.
    #[must_use]
    pub fn donor_connections(&self) -> String {
        self.server.query("SELECT id, info FROM information_schema.processlist WHERE user='marcot'")
    }

    /// The statement that clones to a directory, locally or from the donor.
    #[must_use]
    pub fn statement(&self, name: &str, is_local: bool) -> String {
        if is_local {
            return format!("CLONE LOCAL DATA DIRECTORY = '{}'", self.path(name).display());
        }
        self.donor.statement(&self.path(name), "")
    }

    /// Begins a clone by a port, the donor's or a proxy's, with a recipient that waits long for it and is
    /// frozen once there is a snapshot.
    pub async fn begin_frozen(&mut self, port: u16) -> (RecipientServiceClient<Channel>, String) {
        self.recipient.0.kill();
        self.recipient = Recipient::start(self.home.path(), &["--donor-timeout", "60s"]);
        let mut client = recipient(&self.recipient).await;
        let request = CloneInstanceRequest {
            host: "127.0.0.1".to_owned(),
            port: port.into(),
            user: "clone".to_owned(),
            options: Some(slowly()),
            data_directory: self.path("clone").display().to_string().into_bytes().into(),
            ..Default::default()
        };
        let started = client.clone_instance(request).await.expect("the clone is accepted");
        wait_for("a snapshot", || self.donor.0.log().contains("snapshot opened").then_some(()));
        self.recipient.0.freeze();
        (client, started.into_inner().clone.expect("a clone").name)
    }

    /// Writes more redo than half of `--spool-quota 48MiB`: pages have to be sent again.
    pub fn outgrow_the_log(&self) {
        let begun = self.lsn();
        wait_for("redo beyond the bound", || {
            drop(self.server.query("UPDATE mix.bulk SET v = REVERSE(v) WHERE id % 4 = 0"));
            (self.lsn() > begun + (26 << 20)).then_some(())
        });
    }

    /// A frozen recipient goes on until pages are sent again, and is frozen there.
    pub fn go_on_to_page_copy(&self) {
        let pid = self.recipient.0.pid();
        let killer = self.donor.0.strike_at_line("PAGE COPY round 1", pid, Blow::Freeze);
        self.recipient.0.thaw();
        let _at = killer.struck();
    }

    /// The error of a clone from `donor`, which leaves nothing.
    pub async fn refusal(&self, donor: &Donor) -> Failure {
        let mut client = recipient(&self.recipient).await;
        let target = self.path("refused");
        let failure = clone_error(&mut client, &donor.statement(&target, "")).await;
        assert!(!target.exists());
        failure
    }

    /// A clone under load, checked in every way there is.
    pub async fn clone_and_check(&self, name: &str, load: Load) {
        self.clone_with(name, load, |_| ()).await;
    }

    /// As `clone_and_check`; `meanwhile` runs while the clone is under way and its recipient is
    /// frozen, which it stays for `bench::pause`.
    pub async fn clone_with(&self, name: &str, load: Load, meanwhile: impl FnOnce(&Load)) {
        self.clone_or_fail_with(name, load, &[], meanwhile).await;
    }

    /// As `clone_with`; or the clone ends in an error of one of `reasons`, and leaves nothing.
    pub async fn clone_or_fail_with(
        &self,
        name: &str,
        load: Load,
        reasons: &[&str],
        meanwhile: impl FnOnce(&Load),
    ) {
        let before = load.moment();
        let mut client = recipient(&self.recipient).await;
        let request = CloneStatementRequest {
            statement: self.statement(name, false),
            options: Some(slowly()),
            ..Default::default()
        };
        let started = client.clone_statement(request).await.expect("the clone is accepted");
        let started = started.into_inner().clone.expect("a clone");
        wait_for("a snapshot", || self.donor.0.log().contains("snapshot opened").then_some(()));
        self.recipient.0.freeze();
        let rested = Instant::now() + bench::pause(0);
        meanwhile(&load);
        while Instant::now() < rested {
            load.wait_for_commits(20);
        }
        self.recipient.0.thaw();
        let limits = Some(CloneLimits { data_bytes_per_second_max: Some(0), ..Default::default() });
        let lift = UpdateCloneLimitsRequest { name: started.name.clone(), limits };
        // It may have ended by now.
        drop(client.update_clone_limits(lift).await);
        self.check_end(name, &started.name, before, load, reasons).await;
    }

    /// Waits for the end of a clone that was begun at the moment `before`, and checks it; or it ends
    /// in an error of one of `reasons`.
    pub async fn check_end(
        &self,
        name: &str,
        clone: &str,
        before: Moment,
        load: Load,
        reasons: &[&str],
    ) -> Clone {
        let mut client = recipient(&self.recipient).await;
        let clone = wait_for_end(&mut client, clone).await;
        let ended = load.moment();
        load.wait_for_commits(50);
        if let Some(failure) = &clone.error
            && reasons.contains(&failure.reason.as_str())
        {
            eprintln!("{name}: {}", failure.message);
            assert!(!self.path(name).exists(), "a clone that failed left its directory");
            drop(load.stop());
            return clone;
        }
        assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", self.donor.0.log());
        load.assert_kept_up(&clone);
        for pace in load.paces(&clone) {
            eprintln!("{name}: {pace}");
        }
        let report = load.stop();
        eprintln!("{name}: {report}");
        assert_intact(&mut client, &clone.name).await;
        self.check(name, &clone, &before, &ended, &report);
        clone
    }

    /// Checks a clone whose load has ended: it starts, holds what was acknowledged before it and
    /// nothing that was begun after it, agrees with the binary log, has prepared what its donor had,
    /// and catches up as a replica.
    pub fn check(
        &self,
        name: &str,
        clone: &Clone,
        before: &Moment,
        ended: &Moment,
        report: &Report,
    ) {
        let copy = self.start_clone(name);
        if self.options.version.is_mysql() {
            let point = clone.coordinates.clone().unwrap_or_default();
            let own = copy.query("SELECT REPLACE(@@gtid_executed, '\n', '')");
            assert_eq!(
                own.trim(),
                point.gtid_executed,
                "what it has recovered, and the coordinates"
            );
        }
        let prepared = check_prepared(&copy, &report.prepared, before, ended);
        eprintln!("{name} has {prepared} user transactions prepared");
        let held = check_copy(&copy, WRITERS);
        let known = before.acknowledged.iter().zip(&ended.acknowledged);
        for (held, (least, most)) in held.iter().zip(known) {
            // One more than was acknowledged may have been on its way.
            assert!((*least..=most + 1).contains(held), "{least}..={most} + 1: {held}");
        }
        let point = clone.coordinates.as_ref().expect("a live clone has coordinates");
        let file = String::from_utf8_lossy(&point.binlog_file).into_owned();
        let logged = ledger_in_binlog(
            self.options.version,
            &self.path("data"),
            &file,
            point.binlog_position,
        );
        assert_eq!(held.iter().sum::<u64>(), logged, "ledger rows, and those in the binary log");
        let recovered = match self.options.version.is_mysql() {
            true => format!("scanned up to log sequence number {}", point.lsn),
            false => format!("End of log at LSN={}", point.lsn),
        };
        assert!(copy.log().contains(&recovered), "{recovered}: {}", copy.log());
        copy.replicate(&self.server, &point.gtid_executed);
        copy.catch_up(&self.server);
        copy.assert_replicates(&self.server);
        // Each was decided by the donor's client, and so by what the donor has logged.
        assert_eq!(
            copy.query("XA RECOVER"),
            "",
            "still prepared after the last of them was decided"
        );
        copy.stop();
    }
}

/// Options of engine innodb for a server.
fn engine_options(home: &Path, server: &Database) -> Vec<String> {
    let socket = server.socket().display().to_string();
    options_by(home, ["--database-socket", &socket])
}

fn options_by(home: &Path, reached: [&str; 2]) -> Vec<String> {
    let password = home.join("password");
    std::fs::write(&password, "secret\n").expect("a writable home");
    let password = password.display().to_string();
    let options = [
        ["--engine", "innodb"],
        reached,
        ["--database-user", "marcot"],
        ["--database-password-file", &password],
    ];
    options.concat().into_iter().map(str::to_owned).collect()
}

/// A donor of a server's data directory.
#[must_use]
pub fn donor(home: &Path, data: &Path, server: &Database) -> Donor {
    donor_with(home, data, server, &[])
}

/// As `donor`, with more options.
#[must_use]
pub fn donor_with(home: &Path, data: &Path, server: &Database, more: &[&str]) -> Donor {
    start_donor(home, data, &engine_options(home, server), more)
}

/// As `donor_with`, for a server that is reached by a TCP port of loopback: a proxy's.
#[must_use]
pub fn donor_by_port(home: &Path, data: &Path, port: u16, more: &[&str]) -> Donor {
    let url = format!("mysql://127.0.0.1:{port}");
    start_donor(home, data, &options_by(home, ["--database-url", &url]), more)
}

fn start_donor(home: &Path, data: &Path, options: &[String], more: &[&str]) -> Donor {
    let borrowed: Vec<&str> =
        options.iter().map(String::as_str).chain(more.iter().copied()).collect();
    Donor::start(home, data, &borrowed)
}
