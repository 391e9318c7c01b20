//! `marcot verify`: a directory against the certificate in it.

use std::path::Path;

use marcot_common::failure::Failure;
use marcot_proto::recipient::v1::{VerifyCloneRequest, VerifyCloneResponse};
use tonic::Code;

use super::{End, arguments::Arguments, connect::Client, failed, output::Output};
use crate::certificate::{
    FILE_NAME,
    check::{answer, check},
    read::Certificate,
};

/// Checks a directory of this host, or a clone of the recipient's.
pub(super) async fn verify(
    arguments: &Arguments,
    what: &Path,
    signer: &Option<String>,
    output: Output,
) -> Result<End, Failure> {
    let is_name = what.to_str().is_some_and(|name| name.starts_with("clones/"));
    let found = if is_name {
        let mut client = Client::connect(arguments).await?;
        let request = VerifyCloneRequest { name: what.display().to_string() };
        client.api().verify_clone(request).await.map_err(failed)?.into_inner()
    } else {
        let certificate = Certificate::open(&what.join(FILE_NAME))?;
        let report = check(what, &certificate, &|| Ok(()))?;
        answer(what, &certificate, report)
    };
    if let Some(signer) = signer {
        check_signer(&found, signer)?;
    }
    output.verification(&found);
    Ok(match (found.intact, found.modified_by_server) {
        (true, _) => End::Done,
        (false, true) => End::Modified,
        (false, false) => End::Failed,
    })
}

fn check_signer(found: &VerifyCloneResponse, signer: &str) -> Result<(), Failure> {
    if found.signer.eq_ignore_ascii_case(signer) {
        return Ok(());
    }
    let by = match found.signer.as_str() {
        "" => "nobody",
        signer => signer,
    };
    Err(Failure::new(
        Code::DataLoss,
        "CERTIFICATE_SIGNATURE",
        format!("the certificate is signed by {by}, {signer} was asked for"),
    ))
}
