//! `marcot-recipient seed`: fills an empty data directory from a donor, once, and ends: an init
//! container in front of a database server.
//!
//! ```text
//! data there?    -> end, nothing is done
//! a clone under way, or what one that failed has staged?  -> it goes on
//! else           -> a clone, without DATA DIRECTORY
//! ```
//! Invariants:
//! * Data that are there are never touched: a pod that is started again seeds nothing.
//! * It ends with 0 only when data stand in the directory.

use std::{path::PathBuf, str::FromStr, sync::Arc};

use marcot_common::{
    donor_list::DonorEntry,
    failure::Failure,
    host::{host_and_port, path_bytes},
};
use marcot_proto::recipient::v1 as pb;
use rustix::process::{getegid, geteuid};
use tracing::info;
use zeroize::Zeroizing;

use crate::{
    job::{
        registry::{Clones, Origin},
        status::is_over,
    },
    request::{CloneRequest, Secrets, holds_data},
    target,
};

/// Whom the recipient's own data directory is seeded from.
#[derive(Debug, Clone, clap::Args)]
pub struct SeedOptions {
    /// seed: the donor, HOST:PORT; it need not be in --donor-list.
    #[arg(long, value_name = "HOST:PORT", env = "MARCOT_SEED_FROM")]
    pub seed_from: Option<DonorAddress>,
    /// seed: account on the donor; any name, where the donor knows this recipient by its certificate.
    #[arg(long, value_name = "NAME", default_value = "seed", env = "MARCOT_SEED_USER")]
    pub seed_user: String,
    /// seed: file with its password.
    #[arg(long, value_name = "FILE", env = "MARCOT_SEED_PASSWORD_FILE")]
    pub seed_password_file: Option<PathBuf>,
}

/// Where one donor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DonorAddress {
    host: String,
    port: u16,
    entry: DonorEntry,
}

impl FromStr for DonorAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = host_and_port(text).map_err(|failure| failure.message)?;
        let entry = text.parse::<DonorEntry>().map_err(|e| e.to_string())?;
        Ok(Self { host, port, entry })
    }
}

impl SeedOptions {
    /// What is wrong with them, for a recipient that seeds.
    pub(crate) fn problems(&self, has_data_directory: bool) -> Vec<String> {
        let mut problems = Vec::new();
        if self.seed_from.is_none() {
            problems.push("seed: --seed-from is missing: the donor".to_owned());
        }
        if !has_data_directory {
            problems.push("seed: --data-directory is missing: what is seeded".to_owned());
        }
        problems
    }

    /// The donor that the operator has named, for the list of those that may be cloned from.
    pub(crate) fn donor(&self) -> Option<DonorEntry> {
        self.seed_from.as_ref().map(|donor| donor.entry.clone())
    }

    fn password(&self) -> Result<Zeroizing<String>, Failure> {
        let Some(path) = &self.seed_password_file else { return Ok(Zeroizing::default()) };
        let text = std::fs::read_to_string(path)
            .map_err(|e| Failure::io("read --seed-password-file", path, &e))?;
        let text = Zeroizing::new(text);
        Ok(Zeroizing::new(text.lines().next().unwrap_or_default().to_owned()))
    }

    fn request(&self) -> Result<pb::CloneInstanceRequest, Failure> {
        let donor = self.seed_from.as_ref().ok_or_else(|| Failure::bug("no donor to seed from"))?;
        Ok(pb::CloneInstanceRequest {
            host: donor.host.clone(),
            port: donor.port.into(),
            user: self.seed_user.clone(),
            password: self.password()?.to_string(),
            options: Some(pb::CloneOptions { owner: owner(), ..pb::CloneOptions::default() }),
            ..pb::CloneInstanceRequest::default()
        })
    }
}

/// A volume's root belongs to root, and who is not root can give nothing to root.
fn owner() -> String {
    let (user, group) = (geteuid(), getegid());
    if user.is_root() {
        return String::new();
    }
    format!("{}:{}", user.as_raw(), group.as_raw())
}

/// Seeds the data directory, unless it holds data; returns once it does.
pub(crate) async fn seed(clones: &Arc<Clones>, options: &SeedOptions) -> Result<(), Failure> {
    let data_directory = clones.settings().data_directory.clone();
    let data_directory =
        data_directory.ok_or_else(|| Failure::bug("no data directory to be seeded"))?;
    // As clones name it.
    let data_directory = data_directory.canonicalize().unwrap_or(data_directory);
    // What the last start has left goes on by itself.
    if let Some(running) = clones.running() {
        return end_of(clones, &running.name).await;
    }
    if holds_data(&data_directory)? {
        info!(data_directory = %data_directory.display(), "it holds data: nothing to seed");
        return Ok(());
    }
    let name = match take_up(clones, options, &path_bytes(&data_directory))? {
        Some(clone) => clone.name,
        None => begin(clones, options)?.name,
    };
    end_of(clones, &name).await
}

/// Goes on with the newest clone, if it is of this directory and left something staged.
fn take_up(
    clones: &Arc<Clones>,
    options: &SeedOptions,
    destination: &[u8],
) -> Result<Option<pb::Clone>, Failure> {
    let newest = clones.list(None, 1).into_iter().next();
    let Some(clone) = newest.filter(|clone| clone.destination == destination) else {
        return Ok(None);
    };
    if !matches!(clone.state(), pb::State::Failed | pb::State::AwaitingCredentials) {
        return Ok(None);
    }
    let secrets = Secrets { password: options.password()?, ..Secrets::default() };
    match clones.resume(&clone.name, Some(secrets)) {
        Ok(clone) => Ok(Some(clone)),
        // Nothing of it is staged.
        Err(failure) if failure.reason == "CLONE_ENDED" => Ok(None),
        Err(failure) => Err(failure),
    }
}

fn begin(clones: &Arc<Clones>, options: &SeedOptions) -> Result<pb::Clone, Failure> {
    let request = CloneRequest::from_instance(options.request()?, clones.settings())?;
    target::check_first(&request, clones.settings())?;
    clones.start(request, Origin::default())
}

/// Waits for the end of a clone; an end without data is an error.
async fn end_of(clones: &Arc<Clones>, name: &str) -> Result<(), Failure> {
    let (mut clone, changes) = clones.watch(name)?;
    if let Some(mut changes) = changes {
        // A stop of this service keeps what is staged, and tells nothing more of the clone.
        while !is_over(clone.state) {
            tokio::select! {
                changed = changes.changed() => match changed {
                    Ok(()) => clone = changes.borrow_and_update().clone(),
                    Err(_) => break,
                },
                () = clones.until_left() => break,
            }
        }
        clone = clones.get(name).unwrap_or(clone);
    }
    match clone.state() {
        pb::State::Completed => Ok(()),
        state if is_over(clone.state) => {
            let why = clone.error.as_ref().map(Failure::from_wire);
            Err(why.unwrap_or_else(|| {
                let text = format!("{name} has ended: {}", state.as_str_name());
                Failure::precondition("NOT_SEEDED", text)
            }))
        }
        _ => Err(Failure::precondition(
            "NOT_SEEDED",
            format!("stopped before {name} has ended; the next start goes on with it"),
        )),
    }
}
