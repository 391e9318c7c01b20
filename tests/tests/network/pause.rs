//! A user pauses a clone and goes on with it.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

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
    let (last, since) = (Cell::new((0, 0)), Cell::new(Instant::now()));
    net.until(&name, "a second in which nothing comes", |clone| {
        let now = (net.proxy.counts().down_bytes, clone.verified_bytes);
        // Renewals of the lease and pings alone.
        if now.1 != last.get().1 || now.0 >= last.get().0 + 4096 {
            last.set(now);
            since.set(Instant::now());
        }
        since.get().elapsed() > Duration::from_secs(1)
    })
    .await;
    let at_rest = net.proxy.counts().down_bytes;
    assert!(at_rest < DATA_BYTES / 2, "{at_rest} bytes came: the rest is that of a whole copy");
    let now = net.get(&name).await;
    assert_eq!((now.state(), &*now.stall_reason), (State::Paused, "paused by the user"));
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

/// Guards a pause that is longer than the donor waits for a caller: what was on its way is taken, and the
/// calls end (`Pause`), so that no connection is cut. Without that the chunks under way come again.
#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_is_longer_than_the_callers_timeout_sends_nothing_again() {
    let impatient = || ["--caller-timeout", "10s"].map(str::to_owned).to_vec();
    let mut net = Net::start_with(&[], |_| impatient()).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin("copy").await;
    net.pass_bytes(8 << 20);
    net.client.pause_clone(PauseCloneRequest { name: name.clone() }).await.unwrap();
    net.proxy.limit(None);
    // Longer than the time of the donor's patience, with what it takes it to look.
    tokio::time::sleep(Duration::from_secs(15)).await;
    assert_eq!(net.get(&name).await.state(), State::Paused);
    let request = ResumeCloneRequest { name: name.clone(), ..Default::default() };
    net.client.resume_clone(request).await.unwrap();
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    assert_eq!((end.resent_bytes, end.retries), (0, 0), "{}", end.last_retry_cause);
    assert!(net.proxy.counts().down_bytes < DATA_BYTES + (4 << 20));
    assert!(!net.donor.0.log().contains("a caller took nothing"), "{}", net.donor.0.log());
    tree::assert_identical(&net.path("data"), &net.path("copy"));
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
    tokio::time::sleep(Duration::from_secs(75)).await;
    let request = ResumeCloneRequest { name: name.clone(), ..Default::default() };
    net.client.resume_clone(request).await.unwrap();
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    tree::assert_identical(&net.path("data"), &net.path("copy"));
    let log = net.donor.0.log();
    assert_eq!(log.matches("snapshot opened").count(), 1, "the lease ended");
    assert!(end.resent_bytes < 32 << 20, "{end:?}");
}
