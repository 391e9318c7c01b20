//! Tablespaces that are imported around a clone: recovery of the clone must not meet the redo record
//! that says that they were deleted.
//!
//! All but the last guard the look into what the redo log deletes (`deletions` of the engine): with it
//! taken out, the update that follows the import is lost in the clone, and nothing else shows it.

use marcot_tests::{
    client::begin,
    live::{Live, WRITERS},
    load::{Exchange, Load, LoadOptions},
    mariadb::Version,
    recipient, wait_for,
};

use crate::encrypted::Keys;

/// What the donor logs when it begins anew after an import.
const FOUND: &str = "that the redo log deletes is there";

fn busy(live: &Live) -> (Load, Exchange) {
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(100);
    let exchange = Exchange::new(live.server.connect(), live.server.data_directory());
    (load, exchange.expect("the tables are made"))
}

/// A server that makes no checkpoint of its own accord for as long as a story takes.
const LARGE: [&str; 2] = ["--innodb-log-file-size=512M", "--innodb-buffer-pool-size=512M"];

fn last_checkpoint(live: &Live) -> u64 {
    let row = live.server.query("SHOW GLOBAL STATUS LIKE 'Innodb_lsn_last_checkpoint'");
    row.trim().rsplit('\t').next().and_then(|n| n.parse().ok()).expect("a number")
}

/// The first list has the imported file, and redo begins before it was discarded.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_imported_before_the_clone_but_after_its_checkpoint_arrives() {
    let live = Live::start(Version::V10_11, &LARGE, 1 << 20);
    let (load, mut exchange) = busy(&live);
    exchange.export().expect("exported");
    let begun = live.lsn();
    exchange.discard().and_then(|()| exchange.import()).expect("imported");
    live.clone_with("clone", load, |_| {
        assert!(last_checkpoint(&live) < begun, "the checkpoint is after the import");
        // The next one comes soon.
        drop(live.server.query("SET GLOBAL innodb_max_dirty_pages_pct=0"));
    })
    .await;
    assert!(live.donor.0.log().contains(FOUND), "{}", live.donor.0.log());
}

/// BACKUP STAGE waits for an import that runs: the cut is where one is seen first. The donor's SQL
/// stands still meanwhile, so that what the redo says is known only after the locks.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_imported_while_the_locks_are_taken_arrives() {
    let mut live = Live::start(Version::V10_11, &["--innodb-log-file-size=96M"], 1 << 20);
    let (load, mut exchange) = busy(&live);
    exchange.export().expect("exported");
    let proxy = live.proxy_database();
    proxy.when_answered("BACKUP STAGE START", move || {
        exchange.discard().and_then(|()| exchange.import()).expect("imported");
    });
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let name = begin(&mut client, &live.statement("clone", false)).await;
    wait_for("the import at the cut", || live.donor.0.log().contains(FOUND).then_some(()));
    drop(live.server.query("SET GLOBAL innodb_max_dirty_pages_pct=0"));
    let _clone = live.check_end("clone", &name, before, load, &[]).await;
}

/// The clone has never seen the file that was discarded. In the log of 10.11 ids can be read though
/// it is encrypted; in that of 11.8 only how many were deleted.
async fn a_table_made_and_imported_meanwhile(version: Version, is_encrypted: bool) {
    let keys = Keys::new();
    let arguments = if is_encrypted { keys.arguments() } else { Vec::new() };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let live = Live::start(version, &arguments, 1 << 20);
    let (load, mut exchange) = busy(&live);
    live.clone_with("clone", load, |load| {
        exchange.export().and_then(|()| exchange.import_new()).expect("imported");
        load.wait_for_commits(50);
        drop(live.server.query("SET GLOBAL innodb_max_dirty_pages_pct=0"));
    })
    .await;
    assert!(live.donor.0.log().contains(FOUND), "{}", live.donor.0.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_made_and_imported_while_files_are_copied_arrives() {
    a_table_made_and_imported_meanwhile(Version::V10_11, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_imported_under_an_encrypted_log_of_10_11_arrives() {
    a_table_made_and_imported_meanwhile(Version::V10_11, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_imported_under_an_encrypted_log_of_11_8_arrives() {
    a_table_made_and_imported_meanwhile(Version::V11_8, true).await;
}

/// Guards the bound of the wait for a checkpoint. Without it the clone waits for as long as the server
/// makes none, hours on one with a large log.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_makes_no_checkpoint_after_an_import_fails_the_clone_in_time() {
    let mut live = Live::start(Version::V10_11, &LARGE, 1 << 20);
    let _proxy = live.proxy_database_with(&["--checkpoint-timeout", "2s"]);
    let (load, mut exchange) = busy(&live);
    exchange.export().expect("exported");
    exchange.discard().and_then(|()| exchange.import()).expect("imported");
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let name = begin(&mut client, &live.statement("clone", false)).await;
    let clone = live.check_end("clone", &name, before, load, &["CHECKPOINT_STALLED"]).await;
    let error = clone.error.expect("it has failed");
    for text in ["in 2s", "--checkpoint-timeout", "innodb_max_dirty_pages_pct"] {
        assert!(error.message.contains(text), "{error:?}");
    }
    wait_for("no connection of the donor", || live.donor_connections().is_empty().then_some(()));
}
