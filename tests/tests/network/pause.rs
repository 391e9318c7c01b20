//! A user pauses a clone and goes on with it.

use std::cell::Cell;

use marcot_proto::recipient::v1::{
    CancelCloneRequest, PauseCloneRequest, ResumeCloneRequest, State,
};
use marcot_tests::{client::wait_for_end, tree};

use crate::{DATA_BYTES, Net};

/// Guards the gate: without it the bytes go on. Nothing is sent again, for the connections stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_clone_reads_nothing_and_goes_on_where_it_was() {
    let mut net = Net::start(&[]).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin("copy").await;
    net.pass_bytes(8 << 20);
    for _ in 0..2 {
        let request = PauseCloneRequest { name: name.clone() };
        let paused = net.client.pause_clone(request).await.unwrap().into_inner().clone.unwrap();
        assert_eq!(paused.state(), State::Paused, "twice is once");
    }
    net.proxy.limit(None);
    // What is on its way arrives: the windows of HTTP/2.
    let (last, looks) = (Cell::new((0, 0)), Cell::new(0));
    net.until(&name, "the stream to rest", |clone| {
        let now = (net.proxy.counts().down_bytes, clone.verified_bytes);
        looks.set(if last.replace(now) == now { looks.get() + 1 } else { 0 });
        looks.get() > 20
    })
    .await;
    let at_rest = net.proxy.counts().down_bytes;
    let before = net.get(&name).await;
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let after = net.get(&name).await;
    assert_eq!((after.state(), &*after.stall_reason), (State::Paused, "paused by the user"));
    assert_eq!(after.verified_bytes, before.verified_bytes);
    // Renewals of the lease and pings alone.
    assert!(net.proxy.counts().down_bytes < at_rest + 4096);
    let request = ResumeCloneRequest { name: name.clone(), ..Default::default() };
    let resumed = net.client.resume_clone(request).await.unwrap().into_inner().clone.unwrap();
    assert_eq!(resumed.state(), State::InProgress);
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    assert_eq!((end.resent_bytes, end.retries), (0, 0));
    assert!(net.proxy.counts().down_bytes < DATA_BYTES + (4 << 20));
    tree::assert_identical(&net.path("data"), &net.path("copy"));
    let request = PauseCloneRequest { name };
    let refused = net.client.pause_clone(request).await.unwrap_err();
    assert_eq!(marcot_common::failure::Failure::from_status(&refused).reason, "CLONE_ENDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_clone_can_be_cancelled() {
    let mut net = Net::start(&[]).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin("copy").await;
    net.pass_bytes(4 << 20);
    net.client.pause_clone(PauseCloneRequest { name: name.clone() }).await.unwrap();
    net.client.cancel_clone(CancelCloneRequest { name: name.clone() }).await.unwrap();
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Cancelled, "{end:?}");
    assert!(net.donor.0.log().contains("snapshot closed"));
}

/// Guards the lease of a clone that is paused for longer than it: it is renewed. Without renewals the
/// donor drops the snapshot, and another one is opened.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_is_paused_for_longer_than_its_lease_goes_on() {
    // The shortest lease, 60 s.
    let mut net = Net::start(&["--donor-timeout", "10s"]).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin("copy").await;
    net.pass_bytes(8 << 20);
    net.client.pause_clone(PauseCloneRequest { name: name.clone() }).await.unwrap();
    net.proxy.limit(None);
    tokio::time::sleep(std::time::Duration::from_secs(75)).await;
    let request = ResumeCloneRequest { name: name.clone(), ..Default::default() };
    net.client.resume_clone(request).await.unwrap();
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    tree::assert_identical(&net.path("data"), &net.path("copy"));
    let log = net.donor.0.log();
    assert_eq!(log.matches("snapshot opened").count(), 1, "the lease ended");
    assert!(end.resent_bytes < 32 << 20, "{end:?}");
}
