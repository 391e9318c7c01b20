//! A real MariaDB, stopped, cloned in every SSL mode and locally; a real server starts on each.

use std::path::Path;

use marcot_proto::recipient::v1::State;
use marcot_tests::{
    Certificates, Donor, Recipient, clone_and_wait, clone_error,
    mariadb::{self, MariaDb},
    new_directory, recipient, tree,
};

const SCHEMA: &str = "
CREATE DATABASE shop; CREATE DATABASE `odd name-1`;
CREATE TABLE shop.orders (id INT AUTO_INCREMENT PRIMARY KEY, v VARCHAR(200)) ENGINE=InnoDB;
CREATE TABLE shop.parts (id INT, d INT, v CHAR(40), KEY(d)) ENGINE=InnoDB
  PARTITION BY RANGE(id) (PARTITION a VALUES LESS THAN (500), PARTITION b VALUES LESS THAN MAXVALUE);
CREATE TABLE `odd name-1`.aria (id INT PRIMARY KEY, v TEXT) ENGINE=Aria;
CREATE TABLE `odd name-1`.isam (id INT PRIMARY KEY, v TEXT) ENGINE=MyISAM;
USE shop;
CREATE VIEW shop.v AS SELECT * FROM shop.orders;
INSERT INTO shop.orders (v) SELECT REPEAT(CHAR(65 + seq % 26), 1 + seq % 200) FROM seq_1_to_20000;
INSERT INTO shop.parts SELECT seq, seq % 7, MD5(seq) FROM seq_1_to_1000;
INSERT INTO `odd name-1`.aria SELECT seq, MD5(seq) FROM seq_1_to_3000;
INSERT INTO `odd name-1`.isam SELECT seq, MD5(seq) FROM seq_1_to_3000;
DELETE FROM shop.orders WHERE id % 3 = 0;
";

fn make_database(home: &Path, data: &Path) -> String {
    mariadb::install(data);
    let server = MariaDb::start(home, data);
    drop(server.query(SCHEMA));
    let checksums = server.checksums();
    assert!(checksums.lines().count() > 10, "{checksums}");
    server.stop();
    checksums
}

fn check_clone(home: &Path, target: &Path, expected: &str) {
    let server = MariaDb::start(home, target);
    assert_eq!(server.checksums(), expected, "{}", target.display());
    let errors: Vec<_> =
        server.log().lines().filter(|l| l.contains("[ERROR]")).map(str::to_owned).collect();
    assert_eq!(errors, Vec::<String>::new());
    server.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_starts_on_a_clone_made_in_each_mode() {
    let home = new_directory();
    let home = home.path();
    let data = home.join("data");
    let expected = make_database(home, &data);
    let certificates = Certificates::create(&home.join("tls"));
    let (chain, key) = certificates.sign("donor", &["127.0.0.1"]);
    let donor = Donor::start(home, &data, &["--tls-cert", &chain, "--tls-key", &key]);
    let data_directory = data.display().to_string();
    let recipient_options = ["--ssl-ca", &certificates.ca(), "--data-directory", &data_directory];
    let daemon = Recipient::start(home, &recipient_options);
    let mut client = recipient(&daemon).await;

    for (name, clause, encrypted) in [
        ("tls", "REQUIRE SSL", Some(true)),
        ("plain", "REQUIRE NO SSL", Some(false)),
        ("preferred", "", Some(true)),
    ] {
        let target = home.join(format!("clone-{name}"));
        let clone = clone_and_wait(&mut client, &donor.statement(&target, clause)).await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}");
        assert_eq!(clone.encrypted, encrypted, "{name}");
        tree::assert_identical(&data, &target);
        check_clone(home, &target, &expected);
    }
    let target = home.join("clone-local");
    let statement = format!("CLONE LOCAL DATA DIRECTORY = '{}'", target.display());
    let clone = clone_and_wait(&mut client, &statement).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    tree::assert_identical(&data, &target);
    check_clone(home, &target, &expected);
}

/// Guards the look at the server's own locks (files/lock.rs): without it, the first clone completes.
#[tokio::test(flavor = "multi_thread")]
async fn the_data_directory_of_a_running_server_is_refused() {
    let home = new_directory();
    let home = home.path();
    let data = home.join("data");
    mariadb::install(&data);
    let donor = Donor::start(home, &data, &[]);
    let daemon = Recipient::start(home, &[]);
    let mut client = recipient(&daemon).await;
    let server = MariaDb::start(home, &data);
    let failure = clone_error(&mut client, &donor.statement(&home.join("clone"), "")).await;
    assert_eq!(failure.reason, "SERVER_RUNNING", "{failure:?}");
    assert!(failure.message.contains("innodb"), "the text names the engine to use: {failure:?}");
    assert!(!home.join("clone").exists());
    server.stop();
    let clone = clone_and_wait(&mut client, &donor.statement(&home.join("clone"), "")).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
}
