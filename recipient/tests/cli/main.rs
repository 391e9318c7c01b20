//! The command line as a person and a script see it, against a recipient that does what it is told.

mod support;

use serde_json::Value;
use support::{
    Ended, NAME, Recipient, Running, SECRET, Script, address_on_a_network, marcot, run,
    run_with_input,
};

fn statement() -> String {
    format!("CLONE INSTANCE FROM 'u'@'db1':4405 IDENTIFIED BY '{SECRET}' DATA DIRECTORY '/srv/new'")
}

async fn sql(script: Script, more: &[&str]) -> (Ended, Recipient) {
    let recipient = Recipient::start(script).await;
    let statement = statement();
    let ended = run(recipient.marcot(&[&["sql", &statement], more].concat())).await;
    (ended, recipient)
}

fn document(ended: &Ended) -> Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|e| panic!("{e}: {ended:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completed_clone_ends_with_0_its_stages_and_plain_lines() {
    let (ended, recipient) = sql(Script::Completes, &[]).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("FILE COPY") && ended.stdout.contains("Completed"), "{ended:?}");
    assert!(ended.stderr.contains("FILE COPY: 1.00 MiB of 4.00 MiB"), "{ended:?}");
    assert!(!ended.stdout.contains('\x1b') && !ended.stderr.contains('\x1b'), "{ended:?}");
    let asked = recipient.asked.lock().unwrap();
    assert_eq!(asked.statements[0].statement, statement());
    assert_eq!(asked.watches.len(), 1);
}

/// Guards a password that was typed as an argument, where every user of the host can read it: that is
/// said, and the password not once more. Without the look at where the statement is from nothing is said.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_in_an_argument_is_warned_of_and_not_shown() {
    let warned = |ended: &Ended| ended.stderr.contains("warning: the statement holds a password");
    let (ended, recipient) = sql(Script::Completes, &[]).await;
    assert!(ended.code == Some(0) && warned(&ended), "{ended:?}");
    assert!(!ended.stderr.contains(SECRET) && !ended.stdout.contains(SECRET), "{ended:?}");
    let ended = run_with_input(recipient.marcot(&["sql", "-"]), &statement()).await;
    assert!(ended.code == Some(0) && !warned(&ended), "{ended:?}");
    let without = "CLONE LOCAL DATA DIRECTORY = '/srv/new'";
    let ended = run(recipient.marcot(&["sql", without])).await;
    assert!(ended.code == Some(0) && !warned(&ended), "{ended:?}");
}

/// Guards passwords on a network: none leaves the program over a connection that others may listen to, in
/// whatever it stands. Without `guard` the first of these clones completes, and the rest are asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_not_sent_in_clear_over_a_network() {
    let Some(address) = address_on_a_network() else {
        eprintln!("not run: this host has no address but its loopback");
        return;
    };
    let recipient = Recipient::start_at(Script::Completes, address).await;
    let (statement, directory) = (statement(), ["--data-directory", "/srv/new"]);
    let attach = ["--attach-replica", "repl"];
    let instance = ["clone", "--donor", "db1:1", "--donor-user", "u"];
    let local = "CLONE LOCAL DATA DIRECTORY = '/srv/new'";
    let ask = async |arguments: &[&str]| {
        let mut command = recipient.marcot(arguments);
        command.env("MARCOT_DONOR_PASSWORD", SECRET).env("MARCOT_REPLICATION_PASSWORD", SECRET);
        run(command).await
    };
    for arguments in [
        vec!["sql", &statement],
        vec!["validate", "sql", &statement],
        [&["sql", local][..], &attach].concat(),
        [&instance[..], &directory].concat(),
        [&["local"][..], &directory, &attach].concat(),
        vec!["resume", NAME],
    ] {
        let ended = ask(&arguments).await;
        assert_eq!(ended.code, Some(1), "{arguments:?}: {ended:?}");
        assert!(ended.stderr.contains("(SECRET_IN_CLEAR)"), "{arguments:?}: {ended:?}");
    }
    {
        let asked = recipient.asked.lock().unwrap();
        assert!(asked.statements.is_empty() && asked.instances.is_empty(), "{asked:?}");
        assert!(asked.locals.is_empty(), "{asked:?}");
    }
    let ended = ask(&[&["local"][..], &directory].concat()).await;
    assert_eq!(ended.code, Some(0), "there is none in it: {ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn json_is_one_document_on_standard_output() {
    let (ended, _) = sql(Script::Completes, &["--output", "json"]).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let clone = document(&ended);
    assert_eq!(clone["name"], NAME);
    assert_eq!(clone["state"], "completed");
    assert_eq!(clone["begin_time"], "2026-11-18T11:06:40.000Z");
    assert_eq!(clone["stages"][0]["data_bytes"], 4 << 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_clone_ends_with_1_and_mysqls_number() {
    let (ended, _) = sql(Script::Fails, &[]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("MySQL error 3862 (DONOR_UNREACHABLE)"), "{ended:?}");
    let (ended, _) = sql(Script::Fails, &["--output", "json"]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert_eq!(document(&ended)["error"]["error_number"], 3862);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_clone_ends_with_1_and_every_violation() {
    let (ended, _) = sql(Script::Refuses, &[]).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{ended:?}");
    for line in ["MySQL error 1006 (PREFLIGHT_FAILED)", "free_space: no room", "path_parent: no"] {
        assert!(ended.stderr.contains(line), "{line}: {ended:?}");
    }
    let (ended, _) = sql(Script::Refuses, &["--output", "json"]).await;
    assert_eq!(document(&ended)["error"]["violations"][1]["check"], "path_parent");
}

/// The recipient must not be asked: the place is found here, and shown without the password.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_statement_ends_with_2_and_a_caret_under_the_place() {
    let recipient = Recipient::start(Script::Completes).await;
    let statement = statement().replace("DATA", "DATE");
    let ended = run(recipient.marcot(&["sql", &statement])).await;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    let lines: Vec<&str> = ended.stderr.lines().collect();
    assert_eq!(lines[0], "  CLONE INSTANCE FROM *** IDENTIFIED BY *** ");
    assert_eq!(lines[1].find('^'), Some(lines[0].len()));
    assert!(ended.stderr.contains("MySQL error 1064 (SYNTAX_ERROR)"), "{ended:?}");
    assert_eq!(recipient.asked.lock().unwrap().statements.len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_usage_ends_with_2() {
    let clone = ["clone", "--donor", "db1:1", "--donor-user", "u"];
    for arguments in [
        vec!["nonsense"],
        vec!["local"],
        vec!["--recipient", "ftp://h:1", "list"],
        vec!["--recipient", "h", "list"],
        vec!["--recipient", "http://127.0.0.1:1", "--ca-file", "/ca.pem", "list"],
        vec!["--recipient", "http://127.0.0.1:1", "--tls", "list"],
        vec!["--recipient", "127.0.0.1:1", "--user", "u", "list"],
        clone.to_vec(),
        [&clone[..], &["--require-ssl", "--require-no-ssl"]].concat(),
        [&clone[..], &["--donor-fingerprint", "12"]].concat(),
    ] {
        let ended = run(marcot(&arguments)).await;
        assert_eq!(ended.code, Some(2), "{arguments:?}: {ended:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_cancels_and_waits_for_the_end() {
    let recipient = Recipient::start(Script::Runs).await;
    let mut running = Running::start(recipient.marcot(&["sql", &statement()]));
    running.wait_for("FILE COPY").await;
    running.interrupt();
    let ended = running.end().await;
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(ended.stderr.contains("cancelling"), "{ended:?}");
    assert!(ended.stdout.contains("Cancelled"), "{ended:?}");
    assert_eq!(recipient.asked.lock().unwrap().cancels, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_ctrl_c_leaves_at_once() {
    let recipient = Recipient::start(Script::IgnoresCancel).await;
    let mut running = Running::start(recipient.marcot(&["sql", &statement()]));
    running.wait_for("FILE COPY").await;
    running.interrupt();
    running.wait_for("cancelling").await;
    running.interrupt();
    let ended = running.end().await;
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(ended.stderr.contains(&format!("marcot watch {NAME}")), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_leaves_a_watched_clone_running() {
    let recipient = Recipient::start(Script::Runs).await;
    let mut running = Running::start(recipient.marcot(&["watch"]));
    running.wait_for("FILE COPY").await;
    running.interrupt();
    assert_eq!(running.end().await.code, Some(130));
    assert_eq!(recipient.asked.lock().unwrap().cancels, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_watch_goes_on_where_it_was() {
    let (ended, recipient) = sql(Script::BreaksOnce, &[]).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stderr.contains("lost the recipient"), "{ended:?}");
    let asked = recipient.asked.lock().unwrap();
    let tokens: Vec<&str> = asked.watches.iter().map(|w| w.resume_token.as_str()).collect();
    assert_eq!(tokens, ["", "t2"]);
}

/// Guards against a loop without end: such a watch would never work.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_cannot_work_ends() {
    let (ended, recipient) = sql(Script::RefusesWatch, &[]).await;
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(!ended.stderr.contains("lost the recipient"), "{ended:?}");
    assert_eq!(recipient.asked.lock().unwrap().watches.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn options_say_what_a_statement_says() {
    let recipient = Recipient::start(Script::Completes).await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("password");
    std::fs::write(&file, format!("{SECRET}\n")).unwrap();
    let clone = ["clone", "--donor", "[::1]:4405", "--donor-user", "u", "--require-ssl"];
    let more = ["--data-directory", "/srv/new", "--compression", "-3", "--preserve-owners"];
    let from_file = ["--donor-password-file", file.to_str().unwrap(), "--detach"];
    let ended = run(recipient.marcot(&[&clone[..], &more, &from_file].concat())).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let mut command = recipient.marcot(&clone);
    command.env("MARCOT_DONOR_PASSWORD", SECRET);
    assert_eq!(run(command).await.code, Some(0));
    let asked = recipient.asked.lock().unwrap();
    let instance = &asked.instances[0];
    assert_eq!((instance.host.as_str(), instance.port), ("::1", 4405));
    assert_eq!((instance.user.as_str(), instance.password.as_str()), ("u", SECRET));
    assert_eq!(instance.ssl_mode(), marcot_proto::recipient::v1::SslMode::Required);
    assert_eq!(&instance.data_directory[..], b"/srv/new");
    assert_eq!(instance.compression.unwrap().level, -3);
    assert!(instance.options.as_ref().unwrap().preserve_owners);
    assert_eq!(asked.instances[1].password, SECRET);
    assert_eq!(asked.watches.len(), 1, "a detached clone is not watched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_can_be_piped() {
    let recipient = Recipient::start(Script::Completes).await;
    let ended = run_with_input(recipient.marcot(&["sql", "-"]), &statement()).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(recipient.asked.lock().unwrap().statements[0].statement, statement());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_ends_with_0_or_1() {
    for (script, code, valid) in [(Script::Completes, 0, true), (Script::Refuses, 1, false)] {
        let recipient = Recipient::start(script).await;
        let arguments = ["validate", "local", "--data-directory", "/srv/new", "--output", "json"];
        let ended = run(recipient.marcot(&arguments)).await;
        assert_eq!(ended.code, Some(code), "{ended:?}");
        assert_eq!(document(&ended)["valid"], valid);
        assert_eq!(recipient.asked.lock().unwrap().locals.len(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_clone_is_what_cancel_wants() {
    let recipient = Recipient::start(Script::Runs).await;
    let ended = run(recipient.marcot(&["cancel", NAME])).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("Cancelled"), "{ended:?}");
}

/// As in `marcot list | head -1`.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_is_no_error() {
    let recipient = Recipient::start(Script::Completes).await;
    let mut child = recipient.marcot(&["list", "--count", "1000"]).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_are_added_listed_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("accounts.toml");
    let file = ["--accounts", file.to_str().unwrap()];
    let add = [&["account", "add", "clone", "--privilege", "BACKUP_ADMIN"][..], &file].concat();
    assert_eq!(run_with_input(marcot(&add), &format!("{SECRET}\n")).await.code, Some(0));
    let again = run_with_input(marcot(&add), "x\n").await;
    assert_eq!(again.code, Some(1), "{again:?}");
    let list = [&["account", "list", "--output", "json"][..], &file].concat();
    let listed = document(&run(marcot(&list)).await);
    assert_eq!(listed["accounts"][0]["name"], "clone");
    assert_eq!(listed["accounts"][0]["privileges"][0], "BACKUP_ADMIN");
    let remove = [&["account", "remove", "clone"][..], &file].concat();
    assert_eq!(run(marcot(&remove)).await.code, Some(0));
    assert_eq!(run(marcot(&remove)).await.code, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn completions_and_man_pages_are_written() {
    let ended = run(marcot(&["completions", "bash"])).await;
    assert!(ended.stdout.contains("complete -F _marcot"), "{ended:?}");
    let directory = tempfile::tempdir().unwrap();
    let ended = run(marcot(&["man", directory.path().to_str().unwrap()])).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(directory.path().join("marcot-sql.1").exists());
}
