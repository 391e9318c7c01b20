//! A server that commands of the operator stop and start.

use std::time::Duration;

use marcot_proto::recipient::v1::{
    AcceptCloneRequest, CancelCloneRequest, CloneOptions, DeleteLeftoverRequest,
    RollbackCloneRequest, State,
};
use marcot_tests::{
    Recipient, client::wait_for_end, killer::Blow, recipient, site::Site, wait_for,
};
use tonic::Code;

use crate::held::{get, hold_file, wait_for_moment};

/// A server that was started by hand, and a recipient with commands for it.
fn hooked(site: &Site, options: &[&str]) -> Recipient {
    site.start_server();
    site.with_hooks(options, &[])
}

fn mark(site: &Site) -> String {
    site.wait_for_server();
    site.mark()
}

/// Guards the hooks: their order, what they are told, and that their failure changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn commands_stop_and_start_the_server() {
    let site = Site::new();
    std::fs::write(site.path("late"), "").unwrap();
    let at = hooked(&site, &[]);
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(site.told(), "first\nopened\n");
    // The start command has ended long before the server answers; the clone has not.
    assert_eq!(site.mark(), "new");
    client.accept_clone(AcceptCloneRequest { name: clone.name }).await.expect("accepted");
    // A stop that fails leaves the server running on its data.
    std::fs::write(site.path("stop-fails"), "").unwrap();
    for discard_old_data_first in [false, true] {
        let options = CloneOptions { discard_old_data_first, ..Default::default() };
        let clone = site.begin(&mut client, options).await.expect("accepted");
        let clone = wait_for_end(&mut client, &clone.name).await;
        assert_eq!(clone.state(), State::Failed, "{clone:?}");
        assert_eq!(clone.error.unwrap().reason, "HOOK_FAILED");
        assert_eq!(mark(&site), "new");
    }
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
}

/// Guards the end of a clone that no server starts on, where commands start it: the old data are back soon
/// after it has ended, and its error log says why. Without the look at its locks the clone waits for
/// `--recovery-timeout`, an hour; without its log nobody knows why.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_start_on_a_clone_is_told_in_its_own_words() {
    let site = Site::with_donor_changed_by(|source| {
        // The first page says what the tablespace is.
        let mut system = std::fs::read(source.join("ibdata1")).unwrap();
        system[..16384].fill(0xa5);
        std::fs::write(source.join("ibdata1"), system).unwrap();
    });
    let log = site.path("server.log").display().to_string();
    let at = hooked(&site, &["--server-error-log", &log]);
    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    let error = clone.error.unwrap();
    assert_eq!(error.reason, "SERVER_NOT_HEALTHY", "{error:?}");
    for text in ["has ended", "the server's log says: ", "[ERROR]", "the old data are back"] {
        assert!(error.message.contains(text), "`{text}` is not in: {}", error.message);
    }
    assert_eq!(mark(&site), "old");
    assert_eq!(site.told(), "first\nown\n");
    wait_for("nothing to be left", || site.leftovers().is_empty().then_some(()));
}

fn wait_until_back(at: &Recipient) {
    // What comes next may come a moment before the place for it is free.
    let is_free = || at.0.log().contains("is seen to").then_some(());
    wait_for("the server to be back", is_free);
}

fn wait_for_failed_start(at: &Recipient) {
    let failed = || at.0.log().contains("could not be started again; it is").then_some(());
    wait_for("a start that fails", failed);
}

/// A recipient that is held at a moment.
fn held_with_hooks(site: &Site, moment: &str) -> Recipient {
    let wish = format!("{moment}:{}", hold_file(site).display());
    site.with_hooks(&[], &[("MARCOT_TEST_HOLD_AT", &wish)])
}

/// A clone whose recipient is killed when its install comes to a moment, with `settled` called before.
async fn killed_at(site: &Site, moment: &str, settled: impl FnOnce()) -> String {
    site.start_server();
    let mut at = held_with_hooks(site, moment);
    let mut client = recipient(&at).await;
    let clone = site.begin(&mut client, CloneOptions::default()).await.expect("accepted");
    wait_for_moment(&at, moment);
    settled();
    at.0.kill();
    clone.name
}

/// Guards a server that commands have started: it outlives the recipient, and the next one goes on with it,
/// also where the kill came before the record of its start. (Started again, the command may fail, and a
/// healthy clone is rolled back for it.)
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_a_command_has_started_is_not_started_twice() {
    // It may be up when the recipient is killed, or not hold its locks yet.
    for (moment, is_up) in [("server_started", false), ("started", true)] {
        let site = Site::new();
        let settled = || {
            if is_up {
                site.wait_for_server()
            }
        };
        let name = killed_at(&site, moment, settled).await;
        let at = site.with_hooks(&[], &[]);
        let clone = wait_for_end(&mut recipient(&at).await, &name).await;
        assert_eq!(clone.state(), State::Completed, "{moment}: {clone:?}");
        assert_eq!(site.told(), "first\nopened\n", "{moment}");
        assert_eq!(mark(&site), "new");
    }
}

/// Guards a clone whose recipient was killed when it was proven and its server not open to everybody yet,
/// or already stopped for that. (Without `is_away` it is COMPLETED, and its server closed, or down.)
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_to_be_opened_when_the_recipient_was_killed_is_opened() {
    for moment in ["opened", "opening"] {
        let site = Site::new();
        let name = killed_at(&site, moment, || ()).await;
        assert!(!site.takes_connections(), "{moment}");
        let at = site.with_hooks(&[], &[]);
        let clone = wait_for_end(&mut recipient(&at).await, &name).await;
        assert_eq!(clone.state(), State::Completed, "{moment}: {clone:?}");
        assert!(site.takes_connections(), "{moment}");
        assert_eq!(site.told(), "first\nopened\n", "{moment}");
        assert_eq!(mark(&site), "new");
    }
}

/// Guards a server that was stopped for what a kill has cut: nobody else starts it again. (Without the
/// record of that it stays down until a person comes.) One that has been started is left alone: whoever
/// stops it later wants it stopped.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_stopped_for_an_install_that_was_cut_is_started_again() {
    let site = Site::new();
    let name = killed_at(&site, "stopped", || ()).await;
    assert_eq!(site.server_pid(), None);
    // A start that fails is not the last one: the record of it stays until one has succeeded.
    std::fs::write(site.path("start-fails"), "").unwrap();
    let mut at = held_with_hooks(&site, "none");
    wait_for_failed_start(&at);
    assert_eq!(at.0.terminate(), Some(0));
    assert_eq!(site.server_pid(), None);
    std::fs::remove_file(site.path("start-fails")).unwrap();
    let mut told = "own\nown\n".to_owned();
    let mut at = held_with_hooks(&site, "exchanging_back");
    assert_eq!(mark(&site), "old");
    wait_until_back(&at);
    let clone = get(&mut recipient(&at).await, &name).await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    assert_eq!(site.told(), told);
    wait_for("nothing to be left", || site.leftovers().is_empty().then_some(()));

    for (moment, state, stands, start, next) in [
        ("exchanging_back", State::RolledBack, "old", "own", "stopped_for_roll_back"),
        ("stopped_for_roll_back", State::Completed, "new", "opened", "none"),
    ] {
        let (mut client, clone) = site.replace(&at).await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}");
        let back = RollbackCloneRequest { name: clone.name.clone(), discard_writes: true };
        let call = tokio::spawn(async move { client.rollback_clone(back).await });
        wait_for_moment(&at, moment);
        at.0.kill();
        call.await.expect("a task").expect_err("the recipient was killed");
        at = held_with_hooks(&site, next);
        assert_eq!(mark(&site), stands, "{moment}");
        wait_until_back(&at);
        assert_eq!(get(&mut recipient(&at).await, &clone.name).await.state(), state, "{moment}");
        told = format!("{told}first\nopened\n{start}\n");
        assert_eq!(site.told(), told, "{moment}");
    }
    // It ends once its commands have.
    assert_eq!(at.0.terminate(), Some(0));
    site.shut_server_down();
    let mut at = held_with_hooks(&site, "none");
    assert_eq!(at.0.terminate(), Some(0));
    assert_eq!(site.told(), told);
}

/// Guards a start that fails, as one does while the rest of a host comes up: it is tried again, without
/// another start of the recipient.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_start_failed_is_started_again_by_the_same_recipient() {
    let site = Site::new();
    let name = killed_at(&site, "stopped", || ()).await;
    std::fs::write(site.path("start-fails"), "").unwrap();
    let at = site.with_hooks(&[], &[]);
    wait_for_failed_start(&at);
    assert_eq!(site.server_pid(), None);
    std::fs::remove_file(site.path("start-fails")).unwrap();
    assert_eq!(mark(&site), "old");
    wait_for("nothing to be left", || site.leftovers().is_empty().then_some(()));
    assert_eq!(get(&mut recipient(&at).await, &name).await.state(), State::Failed);
}

/// Guards writes: a server that has been opened and is not healthy then takes them all the same, and is not
/// stopped again to be opened. (Without the record that its start command was given it is, at every try.)
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_open_and_not_healthy_is_not_stopped_again() {
    let site = Site::new();
    let health = format!(
        "mariadb --no-defaults --user=root --socket={} --execute='SELECT 1' && ! grep -q opened {}",
        site.socket.display(),
        site.path("told").display()
    );
    let at = hooked(&site, &["--stop-timeout", "10s", "--health-command", &health]);
    let (mut client, clone) = site.replace(&at).await;
    let error = clone.error.as_ref().expect("it fails");
    assert_eq!((clone.state(), &*error.reason), (State::Failed, "SERVER_NOT_HEALTHY"), "{clone:?}");
    wait_until_back(&at);
    assert_eq!((site.told(), mark(&site)), ("first\nopened\n".to_owned(), "new".to_owned()));
    assert!(error.message.contains("since it was opened to everybody"), "{}", error.message);
    assert!(site.takes_connections());
    let back = RollbackCloneRequest { name: clone.name, discard_writes: true };
    client.rollback_clone(back).await.expect("it is rolled back");
    assert_eq!(mark(&site), "old");
}

/// Guards the record that a server is to be started again: neither a prune nor an accept removes it between
/// two tries. (Where one does, nobody starts the server any more.)
#[tokio::test(flavor = "multi_thread")]
async fn what_says_that_a_server_is_down_is_not_removed_before_it_runs() {
    let site = Site::new();
    let at = hooked(&site, &[]);
    let set = |fails: bool| {
        for file in ["stop-fails", "start-fails"] {
            match fails {
                true => std::fs::write(site.path(file), "").unwrap(),
                false => std::fs::remove_file(site.path(file)).unwrap(),
            }
        }
    };
    set(true);
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    let prune = DeleteLeftoverRequest { name: clone.name.replace("clones/", "leftovers/") };
    let refused = client.delete_leftover(prune).await.expect_err("its server is down");
    assert!(refused.message().contains("started again first"), "{refused}");
    assert_eq!(site.server_pid(), None);
    set(false);
    assert_eq!(mark(&site), "old");
    wait_for("nothing to be left", || site.leftovers().is_empty().then_some(()));
    wait_until_back(&at);

    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    set(true);
    let back = RollbackCloneRequest { name: clone.name.clone(), discard_writes: true };
    client.rollback_clone(back).await.expect_err("its stop fails, and its start");
    let accept = AcceptCloneRequest { name: clone.name };
    let refused = client.accept_clone(accept.clone()).await.expect_err("its server is down");
    assert!(refused.message().contains("not seen to run again"), "{refused}");
    assert_eq!((site.server_pid(), site.leftovers().len()), (None, 1));
    set(false);
    assert_eq!(mark(&site), "new");
    let is_back = || (at.0.log().matches("is seen to").count() == 2).then_some(());
    wait_for("the server to be back", is_back);
    client.accept_clone(accept).await.expect("it is accepted");
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
}

/// A clone whose roll-back comes to a moment, where its recipient is killed.
async fn killed_in_roll_back(site: &Site, moment: &str) -> RollbackCloneRequest {
    site.start_server();
    let mut at = held_with_hooks(site, moment);
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let back = RollbackCloneRequest { name: clone.name, discard_writes: true };
    let request = back.clone();
    let call = tokio::spawn(async move { client.rollback_clone(request).await });
    wait_for_moment(&at, moment);
    at.0.kill();
    call.await.expect("a task").expect_err("the recipient was killed");
    back
}

/// Guards R11 where a server is being started again: until its command has ended nothing else begins, for
/// no lock says yet that a server comes. (Without the place for it the trees are exchanged under it.)
#[tokio::test(flavor = "multi_thread")]
async fn nothing_moves_while_a_server_is_being_started_again() {
    let site = Site::new();
    let back = killed_in_roll_back(&site, "stopped_for_roll_back").await;
    std::fs::write(site.path("start-waits"), "").unwrap();
    let at = site.with_hooks(&[], &[]);
    let mut client = recipient(&at).await;
    for told in ["first\nopened\n", "first\nopened\nopened\n"] {
        wait_for("the start command", || site.told().starts_with(told).then_some(()));
        let refused = client.rollback_clone(back.clone()).await.expect_err("a server is coming");
        assert_eq!(refused.code(), Code::Aborted, "{refused}");
    }
    std::fs::remove_file(site.path("start-waits")).unwrap();
    assert_eq!(mark(&site), "new");
    wait_until_back(&at);
    client.rollback_clone(back).await.expect("it is rolled back");
    assert_eq!(mark(&site), "old");
    assert_eq!(site.told(), "first\nopened\nopened\nown\n");
}

/// Guards a server that was open when it was to be stopped, and still is: it is left alone. (Without the
/// look at how it was before, it is stopped and started for nothing.)
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_a_roll_back_had_not_stopped_yet_is_left_alone() {
    let site = Site::new();
    killed_in_roll_back(&site, "stopping_for_roll_back").await;
    let pid = site.server_pid().expect("it runs");
    let at = site.with_hooks(&[], &[]);
    wait_until_back(&at);
    assert_eq!((site.server_pid(), mark(&site)), (Some(pid), "new".to_owned()));
    assert_eq!(site.told(), "first\nopened\n");
}

/// Guards a server that takes longer to stop than anybody waits: the clone fails, and the server does not
/// stay down once it has stopped after all; also where the recipient was killed meanwhile. (Where a server
/// that has its locks still counts as started, nobody starts it.)
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_too_late_is_started_again() {
    for is_killed in [false, true] {
        let site = Site::new();
        site.start_server();
        std::fs::write(site.path("stop-by-signal"), "").unwrap();
        let wish = format!("staged:{}", hold_file(&site).display());
        let environment = [("MARCOT_TEST_HOLD_AT", &*wish)];
        let mut at = site.with_hooks(&["--stop-timeout", "10s"], &environment);
        let mut client = recipient(&at).await;
        let clone = site.begin(&mut client, CloneOptions::default()).await.expect("accepted");
        wait_for_moment(&at, "staged");
        let pid = site.server_pid().expect("it runs");
        Blow::Freeze.strike(pid);
        std::fs::remove_file(site.path("hold")).unwrap();
        let clone = wait_for_end(&mut client, &clone.name).await;
        let error = clone.error.as_ref().expect("it fails");
        assert_eq!((clone.state(), &*error.reason), (State::Failed, "SERVER_RUNNING"), "{clone:?}");
        if is_killed {
            at.0.kill();
            at = site.with_hooks(&["--stop-timeout", "10s"], &[]);
        }
        let looks = || at.0.log().contains("it is looked at again").then_some(());
        wait_for("a look at it", looks);
        Blow::Thaw.strike(pid);
        wait_for("another server", || site.server_pid().filter(|&now| now != pid));
        assert_eq!(mark(&site), "old", "killed: {is_killed}");
        wait_for("nothing to be left", || site.leftovers().is_empty().then_some(()));
    }
}

/// A clone that is to discard the old data, and whose recipient is killed when their server has been stopped.
async fn killed_before_the_discard(site: &Site, is_cancelled: bool) -> String {
    site.start_server();
    let mut at = held_with_hooks(site, "discard_stopped");
    let mut client = recipient(&at).await;
    let options = CloneOptions { discard_old_data_first: true, ..Default::default() };
    let clone = site.begin(&mut client, options).await.expect("accepted");
    wait_for_moment(&at, "discard_stopped");
    if is_cancelled {
        let request = CancelCloneRequest { name: clone.name.clone() };
        client.cancel_clone(request).await.expect("it is cancelled");
    }
    at.0.kill();
    assert_eq!(site.server_pid(), None);
    clone.name
}

/// Guards a server whose data were to be discarded, and are there: it runs again, whatever becomes of the
/// clone. (Without the record of it in the copy's journal it stays down.)
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_data_were_not_discarded_yet_is_started_again() {
    let mut site = Site::new();
    let name = killed_before_the_discard(&site, false).await;
    site.donor.0.kill();
    let at = site.with_hooks(&["--donor-timeout", "1s"], &[]);
    assert_eq!(mark(&site), "old");
    wait_until_back(&at);
    let clone = wait_for_end(&mut recipient(&at).await, &name).await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    assert_eq!((site.mark(), site.told()), ("old".to_owned(), "own\n".to_owned()));
}

/// Guards the same for a clone that was cancelled, of which nothing is to be left: not before its server runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_data_a_cancelled_clone_has_not_discarded_is_started_again() {
    let site = Site::new();
    let name = killed_before_the_discard(&site, true).await;
    std::fs::write(site.path("start-fails"), "").unwrap();
    let mut at = site.with_hooks(&[], &[]);
    wait_for_failed_start(&at);
    at.0.kill();
    std::fs::remove_file(site.path("start-fails")).unwrap();
    let at = site.with_hooks(&[], &[]);
    assert_eq!(mark(&site), "old");
    let clone = get(&mut recipient(&at).await, &name).await;
    assert_eq!((clone.state(), clone.resumes), (State::Cancelled, 0), "{clone:?}");
    wait_for("nothing to be left", || site.leftovers().is_empty().then_some(()));
}

/// Guards a clone that goes on after that: its server is stopped again, and the data go.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_had_not_discarded_the_data_yet_goes_on() {
    let site = Site::new();
    let name = killed_before_the_discard(&site, false).await;
    let at = site.with_hooks(&[], &[]);
    let mut client = recipient(&at).await;
    let has_ended = async {
        while get(&mut client, &name).await.state() == State::InProgress {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(300), has_ended).await.expect("it ends");
    let clone = get(&mut client, &name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(mark(&site), "new");
    assert_eq!(site.told(), "own\nfirst\nopened\n");
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
}

/// Guards what was said: a clone that failed before its install had begun is installed by no later start,
/// over what people have written since, also where its server could not be started again. (Without the
/// record that it goes, or with that and the record of the stopped server removed at once, it is installed,
/// or the server stays down.)
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_failed_is_not_installed_by_a_later_start() {
    let site = Site::new();
    for file in ["stop-fails", "start-fails"] {
        std::fs::write(site.path(file), "").unwrap();
    }
    let mut at = hooked(&site, &[]);
    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    let message = clone.error.expect("a failure").message;
    assert!(message.contains("could not be started again"), "{message}");
    at.0.kill();
    std::fs::remove_file(site.path("stop-fails")).unwrap();
    let mut at = site.with_hooks(&[], &[]);
    wait_for_failed_start(&at);
    assert_eq!(get(&mut recipient(&at).await, &clone.name).await.state(), State::Failed);
    at.0.kill();
    // A person starts it, and stops it again much later.
    site.start_server();
    drop(site.ask("CREATE TABLE app.later (id INT)"));
    site.shut_server_down();
    std::fs::remove_file(site.path("start-fails")).unwrap();
    let at = site.with_hooks(&[], &[]);
    assert_eq!(mark(&site), "old");
    drop(site.ask("SELECT * FROM app.later"));
    assert_eq!(get(&mut recipient(&at).await, &clone.name).await.state(), State::Failed);
    wait_for("nothing to be left", || site.leftovers().is_empty().then_some(()));
}

/// Guards the same for a clone that was cancelled while its server stopped, with a recipient that was
/// killed before it could say so.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_was_cancelled_while_its_server_stopped_is_not_installed() {
    let site = Site::new();
    site.start_server();
    let mut at = held_with_hooks(&site, "server_stopped");
    let mut client = recipient(&at).await;
    let clone = site.begin(&mut client, CloneOptions::default()).await.expect("accepted");
    wait_for_moment(&at, "server_stopped");
    let request = CancelCloneRequest { name: clone.name.clone() };
    client.cancel_clone(request).await.expect("it is cancelled");
    at.0.kill();
    std::fs::write(site.path("start-fails"), "").unwrap();
    let mut at = held_with_hooks(&site, "none");
    wait_for_failed_start(&at);
    at.0.kill();
    std::fs::remove_file(site.path("start-fails")).unwrap();
    let at = held_with_hooks(&site, "none");
    assert_eq!(mark(&site), "old");
    let clone = get(&mut recipient(&at).await, &clone.name).await;
    assert_eq!(clone.state(), State::Cancelled, "{clone:?}");
    wait_for("nothing to be left", || site.leftovers().is_empty().then_some(()));
}

/// Guards the way back by commands: the old data are started as what they are.
#[tokio::test(flavor = "multi_thread")]
async fn commands_stop_and_start_the_server_for_a_roll_back() {
    let site = Site::new();
    let at = hooked(&site, &[]);
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    // One whose stop fails has not begun: the clone stands, and its server runs.
    std::fs::write(site.path("stop-fails"), "").unwrap();
    let back = RollbackCloneRequest { name: clone.name.clone(), discard_writes: true };
    let refused = client.rollback_clone(back.clone()).await.expect_err("the stop fails");
    assert!(refused.message().contains("SHUTDOWN"), "{refused}");
    assert_eq!(mark(&site), "new");
    std::fs::remove_file(site.path("stop-fails")).unwrap();
    let answer = client.rollback_clone(back).await.expect("it is rolled back").into_inner();
    assert_eq!(answer.clone.expect("a clone").state(), State::RolledBack);
    assert_eq!(mark(&site), "old");
    assert_eq!(site.told(), "first\nopened\nopened\nown\n");
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
    let at = hooked(&site, &["--recovery-timeout", "5s"]);
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    let error = clone.error.expect("a failure");
    assert_eq!(error.reason, "SERVER_NOT_HEALTHY", "{error:?}");
    assert!(error.message.contains("the old data are back"), "{}", error.message);
    assert_eq!(site.told(), "first\nown\n");
    assert_eq!(mark(&site), "old");
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    // A recipient that is asked about it later says the same.
    assert_eq!(get(&mut client, &clone.name).await.state(), State::Failed);
}
