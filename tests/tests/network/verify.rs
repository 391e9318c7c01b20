//! Certificates: what a clone was, and whether it still is.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, process::Command};

use marcot_proto::recipient::v1::{
    Clone, CloneLimits, CloneLocalRequest, CloneOptions, CloneStatementRequest, PauseCloneRequest,
    ResumeCloneRequest, State, Verification, VerifyCloneRequest,
};
use marcot_tests::{
    client::{assert_intact, wait_for_end},
    process, target_directory,
};

use crate::{LARGE_BYTES, Net};

impl Net {
    /// A clone in whose staged first file a bit flips, on this host, once it has arrived.
    async fn flipped(&mut self, target: &str, verification: Verification) -> Clone {
        self.meddled(target, verification, |tree| flip(&tree.join("large0"), 5_000_000)).await
    }

    /// A clone into whose staged tree somebody else writes on this host, once its first file has
    /// arrived.
    async fn meddled(
        &mut self,
        target: &str,
        verification: Verification,
        meddle: impl FnOnce(&Path),
    ) -> Clone {
        self.proxy.limit(Some(16 << 20));
        let statement = process::statement(self.proxy.port(), &self.path(target), "");
        let limits = Some(CloneLimits { concurrency_max: Some(1), ..Default::default() });
        let verification = verification.into();
        let options = Some(CloneOptions { limits, verification, ..Default::default() });
        let request = CloneStatementRequest { statement, options, ..Default::default() };
        let started = self.client.clone_statement(request).await.unwrap().into_inner();
        let name = started.clone.unwrap().name;
        self.pass_bytes(3 * LARGE_BYTES as u64 / 2);
        self.client.pause_clone(PauseCloneRequest { name: name.clone() }).await.unwrap();
        let id = &name["clones/".len()..];
        meddle(&self.path(&format!(".marcot-{id}/tree")));
        self.proxy.limit(None);
        let request = ResumeCloneRequest { name: name.clone(), ..Default::default() };
        self.client.resume_clone(request).await.unwrap();
        wait_for_end(&mut self.client, &name).await
    }
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 64], at).unwrap();
    file.sync_all().unwrap();
}

/// What `marcot verify` answers: exit code and output.
fn verify(directory: &Path) -> (Option<i32>, String) {
    let marcot = target_directory().join("marcot");
    let output = Command::new(marcot).arg("verify").arg(directory).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Guards the certificate's digests: they are of what arrived, so a bit that flips on this host's
/// disk is found, later by `verify`, or before the install where that was asked for. Without the
/// second reading the clone is installed with the flipped bit, and so it is with digests that are read
/// back from the disk.
#[tokio::test(flavor = "multi_thread")]
async fn a_bit_that_flips_on_the_disk_is_named_later_or_never_installed() {
    let mut net = Net::start(&[]).await;
    let end = net.flipped("full", Verification::Full).await;
    assert_eq!(end.state(), State::Failed, "{end:?}");
    let error = end.error.unwrap();
    assert_eq!(error.reason, "VERIFICATION_FAILED");
    assert!(error.message.contains("`large0` differs in bytes 4194304 to 5242880"), "{error:?}");
    assert!(!net.path("full").exists());

    let end = net.flipped("quick", Verification::Unspecified).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    let request = VerifyCloneRequest { name: end.name.clone() };
    let found = net.client.verify_clone(request).await.unwrap().into_inner();
    assert!(!found.intact && !found.modified_by_server);
    assert_eq!(found.differences, ["`large0` differs in bytes 4194304 to 5242880"]);
    assert_eq!(found.certificate_digest, end.certificate_digest);
    flip(&net.path("quick/large0"), 5_000_000);
    assert_intact(&mut net.client, &end.name).await;
}

/// Guards what is installed against whatever else writes into staging: the tree is counted, and each
/// entry is looked at.
#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_does_to_staging_is_never_installed() {
    let mut net = Net::start(&[]).await;
    let more: fn(&Path) = |tree| std::fs::write(tree.join("more"), "x").unwrap();
    let other: fn(&Path) = |tree| {
        std::fs::remove_file(tree.join("large0")).unwrap();
        std::fs::create_dir(tree.join("large0")).unwrap();
    };
    for (target, meddle, told) in [("more", more, "are listed"), ("other", other, "`large0`")] {
        let end = net.meddled(target, Verification::Unspecified, meddle).await;
        assert_eq!(end.state(), State::Failed, "{target}: {end:?}");
        let error = end.error.unwrap();
        assert_eq!(error.reason, "MANIFEST_MISMATCH", "{target}: {error:?}");
        assert!(error.message.contains(told), "{target}: {error:?}");
        assert!(!net.path(target).exists(), "{target}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_tells_intact_from_damaged_and_from_started() {
    let mut net = Net::start(&[]).await;
    let name = net.begin("copy").await;
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    let copy = net.path("copy");
    let (code, text) = verify(&copy);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.starts_with("intact: 203 files, "), "{text}");
    flip(&copy.join("small/199"), 7);
    let (code, text) = verify(&copy);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("small/199` differs in bytes 0 to 9950"), "{text}");
    std::fs::write(copy.join("ib_buffer_pool"), "").unwrap();
    let (code, text) = verify(&copy);
    assert_eq!(code, Some(3), "{text}");
    assert!(text.contains("modified by a server since it was cloned"), "{text}");
    let (code, _) = verify(&net.path("data"));
    assert_eq!(code, Some(1), "what is no clone has no certificate");
}

/// A clone of this host's own data has digests only where they were asked for; it is read for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_local_clone_has_digests_when_they_are_asked_for() {
    let data = Net::start(&[]).await;
    let directory = data.path("data").display().to_string();
    let mut net = Net::start(&["--data-directory", &directory]).await;
    for (target, verification, names) in
        [("quick", Verification::Unspecified, false), ("full", Verification::Full, true)]
    {
        let options = CloneOptions { verification: verification.into(), ..Default::default() };
        let data_directory = net.path(target).display().to_string().into_bytes().into();
        let request = CloneLocalRequest { data_directory, options: Some(options) };
        let started = net.client.clone_local(request).await.unwrap().into_inner();
        let end = wait_for_end(&mut net.client, &started.clone.unwrap().name).await;
        assert_eq!(end.state(), State::Completed, "{end:?}");
        assert_intact(&mut net.client, &end.name).await;
        flip(&net.path(target).join("large1"), 1);
        let request = VerifyCloneRequest { name: end.name };
        let found = net.client.verify_clone(request).await.unwrap().into_inner();
        assert_eq!(!found.intact, names, "{found:?}");
    }
}

/// Guards who vouches for a certificate: the key that the operator has configured, and no other.
#[tokio::test(flavor = "multi_thread")]
async fn a_signed_certificate_is_checked_by_its_key() {
    let keys = marcot_tests::new_directory();
    let key = keys.path().join("key.pem").display().to_string();
    marcot_tests::volume::run("openssl", &["genpkey", "-algorithm", "ed25519", "-out", &key]);
    let mut net = Net::start(&["--certificate-key", &key]).await;
    let name = net.begin("copy").await;
    let end = wait_for_end(&mut net.client, &name).await;
    assert_eq!(end.state(), State::Completed, "{end:?}");
    let request = VerifyCloneRequest { name };
    let signer = net.client.verify_clone(request).await.unwrap().into_inner().signer;
    assert_eq!(signer, public_key(&key));
    let by = |signer: &str| {
        let marcot = target_directory().join("marcot");
        let copy = net.path("copy");
        let mut command = Command::new(marcot);
        let output = command.arg("verify").arg(copy).args(["--signer", signer]).output().unwrap();
        output.status.code()
    };
    assert_eq!(by(&signer), Some(0));
    assert_eq!(by(&"0".repeat(64)), Some(1));
    // Whoever changes what it says has to sign it anew.
    let path = net.path("copy/.marcot-certificate");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("clones/", "clonez/", 1)).unwrap();
    assert_eq!(by(&signer), Some(1));
}

/// An Ed25519 key's public half, hexadecimal: the last 32 bytes of its DER.
fn public_key(key: &str) -> String {
    let arguments = ["pkey", "-in", key, "-pubout", "-outform", "DER"];
    let der = Command::new("openssl").args(arguments).output().unwrap().stdout;
    der[der.len() - 32..].iter().map(|byte| format!("{byte:02x}")).collect()
}
