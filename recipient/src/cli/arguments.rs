//! What can be typed.

use std::{path::PathBuf, str::FromStr, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use marcot_common::{config::parse_duration, pace::parse_bandwidth};

/// Clones a live database's data directory from a donor onto a recipient.
#[derive(Debug, Parser)]
#[command(name = "marcot", version = marcot_common::config::VERSION_WITH_COMMIT)]
pub(super) struct Arguments {
    /// The recipient: HOST:PORT, with https:// TLS is required, with http:// it is not used; or
    /// unix:/PATH of its socket.
    #[arg(
        long,
        global = true,
        value_name = "ADDR",
        default_value = "127.0.0.1:4406",
        env = "MARCOT_RECIPIENT"
    )]
    pub(super) recipient: String,
    /// Account on the recipient, where it has accounts.
    #[arg(long, global = true, env = "MARCOT_USER")]
    pub(super) user: Option<String>,
    /// File with the account's password [default: $MARCOT_PASSWORD, or a prompt].
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) password_file: Option<PathBuf>,
    /// File with a token that the recipient knows, instead of an account.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "MARCOT_TOKEN_FILE",
        conflicts_with = "user"
    )]
    pub(super) token_file: Option<PathBuf>,
    /// Require TLS, as https:// does.
    #[arg(long, global = true)]
    pub(super) tls: bool,
    /// CA of the recipient's certificate; requires TLS.
    #[arg(long, global = true, value_name = "FILE", env = "MARCOT_CA_FILE")]
    pub(super) ca_file: Option<PathBuf>,
    /// Certificates that CAs have revoked; requires TLS.
    #[arg(long, global = true, value_name = "FILE", env = "MARCOT_CRL_FILE")]
    pub(super) crl_file: Option<PathBuf>,
    /// SHA-256 fingerprint of the recipient's certificate; requires TLS.
    #[arg(long, global = true, value_name = "SHA256")]
    pub(super) fingerprint: Option<String>,
    /// Certificate to show the recipient.
    #[arg(long, global = true, value_name = "FILE", requires = "key")]
    pub(super) cert: Option<PathBuf>,
    /// Its private key.
    #[arg(long, global = true, value_name = "FILE", requires = "cert")]
    pub(super) key: Option<PathBuf>,
    /// Trace that the calls belong to, a W3C traceparent; nonsense is none.
    #[arg(long, global = true, value_name = "CONTEXT", env = "TRACEPARENT")]
    pub(super) traceparent: Option<String>,
    /// What tracing systems add to it.
    #[arg(long, global = true, value_name = "STATE", env = "TRACESTATE")]
    pub(super) tracestate: Option<String>,
    /// How results are printed.
    #[arg(long, global = true, value_enum, default_value = "text")]
    pub(super) output: Format,
    /// What to do.
    #[command(subcommand)]
    pub(super) command: Command,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For a person.
    Text,
    /// One JSON document.
    Json,
}

/// How chunks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CompressionOption {
    Off,
    Automatic,
    Level(i32),
}

impl FromStr for CompressionOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self::Off),
            "auto" => Ok(Self::Automatic),
            _ => {
                let level = text.parse().ok().filter(|level| (-7..=19).contains(level));
                level
                    .map(Self::Level)
                    .ok_or_else(|| "give off, auto, or a level from -7 to 19".to_owned())
            }
        }
    }
}

/// What a clone may take.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(super) struct LimitOptions {
    /// Most streams, 1 to 128 [default: the recipient's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=128))]
    pub(super) concurrency: Option<u32>,
    /// Find the number of streams while the clone runs, up to --concurrency (clone_autotune_concurrency)
    /// [default: as the recipient is configured].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
          require_equals = true)]
    pub(super) autotune_concurrency: Option<bool>,
    /// Most data per second, as 50MiB, from 64KiB; 0: no limit (clone_max_data_bandwidth).
    #[arg(long, value_name = "BYTES", value_parser = parse_bandwidth)]
    pub(super) max_data_bandwidth: Option<u64>,
    /// Most bytes on the network per second, from 64KiB; 0: no limit (clone_max_network_bandwidth).
    #[arg(long, value_name = "BYTES", value_parser = parse_bandwidth)]
    pub(super) max_network_bandwidth: Option<u64>,
}

/// How much of a copy is checked once more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Verify {
    /// All of it is read from the disk again.
    Full,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Start a clone.
    #[command(flatten)]
    Start(StartCommand),
    /// Check everything that a clone would check first, and change nothing.
    #[command(visible_alias = "preflight")]
    Validate {
        #[command(subcommand)]
        what: StartCommand,
    },
    /// List clones, newest first.
    List {
        /// Most clones to list.
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(i32).range(1..=1000))]
        count: i32,
    },
    /// Show one clone.
    Get {
        /// Name or id; - is the newest.
        #[arg(default_value = "-")]
        name: String,
    },
    /// Watch a clone to its end; Ctrl-C leaves, and the clone goes on.
    Watch {
        /// Name or id; - is the newest.
        #[arg(default_value = "-")]
        name: String,
    },
    /// Cancel a clone and wait for its end.
    Cancel {
        /// Name or id.
        name: String,
    },
    /// Pause a clone: its streams stop, its snapshot stays.
    Pause {
        /// Name or id.
        name: String,
    },
    /// Change the limits of a clone that runs; those that are not given stay.
    Limit {
        /// Name or id; - is the newest.
        #[arg(default_value = "-")]
        name: String,
        /// The limits.
        #[command(flatten)]
        limits: LimitOptions,
    },
    /// Go on with a clone that is paused, waits for a password, or failed since its donor was away.
    Resume {
        /// Name or id; - is the newest.
        #[arg(default_value = "-")]
        name: String,
        /// The donor account's password, where it is asked for: the first line of this file, else
        /// $MARCOT_DONOR_PASSWORD, else a prompt.
        #[arg(long, value_name = "FILE")]
        donor_password_file: Option<PathBuf>,
        /// The replication account's password, of a clone that was to attach a replica: likewise,
        /// with $MARCOT_REPLICATION_PASSWORD.
        #[arg(long, value_name = "FILE")]
        replication_password_file: Option<PathBuf>,
    },
    /// Check a clone's directory against the certificate in it, past the page cache. Exit codes: 0
    /// intact, 1 damaged, 3 a server has run on it since, and changed it.
    Verify {
        /// The directory, on this host; or clones/ID, which the recipient reads.
        what: PathBuf,
        /// The Ed25519 key that must have signed it, hexadecimal, as `verify` prints it.
        #[arg(long, value_name = "KEY")]
        signer: Option<String>,
    },
    /// Install a clone that waits for its server to be stopped.
    Install {
        /// Name or id; - is the newest.
        #[arg(default_value = "-")]
        name: String,
    },
    /// Accept a clone that has replaced the server's data: the old data are removed.
    Accept {
        /// Name or id; - is the newest.
        #[arg(default_value = "-")]
        name: String,
    },
    /// Bring the data from before a clone back; the clone's are kept aside.
    Rollback {
        /// Name or id; - is the newest.
        #[arg(default_value = "-")]
        name: String,
        /// What was written since the clone was installed may go.
        #[arg(long)]
        discard_writes: bool,
    },
    /// List what clones have left beside the data directory, with sizes; or remove some of it.
    Prune {
        /// Names of leftovers to remove, as listed.
        remove: Vec<String>,
        /// Remove all that no clone needs.
        #[arg(long, conflicts_with = "remove")]
        all: bool,
    },
    /// See what a donor does.
    Donor {
        #[command(subcommand)]
        what: DonorCommand,
    },
    /// Manage an accounts file.
    Account {
        #[command(subcommand)]
        what: AccountCommand,
    },
    /// Copy marcot-recipient and marcot to a directory: for an init container, so that they are found in
    /// a database's own image, where a recipient supervises the server.
    CopyPrograms {
        /// Where they go.
        directory: PathBuf,
    },
    /// Print completions for a shell.
    #[command(hide = true)]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write man pages.
    #[command(hide = true)]
    Man {
        /// Where they go.
        directory: PathBuf,
    },
}

/// What starts a clone, or is checked as if it did.
#[derive(Debug, Subcommand)]
pub(super) enum StartCommand {
    /// Run a CLONE statement, as in MySQL.
    Sql {
        /// The statement; - reads it from standard input: a password in it is in no list of processes
        /// then, and in no shell's history.
        statement: String,
        #[command(flatten)]
        start: StartOptions,
    },
    /// Clone from a donor (CLONE INSTANCE).
    Clone {
        #[command(flatten)]
        donor: DonorOptions,
        #[command(flatten)]
        start: StartOptions,
    },
    /// Clone the recipient's own data directory (CLONE LOCAL).
    Local {
        /// The new data directory, absolute.
        #[arg(long, value_name = "DIR")]
        data_directory: PathBuf,
        #[command(flatten)]
        start: StartOptions,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum DonorCommand {
    /// List the snapshots that a donor holds (privilege MONITOR). --user, --token-file, --ca-file,
    /// --cert and the like are for the donor here.
    List {
        /// The donor: HOST:PORT, with https:// TLS is required, with http:// it is not used; or
        /// unix:/PATH of its socket.
        #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:4407", env = "MARCOT_DONOR")]
        donor: String,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum AccountCommand {
    /// Add an account; its password comes from a prompt, or as one line of standard input.
    Add {
        /// Name, as in 'NAME'@'host'.
        name: String,
        /// The accounts file; it is made if there is none.
        #[arg(long, value_name = "FILE")]
        accounts: PathBuf,
        /// BACKUP_ADMIN (be cloned from), CLONE_ADMIN (replace data) or MONITOR (look).
        #[arg(long, required = true, value_name = "PRIVILEGE")]
        privilege: Vec<marcot_common::connection::Privilege>,
    },
    /// List accounts.
    List {
        /// The accounts file.
        #[arg(long, value_name = "FILE")]
        accounts: PathBuf,
    },
    /// Remove an account.
    Remove {
        /// Name.
        name: String,
        /// The accounts file.
        #[arg(long, value_name = "FILE")]
        accounts: PathBuf,
    },
}

/// The donor, and how to reach it.
#[derive(Debug, Args)]
pub(super) struct DonorOptions {
    /// HOST:PORT or [IPV6]:PORT.
    #[arg(long, value_name = "ADDR")]
    pub(super) donor: String,
    /// Account on the donor.
    #[arg(long, value_name = "NAME")]
    pub(super) donor_user: String,
    /// File with its password [default: $MARCOT_DONOR_PASSWORD, or a prompt].
    #[arg(long, value_name = "FILE")]
    pub(super) donor_password_file: Option<PathBuf>,
    /// The new data directory, absolute; without it the recipient's own is replaced.
    #[arg(long, value_name = "DIR")]
    pub(super) data_directory: Option<PathBuf>,
    /// Encrypted and verified, or an error (REQUIRE SSL).
    #[arg(long, conflicts_with = "require_no_ssl")]
    pub(super) require_ssl: bool,
    /// Plaintext (REQUIRE NO SSL).
    #[arg(long)]
    pub(super) require_no_ssl: bool,
}

/// What every clone can be started with.
#[derive(Debug, Args)]
pub(super) struct StartOptions {
    /// Start the clone, print it, and leave.
    #[arg(long)]
    pub(super) detach: bool,
    /// SHA-256 fingerprint of the donor's certificate, as the donor prints it at start.
    #[arg(long, value_name = "SHA256")]
    pub(super) donor_fingerprint: Option<String>,
    /// Compress with zstd: at a level from -7 to 19, auto: while that is faster than without, or off
    /// (clone_enable_compression) [default: off].
    #[arg(long, value_name = "LEVEL", allow_negative_numbers = true)]
    pub(super) compression: Option<CompressionOption>,
    /// Owner and group of all files, USER:GROUP [default: as the directory they stand in].
    #[arg(long, conflicts_with = "preserve_owners")]
    pub(super) owner: Option<String>,
    /// Keep the donor's numeric owners and groups.
    #[arg(long)]
    pub(super) preserve_owners: bool,
    /// What the clone may take.
    #[command(flatten)]
    pub(super) limits: LimitOptions,
    /// An older copy on the recipient's host: only what differs from it comes over the network.
    #[arg(long, value_name = "DIR")]
    pub(super) reuse: Option<PathBuf>,
    /// How much is checked once more before the copy is installed; full: all of it is read from the
    /// disk again.
    #[arg(long, value_name = "HOW")]
    pub(super) verify: Option<Verify>,
    /// Block DDL on the donor's server for the whole clone (clone_block_ddl).
    #[arg(long)]
    pub(super) block_ddl: bool,
    /// Longest wait for the server's backup locks (clone_ddl_timeout) [default: 300s].
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub(super) ddl_timeout: Option<Duration>,
    /// Where there is no room for both copies: stop the server and remove its data first. They are
    /// lost then, whatever becomes of the clone; asks, unless --yes.
    #[arg(long)]
    pub(super) discard_old_data_first: bool,
    /// Do not ask.
    #[arg(long)]
    pub(super) yes: bool,
    /// Make the server a replica of the donor's, by this account, and wait until it has caught up.
    #[arg(long, value_name = "USER")]
    pub(super) attach_replica: Option<String>,
    /// Database server to replicate from, HOST:PORT [default: the donor's host, 3306].
    #[arg(long, value_name = "ADDR", requires = "attach_replica")]
    pub(super) replication_source: Option<String>,
    /// File with that account's password [default: $MARCOT_REPLICATION_PASSWORD, or a prompt].
    #[arg(long, value_name = "FILE", requires = "attach_replica")]
    pub(super) replication_password_file: Option<PathBuf>,
    /// Refuse unless the data directory that would be replaced has this generation, as `validate`
    /// and `get` show it.
    #[arg(long, value_name = "GENERATION")]
    pub(super) expected_generation: Option<String>,
    /// A value that the server that is to run on the clone has, by the name of its variable, as
    /// innodb_page_size=16384, where no server runs there; may be repeated.
    #[arg(long, value_name = "NAME=VALUE")]
    pub(super) expect_server: Vec<String>,
    /// An id of yours: the same id again is the same clone.
    #[arg(long, value_name = "ID")]
    pub(super) request_id: Option<String>,
}
