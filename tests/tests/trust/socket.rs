//! Calls by a Unix socket: its file's mode says who may connect, the kernel whose process it is, and
//! nothing crosses a network.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

use marcot_tests::{Donor, Recipient, new_directory, target_directory, tree, wait_for};

/// Runs the command line by the socket.
fn marcot(socket: &Path, arguments: &[&str]) -> Output {
    Command::new(target_directory().join("marcot"))
        .arg(format!("--recipient=unix:{}", socket.display()))
        .args(arguments)
        .output()
        .expect("marcot is built")
}

fn text(output: &Output) -> String {
    let all = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8_lossy(&all).into_owned()
}

/// Guards the rule that a password is taken where nobody listens: by the socket it is, and the clone
/// runs. The file is its owner's alone.
#[test]
fn a_statement_with_a_password_is_taken_over_a_unix_socket() {
    let (home, at) = (new_directory(), tempfile::tempdir().expect("a short path"));
    let data = home.path().join("data");
    tree::make(&data);
    let donor = Donor::start(home.path(), &data, &[]);
    let socket = at.path().join("recipient.sock");
    let listen = format!("unix:{}", socket.display());
    let recipient = Recipient::start(home.path(), &["--listen", &listen]);
    assert_eq!(socket.metadata().expect("it is there").permissions().mode() & 0o777, 0o600);
    let statement = donor.statement(&home.path().join("copy"), "");
    let output = marcot(&socket, &["sql", &statement]);
    assert!(output.status.success(), "{}", text(&output));
    tree::assert_identical(&data, &home.path().join("copy"));
    assert!(!recipient.0.log().contains("'secret'"), "the password is in the log");
    // The donor's service is reached by one as well.
    drop(donor);
    let donor_socket = at.path().join("donor.sock");
    let listen = format!("unix:{}", donor_socket.display());
    let donor = Donor::start(home.path(), &data, &["--listen", &listen, "--socket-mode", "0660"]);
    let mode = donor_socket.metadata().expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    drop(donor);
}

/// Guards deny-by-default by the socket: who comes by it must be known like all others, unless the
/// identities file names his user on this host.
#[test]
fn a_user_of_this_host_is_worth_the_privileges_that_the_file_gives_him() {
    let (home, at) = (new_directory(), tempfile::tempdir().expect("a short path"));
    let data = home.path().join("data");
    tree::make(&data);
    let donor = Donor::start(home.path(), &data, &[]);
    let statement = donor.statement(&home.path().join("copy"), "");
    let uid = rustix::process::geteuid().as_raw();
    for (named, privilege, listed, cloned) in [
        (uid, "MONITOR", "0", "PRIVILEGE_REQUIRED"),
        (uid, "BACKUP_ADMIN", "0", "0"),
        (uid + 1, "CLONE_ADMIN", "NOT_LOGGED_IN", "NOT_LOGGED_IN"),
    ] {
        let identities = home.path().join("identities.toml");
        let file = format!("[unix_user.{named}]\nprivileges = [\"{privilege}\"]\n");
        std::fs::write(&identities, file).expect("writable");
        let socket = at.path().join(format!("{privilege}.sock"));
        let listen = format!("unix:{}", socket.display());
        let identities = identities.display().to_string();
        // Addresses and TLS are asked of who comes over the network.
        let options =
            ["--listen", listen.as_str(), "--identities", &identities, "--allow-from", "10.0.0.1"];
        let recipient = Recipient::start(home.path(), &options);
        for (arguments, expected) in [(["list"].as_slice(), listed), (&["sql", &statement], cloned)]
        {
            let output = marcot(&socket, arguments);
            if expected == "0" {
                assert!(output.status.success(), "{privilege} {arguments:?}: {}", text(&output));
            } else {
                assert!(text(&output).contains(expected), "{privilege}: {}", text(&output));
            }
        }
        drop(recipient);
    }
}

/// Guards the next start after a kill, which leaves the socket's file; and a daemon that lives.
#[test]
fn a_socket_that_a_killed_daemon_has_left_does_not_keep_the_next_from_starting() {
    let (home, at) = (new_directory(), tempfile::tempdir().expect("a short path"));
    let socket = at.path().join("recipient.sock");
    let listen = format!("unix:{}", socket.display());
    let mut first = Recipient::start(home.path(), &["--listen", &listen]);
    first.0.kill();
    assert!(socket.exists(), "a kill leaves it");
    let mut next = Recipient::start(home.path(), &["--listen", &listen]);
    assert!(marcot(&socket, &["list"]).status.success());
    let other = home.path().join("other-state").display().to_string();
    let refused = Command::new(target_directory().join("marcot-recipient"))
        .args(["--listen", &listen, "--state-directory", &other])
        .output()
        .expect("it is built");
    assert!(text(&refused).contains("another process listens there"), "{}", text(&refused));
    assert!(marcot(&socket, &["list"]).status.success(), "the first one is not harmed");
    assert_eq!(next.0.terminate(), Some(0));
    wait_for("the socket to go with its daemon", || (!socket.exists()).then_some(()));
}
