//! One story for each kind of server and of change that the copy must carry.

use marcot_proto::recipient::v1::{CloneOptions, CloneStatementRequest, State};
use marcot_tests::{
    Recipient,
    bench::bytes_of_rows,
    client::wait_for_end,
    clone_and_wait,
    live::{Live, WRITERS},
    load::{Load, LoadOptions, STORM_KINDS, rate_min},
    mariadb::Version,
    recipient, wait_for,
};

/// Enough for several rounds of the redo log, small enough for CI.
const BYTES: u64 = 40 << 20;

/// Starts a server of a row that is about load: in a run of full size (MARCOT_FULL=1) it has 1 GiB.
pub(super) fn start(version: Version, arguments: &[&str]) -> Live {
    Live::start(version, arguments, bytes_of_rows(BYTES))
}

/// Every row asks that the writers keep up, where MARCOT_RATE_MIN says how far.
pub(super) fn writers() -> LoadOptions {
    LoadOptions { writers: WRITERS, rate_min: rate_min(), ..LoadOptions::default() }
}

/// Guards the engine as a whole: position, redo and pages fit one another. Each sabotage of
/// `make soak` fails this.
async fn a_busy_server_is_cloned(version: Version) {
    let live = start(version, &[]);
    let load = Load::start(&live.server, LoadOptions { xa: true, sysbench: true, ..writers() });
    load.wait_for_commits(200);
    live.clone_and_check("clone", load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_mariadb_10_11_is_cloned() {
    a_busy_server_is_cloned(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_mariadb_11_8_is_cloned() {
    a_busy_server_is_cloned(Version::V11_8).await;
}

/// Guards the walk under the locks, which decides what is copied again: a table that it takes for
/// unchanged is missing, of another name, or of before the last TRUNCATE.
async fn tables_come_and_go(version: Version) {
    let live = start(version, &[]);
    let load = Load::start(&live.server, LoadOptions { ddl: true, ..writers() });
    load.wait_for_commits(200);
    live.clone_with("clone", load, |load| {
        let before = STORM_KINDS.map(|kind| load.done(kind));
        wait_for("every kind of change", || {
            load.assert_no_problem();
            let each = || STORM_KINDS.iter().zip(before);
            each().all(|(kind, before)| load.done(kind) >= before + 2).then_some(())
        });
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_come_and_go_arrive_as_they_are_at_the_point_in_10_11() {
    tables_come_and_go(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_that_come_and_go_arrive_as_they_are_at_the_point_in_11_8() {
    tables_come_and_go(Version::V11_8).await;
}

/// Guards that redo is followed into the spool while files are copied: the log comes round three
/// times before the recipient reads on. And that most of it is on the recipient by the time of the
/// cut; seen failing without the stream that follows.
async fn a_small_log_comes_round(version: Version) {
    let live = start(version, &["--innodb-log-file-size=8M"]);
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(200);
    live.clone_with("clone", load, |_| {
        let begun = live.lsn();
        wait_for("three rounds of the log", || (live.lsn() > begun + (24 << 20)).then_some(()));
    })
    .await;
    let log = live.recipient.0.log();
    let line = log.lines().find(|line| line.contains("a file grows no more")).expect("a log line");
    let number = |key: &str| -> u64 {
        let (_, rest) = line.split_once(key).expect("a field");
        rest.split(' ').next().and_then(|n| n.parse().ok()).expect("a number")
    };
    assert!(number("read=") > 8 << 20 && number("read=") <= number("size="), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_log_that_comes_round_three_times_loses_nothing() {
    a_small_log_comes_round(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_log_that_comes_round_three_times_loses_nothing_in_11_8() {
    a_small_log_comes_round(Version::V11_8).await;
}

/// Guards the rounds of PAGE COPY: redo has outgrown its bound, pages are sent again.
async fn redo_outgrows_its_bound(version: Version) {
    let live = start(version, &["--innodb-log-file-size=8M"]);
    let load = Load::start(&live.server, LoadOptions { ddl: true, ..writers() });
    load.wait_for_commits(200);
    live.clone_with("clone", load, |_| {
        let begun = live.lsn();
        wait_for("redo beyond the bound", || {
            let update = "UPDATE mix.bulk SET v = REVERSE(v) WHERE id % 4 = 0 AND id < 35000";
            drop(live.server.query(update));
            (live.lsn() > begun + (80 << 20)).then_some(())
        });
    })
    .await;
    let log = live.donor.0.log();
    assert!(log.contains("PAGE COPY round 1"), "no page was sent again: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn redo_that_outgrows_its_bound_is_replaced_by_pages() {
    redo_outgrows_its_bound(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redo_that_outgrows_its_bound_is_replaced_by_pages_in_11_8() {
    redo_outgrows_its_bound(Version::V11_8).await;
}

/// Guards R6: the donor was away while the log came round; pages close the gap. With none of them sent
/// no server starts on the clone: its log has changes of pages that are older.
async fn a_gap_in_the_redo(version: Version) {
    let live = start(version, &["--innodb-log-file-size=8M"]);
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(200);
    live.clone_with("clone", load, |_| {
        live.donor.0.freeze();
        let begun = live.lsn();
        wait_for("three rounds of the log", || (live.lsn() > begun + (24 << 20)).then_some(()));
        live.donor.0.thaw();
        wait_for("the loss to be seen", || {
            live.donor.0.log().contains("the redo log was lost").then_some(())
        });
    })
    .await;
    let log = live.donor.0.log();
    assert!(log.contains("PAGE COPY round 1"), "no page was sent again: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_in_the_redo_is_closed_by_pages() {
    a_gap_in_the_redo(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_in_the_redo_is_closed_by_pages_in_11_8() {
    a_gap_in_the_redo(Version::V11_8).await;
}

/// Guards R5: two clones at one time have each their own checkpoint and point, over one follower;
/// their cuts come one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn two_recipients_at_once_get_a_right_clone_each() {
    let live = start(Version::V10_11, &["--innodb-log-file-size=8M"]);
    let other_home = marcot_tests::new_directory();
    let other = Recipient::start(other_home.path(), &["--allow-directory", "/"]);
    let load = Load::start(&live.server, LoadOptions { ddl: true, ..writers() });
    load.wait_for_commits(200);
    let before = load.moment();
    let (mut first, mut second) = (recipient(&live.recipient).await, recipient(&other).await);
    let statements = [live.statement("clone", false), live.statement("other", false)];
    let (one, two) = tokio::join!(
        clone_and_wait(&mut first, &statements[0]),
        clone_and_wait(&mut second, &statements[1]),
    );
    let ended = load.moment();
    load.wait_for_commits(50);
    for clone in [&one, &two] {
        load.assert_kept_up(clone);
    }
    let report = load.stop();
    for (name, clone) in [("clone", one), ("other", two)] {
        assert_eq!(clone.state(), State::Completed, "{clone:?}");
        live.check(name, &clone, &before, &ended, &report);
    }
}

/// Guards the switch to the file that takes the log's place.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_resized_while_it_is_followed_is_followed_on() {
    let live = start(Version::V10_11, &["--innodb-log-file-size=16M"]);
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(200);
    live.clone_with("clone", load, |load| {
        drop(live.server.query("SET GLOBAL innodb_log_file_size=33554432"));
        load.wait_for_commits(300);
        drop(live.server.query("SET GLOBAL innodb_log_file_size=25165824"));
        load.wait_for_commits(300);
    })
    .await;
    assert!(live.donor.0.log().contains("the redo log was resized"));
}

/// Guards the page's number and its place (R3) at every page size: pages are found where they are.
#[tokio::test(flavor = "multi_thread")]
async fn servers_of_every_page_size_are_cloned() {
    for size in ["4k", "8k", "32k", "64k"] {
        let live = Live::start(Version::V10_11, &[&format!("--innodb-page-size={size}")], 8 << 20);
        let load = Load::start(&live.server, writers());
        load.wait_for_commits(100);
        live.clone_and_check("clone", load).await;
    }
}

/// Tables of every shape that a page check or a list might stumble over.
const SHAPES: &str = "
CREATE DATABASE shapes; USE shapes;
CREATE TABLE compressed1 (id INT PRIMARY KEY, v TEXT) ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=1;
CREATE TABLE compressed8 (id INT PRIMARY KEY, v TEXT) ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=8;
CREATE TABLE sparse (id INT PRIMARY KEY, v TEXT) PAGE_COMPRESSED=1;
CREATE TABLE redundant (id INT PRIMARY KEY, v TEXT) ROW_FORMAT=REDUNDANT;
CREATE TABLE parts (id INT, d INT, v TEXT, KEY(d)) PARTITION BY HASH(id) PARTITIONS 5;
CREATE TABLE words (id INT PRIMARY KEY, v TEXT, FULLTEXT(v)) ENGINE=InnoDB;
CREATE TABLE parent (id INT PRIMARY KEY) ENGINE=InnoDB;
CREATE TABLE child (id INT PRIMARY KEY, p INT, FOREIGN KEY (p) REFERENCES parent(id)) ENGINE=InnoDB;
CREATE TABLE computed (id INT PRIMARY KEY, a INT, b INT AS (a * 2) STORED, c INT AS (a + 1), KEY(c));
CREATE TABLE places (id INT PRIMARY KEY, g GEOMETRY NOT NULL, SPATIAL INDEX(g)) ENGINE=InnoDB;
CREATE TABLE history (id INT PRIMARY KEY, v INT) WITH SYSTEM VERSIONING;
CREATE SEQUENCE numbers;
CREATE TABLE memory (id INT PRIMARY KEY) ENGINE=MEMORY;
INSERT INTO compressed1 SELECT seq, REPEAT(MD5(seq), 5) FROM mysql.seq_1_to_3000;
INSERT INTO compressed8 SELECT seq, REPEAT(MD5(seq), 20) FROM mysql.seq_1_to_3000;
INSERT INTO sparse SELECT seq, REPEAT('abcd', 300) FROM mysql.seq_1_to_5000;
INSERT INTO redundant SELECT seq, MD5(seq) FROM mysql.seq_1_to_3000;
INSERT INTO parts SELECT seq, seq % 9, MD5(seq) FROM mysql.seq_1_to_3000;
INSERT INTO words SELECT seq, CONCAT('word', seq, ' common text') FROM mysql.seq_1_to_1000;
INSERT INTO parent SELECT seq FROM mysql.seq_1_to_100;
INSERT INTO child SELECT seq, 1 + seq % 100 FROM mysql.seq_1_to_1000;
INSERT INTO computed (id, a) SELECT seq, seq FROM mysql.seq_1_to_1000;
INSERT INTO places SELECT seq, POINT(seq, seq % 7) FROM mysql.seq_1_to_1000;
INSERT INTO history SELECT seq, 1 FROM mysql.seq_1_to_1000; UPDATE history SET v = 2;
SELECT NEXTVAL(numbers);
";

/// Guards the page formats (R3) and the files beside them: each table agrees with its primary's.
async fn shapes(version: Version, arguments: &[&str]) {
    let live = Live::start(version, arguments, 8 << 20);
    drop(live.server.query(SHAPES));
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(100);
    live.clone_with("clone", load, |load| {
        drop(live.server.query(
            "USE shapes; UPDATE sparse SET v = REVERSE(v) WHERE id % 3 = 0; \
             UPDATE compressed1 SET v = MD5(v) WHERE id % 2 = 0; \
             UPDATE compressed8 SET v = REVERSE(v); DELETE FROM words WHERE id % 5 = 0; \
             INSERT INTO words SELECT seq + 5000, 'later common' FROM mysql.seq_1_to_100; \
             UPDATE places SET g = POINT(id, id); SELECT NEXTVAL(numbers)",
        ));
        load.wait_for_commits(100);
    })
    .await;
    let allocated = |root: &str| {
        let path = live.path(root).join("shapes/sparse.ibd");
        let metadata = std::fs::metadata(path).expect("the table's file");
        (std::os::unix::fs::MetadataExt::blocks(&metadata) * 512, metadata.len())
    };
    let (bytes, size) = allocated("clone");
    assert!(bytes < size / 2, "page_compressed takes {bytes} of {size} bytes in the clone");
    // MEMORY tables are empty after any start: left out of what both sides are compared by.
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_every_shape_arrive_in_10_11() {
    shapes(Version::V10_11, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_every_shape_arrive_in_11_8() {
    shapes(Version::V11_8, &[]).await;
}

/// Guards the checks of pages with the older checksum (R3), over all of a server's tables.
#[tokio::test(flavor = "multi_thread")]
async fn tables_with_older_checksums_arrive() {
    shapes(Version::V10_11, &["--innodb-checksum-algorithm=crc32"]).await;
}

/// Guards R3: a tablespace that takes another's place, imported without redo, is copied again, and
/// recovery begins after the redo that says that it was deleted. Without the latter the update is
/// lost in the clone. It is the next walk that finds the other file: the look at the inode when a file
/// is opened only tells earlier, and the story passes without it.
#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_imported_while_it_is_copied_arrives() {
    let live = Live::start(Version::V10_11, &[], 8 << 20);
    let data = live.path("data/shop");
    drop(live.server.query(
        "CREATE DATABASE shop; CREATE TABLE shop.t (id INT PRIMARY KEY, v TEXT) ENGINE=InnoDB; \
         INSERT INTO shop.t SELECT seq, REPEAT(MD5(seq), 9) FROM mysql.seq_1_to_9000; \
         CREATE TABLE shop.u LIKE shop.t",
    ));
    // One connection: the tables stay locked while the files are copied.
    let mut conn = live.server.connect();
    mysql::prelude::Queryable::query_drop(&mut conn, "FLUSH TABLES shop.t FOR EXPORT").expect("ok");
    for end in ["ibd", "cfg"] {
        let (from, to) = (data.join(format!("t.{end}")), live.path(&format!("t.{end}")));
        std::fs::copy(from, to).expect("the exported file");
    }
    mysql::prelude::Queryable::query_drop(&mut conn, "UNLOCK TABLES").expect("ok");
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(100);
    live.clone_with("clone", load, |load| {
        drop(live.server.query("SET sql_log_bin=0; ALTER TABLE shop.u DISCARD TABLESPACE"));
        for end in ["ibd", "cfg"] {
            let (from, to) = (live.path(&format!("t.{end}")), data.join(format!("u.{end}")));
            std::fs::copy(from, to).expect("a writable data directory");
        }
        drop(live.server.query("SET sql_log_bin=0; ALTER TABLE shop.u IMPORT TABLESPACE"));
        drop(live.server.query("UPDATE shop.u SET v = MD5(v) WHERE id % 3 = 0"));
        load.wait_for_commits(100);
    })
    .await;
}

/// Guards R7 on a live server: pages of an older copy are used where the donor's page, read after C,
/// is the same, and never for its log. With a donor that finds every block equal no server starts on
/// the clone.
#[tokio::test(flavor = "multi_thread")]
async fn a_live_server_is_cloned_onto_an_older_copy() {
    let live = start(Version::V10_11, &["--innodb-log-file-size=16M"]);
    let mut client = recipient(&live.recipient).await;
    let older = clone_and_wait(&mut client, &live.statement("older", false)).await;
    assert_eq!(older.state(), State::Completed, "{older:?}");
    // A server has run on it since.
    live.start_clone("older").stop();
    let load = Load::start(&live.server, LoadOptions { ddl: true, ..writers() });
    load.wait_for_commits(500);
    let before = load.moment();
    let reuse_directory = live.path("older").display().to_string().into_bytes().into();
    let request = CloneStatementRequest {
        statement: live.statement("newer", false),
        options: Some(CloneOptions { reuse_directory, ..Default::default() }),
        ..Default::default()
    };
    let started = client.clone_statement(request).await.expect("the clone is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", live.donor.0.log());
    let ended = load.moment();
    load.wait_for_commits(50);
    let report = load.stop();
    live.check("newer", &clone, &before, &ended, &report);
    assert!(clone.reused_bytes > BYTES / 3, "{} bytes reused", clone.reused_bytes);
}

/// Tablespaces are exchanged over and over while files are copied. At the point one may be
/// discarded, or another's file may lie in its place: the clone is right, or it ends in the error
/// that tells of too much DDL.
#[tokio::test(flavor = "multi_thread")]
async fn tablespaces_exchanged_over_and_over_never_give_a_wrong_clone() {
    let live = Live::start(Version::V10_11, &[], 8 << 20);
    // IMPORT syncs a file while it holds InnoDB's dictionary: on a slow disk a second passes.
    let options = LoadOptions { imports: true, rate_min: 0, ..writers() };
    let load = Load::start(&live.server, options);
    wait_for("a first exchange", || (load.done("import") > 0).then_some(()));
    live.clone_or_fail_with("clone", load, &["SOURCE_CHANGED"], |load| {
        let before = load.done("import");
        wait_for("exchanges", || {
            load.assert_no_problem();
            (load.done("import") > before + 3).then_some(())
        });
    })
    .await;
}

/// The server cuts its undo tablespaces and exchanges its log while both are copied. Guards pages read
/// beyond a file's present end as zero, and the switch to the log's other file.
async fn undo_and_log_change_their_size(version: Version) {
    let arguments = [
        "--innodb-undo-tablespaces=3",
        "--innodb-undo-log-truncate=ON",
        "--innodb-max-undo-log-size=10485760",
        "--innodb-purge-rseg-truncate-frequency=1",
    ];
    let live = Live::start(version, &arguments, 8 << 20);
    let load = Load::start(&live.server, LoadOptions { upkeep: true, ..writers() });
    let truncated = || -> u64 {
        let row = live.server.query("SHOW GLOBAL STATUS LIKE 'Innodb_undo_truncations'");
        row.trim().rsplit('\t').next().and_then(|n| n.parse().ok()).expect("a number")
    };
    load.wait_for_commits(200);
    live.clone_with("clone", load, |load| {
        let (undo, resized) = (truncated(), load.done("resize"));
        wait_for("undo tablespaces to be cut, the log to be resized", || {
            load.assert_no_problem();
            (truncated() > undo && load.done("resize") > resized + 1).then_some(())
        });
    })
    .await;
}

/// Guards the sizes of tablespaces that recovery reads before it extends any. With the engine's
/// `with_grown` taken out the clone's are shorter than its log says, and a server whose buffer pool
/// the log nearly fills aborts as it starts: "outside the bounds of the file".
#[tokio::test(flavor = "multi_thread")]
async fn undo_that_grows_while_files_are_copied_has_its_size_in_the_clone() {
    let arguments = ["--innodb-undo-tablespaces=3", "--innodb-log-file-size=256M"];
    let live = Live::start(Version::V10_11, &arguments, 8 << 20);
    drop(live.server.query(
        "CREATE DATABASE IF NOT EXISTS shop; USE shop; CREATE TABLE grown (id INT PRIMARY KEY, v VARCHAR(200), w VARCHAR(200)); INSERT INTO \
         shop.grown SELECT seq, REPEAT('a', 150), REPEAT('b', 150) FROM seq_1_to_40000;",
    ));
    let size = |directory: &str| -> u64 {
        let one =
            |n| live.path(directory).join(format!("undo00{n}")).metadata().expect("undo").len();
        (1..=3).map(one).sum()
    };
    let load = Load::start(&live.server, LoadOptions { rate_min: 0, ..writers() });
    load.wait_for_commits(100);
    let listed = size("data");
    let mut open = Vec::new();
    let request =
        CloneStatementRequest { statement: live.statement("clone", false), ..Default::default() };
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let started = client.clone_statement(request).await.expect("the clone is accepted");
    let name = started.into_inner().clone.expect("a clone").name;
    wait_for("a snapshot", || live.donor.0.log().contains("snapshot opened").then_some(()));
    live.recipient.0.freeze();
    // Transactions that stay open: recovery looks for their undo first of all.
    for n in 0..6 {
        let mut conn = live.server.connect();
        mysql::prelude::Queryable::query_drop(&mut conn, "BEGIN").expect("ok");
        for letter in ["c", "d", "e", "f"] {
            let update = format!(
                "UPDATE shop.grown SET v = REPEAT('{letter}', 150), w = REPEAT('{letter}', 150) \
                 WHERE id BETWEEN {n} * 6600 + 1 AND {n} * 6600 + 6500"
            );
            mysql::prelude::Queryable::query_drop(&mut conn, update).expect("ok");
        }
        open.push(conn);
    }
    let grown = size("data");
    assert!(grown > listed, "{listed} bytes of undo are still {grown}");
    live.recipient.0.thaw();
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}\n{}", live.donor.0.log());
    assert!(size("clone") >= grown, "{grown} bytes of undo, {} in the clone", size("clone"));
    let ended = load.moment();
    load.wait_for_commits(50);
    let report = load.stop();
    drop(open);
    live.check("clone", &clone, &before, &ended, &report);
}

#[tokio::test(flavor = "multi_thread")]
async fn undo_and_log_that_change_their_size_arrive_in_10_11() {
    undo_and_log_change_their_size(Version::V10_11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn undo_and_log_that_change_their_size_arrive_in_11_8() {
    undo_and_log_change_their_size(Version::V11_8).await;
}
