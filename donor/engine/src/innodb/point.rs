//! The consistent point: where the copy stands in its database's history, and the file in the
//! clone that says so.

use marcot_common::failure::Failure;
use marcot_proto::common::v1::{Coordinates, SourceCoordinates};
use serde_json::{Value, json};

use super::{
    flavor::Flavor,
    server::{Facts, Session, SqlError},
};

/// Name of the file in the clone's data directory.
pub(super) const INFO_NAME: &str = "marcot_clone_info.json";

/// Reads the coordinates of this moment. Commits are blocked, and a replica's SQL threads rest.
pub(super) fn coordinates(session: &mut Session, facts: &Facts) -> Result<Coordinates, SqlError> {
    let mut point = Coordinates {
        server_uuid: facts.server_uid.clone(),
        server_id: facts.server_id,
        server_version: facts.version.clone(),
        ..Coordinates::default()
    };
    if facts.has_binlog
        && let Some(row) = session.row("SHOW MASTER STATUS")?
    {
        point.binlog_file = row.bytes(0).to_vec().into();
        point.binlog_position = row.number(1);
    }
    let gtid = session.row("SELECT @@GLOBAL.gtid_binlog_pos, @@GLOBAL.gtid_slave_pos")?;
    let slave_pos = gtid.as_ref().map(|row| row.text(1)).unwrap_or_default();
    point.gtid_executed = gtid.as_ref().map(|row| row.text(0)).unwrap_or_default();
    for row in session.rows("SHOW ALL SLAVES STATUS")? {
        point.sources.push(SourceCoordinates {
            channel: row.named("Connection_name"),
            binlog_file: row.named("Relay_Master_Log_File").into_bytes().into(),
            binlog_position: row.named("Exec_Master_Log_Pos").parse().unwrap_or(0),
            gtid_executed: slave_pos.clone(),
        });
    }
    point.sources.sort_by(|a, b| a.channel.cmp(&b.channel));
    point.binlog_lacks_replicated = !point.sources.is_empty() && facts.logs_only_its_own();
    point.lsn = session.lsn()?.current;
    Ok(point)
}

/// The file's content.
pub(super) fn info(point: &Coordinates, flavor: Flavor) -> Result<Vec<u8>, Failure> {
    let sources: Vec<Value> = point
        .sources
        .iter()
        .map(|source| {
            json!({
                "channel": source.channel,
                "binlog_file": String::from_utf8_lossy(&source.binlog_file),
                "binlog_position": source.binlog_position,
                "gtid_slave_pos": source.gtid_executed,
            })
        })
        .collect();
    let (gtid, server) = match flavor {
        Flavor::MariaDb => ("gtid_binlog_pos", "server_uid"),
        Flavor::MySql => ("gtid_executed", "server_uuid"),
    };
    let info = json!({
        "format": 1,
        "binlog_file": String::from_utf8_lossy(&point.binlog_file),
        "binlog_position": point.binlog_position,
        gtid: point.gtid_executed,
        "lsn": point.lsn,
        server: point.server_uuid,
        "server_id": point.server_id,
        "server_version": point.server_version,
        "sources": sources,
    });
    let mut bytes = serde_json::to_vec_pretty(&info)
        .map_err(|e| Failure::bug(format!("write {INFO_NAME}: {e}")))?;
    bytes.push(b'\n');
    Ok(bytes)
}
