//! From what was typed to requests.

use std::{collections::HashMap, io::Read as _, os::unix::ffi::OsStrExt as _, path::Path};

use bytes::Bytes;
use marcot_common::{
    failure::Failure,
    host::host_and_port,
    statement::{STATEMENT_BYTES_MAX, Statement},
    time::duration_to_wire,
    tls::Fingerprint,
};
use marcot_proto::recipient::v1::{
    AttachReplica, CloneInstanceRequest, CloneLimits, CloneLocalRequest, CloneOptions,
    CloneStatementRequest, Compression, SslMode, Verification,
    validate_clone_request::Request as Asked,
};

use super::{
    arguments::{
        CompressionOption, DonorOptions, LimitOptions, StartCommand, StartOptions, Verify,
    },
    caret, secret,
};

/// What is said of a password that was typed as part of a statement.
const IN_ARGUMENT: &str = "marcot: warning: the statement holds a password: as an argument it is in the \
    list of processes, and in the shell's history; give - and the statement on standard input, or use \
    `marcot clone`, which asks for it";

/// Reads the statement that was typed, or piped.
fn read_statement(typed: &str) -> Result<String, Failure> {
    if typed != "-" {
        return Ok(typed.to_owned());
    }
    let mut text = String::new();
    std::io::stdin()
        .take(STATEMENT_BYTES_MAX as u64 + 1)
        .read_to_string(&mut text)
        .map_err(|e| Failure::io("read the statement from", Path::new("standard input"), &e))?;
    Ok(text)
}

/// Finds a syntax error here, where it can be pointed at, and reads whether a password is in it.
fn check_statement(text: &str) -> Result<HasSecret, Failure> {
    match caret::parse(text) {
        Ok(Statement::Local { .. }) => Ok(HasSecret(false)),
        Ok(Statement::Instance { password, .. }) => Ok(HasSecret(!password.expose().is_empty())),
        Err((shown, failure)) => {
            eprintln!("{shown}");
            Err(failure)
        }
    }
}

/// Whether a request holds a password, which must not cross a network in clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HasSecret(pub(super) bool);

impl StartCommand {
    /// The request, and whether a secret is in it; asks for a password where one is needed.
    pub(super) fn request(&self) -> Result<(Asked, HasSecret), Failure> {
        match self {
            Self::Sql { statement, start } => {
                let text = read_statement(statement)?;
                let HasSecret(secret) = check_statement(&text)?;
                if secret && statement != "-" {
                    eprintln!("{IN_ARGUMENT}");
                }
                let secret = HasSecret(secret || start.attach_replica.is_some());
                Ok((Asked::CloneStatement(start.statement(text)?), secret))
            }
            Self::Clone { donor, start } => {
                let message = donor.instance(start)?;
                let secret = !message.password.is_empty() || start.attach_replica.is_some();
                let secret = HasSecret(secret);
                Ok((Asked::CloneInstance(message), secret))
            }
            Self::Local { data_directory, start } => {
                let secret = HasSecret(start.attach_replica.is_some());
                Ok((Asked::CloneLocal(start.local(data_directory)?), secret))
            }
        }
    }

    /// How the clone is started.
    pub(super) fn options(&self) -> &StartOptions {
        match self {
            Self::Sql { start, .. } | Self::Clone { start, .. } | Self::Local { start, .. } => {
                start
            }
        }
    }
}

impl StartOptions {
    /// For `CloneStatement`.
    fn statement(&self, statement: String) -> Result<CloneStatementRequest, Failure> {
        Ok(CloneStatementRequest {
            statement,
            options: Some(self.options()?),
            donor_fingerprint: self.fingerprint()?,
            compression: self.compression.and_then(CompressionOption::to_wire),
        })
    }

    /// For `CloneLocal`.
    fn local(&self, data_directory: &Path) -> Result<CloneLocalRequest, Failure> {
        Ok(CloneLocalRequest {
            data_directory: path_bytes(data_directory),
            options: Some(self.options()?),
        })
    }

    fn options(&self) -> Result<CloneOptions, Failure> {
        if self.discard_old_data_first && !self.yes {
            secret::confirm(
                "The server is stopped and its data are removed before the copy begins: if the clone \
                 fails, they are gone.",
            )?;
        }
        Ok(CloneOptions {
            request_id: self.request_id.clone().unwrap_or_default(),
            owner: self.owner.clone().unwrap_or_default(),
            preserve_owners: self.preserve_owners,
            expected_generation: self.expected_generation.clone().unwrap_or_default(),
            block_ddl: self.block_ddl,
            verification: match self.verify {
                Some(Verify::Full) => Verification::Full,
                None => Verification::Unspecified,
            }
            .into(),
            reuse_directory: self.reuse.as_deref().map(path_bytes).unwrap_or_default(),
            ddl_timeout: self.ddl_timeout.map(duration_to_wire),
            limits: self.limits.to_wire(),
            discard_old_data_first: self.discard_old_data_first,
            attach_replica: self.replication()?,
            validate_only: false,
            expected_server: self.expected_server()?,
        })
    }

    fn expected_server(&self) -> Result<HashMap<String, String>, Failure> {
        let pair = |text: &String| {
            let (name, value) = text.split_once('=').ok_or_else(|| {
                let text =
                    format!("--expect-server {}: write it as NAME=VALUE", text.escape_debug());
                Failure::invalid("BAD_EXPECTED_SERVER", text)
            })?;
            Ok((name.to_owned(), value.to_owned()))
        };
        self.expect_server.iter().map(pair).collect()
    }

    fn replication(&self) -> Result<Option<AttachReplica>, Failure> {
        let Some(user) = &self.attach_replica else { return Ok(None) };
        let source = self.replication_source.as_deref().map(host_and_port).transpose()?;
        let (host, port) = source.unwrap_or_default();
        let prompt = format!("Password of '{user}' for replication: ");
        let file = self.replication_password_file.as_deref();
        let password = secret::read(file, "MARCOT_REPLICATION_PASSWORD", &prompt)?;
        let (user, password) = (user.clone(), password.to_string());
        Ok(Some(AttachReplica { host, port: port.into(), user, password }))
    }

    fn fingerprint(&self) -> Result<Bytes, Failure> {
        let Some(text) = &self.donor_fingerprint else { return Ok(Bytes::new()) };
        let fingerprint = Fingerprint::parse(text).map_err(|e| {
            Failure::invalid("BAD_FINGERPRINT", format!("--donor-fingerprint: {e}"))
        })?;
        Ok(Bytes::copy_from_slice(&fingerprint.0))
    }
}

impl DonorOptions {
    /// For `CloneInstance`; asks for the donor's password.
    fn instance(&self, start: &StartOptions) -> Result<CloneInstanceRequest, Failure> {
        let (host, port) = host_and_port(&self.donor)?;
        let ssl_mode = match (self.require_ssl, self.require_no_ssl) {
            (true, _) => SslMode::Required,
            (_, true) => SslMode::Disabled,
            _ => SslMode::Unspecified,
        };
        let prompt = format!("Password of '{}' on the donor: ", self.donor_user);
        let password =
            secret::read(self.donor_password_file.as_deref(), "MARCOT_DONOR_PASSWORD", &prompt)?;
        Ok(CloneInstanceRequest {
            host,
            port: port.into(),
            user: self.donor_user.clone(),
            password: password.to_string(),
            data_directory: self.data_directory.as_deref().map(path_bytes).unwrap_or_default(),
            ssl_mode: ssl_mode.into(),
            donor_fingerprint: start.fingerprint()?,
            compression: start.compression.and_then(CompressionOption::to_wire),
            options: Some(start.options()?),
        })
    }
}

impl LimitOptions {
    /// Those that were given; `None` when none was.
    pub(super) fn to_wire(self) -> Option<CloneLimits> {
        let limits = CloneLimits {
            concurrency_max: self.concurrency,
            data_bytes_per_second_max: self.max_data_bandwidth,
            network_bytes_per_second_max: self.max_network_bandwidth,
            autotune_concurrency: self.autotune_concurrency,
        };
        (limits != CloneLimits::default()).then_some(limits)
    }
}

impl CompressionOption {
    fn to_wire(self) -> Option<Compression> {
        match self {
            Self::Off => None,
            Self::Automatic => Some(Compression { level: 0, automatic: true }),
            Self::Level(level) => Some(Compression { level, automatic: false }),
        }
    }
}

fn path_bytes(path: &Path) -> Bytes {
    Bytes::copy_from_slice(path.as_os_str().as_bytes())
}
