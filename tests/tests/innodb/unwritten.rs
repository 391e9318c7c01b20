//! Tables whose first page the server has not written yet: it may keep that until its next
//! checkpoint, while the others are on the disk.

use std::{fs::File, os::unix::fs::FileExt as _};

use marcot_tests::{
    clone_error,
    live::Live,
    load::{Load, LoadOptions},
    mariadb::{MariaDb, Version},
    recipient,
};

use crate::matrix::writers;

const FILLED: &str = "CREATE DATABASE fresh; USE fresh; \
    CREATE TABLE plain (id INT PRIMARY KEY, v TEXT); \
    CREATE TABLE sparse (id INT PRIMARY KEY, v TEXT) PAGE_COMPRESSED=1 PAGE_COMPRESSION_LEVEL=9; \
    CREATE TABLE small (id INT PRIMARY KEY, v TEXT) ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=4; \
    CREATE TABLE `weird na-me` (id INT PRIMARY KEY) PARTITION BY HASH (id) PARTITIONS 2; \
    INSERT INTO plain SELECT seq, REPEAT(MD5(seq), 50) FROM mysql.seq_1_to_110000; \
    INSERT INTO sparse SELECT seq, REPEAT(MD5(seq), 50) FROM mysql.seq_1_to_2000; \
    INSERT INTO small SELECT seq, REPEAT(MD5(seq), 50) FROM mysql.seq_1_to_2000; \
    INSERT INTO `weird na-me` SELECT seq FROM mysql.seq_1_to_1000";

const FILES: [&str; 5] = [
    "plain.ibd",
    "sparse.ibd",
    "small.ibd",
    "weird@0020na@002dme#P#p0.ibd",
    "weird@0020na@002dme#P#p1.ibd",
];

/// Guards that such tables, of more bytes than may be read under the locks, are copied once and are
/// right: the server says which tablespace a file is. Without that (`Survey::mark`) each of them was
/// copied again in every round, and the clone ended in SOURCE_CHANGED.
async fn tables_without_a_first_page(version: Version) {
    // Room for all changes: neither the log nor the pool makes the server write pages.
    let arguments = ["--innodb-log-file-size=1G", "--innodb-buffer-pool-size=512M"];
    let live = Live::start(version, &arguments, 1 << 20);
    let load = Load::start(&live.server, LoadOptions { rate: 200, ..writers() });
    load.wait_for_commits(100);
    drop(live.server.query(FILLED));
    let unwritten = || {
        let is_unwritten = |name: &&&str| {
            let mut page = [0; 4096];
            let file = File::open(live.path("data/fresh").join(name)).expect("the table's file");
            file.read_exact_at(&mut page, 0).expect("its first page");
            page.iter().all(|&byte| byte == 0)
        };
        FILES.iter().filter(is_unwritten).count()
    };
    live.clone_with("clone", load, |_| {
        assert_eq!(unwritten(), FILES.len(), "the server has written first pages");
    })
    .await;
    let log = live.donor.0.log();
    assert!(!log.contains("round=3"), "more than a second round of FILE COPY:\n{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_without_a_first_page_are_copied_once_in_10_11() {
    tables_without_a_first_page(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_without_a_first_page_are_copied_once_in_11_8() {
    tables_without_a_first_page(Version::V11_8).await;
}

/// Guards first pages that were lost: all zero as one that is not written yet, of a table that the
/// server has open, and of a file that it does not know. No redo since the checkpoint makes them.
/// Without `FoundSpaces::check_made` each is cloned, and its table does not open.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_page_that_was_lost_fails_the_clone() {
    let mut live = Live::start(Version::V10_11, &[], 1 << 20);
    drop(live.server.query(
        "CREATE DATABASE shop; CREATE TABLE shop.t (id INT PRIMARY KEY, v TEXT) ENGINE=InnoDB; \
         INSERT INTO shop.t SELECT seq, REPEAT(MD5(seq), 9) FROM mysql.seq_1_to_900",
    ));
    // A clean start: nothing has a reason to write its first page any more.
    let data = live.path("data");
    live.server.stop();
    live.server = MariaDb::start_with(live.home.path(), &data, &live.options);
    live.donor = marcot_tests::live::donor(live.home.path(), &data, &live.server);
    drop(live.server.query("SELECT COUNT(*) FROM shop.t"));
    let load = Load::start(&live.server, LoadOptions { ddl: true, ..writers() });
    load.wait_for_commits(100);
    let refused = async |named: &str| {
        let mut client = recipient(&live.recipient).await;
        let failure = clone_error(&mut client, &live.statement("refused", false)).await;
        assert_eq!(failure.reason, "PAGE_CORRUPT", "{failure:?}");
        for word in ["page 0 is all zero", named] {
            assert!(failure.message.contains(word), "{failure:?}");
        }
        assert!(!live.path("refused").exists());
    };

    let (table, ghost) = (data.join("shop/t.ibd"), data.join("shop/ghost.ibd"));
    let mut right = vec![0; 16384];
    let file = File::options().read(true).write(true).open(&table).expect("the table's file");
    file.read_exact_at(&mut right, 0).expect("its first page");
    file.write_all_at(&[0; 16384], 0).expect("the file is writable");
    refused("shop/t").await;
    std::fs::copy(&table, &ghost).expect("a writable directory");
    file.write_all_at(&right, 0).expect("the file is writable");
    refused("shop/ghost.ibd").await;
    std::fs::remove_file(&ghost).expect("the file is there");
    live.clone_and_check("clone", load).await;
}
