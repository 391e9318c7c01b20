//! The identities file, and certificates that are looked up in it: no panic, and nobody is known
//! without a privilege or by a token that is too short.
//!
//! Input, up to a NUL: a file, in which `@DIGEST@` stands for that of a token; behind it: a
//! certificate, DER.

use marcot_common::{
    connection::Identity,
    identities::{Identities, IdentitiesFile},
};
use rustls_pki_types::CertificateDer;

use crate::scratch;

/// The parser's files.
pub const FILES: &[&str] = &["common/src/identities.rs", "common/src/tls/certificate.rs"];

const TOKEN: &str = "0123456789abcdef0123456789abcdef";
const DIGEST: &str = "3eb1bd439947eb762998e566ccc2e099c791118b2f40579cc4f7da2b5061b7f9";

/// Of a key that nobody has; its names are spiffe://a/b, host.db and *.db.
const CERTIFICATE: &[u8] = include_bytes!("../../identity.der");

/// Runs one input.
pub fn run(data: &[u8]) {
    let end = data.iter().position(|&byte| byte == 0);
    let (text, der) = end.map_or((data, &[][..]), |end| (&data[..end], &data[end + 1..]));
    let Ok(text) = std::str::from_utf8(text) else { return };
    let text = text.replace("@DIGEST@", DIGEST);
    let path = scratch::file("identities.toml", text.as_bytes());
    if Identities::open(&path).is_err() {
        assert!(IdentitiesFile::open(&path).is_err());
        return;
    }
    let file = IdentitiesFile::open(&path).expect("it was right a moment ago");
    let is_right = |identity: &Identity| {
        let ascending = identity.privileges.windows(2).all(|pair| pair[0] < pair[1]);
        ascending && !identity.privileges.is_empty() && identity.snapshot.is_none()
    };
    for der in [der, CERTIFICATE] {
        let known = file.of_certificate(&CertificateDer::from(der));
        assert!(known.is_none_or(|known| is_right(&known)));
    }
    let names_any = file.current().is_some_and(|now| now.names_certificates());
    assert!(!names_any || text.contains("certificate"));
    for uid in [0, 1, 12345, u32::MAX] {
        assert!(file.of_user(uid).is_none_or(|known| is_right(&known)));
    }
    let by_token = file.of_token(TOKEN);
    assert!(by_token.is_none_or(|known| is_right(&known)));
    // What the file has as a name, or as a digest, is no token.
    for word in text.split(['"', '.', ']', '\n']) {
        let known = file.of_token(word);
        assert!(known.is_none() || word == TOKEN, "known by `{word}`");
    }
    assert_eq!(file.of_token(&TOKEN[1..]), None);
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let text = "[certificate.\"spiffe://a/b\"]\nprivileges = [\"BACKUP_ADMIN\", \"clone_admin\"]\n\
                [token.nightly]\nsha256 = \"@DIGEST@\"\nprivileges = [\"MONITOR\"]\n\
                [unix_user.root]\nprivileges = [\"MONITOR\"]\n[unix_user.12345]\n\
                privileges = [\"MONITOR\", \"MONITOR\"]\n";
    let mut seeds: Vec<Vec<u8>> = [
        "",
        text,
        "[certificate.\"Host.DB\"]\nprivileges = [\"MONITOR\"]\n",
        "[certificate.a]\nprivileges = []\n",
        "[certificate.a]\nprivileges = [\"ROOT\"]\n",
        "[token.a]\nsha256 = \"ab\"\nprivileges = [\"MONITOR\"]\n",
        "[unix_user.\"no such\"]\nprivileges = [\"MONITOR\"]\n",
        "[user.a]\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    seeds.push([text.as_bytes(), &[0], CERTIFICATE].concat());
    seeds
}
