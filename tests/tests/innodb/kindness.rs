//! Clones that give way to the server's commits.

use std::time::{Duration, Instant};

use marcot_proto::recipient::v1::{GetCloneRequest, State};
use marcot_tests::{
    client::{begin, wait_for_end},
    live::{Live, WRITERS},
    load::{Load, LoadOptions},
    mariadb::Version,
    recipient,
};

/// Minutes at the least rate, seconds without.
const BYTES: u64 = 192 << 20;

/// Chunks of 1 MiB that two streams may have read before the rate fell.
const ON_THEIR_WAY: u64 = 4;

/// As commits of a disk that is busy.
const SLOW: Duration = Duration::from_millis(240);

/// Guards the server: while its commits take longer than they should, the donor reads at its least
/// rate, and says why; and the clone: it goes on at its pace once they are quick again. Seen to fail
/// with the limit left where it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_gives_way_while_commits_are_slow_and_says_so() {
    let mut live = Live::start(Version::V10_11, &[], BYTES);
    let proxy = live.proxy_database_with(&["--give-way", "120ms"]);
    let load = Load::start(&live.server, LoadOptions { writers: WRITERS, ..Default::default() });
    load.wait_for_commits(50);
    proxy.delay_answers("ENGINE LOGS", SLOW);
    let before = load.moment();
    let mut client = recipient(&live.recipient).await;
    let name = begin(&mut client, &live.statement("clone", false)).await;
    let mut get = async || {
        let request = GetCloneRequest { name: name.clone() };
        client.get_clone(request).await.expect("it is known").into_inner().clone.expect("a clone")
    };
    let deadline = Instant::now() + marcot_tests::PATIENCE;
    let held_back = loop {
        let clone = get().await;
        assert_eq!(clone.state(), State::InProgress, "it was not slowed down: {clone:?}");
        if clone.held_back_reason.contains("reads 1.00 MiB/s at the most") {
            break clone;
        }
        assert!(Instant::now() < deadline, "it does not say why: {clone:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let reason = &held_back.held_back_reason;
    assert!(reason.contains("commits take") && reason.contains("120.0 ms are right"), "{reason}");
    // What is told is so: some seconds bring so many MiB, and what was on its way.
    let (begun, before_bytes) = (Instant::now(), get().await.verified_bytes);
    while begun.elapsed() < Duration::from_secs(4) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let after = get().await;
    assert_eq!(after.state(), State::InProgress, "{after:?}");
    let most = (begun.elapsed().as_secs() + 1 + ON_THEIR_WAY) << 20;
    assert!(
        after.verified_bytes - before_bytes <= most,
        "{} bytes",
        after.verified_bytes - before_bytes
    );
    proxy.delay_answers("ENGINE LOGS", Duration::ZERO);
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.held_back_reason, "", "{clone:?}");
    live.check_end("clone", &name, before, load, &[]).await;
    assert!(live.donor.0.log().contains("clones read as fast as they can again"));
}
