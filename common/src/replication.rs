//! The statements that attach a clone as a replica, from its coordinates.

use marcot_proto::common::v1::Coordinates;

/// Statements to run on the server that has been started on the clone, and comments (`--`) that
/// say what each group is for. `host` is where the donor was reached; port and account of its
/// database are not known here.
#[must_use]
pub fn statements(at: &Coordinates, host: &str) -> Vec<String> {
    let is_mysql = !at.server_version.is_empty() && !at.server_version.contains("MariaDB");
    if is_mysql { of_mysql(at, host) } else { of_mariadb(at, host) }
}

/// MySQL: the clone itself knows what it has executed, and a replica's channels are in its tables.
fn of_mysql(at: &Coordinates, host: &str) -> Vec<String> {
    let host = quote(host);
    let file = String::from_utf8_lossy(&at.binlog_file);
    let by_position = format!(
        "CHANGE REPLICATION SOURCE TO SOURCE_HOST = {host}, SOURCE_LOG_FILE = {}, SOURCE_LOG_POS = {};",
        quote(&file),
        at.binlog_position
    );
    let mut lines = Vec::new();
    if at.binlog_lacks_replicated {
        lines.push(LACKS_REPLICATED.to_owned());
    } else if file.is_empty() {
        if at.lsn != 0 {
            lines.push(NO_BINLOG.to_owned());
        }
    } else if at.gtid_executed.is_empty() {
        lines.push("-- to replicate from the donor's server, by binary log position:".to_owned());
        lines.push(by_position);
    } else {
        lines.push("-- to replicate from the donor's server, by GTID:".to_owned());
        lines.push(format!(
            "CHANGE REPLICATION SOURCE TO SOURCE_HOST = {host}, SOURCE_AUTO_POSITION = 1;"
        ));
        lines.push(format!("-- or by binary log position: {by_position}"));
    }
    for source in &at.sources {
        lines.push(
            "-- to replicate from the donor's own source, which the clone has settings of; started \
             with --skip-replica-start:"
                .to_owned(),
        );
        let channel = quote(&source.channel);
        lines.push(format!(
            "CHANGE REPLICATION SOURCE TO SOURCE_AUTO_POSITION = 1 FOR CHANNEL {channel};"
        ));
    }
    lines
}

const NO_BINLOG: &str =
    "-- the donor's server writes no binary log: the clone cannot be attached to it as a replica";

/// Such a replica would go on without an error, and without all that the donor replicates.
const LACKS_REPLICATED: &str = "-- not to replicate from the donor's server: it is a replica with \
    log_slave_updates (log_replica_updates) off, so its binary log lacks what it replicates";

fn of_mariadb(at: &Coordinates, host: &str) -> Vec<String> {
    let host = quote(host);
    let file = String::from_utf8_lossy(&at.binlog_file);
    let mut lines = Vec::new();
    if at.binlog_lacks_replicated {
        lines.push(LACKS_REPLICATED.to_owned());
    } else if !at.gtid_executed.is_empty() {
        lines.push("-- to replicate from the donor's server, by GTID:".to_owned());
        lines.push(format!("SET GLOBAL gtid_slave_pos = {};", quote(&at.gtid_executed)));
        lines.push(format!("CHANGE MASTER TO MASTER_HOST = {host}, MASTER_USE_GTID = slave_pos;"));
    } else if !file.is_empty() {
        lines.push("-- to replicate from the donor's server, by binary log position:".to_owned());
        lines.push(format!(
            "CHANGE MASTER TO MASTER_HOST = {host}, MASTER_LOG_FILE = {}, MASTER_LOG_POS = {};",
            quote(&file),
            at.binlog_position
        ));
    } else if at.lsn != 0 {
        lines.push(NO_BINLOG.to_owned());
    }
    for source in &at.sources {
        let name = match source.channel.as_str() {
            "" => String::new(),
            channel => format!(" {}", quote(channel)),
        };
        if source.gtid_executed.is_empty() {
            lines.push("-- to replicate from the donor's own source, by position:".to_owned());
            lines.push(format!(
                "CHANGE MASTER{name} TO MASTER_LOG_FILE = {}, MASTER_LOG_POS = {};",
                quote(&String::from_utf8_lossy(&source.binlog_file)),
                source.binlog_position
            ));
        } else {
            lines.push("-- to replicate from the donor's own source, by GTID:".to_owned());
            lines.push(format!("SET GLOBAL gtid_slave_pos = {};", quote(&source.gtid_executed)));
            lines.push(format!("CHANGE MASTER{name} TO MASTER_USE_GTID = slave_pos;"));
        }
    }
    lines
}

fn quote(text: &str) -> String {
    let clean = text.replace('\\', "\\\\").replace('\'', "''");
    format!("'{}'", clean.replace(char::is_control, ""))
}

#[cfg(test)]
mod tests {
    use marcot_proto::common::v1::SourceCoordinates;

    use super::*;

    #[test]
    fn what_the_coordinates_hold_decides_what_is_printed() {
        let file = || bytes::Bytes::from_static(b"bin.000002");
        let gtid = Coordinates { gtid_executed: "0-1-9".to_owned(), lsn: 5, ..Default::default() };
        let lines = statements(&gtid, "db'1");
        assert_eq!(lines[1], "SET GLOBAL gtid_slave_pos = '0-1-9';");
        assert!(lines[2].contains("MASTER_HOST = 'db''1'"), "{lines:?}");
        let position =
            Coordinates { binlog_file: file(), binlog_position: 42, lsn: 5, ..Default::default() };
        let lines = statements(&position, "db");
        assert!(lines[1].contains("MASTER_LOG_FILE = 'bin.000002', MASTER_LOG_POS = 42"));
        let none = Coordinates { lsn: 5, ..Default::default() };
        assert!(statements(&none, "db")[0].contains("no binary log"));
        assert!(statements(&Coordinates::default(), "db").is_empty(), "files have no database");
        let mysql = Coordinates {
            server_version: "9.7.4".to_owned(),
            gtid_executed: "a-b:1-9".to_owned(),
            ..position
        };
        let lines = statements(&mysql, "db");
        assert_eq!(
            lines[1],
            "CHANGE REPLICATION SOURCE TO SOURCE_HOST = 'db', SOURCE_AUTO_POSITION = 1;"
        );
        assert!(lines[2].contains("SOURCE_LOG_FILE = 'bin.000002', SOURCE_LOG_POS = 42;"));
        let source = SourceCoordinates {
            channel: "eu".to_owned(),
            gtid_executed: "0-3-4".to_owned(),
            ..Default::default()
        };
        let replica = Coordinates { sources: vec![source], ..gtid };
        let lines = statements(&replica, "db");
        assert!(lines[5].starts_with("CHANGE MASTER 'eu' TO"), "{lines:?}");
    }

    /// Guards a clone of a replica whose binary log has only its own writes: with a statement for the
    /// donor's server printed, a replica attached so lacks what the donor replicates, without an error.
    #[test]
    fn nothing_is_attached_to_a_binary_log_that_lacks_what_was_replicated() {
        for (version, source) in [
            ("10.11.6-MariaDB-log", "CHANGE MASTER 'eu' TO MASTER_USE_GTID = slave_pos;"),
            ("9.7.4", "CHANGE REPLICATION SOURCE TO SOURCE_AUTO_POSITION = 1 FOR CHANNEL 'eu';"),
        ] {
            let at = Coordinates {
                server_version: version.to_owned(),
                binlog_file: bytes::Bytes::from_static(b"bin.000002"),
                binlog_position: 42,
                gtid_executed: "0-7-9".to_owned(),
                lsn: 5,
                binlog_lacks_replicated: true,
                sources: vec![SourceCoordinates {
                    channel: "eu".to_owned(),
                    gtid_executed: "0-3-4".to_owned(),
                    ..Default::default()
                }],
                ..Default::default()
            };
            let lines = statements(&at, "db");
            assert!(lines[0].starts_with("-- not to replicate from the donor's"), "{lines:?}");
            assert!(lines[0].contains("log_slave_updates"), "{lines:?}");
            let text = lines.join("\n");
            for word in ["'db'", "bin.000002", "0-7-9"] {
                assert!(!text.contains(word), "{word}: {text}");
            }
            assert_eq!(lines.last().map(String::as_str), Some(source));
        }
    }
}
