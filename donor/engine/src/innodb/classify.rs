//! What each file of a data directory is to a copy.

use std::{collections::BTreeSet, path::Path};

use marcot_common::{failure::Failure, path::RelativePath};

use super::{
    flavor::Flavor,
    mariadb::log_file::LOG_NAME,
    mysql,
    paths::{self, inside},
    server::Facts,
};

/// How a file is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// A file of the system tablespace, by its place in it.
    System(usize),
    /// An undo tablespace.
    Undo,
    /// A table's own tablespace.
    Table,
    /// The redo log: what is copied is composed, and grows.
    Redo,
    /// Changes until commits are blocked: copied then.
    Late,
    /// All else: at rest while DDL and writes to its table are blocked.
    Plain,
    /// Stays with the donor, for a reason.
    LeftOut(&'static str),
}

impl Class {
    /// Whether it is made of InnoDB's pages.
    pub(super) fn is_tablespace(self) -> bool {
        matches!(self, Self::System(_) | Self::Undo | Self::Table)
    }
}

/// Tells files apart by their names and the server's variables.
#[derive(Debug)]
pub(super) struct Classifier {
    flavor: Flavor,
    /// Files of the system tablespace, in order.
    system: Vec<Vec<u8>>,
    temporary: Vec<Vec<u8>>,
    /// Names that binary logs, and relay logs, begin with, and their indexes.
    binlogs: Vec<Vec<u8>>,
    relay_logs: Vec<Vec<u8>>,
    relay_log_info: Vec<u8>,
    /// Single files, with the reason why they stay.
    files: Vec<(Vec<u8>, &'static str)>,
    /// Directories for temporary files.
    directories: BTreeSet<Vec<u8>>,
}

/// System tables that are written until commits are blocked (BACKUP STAGE BLOCK_COMMIT flushes
/// exactly these: sql/backup.cc).
const LATE_TABLES: &[&[u8]] = &[
    b"general_log",
    b"slow_log",
    b"table_stats",
    b"column_stats",
    b"index_stats",
    b"gtid_slave_pos",
];

impl Classifier {
    /// Reads the server's variables; fails when files of the database lie elsewhere.
    pub(super) fn new(facts: &Facts) -> Result<Self, Failure> {
        let data = Path::new(facts.variable("datadir"));
        paths::refuse(
            &paths::elsewhere(|name| facts.variable(name)),
            data,
            "its files would not be copied",
        )?;
        let path = facts.variable("innodb_data_file_path");
        let system = path
            .split(';')
            .filter(|part| !part.is_empty())
            .map(|part| part.split(':').next().unwrap_or_default().as_bytes().to_vec())
            .collect();
        let mut files = Vec::new();
        for (name, reason) in [
            ("general_log_file", "server_log"),
            ("slow_query_log_file", "server_log"),
            ("log_error", "server_log"),
            ("pid_file", "pid_file"),
            ("socket", "socket"),
            ("log_bin_index", "binary_log"),
            ("relay_log_index", "relay_log"),
        ] {
            if let Some(path) = inside(data, facts.variable(name)).filter(|p| !p.is_empty()) {
                files.push((path, reason));
            }
        }
        let prefix = |name: &str| inside(data, facts.variable(name)).filter(|p| !p.is_empty());
        let relay_logs = [prefix("relay_log_basename"), prefix("relay_log")];
        let mut directories = BTreeSet::new();
        for name in [
            "tmpdir",
            "innodb_tmpdir",
            "slave_load_tmpdir",
            "replica_load_tmpdir",
            "innodb_temp_tablespaces_dir",
        ] {
            for value in facts.variable(name).split(':') {
                directories.extend(inside(data, value).filter(|path| !path.is_empty()));
            }
        }
        let temporary = facts.variable("innodb_temp_data_file_path").split(';');
        Ok(Self {
            flavor: facts.flavor,
            system,
            temporary: temporary
                .filter_map(|part| part.split(':').next().map(|name| name.as_bytes().to_vec()))
                .collect(),
            binlogs: prefix("log_bin_basename").into_iter().collect(),
            relay_logs: relay_logs.into_iter().flatten().collect(),
            relay_log_info: match facts.variable("relay_log_info_file") {
                "" => b"relay-log.info".to_vec(),
                name => name.as_bytes().to_vec(),
            },
            files,
            directories,
        })
    }

    /// Leaves out as well what has the names of the clone's own binary log: files of an earlier
    /// setting of the donor's, which the clone's server would go on with.
    pub(super) fn for_binlog(mut self, base: Option<&str>) -> Self {
        self.binlogs.extend(base.map(|base| base.as_bytes().to_vec()));
        self
    }

    /// The kind of server.
    pub(super) fn flavor(&self) -> Flavor {
        self.flavor
    }

    /// Files of the system tablespace, in order.
    pub(super) fn system(&self) -> &[Vec<u8>] {
        &self.system
    }

    /// What a directory is.
    pub(super) fn directory(&self, path: &RelativePath) -> Class {
        match path.as_bytes() {
            // Made by mkfs at the top of a volume; only root can look into it.
            b"lost+found" => Class::LeftOut("file_system"),
            bytes if self.directories.contains(bytes) => Class::LeftOut("temporary"),
            _ => Class::Plain,
        }
    }

    /// What a file is.
    pub(super) fn file(&self, path: &RelativePath) -> Class {
        let bytes = path.as_bytes();
        if path.parent().is_none() {
            return self.top(bytes);
        }
        if let Some((_, reason)) = self.files.iter().find(|(name, _)| name == bytes) {
            return Class::LeftOut(reason);
        }
        if self.is_log(bytes, &self.binlogs) {
            return Class::LeftOut("binary_log");
        }
        if self.is_log(bytes, &self.relay_logs) {
            return Class::LeftOut("relay_log");
        }
        if self.flavor == Flavor::MySql
            && let Some(class) = mysql::classify::file(path)
        {
            return class;
        }
        let name = path.name();
        if name.ends_with(b".ibd") {
            return Class::Table;
        }
        // Data of an ALTER TABLE that is still copying: the server drops it when it starts.
        if name.starts_with(b"#sql") && !name.ends_with(b".frm") {
            return Class::LeftOut("temporary");
        }
        if let Some(table) = bytes.strip_prefix(b"mysql/") {
            let (stem, extension) = split_extension(table);
            if LATE_TABLES.contains(&stem) && extension != b"frm" {
                return Class::Late;
            }
        }
        Class::Plain
    }

    fn top(&self, name: &[u8]) -> Class {
        if let Some(index) = self.system.iter().position(|system| system == name) {
            return Class::System(index);
        }
        if let Some((_, reason)) = self.files.iter().find(|(file, _)| file == name) {
            return Class::LeftOut(reason);
        }
        if self.temporary.iter().any(|temporary| temporary == name) {
            return Class::LeftOut("temporary");
        }
        if self.flavor == Flavor::MySql
            && let Some(class) = mysql::classify::top(name)
        {
            return class;
        }
        if name.strip_prefix(b"undo").is_some_and(|n| n.len() == 3 && is_digits(n)) {
            return Class::Undo;
        }
        if name == LOG_NAME.as_bytes() {
            return Class::Redo;
        }
        if name.starts_with(b"ib_logfile") {
            return Class::LeftOut("redo_log");
        }
        if name == b"aria_log_control" || is_aria_log(name) {
            return Class::Late;
        }
        if self.is_log(name, &self.binlogs) {
            return Class::LeftOut("binary_log");
        }
        if self.is_log(name, &self.relay_logs) || is_default_relay_log(name) {
            return Class::LeftOut("relay_log");
        }
        if self.is_replication_state(name) {
            return Class::LeftOut("replication_state");
        }
        match name {
            // Of mariadb-backup and of BACKUP STAGE itself; what DDL recovery needs is
            // ddl_recovery.log.
            b"ddl.log" | b"ddl_recovery-backup.log" => Class::LeftOut("backup_log"),
            b"tc.log" => Class::LeftOut("transaction_coordinator_log"),
            b"auto.cnf" => Class::LeftOut("identity"),
            _ if name.ends_with(b".ibd") => Class::Table,
            _ if name.starts_with(b"innodb_status.") => Class::LeftOut("server_log"),
            _ if name.starts_with(b"#sql") => Class::LeftOut("temporary"),
            _ => Class::Plain,
        }
    }

    /// A log's name is the base name, for a replication connection its name, and a number.
    fn is_log(&self, name: &[u8], bases: &[Vec<u8>]) -> bool {
        bases.iter().any(|base| {
            let Some(rest) = name.strip_prefix(&base[..]) else {
                return false;
            };
            let (connection, last) = match rest.iter().rposition(|&b| b == b'.') {
                Some(dot) => (&rest[..dot], &rest[dot + 1..]),
                None => return false,
            };
            (connection.is_empty() || connection.starts_with(b"-"))
                && (is_digits(last) || matches!(last, b"index" | b"state" | b"idx"))
        })
    }

    /// Where a replica stands: master.info and its like, by connection.
    fn is_replication_state(&self, name: &[u8]) -> bool {
        let (info, _) = split_extension(&self.relay_log_info);
        let (stem, extension) = split_extension(name);
        let of = |base: &[u8]| {
            stem == base || stem.strip_prefix(base).is_some_and(|rest| rest.starts_with(b"-"))
        };
        name == &self.relay_log_info[..]
            || (extension == b"info" && (of(b"master") || of(info) || stem == b"multi-master"))
    }
}

/// `aria_log.` and eight digits.
pub(super) fn is_aria_log(name: &[u8]) -> bool {
    name.strip_prefix(b"aria_log.").is_some_and(|n| n.len() == 8 && is_digits(n))
}

/// A relay log's name where the server was given none: HOST-relay-bin, for a replication connection
/// its name, and a number.
fn is_default_relay_log(name: &[u8]) -> bool {
    let (stem, extension) = split_extension(name);
    let infix = b"-relay-bin";
    let found = stem.windows(infix.len()).position(|part| part == infix);
    let rest = found.map(|at| &stem[at + infix.len()..]);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"-"))
        && ((extension.len() >= 6 && is_digits(extension)) || extension == b"index")
}

fn is_digits(bytes: &[u8]) -> bool {
    !bytes.is_empty() && bytes.iter().all(u8::is_ascii_digit)
}

fn split_extension(name: &[u8]) -> (&[u8], &[u8]) {
    match name.iter().rposition(|&b| b == b'.') {
        Some(dot) => (&name[..dot], &name[dot + 1..]),
        None => (name, b""),
    }
}
