//! Clones that somebody or something gives up: what was said stays said over a kill, and neither the data
//! nor the server pay for it.

use std::process::{Command, Stdio};

use marcot_common::in_use::InUse;
use marcot_proto::recipient::v1::{
    AcceptCloneRequest, Clone, CloneOptions, DeleteLeftoverRequest, Leftover, ListLeftoversRequest,
    RollbackCloneRequest, State, recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Recipient,
    client::wait_for_end,
    killer::Blow,
    new_directory, recipient,
    site::Site,
    target_directory,
    volume::{Immutable, Mounted},
    wait_for,
};
use tonic::transport::Channel;

use crate::held::{Held, get};

async fn leftovers(client: &mut RecipientServiceClient<Channel>) -> Vec<Leftover> {
    let request = ListLeftoversRequest::default();
    client.list_leftovers(request).await.expect("they are listed").into_inner().leftovers
}

/// The command line against a recipient, without a terminal: exit code, standard output, standard error.
fn marcot(at: &Recipient, arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(target_directory().join("marcot"))
        .args(["--recipient", &format!("127.0.0.1:{}", at.0.address.port())])
        .args(arguments)
        .env("MARCOT_DONOR_PASSWORD", "secret")
        .stdin(Stdio::null())
        .output()
        .expect("marcot is built");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// Guards data against a command that somebody has only tried: to discard them first takes a yes, and
/// without a terminal `--yes`.
#[tokio::test(flavor = "multi_thread")]
async fn data_are_not_discarded_first_without_a_yes() {
    let site = Site::new();
    let at = site.supervise(&[]);
    let donor = format!("127.0.0.1:{}", site.donor.port());
    let clone = ["clone", "--donor", &donor, "--donor-user", "clone", "--discard-old-data-first"];
    let (code, _, told) = marcot(&at, &clone);
    assert_eq!(code, Some(2), "{told}");
    assert!(told.contains("if the clone fails, they are gone"), "{told}");
    assert!(told.contains("--yes"), "{told}");
    assert!(!at.0.log().contains("clone accepted"), "{}", at.0.log());
    let (code, _, told) = marcot(&at, &[&clone[..], &["--yes"]].concat());
    assert_eq!(code, Some(0), "{told}");
    site.wait_for_server();
    assert_eq!(site.mark(), "new");
}

/// Guards a caller's word over a kill: what was cancelled is not installed by the next start. (Without
/// `requested_cancellation` it is: its copy was whole.)
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_was_cancelled_is_not_installed_after_a_kill() {
    let mut held = Held::at("staged", &[]).await;
    assert!(held.cancel().await.requested_cancellation);
    held.at.0.kill();
    let at = held.site.supervise(&[]);
    let mut client = recipient(&at).await;
    let clone = get(&mut client, &held.clone.name).await;
    assert_eq!(clone.state(), State::Cancelled, "{clone:?}");
    assert_eq!(held.site.mark(), "old");
    assert!(held.site.leftovers().is_empty(), "{:?}", held.site.leftovers());
}

/// Guards the same where what it has staged could not be removed when it ended, nor be marked as what goes.
/// (Where a start looks at the install alone, and not at how the clone has ended, it installs it.)
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_clone_that_could_not_be_removed_is_not_installed_by_a_later_start() {
    let mut held = Held::at("staged", &[]).await;
    let mounted = Mounted::over_itself(&held.site.staging("exchange", held.id()).join("tree/app"));
    held.cancel().await;
    held.go_on();
    assert_eq!(held.end().await.state(), State::Cancelled);
    assert_eq!(held.site.leftovers().len(), 1, "nothing is removed from a mount");
    assert_eq!(held.at.0.terminate(), Some(0));
    drop(mounted);
    let at = held.site.supervise(&[]);
    let clone = get(&mut recipient(&at).await, &held.clone.name).await;
    assert_eq!(clone.state(), State::Cancelled, "{clone:?}");
    assert_eq!(held.site.mark(), "old");
    assert!(held.site.leftovers().is_empty(), "{:?}", held.site.leftovers());
}

/// Guards the same while it copies: what was cancelled is not copied on.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_was_cancelled_is_not_copied_on_after_a_kill() {
    let options = CloneOptions { discard_old_data_first: true, ..Default::default() };
    let mut held = Held::with("discard", &[], options).await;
    held.cancel().await;
    held.at.0.kill();
    let at = held.site.supervise(&[]);
    let mut client = recipient(&at).await;
    let clone = get(&mut client, &held.clone.name).await;
    assert_eq!(clone.state(), State::Cancelled, "{clone:?}");
    assert_eq!((held.site.mark(), clone.resumes), ("old".to_owned(), 0));
    assert!(held.site.leftovers().is_empty(), "{:?}", held.site.leftovers());
}

/// Guards data that were to be discarded: a cancel that comes while their server stops keeps them, and
/// the server runs on them again. (Without the look after the stop they go, and the clone with them.)
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_while_the_server_stops_keeps_the_data_to_be_discarded() {
    let options = CloneOptions { discard_old_data_first: true, ..Default::default() };
    let mut held = Held::with("discard_stopped", &[], options).await;
    assert_eq!(held.site.server_pid(), None);
    held.cancel().await;
    held.go_on();
    let clone = held.end().await;
    assert_eq!(clone.state(), State::Cancelled, "{clone:?}");
    held.site.wait_for_server();
    assert_eq!(held.site.mark(), "old");
    assert!(held.site.leftovers().is_empty(), "{:?}", held.site.leftovers());
}

/// Guards the server against what cannot be removed: it starts on its data, the rest is told of and goes
/// once it can. (With the removal's failure as the start's, no server runs until a person has acted.)
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_removed_does_not_keep_the_server_down() {
    let mut held = Held::at("stopped", &[]).await;
    held.at.0.kill();
    let id = held.id();
    let file = Immutable::new(&held.site.staging("exchange", id).join("tree/ibdata1"));
    let at = held.site.supervise(&[]);
    let mut client = recipient(&at).await;
    assert_eq!(get(&mut client, &held.clone.name).await.state(), State::Failed);
    assert_eq!(held.site.mark(), "old");
    let (_, listed, _) = marcot(&at, &["prune"]);
    drop(file);
    let lines: Vec<_> = listed.lines().collect();
    assert_eq!(lines.len(), 2, "{listed}");
    for word in [id, "MiB", " yes ", "what is left of a clone that was given up"] {
        assert!(lines[1].contains(word), "{word} is not in {listed}");
    }
    let (code, listed, told) = marcot(&at, &["prune", "--all"]);
    assert_eq!((code, listed.lines().count()), (Some(0), 1), "{listed}{told}");
    assert!(told.contains(&format!("removed leftovers/{id}")), "{told}");
    assert!(held.site.leftovers().is_empty(), "{:?}", held.site.leftovers());
}

/// Guards the server where an install cannot go on: it was left to the install to start it.
#[tokio::test(flavor = "multi_thread")]
async fn an_install_that_cannot_go_on_leaves_the_server_running() {
    let mut held = Held::at("staged", &[]).await;
    held.at.0.kill();
    wait_for("its server to end", || held.site.server_pid().is_none().then_some(()));
    // A donor on this host reads the data.
    let donor = InUse::shared(&held.site.data).expect("nobody has it alone");
    let at = held.site.supervise(&[]);
    let mut client = recipient(&at).await;
    let clone = wait_for_end(&mut client, &held.clone.name).await;
    assert_eq!(clone.error.as_ref().map(|e| &*e.reason), Some("IS_DONOR"), "{clone:?}");
    held.site.wait_for_server();
    assert_eq!(held.site.mark(), "old");
    drop(donor);
    // A clone that has failed is not installed by a later start either.
    assert!(held.site.leftovers().is_empty(), "{:?}", held.site.leftovers());
}

/// Guards a server that takes longer to stop than anybody waits: the clone fails, and the server does
/// not stay down once it has stopped after all.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_too_late_is_started_again() {
    let settings = ["--stop-timeout", "2s", "--server-wait", "2s"];
    let mut held = Held::at("staged", &settings).await;
    let pid = held.site.server_pid().expect("it runs");
    Blow::Freeze.strike(pid);
    held.go_on();
    let clone = held.end().await;
    let error = clone.error.as_ref().expect("it fails");
    assert_eq!((clone.state(), &*error.reason), (State::Failed, "SERVER_RUNNING"), "{clone:?}");
    Blow::Thaw.strike(pid);
    wait_for("another server", || held.site.server_pid().filter(|&now| now != pid));
    held.site.wait_for_server();
    assert_eq!(held.site.mark(), "old");
    assert!(held.site.leftovers().is_empty(), "{:?}", held.site.leftovers());
}

/// Guards the record of a clone that failed after it was installed, and the old data beside it: their time
/// does not run out under a failure, and an accept changes nothing of how the clone has ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_failed_keeps_its_error_and_the_old_data_until_it_is_accepted() {
    let site = Site::new();
    let told = site.path("told");
    let on_end = format!("echo $MARCOT_CLONE_STATE >> {}", told.display());
    // A server that starts closed, and not open to everybody.
    let script = "case \" $* \" in *' --skip-networking '*) ;; *' --skip-slave-start '*) exit 1;; esac; \
                  exec \"$0\" \"$@\"";
    let command = [["sh", "-c", script].map(str::to_owned).to_vec(), site.command()].concat();
    let options = ["--keep-old-data", "1s", "--stop-timeout", "10s", "--on-end", &on_end];
    let at = site.supervise_command(&options, &command);
    site.wait_for_server();
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    let message = &clone.error.as_ref().expect("an error").message;
    assert!(message.contains("could not be opened"), "{message}");
    // Two looks of what removes kept data, each of which would find that their time is over.
    std::thread::sleep(std::time::Duration::from_secs(11));
    let log = at.0.log();
    assert!(!log.contains("have been kept for their time"), "{log}");
    assert_eq!(site.leftovers().len(), 1);
    let request = AcceptCloneRequest { name: clone.name.clone() };
    let accepted = client.accept_clone(request).await.expect("it is accepted").into_inner();
    let accepted = accepted.clone.expect("a clone");
    let end = |clone: &Clone| (clone.state(), clone.error.clone(), clone.end_time);
    assert_eq!(end(&accepted), end(&clone));
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    let text = std::fs::read_to_string(&told).expect("the command has run");
    assert_eq!(text, "FAILED\n", "an end is told of once");
    site.wait_for_server();
    assert_eq!(site.mark(), "new");
}

/// Guards the disk: a clone that was rolled back can be removed also once another one has been installed.
/// (Where only the standing tree is looked at it never can: that is neither of its own.)
#[tokio::test(flavor = "multi_thread")]
async fn a_rolled_back_clone_can_be_removed_after_another_one() {
    let site = Site::new();
    let at = site.supervise(&[]);
    let (mut client, first) = site.replace(&at).await;
    let back = RollbackCloneRequest { name: first.name.clone(), discard_writes: true };
    client.rollback_clone(back).await.expect("it is rolled back");
    let (_, second) = site.replace(&at).await;
    assert_eq!(second.state(), State::Completed, "{second:?}");
    let accept = AcceptCloneRequest { name: second.name };
    client.accept_clone(accept).await.expect("it is accepted");
    assert_eq!(site.leftovers().len(), 1);
    let (code, listed, told) = marcot(&at, &["prune", "--all"]);
    assert_eq!((code, listed.lines().count()), (Some(0), 1), "{listed}{told}");
    assert!(site.leftovers().is_empty(), "{:?}", site.leftovers());
    assert_eq!(site.mark(), "new");
}

/// Guards a person's writes: where nobody of ours runs the server a clone counts as one that was open, and
/// a roll-back that was cut keeps its tree.
#[tokio::test(flavor = "multi_thread")]
async fn a_roll_back_without_a_managed_server_keeps_the_clones_tree_over_a_kill() {
    let site = Site::new();
    let hold = site.path("hold");
    std::fs::write(&hold, "").expect("writable");
    let wish = format!("exchanging_back:{}", hold.display());
    let data = site.data.display().to_string();
    let (home, options) = (site.home.path(), ["--data-directory", &*data]);
    let mut at = Recipient::start_with(home, &options, &[("MARCOT_TEST_HOLD_AT", &wish)]);
    let (mut client, clone) = site.replace(&at).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let name = clone.name.clone();
    let back = tokio::spawn(async move {
        let request = RollbackCloneRequest { name, discard_writes: true };
        client.rollback_clone(request).await
    });
    wait_for("the step", || at.0.log().contains("at=\"exchanging_back\"").then_some(()));
    at.0.kill();
    back.await.expect("a task").expect_err("the recipient was killed");
    let at = Recipient::start(home, &options);
    let mut client = recipient(&at).await;
    assert_eq!(get(&mut client, &clone.name).await.state(), State::RolledBack);
    let left = site.leftovers();
    assert_eq!(left.len(), 1, "the clone's tree is kept aside: {left:?}");
    assert!(left[0].join("tree/only_new").is_dir(), "{left:?}");
    assert!(!site.data.join("only_new").exists());
}

/// Guards what a recipient stages beside another one's data: it is no leftover of that one's. (Without
/// the look at who works there `marcot prune --all` removes it.)
#[tokio::test(flavor = "multi_thread")]
async fn what_a_neighbour_stages_is_no_leftover() {
    let options = CloneOptions { discard_old_data_first: true, ..Default::default() };
    let held = Held::with("discard", &[], options).await;
    let (neighbour, home) = (held.site.path("neighbour"), new_directory());
    std::fs::create_dir(&neighbour).expect("writable");
    let data = neighbour.display().to_string();
    let at = Recipient::start(home.path(), &["--data-directory", &data]);
    let mut client = recipient(&at).await;
    let left = leftovers(&mut client).await;
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(!left[0].removable, "{left:?}");
    let request = DeleteLeftoverRequest { name: left[0].name.clone() };
    let refused = client.delete_leftover(request).await.unwrap_err();
    assert!(refused.message().contains("another recipient"), "{refused}");
    assert_eq!(held.site.leftovers().len(), 1);
    held.go_on();
}
