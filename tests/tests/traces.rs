//! Spans of both daemons at a collector, and logs whose level is changed.
//!
//! The trace of each clone is the one that its caller named: what else arrives is of other calls.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use marcot_proto::recipient::v1::{Clone, CloneStatementRequest, State};
use marcot_tests::{
    Collector, Pair, client::wait_for_end, collector::Span, process::Daemon, target_directory,
    wait_for,
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// Less than an exporter that waits for its collector (60 s there) would make of a clone that waits with it.
const UNHINDERED_MAX: Duration = Duration::from_secs(40);

/// The thread that spans leave by, as the kernel cuts its name.
const EXPORT_THREAD: &str = "OpenTelemetry.T";

/// Some units of a large file, and small ones.
fn fill(data: &Path) {
    fs::write(data.join("large"), vec![7_u8; 40 << 20]).unwrap();
    fs::create_dir(data.join("app")).unwrap();
    for i in 0..3 {
        fs::write(data.join(format!("app/{i}")), "row").unwrap();
    }
}

async fn start_pair(environment: &[(&'static str, String)], donor: &[&str]) -> Pair {
    let environment: Vec<_> = environment.iter().map(|(n, v)| (*n, v.as_str())).collect();
    Pair::start_in(&environment, donor, &["--max-concurrency", "2"], fill).await
}

/// Clones as part of the caller's trace, to the end.
async fn clone_traced(pair: &Pair) -> Clone {
    let mut client = pair.client.clone();
    let statement = pair.donor.statement(&pair.home().join("copy"), "");
    let mut request =
        tonic::Request::new(CloneStatementRequest { statement, ..Default::default() });
    let parent = format!("00-{TRACE}-{CALLER}-01");
    request.metadata_mut().insert("traceparent", parent.parse().unwrap());
    let started = client.clone_statement(request).await.unwrap().into_inner().clone.unwrap();
    wait_for_end(&mut client, &started.name).await
}

/// The spans of the caller's trace, once both daemons have ended.
fn spans_at_the_end(pair: &mut Pair, collector: &Collector) -> Vec<Span> {
    assert_eq!(pair.recipient.0.terminate(), Some(0));
    assert_eq!(pair.donor.0.terminate(), Some(0));
    let spans = collector.spans();
    // All that the donor did, it did for the one clone.
    for span in spans.iter().filter(|span| span.service == "marcot-donor") {
        assert_eq!(span.trace, TRACE, "{span:?}");
    }
    spans.into_iter().filter(|span| span.trace == TRACE).collect()
}

fn named<'s>(spans: &'s [Span], name: &str) -> &'s Span {
    let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    let [span] = found[..] else { panic!("{name}: {found:?} of {spans:#?}") };
    span
}

fn has_export_thread(daemon: &Daemon) -> bool {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let name = |path: &Path| fs::read_to_string(path.join("comm")).unwrap_or_default();
    tasks.flatten().any(|task| name(&task.path()).trim() == EXPORT_THREAD)
}

/// Guards the whole chain: caller, call, clone, stage, batch, the donor's call. Without the traceparent
/// on ReadRanges (`inject_current` in `fetch/remote`) no batch has a call beneath it.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_is_one_trace_with_a_span_for_each_stage_and_batch() {
    let collector = Collector::start();
    let mut pair = start_pair(&collector.environment(), &[]).await;
    let clone = clone_traced(&pair).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert_eq!(clone.trace_id, TRACE);
    let spans = spans_at_the_end(&mut pair, &collector);
    let by_id: BTreeMap<&str, &Span> = spans.iter().map(|span| (span.id.as_str(), span)).collect();
    let parent = |span: &Span| by_id.get(span.parent.as_str()).copied();

    let call = named(&spans, "marcot.recipient.v1.RecipientService/CloneStatement");
    assert_eq!(call.parent, CALLER);
    let whole = named(&spans, "clone");
    assert_eq!((&whole.parent, whole.attribute("marcot.clone")), (&call.id, &*clone.name));
    assert_eq!(whole.attribute("marcot.state"), "STATE_COMPLETED");
    let snapshot = whole.attribute("marcot.snapshot");
    assert!(snapshot.starts_with("snapshots/"), "{whole:?}");
    for (name, bytes) in [("FILE COPY", (40 << 20) + 9), ("FILE SYNC", 0)] {
        let stage = named(&spans, name);
        assert_eq!(stage.parent, whole.id, "{stage:?}");
        assert_eq!(stage.attribute("marcot.bytes"), bytes.to_string(), "{stage:?}");
        assert!(whole.begin <= stage.begin && stage.end <= whole.end, "{stage:?} {whole:?}");
    }
    let copy = named(&spans, "FILE COPY");
    let batches: Vec<_> = spans.iter().filter(|span| span.name == "batch").collect();
    assert!(batches.len() >= 3, "{batches:#?}");
    let mut bytes = 0;
    for batch in &batches {
        assert_eq!((&batch.parent, batch.is_client), (&copy.id, true), "{batch:?}");
        assert_eq!(batch.attribute("marcot.snapshot"), snapshot);
        assert_eq!(batch.attribute("marcot.clone"), clone.name);
        assert!(batch.attribute("marcot.position").starts_with("FILE COPY"), "{batch:?}");
        bytes += batch.attribute("marcot.bytes").parse::<u64>().unwrap();
    }
    assert_eq!(bytes, clone.verified_bytes);

    let at_donor: Vec<_> = spans.iter().filter(|span| span.service == "marcot-donor").collect();
    let mut read = 0;
    for span in &at_donor {
        let above = parent(span).unwrap_or_else(|| panic!("no parent is there: {span:?}"));
        let method = span.name.strip_prefix("marcot.donor.v1.DonorService/").unwrap_or_default();
        let expected = match method {
            "ReadRanges" => "batch",
            "ListFiles" => "list",
            "AdvanceStage" => "advance",
            "RenewLease" => "renewal",
            "CloseSnapshot" => "clone",
            // The first look at a connection that is to carry batches, and its log-in by the clone's key.
            _ if above.name == "batch"
                && ["/Check", "/LogIn"].iter().any(|end| span.name.ends_with(end)) =>
            {
                "batch"
            }
            _ => "prepare",
        };
        assert_eq!(
            (above.name.as_str(), &*above.service),
            (expected, "marcot-recipient"),
            "{span:?}"
        );
        if method == "ReadRanges" {
            assert_eq!(span.attribute("marcot.snapshot"), snapshot);
            assert_eq!(span.attribute("marcot.clone"), clone.name);
            read += span.attribute("marcot.bytes").parse::<u64>().unwrap();
        }
    }
    assert_eq!(read, clone.verified_bytes);
    let methods: BTreeSet<_> = at_donor.iter().filter_map(|s| s.name.split('/').nth(1)).collect();
    for method in
        ["LogIn", "GetServerInfo", "OpenSnapshot", "ListFiles", "ReadRanges", "AdvanceStage"]
    {
        assert!(methods.contains(method), "{method} is not in {methods:?}");
    }
    // No call, and nothing of a clone, without a beginning.
    for span in spans.iter().filter(|span| span.id != call.id) {
        assert!(parent(span).is_some(), "{span:?}");
    }
    // Guards the donor's password, which is in the statement.
    assert!(!format!("{:?}", collector.spans()).contains("secret"));
}

/// As a person's own tooling has it: the trace comes to `marcot` by its environment.
#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_passes_a_trace_on() {
    let collector = Collector::start();
    let pair = start_pair(&collector.environment(), &[]).await;
    let output = Command::new(target_directory().join("marcot"))
        .args(["--recipient", &pair.recipient.0.address.to_string(), "sql"])
        .arg(pair.donor.statement(&pair.home().join("copy"), ""))
        .env("TRACEPARENT", format!("00-{TRACE}-{CALLER}-01"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let clone = collector.wait_for_span("the clone's span", |span| span.name == "clone");
    assert_eq!(clone.trace, TRACE);
    let watched = |span: &Span| span.name.ends_with("/WatchClone") && span.parent == CALLER;
    collector.wait_for_span("the watch's span", watched);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_fails_says_so_in_its_span() {
    let collector = Collector::start();
    let mut pair = start_pair(&collector.environment(), &[]).await;
    pair.donor.0.kill();
    let clone = clone_traced(&pair).await;
    assert_eq!(clone.state(), State::Failed);
    let error = clone.error.unwrap();
    assert_eq!(error.reason, "DONOR_UNREACHABLE");
    let spans = spans_of_the_recipient(&mut pair, &collector);
    for name in ["prepare", "clone"] {
        let span = named(&spans, name);
        assert_eq!(span.attribute("error.type"), "DONOR_UNREACHABLE");
        assert_eq!(span.error.as_deref(), Some(&*error.message), "{span:?}");
    }
    assert_eq!(named(&spans, "clone").attribute("marcot.state"), "STATE_FAILED");
}

fn spans_of_the_recipient(pair: &mut Pair, collector: &Collector) -> Vec<Span> {
    assert_eq!(pair.recipient.0.terminate(), Some(0));
    collector.spans().into_iter().filter(|span| span.trace == TRACE).collect()
}

/// Guards clones and ends against a collector that takes calls and answers none: a clone that waited for
/// one export, or an end that did, would take 60 s. With OTEL_BSP_MAX_QUEUE_SIZE=1 the queue is full.
#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_hangs_holds_up_no_clone_and_no_end() {
    let collector = Collector::hanging();
    let mut environment = collector.environment();
    environment.push(("OTEL_BSP_MAX_QUEUE_SIZE", "1".to_owned()));
    environment.push(("OTEL_EXPORTER_OTLP_TIMEOUT", "60000".to_owned()));
    let mut pair = start_pair(&environment, &[]).await;
    let begun = Instant::now();
    let clone = clone_traced(&pair).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert!(begun.elapsed() < UNHINDERED_MAX, "{:?}", begun.elapsed());
    wait_for("it to be asked", || (collector.calls() > 0).then_some(()));
    let begun = Instant::now();
    assert_eq!(pair.recipient.0.terminate(), Some(0));
    assert!(begun.elapsed() < UNHINDERED_MAX, "{:?}", begun.elapsed());
    assert!(pair.recipient.0.log().contains("the last spans are lost"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_gone_is_told_once() {
    let gone = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9".to_owned());
    let environment = [gone, ("OTEL_BSP_SCHEDULE_DELAY", "20".to_owned())];
    let mut pair = start_pair(&environment, &[]).await;
    for _ in 0..2 {
        let clone = clone_traced(&pair).await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}");
        let told = || pair.recipient.0.log().matches("spans are not exported").count();
        wait_for("the log to tell", || (told() == 1).then_some(()));
        fs::remove_dir_all(pair.home().join("copy")).unwrap();
    }
    // What was left was tried as well.
    assert_eq!(pair.recipient.0.terminate(), Some(0));
    assert_eq!(pair.recipient.0.log().matches("spans are not exported").count(), 1);
}

/// Guards what being off costs: no connection, no thread. The same look finds both where it is on.
#[tokio::test(flavor = "multi_thread")]
async fn without_export_there_is_no_connection_and_no_thread() {
    for (off, expected) in [(true, 0), (false, 2)] {
        let collector = Collector::start();
        let mut environment = collector.environment();
        if off {
            environment.push(("OTEL_TRACES_EXPORTER", "none".to_owned()));
        }
        let mut pair = start_pair(&environment, &[]).await;
        let clone = clone_traced(&pair).await;
        assert_eq!(clone.state(), State::Completed, "{clone:?}");
        for daemon in [&pair.donor.0, &pair.recipient.0] {
            assert_eq!(has_export_thread(daemon), !off);
        }
        assert_eq!(pair.recipient.0.terminate(), Some(0));
        assert_eq!(pair.donor.0.terminate(), Some(0));
        assert_eq!(collector.connections(), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn variables_that_are_wrong_are_told_and_a_sampler_is_heeded() {
    let collector = Collector::start();
    let mut environment = collector.environment();
    environment.push(("OTEL_TRACES_SAMPLER", "always_off".to_owned()));
    environment.push(("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "none".to_owned()));
    let mut pair = start_pair(&environment, &[]).await;
    let clone = clone_traced(&pair).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    for daemon in [&mut pair.donor.0, &mut pair.recipient.0] {
        assert!(daemon.log().contains("OTEL_BSP_MAX_EXPORT_BATCH_SIZE is `none`"));
        assert_eq!(daemon.terminate(), Some(0));
    }
    assert_eq!(collector.spans().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_level_of_the_log_is_changed_without_a_restart() {
    let home = marcot_tests::new_directory();
    let file = home.path().join("filter");
    fs::write(&file, "error # quiet\n").unwrap();
    let option = ["--log-filter-file", file.to_str().unwrap(), "--log-format", "json"];
    let pair = Pair::start(&[], &option).await;
    clone_traced(&pair).await;
    let log = || pair.recipient.0.log();
    assert!(!log().contains("clone completed"), "{}", log());
    fs::write(&file, "error, marcot_common=info, marcot_recipient=info\n").unwrap();
    wait_for("the log to tell", || log().contains("the log filter has changed").then_some(()));
    fs::remove_dir_all(pair.home().join("copy")).unwrap();
    clone_traced(&pair).await;
    let text = log();
    let line = text.lines().find(|line| line.contains("clone completed")).unwrap();
    assert!(line.contains(&format!("\"trace_id\":\"{TRACE}\"")), "{line}");
    assert!(line.contains("\"span_id\":\""), "{line}");
}
