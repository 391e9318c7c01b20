//! What cannot be cloned right is refused before a byte moves, and named.

use marcot_tests::{Donor, clone_error, database::Version, live::Live, recipient};

async fn error(live: &Live, donor: &Donor) -> marcot_proto::common::v1::Failure {
    let mut client = recipient(&live.recipient).await;
    let failure = clone_error(&mut client, &donor.statement(&live.path("refused"), "")).await;
    assert!(!live.path("refused").exists());
    failure
}

/// Each of these is a copy that would not be the donor's database, or not start.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_cloned_is_named() {
    let live = Live::start(Version::MySql9_7, &[], 1 << 20);
    let server = &live.server;
    for (privilege, object, word) in [
        ("BACKUP_ADMIN", "*.*", "BACKUP_ADMIN"),
        ("PROCESS", "*.*", "PROCESS"),
        ("RELOAD", "*.*", "RELOAD"),
        ("SELECT", "performance_schema.log_status", "log_status"),
    ] {
        drop(server.query(&format!("REVOKE {privilege} ON {object} FROM marcot@localhost")));
        let failure = error(&live, &live.donor).await;
        assert_eq!(failure.reason, "DATABASE_PRIVILEGE_MISSING", "{failure:?}");
        assert!(failure.message.contains(word), "{failure:?}");
        drop(server.query(&format!("GRANT {privilege} ON {object} TO marcot@localhost")));
    }
    for engine in ["MyISAM", "CSV"] {
        drop(server.query(&format!("CREATE TABLE mix.other (id INT NOT NULL) ENGINE={engine}")));
        let failure = error(&live, &live.donor).await;
        assert_eq!(failure.reason, "UNSUPPORTED_TABLE_ENGINE", "{failure:?}");
        assert!(failure.message.contains(&format!("({engine})")), "{failure:?}");
        drop(server.query("DROP TABLE mix.other"));
    }
    drop(server.query("ALTER INSTANCE DISABLE INNODB REDO_LOG"));
    let failure = error(&live, &live.donor).await;
    assert_eq!(failure.reason, "REDO_LOG_DISABLED", "{failure:?}");
    drop(server.query("ALTER INSTANCE ENABLE INNODB REDO_LOG"));
}

/// Guards R9: on one host the clone would open the donor's own files.
#[tokio::test(flavor = "multi_thread")]
async fn tablespaces_elsewhere_are_named() {
    let live = Live::start(Version::MySql9_7, &["--innodb-directories={home}/elsewhere"], 1 << 20);
    std::fs::create_dir_all(live.path("elsewhere")).expect("a writable home");
    drop(live.server.query(&format!(
        "CREATE TABLE mix.far (id INT) DATA DIRECTORY='{}'",
        live.path("elsewhere").display()
    )));
    let failure = error(&live, &live.donor).await;
    assert_eq!(failure.reason, "PATH_OUTSIDE_DATA_DIRECTORY", "{failure:?}");
    assert!(failure.message.contains("mix/far"), "{failure:?}");
}
