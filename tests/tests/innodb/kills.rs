//! A recipient that is killed while it clones a live server: started again, it goes on with the same
//! snapshot, and the clone is right.

use std::time::Duration;

use marcot_proto::recipient::v1::{
    CloneStatementRequest, State, recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    killer::{Blow, Killer, seed},
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    mariadb::Version,
    recipient,
};
use tonic::transport::Channel;

const BYTES: u64 = 24 << 20;

/// Kills at seeded moments, in one run of the test.
const KILLS: u64 = 4;

fn writers() -> LoadOptions {
    LoadOptions { writers: WRITERS, ddl: true, ..LoadOptions::default() }
}

async fn begin(client: &mut RecipientServiceClient<Channel>, live: &Live) -> String {
    let request =
        CloneStatementRequest { statement: live.statement("clone", false), ..Default::default() };
    let started = client.clone_statement(request).await.expect("the clone is accepted");
    started.into_inner().clone.expect("a clone").name
}

/// Guards R1: what is asked of the snapshot after the point, once more, is answered as before it, or
/// for a later point; pages of one and redo of another would be a wrong clone.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_killed_after_the_point_goes_on_to_that_point() {
    let mut live = Live::start(Version::V10_11, &[], BYTES);
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(200);
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let killer =
        live.donor.0.strike_at_line("the point is fixed", live.recipient.0.pid(), Blow::Kill);
    let name = begin(&mut client, &live).await;
    let _at = killer.struck();
    live.recipient.0.kill();
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
    let mut live = Live::start(Version::V10_11, &[], BYTES);
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(200);
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let killer =
        live.donor.0.strike_at_line("the point is fixed", live.recipient.0.pid(), Blow::Kill);
    let name = begin(&mut client, &live).await;
    let _at = killer.struck();
    live.recipient.0.kill();
    let staged = format!(".marcot-{}/tree/mysql/gtid_slave_pos.ibd", &name["clones/".len()..]);
    std::fs::remove_file(live.path(&staged)).expect("it is staged");
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
        let name = begin(&mut client, &live).await;
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
