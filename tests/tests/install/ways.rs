//! A server that a person stops and starts, and what a clone finds in the place of data.

use marcot_common::in_use::InUse;
use marcot_proto::recipient::v1::{
    AcceptCloneRequest, AttachReplica, CancelCloneRequest, CloneOptions, GetCloneRequest,
    InstallCloneRequest, InstallStep, RollbackCloneRequest, State,
};
use marcot_tests::{
    Recipient,
    client::wait_for_end,
    mariadb::MariaDb,
    recipient,
    site::{Site, copy_tree},
    volume::{Mounted, run},
};

/// A recipient that can neither stop nor start the server.
fn unmanaged(site: &Site) -> Recipient {
    let data = site.data.display().to_string();
    Recipient::start(site.home.path(), &["--data-directory", &data])
}

/// Guards R11 and 3707: nothing moves under a running server, and the clone is not lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_waits_until_a_person_has_stopped_the_server() {
    let site = Site::new();
    let server = MariaDb::start_with(site.home.path(), &site.data, &site.options);
    let mut at = unmanaged(&site);
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::AwaitingInstall, "{clone:?}");
    let error = clone.error.expect("what to do");
    assert_eq!((error.error_number, error.reason.as_str()), (3707, "SERVER_NOT_MANAGED"));
    assert!(error.message.contains("marcot install"), "{}", error.message);
    let install = InstallCloneRequest { name: clone.name.clone() };
    let refused = client.install_clone(install.clone()).await.expect_err("the server runs");
    assert!(refused.message().contains("stop it"), "{refused}");
    assert_eq!(server.query("SELECT mark FROM app.mark"), "old\n");
    // The clone waits over a restart of the recipient as well.
    at.0.kill();
    let at = unmanaged(&site);
    let mut client = recipient(&at).await;
    let known = client.get_clone(GetCloneRequest { name: clone.name.clone() }).await.unwrap();
    assert_eq!(known.into_inner().clone.unwrap().state(), State::AwaitingInstall);
    server.stop();
    let answer = client.install_clone(install).await.expect("it is installed").into_inner();
    let clone = answer.clone.unwrap();
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert!(clone.error.is_none());
    let server = MariaDb::start_with(site.home.path(), &site.data, &site.options);
    assert_eq!(server.query("SELECT mark FROM app.mark"), "new\n");
    // It is that after a restart of the recipient as well: nobody proves its server's health.
    drop(at);
    let at = unmanaged(&site);
    let mut client = recipient(&at).await;
    let known = client.get_clone(GetCloneRequest { name: clone.name.clone() }).await.unwrap();
    assert_eq!(known.into_inner().clone.unwrap().state(), State::Completed);
    let request = RollbackCloneRequest { name: clone.name.clone(), discard_writes: true };
    let refused = client.rollback_clone(request.clone()).await.expect_err("the server runs");
    assert!(refused.message().contains("not managed"), "{refused}");
    server.stop();
    let answer = client.rollback_clone(request).await.expect("it is rolled back").into_inner();
    assert_eq!(answer.clone.unwrap().state(), State::RolledBack);
    let server = MariaDb::start_with(site.home.path(), &site.data, &site.options);
    assert_eq!(server.query("SELECT mark FROM app.mark"), "old\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_waits_is_cancelled_and_leaves_nothing() {
    let site = Site::new();
    let server = MariaDb::start_with(site.home.path(), &site.data, &site.options);
    let at = unmanaged(&site);
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::AwaitingInstall, "{clone:?}");
    let request = CancelCloneRequest { name: clone.name };
    let answer = client.cancel_clone(request).await.expect("it is cancelled").into_inner();
    assert_eq!(answer.clone.unwrap().state(), State::Cancelled);
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    assert_eq!(server.query("SELECT mark FROM app.mark"), "old\n");
}

/// Guards against a wish that is passed over: nothing here could make the server a replica.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_nobody_starts_is_made_no_replica() {
    let site = Site::new();
    let at = unmanaged(&site);
    let mut client = recipient(&at).await;
    let attach = AttachReplica { user: "repl".to_owned(), ..Default::default() };
    let options = CloneOptions { attach_replica: Some(attach), ..Default::default() };
    let refused = site.begin(&mut client, options).await.expect_err("it is not managed");
    assert!(refused.message().contains("--start-command"), "{refused}");
}

/// Guards what preflight must find before a copy: each was an error after it, or worse.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_carried_over_or_replaced_is_told_before_the_copy() {
    let site = Site::new();
    let at = site.supervise(&[]);
    let mut client = recipient(&at).await;
    let link = site.data.join("server-key.pem");
    std::os::unix::fs::symlink("/etc/ssl/key.pem", &link).expect("writable");
    let refused = site.begin(&mut client, CloneOptions::default()).await.expect_err("a link");
    assert!(refused.message().contains("server-key.pem"), "{refused}");
    std::fs::remove_file(&link).expect("our own link");
    let nested = site.data.join("nested");
    std::fs::create_dir(&nested).expect("writable");
    let mounted = Mounted::over_itself(&nested);
    let refused = site.begin(&mut client, CloneOptions::default()).await.expect_err("a mount");
    assert!(refused.message().contains("is mounted in"), "{refused}");
    drop(mounted);
    assert_eq!(site.mark(), "old");
}

/// Guards `expected_generation` and `request_id`: neither a second clone nor another's data is
/// replaced, also after a restart.
#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_is_the_same_clone_and_another_generation_is_refused() {
    let site = Site::new();
    let mut at = site.supervise(&[]);
    let mut client = recipient(&at).await;
    let options = CloneOptions {
        request_id: "seed-1".to_owned(),
        expected_generation: "initial".to_owned(),
        ..Default::default()
    };
    let clone = site.begin(&mut client, options.clone()).await.expect("accepted");
    let clone = wait_for_end(&mut client, &clone.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(at.0.terminate(), Some(0));
    let at = site.supervise(&[]);
    let mut client = recipient(&at).await;
    let again = site.begin(&mut client, options.clone()).await.expect("the same clone");
    assert_eq!((&again.name, again.state()), (&clone.name, State::Completed));
    assert_eq!(again.install.expect("an install").step(), InstallStep::Opened);
    client.accept_clone(AcceptCloneRequest { name: clone.name.clone() }).await.expect("accepted");
    let other = CloneOptions { request_id: "seed-2".to_owned(), ..options };
    let refused = site.begin(&mut client, other.clone()).await.expect_err("another generation");
    assert!(refused.message().contains(&clone.install.unwrap().generation), "{refused}");
    assert_eq!(site.mark(), "new");
}

/// A supervisor whose server cannot start, for want of data, is where a clone comes first.
#[tokio::test(flavor = "multi_thread")]
async fn a_supervised_server_without_data_is_seeded_and_starts() {
    let site = Site::new();
    std::fs::remove_dir_all(&site.data).expect("our own directory");
    std::fs::create_dir(&site.data).expect("writable");
    let (data, socket) = (site.data.display().to_string(), site.socket.display().to_string());
    let state = site.state.display().to_string();
    let options = [
        "--data-directory",
        &data,
        "--database-socket",
        &socket,
        "--database-user",
        "root",
        "--state-directory",
        &state,
    ];
    let at = Recipient::supervise(site.home.path(), &options, &site.command(), &[]);
    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(clone.install.expect("an install").step(), InstallStep::Accepted);
    assert_eq!(site.mark(), "new");
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
}

/// Guards a volume that is mounted and empty: it cannot make way for a staged directory beside it, so
/// the clone is staged in it. (Before, this was found after the copy: EBUSY.)
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_mount_point_is_seeded() {
    let site = Site::new();
    std::fs::remove_dir_all(&site.data).expect("our own directory");
    std::fs::create_dir(&site.data).expect("writable");
    let mounted = Mounted::over_itself(&site.data);
    let at = unmanaged(&site);
    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(clone.install.expect("an install").step(), InstallStep::Accepted);
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    let server = MariaDb::start_with(site.home.path(), &site.data, &site.options);
    assert_eq!(server.query("SELECT mark FROM app.mark"), "new\n");
    server.stop();
    drop(mounted);
}

/// Where there is no room for both, and the caller says so, the old data go first.
#[tokio::test(flavor = "multi_thread")]
async fn old_data_are_discarded_first_only_when_asked_for() {
    let mut site = Site::new();
    let volume = Mounted::image(&site.path("volume"), "320M", &["mkfs.ext4", "-q", "-F"]);
    let data = volume.mount_point.join("own");
    copy_tree(&site.data, &data);
    std::fs::write(data.join("auto.cnf"), "mine").expect("writable");
    site.data = data;
    let filler = volume.mount_point.join("filler");
    run("fallocate", &["-l", "150M", filler.to_str().expect("plain")]);
    let mut at = site.supervise(&[]);
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.error.expect("no room").error_number, 3873);
    let options = CloneOptions { discard_old_data_first: true, ..Default::default() };
    let clone = site.begin(&mut client, options).await.expect("accepted");
    let clone = wait_for_end(&mut client, &clone.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(site.mark(), "new");
    let identity = std::fs::read_to_string(site.data.join("auto.cnf")).expect("it stays");
    assert_eq!(identity, "mine");
    assert_eq!(at.0.terminate(), Some(0));
}

/// Guards against a donor whose data are replaced under its clone, and a clone of data that are being
/// replaced.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_of_a_running_clone_is_not_replaced_and_what_is_replaced_is_no_donor() {
    let site = Site::new();
    let at = site.supervise(&[]);
    let mut client = recipient(&at).await;
    let read = InUse::shared(&site.data).expect("nobody else has it");
    let refused = site.begin(&mut client, CloneOptions::default()).await.expect_err("it is read");
    assert!(refused.message().contains("is the donor of a clone"), "{refused}");
    drop(read);
    let replaced = InUse::alone(&site.path("source")).expect("nobody else has it");
    let clone = site.begin(&mut client, CloneOptions::default()).await.expect("accepted");
    let clone = wait_for_end(&mut client, &clone.name).await;
    assert_eq!(clone.error.expect("a failure").reason, "DATA_DIRECTORY_REPLACED");
    drop(replaced);
    let (_, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
}
