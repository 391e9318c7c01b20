//! The consistent point of a MySQL server: one row of `performance_schema.log_status`, for which
//! the server holds all its logs at one moment.

use marcot_common::failure::Failure;
use marcot_proto::common::v1::{Coordinates, SourceCoordinates};
use serde_json::Value;

use crate::innodb::server::{Facts, Session};

/// Reads LSN, binary log and GTIDs of one moment.
pub(in crate::innodb) fn coordinates(
    session: &mut Session,
    facts: &Facts,
) -> Result<Coordinates, Failure> {
    let failed = |what: &str| Failure::bug(format!("performance_schema.log_status: {what}"));
    let row = session
        .row("SELECT LOCAL, REPLICATION, STORAGE_ENGINES FROM performance_schema.log_status")
        .map_err(|e| e.failure("read the coordinates"))?
        .ok_or_else(|| failed("no row"))?;
    let column = |number: usize| -> Result<Value, Failure> {
        serde_json::from_slice(row.bytes(number)).map_err(|e| failed(&e.to_string()))
    };
    let (local, replication, engines) = (column(0)?, column(1)?, column(2)?);
    let lsn = engines["InnoDB"]["LSN"].as_u64().ok_or_else(|| failed("no LSN"))?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    // A long set is broken into lines.
    let gtid_executed = text(&local["gtid_executed"]).replace(['\n', ' '], "");
    let mut point = Coordinates {
        server_uuid: facts.server_uid.clone(),
        server_id: facts.server_id,
        server_version: facts.version.clone(),
        binlog_file: text(&local["binary_log_file"]).into_bytes().into(),
        binlog_position: local["binary_log_position"].as_u64().unwrap_or(0),
        gtid_executed: gtid_executed.clone(),
        lsn,
        ..Coordinates::default()
    };
    // Where each channel's source is read up to is in tables of the clone (mysql.slave_relay_log_info),
    // as of the point; what the channels have applied is in the set.
    for channel in replication["channels"].as_array().into_iter().flatten() {
        point.sources.push(SourceCoordinates {
            channel: text(&channel["channel_name"]),
            gtid_executed: gtid_executed.clone(),
            ..SourceCoordinates::default()
        });
    }
    point.sources.sort_by(|a, b| a.channel.cmp(&b.channel));
    Ok(point)
}
