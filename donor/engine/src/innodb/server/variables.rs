//! What a server says of itself in its variables: whether this engine clones it, and whether it is
//! the one that it was.

use marcot_common::failure::Failure;
use tonic::Code;

use super::{Row, Server, Session, SqlError};
use crate::innodb::{flavor::Flavor, mysql};

/// Versions whose copies have been tested: (major, minor).
const MARIADB_VERSIONS: &[(u16, u16)] = &[(10, 11), (11, 8)];
const MYSQL_VERSIONS: &[(u16, u16)] = &[(9, 7)];

/// The first version of MySQL whose redo log is the one that is known here: (major, minor, patch).
const MYSQL_FIRST: (u16, u16, u16) = (8, 0, 30);

/// What the server is, as far as a copy depends on it.
#[derive(Debug, Clone)]
pub(in crate::innodb) struct Facts {
    /// Kind of server.
    pub(in crate::innodb) flavor: Flavor,
    /// Version string.
    pub(in crate::innodb) version: String,
    /// `server_uid`: the same for one installation.
    pub(in crate::innodb) server_uid: String,
    /// `server_id`.
    pub(in crate::innodb) server_id: u32,
    /// Page size, bytes.
    pub(in crate::innodb) page_size: u32,
    /// Whether a binary log is written.
    pub(in crate::innodb) has_binlog: bool,
    /// All variables asked for, by name.
    pub(in crate::innodb) variables: Vec<(String, String)>,
}

/// Variables that say where files are, or what the copy is.
const VARIABLES: &[&str] = &[
    "version",
    "server_uid",
    "server_uuid",
    "server_id",
    "log_bin",
    "datadir",
    "innodb_page_size",
    "innodb_data_home_dir",
    "innodb_data_file_path",
    "innodb_temp_data_file_path",
    "innodb_log_group_home_dir",
    "innodb_undo_directory",
    "innodb_buffer_pool_filename",
    "aria_log_dir_path",
    "log_bin_basename",
    "log_bin_index",
    "relay_log",
    "relay_log_basename",
    "relay_log_index",
    "relay_log_info_file",
    "general_log_file",
    "slow_query_log_file",
    "log_error",
    "pid_file",
    "socket",
    "tmpdir",
    "innodb_tmpdir",
    "slave_load_tmpdir",
    "character_set_server",
    "collation_server",
    "wsrep_on",
    "innodb_encrypt_log",
    "aria_encrypt_tables",
    "encrypt_binlog",
    "ignore_db_dirs",
    "lower_case_table_names",
    "replica_load_tmpdir",
    "innodb_temp_tablespaces_dir",
    "innodb_redo_log_encrypt",
    "binlog_encryption",
    "gtid_mode",
    "version_compile_os",
    "version_compile_machine",
    "character_set_filesystem",
    "innodb_undo_tablespaces",
    "max_allowed_packet",
    "read_only",
    "super_read_only",
    "plugin_dir",
    "log_slave_updates",
    "log_replica_updates",
];

impl Facts {
    /// Asks the server, and refuses one that this engine does not know, with all that is wrong.
    pub(in crate::innodb) fn ask(server: &Server, session: &mut Session) -> Result<Self, Failure> {
        let facts = Self::read(session)?;
        match Failure::all_of(facts.problems(server.allows_untested_version())) {
            Some(failure) => Err(failure),
            None => Ok(facts),
        }
    }

    /// Asks whatever server it is.
    pub(in crate::innodb) fn read(session: &mut Session) -> Result<Self, Failure> {
        let failed = |e: SqlError| e.failure("ask for the server's variables");
        let names: Vec<String> = VARIABLES.iter().map(|name| format!("'{name}'")).collect();
        let sql = format!("SHOW GLOBAL VARIABLES WHERE Variable_name IN ({})", names.join(","));
        let rows = session.rows(&sql).map_err(failed)?;
        let lower = |row: &Row| (row.text(0).to_ascii_lowercase(), row.text(1));
        Ok(Self::of(rows.iter().map(lower).collect()))
    }

    fn of(variables: Vec<(String, String)>) -> Self {
        let mut facts = Self {
            flavor: Flavor::MariaDb,
            version: String::new(),
            server_uid: String::new(),
            server_id: 0,
            page_size: 0,
            has_binlog: false,
            variables,
        };
        facts.version = facts.variable("version").to_owned();
        facts.flavor = Flavor::of_version(&facts.version);
        facts.server_uid = match facts.flavor {
            Flavor::MariaDb => facts.variable("server_uid").to_owned(),
            Flavor::MySql => facts.variable("server_uuid").to_owned(),
        };
        facts.server_id = facts.variable("server_id").parse().unwrap_or(0);
        facts.page_size = facts.variable("innodb_page_size").parse().unwrap_or(0);
        facts.has_binlog = facts.variable("log_bin") == "ON";
        facts
    }

    /// Whether the binary log lacks what a replica replicates.
    pub(in crate::innodb) fn logs_only_its_own(&self) -> bool {
        let names = ["log_slave_updates", "log_replica_updates"];
        self.has_binlog && names.iter().any(|name| self.variable(name) == "OFF")
    }

    /// A variable; empty when the server has none of that name.
    pub(in crate::innodb) fn variable(&self, name: &str) -> &str {
        self.variables.iter().find(|(n, _)| n == name).map_or("", |(_, value)| value)
    }

    /// Fails unless the server is the one whose answers these were: another one's pages and log say
    /// nothing of the same database. A snapshot of it is another snapshot.
    pub(in crate::innodb) fn check_lineage(&self, now: &Self) -> Result<(), Failure> {
        for name in
            ["server_uid", "server_uuid", "server_id", "version", "innodb_page_size", "log_bin"]
        {
            let (then, now) = (self.variable(name), now.variable(name));
            if then != now {
                return Err(lost_lineage(format!("its {name} was `{then}` and is `{now}`")));
            }
        }
        Ok(())
    }

    /// All that this engine does not clone about it.
    pub(in crate::innodb) fn problems(&self, allow_untested_version: bool) -> Vec<Failure> {
        let mut problems: Vec<Failure> =
            self.check_version(allow_untested_version).err().into_iter().collect();
        if self.flavor == Flavor::MySql {
            problems.extend(mysql::server::problems(self));
        }
        if self.variable("wsrep_on").eq_ignore_ascii_case("ON") {
            let text = "the server is a node of a Galera cluster (wsrep_on=ON), which this engine does \
                        not clone; clone an asynchronous replica instead";
            problems.push(Failure::precondition("GALERA", text).mysql(3875));
        }
        if !matches!(self.page_size, 4096 | 8192 | 16384 | 32768 | 65536) {
            let text = format!("innodb_page_size is {}", self.page_size);
            problems.push(Failure::precondition("UNSUPPORTED_PAGE_SIZE", text));
        }
        problems
    }

    fn check_version(&self, allow_untested: bool) -> Result<(), Failure> {
        let version = parse_version(&self.version);
        let tested = match self.flavor {
            Flavor::MariaDb => MARIADB_VERSIONS,
            Flavor::MySql => MYSQL_VERSIONS,
        };
        if version.is_some_and(|(major, minor, _)| tested.contains(&(major, minor))) {
            return Ok(());
        }
        let is_near = self.flavor == Flavor::MySql && version >= Some(MYSQL_FIRST);
        if is_near && allow_untested {
            tracing::warn!(version = %self.version, "no test has run this version of MySQL");
            return Ok(());
        }
        let next = match is_near {
            true => "; it may be tried with --allow-untested-version",
            false => "",
        };
        Err(Failure::precondition(
            "UNSUPPORTED_SERVER_VERSION",
            format!(
                "the server is `{}`; engine innodb knows MariaDB 10.11 and 11.8, and MySQL 9.7{next}",
                self.version
            ),
        ))
    }
}

/// The server is not, or not as, the one that a snapshot was opened of.
pub(in crate::innodb) fn lost_lineage(why: String) -> Failure {
    Failure::new(
        Code::NotFound,
        "UNKNOWN_SNAPSHOT",
        format!("the server was exchanged while it was cloned: {why}; it needs another snapshot"),
    )
}

/// Major, minor and patch number.
fn parse_version(version: &str) -> Option<(u16, u16, u16)> {
    let mut parts = version.split(['.', '-']);
    let mut part = || parts.next()?.parse().ok();
    Some((part()?, part()?, part().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a server answers, with one variable changed.
    fn facts(name: &str, value: &str) -> Result<Facts, Failure> {
        let all = [
            ("version", "10.11.14-MariaDB-0+deb12u2-log"),
            ("server_uid", "uid-a"),
            ("server_id", "1"),
            ("log_bin", "ON"),
            ("innodb_page_size", "16384"),
            ("wsrep_on", "OFF"),
        ];
        let changed = |(n, v): (&str, &str)| {
            (n.to_owned(), if n == name { value.to_owned() } else { v.to_owned() })
        };
        let facts = Facts::of(all.map(changed).to_vec());
        Failure::all_of(facts.problems(false)).map_or(Ok(facts), Err)
    }

    /// Guards the list of versions: the log and the pages of any other were never tried.
    #[test]
    fn a_server_of_another_version_is_refused_with_both_values() {
        for version in ["10.11.14-MariaDB", "11.8.3-MariaDB-ubu"] {
            assert!(facts("version", version).is_ok(), "{version}");
        }
        for version in ["10.6.22-MariaDB", "10.12.1-MariaDB", "11.4.7-MariaDB", "10.11.1", "x", ""]
        {
            let failure = facts("version", version).unwrap_err();
            assert_eq!(failure.reason, "UNSUPPORTED_SERVER_VERSION", "{version}");
            for text in [version, "10.11 and 11.8"] {
                assert!(failure.message.contains(text), "{failure}");
            }
        }
    }

    /// Guards the refusal of a cluster's node: its write sets are in no binary log position.
    #[test]
    fn a_node_of_a_galera_cluster_is_refused() {
        assert_eq!(facts("wsrep_on", "ON").unwrap_err().reason, "GALERA");
    }

    #[test]
    fn a_page_size_that_innodb_does_not_have_is_refused() {
        let failure = facts("innodb_page_size", "1024").unwrap_err();
        assert_eq!(failure.reason, "UNSUPPORTED_PAGE_SIZE", "{failure}");
        assert!(failure.message.contains("1024"), "{failure}");
    }

    /// Guards R6: pages and redo of two servers, or of two configurations, are never put together.
    #[test]
    fn a_server_that_took_the_place_of_another_needs_another_snapshot() {
        let then = facts("", "").unwrap();
        assert!(then.check_lineage(&facts("", "").unwrap()).is_ok());
        for (name, value) in [
            ("server_uid", "uid-b"),
            ("server_id", "2"),
            ("version", "10.11.15-MariaDB"),
            ("log_bin", "OFF"),
            ("innodb_page_size", "8192"),
        ] {
            let failure = then.check_lineage(&facts(name, value).unwrap()).unwrap_err();
            assert_eq!(failure.reason, "UNKNOWN_SNAPSHOT", "{name}");
            for text in [name, value, then.variable(name)] {
                assert!(failure.message.contains(text), "{failure}");
            }
        }
    }
}
