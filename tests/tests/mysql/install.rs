//! A MySQL server whose own data a clone replaces.

use std::path::{Path, PathBuf};

use marcot_proto::recipient::v1::{
    AcceptCloneRequest, Clone, CloneInstanceRequest, PauseCloneRequest, ResumeCloneRequest, State,
    recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Donor, Recipient,
    client::wait_for_end,
    database::{
        Database, Options, Version, ask, command_line, free_port, install_with, new_socket,
    },
    killer::Blow,
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    new_directory, recipient,
    site::{copy_tree, server_pid},
    wait_for,
};
use tonic::transport::Channel;

/// A supervised server, whose table says `old`, and a donor of a stopped one, whose table says `new`.
struct Site {
    data: PathBuf,
    socket: PathBuf,
    donor: Donor,
    at: Recipient,
    _home: tempfile::TempDir,
}

impl Site {
    fn new(options: &Options, recipient_options: &[&str]) -> Self {
        let home = new_directory();
        let (data, source) = (home.path().join("own"), home.path().join("source"));
        install_with(&data, options);
        let server = Database::start_with(home.path(), &data, options);
        drop(server.query(
            "CREATE DATABASE app; CREATE TABLE app.mark (mark VARCHAR(9), filler TEXT); \
             INSERT INTO app.mark VALUES ('old', REPEAT('x', 5000))",
        ));
        server.stop();
        copy_tree(&data, &source);
        std::fs::remove_file(source.join("auto.cnf")).expect("MySQL makes one");
        let server = Database::start_with(home.path(), &source, options);
        drop(server.query("UPDATE app.mark SET mark='new'"));
        server.stop();
        let donor = Donor::start(home.path(), &source, &[]);
        let socket = new_socket();
        let shown = |path: &Path| path.display().to_string();
        let (own, at, state) = (shown(&data), shown(&socket), shown(&home.path().join("state")));
        let own = [
            "--data-directory",
            &own,
            "--database-socket",
            &at,
            "--database-user",
            "root",
            "--state-directory",
            &state,
        ];
        let command = command_line(&data, options, &socket);
        let all = [&own, recipient_options].concat();
        let at = Recipient::supervise(home.path(), &all, &command, &[]);
        let site = Self { data, socket, donor, at, _home: home };
        site.wait_for_answer();
        site
    }

    fn wait_for_answer(&self) {
        wait_for("the server to answer", || ask(&self.socket, "SELECT 1").ok());
    }

    fn ask(&self, sql: &str) -> String {
        ask(&self.socket, sql).unwrap_or_else(|e| panic!("{sql}: {e}"))
    }

    /// Kills the server, and waits until the supervisor has started it again.
    fn crash(&self) {
        let pid = server_pid(&self.data).expect("a server");
        Blow::Kill.strike(pid);
        wait_for("another server", || server_pid(&self.data).filter(|&other| other != pid));
        self.wait_for_answer();
    }

    async fn begin(
        &self,
        client: &mut RecipientServiceClient<Channel>,
    ) -> Result<Clone, tonic::Status> {
        let request = CloneInstanceRequest {
            host: "127.0.0.1".to_owned(),
            port: self.donor.port().into(),
            user: "clone".to_owned(),
            ..Default::default()
        };
        Ok(client.clone_instance(request).await?.into_inner().clone.expect("a clone"))
    }
}

fn options() -> Options {
    Options {
        version: Version::MySql9_7,
        accounts: true,
        port: Some(free_port()),
        ..Default::default()
    }
}

/// Guards the form `move` on MySQL, which looks for tablespaces in its data directory: it starts after
/// a crash beside a staged copy that is half written, and beside its old data.
#[tokio::test(flavor = "multi_thread")]
async fn a_mysql_that_crashes_starts_beside_a_half_staged_clone_and_beside_its_old_data() {
    let site = Site::new(&options(), &["--install-form", "move"]);
    let mut client = recipient(&site.at).await;
    let clone = site.begin(&mut client).await.expect("accepted");
    let pause = PauseCloneRequest { name: clone.name.clone() };
    client.pause_clone(pause).await.expect("paused");
    let id = clone.name.rsplit('/').next().expect("an id");
    let staged = site.data.join(".marcot-install").join(format!(".marcot-{id}"));
    wait_for("the staging", || staged.join("tree").is_dir().then_some(()));
    // As a copy that was cut leaves it: a table of the same tablespace, half written.
    let half = staged.join("cut/app");
    std::fs::create_dir_all(&half).expect("writable");
    let table = std::fs::read(site.data.join("app/mark.ibd")).expect("a table");
    std::fs::write(half.join("mark.ibd"), &table[..table.len() / 2]).expect("writable");
    site.crash();
    assert_eq!(site.ask("SELECT mark FROM app.mark"), "old\n");
    std::fs::remove_dir_all(&half).expect("ours");
    let go_on = ResumeCloneRequest { name: clone.name.clone(), ..Default::default() };
    client.resume_clone(go_on).await.expect("resumed");
    let clone = wait_for_end(&mut client, &clone.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert!(staged.join("old/app/mark.ibd").exists(), "the old data are kept inside");
    site.crash();
    assert_eq!(site.ask("SELECT mark FROM app.mark"), "new\n");
    let schemas = site.ask("SHOW DATABASES");
    assert!(!schemas.contains("marcot"), "{schemas}");
    client.accept_clone(AcceptCloneRequest { name: clone.name }).await.expect("accepted");
    assert_eq!(site.ask("SELECT mark FROM app.mark"), "new\n");
}

/// Guards R4 in a server's own place: the end of the donor's log comes under the name that this server
/// looks for. Under the donor's name it begins a log of its own, and does not start at all where
/// transactions are prepared.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_donors_log_has_the_name_of_the_recipients() {
    let live = Live::start(Version::MySql9_7, &[], 8 << 20);
    drop(live.server.query("FLUSH BINARY LOGS; FLUSH BINARY LOGS; FLUSH BINARY LOGS"));
    // What an earlier setting of the donor's has left is not this server's log.
    for (name, text) in [("mine.index", "./mine.000001\n"), ("mine.000001", "old")] {
        std::fs::write(live.path("data").join(name), text).expect("writable");
    }
    let options =
        Options::primary(Version::MySql9_7, &[]).with(&["--server-id=9", "--log-bin=mine"]);
    let (data, socket) = (live.path("own"), new_socket());
    install_with(&data, &options);
    let [shown, at, state] =
        [&data, &socket, &live.path("state-of-own")].map(|path| path.display().to_string());
    let own = [
        ["--data-directory", &shown],
        ["--database-socket", &at],
        ["--database-user", "root"],
        ["--state-directory", &state],
        ["--donor-timeout", "60s"],
    ];
    let command = command_line(&data, &options, &socket);
    let at = Recipient::supervise(live.home.path(), &own.concat(), &command, &[]);
    wait_for("the server to answer", || ask(&socket, "SELECT 1").ok());
    let load = LoadOptions { writers: WRITERS, xa: true, ..Default::default() };
    let load = Load::start(&live.server, load);
    load.wait_for_commits(200);
    let mut client = recipient(&at).await;
    let request = CloneInstanceRequest {
        host: "127.0.0.1".to_owned(),
        port: live.donor.port().into(),
        user: "clone".to_owned(),
        ..Default::default()
    };
    let clone = client.clone_instance(request).await.expect("accepted").into_inner().clone;
    let clone = wait_for_end(&mut client, &clone.expect("a clone").name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    drop(load.stop());
    let point = clone.coordinates.expect("a point");
    let gtids = ask(&socket, "SELECT REPLACE(@@gtid_executed, '\n', '')").expect("an answer");
    assert_eq!(gtids.trim(), point.gtid_executed, "what it has recovered, and the coordinates");
    let file = String::from_utf8_lossy(&point.binlog_file).replace("bin.", "mine.");
    let index = std::fs::read_to_string(data.join("mine.index")).expect("an index");
    assert!(&*file > "mine.000003" && index.starts_with(&format!("./{file}\n")), "{index}");
    assert!(!data.join("bin.index").exists(), "the donor's name");
    assert!(!data.join("mine.000001").exists(), "what an earlier setting of the donor's has left");
}

/// Guards R9: a server whose binary log is outside its data directory would go on, on the clone, with
/// the log of its old data. With the check taken out the clone is installed.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_binary_log_would_outlive_its_data_is_not_replaced() {
    let elsewhere = new_directory();
    let log = format!("--log-bin={}", elsewhere.path().join("bin").display());
    let site = Site::new(&options().with(&[&log, "--server-id=3"]), &[]);
    let mut client = recipient(&site.at).await;
    let clone = site.begin(&mut client).await.expect("accepted");
    let end = wait_for_end(&mut client, &clone.name).await.error.expect("a failure");
    assert_eq!(end.reason, "PATH_OUTSIDE_DATA_DIRECTORY", "{end:?}");
    for path in [elsewhere.path(), &site.data] {
        assert!(end.message.contains(&path.display().to_string()), "{end:?}");
    }
    assert!(end.message.contains("start the server with log_bin=bin"), "{end:?}");
    assert_eq!(site.ask("SELECT mark FROM app.mark"), "old\n");
}

/// Guards the member of a group, which the group gives its data (3875).
#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_a_group_is_not_replaced() {
    let plain = Options { port: Some(free_port()), ..Options::primary(Version::MySql9_7, &[]) };
    let site = Site::new(&plain, &[]);
    let group = format!(
        "INSTALL PLUGIN group_replication SONAME 'group_replication.so'; \
         SET GLOBAL group_replication_group_name='aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa'; \
         SET GLOBAL group_replication_local_address='127.0.0.1:{}'; \
         SET GLOBAL group_replication_bootstrap_group=ON; START GROUP_REPLICATION",
        free_port()
    );
    drop(site.ask(&group));
    let mut client = recipient(&site.at).await;
    let end = match site.begin(&mut client).await {
        Err(status) => marcot_common::failure::Failure::from_status(&status).to_wire(),
        Ok(clone) => wait_for_end(&mut client, &clone.name).await.error.expect("a failure"),
    };
    assert_eq!((end.reason.as_str(), end.error_number), ("GROUP_REPLICATION", 3875), "{end:?}");
    assert_eq!(site.ask("SELECT mark FROM app.mark"), "old\n");
    // Out of it, the server is as any other.
    drop(site.ask("STOP GROUP_REPLICATION"));
    let clone = site.begin(&mut client).await.expect("accepted");
    let clone = wait_for_end(&mut client, &clone.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(site.ask("SELECT mark FROM app.mark"), "new\n");
}
