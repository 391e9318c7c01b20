//! What a caller asks for, whichever way it was asked: checked, and its secret kept apart.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fmt,
    ops::RangeInclusive,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use marcot_common::{
    connect::SslMode, failure::Failure, statement::Statement, time::duration_from_wire,
};
use marcot_engine::{SnapshotOptions, innodb::replica::ReplicationSource};
use marcot_proto::recipient::v1 as pb;
use prost::Message as _;
use zeroize::Zeroizing;

use crate::{
    copy_journal::record::{Begun, decode},
    fetch::compression::Compression,
    install::place::{self, Form, INNER_DIRECTORY},
    limits::Limits,
    preflight::own_server,
    settings::Settings,
    staging::STAGING_PREFIX,
};

/// A checked request for a clone.
#[derive(Debug, Clone)]
pub struct CloneRequest {
    /// Where from.
    pub source: SourceRequest,
    /// The new data directory.
    pub target: PathBuf,
    /// Whether the target is the recipient server's own data directory.
    pub replaces: bool,
    /// How the trees change places, where data are to be replaced, or a server is to be started.
    pub form: Option<Form>,
    /// Whether there are data to be replaced.
    pub had_data: bool,
    /// The generation that the caller means to replace; empty: any.
    pub expected_generation: String,
    /// Who will own the files.
    pub owner: Owner,
    /// Bytes per second, and streams.
    pub limits: Arc<Limits>,
    /// An older copy on this host whose equal blocks are used.
    pub reuse: Option<PathBuf>,
    /// For the donor's engine.
    pub snapshot: SnapshotOptions,
    /// Whether the old data go before the first byte.
    pub discard_old_data_first: bool,
    /// Whether, and from where, the server replicates afterwards.
    pub replicate_from: Option<ReplicationSource>,
    /// The caller's id.
    pub request_id: String,
    /// The statement that says the same, its secret hidden.
    pub statement: String,
    /// The message that says the same, without its secrets: for the copy's journal. Empty for CLONE
    /// LOCAL.
    pub record: Vec<u8>,
    /// Whether all that a clone checks first is checked, and nothing is started.
    pub validate_only: bool,
    /// Values of the server that is to run on the clone, by the names of its variables.
    pub expected_server: BTreeMap<String, String>,
    /// Whether all is read from the disk again before it is installed.
    pub verifies_fully: bool,
    /// Whether secrets are missing: it was read from a journal.
    pub lacks_secrets: bool,
}

/// Where a clone's files come from.
#[derive(Debug, Clone)]
pub enum SourceRequest {
    /// This host's own data directory.
    Local,
    /// A donor.
    Donor(DonorRequest),
}

/// A donor, and how to reach it.
#[derive(Clone)]
pub struct DonorRequest {
    /// Name or literal.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Account.
    pub user: String,
    /// Its password.
    pub password: Zeroizing<String>,
    /// REQUIRE clause.
    pub ssl_mode: SslMode,
    /// The one certificate that is accepted.
    pub fingerprint: Option<[u8; 32]>,
    /// zstd's level.
    pub compression: Compression,
}

impl fmt::Debug for DonorRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'@'{}':{} ({:?})", self.user, self.host, self.port, self.ssl_mode)
    }
}

/// Who will own the files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// As the directory that the new one stands in.
    FollowParent,
    /// As given: user and group, numbers.
    Given(u32, u32),
    /// As on the donor, by number.
    Preserved,
}

impl CloneRequest {
    /// Checks `CloneInstance`.
    pub fn from_instance(
        message: pb::CloneInstanceRequest,
        settings: &Settings,
    ) -> Result<Self, Failure> {
        if message.host.is_empty() || message.host.len() > 253 {
            let length = message.host.len();
            return Err(Failure::invalid(
                "BAD_DONOR",
                format!("donor host has {length} bytes, 1 to 253 are allowed"),
            ));
        }
        let port = u16::try_from(message.port).ok().filter(|&port| port != 0).ok_or_else(|| {
            let port = message.port;
            Failure::invalid("BAD_DONOR", format!("donor port is {port}, 1 to 65535 are allowed"))
        })?;
        if message.user.is_empty() || message.user.len() > 128 {
            let length = message.user.len();
            let text = format!("donor user has {length} bytes, 1 to 128 are allowed");
            return Err(Failure::invalid("BAD_DONOR", text));
        }
        let ssl_mode = match pb::SslMode::try_from(message.ssl_mode) {
            Ok(pb::SslMode::Unspecified) => SslMode::Preferred,
            Ok(pb::SslMode::Required) => SslMode::Required,
            Ok(pb::SslMode::Disabled) => SslMode::Disabled,
            Err(_) => {
                let text = format!("SSL mode {} is not known", message.ssl_mode);
                return Err(Failure::invalid("BAD_SSL_MODE", text));
            }
        };
        let record = without_secrets(&message).encode_to_vec();
        let donor = DonorRequest {
            host: message.host,
            port,
            user: message.user,
            password: Zeroizing::new(message.password),
            ssl_mode,
            fingerprint: fingerprint(&message.donor_fingerprint)?,
            compression: compression(message.compression)?,
        };
        let request = Self::build(
            SourceRequest::Donor(donor),
            &message.data_directory,
            message.options.unwrap_or_default(),
            settings,
        )?;
        Ok(Self { record, ..request })
    }

    /// Reads the request of a copy that is gone on with, and takes the secrets that its journal has
    /// not got.
    pub fn from_record(
        begun: &Begun,
        secrets: Option<Secrets>,
        settings: &Settings,
    ) -> Result<Self, Failure> {
        let mut message: pb::CloneInstanceRequest = decode(&begun.request)?;
        let lacks_secrets = secrets.is_none();
        let Secrets { password, attach_replica_password } = secrets.unwrap_or_default();
        message.password = password.to_string();
        let attach = message.options.as_mut().and_then(|options| options.attach_replica.as_mut());
        if let Some(attach) = attach {
            attach.password = attach_replica_password.to_string();
        }
        let form = match begun.form.as_str() {
            "" => None,
            name => Form::parse(name),
        };
        // What was replaced may look otherwise by now: its data may have been discarded.
        let request =
            Self { form, had_data: begun.had_data, ..Self::from_instance(message, settings)? };
        Ok(Self { lacks_secrets, ..request })
    }

    /// Checks `CloneLocal`.
    pub fn from_local(
        message: pb::CloneLocalRequest,
        settings: &Settings,
    ) -> Result<Self, Failure> {
        if message.data_directory.is_empty() {
            return Err(crate::target::not_absolute(Path::new("")));
        }
        Self::build(
            SourceRequest::Local,
            &message.data_directory,
            message.options.unwrap_or_default(),
            settings,
        )
    }

    /// Checks `CloneStatement`.
    pub fn from_statement(
        message: pb::CloneStatementRequest,
        settings: &Settings,
    ) -> Result<Self, Failure> {
        match Statement::parse(&message.statement)? {
            Statement::Local { data_directory } => Self::from_local(
                pb::CloneLocalRequest {
                    data_directory: data_directory.into_bytes().into(),
                    options: message.options,
                },
                settings,
            ),
            Statement::Instance { data_directory: Some(path), .. } if path.is_empty() => {
                Err(crate::target::not_absolute(Path::new("")))
            }
            Statement::Instance { user, host, port, password, data_directory, ssl_mode } => {
                Self::from_instance(
                    pb::CloneInstanceRequest {
                        host,
                        port: port.into(),
                        user,
                        password: password.expose().to_owned(),
                        data_directory: data_directory.unwrap_or_default().into_bytes().into(),
                        ssl_mode: match ssl_mode {
                            SslMode::Preferred => pb::SslMode::Unspecified,
                            SslMode::Required => pb::SslMode::Required,
                            SslMode::Disabled => pb::SslMode::Disabled,
                        }
                        .into(),
                        donor_fingerprint: message.donor_fingerprint,
                        compression: message.compression,
                        options: message.options,
                    },
                    settings,
                )
            }
        }
    }

    fn build(
        source: SourceRequest,
        data_directory: &[u8],
        options: pb::CloneOptions,
        settings: &Settings,
    ) -> Result<Self, Failure> {
        let replaces = data_directory.is_empty();
        let target = if replaces {
            let own = settings.data_directory.clone().ok_or_else(|| {
                Failure::precondition(
                    "NO_DATA_DIRECTORY",
                    "the statement names no DATA DIRECTORY and this recipient has none of its own; \
                     name one, or start the recipient with --data-directory",
                )
            })?;
            // Not a link to it: a link's target is what must change.
            own.canonicalize().unwrap_or(own)
        } else {
            // Without a slash at its end, which would have the system follow a link there.
            Path::new(OsStr::from_bytes(data_directory)).components().collect()
        };
        let Ok(verification) = pb::Verification::try_from(options.verification) else {
            let text = format!("verification {} is not known", options.verification);
            return Err(Failure::invalid("BAD_VERIFICATION", text));
        };
        if options.request_id.len() > 128 || options.request_id.chars().any(char::is_control) {
            let length = options.request_id.len();
            return Err(Failure::invalid(
                "BAD_REQUEST_ID",
                format!("request_id has {length} bytes or a control character; at most 128 bytes"),
            ));
        }
        let statement = describe(&source, &target, replaces);
        let had_data = replaces && holds_data(&target)?;
        // An empty directory makes way for the clone, unless a server is to be stopped for it, or it
        // is a mount point.
        let is_there = replaces && target.is_dir();
        let form = if had_data
            || (is_there && (settings.install.manages || place::is_mount_point(&target)?))
        {
            Some(settings.install.form.map_or_else(|| Form::of(&target), Ok)?)
        } else {
            None
        };
        Ok(Self {
            form,
            had_data,
            expected_generation: options.expected_generation.clone(),
            owner: owner(&options)?,
            limits: Arc::new(Limits::new(&options.limits.unwrap_or_default(), &settings.limits)?),
            snapshot: snapshot_options(&options)?,
            discard_old_data_first: discard(&options, form)?,
            replicate_from: replicate_from(&options, &source, replaces, settings)?,
            reuse: reuse(&options, &source)?,
            request_id: options.request_id,
            source,
            target,
            replaces,
            statement,
            record: Vec::new(),
            validate_only: options.validate_only,
            expected_server: expected_server(options.expected_server)?,
            verifies_fully: verification == pb::Verification::Full,
            lacks_secrets: false,
        })
    }

    /// The directory that the clone is staged in.
    #[must_use]
    pub fn staging_parent(&self) -> PathBuf {
        match self.form {
            Some(form) => form.staging_parent(&self.target),
            None => self.target.parent().map(PathBuf::from).unwrap_or_default(),
        }
    }

    /// `HOST:PORT` or `LOCAL INSTANCE`, as in performance_schema.clone_status.
    #[must_use]
    pub fn source_name(&self) -> String {
        match &self.source {
            SourceRequest::Local => "LOCAL INSTANCE".to_owned(),
            SourceRequest::Donor(donor) if donor.host.contains(':') => {
                format!("[{}]:{}", donor.host, donor.port)
            }
            SourceRequest::Donor(donor) => format!("{}:{}", donor.host, donor.port),
        }
    }
}

/// What a journal never holds.
#[derive(Default)]
pub struct Secrets {
    /// Of the donor's account.
    pub password: Zeroizing<String>,
    /// Of the account that the server replicates by.
    pub attach_replica_password: Zeroizing<String>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets")
    }
}

fn without_secrets(message: &pb::CloneInstanceRequest) -> pb::CloneInstanceRequest {
    let mut message = pb::CloneInstanceRequest { password: String::new(), ..message.clone() };
    let attach = message.options.as_mut().and_then(|options| options.attach_replica.as_mut());
    if let Some(attach) = attach {
        attach.password = String::new();
    }
    message
}

/// Beginnings of the names of what a server makes in an empty directory before it finds that it
/// cannot run there; without any directory beside them there is no table.
const OF_NO_DATA: [&str; 13] = [
    "aria_log",
    "ibdata",
    "ib_logfile",
    "ib_buffer_pool",
    "ibtmp",
    "undo0",
    "ddl_recovery",
    "tc.log",
    "multi-master.info",
    "mariadb_upgrade_info",
    "mysql_upgrade_info",
    "mysqld-auto.cnf",
    "auto.cnf",
];

/// Whether a data directory holds more than what an install, the file system, or a server that could
/// not start has put there.
pub(crate) fn holds_data(data_directory: &Path) -> Result<bool, Failure> {
    let entries = match std::fs::read_dir(data_directory) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Failure::io("read directory", data_directory, &e)),
        Ok(entries) => entries,
    };
    let is_data = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        if name == INNER_DIRECTORY || name == "lost+found" {
            return false;
        }
        let is_file = entry.file_type().is_ok_and(|kind| !kind.is_dir());
        let name = name.to_string_lossy();
        let is_junk = name.starts_with(STAGING_PREFIX)
            || OF_NO_DATA.iter().any(|start| name.starts_with(start))
            || [".pid", ".err", ".sock"].iter().any(|end| name.ends_with(end));
        !(is_file && is_junk)
    };
    Ok(entries.flatten().any(is_data))
}

/// Waits for the backup locks that may be asked for; the longest ends before a call is given up.
const DDL_TIMEOUTS: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(600);

fn describe(source: &SourceRequest, target: &Path, replaces: bool) -> String {
    let directory = (!replaces).then(|| target.to_string_lossy().into_owned());
    match source {
        SourceRequest::Local => {
            Statement::Local { data_directory: directory.unwrap_or_default() }.redacted()
        }
        SourceRequest::Donor(donor) => Statement::Instance {
            user: donor.user.clone(),
            host: donor.host.clone(),
            port: donor.port,
            password: String::new().into(),
            data_directory: directory,
            ssl_mode: donor.ssl_mode,
        }
        .redacted(),
    }
}

fn fingerprint(bytes: &[u8]) -> Result<Option<[u8; 32]>, Failure> {
    if bytes.is_empty() {
        return Ok(None);
    }
    <[u8; 32]>::try_from(bytes).map(Some).map_err(|_| {
        let length = bytes.len();
        Failure::invalid("BAD_FINGERPRINT", format!("{length} bytes; a SHA-256 fingerprint has 32"))
    })
}

fn compression(asked: Option<pb::Compression>) -> Result<Compression, Failure> {
    let Some(pb::Compression { level, automatic }) = asked else {
        return Ok(Compression::Off);
    };
    if !(-7..=19).contains(&level) {
        return Err(Failure::invalid(
            "BAD_COMPRESSION_LEVEL",
            format!("compression level is {level}, -7 to 19 are allowed"),
        ));
    }
    let level = if level == 0 { 1 } else { level };
    Ok(if automatic { Compression::Automatic(level) } else { Compression::On(level) })
}

fn snapshot_options(options: &pb::CloneOptions) -> Result<SnapshotOptions, Failure> {
    let ddl_timeout = options.ddl_timeout.map(duration_from_wire).transpose()?;
    if let Some(wait) = ddl_timeout.filter(|wait| !DDL_TIMEOUTS.contains(wait)) {
        return Err(Failure::invalid(
            "BAD_DDL_TIMEOUT",
            format!("ddl_timeout is {wait:?}, {DDL_TIMEOUTS:?} are allowed"),
        ));
    }
    let block_ddl = options.block_ddl;
    Ok(SnapshotOptions { block_ddl, ddl_timeout, ..SnapshotOptions::default() })
}

/// Only what is replaced can be discarded.
fn discard(options: &pb::CloneOptions, form: Option<Form>) -> Result<bool, Failure> {
    if options.discard_old_data_first && form.is_none() {
        return Err(Failure::invalid(
            "BAD_DISCARD",
            "discard_old_data_first: the clone replaces no data; leave it out",
        ));
    }
    Ok(options.discard_old_data_first)
}

fn replicate_from(
    options: &pb::CloneOptions,
    source: &SourceRequest,
    replaces: bool,
    settings: &Settings,
) -> Result<Option<ReplicationSource>, Failure> {
    let Some(attach) = &options.attach_replica else {
        return Ok(None);
    };
    let bad = |why: String| Err(Failure::invalid("BAD_ATTACH_REPLICA", why));
    let SourceRequest::Donor(donor) = source else {
        return bad("attach_replica: CLONE LOCAL has no donor to replicate from".to_owned());
    };
    if !replaces {
        return bad("attach_replica: only a clone that replaces a server's data".to_owned());
    }
    if !settings.install.manages {
        return bad(
            "attach_replica: this recipient does not start the server (neither supervise nor \
             --start-command), so it cannot make it a replica; leave it out, and use the CHANGE \
             MASTER statement that the clone ends with"
                .to_owned(),
        );
    }
    let port = if attach.port == 0 { 3306 } else { attach.port };
    let Some(port) = u16::try_from(port).ok() else {
        return bad(format!("attach_replica: port {port}, 1 to 65535 are allowed"));
    };
    let texts = [&attach.host, &attach.user, &attach.password];
    if attach.user.is_empty() || texts.iter().any(|text| text.len() > 255) {
        return bad("attach_replica: a user is needed, and at most 255 bytes each".to_owned());
    }
    let host = if attach.host.is_empty() { donor.host.clone() } else { attach.host.clone() };
    let (user, password) = (attach.user.clone(), attach.password.clone());
    Ok(Some(ReplicationSource { host, port, user, password }))
}

fn reuse(options: &pb::CloneOptions, source: &SourceRequest) -> Result<Option<PathBuf>, Failure> {
    if options.reuse_directory.is_empty() {
        return Ok(None);
    }
    let bad = |why: &str| {
        let shown = options.reuse_directory.escape_ascii();
        Failure::invalid("BAD_REUSE_DIRECTORY", format!("reuse_directory `{shown}`: {why}"))
    };
    if matches!(source, SourceRequest::Local) {
        return Err(bad("CLONE LOCAL copies by the file system; give none"));
    }
    let path = PathBuf::from(OsStr::from_bytes(&options.reuse_directory));
    if path.is_relative() || options.reuse_directory.contains(&0) {
        return Err(bad("an absolute path is needed"));
    }
    Ok(Some(path))
}

fn expected_server(
    expected: std::collections::HashMap<String, String>,
) -> Result<BTreeMap<String, String>, Failure> {
    for (name, value) in &expected {
        own_server::check_expected(name, value).map_err(|why| {
            Failure::invalid("BAD_EXPECTED_SERVER", format!("expected_server: {why}"))
        })?;
    }
    Ok(expected.into_iter().collect())
}

fn owner(options: &pb::CloneOptions) -> Result<Owner, Failure> {
    match (options.owner.as_str(), options.preserve_owners) {
        ("", false) => Ok(Owner::FollowParent),
        ("", true) => Ok(Owner::Preserved),
        (given, false) => parse_owner(given),
        (_, true) => Err(Failure::invalid(
            "BAD_OWNER",
            "owner and preserve_owners are both given; give one of them",
        )),
    }
}

/// Reads `USER:GROUP`, names or numbers.
fn parse_owner(given: &str) -> Result<Owner, Failure> {
    let bad = |why: &str| {
        Failure::invalid("BAD_OWNER", format!("owner `{}`: {why}", given.escape_default()))
    };
    let (user, group) = given.split_once(':').ok_or_else(|| bad("write it as USER:GROUP"))?;
    let uid = user
        .parse()
        .ok()
        .or_else(|| uzers::get_user_by_name(user).map(|user| user.uid()))
        .ok_or_else(|| bad("no such user on this host"))?;
    let gid = group
        .parse()
        .ok()
        .or_else(|| uzers::get_group_by_name(group).map(|group| group.gid()))
        .ok_or_else(|| bad("no such group on this host"))?;
    Ok(Owner::Given(uid, gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards against an "old tree" that nobody can roll back to, and against data that are taken
    /// for none.
    #[test]
    fn what_a_server_leaves_that_could_not_start_is_no_data() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        assert!(!holds_data(path).unwrap());
        for name in [INNER_DIRECTORY, "lost+found"] {
            std::fs::create_dir(path.join(name)).unwrap();
        }
        for name in ["ibdata1", "ib_logfile0", "aria_log.00000001", "undo001", "host.pid"] {
            std::fs::write(path.join(name), "x").unwrap();
        }
        assert!(!holds_data(path).unwrap());
        std::fs::create_dir(path.join("mysql")).unwrap();
        assert!(holds_data(path).unwrap());
        std::fs::remove_dir(path.join("mysql")).unwrap();
        std::fs::write(path.join("any"), "x").unwrap();
        assert!(holds_data(path).unwrap());
    }
}
