//! A recipient that is killed while it clones: the next clone to the same place is right, beside the
//! snapshot of the killed one, which lives until its lease ends.

use std::time::Duration;

use marcot_proto::recipient::v1::{
    CloneStatementRequest, recipient_service_client::RecipientServiceClient,
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
const KILLS: u64 = 3;

fn writers() -> LoadOptions {
    LoadOptions { writers: WRITERS, ddl: true, ..LoadOptions::default() }
}

async fn begin(client: &mut RecipientServiceClient<Channel>, live: &Live) {
    let request =
        CloneStatementRequest { statement: live.statement("clone", false), ..Default::default() };
    client.clone_statement(request).await.expect("the clone is accepted");
}

/// Guards R1 and R5: the point is the donor's own, and dies with its snapshot. What the killed
/// recipient had staged is never taken for the copy of another point.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_killed_after_the_point_clones_again() {
    let mut live = Live::start(Version::V10_11, &[], BYTES);
    let load = Load::start(&live.server, writers());
    load.wait_for_commits(200);
    let mut client = recipient(&live.recipient).await;
    let killer =
        live.donor.0.strike_at_line("the point is fixed", live.recipient.0.pid(), Blow::Kill);
    begin(&mut client, &live).await;
    let _at = killer.struck();
    live.recipient.0.kill();
    assert!(!live.path("clone").exists(), "it was killed before it installed");
    live.restart_recipient();
    live.clone_and_check("clone", load).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_killed_at_any_moment_clones_again() {
    let mut live = Live::start(Version::V10_11, &[], BYTES);
    let seed = seed();
    for turn in 0..KILLS {
        let load = Load::start(&live.server, writers());
        load.wait_for_commits(100);
        let mut client = recipient(&live.recipient).await;
        begin(&mut client, &live).await;
        let pid = live.recipient.0.pid();
        // Longer than a clone of this size takes: some kills come after the end.
        let window = Duration::from_secs(3);
        let _at = Killer::at_moment(seed + turn, window, pid, Blow::Kill).struck();
        live.recipient.0.kill();
        live.restart_recipient();
        if live.path("clone").exists() {
            std::fs::remove_dir_all(live.path("clone")).expect("a clone that was complete");
        }
        live.clone_and_check("clone", load).await;
        std::fs::remove_dir_all(live.path("clone")).expect("its server has ended");
    }
}
