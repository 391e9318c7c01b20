//! Who vouches for a certificate: an Ed25519 key of the operator's.

use std::path::Path;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use marcot_common::failure::Failure;
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};

use super::hexadecimal;

/// What is signed begins with this: nothing else is signed with the key by this program.
const DOMAIN: &[u8] = b"marcot certificate v1\0";

/// First words of a signature's line.
pub(super) const PREFIX: &str = "signature ed25519 ";

/// Signs certificates.
#[derive(Debug)]
pub struct Signer(Ed25519KeyPair);

impl Signer {
    /// Reads an Ed25519 key, PKCS#8 in PEM, as `openssl genpkey -algorithm ed25519` writes it.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let bad = |why: String| {
            Failure::invalid(
                "BAD_CERTIFICATE_KEY",
                format!(
                    "certificate key {}: {why}; `openssl genpkey -algorithm ed25519` makes one",
                    path.display()
                ),
            )
        };
        let der = PrivatePkcs8KeyDer::from_pem_file(path).map_err(|e| bad(e.to_string()))?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|e| bad(format!("no Ed25519 key in PKCS#8 ({e})")))?;
        Ok(Self(pair))
    }

    /// The line that vouches for what has this digest.
    pub(super) fn line(&self, digest: &[u8; 32]) -> String {
        let signature = self.0.sign(&message(digest));
        let key = hexadecimal(self.0.public_key().as_ref());
        format!("{PREFIX}{key} {}", hexadecimal(signature.as_ref()))
    }
}

fn message(digest: &[u8; 32]) -> Vec<u8> {
    [DOMAIN, digest].concat()
}

/// Checks a signature's line; returns the key that has signed, hexadecimal.
pub(super) fn check(line: &str, digest: &[u8; 32]) -> Option<String> {
    let (key, signature) = line.strip_prefix(PREFIX)?.split_once(' ')?;
    let verifier = UnparsedPublicKey::new(&ED25519, bytes(key, 32)?);
    verifier.verify(&message(digest), &bytes(signature, 64)?).ok()?;
    Some(key.to_owned())
}

/// Reads hexadecimal digits of so many bytes.
pub(super) fn bytes(text: &str, count: usize) -> Option<Vec<u8>> {
    if text.len() != 2 * count || !text.is_ascii() {
        return None;
    }
    (0..count).map(|n| u8::from_str_radix(&text[2 * n..2 * n + 2], 16).ok()).collect()
}
