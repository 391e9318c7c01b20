//! Whole clones between real processes.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::{os::unix::ffi::OsStrExt as _, path::Path};

use marcot_common::{accounts::Accounts, connection::Privilege, tls::Fingerprint};
use marcot_proto::{
    common::v1::Stage,
    recipient::v1::{
        AcceptCloneRequest, CancelCloneRequest, CloneInstanceRequest, CloneLimits,
        CloneLocalRequest, CloneOptions, CloneStatementRequest, Compression, GetCloneRequest,
        ListClonesRequest, State, ValidateCloneRequest, validate_clone_request,
    },
};
use marcot_tests::{
    Certificates, Donor, Pair, Recipient, admin::get, client::wait_for_end, clone_and_wait,
    clone_error, new_directory, recipient, tree, wait_for,
};

fn no_staging(home: &Path) {
    let left: Vec<_> =
        tree::names(home).into_iter().filter(|name| name.starts_with(".marcot-")).collect();
    assert_eq!(left, Vec::<String>::new(), "staging is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_of_every_kind_arrives_as_it_was() {
    let pair = Pair::start(&[], &["--data-directory", "{home}/data"]).await;
    let (home, data) = (pair.home(), pair.data());
    let donor = &pair.donor;
    let mut client = pair.client.clone();
    let plain = home.join("plain");
    let clone = clone_and_wait(&mut client, &donor.statement(&plain, "")).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(clone.encrypted, Some(false));
    assert_eq!(clone.files_copied, clone.files_expected);
    tree::assert_identical(&data, &plain);

    let request = CloneInstanceRequest {
        host: "127.0.0.1".to_owned(),
        port: donor.port().into(),
        user: "clone".to_owned(),
        data_directory: home.join("zstd").display().to_string().into_bytes().into(),
        compression: Some(Compression { level: 3, automatic: false }),
        ..Default::default()
    };
    let started = client.clone_instance(request).await.unwrap().into_inner().clone.unwrap();
    let clone = wait_for_end(&mut client, &started.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    tree::assert_identical(&data, &home.join("zstd"));

    let request = CloneLocalRequest {
        data_directory: home.join("local").display().to_string().into_bytes().into(),
        options: None,
    };
    let started = client.clone_local(request).await.unwrap().into_inner().clone.unwrap();
    assert_eq!(started.source, "LOCAL INSTANCE");
    let clone = wait_for_end(&mut client, &started.name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    tree::assert_identical(&data, &home.join("local"));
    no_staging(home);
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_are_asked_for_and_no_secret_is_told() {
    let home = new_directory();
    let home = home.path();
    let data = home.join("data");
    tree::make(&data);
    let path = home.join("accounts.toml");
    let mut accounts = Accounts::open_or_create(&path).unwrap();
    accounts.add("clone", "secret", &[Privilege::BackupAdmin]).unwrap();
    accounts.add("watch", "secret", &[Privilege::Monitor]).unwrap();
    accounts.save().unwrap();
    let donor = Donor::start(home, &data, &["--accounts", &path.display().to_string()]);
    let daemon = Recipient::start(home, &[]);
    let mut client = recipient(&daemon).await;
    let target = home.join("copy");
    let statement = donor.statement(&target, "REQUIRE NO SSL");

    let failure = clone_error(&mut client, &statement.replace("'secret'", "'wr0ng'")).await;
    assert_eq!(failure.error_number, 3862);
    assert_eq!(failure.metadata["donor_mysql_error"], "1045", "{failure:?}");
    let failure = clone_error(&mut client, &statement.replace("'clone'", "'watch'")).await;
    assert_eq!(failure.metadata["donor_mysql_error"], "1227", "{failure:?}");
    assert!(!target.exists());

    let clone = clone_and_wait(&mut client, &statement).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert!(clone.statement.contains("IDENTIFIED BY <secret>"), "{}", clone.statement);
    tree::assert_identical(&data, &target);
    let listed = client.list_clones(ListClonesRequest::default()).await.unwrap().into_inner();
    for text in [format!("{listed:?}"), daemon.0.log(), donor.0.log()] {
        assert!(!text.contains("wr0ng") && !text.contains("'secret'"), "{text}");
    }
}

/// Each bad input of the plugin that applies, with its number; nothing is left behind.
#[tokio::test(flavor = "multi_thread")]
async fn bad_inputs_have_the_plugins_numbers_and_leave_nothing() {
    let pair = Pair::start(&[], &["--data-directory", "{home}/data"]).await;
    let home = pair.home();
    let donor = &pair.donor;
    let mut client = pair.client.clone();
    std::fs::create_dir(home.join("there")).unwrap();
    std::fs::write(home.join("file"), "x").unwrap();
    std::os::unix::fs::symlink("nowhere", home.join("dangling")).unwrap();
    let before = tree::names(home);

    let long = format!("/{}", "x".repeat(600));
    let at = |path: &str| donor.statement(Path::new(path), "");
    let below = |name: &str| donor.statement(&home.join(name), "");
    for (statement, number, reason) in [
        (at("relative"), 1525, "PATH_NOT_ABSOLUTE"),
        (at(""), 1525, "PATH_NOT_ABSOLUTE"),
        (below("../x"), 1525, "PATH_NOT_ABSOLUTE"),
        (at(&long), 1680, "PATH_TOO_LONG"),
        (below("there"), 1007, "TARGET_EXISTS"),
        (below("file"), 1007, "TARGET_EXISTS"),
        (below("dangling"), 1007, "TARGET_EXISTS"),
        (below("data/inside"), 3632, "PATH_IN_DATADIR"),
        (below("no/parent"), 1006, "PARENT_NOT_WRITABLE"),
        (below("file/x"), 1006, "PARENT_NOT_WRITABLE"),
        (at("/nowhere-allowed"), 1290, "PATH_NOT_ALLOWED"),
        ("CLONE INSTANCE FROM 'u'@'h' IDENTIFIED BY ''".to_owned(), 1064, "SYNTAX_ERROR"),
        ("CLONE LOCAL DATA DIRECTORY relative".to_owned(), 1064, "SYNTAX_ERROR"),
        ("CLONE LOCAL DATA DIRECTORY 'x'".to_owned(), 1525, "PATH_NOT_ABSOLUTE"),
        (below("c").replace("127.0.0.1", "no-such-host.invalid"), 3862, "DONOR_UNREACHABLE"),
        (below("c") + " REQUIRE SSL", 3862, "TLS_NOT_CONFIGURED"),
    ] {
        let failure = clone_error(&mut client, &statement).await;
        let got = (failure.error_number, failure.reason.as_str());
        assert_eq!(got, (number, reason), "{statement}: {failure:?}");
    }
    // `file/x` and the like must not have made anything; the daemons' own files are the same.
    assert_eq!(tree::names(home), before);
}

/// Guards the modes: a donor that requires TLS is not cloned in plaintext, and REQUIRE SSL never ends
/// in plaintext. Without the policy's line for `--require-tls` the first clone completes.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_that_requires_tls_is_cloned_with_tls_only() {
    let home = new_directory();
    let home = home.path();
    let data = home.join("data");
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("file"), "x").unwrap();
    let certificates = Certificates::create(&home.join("tls"));
    let (chain, key) = certificates.sign("donor", &["localhost"]);
    let donor =
        Donor::start(home, &data, &["--tls-cert", &chain, "--tls-key", &key, "--require-tls"]);
    let daemon = Recipient::start(home, &[]);
    let mut client = recipient(&daemon).await;
    let statement = donor.statement(&home.join("copy"), "REQUIRE NO SSL");
    let failure = clone_error(&mut client, &statement).await;
    assert_eq!(failure.error_number, 3862);
    assert_eq!(failure.metadata["donor_mysql_error"], "3159", "{failure:?}");
    // The system's roots do not know the test's CA; the text names the two ways on.
    let statement = donor.statement(&home.join("copy"), "REQUIRE SSL");
    let failure = clone_error(&mut client, &statement).await;
    assert_eq!(failure.reason, "CERTIFICATE_NOT_TRUSTED", "{failure:?}");
    assert!(failure.message.contains("--ssl-ca") && failure.message.contains("fingerprint"));
    // The second way: the fingerprint that the donor has printed.
    let fingerprint = donor.0.fingerprint.as_deref().unwrap();
    let request = CloneStatementRequest {
        statement,
        donor_fingerprint: Fingerprint::parse(fingerprint).unwrap().0.to_vec().into(),
        ..Default::default()
    };
    let started = client.clone_statement(request).await.unwrap().into_inner().clone.unwrap();
    let clone = wait_for_end(&mut client, &started.name).await;
    assert_eq!((clone.state(), clone.encrypted), (State::Completed, Some(true)), "{clone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_findings_are_told_at_once_and_nothing_changes() {
    let home = new_directory();
    let home = home.path();
    let data = home.join("data");
    tree::make(&data);
    let donor =
        Donor::start(home, &data, &["--tls-cert", "x"].iter().take(0).copied().collect::<Vec<_>>());
    let daemon = Recipient::start(home, &[]);
    let mut client = recipient(&daemon).await;
    let validate = |statement: String| ValidateCloneRequest {
        request: Some(validate_clone_request::Request::CloneStatement(CloneStatementRequest {
            statement,
            ..Default::default()
        })),
    };
    let good = validate(donor.statement(&home.join("copy"), ""));
    let answer = client.validate_clone(good).await.unwrap().into_inner();
    assert!(answer.valid, "{answer:?}");
    std::fs::create_dir(home.join("there")).unwrap();
    let bad = validate(donor.statement(&home.join("there"), "REQUIRE SSL"));
    let answer = client.validate_clone(bad).await.unwrap().into_inner();
    assert!(!answer.valid);
    let failed: Vec<_> = answer
        .findings
        .iter()
        .filter(|finding| finding.error_number != 0)
        .map(|finding| (finding.check.as_str(), finding.error_number))
        .collect();
    assert_eq!(failed, [("path_free", 1007), ("donor", 3862)], "{answer:?}");
    assert!(!home.join("copy").exists());
    no_staging(home);
}

/// Without DATA DIRECTORY the recipient's own directory is seeded; data that stand there, and that no
/// server uses, are kept until the clone is accepted.
#[tokio::test(flavor = "multi_thread")]
async fn an_empty_data_directory_of_its_own_is_seeded_and_a_full_one_is_kept_aside() {
    let fill = |data: &Path| {
        std::fs::write(data.join("file"), "from the donor").unwrap();
        std::fs::create_dir(data.parent().unwrap().join("own")).unwrap();
    };
    let pair = Pair::start_with(&[], &["--data-directory", "{home}/own"], fill).await;
    let mut client = pair.client.clone();
    let port = pair.donor.port();
    let statement = format!("CLONE INSTANCE FROM 'clone'@'127.0.0.1':{port} IDENTIFIED BY ''");
    let own = pair.home().join("own");
    let clone = clone_and_wait(&mut client, &statement).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    tree::assert_identical(&pair.data(), &own);

    std::fs::write(own.join("file"), "written since").unwrap();
    let clone = clone_and_wait(&mut client, &statement).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(std::fs::read_to_string(own.join("file")).unwrap(), "from the donor");
    let old = clone.install.expect("an install").old_directory;
    let old = Path::new(std::ffi::OsStr::from_bytes(&old)).to_owned();
    assert_eq!(std::fs::read_to_string(old.join("file")).unwrap(), "written since");
    let failure = clone_error(&mut client, &statement).await;
    assert_eq!(failure.reason, "INSTALL_PENDING", "{failure:?}");
    client.accept_clone(AcceptCloneRequest { name: clone.name }).await.unwrap();
    no_staging(pair.home());
}

/// The caller's trace goes on through the recipient to the donor.
#[tokio::test(flavor = "multi_thread")]
async fn a_callers_trace_reaches_the_donor() {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    let pair = Pair::start_with(&["--log-format", "json"], &[], |_| ()).await;
    let home = pair.home();
    let donor = &pair.donor;
    let mut client = pair.client.clone();
    let mut request = tonic::Request::new(CloneStatementRequest {
        statement: donor.statement(&home.join("copy"), ""),
        ..Default::default()
    });
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    request.metadata_mut().insert("traceparent", parent.parse().unwrap());
    let started = client.clone_statement(request).await.unwrap().into_inner().clone.unwrap();
    assert_eq!(started.trace_id, TRACE);
    wait_for_end(&mut client, &started.name).await;
    let log = donor.0.log();
    let opened = log.lines().find(|line| line.contains("snapshot opened")).expect(&log);
    assert!(opened.contains(TRACE), "{opened}");
}

/// Probes and scrapes, in plaintext, on a port of their own.
#[tokio::test(flavor = "multi_thread")]
async fn the_admin_port_tells_of_health_and_clones() {
    let pair =
        Pair::start_with(&[], &[], |data| std::fs::write(data.join("file"), "x").unwrap()).await;
    let home = pair.home();
    let (donor, daemon) = (&pair.donor, &pair.recipient);
    let mut client = pair.client.clone();
    let clone = clone_and_wait(&mut client, &donor.statement(&home.join("copy"), "")).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let admin = daemon.0.admin.unwrap();
    assert!(get(admin, "/healthz").starts_with("HTTP/1.1 200"));
    assert!(get(admin, "/readyz").starts_with("HTTP/1.1 200"));
    let metrics = get(admin, "/metrics");
    for line in [
        "marcot_operations_started_total 1",
        "marcot_operations_finished_total{outcome=\"succeeded\",reason=\"OK\"} 1",
        "marcot_operations_in_progress 0",
        "marcot_raw_bytes_total 1",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line} is not in\n{metrics}");
    }
}

/// Starts a clone of a tree that takes a while, and waits until bytes move.
async fn start_slow_clone(home: &Path) -> (Donor, Recipient, String) {
    let data = home.join("data");
    std::fs::create_dir(&data).unwrap();
    let big = std::fs::File::create(data.join("big")).unwrap();
    // Data, not holes: eight seconds at the limit.
    let block = vec![0x5a; 8 << 20];
    for _ in 0..8 {
        std::io::Write::write_all(&mut &big, &block).unwrap();
    }
    let donor = Donor::start(home, &data, &[]);
    let daemon = Recipient::start(home, &[]);
    let mut client = recipient(&daemon).await;
    let limits =
        Some(CloneLimits { data_bytes_per_second_max: Some(8 << 20), ..Default::default() });
    let request = CloneStatementRequest {
        statement: donor.statement(&home.join("copy"), ""),
        options: Some(CloneOptions { request_id: "r1".to_owned(), limits, ..Default::default() }),
        ..Default::default()
    };
    let started = client.clone_statement(request).await.unwrap().into_inner().clone.unwrap();
    loop {
        let request = GetCloneRequest { name: started.name.clone() };
        let clone = client.get_clone(request).await.unwrap().into_inner().clone.unwrap();
        assert_eq!(clone.state(), State::InProgress, "{clone:?}");
        if clone.stages[0].data_bytes > 0 {
            return (donor, daemon, started.name);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_clone_leaves_nothing_on_either_side() {
    let home = new_directory();
    let home = home.path();
    let (donor, daemon, name) = start_slow_clone(home).await;
    let mut client = recipient(&daemon).await;

    let failure = clone_error(&mut client, &donor.statement(&home.join("second"), "")).await;
    assert_eq!((failure.error_number, failure.reason.as_str()), (3634, "CLONE_IN_PROGRESS"));
    assert_eq!(failure.metadata["clone"], name);

    client.cancel_clone(CancelCloneRequest { name: name.clone() }).await.unwrap();
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Cancelled, "{clone:?}");
    assert_eq!(clone.error.unwrap().error_number, 1317);
    assert!(!home.join("copy").exists());
    no_staging(home);
    wait_for("the donor to close the snapshot", || {
        donor.0.log().contains("snapshot closed").then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_recipient_remembers_and_goes_on() {
    let home = new_directory();
    let home = home.path();
    let (donor, mut daemon, name) = start_slow_clone(home).await;
    daemon.0.kill();
    assert!(tree::names(home).iter().any(|name| name.starts_with(".marcot-")));
    let daemon = Recipient::start(home, &[]);
    let mut client = recipient(&daemon).await;
    // The same request id is the same clone, also after the restart: nothing is done twice.
    let request = CloneStatementRequest {
        statement: donor.statement(&home.join("copy"), ""),
        options: Some(CloneOptions { request_id: "r1".to_owned(), ..Default::default() }),
        ..Default::default()
    };
    let again = client.clone_statement(request).await.unwrap().into_inner().clone.unwrap();
    assert_eq!(again.name, name);
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!((clone.state(), clone.resumes), (State::Completed, 1), "{clone:?}");
    no_staging(home);
    tree::assert_identical(&home.join("data"), &home.join("copy"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_donor_fails_the_clone_and_what_is_staged_can_be_gone_on_with() {
    let home = new_directory();
    let home = home.path();
    let (mut donor, daemon, name) = start_slow_clone(home).await;
    donor.0.kill();
    let mut client = recipient(&daemon).await;
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Failed, "{clone:?}");
    assert_eq!(clone.error.unwrap().error_number, 3862);
    assert!(!home.join("copy").exists());
    assert!(tree::names(home).iter().any(|name| name.starts_with(".marcot-")));
}

#[tokio::test(flavor = "multi_thread")]
async fn daemons_drain_on_sigterm() {
    let home = new_directory();
    let home = home.path();
    let (mut donor, mut daemon, _) = start_slow_clone(home).await;
    assert_eq!(daemon.0.terminate(), Some(0));
    assert!(!home.join("copy").exists());
    assert_eq!(donor.0.terminate(), Some(0));
}

/// A file that changes while it is copied is copied again; guards the donor's second look
/// (files/compare.rs): without it the copy has the old bytes.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_to_a_file_already_copied_arrives() {
    let home = new_directory();
    let home = home.path();
    let data = home.join("data");
    let (donor, daemon, name) = start_slow_clone(home).await;
    // Old content, copied first (ascending order), is replaced with its size and times kept.
    let path = data.join("big");
    let before = std::fs::metadata(&path).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"changed", 1000).unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
    drop(file);
    std::fs::write(data.join("added"), "later").unwrap();
    let mut client = recipient(&daemon).await;
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let row = &clone.stages[0];
    assert_eq!((row.stage(), row.round), (Stage::FileCopy, 2));
    tree::assert_identical(&data, &home.join("copy"));
    drop(donor);
}
