//! After an install: the server becomes a replica of the donor's, and catches up.

use std::time::{Duration, Instant};

use marcot_common::failure::Failure;
use marcot_engine::{
    DatabaseConfig,
    innodb::replica::{self, ReplicationSource},
};
use marcot_proto::common::v1::Coordinates;
use tracing::info;

use crate::source::blocking;

/// Between two looks at a replica.
const LOOK_PAUSE: Duration = Duration::from_millis(500);

/// A replica that applies nothing for this long, and has not caught up, is stuck. There is no limit
/// on one that gets on.
const STALL_MAX: Duration = Duration::from_secs(60);

/// Attaches the replica and waits until it has caught up.
pub async fn attach(
    database: &DatabaseConfig,
    at: &Coordinates,
    source: &ReplicationSource,
) -> Result<(), Failure> {
    let (config, at, from) = (database.clone(), at.clone(), source.clone());
    blocking(move || replica::attach(&config, &at, &from)).await?;
    info!(source = ?source, "the server replicates");
    let mut applied = String::new();
    let mut moved = Instant::now();
    loop {
        let config = database.clone();
        let state = blocking(move || replica::state(&config)).await?;
        if state.has_caught_up {
            info!("the replica has caught up");
            return Ok(());
        }
        if state.applied != applied {
            applied = state.applied;
            moved = Instant::now();
        }
        if moved.elapsed() >= STALL_MAX {
            let error = state.error.unwrap_or_else(|| "it names no error".to_owned());
            return Err(Failure::precondition(
                "REPLICA_STALLED",
                format!(
                    "the replica has applied nothing for {} s, at {applied}: {error}; SHOW SLAVE \
                     STATUS tells more",
                    STALL_MAX.as_secs()
                ),
            ));
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}
