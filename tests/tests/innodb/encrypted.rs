//! Servers whose tables and log are encrypted: the copy has no key and needs none.

use marcot_tests::{
    live::{Live, donor_with},
    load::{Load, LoadOptions},
    mariadb::Version,
};

use crate::matrix::{start, writers};

/// A key for encrypted tables, in a directory that a server does not have.
pub(super) struct Keys(tempfile::TempDir);

impl Keys {
    pub(super) fn new() -> Self {
        let home = marcot_tests::new_directory();
        let key = "1;a7addd9adea9978fda19f21e6be987880e68ac92632ca052e5bb42b1a506939a\n";
        std::fs::write(home.path().join("keys"), key).expect("a writable home");
        Self(home)
    }

    /// Of a server whose tables and log are encrypted by it.
    pub(super) fn arguments(&self) -> Vec<String> {
        let file = self.0.path().join("keys");
        vec![
            "--plugin-load-add=file_key_management".to_owned(),
            format!("--file-key-management-filename={}", file.display()),
            "--innodb-encrypt-tables=FORCE".to_owned(),
            "--innodb-encrypt-log=ON".to_owned(),
            "--innodb-encryption-threads=2".to_owned(),
        ]
    }
}

/// Encrypted tables, log and temporary files; several files of the system tablespace; undo
/// tablespaces that are truncated while they are copied.
///
/// Guards checks of pages without their key (R3), and the log's head, which carries what its key is
/// derived from: with another head no server starts.
///
/// DDL rests once the copy goes on: where the log hides what it deletes (11.8), each table that
/// comes and goes between two looks may be an imported one, and asks for another round.
async fn an_encrypted_server_is_cloned(version: Version) {
    let keys = Keys::new();
    let of_keys = keys.arguments();
    let mut arguments: Vec<&str> = of_keys.iter().map(String::as_str).collect();
    arguments.extend([
        "--innodb-data-file-path=ibdata1:12M;ibdata2:10M:autoextend",
        "--innodb-undo-tablespaces=3",
        "--innodb-undo-log-truncate=ON",
        "--innodb-max-undo-log-size=10485760",
    ]);
    let live = start(version, &arguments);
    let load = Load::start(&live.server, LoadOptions { ddl: true, ..writers() });
    load.wait_for_commits(200);
    live.clone_with("clone", load, |load| {
        // One large transaction makes an undo tablespace that is worth truncating.
        drop(live.server.query("UPDATE mix.bulk SET v = REVERSE(v)"));
        load.wait_for_commits(200);
        drop(live.server.query("SET GLOBAL innodb_log_file_size=33554432"));
        load.wait_for_commits(200);
        load.rest_ddl();
    })
    .await;
    assert!(live.donor.0.log().contains("the redo log was resized"), "{}", live.donor.0.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_mariadb_10_11_is_cloned() {
    an_encrypted_server_is_cloned(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_mariadb_11_8_is_cloned() {
    an_encrypted_server_is_cloned(Version::V11_8).await;
}

/// Guards rounds of PAGE COPY of encrypted pages, twice: each begins another log, whose head carries
/// what its key is derived from. Without the pages of the second round the clone's are older than
/// its log.
#[tokio::test(flavor = "multi_thread")]
async fn encrypted_pages_are_sent_again_in_two_rounds() {
    let keys = Keys::new();
    let arguments = keys.arguments();
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    arguments.push("--innodb-log-file-size=8M");
    let mut live = Live::start(Version::V10_11, &arguments, 24 << 20);
    let quota = ["--spool-quota", "48MiB"];
    live.donor = donor_with(live.home.path(), &live.path("data"), &live.server, &quota);
    let options = LoadOptions { rate: 200, rate_min: 0, ..writers() };
    let load = Load::start(&live.server, options);
    load.wait_for_commits(100);
    live.clone_with("clone", load, |_| {
        live.outgrow_the_log();
        live.go_on_to_page_copy();
        live.outgrow_the_log();
    })
    .await;
    assert!(live.donor.0.log().contains("PAGE COPY round 2"), "{}", live.donor.0.log());
}

/// Guards the count of what an encrypted log deletes: tables that come and go all the time give a
/// right clone, or one that says why not.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_under_a_log_that_hides_ids_never_gives_a_wrong_clone() {
    let keys = Keys::new();
    let arguments = keys.arguments();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let live = Live::start(Version::V11_8, &arguments, 8 << 20);
    let load = Load::start(&live.server, LoadOptions { ddl: true, ..writers() });
    load.wait_for_commits(200);
    live.clone_or_fail_with("clone", load, &["SOURCE_CHANGED", "CHECKPOINT_STALLED"], |load| {
        load.wait_for_commits(200);
    })
    .await;
}
