//! How a clone gets at a snapshot on a donor: it connects and logs in, then opens one, or goes on with one
//! that is open, and renews its lease.
//!
//! Every connection of a clone goes to one address, in one mode, to one certificate: what the first
//! one found is pinned for the others. Mode and certificate stay so for all of the clone's snapshots;
//! the address follows the donor's name when that has left it. The first connection logs in by
//! password where the donor has accounts, the others by the clone's key, which only this process holds.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use marcot_common::{
    connect::{ClientTls, ConnectOptions, DonorConnection, connect},
    entry::Totals,
    failure::Failure,
    login,
    position::Position,
    telemetry::spans::SNAPSHOT,
    time::{self, duration_to_wire},
    wire,
};
use marcot_engine::{SnapshotOptions, innodb::DDL_TIMEOUT_DEFAULT};
use marcot_proto::donor::v1 as pb;
use prost::Message as _;
use tokio::{sync::Semaphore, task::AbortHandle};
use tonic::{Code, transport::Channel};
use tracing::{Instrument as _, Span, info_span, warn};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::{
    CALL_TIMEOUT, Client, Connector, Control, DonorSource, LOG_INS_MAX, auth_client, call,
    client_on,
};
use crate::{
    copy_journal::record::SnapshotOpened, job::CloneJob, progress::Progress, queueing::Queueing,
    request::DonorRequest, retry::Patience, settings::Settings, source::Opened,
};

/// Shortest lease of a snapshot: a recipient that misses two renewals keeps it.
const LEASE_MIN: Duration = Duration::from_secs(60);

/// Between two renewals of the lease.
const RENEW_INTERVAL: Duration = Duration::from_secs(20);

/// Longest name of a snapshot: it is recorded, and told in logs.
const SNAPSHOT_NAME_BYTES_MAX: usize = 128;

/// Most kinds of what is left out that a donor may name, and their longest name.
const LEFT_OUT_MAX: usize = 64;

/// A donor that has let this clone in, and said what it is.
#[derive(Debug)]
pub struct Greeted {
    client: Client,
    pinned: ConnectOptions,
    accounts: bool,
    server_info: pb::GetServerInfoResponse,
}

impl Greeted {
    /// Connects, logs in, and asks what the donor is.
    pub async fn connect(
        request: &DonorRequest,
        settings: &Settings,
        job: Option<&CloneJob>,
    ) -> Result<Self, Failure> {
        let options = ConnectOptions::new(&request.host, request.port, request.ssl_mode)
            .with_donors(settings.donors.current())
            .with_tls_versions(settings.donor_tls_versions)
            .with_tls(settings.donor_tls.with_fingerprint(request.fingerprint));
        // Another snapshot of the same clone: nothing that happened meanwhile makes it trust less.
        let options = match job.and_then(|job| job.pins.get()) {
            Some((encrypted, fingerprint)) => options.pinned_as(*encrypted, *fingerprint),
            None => options,
        };
        let connection = connect(&options).await?;
        let pinned = options.pinned(&connection);
        let DonorConnection { channel, security, .. } = connection;
        if let Some(job) = job {
            job.pins.get_or_init(|| (security.encrypted, security.fingerprint));
            job.status.update(|clone| {
                clone.encrypted = Some(security.encrypted);
                clone.cipher.clone_from(&security.cipher);
                let fingerprint = security.fingerprint.map(|f| Bytes::copy_from_slice(&f));
                clone.donor_fingerprint = fingerprint.unwrap_or_default();
            });
        }
        let accounts = log_in(&channel, request, &security, &options.tls, settings).await?;
        let mut client = client_on(channel);
        let server_info = call(
            "GetServerInfo",
            CALL_TIMEOUT,
            client.get_server_info(pb::GetServerInfoRequest {}),
        )
        .await?;
        if let Some(job) = job {
            job.status.update(|clone| clone.donor_version.clone_from(&server_info.version));
        }
        Ok(Self { client, pinned, accounts, server_info })
    }

    /// What the donor says of itself.
    #[must_use]
    pub fn server_info(&self) -> &pb::GetServerInfoResponse {
        &self.server_info
    }
}

/// How long a donor may take to open a snapshot: by our own settings alone, nothing that it says makes it
/// longer. It waits for locks for as long as its engine does where nobody has said another time.
fn opening_limit(
    open_timeout: Duration,
    queue_wait: Option<Duration>,
    ddl_timeout: Option<Duration>,
) -> Duration {
    open_timeout + queue_wait.unwrap_or_default() + ddl_timeout.unwrap_or(DDL_TIMEOUT_DEFAULT)
}

impl DonorSource {
    /// Opens a snapshot.
    pub async fn open(
        greeted: Greeted,
        request: &DonorRequest,
        snapshot: &SnapshotOptions,
        settings: &Settings,
        clone_id: &str,
        job: Option<&CloneJob>,
    ) -> Result<Self, Failure> {
        let Greeted { mut client, pinned, accounts, server_info } = greeted;
        let key = Arc::new(login::CloneKey::generate()?);
        let bound = server_info.capabilities.iter().any(|name| name == login::BOUND_SNAPSHOTS);
        let lease = lease(settings.donor_timeout, &server_info);
        // A check of what a clone would do waits for nobody.
        let queueing = Queueing::new(job.map_or(Duration::ZERO, |_| settings.queue_wait), job);
        let mut open = pb::OpenSnapshotRequest {
            public_key: Bytes::copy_from_slice(key.public_key()),
            lease_duration: Some(duration_to_wire(lease)),
            request_id: uuid::Uuid::new_v4().to_string(),
            clone: format!("clones/{clone_id}"),
            block_ddl: snapshot.block_ddl,
            ddl_timeout: snapshot.ddl_timeout.map(duration_to_wire),
            queue_wait: queueing.call().map(duration_to_wire),
            bound,
            binlog_base: snapshot.binlog_base.clone().unwrap_or_default(),
        };
        let progress = job.map(|job| Arc::clone(&job.progress)).unwrap_or_default();
        // A check of what a clone would do does not wait for a donor that has gone.
        let donor_timeout = job.map_or(Duration::ZERO, |_| settings.donor_timeout);
        let mut patience = Patience::new(&progress.retries, donor_timeout);
        let mut opening = Opening { client: client.clone(), request: open.clone(), is_open: false };
        let opened = loop {
            let limit = opening_limit(settings.open_timeout, queueing.call(), snapshot.ddl_timeout);
            let call = call("OpenSnapshot", limit, client.open_snapshot(open.clone()));
            let mut failure = match call.await {
                Ok(opened) => break opened,
                // It has waited for as long as the call could, and asks again.
                Err(failure) if queueing.waits_on(&failure) => {
                    queueing.pause().await;
                    open.queue_wait = queueing.call().map(duration_to_wire);
                    continue;
                }
                Err(failure) if failure.reason == "DONOR_TIMEOUT" => {
                    let action = "a donor of so many files that its list takes longer needs a \
                                  longer --open-timeout";
                    failure.with("action", action)
                }
                Err(failure) => failure,
            };
            // The same request opens the same snapshot, also when only the answer was lost.
            client = loop {
                tokio::time::sleep(patience.after(failure)?).await;
                match connect_anew(&pinned, request, settings).await {
                    Ok(client) => break client,
                    Err(again) => failure = again,
                }
            };
            opening.client = client.clone();
        };
        opening.is_open = true;
        drop((patience, queueing));
        check_snapshot_name(&opened.snapshot)?;
        if let Some(job) = job {
            job.status.spans.clone_span().set_attribute(SNAPSHOT, opened.snapshot.clone());
        }
        let connector = Connector {
            options: pinned,
            snapshot: opened.snapshot.clone(),
            key: (accounts || bound).then_some(key),
            accounts,
            log_ins: Arc::new(Semaphore::new(LOG_INS_MAX)),
        };
        let control = Arc::new(Control {
            connector: connector.clone(),
            client: tokio::sync::Mutex::new(Some(client)),
            progress,
            donor_timeout: settings.donor_timeout,
            stall_timeout: settings.stall_timeout,
        });
        let renewal = spawn_renewal(Arc::clone(&control), lease);
        Ok(Self {
            control,
            opened: Opened {
                position: wire::position(opened.stage, opened.round)?,
                estimate: wire::totals(opened.estimate),
                left_out: left_out(opened.left_out),
                storage_engines: storage_engines(opened.storage_engines),
            },
            snapshot: opened.snapshot,
            server_info,
            connector,
            compression: request.compression,
            lease,
            renewal,
        })
    }

    /// Goes on with a snapshot that an earlier run of this service has opened, by the clone's key:
    /// to the same address, in the same mode, to the same certificate. `UNKNOWN_SNAPSHOT` when it
    /// has ended meanwhile.
    pub async fn attach(
        request: &DonorRequest,
        record: &SnapshotOpened,
        settings: &Settings,
        progress: &Arc<Progress>,
    ) -> Result<Self, Failure> {
        let unreadable = |what: &str| {
            let text = format!("the snapshot's record has no right {what}");
            Failure::new(Code::DataLoss, "JOURNAL_CORRUPT", text)
        };
        let address = record.address.parse().map_err(|_| unreadable("address"))?;
        let array = |bytes: &[u8]| <[u8; 32]>::try_from(bytes);
        let fingerprint = match &record.fingerprint[..] {
            [] => None,
            bytes => Some(array(bytes).map_err(|_| unreadable("fingerprint"))?),
        };
        let key = match (&record.key_seed[..], &record.bound_key_seed[..]) {
            ([], []) => None,
            ([], bytes) | (bytes, _) => {
                let seed = array(bytes).map_err(|_| unreadable("key"))?;
                Some(Arc::new(login::CloneKey::from_seed(&seed)?))
            }
        };
        let server_info = pb::GetServerInfoResponse::decode(&record.server_info[..])
            .map_err(|_| unreadable("server"))?;
        // A list that has become shorter since then holds for it as well.
        let options = ConnectOptions::new(&request.host, request.port, request.ssl_mode)
            .with_donors(settings.donors.current())
            .with_tls_versions(settings.donor_tls_versions)
            .with_tls(settings.donor_tls.clone())
            .pinned_to(address, record.encrypted, fingerprint);
        Span::current().set_attribute(SNAPSHOT, record.snapshot.clone());
        let accounts = !record.key_seed.is_empty();
        let snapshot = record.snapshot.clone();
        let log_ins = Arc::new(Semaphore::new(LOG_INS_MAX));
        let connector = Connector { options, snapshot, key, accounts, log_ins };
        let control = Arc::new(Control {
            connector: connector.clone(),
            client: tokio::sync::Mutex::new(None),
            progress: Arc::clone(progress),
            donor_timeout: settings.donor_timeout,
            stall_timeout: settings.stall_timeout,
        });
        let lease = Duration::from_millis(record.lease_ms).max(LEASE_MIN);
        let mut patience = control.patience();
        loop {
            let renewed = async {
                let mut client = control.client().await?;
                let request = pb::RenewLeaseRequest {
                    snapshot: record.snapshot.clone(),
                    lease_duration: Some(duration_to_wire(lease)),
                    ..Default::default()
                };
                call("RenewLease", CALL_TIMEOUT, client.renew_lease(request)).await
            };
            match renewed.await {
                Ok(_) => break,
                Err(failure) => control.pause_after(failure, &mut patience).await?,
            }
        }
        drop(patience);
        Ok(Self {
            // All that it said is in the clone's resource since then.
            opened: Opened {
                position: Position::FIRST,
                estimate: Totals::default(),
                left_out: BTreeMap::new(),
                storage_engines: Vec::new(),
            },
            snapshot: record.snapshot.clone(),
            server_info,
            connector,
            compression: request.compression,
            lease,
            renewal: spawn_renewal(Arc::clone(&control), lease),
            control,
        })
    }
}

/// Names of engines are told in findings: so many, and so long, at the most.
fn storage_engines(names: Vec<String>) -> Vec<String> {
    let is_name = |name: &String| {
        (1..=64).contains(&name.len()) && name.chars().all(|c| c.is_ascii_graphic())
    };
    names.into_iter().take(64).filter(is_name).collect()
}

/// What was left out, by reason.
fn left_out(reasons: HashMap<String, u64>) -> BTreeMap<String, u64> {
    let reasons = reasons.into_iter().filter(|(reason, _)| reason.len() <= LEFT_OUT_MAX);
    reasons.take(LEFT_OUT_MAX).collect()
}

fn check_snapshot_name(name: &str) -> Result<(), Failure> {
    let length = name.len();
    if (1..=SNAPSHOT_NAME_BYTES_MAX).contains(&length) && name.chars().all(|c| c.is_ascii_graphic())
    {
        return Ok(());
    }
    Err(Failure::peer_misbehaved(format!(
        "the snapshot's name has {length} bytes, 1 to {SNAPSHOT_NAME_BYTES_MAX} visible ones of \
         ASCII are allowed"
    )))
}

/// A further connection that logs in by password: no snapshot is known yet that a key is good for.
async fn connect_anew(
    options: &ConnectOptions,
    request: &DonorRequest,
    settings: &Settings,
) -> Result<Client, Failure> {
    let DonorConnection { channel, security, .. } = connect(options).await?;
    log_in(&channel, request, &security, &options.tls, settings).await?;
    Ok(client_on(channel))
}

/// A snapshot that is being opened. Dropped before it is, it asks for its name once more and closes
/// it: a cancel may come while the answer is on its way.
struct Opening {
    client: Client,
    request: pb::OpenSnapshotRequest,
    is_open: bool,
}

impl Drop for Opening {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.is_open {
            return;
        }
        let (mut client, request) = (self.client.clone(), self.request.clone());
        let closing = async move {
            // What cannot be closed ends with its lease.
            let opened = call("OpenSnapshot", CALL_TIMEOUT, client.open_snapshot(request)).await?;
            let outcome = pb::Outcome::Cancelled.into();
            let close = pb::CloseSnapshotRequest { snapshot: opened.snapshot, outcome };
            call("CloseSnapshot", CALL_TIMEOUT, client.close_snapshot(close)).await
        };
        runtime.spawn(closing.in_current_span());
    }
}

/// Logs in by password where the donor asks for it; says whether it does.
async fn log_in(
    channel: &Channel,
    request: &DonorRequest,
    security: &marcot_common::connect::Security,
    tls: &ClientTls,
    settings: &Settings,
) -> Result<bool, Failure> {
    let mut client = auth_client(channel);
    let (user, password) = (&request.user, &request.password);
    let trust = login::Trust { host: &request.host, tls };
    let trust = settings.allow_database_accounts.then_some(trust);
    let result = login::log_in_with_password(&mut client, security, user, password, trust).await;
    match result {
        Ok(_) => Ok(true),
        // What has no log-in at all is told by its next answer.
        Err(failure) if matches!(failure.reason.as_ref(), "NO_ACCOUNTS" | "PEER_LACKS_METHOD") => {
            Ok(false)
        }
        Err(failure) => Err(failure.from_donor()),
    }
}

/// How long the donor keeps the snapshot of a recipient that is gone.
fn lease(donor_timeout: Duration, donor: &pb::GetServerInfoResponse) -> Duration {
    let most = donor.lease_duration_max.and_then(|most| time::duration_from_wire(most).ok());
    donor_timeout.max(LEASE_MIN).min(most.unwrap_or(LEASE_MIN))
}

fn spawn_renewal(control: Arc<Control>, lease: Duration) -> AbortHandle {
    let trace = Span::current().context();
    let task = tokio::spawn(async move {
        let mut tick = tokio::time::interval(RENEW_INTERVAL.min(lease / 3));
        loop {
            tick.tick().await;
            let request = pb::RenewLeaseRequest {
                snapshot: control.connector.snapshot.clone(),
                lease_duration: Some(duration_to_wire(lease)),
                ..Default::default()
            };
            // Not beneath the span that is open now: that would not end before the last renewal.
            let span = info_span!(parent: None, "renewal", otel.kind = "client");
            drop(span.set_parent(trace.clone()));
            let renewed = async {
                let mut client = control.client().await?;
                call("RenewLease", CALL_TIMEOUT, client.renew_lease(request)).await
            }
            .instrument(span);
            // A lost lease shows in the calls that need it; here it is only told early.
            match renewed.await {
                Ok(renewed) => control.progress.set_held_back(&renewed.held_back_reason),
                Err(failure) => {
                    let snapshot = &control.connector.snapshot;
                    warn!(%snapshot, error = %failure, "lease was not renewed");
                    control.drop_connection().await;
                }
            }
        }
    });
    task.abort_handle()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards clones of a donor that waits for locks as long as its engine does by itself: that is no time
    /// of the list, and is waited for beside it.
    #[test]
    fn a_donor_that_waits_for_locks_has_its_engines_time_for_it() {
        let seconds = Duration::from_secs;
        let limit = |queue, ddl| opening_limit(seconds(1800), queue, ddl);
        assert_eq!(limit(None, None), seconds(1800) + DDL_TIMEOUT_DEFAULT);
        assert_eq!(limit(Some(seconds(60)), Some(seconds(7))), seconds(1867));
    }
}
