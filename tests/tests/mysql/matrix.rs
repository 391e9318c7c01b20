//! One story for each kind of server and of change that the copy must carry.

use marcot_tests::{
    database::Version,
    live::{Live, WRITERS},
    load::{Load, LoadOptions, rate_min},
    wait_for,
};

/// Enough for several rounds of a small redo log, small enough for CI.
const BYTES: u64 = 40 << 20;

fn writers() -> LoadOptions {
    LoadOptions { writers: WRITERS, rate_min: rate_min(), ..LoadOptions::default() }
}

/// Guards the engine as a whole: position, redo, binary log and pages fit one another.
#[tokio::test(flavor = "multi_thread")]
async fn a_busy_mysql_9_7_is_cloned() {
    let live = Live::start(Version::MySql9_7, &[], BYTES);
    let load = Load::start(&live.server, LoadOptions { xa: true, sysbench: true, ..writers() });
    load.wait_for_commits(200);
    live.clone_and_check("clone", load).await;
}

/// Guards that redo is followed into the spool while files are copied: the log's files are used
/// again five times before the recipient reads on.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_log_that_is_turned_over_five_times_loses_nothing() {
    let live = Live::start(Version::MySql9_7, &["--innodb-redo-log-capacity=8M"], BYTES);
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(200);
    live.clone_with("clone", load, |_| {
        let begun = live.lsn();
        for round in 1..=5 {
            let end = begun + round * (8 << 20);
            wait_for("a round of the log", || (live.lsn() > end).then_some(()));
        }
    })
    .await;
}

/// Every page size: pages are found and checked where they are.
#[tokio::test(flavor = "multi_thread")]
async fn servers_of_every_page_size_are_cloned() {
    for size in ["4k", "8k", "32k", "64k"] {
        let live =
            Live::start(Version::MySql9_7, &[&format!("--innodb-page-size={size}")], 8 << 20);
        let load = Load::start(&live.server, writers());
        load.wait_for_commits(100);
        live.clone_and_check("clone", load).await;
    }
}

/// DDL goes on until a clone begins, waits while it runs, and goes on after it.
#[tokio::test(flavor = "multi_thread")]
async fn ddl_waits_for_a_clone_and_is_in_no_clone_by_half() {
    let live = Live::start(Version::MySql9_7, &[], BYTES);
    let load = Load::start(&live.server, LoadOptions { ddl: true, ..writers() });
    load.wait_for_commits(200);
    live.clone_and_check("clone", load).await;
}

/// Undo tablespaces that are truncated, and a redo log that is resized, while they are copied.
#[tokio::test(flavor = "multi_thread")]
async fn undo_that_is_truncated_and_redo_that_is_resized_lose_nothing() {
    let arguments = [
        "--innodb-max-undo-log-size=10485760",
        "--innodb-undo-log-truncate=ON",
        "--innodb-purge-rseg-truncate-frequency=1",
        "--innodb-redo-log-capacity=16M",
    ];
    let live = Live::start(Version::MySql9_7, &arguments, BYTES);
    let load = Load::start(&live.server, LoadOptions { upkeep: true, ..writers() });
    load.wait_for_commits(200);
    live.clone_with("clone", load, |load| {
        let before = ["undo", "resize"].map(|kind| load.done(kind));
        wait_for("both to be done again", || {
            load.assert_no_problem();
            let now = ["undo", "resize"].map(|kind| load.done(kind));
            (now[0] >= before[0] + 3 && now[1] >= before[1] + 2).then_some(())
        });
    })
    .await;
}

/// Tables of every kind that InnoDB has.
const LAYOUTS: &str = "CREATE DATABASE kinds; USE kinds; \
    CREATE TABLE compressed8 (id INT PRIMARY KEY, v TEXT) ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=8; \
    CREATE TABLE compressed1 (id INT PRIMARY KEY, v TEXT) ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=1; \
    CREATE TABLE sparse (id INT PRIMARY KEY, v TEXT) COMPRESSION='zlib'; \
    CREATE TABLE sparse4 (id INT PRIMARY KEY, v TEXT) COMPRESSION='lz4'; \
    CREATE TABLE redundant (id INT PRIMARY KEY, v TEXT) ROW_FORMAT=REDUNDANT; \
    CREATE TABLESPACE shared ADD DATAFILE 'shared.ibd'; \
    CREATE TABLE in_shared (id INT PRIMARY KEY, v TEXT) TABLESPACE shared; \
    CREATE UNDO TABLESPACE more ADD DATAFILE 'more.ibu'; \
    CREATE TABLE parts (id INT, p INT, v TEXT, PRIMARY KEY (id, p)) PARTITION BY LIST (p % 3) \
      (PARTITION a VALUES IN (0), PARTITION b VALUES IN (1), PARTITION c VALUES IN (2)); \
    CREATE TABLE words (id INT PRIMARY KEY, v TEXT, FULLTEXT (v)); \
    CREATE TABLE docs (id INT PRIMARY KEY, v JSON, n INT AS (v->'$.n') STORED, \
      w VARCHAR(40) AS (CONCAT('w', n)) VIRTUAL, KEY (w), KEY ((CAST(v->'$.a' AS UNSIGNED ARRAY)))); \
    CREATE TABLE places (id INT PRIMARY KEY, p POINT NOT NULL SRID 0, SPATIAL KEY (p)); \
    CREATE TABLE instant (id INT PRIMARY KEY, v TEXT);";

const ROWS: [(&str, &str); 10] = [
    ("compressed8", "seq, REPEAT(MD5(CONCAT(seq)), 20)"),
    ("compressed1", "seq, REPEAT(MD5(CONCAT(seq)), 5)"),
    ("sparse", "seq, REPEAT('abcd', 300)"),
    ("sparse4", "seq, REPEAT('abcd', 300)"),
    ("redundant", "seq, MD5(CONCAT(seq))"),
    ("in_shared", "seq, MD5(CONCAT(seq))"),
    ("parts", "seq, seq % 9, MD5(CONCAT(seq))"),
    ("words", "seq, CONCAT('word', seq, ' common text')"),
    ("places", "seq, POINT(seq, seq * 2)"),
    ("instant", "seq, MD5(CONCAT(seq))"),
];

/// Guards the page formats: what is not understood is an error, what is holds its rows. The doublewrite
/// files lie in a directory of their own, and are in no clone.
#[tokio::test(flavor = "multi_thread")]
async fn tables_of_every_kind_are_cloned() {
    let live = Live::start(Version::MySql9_7, &["--innodb-doublewrite-dir=twice"], 4 << 20);
    let twice = live.path("data/#twice");
    assert!(twice.read_dir().expect("the server makes it").count() > 0);
    drop(live.server.query(LAYOUTS));
    let rows = live.server.sequence(3000);
    for (table, columns) in ROWS {
        drop(live.server.query(&format!("INSERT INTO kinds.{table} SELECT {columns} FROM {rows}")));
    }
    drop(live.server.query(&format!(
        "INSERT INTO kinds.docs (id, v) SELECT seq, JSON_OBJECT('n', seq, 'a', JSON_ARRAY(seq, 1)) \
         FROM {rows}; USE kinds; \
         ALTER TABLE instant ADD COLUMN c INT DEFAULT 7 FIRST, ALGORITHM=INSTANT; \
         UPDATE instant SET v = 'changed' WHERE id < 100; \
         ALTER TABLE instant DROP COLUMN v, ALGORITHM=INSTANT; \
         SET GLOBAL innodb_max_dirty_pages_pct_lwm = 0"
    )));
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(200);
    live.clone_with("clone", load, |load| load.wait_for_commits(500)).await;
}
