//! A server that commands of the operator stop and start.

use std::path::{Path, PathBuf};

use marcot_proto::recipient::v1::{
    AcceptCloneRequest, CloneOptions, RollbackCloneRequest, State,
    recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Recipient,
    client::wait_for_end,
    mariadb::{self, MariaDb},
    recipient,
    site::Site,
    wait_for,
};
use tonic::transport::Channel;

/// A server that was started by hand, and a recipient with commands for it.
struct Hooked {
    socket: PathBuf,
    _server: MariaDb,
    at: Recipient,
}

/// What the start command was told, in order.
fn told(site: &Site) -> String {
    std::fs::read_to_string(site.path("told")).unwrap_or_default()
}

fn hooked(site: &Site, options: &[&str]) -> Hooked {
    let server = MariaDb::start_with(site.home.path(), &site.data, &site.options);
    let socket = server.socket().to_owned();
    let line = mariadb::command_line(&site.data, &site.options, &socket);
    let quoted: Vec<String> = line.iter().map(|word| format!("'{word}'")).collect();
    // As a service manager would: the closed start has its own arguments.
    let start = format!(
        "echo $MARCOT_START >> {told}; [ \"$MARCOT_START\" = first ] && closed=--skip-networking; \
         [ \"$MARCOT_START\" = opened ] && late='sleep 2'; \
         ($late; exec {} $closed) > {log} 2>&1 &",
        quoted.join(" "),
        told = site.path("told").display(),
        log = site.path("hook.log").display(),
    );
    // What `mariadb-admin shutdown` does.
    let stop = format!(
        "mariadb --no-defaults --user=root --socket={} --execute=SHUTDOWN; [ ! -e {} ]",
        socket.display(),
        site.path("stop-fails").display()
    );
    let shown = |path: &Path| path.display().to_string();
    let (data, at) = (shown(&site.data), shown(&socket));
    let own = [
        "--data-directory",
        &data,
        "--database-socket",
        &at,
        "--database-user",
        "root",
        "--stop-command",
        &stop,
        "--start-command",
        &start,
        "--stop-timeout",
        "20s",
    ];
    let at = Recipient::start(site.home.path(), &[&own, options].concat());
    Hooked { socket, _server: server, at }
}

impl Hooked {
    fn ask(&self, sql: &str) -> Result<String, String> {
        mariadb::ask(&self.socket, sql)
    }

    fn mark(&self) -> String {
        wait_for("the server to answer", || self.ask("SELECT 1").ok());
        self.ask("SELECT mark FROM app.mark").expect("a table")
    }

    async fn client(&self) -> RecipientServiceClient<Channel> {
        recipient(&self.at).await
    }

    /// What the commands have started is nobody's child here.
    fn end(&self, site: &Site) {
        drop(self.ask("SHUTDOWN"));
        wait_for("the server to end", || site.server_pid().is_none().then_some(()));
    }
}

/// Guards the hooks: their order, what they are told, and that their failure changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn commands_stop_and_start_the_server() {
    let site = Site::new();
    let hooked = hooked(&site, &[]);
    let (mut client, clone) = site.replace(&hooked.at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(told(&site), "first\nopened\n");
    // The start command has ended long before the server answers; the clone has not.
    assert_eq!(hooked.ask("SELECT mark FROM app.mark").unwrap(), "new\n");
    client.accept_clone(AcceptCloneRequest { name: clone.name }).await.expect("accepted");
    // A stop that fails leaves the server running on its data.
    std::fs::write(site.path("stop-fails"), "").unwrap();
    for discard_old_data_first in [false, true] {
        let options = CloneOptions { discard_old_data_first, ..Default::default() };
        let clone = site.begin(&mut client, options).await.expect("accepted");
        let clone = wait_for_end(&mut client, &clone.name).await;
        assert_eq!(clone.state(), State::Failed, "{clone:?}");
        assert_eq!(clone.error.unwrap().reason, "HOOK_FAILED");
        assert_eq!(hooked.mark(), "new\n");
    }
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    hooked.end(&site);
}

/// Guards the way back by commands: the old data are started as what they are.
#[tokio::test(flavor = "multi_thread")]
async fn commands_stop_and_start_the_server_for_a_roll_back() {
    let site = Site::new();
    let hooked = hooked(&site, &[]);
    let (mut client, clone) = site.replace(&hooked.at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    // One whose stop fails has not begun: the clone stands, and its server runs.
    std::fs::write(site.path("stop-fails"), "").unwrap();
    let back = RollbackCloneRequest { name: clone.name.clone(), discard_writes: true };
    let refused = client.rollback_clone(back.clone()).await.expect_err("the stop fails");
    assert!(refused.message().contains("SHUTDOWN"), "{refused}");
    assert_eq!(hooked.mark(), "new\n");
    std::fs::remove_file(site.path("stop-fails")).unwrap();
    let answer = client.rollback_clone(back).await.expect("it is rolled back").into_inner();
    assert_eq!(answer.clone.expect("a clone").state(), State::RolledBack);
    assert_eq!(hooked.mark(), "old\n");
    assert_eq!(told(&site), "first\nopened\nopened\nown\n");
    hooked.end(&site);
}

/// Guards the same without a person: a server that commands start is given up after the recovery's
/// bound, for nobody can see it end.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_no_command_can_start_is_rolled_back_by_itself() {
    let site = Site::with_donor_changed_by(|source| {
        let mut system = std::fs::read(source.join("ibdata1")).expect("a system tablespace");
        system[..16384].fill(0xa5);
        std::fs::write(source.join("ibdata1"), system).expect("writable");
    });
    let hooked = hooked(&site, &["--recovery-timeout", "5s"]);
    let (_, clone) = site.replace(&hooked.at).await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    let error = clone.error.expect("a failure");
    assert_eq!(error.reason, "SERVER_NOT_HEALTHY", "{error:?}");
    assert!(error.message.contains("the old data are back"), "{}", error.message);
    assert_eq!(told(&site), "first\nown\n");
    assert_eq!(hooked.mark(), "old\n");
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    // A recipient that is asked about it later says the same.
    let mut client = hooked.client().await;
    let request = marcot_proto::recipient::v1::GetCloneRequest { name: clone.name };
    let known = client.get_clone(request).await.expect("it is known").into_inner();
    assert_eq!(known.clone.expect("a clone").state(), State::Failed);
    hooked.end(&site);
}
