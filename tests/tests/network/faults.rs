//! Cuts, stalls, a donor that is gone, bits that flip.

use std::time::{Duration, Instant};

use marcot_proto::recipient::v1::State;
use marcot_tests::{client::wait_for_end, tree};

use crate::{DATA_BYTES, Net};

/// Guards resume after a cut: without another try the first cut ends the clone, and with one that
/// begins its unit again far more would be sent twice.
#[tokio::test(flavor = "multi_thread")]
async fn connections_cut_again_and_again_cost_little() {
    const CUTS: u64 = 8;
    let mut net = Net::start(&[]).await;
    net.proxy.limit(Some(64 << 20));
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
    net.proxy.limit(Some(64 << 20));
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
    net.proxy.limit(Some(64 << 20));
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
