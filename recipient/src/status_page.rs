//! The recipient's status page: the clone that runs, those that have ended, and each of them whole.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use askama::Template;
use marcot_common::{
    admin::{Rates, Shown, StatusPage},
    shown::{self, bytes},
    time::{duration_from_wire, timestamp},
};
use marcot_proto::{
    common::v1::Failure,
    recipient::v1::{Clone, StageProgress},
};

use crate::{certificate::hexadecimal, job::registry::Clones, told};

/// Past clones on the first page; `marcot list` shows more.
const CLONES_SHOWN: usize = 50;

/// Shows the clones of a recipient.
#[derive(Debug)]
pub struct RecipientPage {
    clones: Arc<Clones>,
    rates: Rates<2>,
}

#[derive(Template)]
#[template(path = "clones.html")]
struct ClonesTemplate {
    running: Option<String>,
    chart: String,
    rows: Vec<Row>,
    kept: usize,
    space_is_low: bool,
}

/// A past clone in the list.
struct Row {
    id: String,
    state: String,
    class: String,
    source: String,
    destination: String,
    begin: String,
    took: String,
    verified: String,
    error: String,
}

#[derive(Template)]
#[template(path = "clone.html")]
struct CloneTemplate {
    id: String,
    state: String,
    class: String,
    statement: String,
    stall_reason: String,
    error: Option<ErrorBox>,
    facts: Vec<(&'static str, String)>,
    stages: Vec<StageRow>,
    coordinates: Vec<String>,
    findings: Vec<String>,
}

/// Why a clone has ended, or what it waits for.
struct ErrorBox {
    message: String,
    reason: String,
    number: u32,
    violations: Vec<(String, String)>,
}

/// A stage as a row.
struct StageRow {
    name: String,
    state: String,
    class: String,
    /// Of a thousand; `None` where there is nothing to estimate by.
    done: Option<u64>,
    data: String,
    estimate: String,
    network: String,
    rate: String,
    streams: u32,
    round: u32,
    took: String,
}

impl RecipientPage {
    /// A page that shows `clones`.
    #[must_use]
    pub fn new(clones: Arc<Clones>) -> Self {
        Self { clones, rates: Rates::new(["data", "network"]) }
    }

    fn first(&self) -> Shown {
        let running = self.clones.running();
        let title = match &running {
            Some(clone) => format!("{}: {}", told::state(clone.state), short(&clone.name)),
            None => "no clone runs".to_owned(),
        };
        let is_running = running.as_ref().map(|clone| clone.name.clone());
        let past = self.clones.list(None, CLONES_SHOWN);
        let past = past.iter().filter(|clone| is_running.as_ref() != Some(&clone.name));
        let page = ClonesTemplate {
            running: running.as_ref().map(clone_html),
            chart: self.rates.chart(),
            rows: past.map(row).collect(),
            kept: self.clones.kept(),
            space_is_low: self.clones.space_is_low(),
        };
        Shown { title, body: html(&page) }
    }
}

impl StatusPage for RecipientPage {
    fn show(&self, path: &str) -> Option<Shown> {
        if path.is_empty() {
            return Some(self.first());
        }
        let clone = self.clones.get(path).ok()?;
        let title = format!("{}: {}", told::state(clone.state), short(&clone.name));
        Some(Shown { title, body: clone_html(&clone) })
    }

    fn sample(&self) {
        let totals = self.clones.byte_totals();
        self.rates.sample([totals.data, totals.network]);
    }
}

fn html(template: &impl Template) -> String {
    // Templates write to a string, which does not fail.
    template.render().unwrap_or_default()
}

fn short(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// How long a clone or a stage took, or has been at it.
fn took(
    begin: Option<prost_types::Timestamp>,
    end: Option<prost_types::Timestamp>,
) -> Option<Duration> {
    let end = end.unwrap_or_else(|| timestamp(SystemTime::now()));
    begin.map(|begin| shown::between(begin, end))
}

fn took_text(begin: Option<prost_types::Timestamp>, end: Option<prost_types::Timestamp>) -> String {
    match took(begin, end) {
        Some(took) if took.as_secs() < 60 => format!("{:.1} s", took.as_secs_f64()),
        Some(took) => shown::seconds(took.as_secs()),
        None => String::new(),
    }
}

fn row(clone: &Clone) -> Row {
    Row {
        id: short(&clone.name).to_owned(),
        state: told::state(clone.state),
        class: told::state_key(clone.state),
        source: shown::clean(&clone.source),
        destination: shown::text(&clone.destination),
        begin: clone.begin_time.map(shown::time).unwrap_or_default(),
        took: took_text(clone.begin_time, clone.end_time),
        verified: bytes(clone.verified_bytes),
        error: clone.error.as_ref().map(|error| shown::clean(&error.reason)).unwrap_or_default(),
    }
}

fn clone_html(clone: &Clone) -> String {
    html(&CloneTemplate {
        id: short(&clone.name).to_owned(),
        state: told::state(clone.state),
        class: told::state_key(clone.state),
        statement: shown::clean(&clone.statement),
        stall_reason: shown::clean(&clone.stall_reason),
        error: clone.error.as_ref().map(error_box),
        facts: facts(clone),
        stages: clone.stages.iter().map(stage_row).collect(),
        coordinates: told::coordinates(clone).iter().map(|line| shown::clean(line)).collect(),
        findings: told::notable_findings(&clone.findings),
    })
}

fn error_box(error: &Failure) -> ErrorBox {
    let failure = marcot_common::failure::Failure::from_wire(error);
    let violations = failure.violations.iter();
    let violations = violations.map(|v| (shown::clean(&v.check), shown::clean(&v.description)));
    ErrorBox {
        message: shown::clean(&error.message),
        reason: shown::clean(&error.reason),
        number: error.error_number,
        violations: violations.collect(),
    }
}

/// What there is to say of a clone, in the order in which a person asks.
fn facts(clone: &Clone) -> Vec<(&'static str, String)> {
    let some = |text: String| Some(text).filter(|text| !text.is_empty());
    let time = |at: Option<prost_types::Timestamp>| at.map(shown::time);
    let files = format!("{} of {} copied", clone.files_copied, clone.files_expected);
    let facts: [(&'static str, Option<String>); 16] = [
        ("from", some(shown::clean(&clone.source))),
        ("to", some(shown::text(&clone.destination))),
        ("asked for by", some(shown::clean(&clone.user))),
        ("begun", time(clone.begin_time)),
        ("ended", time(clone.end_time)),
        ("time", some(took_text(clone.begin_time, clone.end_time))),
        ("time left", clone.eta.map(|eta| shown::seconds(eta.seconds.unsigned_abs()))),
        ("files", some(files)),
        ("verified", some(bytes(clone.verified_bytes))),
        ("effort", told::effort(clone).map(|line| shown::clean(&line))),
        ("limits", limits(clone)),
        ("held back", some(shown::clean(&clone.held_back_reason))),
        ("connection", connection(clone)),
        ("install", clone.install.as_ref().map(|i| shown::clean(&told::install(i)))),
        ("certificate", some(hexadecimal(&clone.certificate_digest))),
        ("trace", some(shown::clean(&clone.trace_id))),
    ];
    facts.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

fn limits(clone: &Clone) -> Option<String> {
    let limits = clone.limits.as_ref()?;
    let throttled = clone.throttled_duration.and_then(|d| duration_from_wire(d).ok());
    let mut parts = Vec::new();
    parts.extend(limits.concurrency_max.map(|streams| match limits.autotune_concurrency() {
        true => format!("up to {streams} streams, as many as are worth it"),
        false => format!("{streams} streams"),
    }));
    for (what, rate) in [
        ("data", limits.data_bytes_per_second_max),
        ("network", limits.network_bytes_per_second_max),
    ] {
        parts.extend(rate.map(|rate| format!("{what} {}", shown::bandwidth(rate))));
    }
    let waited = throttled.filter(|waited| !waited.is_zero());
    parts.extend(waited.map(|waited| format!("waited for {:.1} s", waited.as_secs_f64())));
    Some(parts.join(", ")).filter(|text| !text.is_empty())
}

fn connection(clone: &Clone) -> Option<String> {
    let version = match clone.donor_version.as_str() {
        "" => String::new(),
        version => format!(", donor {}", shown::clean(version)),
    };
    match clone.encrypted? {
        true => Some(format!("encrypted ({}){version}", shown::clean(&clone.cipher))),
        false => Some(format!("not encrypted{version}")),
    }
}

fn stage_row(row: &StageProgress) -> StageRow {
    let most = row.estimate_bytes.max(row.data_bytes);
    let growing = if row.estimate_growing { " and more" } else { "" };
    StageRow {
        name: shown::stage(row.stage),
        state: told::state(row.state),
        class: told::state_key(row.state),
        done: row.data_bytes.saturating_mul(1000).checked_div(most),
        data: bytes(row.data_bytes),
        estimate: format!("{}{growing}", bytes(row.estimate_bytes)),
        network: bytes(row.network_bytes),
        rate: match row.data_speed {
            0 => String::new(),
            rate => format!("{}/s", bytes(rate)),
        },
        streams: row.threads,
        round: row.round,
        took: took_text(row.begin_time, row.end_time),
    }
}

#[cfg(test)]
mod tests;
