//! What surrounds a daemon: a service manager, and a command at the end of a clone.

use std::os::unix::net::UnixDatagram;

use marcot_proto::recipient::v1::State;
use marcot_tests::{Pair, Recipient, client::begin, clone_and_wait, new_directory, wait_for};

fn told(manager: &UnixDatagram) -> Option<String> {
    let mut text = [0; 1024];
    let length = manager.recv(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text[..length]).into_owned())
}

/// Guards `Type=notify`: systemd waits for READY=1, and what is ordered after the service with it. Told
/// only once calls are taken: the ready file of the harness is written after it.
#[test]
fn a_service_manager_is_told_of_the_start_and_of_the_drain() {
    let home = new_directory();
    let path = home.path().join("notify");
    let manager = UnixDatagram::bind(&path).expect("a socket");
    manager.set_nonblocking(true).expect("our own socket");
    let environment = [("NOTIFY_SOCKET", path.to_str().expect("UTF-8"))];
    let mut recipient = Recipient::start_with(home.path(), &[], &environment);
    let ready = told(&manager).expect("it takes calls, so it has told");
    let address = recipient.0.address.to_string();
    assert!(ready.contains("READY=1") && ready.contains(&address), "{ready}");
    assert_eq!(told(&manager), None);
    assert_eq!(recipient.0.terminate(), Some(0));
    let stopping = told(&manager).expect("it has drained");
    assert!(stopping.contains("STOPPING=1"), "{stopping}");
}

/// Guards the command's words, and that a stop waits for it: without the wait it would be killed with the
/// service.
#[tokio::test]
async fn a_command_is_run_at_the_end_of_each_clone_and_a_stop_waits_for_it() {
    let command = "sleep 1; env | grep ^MARCOT_CLONE | sort > {home}/ended.$MARCOT_CLONE_STATE";
    let mut pair = Pair::start(&[], &["--on-end", command]).await;
    let target = pair.home().join("copy");
    let clone = clone_and_wait(&mut pair.client, &pair.donor.statement(&target, "")).await;
    assert_eq!(clone.state(), State::Completed);
    let home = pair.home().to_owned();
    let read = |state: &str| std::fs::read_to_string(home.join(format!("ended.{state}")));
    let text =
        wait_for("the command's file", || read("COMPLETED").ok().filter(|t| t.contains('\n')));
    for line in [
        format!("MARCOT_CLONE={}", clone.name),
        format!("MARCOT_CLONE_SOURCE=127.0.0.1:{}", pair.donor.port()),
        format!("MARCOT_CLONE_DESTINATION={}", target.display()),
        "MARCOT_CLONE_REASON=".to_owned(),
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not among\n{text}");
    }
    assert!(!text.contains("secret"), "{text}");
    // Its donor is gone: it fails, and the service is stopped at once.
    let statement = pair.donor.statement(&pair.home().join("other"), "");
    pair.donor.0.kill();
    let clone = clone_and_wait(&mut pair.client, &statement).await;
    assert_eq!(clone.state(), State::Failed);
    assert_eq!(pair.recipient.0.terminate(), Some(0));
    let text = read("FAILED").expect("the stop has waited");
    assert!(text.contains("MARCOT_CLONE_REASON=DONOR_UNREACHABLE"), "{text}");
}

/// Guards the end of a clone that a start finds: nobody was told of it before. Without it nobody ever is.
#[tokio::test]
async fn the_end_of_a_clone_that_a_start_finds_is_told_of() {
    let command = "echo $MARCOT_CLONE_REASON > {home}/ended";
    let mut pair = Pair::start(&[], &["--on-end", command]).await;
    let home = pair.home().to_owned();
    // It has no snapshot yet: it cannot go on by itself.
    pair.donor.0.freeze();
    let statement = pair.donor.statement(&home.join("copy"), "");
    let _name = begin(&mut pair.client, &statement).await;
    pair.recipient.0.kill();
    assert!(!home.join("ended").exists());
    let command = command.replace("{home}", &home.display().to_string());
    pair.recipient = Recipient::start(&home, &["--on-end", &command]);
    wait_for("the command's file", || {
        let text = std::fs::read_to_string(home.join("ended")).ok()?;
        text.contains("RECIPIENT_RESTARTED").then_some(())
    });
}
