//! The donor's status page: snapshots, their leases, and what they take of this host.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use askama::Template;
use marcot_common::{
    admin::{Rates, Shown, StatusPage},
    shown::{self, bytes},
};

use crate::{
    api::Api,
    caps::Caps,
    kindness::Kindness,
    lease::{Held, Leases, READERS_MAX},
};

/// Shows the snapshots of a donor.
#[derive(Debug)]
pub struct DonorPage {
    leases: Arc<Leases>,
    sent_bytes: Arc<AtomicU64>,
    caps: Arc<Caps>,
    kindness: Arc<Kindness>,
    rates: Rates<1>,
}

#[derive(Template)]
#[template(path = "snapshots.html")]
struct SnapshotsTemplate {
    facts: Vec<(&'static str, String)>,
    chart: String,
    rows: Vec<Row>,
}

/// A snapshot in the list.
struct Row {
    name: String,
    clone: String,
    user: String,
    peer: String,
    opened: String,
    age: String,
    lease: String,
    read: String,
    stage: String,
    round: u32,
    streams: usize,
    sent: String,
}

impl DonorPage {
    /// A page that shows the snapshots of `leases`, which `api` serves.
    #[must_use]
    pub fn new(leases: Arc<Leases>, api: &Api) -> Self {
        let (sent_bytes, caps, kindness) = (api.sent_bytes(), api.caps(), api.kindness());
        Self { leases, sent_bytes, caps, kindness, rates: Rates::new(["sent"]) }
    }

    fn facts(&self, count: usize) -> Vec<(&'static str, String)> {
        let engine = self.leases.engine();
        let (data, network) = self.caps.bytes_per_second();
        let throttled = self.caps.throttled().as_secs_f64();
        let most = self.leases.snapshots_max();
        vec![
            ("data directory", shown::clean(&engine.data_directory().display().to_string())),
            ("engine", engine.name().to_owned()),
            ("snapshots", format!("{count} of {most}")),
            ("wait for a place", self.leases.queued().to_string()),
            ("leases run out", self.leases.expired_total().to_string()),
            ("sent", bytes(self.sent_bytes.load(Ordering::Relaxed))),
            ("cap of data", shown::bandwidth(data)),
            ("cap of network", shown::bandwidth(network)),
            ("calls have waited for caps", format!("{throttled:.1} s, all together")),
            ("commits of the server", self.commits()),
        ]
    }
}

impl DonorPage {
    /// What the probe of `--give-way` finds.
    fn commits(&self) -> String {
        let told = self.kindness.told();
        match (told.reason(), told.latency) {
            (Some(reason), _) => reason,
            (None, Some(latency)) => format!("take {:.1} ms", latency.as_secs_f64() * 1000.0),
            (None, None) => "are not measured now".to_owned(),
        }
    }
}

impl StatusPage for DonorPage {
    fn show(&self, path: &str) -> Option<Shown> {
        if !path.is_empty() {
            return None;
        }
        let held = self.leases.all();
        let title = match held.len() {
            0 => "no snapshot".to_owned(),
            1 => "1 snapshot".to_owned(),
            count => format!("{count} snapshots"),
        };
        let page = SnapshotsTemplate {
            facts: self.facts(held.len()),
            chart: self.rates.chart(),
            rows: held.iter().map(|held| row(held)).collect(),
        };
        // Templates write to a string, which does not fail.
        Some(Shown { title, body: page.render().unwrap_or_default() })
    }

    fn sample(&self) {
        self.rates.sample([self.sent_bytes.load(Ordering::Relaxed)]);
    }
}

/// How long it is held without more being read, and whether DDL waits for it.
fn read_left(held: &Held, now: SystemTime) -> String {
    let left = held.read_deadline().duration_since(now).unwrap_or_default();
    let ddl = if held.snapshot.blocks_ddl() { ", blocks DDL" } else { "" };
    format!("{}{ddl}", shown::seconds(left.as_secs()))
}

fn row(held: &Held) -> Row {
    let now = SystemTime::now();
    let left = held.expire_time().duration_since(now).unwrap_or_default();
    let age = now.duration_since(held.create_time).unwrap_or_default();
    let position = held.snapshot.position();
    let caller = &held.request.caller;
    Row {
        name: held.name.rsplit('/').next().unwrap_or_default().to_owned(),
        clone: shown::clean(&held.request.clone),
        user: caller.user.as_deref().map(shown::clean).unwrap_or_default(),
        peer: caller.peer.map(|peer| peer.to_string()).unwrap_or_default(),
        opened: shown::moment(held.create_time),
        age: shown::seconds(age.as_secs()),
        lease: shown::seconds(left.as_secs()),
        read: read_left(held, now),
        stage: shown::stage(position.stage.to_wire().into()),
        round: position.round,
        streams: READERS_MAX - held.readers.available_permits(),
        sent: bytes(held.sent_bytes.load(Ordering::Relaxed)),
    }
}
