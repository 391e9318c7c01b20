//! Accounts of a MySQL donor's database: real users of each kind that its server knows.

use std::path::PathBuf;

use marcot_proto::{common::v1::Failure, recipient::v1::State};
use marcot_tests::{
    Recipient,
    certificates::Certificates,
    client::{clone_and_wait, clone_error},
    database::{Database, Version},
    live::{Live, donor_with},
    recipient,
};

/// What docs/operations.md lists for the donor's account.
const ALL: &str = "BACKUP_ADMIN, RELOAD, PROCESS, REPLICATION CLIENT";

fn make_users(server: &Database) {
    let user = |name: &str, how: &str, grants: &str| {
        drop(server.query(&format!("CREATE USER {name}@localhost {how}")));
        if !grants.is_empty() {
            drop(server.query(&format!(
                "GRANT {grants} ON *.* TO {name}@localhost; \
                 GRANT SELECT ON performance_schema.log_status TO {name}@localhost"
            )));
        }
    };
    let caching = "IDENTIFIED WITH caching_sha2_password BY 'secret'";
    user("caching", caching, ALL);
    user("second", caching, ALL);
    user("sha", "IDENTIFIED WITH sha256_password BY 'secret'", ALL);
    user("bare", caching, "");
    user("partly", caching, "RELOAD, PROCESS");
    user("locked", &format!("{caching} ACCOUNT LOCK"), ALL);
    user("expired", &format!("{caching} PASSWORD EXPIRE"), ALL);
}

/// Real users with and without grants, right and wrong, over TLS and sealed on plaintext: the plugin's
/// 3862 around the server's own numbers. The server asks for a whole password, and keeps a digest of it
/// from then on: each user is met in both states. Guards `refused` of engine innodb: with 3118 left out of
/// it the locked user is DATABASE_LOG_IN_REFUSED.
#[tokio::test(flavor = "multi_thread")]
async fn users_of_a_mysql_clone_by_their_grants_and_are_refused_by_the_servers_numbers() {
    let mut live = Live::start(Version::MySql9_7, &[], 1 << 20);
    make_users(&live.server);
    let certificates = Certificates::create(&live.path("tls"));
    let (chain, key) = certificates.sign("donor", &["127.0.0.1"]);
    let tls = ["--database-accounts", "--tls-cert", &chain, "--tls-key", &key];
    live.donor = donor_with(live.home.path(), &live.path("data"), &live.server, &tls);
    let ca = certificates.ca();
    let options = ["--allow-database-accounts", "--donor-timeout", "10s", "--ssl-ca", &ca];
    live.recipient.0.kill();
    live.recipient = Recipient::start(live.home.path(), &options);
    let mut client = recipient(&live.recipient).await;
    let target = |user: &str, clause: &str| -> PathBuf {
        live.path(&format!("{user}-{}", clause.to_lowercase().replace(' ', "-")))
    };
    let statement = |user: &str, password: &str, clause: &str| {
        let statement = live.donor.statement(&target(user, clause), clause);
        let statement = statement.replace("'clone'@", &format!("'{user}'@"));
        statement.replace("'secret'", &format!("'{password}'"))
    };
    let rows = [
        ("caching", "wrong", "ACCESS_DENIED", "1045"),
        ("bare", "secret", "PRIVILEGE_REQUIRED", "1142"),
        ("partly", "secret", "PRIVILEGE_REQUIRED", "1227"),
        ("locked", "secret", "ACCOUNT_LOCKED", "3118"),
        ("expired", "secret", "PASSWORD_EXPIRED", "1862"),
        // As one of its users is known by: then nobody can tell them from others.
        ("sha", "secret", "ACCESS_DENIED", "1045"),
        ("nobody", "secret", "ACCESS_DENIED", "1045"),
    ];
    for clause in ["REQUIRE SSL", "REQUIRE NO SSL"] {
        for (user, password, reason, number) in rows {
            let statement = statement(user, password, clause);
            let error: Failure = clone_error(&mut client, &statement).await;
            let got = (error.reason.as_str(), error.metadata["donor_mysql_error"].as_str());
            assert_eq!(got, (reason, number), "{user} {clause}: {error:?}");
            assert_eq!(error.error_number, 3862, "{error:?}");
        }
        for user in ["caching", "caching", "second"] {
            let clone = clone_and_wait(&mut client, &statement(user, "secret", clause)).await;
            assert_eq!(clone.state(), State::Completed, "{user}: {clone:?}");
            assert_eq!(clone.encrypted, Some(clause == "REQUIRE SSL"));
            std::fs::remove_dir_all(target(user, clause)).expect("it was cloned");
        }
    }
    let told = live.donor.0.log();
    assert!(told.contains("sha256_password"), "why it is not let in: {told}");
    for log in [live.donor.0.log(), live.recipient.0.log()] {
        assert!(!log.contains("'secret'"), "{log}");
    }
}
