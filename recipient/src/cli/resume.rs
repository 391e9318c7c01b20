//! `marcot resume`: asks for the passwords that the clone waits for.

use std::path::Path;

use marcot_common::failure::Failure;
use marcot_proto::recipient::v1::{Clone, ResumeCloneRequest, State};

use super::secret;

/// The request for a clone; `files` hold the donor's and the replication account's password.
pub(super) fn request(
    clone: &Clone,
    files: [Option<&Path>; 2],
) -> Result<ResumeCloneRequest, Failure> {
    let mut request = ResumeCloneRequest { name: clone.name.clone(), ..Default::default() };
    let waits = clone.state() == State::AwaitingCredentials;
    let [donor, replication] = files;
    if waits || donor.is_some() {
        let prompt = format!("Password for {}: ", clone.source);
        request.password = secret::read(donor, "MARCOT_DONOR_PASSWORD", &prompt)?.to_string();
    }
    if replication.is_some() || std::env::var_os("MARCOT_REPLICATION_PASSWORD").is_some() {
        let password = secret::read(replication, "MARCOT_REPLICATION_PASSWORD", "")?;
        request.attach_replica_password = password.to_string();
    }
    Ok(request)
}
