//! Servers that are to stop while they start. A MariaDB that gets SIGTERM then may hang for ever.
//!
//! A recipient that sends SIGTERM at once failed the stories of the waiting, of the killing and of the
//! script.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use marcot_proto::recipient::v1::{
    Clone, CloneOptions, State, recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Recipient, client::wait_for_end, killer::Blow, recipient, site::Site, wait_for,
};
use tonic::transport::Channel;

use crate::entrypoint::{behind_script, clean_ends};

const WAITED_FOR: &str = "the server is still starting";
const SIGNAL: &str = "the server gets a signal";

/// An install that is about to stop a real server, which is frozen in the middle of its start.
struct Frozen {
    at: Recipient,
    client: RecipientServiceClient<Channel>,
    clone: Clone,
    hold: PathBuf,
    server: u32,
    site: Site,
}

/// Starts in which the server was too fast to be caught, before it is given up.
const TRIES: u32 = 10;

async fn frozen(options: &[&str]) -> Frozen {
    let site = Site::new();
    let hold = site.path("hold");
    std::fs::write(&hold, "").expect("writable");
    let wish = format!("staged:{}", hold.display());
    let at = site.supervise_with(options, &[("MARCOT_TEST_HOLD_AT", &wish)]);
    let mut client = recipient(&at).await;
    let clone = site.begin(&mut client, CloneOptions::default()).await.expect("accepted");
    wait_for("the step", || at.0.log().contains("step=\"staged\"").then_some(()));
    let ready = |log: &str| log.matches("ready for connections").count();
    for _ in 0..TRIES {
        let before = site.server_pid().expect("a server");
        let readies = ready(&at.0.log());
        Blow::Kill.strike(before);
        // It holds its first lock: it has begun to open its data.
        let server =
            wait_for("the next start", || site.server_pid().filter(|&server| server != before));
        Blow::Freeze.strike(server);
        // What it has written before that is in the recipient's log soon after.
        std::thread::park_timeout(Duration::from_millis(300));
        if ready(&at.0.log()) == readies {
            return Frozen { at, client, clone, hold, server, site };
        }
        Blow::Thaw.strike(server);
        site.wait_for_server();
    }
    panic!("the server starts too fast to be caught {TRIES} times");
}

impl Frozen {
    fn wait_for_line(&self, line: &str) {
        wait_for(line, || self.at.0.log().contains(line).then_some(()));
    }

    /// Until the recipient has come to the server: it waits for it, or has sent its signal already.
    fn wait_for_the_stop(&self) {
        wait_for("the stop", || {
            let log = self.at.0.log();
            (log.contains(WAITED_FOR) || log.contains(SIGNAL)).then_some(())
        });
    }
}

/// Guards an install that comes while the server starts: it is waited for, and stopped cleanly. (With
/// SIGTERM at once it hangs, and the install waits for --stop-timeout.)
#[tokio::test(flavor = "multi_thread")]
async fn a_mariadb_that_is_still_starting_is_waited_for_before_it_is_stopped() {
    let mut frozen = frozen(&["--stop-timeout", "40s"]).await;
    std::fs::remove_file(&frozen.hold).expect("our own file");
    frozen.wait_for_the_stop();
    Blow::Thaw.strike(frozen.server);
    let clone = wait_for_end(&mut frozen.client, &frozen.clone.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(frozen.site.mark(), "new");
    let log = frozen.at.0.log();
    assert!(!log.contains("it is killed"), "{log}");
    // It, and the server that ran on the clone while that was closed.
    wait_for("both to have said so", || (clean_ends(&frozen.at.0.log()) == 2).then_some(()));
}

/// Guards the way out of a start that never ends: the old server is killed after a bound, its data are
/// recovered when they come back, and the clone is installed.
#[tokio::test(flavor = "multi_thread")]
async fn a_mariadb_that_hangs_while_it_starts_is_killed() {
    let mut frozen = frozen(&["--stop-timeout", "10s"]).await;
    std::fs::remove_file(&frozen.hold).expect("our own file");
    let clone = wait_for_end(&mut frozen.client, &frozen.clone.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert!(frozen.at.0.log().contains("it is killed"), "{}", frozen.at.0.log());
    assert_eq!(frozen.site.mark(), "new");
    let request = marcot_proto::recipient::v1::RollbackCloneRequest {
        name: clone.name.clone(),
        discard_writes: true,
    };
    frozen.client.rollback_clone(request).await.expect("it is rolled back");
    frozen.site.wait_for_server();
    assert_eq!(frozen.site.mark(), "old");
    assert_eq!(frozen.site.damaged_tables(), "");
}

/// Guards a stop of the recipient while its server starts: a clean end, not a kill after the grace.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_that_ends_while_its_mariadb_starts_stops_it_cleanly() {
    let mut frozen = frozen(&["--drain-seconds", "1"]).await;
    Blow::Terminate.strike(frozen.at.0.pid());
    frozen.wait_for_line("clones still run; they are ended");
    // The install is left where it is.
    std::fs::remove_file(&frozen.hold).expect("our own file");
    frozen.wait_for_the_stop();
    Blow::Thaw.strike(frozen.server);
    assert_eq!(frozen.at.0.wait(), Some(0), "{}", frozen.at.0.log());
    let log = frozen.at.0.log();
    assert!(log.contains("Shutdown complete") && !log.contains("it is killed"), "{log}");
    let at = frozen.site.supervise(&[]);
    let mut client = recipient(&at).await;
    let clone = wait_for_end(&mut client, &frozen.clone.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(frozen.site.mark(), "new");
}

/// Guards the same behind a script: one that is busy before its server starts gets no signal then, and
/// one that ignores it is killed.
#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_is_still_starting_its_server_is_waited_for_or_killed() {
    for hangs in [false, true] {
        let site = Site::new();
        let busy = site.path("busy");
        let text = format!(
            "trap 'echo it got SIGTERM' TERM\necho 'server (1.0) starting as process 1'\n\
             while [ -e {} ]; do sleep 0.1; done\ntrap - TERM\nexec \"$@\"",
            busy.display()
        );
        std::fs::write(&busy, "").expect("writable");
        let command = behind_script(&site, &text);
        let options = ["--stop-timeout", if hangs { "10s" } else { "40s" }];
        let at = site.supervise_command(&options, &command);
        let mut client = recipient(&at).await;
        let begun = Instant::now();
        let clone = site.begin(&mut client, CloneOptions::default()).await.expect("accepted");
        wait_for("the step", || at.0.log().contains("step=\"staged\"").then_some(()));
        let has = |text: &str| at.0.log().contains(text);
        if hangs {
            wait_for("the kill", || has("it is killed").then_some(()));
            assert!(has("it got SIGTERM"), "{}", at.0.log());
            assert!(begun.elapsed() < Duration::from_secs(80), "{:?}", begun.elapsed());
        } else {
            wait_for("the wait", || (has(WAITED_FOR) || has(SIGNAL)).then_some(()));
        }
        std::fs::remove_file(&busy).expect("our own file");
        let clone = wait_for_end(&mut client, &clone.name).await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}");
        site.wait_for_server();
        assert_eq!(site.mark(), "new");
        assert_eq!(has("it got SIGTERM"), hangs, "{}", at.0.log());
    }
}
