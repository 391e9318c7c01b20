//! Cuts, stalls, a donor that is gone, bits that flip.

use std::{
    os::unix::fs::MetadataExt as _,
    time::{Duration, Instant},
};

use marcot_proto::recipient::v1::{Clone, State};
use marcot_tests::{Donor, client::wait_for_end, tree};

use crate::{DATA_BYTES, Net};

/// Guards resume after a cut: without another try the first cut ends the clone, and with one that
/// begins its unit again far more would be sent twice.
#[tokio::test(flavor = "multi_thread")]
async fn connections_cut_again_and_again_cost_little() {
    const CUTS: u64 = 8;
    let mut net = Net::start(&[]).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin("copy").await;
    for _ in 0..CUTS {
        net.pass_bytes(7 << 20);
        net.proxy.cut();
    }
    net.proxy.limit(None);
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    tree::assert_identical(&net.path("data"), &net.path("copy"));
    assert!(end.retries >= 8, "{} retries", end.retries);
    assert!(!end.last_retry_cause.is_empty());
    // What was on its way: the windows of the streams.
    let passed = net.proxy.counts().down_bytes;
    assert!(passed < DATA_BYTES + CUTS * (12 << 20), "{passed} bytes for {DATA_BYTES}");
    assert!(end.resent_bytes < CUTS * (12 << 20), "{} bytes again", end.resent_bytes);
    assert_eq!(end.verified_bytes, tree_bytes(&net));
}

fn tree_bytes(net: &Net) -> u64 {
    let size = |name: &str| std::fs::metadata(net.path("data").join(name)).unwrap().len();
    (0..crate::LARGE).map(|n| size(&format!("large{n}"))).sum::<u64>()
        + (0..crate::SMALL).map(|n| size(&format!("small/{n}"))).sum::<u64>()
}

/// Guards the keepalive: a connection that is open and dead is found out, and left.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_half_open_is_left() {
    let mut net = Net::start(&[]).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin("copy").await;
    net.pass_bytes(7 << 20);
    net.proxy.stall();
    let waits = net.until(&name, "a retry", |clone| clone.retries > 0).await;
    assert_eq!(waits.state(), State::InProgress);
    net.until(&name, "a reason", |clone| clone.stall_reason.contains("waits for the donor")).await;
    net.proxy.pass();
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    tree::assert_identical(&net.path("data"), &net.path("copy"));
}

/// Guards the bound on waiting: a donor that is gone for good ends the clone, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_that_is_gone_for_good_ends_the_clone() {
    let mut net = Net::start(&["--donor-timeout", "3s"]).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin("copy").await;
    net.pass_bytes(7 << 20);
    net.proxy.take_down();
    let begun = Instant::now();
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Failed, "{end:?}");
    let error = end.error.unwrap();
    assert!(error.message.contains("clone_donor_timeout_after_network_failure"), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    assert!(!net.path("copy").exists());
}

/// Guards every check on arrival: whatever bit flips in plaintext, in a length, a name or a byte of
/// a file, the copy is right or there is none.
#[tokio::test(flavor = "multi_thread")]
async fn a_bit_that_flips_is_noticed_wherever_it_is() {
    let mut net = Net::start(&["--donor-timeout", "10s"]).await;
    let mut state = 99_u64;
    let mut random = |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut completed = 0;
    for n in 0..24 {
        // Among the first bytes are log-in, snapshot and list.
        let after = if n % 2 == 0 { random(24 << 10) } else { random(DATA_BYTES) };
        net.proxy.flip_after(after);
        let target = format!("copy{n}");
        let name = net.begin(&target).await;
        let end = wait_for_end(&mut net.client, &name).await;
        assert!(!net.proxy.flips(), "the clone of {after} has fewer bytes");
        match end.state() {
            State::Completed => {
                tree::assert_identical(&net.path("data"), &net.path(&target));
                completed += 1;
            }
            State::Failed => assert!(!net.path(&target).exists(), "{after}: {end:?}"),
            other => panic!("{after}: {other:?}"),
        }
        std::fs::remove_dir_all(net.path(&target)).ok();
    }
    assert!(completed >= 12, "{completed} of 24 clones went on after a flipped bit");
}

/// Guards the reuse of what is staged when the donor service is restarted, twice: its snapshot is
/// lost, another one is opened, and what had arrived does not come again, nor lie on the disk twice.
/// Without `Staging::take` all bytes come twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_service_that_is_restarted_costs_little() {
    let mut net = Net::start(&[]).await;
    net.proxy.limit(Some(12 << 20));
    let name = net.begin("copy").await;
    net.pass_bytes(DATA_BYTES * 6 / 10);
    let staging = net.path(&format!(".marcot-{}", name.trim_start_matches("clones/")));
    let staged = staging.join("tree/large0").metadata().unwrap().ino();
    for lost in 1..=2 {
        net.donor.0.kill();
        net.until(&name, "a retry", |clone| clone.retries >= lost).await;
        net.donor = Donor::start(net.home.path(), &net.path("data"), &[]);
        net.proxy.set_target(net.donor.0.address);
        if lost == 1 {
            let is_reused = |clone: &Clone| clone.reused_bytes > DATA_BYTES / 10;
            net.until(&name, "what is staged to be reused", is_reused).await;
        }
    }
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    tree::assert_identical(&net.path("data"), &net.path("copy"));
    assert_eq!(net.path("copy/large0").metadata().unwrap().ino(), staged, "it was copied");
    assert!(end.reused_bytes > DATA_BYTES * 4 / 10, "{} bytes reused", end.reused_bytes);
    let passed = net.proxy.counts().down_bytes;
    assert!(passed < DATA_BYTES * 12 / 10, "{passed} bytes for {DATA_BYTES}");
    let left: Vec<_> = tree::names(net.home.path());
    assert!(!left.iter().any(|name| name.starts_with(".marcot-")), "{left:?}");
    assert_eq!(end.files_copied, end.files_expected);
}

/// Guards the bound on a network that stalls for good: nothing is reset, nothing comes, and the clone
/// ends within its limits, with what is staged kept.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_stalls_for_good_ends_the_clone_within_its_bound() {
    let mut net = Net::start(&["--donor-timeout", "3s", "--stall-timeout", "2s"]).await;
    net.proxy.limit(Some(16 << 20));
    let name = net.begin("copy").await;
    net.pass_bytes(8 << 20);
    net.proxy.stall();
    let begun = std::time::Instant::now();
    let end = wait_for_end(&mut net.client, &name).await;
    let took = begun.elapsed();
    assert_eq!(end.state(), State::Failed, "{end:?}");
    let error = end.error.unwrap();
    assert!(error.message.contains("the donor was waited for"), "{error:?}");
    // The limits, and two tries of a connection that is taken and says nothing (10 s each).
    assert!(took < std::time::Duration::from_secs(40), "it took {took:?}");
    let left = marcot_tests::tree::names(net.home.path());
    assert!(
        left.iter().any(|name| name.starts_with(".marcot-")),
        "what is staged is kept: {left:?}"
    );
}

/// Guards keepalive on the donor's side: connections whose other end has gone without a word are given
/// up, and their descriptors with them.
#[tokio::test(flavor = "multi_thread")]
async fn a_donor_frees_connections_whose_other_end_is_silent() {
    let mut net = Net::start(&[]).await;
    let idle = net.donor.0.descriptors();
    net.proxy.limit(Some(16 << 20));
    net.begin("copy").await;
    net.pass_bytes(8 << 20);
    let busy = net.donor.0.descriptors();
    assert!(busy > idle + 2, "{busy} descriptors, {idle} before");
    // Half open: the proxy holds its connections, and passes nothing of the end.
    net.proxy.stall();
    net.recipient.0.kill();
    let begun = std::time::Instant::now();
    // 20 s until it asks, 20 s for the answer; what the snapshot holds goes with its lease.
    marcot_tests::wait_for("connections to be given up", || {
        (net.donor.0.descriptors() < busy - 2).then_some(())
    });
    assert!(!net.donor.0.log().contains("lease expired"), "by the lease, not by keepalive");
    eprintln!("given up after {:?}", begun.elapsed());
}
