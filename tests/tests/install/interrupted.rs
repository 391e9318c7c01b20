//! Installs that somebody or something comes in between: another recipient, a stop, another server, a
//! roll-back that cannot be made. Nothing is lost, and the server does not stay down.

use std::{fs::OpenOptions, os::fd::AsFd as _};

use marcot_common::{file_lock, in_use::InUse};
use marcot_proto::recipient::v1::{
    AcceptCloneRequest, CloneOptions, PauseCloneRequest, ResumeCloneRequest, RollbackCloneRequest,
    State,
};
use marcot_tests::{
    client::wait_for_end,
    killer::Blow,
    mariadb::{self, MariaDb},
    recipient,
    site::Site,
    volume::Immutable,
    wait_for,
};

use crate::{
    faults::assert_untouched,
    held::{Held, get},
};

/// Guards the old data against a second recipient: by the lock of the state directory, and with
/// another one by that of the install's journal. (Without them the second removes the staged tree,
/// or what the first has put in its place: the old data.)
#[tokio::test(flavor = "multi_thread")]
async fn a_second_recipient_on_the_same_data_directory_is_refused() {
    let mut held = Held::at("stopped", &["--install-form", "exchange"]).await;
    for (state, reason) in [
        (held.site.state.clone(), "another marcot-recipient runs"),
        (held.site.path("state-2"), "another process has journal"),
    ] {
        let (code, log) = held.site.supervise_until_it_ends(&state);
        assert_eq!(code, Some(1), "{log}");
        assert!(log.contains(reason), "`{reason}` is not in: {log}");
    }
    held.go_on();
    let clone = held.end().await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(held.site.mark(), "new");
    assert_eq!(held.site.leftovers().len(), 1, "the old data are kept");
}

/// Guards the server: what would not do afterwards is found before it is stopped, and what is found
/// after that starts it again.
#[tokio::test(flavor = "multi_thread")]
async fn an_install_that_cannot_begin_leaves_the_server_running() {
    let mut held = Held::at("staged", &[]).await;
    let before = held.site.server_pid();
    let read = InUse::shared(&held.site.data).expect("nobody else has it");
    held.go_on();
    let clone = held.end().await;
    assert_untouched(&held.site, &clone, &["is the donor of a clone"]);
    assert_eq!(held.site.server_pid(), before, "the server was not stopped for it");
    assert_eq!(clone.error.expect("a failure").error_number, 3634);
    drop(read);

    for form in ["exchange", "move"] {
        let mut held = Held::at("staged", &["--install-form", form]).await;
        let before = held.site.server_pid();
        let staged = held.site.staging(form, held.id()).join("tree/ibdata1");
        let file = OpenOptions::new().read(true).write(true).open(&staged).expect("a staged file");
        file_lock::take(file.as_fd()).expect("nobody else has it");
        held.go_on();
        let clone = held.end().await;
        assert_eq!(clone.error.as_ref().expect("a failure").reason, "SERVER_RUNNING");
        held.site.wait_for_server();
        assert_eq!(held.site.mark(), "old");
        assert_ne!(held.site.server_pid(), before, "it was stopped, and is started again");
        drop(file);
    }
}

/// Guards R11 in the two moments in which nothing of ours keeps a server away: between the stop and
/// the locks, and between the locks and the start. Somebody starts one there.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_started_by_someone_else_between_stop_and_lock_undoes_the_install() {
    let mut held = Held::at("server_stopped", &[]).await;
    let site = &held.site;
    let options = mariadb::Options { port: None, ..site.options.clone() };
    let other = MariaDb::start_with(site.home.path(), &site.data, &options);
    held.go_on();
    wait_for("the install to be undone", || {
        held.at.0.log().contains("is started again on what stands").then_some(())
    });
    assert_eq!(other.query("SELECT mark FROM app.mark"), "old\n");
    other.stop();
    let clone = held.end().await;
    assert_untouched(&held.site, &clone, &["holds a lock", "a server is running"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_started_by_someone_else_before_ours_leaves_the_clone_whole() {
    let options = ["--stop-timeout", "10s", "--server-wait", "2s"];
    let mut held = Held::at("unlocked", &options).await;
    let site = &held.site;
    let options = mariadb::Options { port: None, ..site.options.clone() };
    let other = MariaDb::start_with(site.home.path(), &site.data, &options);
    held.go_on();
    let clone = held.end().await;
    assert_eq!(clone.error.expect("a failure").reason, "INSTALL_UNFINISHED");
    assert_eq!(other.query("SELECT mark FROM app.mark"), "new\n");
    other.stop();
    held.at.0.terminate();
    let at = held.site.supervise(&[]);
    let mut client = recipient(&at).await;
    let clone = wait_for_end(&mut client, &held.clone.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(held.site.mark(), "new");
    assert_eq!(held.site.damaged_tables(), "");
}

/// Guards R12: nobody reaches the server over the network before it is `opened`.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_opened_takes_no_connections() {
    let mut held = Held::at("healthy", &[]).await;
    held.site.wait_for_server();
    assert_eq!(held.site.mark(), "new");
    assert!(!held.site.takes_connections());
    let accept = AcceptCloneRequest { name: held.clone.name.clone() };
    held.client.accept_clone(accept).await.expect_err("it is not proven");
    held.go_on();
    let clone = held.end().await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert!(held.site.takes_connections());
}

/// Guards a good clone against the end of the recipient: its server ends with it, and nothing is
/// concluded from that. (Without the leave it may be rolled back. The end of the process mostly comes
/// before, so that this passes without it.)
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_of_the_recipient_leaves_the_install_to_the_next_start() {
    for step in ["staged", "started"] {
        let mut held = Held::at(step, &["--drain-seconds", "1"]).await;
        Blow::Terminate.strike(held.at.0.pid());
        wait_for("the drain to be over", || {
            held.at.0.log().contains("clones still run; they are ended").then_some(())
        });
        held.go_on();
        held.at.0.wait();
        assert!(!held.at.0.log().contains("the old data come back"), "{}", held.at.0.log());
        let at = held.site.supervise(&[]);
        let mut client = recipient(&at).await;
        let clone = wait_for_end(&mut client, &held.clone.name).await;
        assert_eq!(clone.state(), State::Completed, "{step}: {clone:?}");
        assert_eq!(held.site.mark(), "new");
    }
}

/// Guards against a half-restored directory that is called COMPLETED: the clone says what happened,
/// nothing new is begun on it, and the same call goes on once its obstacle has gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_roll_back_that_stopped_half_way_is_gone_on_with() {
    let site = Site::new();
    let at = site.supervise(&["--install-form", "move"]);
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let fixed = site.data.join("fixed.cnf");
    std::fs::write(&fixed, "").expect("writable");
    let fixed = Immutable::new(&fixed);
    let back = RollbackCloneRequest { name: clone.name.clone(), discard_writes: true };
    let refused = client.rollback_clone(back.clone()).await.expect_err("an entry does not move");
    assert!(refused.message().contains("marcot rollback"), "{refused}");
    let half = get(&mut client, &clone.name).await;
    assert_eq!(half.state(), State::Failed, "{half:?}");
    assert_eq!(half.error.expect("a failure").reason, "INSTALL_UNFINISHED");
    let accept = AcceptCloneRequest { name: clone.name.clone() };
    client.accept_clone(accept).await.expect_err("neither tree stands");
    let other = site.begin(&mut client, CloneOptions::default()).await.expect_err("half restored");
    assert!(other.message().contains("step taking_out"), "{other}");
    drop(fixed);
    let answer = client.rollback_clone(back).await.expect("it goes on").into_inner();
    assert_eq!(answer.clone.expect("a clone").state(), State::RolledBack);
    site.wait_for_server();
    assert_eq!(site.mark(), "old");
    assert_eq!(site.damaged_tables(), "");
}

/// Guards the server in the same: where nothing has moved, it runs on the clone again.
#[tokio::test(flavor = "multi_thread")]
async fn a_roll_back_that_cannot_begin_starts_the_server_again() {
    let site = Site::new();
    let at = site.supervise(&["--install-form", "exchange"]);
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let id = clone.name.rsplit('/').next().expect("an id");
    let kept = site.staging("exchange", id).join("tree/ibdata1");
    let file = OpenOptions::new().read(true).write(true).open(kept).expect("the old data");
    file_lock::take(file.as_fd()).expect("nobody else has it");
    let back = RollbackCloneRequest { name: clone.name.clone(), discard_writes: true };
    let refused = client.rollback_clone(back.clone()).await.expect_err("a server runs there");
    assert!(refused.message().contains("holds a lock"), "{refused}");
    site.wait_for_server();
    assert_eq!(site.mark(), "new");
    assert_eq!(get(&mut client, &clone.name).await.state(), State::Completed);
    drop(file);
    let answer = client.rollback_clone(back).await.expect("it goes on").into_inner();
    assert_eq!(answer.clone.expect("a clone").state(), State::RolledBack);
    site.wait_for_server();
    assert_eq!(site.mark(), "old");
}

/// Guards a person's word: a clone that is paused while the copy is verified is not installed before it is
/// resumed.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_is_paused_before_its_install_waits() {
    let mut held = Held::at("verified", &[]).await;
    let request = PauseCloneRequest { name: held.clone.name.clone() };
    held.client.pause_clone(request).await.expect("it is paused");
    held.go_on();
    // An install would have begun at once.
    let begun = std::time::Instant::now();
    while begun.elapsed() < std::time::Duration::from_secs(3) {
        assert_eq!(get(&mut held.client, &held.clone.name).await.state(), State::Paused);
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert_eq!(held.site.mark(), "old");
    let request = ResumeCloneRequest { name: held.clone.name.clone(), ..Default::default() };
    held.client.resume_clone(request).await.expect("it is resumed");
    let clone = held.end().await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(held.site.mark(), "new");
}

/// Guards R13 beyond the first start: whatever starts the server on a clone that is not accepted
/// keeps its events off, and nothing keeps them off once it is.
#[tokio::test(flavor = "multi_thread")]
async fn events_stay_off_until_the_clone_is_accepted() {
    let mut site = Site::new();
    site.options.arguments.push("--event-scheduler=ON".to_owned());
    let events = |site: &Site| {
        site.wait_for_server();
        site.ask("SELECT @@event_scheduler").trim().to_owned()
    };
    let mut at = site.supervise(&[]);
    assert_eq!(events(&site), "ON");
    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(events(&site), "OFF");
    let crash = |site: &Site| {
        let pid = site.server_pid().expect("a server");
        Blow::Kill.strike(pid);
        wait_for("another server", || site.server_pid().filter(|&other| other != pid));
    };
    crash(&site);
    assert_eq!(events(&site), "OFF", "after a crash of the server");
    assert_eq!(at.0.terminate(), Some(0));
    let at = site.supervise(&[]);
    assert_eq!(events(&site), "OFF", "after a restart of the recipient");
    let mut client = recipient(&at).await;
    client.accept_clone(AcceptCloneRequest { name: clone.name }).await.expect("accepted");
    crash(&site);
    assert_eq!(events(&site), "ON", "once it is accepted");
}

/// Guards what was discarded: a recipient that is started again in the middle does not start the
/// server, which would make new, empty data there and open them to everybody. And guards the clone, which
/// is all that there is then: the generation that its caller meant has gone with the data.
#[tokio::test(flavor = "multi_thread")]
async fn no_server_starts_on_data_that_were_discarded() {
    let site = Site::new();
    std::fs::write(site.data.join(".marcot-generation"), "one\n").expect("writable");
    let mut at = site.supervise(&[]);
    let mut client = recipient(&at).await;
    let killer = at.0.strike_at_line("as asked for", site.donor.0.pid(), Blow::Freeze);
    let options = CloneOptions {
        discard_old_data_first: true,
        expected_generation: "one".to_owned(),
        ..Default::default()
    };
    let clone = site.begin(&mut client, options).await.expect("accepted");
    let _at = killer.struck();
    wait_for("the old data to go", || {
        (!["mysql", "ibdata1"].iter().any(|name| site.data.join(name).exists())).then_some(())
    });
    at.0.kill();
    let at = site.supervise_stopped(&[]);
    wait_for("the start", || at.0.log().contains("the server stays stopped").then_some(()));
    assert_eq!(site.server_pid(), None);
    assert!(!site.data.join("ibdata1").exists(), "no server has made new data");
    site.donor.0.thaw();
    let mut client = recipient(&at).await;
    let clone = wait_for_end(&mut client, &clone.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    site.wait_for_server();
    assert_eq!(site.mark(), "new");
    assert!(site.leftovers().is_empty(), "there was nothing to keep: {:?}", site.leftovers());
}

/// Guards the only copy: of data that were discarded first the clone is all that there is, and a kill in the
/// middle of its install, which else ends it, has it installed once more. Without that the start lets it go.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_whose_old_data_were_discarded_is_installed_wherever_it_was_cut() {
    for (form, step) in [
        ("exchange", "stopped"),
        ("exchange", "exchanging"),
        ("move", "setting_aside"),
        ("move", "putting_in"),
    ] {
        let site = Site::new();
        let hold = site.path("hold");
        std::fs::write(&hold, "").expect("writable");
        let wish = format!("{step}:{}", hold.display());
        let options = ["--install-form", form];
        let mut at = site.supervise_with(&options, &[("MARCOT_TEST_HOLD_AT", &wish)]);
        let mut client = recipient(&at).await;
        let discards = CloneOptions { discard_old_data_first: true, ..Default::default() };
        let clone = site.begin(&mut client, discards).await.expect("accepted");
        let line = format!("step=\"{step}\"");
        wait_for("the step", || at.0.log().contains(&line).then_some(()));
        at.0.kill();
        std::fs::remove_file(&hold).expect("our own file");
        let at = site.supervise_stopped(&options);
        let mut client = recipient(&at).await;
        let clone = wait_for_end(&mut client, &clone.name).await;
        assert_eq!(clone.state(), State::Completed, "{form} {step}: {clone:?}");
        site.wait_for_server();
        assert_eq!(site.mark(), "new", "{form} {step}");
        assert!(site.leftovers().is_empty(), "{form} {step}: {:?}", site.leftovers());
    }
}

/// Guards data that are to be discarded: they stand until the clone can be gone on with. (With the
/// journal begun after them, a recipient that is killed in between has neither data nor a clone.)
#[tokio::test(flavor = "multi_thread")]
async fn data_to_be_discarded_stand_until_the_clone_can_be_gone_on_with() {
    let site = Site::new();
    let hold = site.path("hold");
    std::fs::write(&hold, "").expect("writable");
    let wish = format!("discard:{}", hold.display());
    let mut at = site.supervise_with(&[], &[("MARCOT_TEST_HOLD_AT", &wish)]);
    let mut client = recipient(&at).await;
    let options = CloneOptions { discard_old_data_first: true, ..Default::default() };
    let clone = site.begin(&mut client, options).await.expect("accepted");
    wait_for("the moment before", || at.0.log().contains("at=\"discard\"").then_some(()));
    assert_eq!(site.mark(), "old");
    at.0.kill();
    let at = site.supervise_stopped(&[]);
    let mut client = recipient(&at).await;
    let clone = wait_for_end(&mut client, &clone.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(clone.resumes, 1, "{clone:?}");
    site.wait_for_server();
    assert_eq!(site.mark(), "new");
    assert!(site.leftovers().is_empty(), "there was nothing to keep: {:?}", site.leftovers());
}
