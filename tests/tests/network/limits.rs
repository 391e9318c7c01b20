//! Limits of bytes per second and of streams: kept, and changed while a clone runs.

use std::time::{Duration, Instant};

use marcot_proto::recipient::v1::{
    Clone, CloneLimits, CloneOptions, CloneStatementRequest, State, UpdateCloneLimitsRequest,
};
use marcot_tests::{client::wait_for_end, process, tree, wait_for};

use crate::{DATA_BYTES, Net};

const MIB: u64 = 1 << 20;

impl Net {
    async fn begin_limited(&mut self, limits: CloneLimits) -> String {
        let statement = process::statement(self.proxy.port(), &self.path("copy"), "");
        let options = Some(CloneOptions { limits: Some(limits), ..Default::default() });
        let request = CloneStatementRequest { statement, options, ..Default::default() };
        self.client.clone_statement(request).await.unwrap().into_inner().clone.unwrap().name
    }

    async fn limit(&mut self, name: &str, limits: CloneLimits) -> Clone {
        let request = UpdateCloneLimitsRequest { name: name.to_owned(), limits: Some(limits) };
        self.client.update_clone_limits(request).await.unwrap().into_inner().clone.unwrap()
    }
}

fn data(rate: u64) -> CloneLimits {
    CloneLimits { data_bytes_per_second_max: Some(rate), ..Default::default() }
}

fn throttled(clone: &Clone) -> Duration {
    clone.throttled_duration.unwrap().try_into().unwrap()
}

/// What 100 ms of credit and a stream's chunk may add.
fn least_seconds(bytes: u64, rate: u64) -> f64 {
    (bytes - 2 * MIB) as f64 / rate as f64 - 0.1
}

/// Guards both limits: without them loopback takes a tenth of the time. Seen to fail with the wait
/// taken out.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_takes_no_more_than_its_limits() {
    let rate = 12 * MIB;
    let network = CloneLimits { network_bytes_per_second_max: Some(rate), ..Default::default() };
    for limits in [data(rate), network] {
        let mut net = Net::start(&[]).await;
        let begin = Instant::now();
        let name = net.begin_limited(limits).await;
        let end = wait_for_end(&mut net.client, &name).await;
        let seconds = begin.elapsed().as_secs_f64();
        assert_eq!(end.state(), State::Completed, "{end:?}");
        assert!(seconds >= least_seconds(DATA_BYTES, rate), "{seconds} s");
        assert!(throttled(&end) > Duration::from_secs(1), "{end:?}");
        let shown = end.limits.unwrap();
        assert_eq!(shown.data_bytes_per_second_max, limits.data_bytes_per_second_max.or(Some(0)));
        tree::assert_identical(&net.path("data"), &net.path("copy"));
    }
}

/// Guards the change of a limit that streams wait for: at the first rate the copy takes 18 minutes.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_is_lifted_while_streams_wait_for_it() {
    let mut net = Net::start(&[]).await;
    let name = net.begin_limited(data(64 << 10)).await;
    net.until(&name, "the first bytes", |clone| clone.verified_bytes > 0).await;
    let changed = net.limit(&name, data(0)).await;
    assert_eq!(changed.limits.unwrap().data_bytes_per_second_max, Some(0));
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    tree::assert_identical(&net.path("data"), &net.path("copy"));
}

/// Guards streams that come and go while a clone runs, and that none of the bytes is lost or comes
/// twice.
#[tokio::test(flavor = "multi_thread")]
async fn streams_come_and_go_while_a_clone_runs() {
    let mut net = Net::start(&["--donor-timeout", "60s", "--max-concurrency", "1"]).await;
    let name = net.begin_limited(data(4 * MIB)).await;
    let threads = |clone: &Clone| clone.stages.iter().map(|row| row.threads).max().unwrap();
    net.until(&name, "one stream", |clone| threads(clone) == 1).await;
    let streams = |n| CloneLimits { concurrency_max: Some(n), ..Default::default() };
    net.limit(&name, streams(3)).await;
    net.until(&name, "three streams", |clone| threads(clone) == 3).await;
    net.limit(&name, streams(1)).await;
    net.limit(&name, data(0)).await;
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    assert_eq!(end.resent_bytes, 0);
    assert_eq!(end.limits.unwrap().concurrency_max, Some(1));
    tree::assert_identical(&net.path("data"), &net.path("copy"));
}

/// Guards a clone of more streams than a donor reads for: those without a place asked for one again and
/// again, each with a part that nobody else could copy, and counted as a network that fails.
#[tokio::test(flavor = "multi_thread")]
async fn there_are_no_more_streams_than_the_donor_reads_for() {
    const READERS_MAX: u32 = 32;
    // Each too large to travel with others.
    let more = |home: &std::path::Path| {
        for n in 0..2 * READERS_MAX {
            std::fs::write(home.join(format!("data/more{n}")), vec![1; (1 << 20) + 1]).unwrap();
        }
        Vec::new()
    };
    let mut net = Net::start_with(&["--max-concurrency", "48"], more).await;
    let name = net.begin_limited(data(8 * MIB)).await;
    let threads = |clone: &Clone| clone.stages.iter().map(|row| row.threads).max().unwrap();
    net.until(&name, "as many streams as may be", |clone| threads(clone) == READERS_MAX).await;
    net.limit(&name, data(0)).await;
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!((end.state(), end.retries), (State::Completed, 0), "{end:?}");
    assert_eq!(end.limits.unwrap().concurrency_max, Some(48), "what was asked for is shown");
    tree::assert_identical(&net.path("data"), &net.path("copy"));
}

/// Guards the number of streams that is found: on a link that limits each connection one stream brings
/// a share of what eight do. Without it there are as many as cores until the end.
#[tokio::test(flavor = "multi_thread")]
async fn streams_are_added_while_they_bring_more() {
    // Enough for some windows of six streams.
    let more = |home: &std::path::Path| {
        for n in 0..6 {
            let mut text = Vec::new();
            while text.len() < 48 << 20 {
                text.extend_from_slice(format!("{n} {} ", text.len()).as_bytes());
            }
            std::fs::write(home.join(format!("data/more{n}")), text).unwrap();
        }
        Vec::new()
    };
    let mut net =
        Net::start_with(&["--donor-timeout", "60s", "--autotune-concurrency"], more).await;
    net.proxy.limit_each(Some(2 * MIB));
    let name = net.begin("copy").await;
    let threads = |clone: &Clone| clone.stages.iter().map(|row| row.threads).max().unwrap();
    net.until(&name, "more streams than at first", |clone| threads(clone) >= 5).await;
    // Those that are asked for by a person go before.
    let few = CloneLimits { concurrency_max: Some(2), ..Default::default() };
    let limited = net.limit(&name, few).await.limits.unwrap();
    assert_eq!((limited.concurrency_max(), limited.autotune_concurrency()), (2, true));
    net.proxy.limit_each(None);
    net.until(&name, "two streams, or the end", |clone| threads(clone) <= 2).await;
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    tree::assert_identical(&net.path("data"), &net.path("copy"));
}

/// Guards limits that were changed against a restart of the recipient: they are those of the clone's
/// resource, not of its request.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipient_that_is_killed_keeps_the_limits() {
    let mut net = Net::start(&[]).await;
    let name = net.begin_limited(data(16 * MIB)).await;
    net.limit(&name, data(8 * MIB)).await;
    net.until(&name, "the first bytes", |clone| clone.verified_bytes > 20 * MIB).await;
    net.recipient.0.kill();
    net.start_recipient().await;
    let resumed = net.until(&name, "the clone to go on", |clone| clone.resumes == 1).await;
    assert_eq!(resumed.limits.unwrap().data_bytes_per_second_max, Some(8 * MIB));
    net.limit(&name, data(0)).await;
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
}

/// Guards the donor's cap, which is one for all recipients: two clones together are no faster than one. Seen to fail
/// without it.
#[tokio::test(flavor = "multi_thread")]
async fn a_donors_cap_is_one_for_all_its_clones() {
    let rate = 12 * MIB;
    let cap = |_: &std::path::Path| vec!["--max-data-bandwidth".to_owned(), rate.to_string()];
    let mut net = Net::start_with(&[], cap).await;
    let home = net.path("second");
    std::fs::create_dir(&home).unwrap();
    let second = marcot_tests::Recipient::start(&home, &[]);
    let mut other = marcot_tests::recipient(&second).await;
    let begin = Instant::now();
    let first = net.begin("copy").await;
    let statement = process::statement(net.donor.0.address.port(), &home.join("copy"), "");
    let request = CloneStatementRequest { statement, ..Default::default() };
    let answer = other.clone_statement(request).await.unwrap();
    let name = answer.into_inner().clone.unwrap().name;
    for (client, name) in [(&mut net.client, &first), (&mut other, &name)] {
        let end = wait_for_end(client, name).await;
        assert_eq!(end.state(), State::Completed, "{end:?}");
    }
    let seconds = begin.elapsed().as_secs_f64();
    assert!(seconds >= least_seconds(2 * DATA_BYTES, rate), "{seconds} s");
}

/// Guards the cap that is changed while the donor runs: at the first rate the copy takes 18 minutes. A
/// file that is wrong meanwhile changes nothing, and what needs a restart is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_donors_cap_follows_its_configuration_file() {
    let write = |home: &std::path::Path, text: &str| {
        std::fs::write(home.join("donor.toml"), text).unwrap();
    };
    let mut net = Net::start_with(&[], |home| {
        write(home, "max-data-bandwidth = \"64KiB\"");
        vec!["--config".to_owned(), home.join("donor.toml").display().to_string()]
    })
    .await;
    let name = net.begin("copy").await;
    net.until(&name, "the first bytes", |clone| clone.verified_bytes > 0).await;
    let home = net.home.path().to_owned();
    write(&home, "max-data-bandwidth = \"fast\"");
    let logs = |net: &Net, text: &str| {
        wait_for(text, || net.donor.0.log().contains(text).then_some(()));
    };
    logs(&net, "the configuration file is wrong, the caps stay as they are");
    write(&home, "max-data-bandwidth = \"0\"\nsnapshots-max = 3");
    logs(&net, "caps changed");
    logs(&net, "options=\"snapshots-max\"");
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    tree::assert_identical(&net.path("data"), &net.path("copy"));
}
