//! A recipient that is killed while it clones a live server: started again, it goes on with the same
//! snapshot, and the clone is right.

use std::{path::PathBuf, sync::mpsc, time::Duration};

use marcot_proto::recipient::v1::{GetCloneRequest, State};
use marcot_tests::{
    PATIENCE,
    client::begin,
    killer::{Blow, Killer, seed},
    live::{Live, WRITERS},
    load::{Load, LoadOptions, Moment},
    mariadb::Version,
    recipient, wait_for,
};
use tokio::{runtime::Handle, task::block_in_place};

const BYTES: u64 = 24 << 20;

/// Kills at seeded moments, in one run of the test.
const KILLS: u64 = 4;

fn writers() -> LoadOptions {
    LoadOptions { writers: WRITERS, ddl: true, ..LoadOptions::default() }
}

/// A table that no load writes to.
const TABLE: &str = "mysql/gtid_slave_pos.ibd";

/// Where a clone has staged a file.
fn staged(live: &Live, name: &str, file: &str) -> PathBuf {
    live.path(&format!(".marcot-{}/tree/{file}", &name["clones/".len()..]))
}

/// A busy server and a clone of it whose recipient was killed.
struct Killed {
    live: Live,
    load: Load,
    before: Moment,
    name: String,
}

/// It is killed as soon as the donor says that the point is fixed.
async fn killed_at_the_point() -> Killed {
    let mut live = Live::start(Version::V10_11, &[], BYTES);
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(200);
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let killer =
        live.donor.0.strike_at_line("the point is fixed", live.recipient.0.pid(), Blow::Kill);
    let name = begin(&mut client, &live.statement("clone", false)).await;
    let _at = killer.struck();
    live.recipient.0.kill();
    Killed { live, load, before, name }
}

/// Guards R1: what is asked of the snapshot after the point, once more, is answered as before it, or
/// for a later point; pages of one and redo of another would be a wrong clone.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_killed_after_the_point_goes_on_to_that_point() {
    let Killed { mut live, load, before, name } = killed_at_the_point().await;
    assert!(!live.path("clone").exists(), "it was killed before it installed");
    load.wait_for_commits(200);
    live.restart_recipient();
    let clone = live.check_end("clone", &name, before, load, &[]).await;
    assert_eq!(clone.resumes, 1, "{clone:?}");
    assert_eq!(live.donor.0.log().matches("snapshot opened").count(), 1);
}

/// Guards a staged file that is lost when the point is fixed: the first snapshot reads no page any
/// more, another one gives the file, and all else is compared where it lies.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_lost_after_the_point_costs_another_snapshot_and_not_the_clone() {
    let Killed { mut live, load, before, name } = killed_at_the_point().await;
    std::fs::remove_file(staged(&live, &name, TABLE)).expect("it is staged");
    live.restart_recipient();
    let clone = live.check_end("clone", &name, before, load, &[]).await;
    let log = live.donor.0.log();
    let count = |line: &str| log.matches(line).count();
    // The point is given up when its caller is gone before it is kept: the same snapshot goes on.
    assert!(count("the point is fixed") >= 2, "a page was read after the point");
    if count("snapshot opened") > 1 {
        assert!(clone.reused_bytes > BYTES / 2, "{clone:?}");
    }
}

/// Guards the beginning of a log that is lost where it was staged: what was read of it while it grew is not
/// read again, and zeros would stand there.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_is_lost_after_the_point_costs_another_snapshot_and_not_the_clone() {
    let Killed { mut live, load, before, name } = killed_at_the_point().await;
    std::fs::remove_file(staged(&live, &name, "ib_logfile0")).expect("it is staged");
    live.restart_recipient();
    let _clone = live.check_end("clone", &name, before, load, &[]).await;
    assert_eq!(live.donor.0.log().matches("snapshot opened").count(), 2);
}

/// Guards a table that is lost where it was staged while pages are sent again: of pages that have not
/// changed nothing comes, and zeros would stand there.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_lost_in_page_copy_costs_another_snapshot_and_not_the_clone() {
    let mut live = Live::start(Version::V10_11, &["--innodb-log-file-size=8M"], BYTES);
    let proxy = live.proxy_database_with(&["--spool-quota", "48MiB"]);
    let load = Load::start(&live.server, LoadOptions { rate: 200, rate_min: 0, ..writers() });
    load.wait_for_commits(50);
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let name = begin(&mut client, &live.statement("clone", false)).await;
    wait_for("a snapshot", || live.donor.0.log().contains("snapshot opened").then_some(()));
    live.recipient.0.freeze();
    live.outgrow_the_log();
    live.go_on_to_page_copy();
    // The next call of this kind is that of the cut, once the round is copied.
    let (begins, has_begun) = mpsc::channel();
    let (go_on, goes_on) = mpsc::channel::<()>();
    proxy.when_answered("BACKUP STAGE START", move || {
        begins.send(()).expect("the story waits");
        goes_on.recv_timeout(PATIENCE).expect("the story goes on");
    });
    live.recipient.0.thaw();
    block_in_place(|| has_begun.recv_timeout(PATIENCE)).expect("a cut");
    live.recipient.0.kill();
    go_on.send(()).expect("the proxy waits");
    // Nobody writes to it: it comes as it is, or not at all.
    std::fs::remove_file(staged(&live, &name, TABLE)).expect("it is staged");
    live.restart_recipient();
    let _clone = live.check_end("clone", &name, before, load, &[]).await;
    assert_eq!(live.donor.0.log().matches("snapshot opened").count(), 2);
}

/// Guards R1 where a recipient that was killed reads on while the call that it was killed in still
/// fixes the point, unaware of that: it is told to wait. Without the gate before the reads its clone may
/// have pages and transactions of after the point.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_that_reads_on_while_its_point_is_being_fixed_is_told_to_wait() {
    let mut live = Live::start(Version::V10_11, &[], BYTES);
    let proxy = live.proxy_database();
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(200);
    let before = load.moment();
    let (fixed, is_fixed) = mpsc::channel();
    let (go_on, goes_on) = mpsc::channel::<()>();
    let mut client = recipient(&live.recipient).await;
    let name = begin(&mut client, &live.statement("clone", false)).await;
    // To open it the donor takes and lets go the locks as well, to see whether it may.
    wait_for("a snapshot", || live.donor.0.log().contains("snapshot opened").then_some(()));
    proxy.when_answered("BACKUP STAGE END", move || {
        fixed.send(()).expect("the story waits");
        goes_on.recv_timeout(PATIENCE).expect("the story goes on");
    });
    block_in_place(|| is_fixed.recv_timeout(PATIENCE)).expect("the point is being fixed");
    live.recipient.0.kill();
    let staged = staged(&live, &name, TABLE);
    std::fs::remove_file(&staged).expect("it is staged");
    live.restart_recipient();
    let mut client = recipient(&live.recipient).await;
    let mut waits = || {
        let request = GetCloneRequest { name: name.clone() };
        let clone = block_in_place(|| Handle::current().block_on(client.get_clone(request)));
        let clone = clone.expect("it is there").into_inner().clone.expect("a clone");
        clone.last_retry_cause.contains("fixes its point just now")
    };
    wait_for("it to be told to wait", || waits().then_some(()));
    load.wait_for_commits(50);
    go_on.send(()).expect("the proxy waits");
    let clone = live.check_end("clone", &name, before, load, &[]).await;
    // Where the donor has not noticed that the first call has no caller any more, the point stands.
    if live.donor.0.log().matches("snapshot opened").count() > 1 {
        assert!(clone.reused_bytes > BYTES / 2, "{clone:?}");
    }
}

/// Guards the journal's order: wherever the recipient is killed, what it says is durable is, and
/// what it does not say is copied again.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_killed_at_any_moment_goes_on() {
    let mut live = Live::start(Version::V10_11, &[], BYTES);
    let seed = seed();
    let mut resumed = 0;
    for turn in 0..KILLS {
        let load = Load::start(&live.server, writers());
        load.wait_for_commits(100);
        let before = load.moment();
        let mut client = recipient(&live.recipient).await;
        let name = begin(&mut client, &live.statement("clone", false)).await;
        let pid = live.recipient.0.pid();
        // Longer than a clone of this size takes: some kills come after the end.
        let window = Duration::from_secs(3);
        let _at = Killer::at_moment(seed + turn, window, pid, Blow::Kill).struck();
        live.recipient.0.kill();
        live.restart_recipient();
        // Killed before anything was copied, it does not begin again by itself.
        let reasons = ["RECIPIENT_RESTARTED"];
        let clone = live.check_end("clone", &name, before, load, &reasons).await;
        resumed += clone.resumes;
        if clone.state() == State::Completed {
            std::fs::remove_dir_all(live.path("clone")).expect("its server has ended");
        }
    }
    eprintln!("{resumed} of {KILLS} clones went on");
}
