//! After an install: the server becomes a replica of the donor's, and catches up.

use std::time::{Duration, Instant};

use marcot_common::failure::Failure;
pub use marcot_engine::innodb::replica::check_attachable;
use marcot_engine::{
    DatabaseConfig,
    innodb::replica::{self, Applied, ReplicaState, ReplicationSource},
};
use marcot_proto::common::v1::Coordinates;
use tracing::info;

use crate::source::blocking;

/// Between two looks at a replica.
const LOOK_PAUSE: Duration = Duration::from_millis(500);

/// A replica that does not run for this long is stuck. There is no limit on one that runs: a single
/// transaction may take hours.
const STALL_MAX: Duration = Duration::from_secs(60);

/// A server that replicates.
#[derive(Debug)]
pub struct Replicating {
    database: DatabaseConfig,
}

/// Attaches the replica.
pub async fn attach(
    database: &DatabaseConfig,
    at: &Coordinates,
    source: &ReplicationSource,
) -> Result<Replicating, Failure> {
    let (config, at, from) = (database.clone(), at.clone(), source.clone());
    blocking(move || replica::attach(&config, &at, &from)).await?;
    info!(source = ?source, "the server replicates");
    Ok(Replicating { database: database.clone() })
}

impl Replicating {
    /// Waits until the replica has applied all that its source had by the time that it was attached:
    /// one of a busy source is never quite there.
    pub async fn catch_up(&self) -> Result<(), Failure> {
        let mut target: Option<Applied> = None;
        let mut stopped: Option<Instant> = None;
        loop {
            let config = self.database.clone();
            let state = blocking(move || replica::state(&config)).await?;
            if target.is_none() && state.has_read_all {
                info!(position = %state.read, "the replica knows all that its source had");
                target = Some(state.read.clone());
            }
            if target.as_ref().is_some_and(|target| state.applied >= *target) {
                info!(position = %state.applied, "the replica has caught up");
                return Ok(());
            }
            if state.runs {
                stopped = None;
            }
            let since = *stopped.get_or_insert_with(Instant::now);
            if !state.runs && since.elapsed() >= STALL_MAX {
                return Err(stalled(&state));
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }
}

fn stalled(state: &ReplicaState) -> Failure {
    let error = state.error.as_deref().unwrap_or("it names no error");
    Failure::precondition(
        "REPLICA_STALLED",
        format!(
            "the replica does not run, for {} s now, at {}: {error}; SHOW SLAVE STATUS tells more",
            STALL_MAX.as_secs(),
            state.applied
        ),
    )
}
