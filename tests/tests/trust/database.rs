//! Accounts of the donor's database: real users on real servers.

use std::path::Path;

use marcot_proto::{
    common::v1::Failure,
    recipient::v1::{Clone, CloneStatementRequest, State},
};
use marcot_tests::{
    Donor, Proxy, Recipient,
    certificates::Certificates,
    client::{clone_and_wait, clone_error},
    live::{GRANTS, donor_with},
    mariadb::{self, MariaDb, Options, Version},
    new_directory, recipient,
};

/// All that a clone needs, as docs/operations.md lists it.
const ALL: &str = "RELOAD, BINLOG MONITOR, PROCESS, SLAVE MONITOR";

/// A server with users of every kind, a donor beside it, a recipient that knows the donor's CA.
struct Site {
    donor: Donor,
    server: MariaDb,
    recipient: Recipient,
    home: tempfile::TempDir,
}

impl Site {
    fn start(version: Version, donor_options: &[&str], recipient_options: &[&str]) -> Self {
        let home = new_directory();
        let certificates = Certificates::create(&home.path().join("tls"));
        let (chain, key) = certificates.sign("donor", &["127.0.0.1"]);
        let data = home.path().join("data");
        let options = Options::primary(version, &[]);
        mariadb::install_with(&data, &options);
        let server = MariaDb::start_with(home.path(), &data, &options);
        drop(server.query(GRANTS));
        drop(server.query("INSTALL SONAME 'auth_ed25519'"));
        let user = |name: &str, how: &str, grants: &str| {
            drop(server.query(&format!("CREATE USER {name}@localhost {how}")));
            if !grants.is_empty() {
                drop(server.query(&format!("GRANT {grants} ON *.* TO {name}@localhost")));
            }
        };
        user("native", "IDENTIFIED BY 'secret'", ALL);
        user("edward", "IDENTIFIED VIA ed25519 USING PASSWORD('secret')", ALL);
        user("bare", "IDENTIFIED BY 'secret'", "");
        user("partly", "IDENTIFIED BY 'secret'", "RELOAD, PROCESS");
        user("locked", "IDENTIFIED BY 'secret' ACCOUNT LOCK", ALL);
        user("expired", "IDENTIFIED BY 'secret' PASSWORD EXPIRE", ALL);
        user("open", "", ALL);
        let ways = "ed25519 USING PASSWORD('secret') OR mysql_native_password USING \
                    PASSWORD('secret')";
        user("twofold", &format!("IDENTIFIED VIA {ways}"), ALL);
        // The donor and the server run as this user here, as in a pod.
        let socket = format!("unix_socket AS '{}'", system_user());
        user("root2", &format!("IDENTIFIED VIA {socket}"), ALL);
        let native = "mysql_native_password USING PASSWORD('secret')";
        user("either", &format!("IDENTIFIED VIA {native} OR {socket}"), ALL);
        let tls = ["--database-accounts", "--tls-cert", &chain, "--tls-key", &key];
        let tls = if donor_options.is_empty() { &tls[..] } else { donor_options };
        let donor = donor_with(home.path(), &data, &server, tls);
        let ca = certificates.ca();
        let ca = ["--ssl-ca", &ca];
        let trust = if recipient_options.is_empty() { &ca[..] } else { recipient_options };
        let allowed = ["--allow-database-accounts", "--donor-timeout", "10s"];
        let recipient = Recipient::start(home.path(), &[&allowed, trust].concat());
        Self { donor, server, recipient, home }
    }

    fn statement(&self, user: &str, password: &str, clause: &str) -> String {
        let statement = self.donor.statement(&self.home.path().join(user), clause);
        let statement = statement.replace("'clone'@", &format!("'{user}'@"));
        statement.replace("'secret'", &format!("'{password}'"))
    }

    async fn clone(&self, user: &str, clause: &str) -> Clone {
        let mut client = recipient(&self.recipient).await;
        let clone = clone_and_wait(&mut client, &self.statement(user, "secret", clause)).await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", self.donor.0.log());
        clone
    }

    async fn refused(&self, user: &str, password: &str, clause: &str) -> Failure {
        let mut client = recipient(&self.recipient).await;
        clone_error(&mut client, &self.statement(user, password, clause)).await
    }
}

/// Whose process this is.
fn system_user() -> String {
    let output = std::process::Command::new("id").arg("-un").output().expect("coreutils");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn assert_starts(home: &Path, copy: &Path, options: &Options) {
    let copy = MariaDb::start_with(home, copy, &options.for_clone());
    assert!(copy.query("SELECT COUNT(*) FROM mysql.global_priv").trim().parse::<u32>().is_ok());
    copy.stop();
}

/// Real users with and without grants, right and wrong, over TLS and sealed on plaintext: the
/// plugin's 3862 around the server's own numbers. Guards `check_account`: made to say yes, the user
/// that the server would know by the donor's process as well gets in.
#[tokio::test]
async fn users_of_the_database_clone_by_their_grants_and_are_refused_by_the_servers_numbers() {
    for version in mariadb::VERSIONS {
        let site = Site::start(version, &[], &[]);
        let rows = [
            ("native", "wrong", "ACCESS_DENIED", "1045"),
            ("bare", "secret", "PRIVILEGE_REQUIRED", "1227"),
            ("partly", "secret", "PRIVILEGE_REQUIRED", "1227"),
            ("locked", "secret", "ACCOUNT_LOCKED", "4151"),
            ("expired", "secret", "PASSWORD_EXPIRED", "1862"),
            ("either", "secret", "ACCOUNT_WITHOUT_PASSWORD", "1045"),
            ("nobody", "secret", "ACCESS_DENIED", "1045"),
            ("edward", "wrong", "ACCESS_DENIED", "1045"),
            // The server asks for the other way then, which is no sign of a server that is away.
            ("twofold", "wrong", "ACCESS_DENIED", "1045"),
        ];
        // The second time without the last ones: ten wrong passwords make a guesser.
        for (clause, rows) in [("REQUIRE SSL", &rows[..]), ("REQUIRE NO SSL", &rows[..6])] {
            for (user, password, reason, number) in rows {
                let error = site.refused(user, password, clause).await;
                let got = (error.reason.as_str(), error.metadata["donor_mysql_error"].as_str());
                assert_eq!(got, (*reason, *number), "{version:?} {user} {clause}: {error:?}");
                assert_eq!(error.error_number, 3862, "{error:?}");
            }
        }
        // Whether the server takes the donor's process for them or not, they are not let in.
        for (user, password) in [("root2", "secret"), ("either", "anything")] {
            let error = site.refused(user, password, "REQUIRE SSL").await;
            assert_eq!(error.metadata["donor_mysql_error"], "1045", "{error:?}");
            assert!(!error.message.contains("anything"), "{error:?}");
        }
        let native = site.clone("native", "REQUIRE SSL").await;
        assert_eq!(native.encrypted, Some(true));
        let sealed = site.clone("edward", "REQUIRE NO SSL").await;
        assert_eq!(sealed.encrypted, Some(false));
        let options = Options::primary(version, &[]);
        assert_starts(site.home.path(), &site.home.path().join("native"), &options);
        assert!(!site.donor.0.log().contains("'secret'"), "{}", site.donor.0.log());
        assert!(!site.recipient.0.log().contains("'secret'"), "{}", site.recipient.0.log());
        drop(site.server);
    }
}

/// Guards the password on a plaintext connection: it is not sent to a donor whose key the recipient
/// does not know, nor to one that has none. With `not_known` left out, the first clone completes.
#[tokio::test]
async fn a_password_of_the_database_is_not_sent_to_an_unknown_key() {
    let none = ["--max-concurrency", "1"];
    let site = Site::start(Version::V10_11, &[], &none);
    let error = site.refused("native", "secret", "REQUIRE NO SSL").await;
    assert_eq!((error.reason.as_str(), error.error_number), ("PASSWORD_NOT_SENT", 3862));
    assert!(error.message.contains("--ssl-ca"), "{error:?}");

    let elsewhere = new_directory();
    let stranger = Certificates::create(elsewhere.path()).ca();
    let other = Site::start(Version::V10_11, &[], &["--ssl-ca", &stranger]);
    let error = other.refused("native", "secret", "REQUIRE NO SSL").await;
    assert_eq!((error.reason.as_str(), error.error_number), ("CERTIFICATE_NOT_TRUSTED", 3862));

    let mut client = recipient(&site.recipient).await;
    let fingerprint = site.donor.0.fingerprint.clone().expect("it has a certificate");
    let fingerprint = marcot_common::tls::Fingerprint::parse(&fingerprint).expect("as printed");
    let request = CloneStatementRequest {
        statement: site.statement("native", "secret", "REQUIRE NO SSL"),
        donor_fingerprint: fingerprint.0.to_vec().into(),
        ..Default::default()
    };
    let started = client.clone_statement(request).await.expect("accepted").into_inner();
    let name = started.clone.expect("a clone").name;
    let clone = marcot_tests::client::wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
}

/// Guards the password of a recipient whose operator has not said that donors may learn it: the donor is
/// believed, its certificate is right, and it could have been taken over. Without `not_allowed` the first
/// clone completes.
#[tokio::test]
async fn a_database_gets_no_password_from_a_recipient_that_does_not_allow_it() {
    let site = Site::start(Version::V10_11, &[], &[]);
    let elsewhere = new_directory();
    let ca = site.home.path().join("tls/ca.pem").display().to_string();
    let allowed = site.home.path().display().to_string();
    let options = ["--ssl-ca", &ca, "--allow-directory", &allowed, "--donor-timeout", "10s"];
    let cautious = Recipient::start(elsewhere.path(), &options);
    let mut client = recipient(&cautious).await;
    for clause in ["REQUIRE SSL", "REQUIRE NO SSL", ""] {
        let error = clone_error(&mut client, &site.statement("native", "secret", clause)).await;
        let got = (error.reason.as_str(), error.error_number);
        assert_eq!(got, ("DATABASE_ACCOUNTS_NOT_ALLOWED", 3862), "{clause}: {error:?}");
        assert_eq!(error.metadata["donor_mysql_error"], "2061", "{error:?}");
        assert!(error.message.contains("--allow-database-accounts"), "{error:?}");
    }
    assert!(!site.donor.0.log().contains("logged in"), "{}", site.donor.0.log());
    site.clone("native", "REQUIRE SSL").await;
}

/// Guards the seal: of all bytes of a plaintext clone none are the password's, nor a digest's that the
/// database keeps. With the password sent as it is, it is found.
#[tokio::test]
async fn a_sealed_password_is_not_among_the_bytes_of_a_plaintext_clone() {
    let site = Site::start(Version::V10_11, &[], &[]);
    drop(
        site.server.query("SET PASSWORD FOR native@localhost = PASSWORD('correct horse battery')"),
    );
    let proxy = Proxy::start(site.donor.0.address);
    proxy.record();
    let statement = site.statement("native", "correct horse battery", "REQUIRE NO SSL");
    let port = |port: u16| format!(":{port} ");
    let statement = statement.replace(&port(site.donor.port()), &port(proxy.port()));
    let mut client = recipient(&site.recipient).await;
    let clone = clone_and_wait(&mut client, &statement).await;
    assert_eq!((clone.state(), clone.encrypted), (State::Completed, Some(false)), "{clone:?}");
    let seen = proxy.recorded();
    let holds = |needle: &[u8]| seen.windows(needle.len()).any(|window| window == needle);
    assert!(holds(b"native") && holds(b"snapshots/"), "the record is of the clone");
    for form in crate::capture::forms("correct horse battery") {
        assert!(!holds(&form), "seen: {}", form.escape_ascii());
    }
}

/// A donor without a certificate has no key to seal to: over loopback as well as any network.
#[tokio::test]
async fn a_donor_without_a_certificate_gets_no_password_of_the_database() {
    let site = Site::start(Version::V10_11, &["--database-accounts"], &[]);
    let error = site.refused("native", "secret", "REQUIRE NO SSL").await;
    assert_eq!((error.reason.as_str(), error.error_number), ("PASSWORD_NOT_SENT", 3862));
    assert!(error.message.contains("--tls-cert"), "{error:?}");
}
