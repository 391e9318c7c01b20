//! What cannot be cloned right is refused before a byte moves, and named.

use marcot_proto::recipient::v1::State;
use marcot_tests::{
    clone_and_wait,
    first_page::assert_wrong_first_pages_fail,
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    mariadb::Version,
    recipient,
};

/// Guards the look at each privilege before a byte moves: with one left out the clone fails at its
/// cut, or gives no coordinates.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_account_may_not_do_is_named() {
    let live = Live::start(Version::V10_11, &[], 1 << 20);
    for (privilege, word) in [
        ("RELOAD", "RELOAD"),
        ("BINLOG MONITOR", "BINLOG MONITOR"),
        ("PROCESS", "PROCESS"),
        ("SLAVE MONITOR", "SLAVE MONITOR"),
    ] {
        drop(live.server.query(&format!("REVOKE {privilege} ON *.* FROM marcot@localhost")));
        let failure = live.refusal(&live.donor).await;
        assert_eq!(failure.reason, "DATABASE_PRIVILEGE_MISSING", "{failure:?}");
        assert!(failure.message.contains(word), "{failure:?}");
        assert!(!live.donor.0.log().contains("snapshot opened"), "without {privilege}");
        drop(live.server.query(&format!("GRANT {privilege} ON *.* TO marcot@localhost")));
    }
    // A replica's SQL threads are to rest for the cut.
    drop(live.server.query("CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_USER='nobody'"));
    let failure = live.refusal(&live.donor).await;
    assert_eq!(failure.reason, "DATABASE_PRIVILEGE_MISSING", "{failure:?}");
    assert!(failure.message.contains("REPLICATION SLAVE ADMIN"), "{failure:?}");
    drop(live.server.query("RESET SLAVE ALL"));
    drop(live.server.query("SET PASSWORD FOR marcot@localhost = PASSWORD('other')"));
    let failure = live.refusal(&live.donor).await;
    assert_eq!(failure.reason, "DATABASE_ACCESS_DENIED", "{failure:?}");
    assert!(!failure.message.contains("secret"), "{failure:?}");
}

/// Guards R9: a table whose file lies elsewhere would be the donor's own file on the same host.
#[tokio::test(flavor = "multi_thread")]
async fn tables_that_cannot_be_cloned_are_named() {
    let live = Live::start(Version::V10_11, &[], 1 << 20);
    std::fs::create_dir(live.path("elsewhere")).expect("a writable home");
    drop(live.server.query(&format!(
        "CREATE DATABASE far; CREATE TABLE far.t (id INT) ENGINE=InnoDB DATA DIRECTORY='{}'",
        live.path("elsewhere").display()
    )));
    let failure = live.refusal(&live.donor).await;
    assert_eq!(failure.reason, "UNSUPPORTED_FILE", "{failure:?}");
    assert!(failure.message.contains("far/t.isl"), "{failure:?}");
    drop(live.server.query("DROP TABLE far.t"));

    drop(live.server.query(
        "INSTALL SONAME 'ha_sphinx'; CREATE TABLE far.remote (id INT UNSIGNED NOT NULL, weight INT \
         NOT NULL, query VARCHAR(3072) NOT NULL, INDEX(query)) ENGINE=SPHINX \
         CONNECTION='sphinx://127.0.0.1:1/test'",
    ));
    let failure = live.refusal(&live.donor).await;
    assert_eq!(failure.reason, "UNSUPPORTED_TABLE_ENGINE", "{failure:?}");
    assert!(failure.message.contains("`far/remote.frm` (SPHINX)"), "{failure:?}");
}

/// Guards R9: a link that leaves the tree, as MyISAM makes them for DATA DIRECTORY, and files that
/// variables of the server place elsewhere. Without either look its clone completes.
#[tokio::test(flavor = "multi_thread")]
async fn files_that_lie_elsewhere_are_named() {
    let arguments = ["--innodb-undo-directory={home}/undo", "--innodb-undo-tablespaces=2"];
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    std::fs::create_dir(live.path("elsewhere")).expect("a writable home");
    drop(live.server.query(&format!(
        "CREATE DATABASE far; CREATE TABLE far.m (id INT) ENGINE=MyISAM DATA DIRECTORY='{}'",
        live.path("elsewhere").display()
    )));
    let failure = live.refusal(&live.donor).await;
    assert_eq!(failure.reason, "LINK_LEAVES_TREE", "{failure:?}");
    assert!(failure.message.contains("far/m.MYD"), "{failure:?}");
    drop(live);

    let home = marcot_tests::new_directory();
    std::fs::create_dir(home.path().join("undo")).expect("a writable home");
    let here = home.path().display().to_string();
    let arguments: Vec<String> = arguments.iter().map(|a| a.replace("{home}", &here)).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    live = Live::start(Version::V10_11, &arguments, 1 << 20);
    let failure = live.refusal(&live.donor).await;
    assert_eq!(failure.reason, "PATH_OUTSIDE_DATA_DIRECTORY", "{failure:?}");
    assert!(failure.message.contains("innodb_undo_directory"), "{failure:?}");
}

/// Guards R2: what is kept of the moment of the cut must fit, and that is known before a byte moves.
#[tokio::test(flavor = "multi_thread")]
async fn log_tables_that_are_too_large_are_named_with_their_size() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    let quota = ["--spool-quota", "64MiB"];
    live.donor =
        marcot_tests::live::donor_with(live.home.path(), &live.path("data"), &live.server, &quota);
    let table = live.path("data/mysql/slow_log.CSV");
    // The server does not write it: log_output is FILE.
    let file = std::fs::File::options().write(true).open(table).expect("the log table");
    file.set_len(80 << 20).expect("a sparse file");
    let failure = live.refusal(&live.donor).await;
    assert_eq!(failure.reason, "LOCKED_SET_TOO_LARGE", "{failure:?}");
    for text in ["mysql/slow_log.CSV` has 83886080", "allows 67108864"] {
        assert!(failure.message.contains(text), "{failure:?}");
    }
    assert!(!live.donor.0.log().contains("snapshot opened"), "it was opened");
    file.set_len(0).expect("it was empty");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_donor_tells_what_server_it_serves() {
    use marcot_proto::donor::v1::{GetServerInfoRequest, donor_service_client::DonorServiceClient};
    let live = Live::start(Version::V10_11, &["--innodb-page-size=8k"], 1 << 20);
    let address = format!("http://{}", live.donor.0.address);
    let mut client = DonorServiceClient::connect(address).await.expect("the donor takes calls");
    let info = client.get_server_info(GetServerInfoRequest {}).await.expect("it answers");
    let info = info.into_inner();
    assert_eq!((&*info.engine, info.page_size_bytes), ("innodb", 8192), "{info:?}");
    assert!(info.server_version.starts_with("10.11."), "{info:?}");
    assert_eq!(info.variables["innodb_data_file_path"], "ibdata1:12M:autoextend");
}

/// Guards R6's sameness of server and directory: pages of one with redo of another are no database.
#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_of_another_server_is_refused() {
    let live = Live::start(Version::V10_11, &[], 1 << 20);
    let other = live.path("other");
    marcot_tests::mariadb::install(&other);
    let donor = marcot_tests::live::donor(live.home.path(), &other, &live.server);
    let failure = live.refusal(&donor).await;
    assert_eq!(failure.reason, "OTHER_DATA_DIRECTORY", "{failure:?}");
}

/// Guards first pages, which say what a file is: one that says that it is a tablespace which the server
/// does not have was copied unchecked, and the clone completed with a table that does not open.
/// Without the check of the whole page the flipped bit is found at the cut alone, without
/// `Known::check_found` the other two are cloned. A table whose tablespace was discarded, and a
/// file that is to be imported, are as they should be.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_page_that_is_not_its_tables_fails_the_clone() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    drop(live.server.query(
        "CREATE DATABASE shop; CREATE TABLE shop.t (id INT PRIMARY KEY, v TEXT) ENGINE=InnoDB; \
         CREATE TABLE shop.u LIKE shop.t; CREATE TABLE shop.v LIKE shop.t; \
         INSERT INTO shop.t SELECT seq, REPEAT(MD5(seq), 9) FROM mysql.seq_1_to_900; \
         INSERT INTO shop.u SELECT * FROM shop.t",
    ));
    let shop = live.path("data/shop");
    // A sound tablespace that the server has no more.
    let gone = live.path("u.ibd");
    let connection = live.server.connect();
    copy_for_export(connection, &shop.join("u.ibd"), &gone);
    drop(live.server.query("DROP TABLE shop.u"));
    // A clean start: nothing has a reason to write these pages any more.
    let data = live.path("data");
    live.server.stop();
    live.server =
        marcot_tests::mariadb::MariaDb::start_with(live.home.path(), &data, &live.options);
    live.donor = marcot_tests::live::donor(live.home.path(), &data, &live.server);
    drop(live.server.query("SELECT COUNT(*) FROM shop.t"));
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(100);
    assert_wrong_first_pages_fail(&live, "shop/t", "checksum", &[&gone]).await;
    drop(load.stop());
    drop(live.server.query("ALTER TABLE shop.v DISCARD TABLESPACE"));
    std::fs::copy(&gone, shop.join("v.ibd")).expect("a writable directory");
    let mut client = recipient(&live.recipient).await;
    let clone = clone_and_wait(&mut client, &live.statement("clone", false)).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", live.donor.0.log());
    let copy = live.start_clone("clone");
    assert_eq!(copy.query("SELECT COUNT(*) FROM shop.t").trim(), "900");
    drop(copy.query("ALTER TABLE shop.v IMPORT TABLESPACE"));
    assert_eq!(copy.query("SELECT COUNT(*) FROM shop.v").trim(), "900");
    copy.stop();
}

/// A copy of a table's file as it is for an export.
fn copy_for_export(mut connection: mysql::Conn, file: &std::path::Path, copy: &std::path::Path) {
    use mysql::prelude::Queryable as _;
    connection.query_drop("FLUSH TABLES shop.u FOR EXPORT").expect("exported");
    std::fs::copy(file, copy).expect("a writable home");
    connection.query_drop("UNLOCK TABLES").expect("unlocked");
}

/// Guards R3 and the page check: a page of right checksum in a wrong place, one with a flipped bit,
/// and one of another table are found and named; nothing is installed. Without the check of the number,
/// or of the space id, its page is cloned.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_pages_fail_the_clone_and_are_named() {
    use std::os::unix::fs::FileExt as _;
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    drop(live.server.query(
        "CREATE DATABASE shop; CREATE TABLE shop.t (id INT PRIMARY KEY, v TEXT) ENGINE=InnoDB; \
         CREATE TABLE shop.u LIKE shop.t; \
         INSERT INTO shop.t SELECT seq, REPEAT(MD5(seq), 9) FROM mysql.seq_1_to_9000; \
         INSERT INTO shop.u SELECT * FROM shop.t",
    ));
    // A clean start: nothing has a reason to write these pages any more.
    let data = live.path("data");
    live.server.stop();
    live.server =
        marcot_tests::mariadb::MariaDb::start_with(live.home.path(), &data, &live.options);
    live.donor = marcot_tests::live::donor(live.home.path(), &data, &live.server);
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(100);
    let open = |name: &str| {
        let path = live.path("data/shop").join(name);
        std::fs::File::options().read(true).write(true).open(path).expect("the table's file")
    };
    let (t, u) = (open("t.ibd"), open("u.ibd"));
    let page = |file: &std::fs::File, number: u64| {
        let mut bytes = vec![0; 16384];
        file.read_exact_at(&mut bytes, number * 16384).expect("the page is there");
        bytes
    };
    let right = page(&t, 70);
    assert!(right.iter().any(|&b| b != 0), "the page is in use");
    let mut flipped = right.clone();
    flipped[5000] ^= 4;
    let mut torn = right.clone();
    torn[4096..].copy_from_slice(&page(&t, 71)[4096..]);
    for (name, wrong, text) in [
        ("a flipped bit", flipped, "checksum"),
        ("a torn page", torn, "checksum"),
        ("a misplaced page", page(&t, 71), "says that it is page 71, it was read as page 70"),
        ("another table's page", page(&u, 70), "says that it is of tablespace"),
    ] {
        t.write_all_at(&wrong, 70 * 16384).expect("the file is writable");
        eprintln!("{name}");
        let failure = live.refusal(&live.donor).await;
        assert_eq!(failure.reason, "PAGE_CORRUPT", "{name}: {failure:?}");
        for word in ["page 70", "t.ibd", text] {
            assert!(failure.message.contains(word), "{name}: {failure:?}");
        }
    }
    t.write_all_at(&right, 70 * 16384).expect("the file is writable");
    live.clone_and_check("clone", load).await;
}
