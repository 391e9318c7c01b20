//! /metrics of both daemons, held against docs/metrics.md, promtool and the clone's resource.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use marcot_proto::recipient::v1::{
    CancelCloneRequest, Clone, CloneLimits, CloneOptions, CloneStatementRequest, GetCloneRequest,
    State, UpdateCloneLimitsRequest, recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Certificates, Donor, Pair, Proxy, Recipient, client::wait_for_end, clone_and_wait,
    new_directory, process, recipient, scrape::Scrape, tree, wait_for,
};
use tonic::transport::Channel;

const ADMIN: [&str; 2] = ["--admin-listen", "127.0.0.1:0"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A row of the page.
#[derive(Debug)]
struct Row {
    kind: String,
    unit: String,
    labels: BTreeSet<String>,
    donor: bool,
    recipient: bool,
}

fn page() -> BTreeMap<String, Row> {
    let text = std::fs::read_to_string(root().join("docs/metrics.md")).unwrap();
    let mut rows = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, unit, labels, on, meaning] = cells[..] else { panic!("{line}") };
        assert!(!meaning.is_empty(), "{line}");
        let labels = labels.split(", ").filter(|label| !label.is_empty());
        let row = Row {
            kind: kind.to_owned(),
            unit: unit.to_owned(),
            labels: labels.map(|label| label.trim_matches('`').to_owned()).collect(),
            donor: matches!(on, "donor" | "both"),
            recipient: matches!(on, "recipient" | "both"),
        };
        assert!(row.donor || row.recipient, "{line}");
        let name = name.trim_matches('`').to_owned();
        assert!(rows.insert(name.clone(), row).is_none(), "{name} twice");
    }
    rows
}

/// A donor and a recipient with TLS, and all that a clone makes them tell.
async fn told_pair() -> (Pair, Scrape, Scrape) {
    let tls = new_directory();
    let certificates = Certificates::create(tls.path());
    let (chain, key) = certificates.sign("donor", &["127.0.0.1"]);
    let (own_chain, own_key) = certificates.sign("recipient", &["127.0.0.1"]);
    let (ca, list) = (certificates.ca(), certificates.revocation_list(2048));
    let clients = ["--tls-client-ca", &ca, "--tls-client-crl", &list];
    let donor = [&ADMIN[..], &["--tls-cert", &chain, "--tls-key", &key], &clients].concat();
    let towards =
        ["--ssl-ca", &ca, "--ssl-crl", &list, "--ssl-cert", &own_chain, "--ssl-key", &own_key];
    let own = ["--tls-cert", &own_chain, "--tls-key", &own_key];
    let pair = Pair::start(&donor, &[&towards[..], &own[..]].concat()).await;
    let mut client = pair.client.clone();
    let statement = pair.donor.statement(&pair.home().join("copy"), "REQUIRE SSL");
    let clone = clone_and_wait(&mut client, &statement).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let refused = CloneStatementRequest { statement, ..Default::default() };
    client.clone_statement(refused).await.unwrap_err();
    let told = (Scrape::of(&pair.donor.0), Scrape::of(&pair.recipient.0));
    (pair, told.0, told.1)
}

/// Guards the page in both directions: a family without a row, a row without a family, another type
/// or another label fail.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_lists_what_the_daemons_tell_and_nothing_else() {
    let (_pair, donor, at) = told_pair().await;
    let page = page();
    assert!(page.len() > 50, "{} rows", page.len());
    for (name, row) in &page {
        let unit_by_name = ["bytes_per_second", "bytes", "seconds"]
            .into_iter()
            .find(|unit| name.trim_end_matches("_total").ends_with(&format!("_{unit}")));
        assert_eq!(unit_by_name.unwrap_or("count"), row.unit, "{name}");
        for (who, scrape, is_told) in
            [("donor", &donor, row.donor), ("recipient", &at, row.recipient)]
        {
            let kind = scrape.types.get(name);
            assert_eq!(kind.is_some(), is_told, "{name} on the {who}");
            if let Some(kind) = kind {
                assert_eq!(*kind, row.kind, "{name}");
                let labels = scrape.labels(name);
                // A counter of what has not happened has no sample yet.
                assert!(labels == row.labels || labels.is_empty(), "{name}: {labels:?}");
            }
        }
    }
    for (who, scrape) in [("donor", &donor), ("recipient", &at)] {
        for (name, kind) in &scrape.types {
            assert!(page.contains_key(name), "{name} of the {who} is not in docs/metrics.md");
            let ours = name.starts_with("marcot_");
            assert!(ours || name.starts_with("process_") || name.starts_with("rpc_"), "{name}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
        }
    }
}

/// Guards an operator's warning: a list that has run out refuses everybody, and without its time on
/// /metrics nobody sees that coming.
#[tokio::test(flavor = "multi_thread")]
async fn the_ends_of_certificates_and_revocation_lists_are_told() {
    const YEAR_2048: f64 = 2_461_449_600.0;
    const YEAR_2049: f64 = 2_493_072_000.0;
    let (_pair, donor, at) = told_pair().await;
    for (scrape, certificate, list) in
        [(&donor, "tls-cert", "tls-client-crl"), (&at, "ssl-cert", "ssl-crl")]
    {
        let end = |name: &str, file| scrape.value(name, &[("file", file)]);
        let ends = end("marcot_tls_certificate_expiry_timestamp_seconds", certificate);
        let runs_out = end("marcot_tls_crl_next_update_timestamp_seconds", list);
        assert!(
            ends == YEAR_2049 && runs_out == YEAR_2048,
            "{certificate} {ends}, {list} {runs_out}"
        );
    }
}

/// Guards the form of /metrics by a judge that is not ours.
#[tokio::test(flavor = "multi_thread")]
async fn promtool_finds_nothing_wrong() {
    let (_pair, donor, at) = told_pair().await;
    let promtool = root().join(".tools/servers/prometheus/usr/bin/promtool");
    assert!(promtool.exists(), "{} is missing: tests/tools/setup.sh test", promtool.display());
    for scrape in [donor, at] {
        let mut child = Command::new(&promtool)
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(scrape.text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].map(|b| String::from_utf8(b).unwrap()).concat();
        assert!(output.status.success() && said.is_empty(), "{said}\n{}", scrape.text);
    }
}

fn limits(data: u64) -> CloneLimits {
    CloneLimits { data_bytes_per_second_max: Some(data), ..Default::default() }
}

async fn begin(client: &mut RecipientServiceClient<Channel>, statement: &str, data: u64) -> String {
    let options = Some(CloneOptions { limits: Some(limits(data)), ..Default::default() });
    let request =
        CloneStatementRequest { statement: statement.to_owned(), options, ..Default::default() };
    client.clone_statement(request).await.unwrap().into_inner().clone.unwrap().name
}

async fn resource(client: &mut RecipientServiceClient<Channel>, name: &str) -> Clone {
    let request = GetCloneRequest { name: name.to_owned() };
    client.get_clone(request).await.unwrap().into_inner().clone.unwrap()
}

fn seconds(duration: prost_types::Duration) -> f64 {
    Duration::try_from(duration).unwrap().as_secs_f64()
}

/// Guards that metrics and resource come from the same counters: what they say of a clone that has
/// ended is equal to the byte, also with the counts of the process where it was the only clone.
fn assert_agrees(clone: &Clone, scrape: &Scrape, was_alone: bool) {
    let close = |name: &str, told: f64, is: f64| {
        assert!((told - is).abs() <= is * 0.01 + 0.001, "{name}: {told}, the resource says {is}");
    };
    let mut sums = (0, 0);
    for row in &clone.stages {
        let stage = [("stage", row.stage().as_str_name().trim_start_matches("STAGE_"))];
        for (name, is) in [
            ("marcot_clone_copied_bytes", row.data_bytes),
            ("marcot_clone_received_bytes", row.network_bytes),
            ("marcot_clone_expected_bytes", row.estimate_bytes),
        ] {
            assert_eq!(scrape.value(name, &stage) as u64, is, "{name} {stage:?}");
        }
        if was_alone {
            let staged = scrape.value("marcot_stage_raw_bytes_total", &stage);
            assert_eq!(staged as u64, row.data_bytes, "{stage:?}");
        }
        let took = row.begin_time.zip(row.end_time).map_or(0.0, |(begin, end)| {
            let at =
                |time: prost_types::Timestamp| time.seconds as f64 + f64::from(time.nanos) / 1e9;
            at(end) - at(begin)
        });
        close("stage seconds", scrape.value("marcot_clone_stage_seconds", &stage), took);
        if was_alone && row.state() == State::Completed {
            let sum = scrape.value("marcot_stage_duration_seconds_sum", &stage);
            close("stage duration", sum, took);
        }
        sums = (sums.0 + row.data_bytes, sums.1 + row.network_bytes);
    }
    assert_eq!(scrape.value("marcot_clone_verified_bytes", &[]) as u64, clone.verified_bytes);
    assert_eq!(scrape.value("marcot_clone_resent_bytes", &[]) as u64, clone.resent_bytes);
    let throttled = seconds(clone.throttled_duration.unwrap_or_default());
    close("throttled", scrape.value("marcot_clone_throttled_seconds", &[]), throttled);
    if was_alone {
        assert_eq!(scrape.value("marcot_raw_bytes_total", &[]) as u64, sums.0);
        assert_eq!(scrape.value("marcot_wire_received_bytes_total", &[]) as u64, sums.1);
        assert_eq!(scrape.value("marcot_verified_bytes_total", &[]) as u64, clone.verified_bytes);
        close("throttled", scrape.value("marcot_throttled_seconds_total", &[]), throttled);
    }
}

const BYTES: u64 = 24 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_resource_agree_while_a_clone_runs_and_after_it() {
    let fill = |data: &Path| tree::write(&data.join("file"), BYTES, 1);
    let pair = Pair::start_with(&ADMIN, &[], fill).await;
    let mut client = pair.client.clone();
    let statement = pair.donor.statement(&pair.home().join("copy"), "");
    let name = begin(&mut client, &statement, 4 << 20).await;
    let running = wait_for("a clone that runs", || {
        let scrape = Scrape::of(&pair.recipient.0);
        let copied = scrape.text.lines().any(|line| {
            let value = line.strip_prefix("marcot_clone_copied_bytes{stage=\"FILE_COPY\"} ");
            value.is_some_and(|value| value.parse::<f64>().unwrap() > 0.0)
        });
        copied.then_some(scrape)
    });
    assert_eq!(running.value("marcot_operations_in_progress", &[]), 1.0);
    assert_eq!(running.value("marcot_stage_in_progress", &[("stage", "FILE_COPY")]), 1.0);
    assert_eq!(running.value("marcot_stage_in_progress", &[]), 1.0);
    let limit = [("resource", "data")];
    assert_eq!(running.value("marcot_rate_limit_bytes_per_second", &limit), f64::from(4 << 20));
    let donor = Scrape::of(&pair.donor.0);
    assert_eq!(donor.value("marcot_donor_leases_active", &[]), 1.0);
    assert!(donor.value("marcot_donor_lease_remaining_seconds", &[]) > 0.0);
    assert!(donor.value("marcot_connections_active", &[("protection", "plaintext")]) >= 1.0);
    let end = wait_for_end(&mut client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    let after = Scrape::of(&pair.recipient.0);
    assert_agrees(&end, &after, true);
    assert_eq!(end.verified_bytes, BYTES);
    assert!(seconds(end.throttled_duration.unwrap()) > 0.2, "{end:?}");
    assert_eq!(after.value("marcot_operations_in_progress", &[]), 0.0);
    assert_eq!(after.value("marcot_clone_encrypted", &[]), 0.0);
    let moved = after.value("marcot_last_progress_timestamp_seconds", &[]);
    let begun = after.value("marcot_clone_start_timestamp_seconds", &[]);
    let success = after.value("marcot_last_success_timestamp_seconds", &[]);
    assert!(begun < moved && moved <= success + 0.5, "{begun} {moved} {success}");
    let donor = Scrape::of(&pair.donor.0);
    assert_eq!(donor.value("marcot_raw_bytes_total", &[]) as u64, BYTES);
    let closed = "marcot_donor_snapshots_finished_total";
    assert_eq!(donor.value(closed, &[("outcome", "completed")]), 1.0);
}

/// Guards the counts of a process against those of the clone that it goes on with: with what an
/// earlier process has copied counted again, rates of a restart would be of bytes that never moved.
#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_is_counted_by_reason_and_what_is_gone_on_with_once() {
    let home = new_directory();
    let data = home.path().join("data");
    std::fs::create_dir(&data).unwrap();
    for n in 0..3 {
        tree::write(&data.join(n.to_string()), BYTES, n);
    }
    let donor = Donor::start(home.path(), &data, &ADMIN);
    let proxy = Proxy::start(donor.0.address);
    let start = || Recipient::start(home.path(), &["--donor-timeout", "60s"]);
    let mut at = start();
    let mut client = recipient(&at).await;
    let statement = |target: &str| process::statement(proxy.port(), &home.path().join(target), "");
    let one = CloneOptions {
        limits: Some(CloneLimits { concurrency_max: Some(1), ..limits(8 << 20) }),
        ..Default::default()
    };
    let request = CloneStatementRequest {
        statement: statement("copy"),
        options: Some(one),
        ..Default::default()
    };
    let started = client.clone_statement(request).await.unwrap().into_inner();
    let name = started.clone.unwrap().name;
    // A unit is durable by then, and recorded.
    wait_for("most of two files", || (proxy.counts().down_bytes > 2 * BYTES).then_some(()));
    at.0.kill();
    let carried = proxy.counts().down_bytes;
    at = start();
    client = recipient(&at).await;
    // Not what it is told of the first run: a stream must be there to be cut.
    wait_for("it to go on", || (proxy.counts().down_bytes > carried + (1 << 20)).then_some(()));
    proxy.cut();
    proxy.flip_after(256 << 10);
    let end = wait_for_end(&mut client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    let scrape = Scrape::of(&at.0);
    assert_agrees(&end, &scrape, false);
    assert_eq!(scrape.value("marcot_resumes_total", &[("cause", "restart")]), 1.0);
    let staged = scrape.value("marcot_raw_bytes_total", &[]) as u64;
    // One file was durable by then, and what a flipped bit cost came again.
    assert!(staged < 5 * BYTES / 2, "{staged} bytes of {}: of what came before too", 3 * BYTES);
    assert!(scrape.value("marcot_retries_total", &[]) >= 1.0);
    let retried = scrape.text.contains("marcot_retries_total{reason=\"PEER_UNREACHABLE\"}");
    assert!(retried, "{}", scrape.text);
    assert_eq!(scrape.value("marcot_operations_started_total", &[]), 0.0, "by this process");
    assert_eq!(scrape.value("marcot_operations_finished_total", &[("outcome", "succeeded")]), 1.0);

    let name = begin(&mut client, &statement("second"), 1 << 20).await;
    let request = UpdateCloneLimitsRequest { name: name.clone(), limits: Some(limits(2 << 20)) };
    client.update_clone_limits(request).await.unwrap();
    wait_for("bytes of it", || {
        (Scrape::of(&at.0).value("marcot_clone_copied_bytes", &[]) > 0.0).then_some(())
    });
    client.cancel_clone(CancelCloneRequest { name: name.clone() }).await.unwrap();
    wait_for_end(&mut client, &name).await;
    assert_eq!(resource(&mut client, &name).await.state(), State::Cancelled);
    // A target that is there is refused at once; a donor that is not there fails the clone.
    let request = CloneStatementRequest { statement: statement("copy"), ..Default::default() };
    client.clone_statement(request).await.unwrap_err();
    proxy.take_down();
    let end = clone_and_wait(&mut client, &statement("third")).await;
    assert_eq!(end.state(), State::Failed, "{end:?}");
    let scrape = Scrape::of(&at.0);
    let finished = |labels| scrape.value("marcot_operations_finished_total", labels);
    assert_eq!(finished(&[("outcome", "cancelled"), ("reason", "STOPPED")]), 1.0);
    let reason = end.error.unwrap().reason;
    assert_eq!(finished(&[("outcome", "failed"), ("reason", &reason)]), 1.0);
    assert_eq!(scrape.value("marcot_calls_failed_total", &[("reason", "TARGET_EXISTS")]), 1.0);
    assert_eq!(scrape.value("marcot_operations_started_total", &[]), 2.0);
}
