//! The consistent point of a MySQL server: one row of `performance_schema.log_status`, for which
//! the server holds all its logs at one moment.
//!
//! Up to where a replica has applied its sources' logs is not in that row, and its appliers do not
//! rest. What SHOW REPLICA STATUS said just before is never too late. With the source's GTIDs that is
//! enough: what the clone has beyond it is passed over by them. Without them, also where the replica gives
//! GTIDs of its own (ASSIGN_GTIDS_TO_ANONYMOUS_TRANSACTIONS), a transaction would be applied twice, so that a place is told only where nothing can have moved: the appliers stand still, or have
//! nothing left to apply, before the row and after it.

use std::time::{Duration, Instant};

use marcot_common::failure::Failure;
use marcot_proto::common::v1::{Coordinates, SourceCoordinates};
use serde_json::Value;

use crate::innodb::server::{Facts, Row, Session};

/// Longest wait, without GTIDs of the source, for a moment at which the appliers have nothing left: DDL waits as
/// long. After it the clone's own tables alone say where its channels are.
const REST_MAX: Duration = Duration::from_secs(1);

/// Between two looks.
const REST_PAUSE: Duration = Duration::from_millis(10);

/// Reads LSN, binary log and GTIDs of one moment, and on a replica its sources' places.
pub(in crate::innodb) fn coordinates(
    session: &mut Session,
    facts: &Facts,
) -> Result<Coordinates, Failure> {
    let point = row(session, facts)?;
    if point.sources.is_empty() {
        return Ok(point);
    }
    let has_gtids = facts.variable("gtid_mode") == "ON";
    let deadline = Instant::now() + REST_MAX;
    loop {
        let before = channels(session)?;
        let mut point = row(session, facts)?;
        let is_told = (has_gtids && before.iter().all(|channel| channel.has_sources_gtids))
            || (before.iter().all(Channel::rests) && before == channels(session)?);
        if !is_told && Instant::now() < deadline {
            std::thread::sleep(REST_PAUSE);
            continue;
        }
        if is_told {
            tell(&mut point, &before);
        } else {
            tracing::warn!(
                "the replica has no GTIDs of its source, and was applying all the time, or had failed: its \
                 sources' places are in the clone's mysql.slave_relay_log_info alone"
            );
        }
        return Ok(point);
    }
}

/// Fails where a replica does not let the account ask how far it is.
pub(in crate::innodb) fn check_channels(session: &mut Session) -> Result<(), Failure> {
    let sql = "SELECT JSON_LENGTH(REPLICATION, '$.channels') FROM performance_schema.log_status";
    let row = session.row(sql).map_err(|e| e.failure("list the replication channels"))?;
    if row.is_some_and(|row| row.number(0) > 0) {
        channels(session)?;
    }
    Ok(())
}

/// How far a replication channel's source has been read and applied.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Channel {
    name: String,
    file: Vec<u8>,
    /// All before it was applied.
    position: u64,
    /// All before it was received.
    read: (Vec<u8>, u64),
    is_applying: bool,
    /// It has ended by an error: with several workers it may have applied more.
    has_failed: bool,
    /// SOURCE_AUTO_POSITION: the source gives its transactions GTIDs.
    has_sources_gtids: bool,
}

impl Channel {
    fn of(row: &Row) -> Self {
        let number = |name: &str| row.named(name).parse().unwrap_or(0);
        Self {
            name: row.named("Channel_Name"),
            file: row.named("Relay_Source_Log_File").into_bytes(),
            position: number("Exec_Source_Log_Pos"),
            read: (row.named("Source_Log_File").into_bytes(), number("Read_Source_Log_Pos")),
            is_applying: row.named("Replica_SQL_Running") != "No",
            has_failed: number("Last_SQL_Errno") != 0,
            has_sources_gtids: number("Auto_Position") == 1,
        }
    }

    /// Whether no transaction can be under way.
    fn rests(&self) -> bool {
        let has_all = self.file == self.read.0 && self.position == self.read.1;
        has_all || (!self.is_applying && !self.has_failed)
    }
}

fn channels(session: &mut Session) -> Result<Vec<Channel>, Failure> {
    let action = "ask how far the replica is (needs REPLICATION CLIENT)";
    let rows = session.rows("SHOW REPLICA STATUS").map_err(|e| e.failure(action))?;
    let mut channels: Vec<_> = rows.iter().map(Channel::of).collect();
    channels.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(channels)
}

fn tell(point: &mut Coordinates, channels: &[Channel]) {
    for source in &mut point.sources {
        let channel = channels.iter().find(|channel| channel.name == source.channel);
        // The channels of a group have no file.
        if let Some(channel) = channel.filter(|channel| !channel.file.is_empty()) {
            source.binlog_file = channel.file.clone().into();
            source.binlog_position = channel.position;
        }
    }
}

fn row(session: &mut Session, facts: &Facts) -> Result<Coordinates, Failure> {
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
    // What the channels have applied is in the set.
    for channel in replication["channels"].as_array().into_iter().flatten() {
        point.sources.push(SourceCoordinates {
            channel: text(&channel["channel_name"]),
            gtid_executed: gtid_executed.clone(),
            ..SourceCoordinates::default()
        });
    }
    point.sources.sort_by(|a, b| a.channel.cmp(&b.channel));
    point.binlog_lacks_replicated = !point.sources.is_empty() && facts.logs_only_its_own();
    Ok(point)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channel(name: &str, position: u64, read: u64, is_applying: bool) -> Channel {
        let file = b"bin.000007".to_vec();
        Channel {
            name: name.to_owned(),
            read: (file.clone(), read),
            file,
            position,
            is_applying,
            has_failed: false,
            has_sources_gtids: false,
        }
    }

    /// Guards a replica without GTIDs: a place is told where no transaction is between log and engine
    /// alone. One that is applying would be told a place before what its clone holds.
    #[test]
    fn a_channel_rests_when_it_is_stopped_or_has_applied_all() {
        for (applied, read, is_applying, rests) in
            [(400, 400, true, true), (400, 900, true, false), (400, 900, false, true)]
        {
            assert_eq!(channel("", applied, read, is_applying).rests(), rests, "{applied} {read}");
        }
        // With several workers more may have been applied than it says.
        let failed = Channel { has_failed: true, ..channel("", 400, 900, false) };
        assert!(!failed.rests());
        let mut other = channel("", 400, 400, true);
        other.read.0 = b"bin.000008".to_vec();
        assert!(!other.rests());
    }

    #[test]
    fn each_source_is_told_its_own_place() {
        let source = |name: &str| SourceCoordinates {
            channel: name.to_owned(),
            ..SourceCoordinates::default()
        };
        let sources = ["", "east", "group"].map(source).to_vec();
        let mut point = Coordinates { sources, ..Coordinates::default() };
        let mut group = channel("group", 0, 0, true);
        group.file.clear();
        tell(&mut point, &[channel("", 400, 0, true), channel("east", 900, 0, true), group]);
        let told = point.sources.iter().map(|s| (s.binlog_file.len(), s.binlog_position));
        assert_eq!(told.collect::<Vec<_>>(), [(10, 400), (10, 900), (0, 0)]);
    }
}
