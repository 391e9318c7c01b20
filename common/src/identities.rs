//! The identities file: who may call without a password, known by a client certificate, a token, or
//! as a user of this host who comes by a Unix socket.
//!
//! ```toml
//! [certificate."spiffe://cluster.local/ns/db/sa/operator"]
//! privileges = ["BACKUP_ADMIN", "CLONE_ADMIN"]
//!
//! [token.nightly]
//! sha256 = "..."    # of the token, which has 32 random bytes or more: openssl rand -hex 32
//! privileges = ["BACKUP_ADMIN"]
//!
//! [unix_user.mysql]       # a name, or a number in quotes
//! privileges = ["CLONE_ADMIN"]
//! ```
//!
//! The file holds no secrets, so that others may read it; but whoever could write it could give
//! himself privileges.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::pki_types::CertificateDer;
use serde::Deserialize;
use tracing::warn;

use crate::{
    connection::{Identity, Privilege},
    reloaded::Reloaded,
    tls::{certificate::names, sha256},
};

/// Most identities in a file: it is read whole.
const IDENTITIES_MAX: usize = 10_000;

/// Shortest token, characters: 32 random bytes have 43 in base64 and 64 in hexadecimal digits.
const TOKEN_CHARS_MIN: usize = 32;

/// What is wrong with an identities file.
#[derive(Debug, thiserror::Error)]
pub enum IdentitiesError {
    /// The file cannot be read.
    #[error("identities file {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others can write the file.
    #[error(
        "identities file {path} has mode {mode:04o}: others could give themselves privileges; \
         chmod go-w {path}"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file's content is wrong.
    #[error("identities file {path}: {why}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which field, and why.
        why: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    certificate: BTreeMap<String, Certificate>,
    #[serde(default)]
    token: BTreeMap<String, Token>,
    #[serde(default)]
    unix_user: BTreeMap<String, Certificate>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Certificate {
    privileges: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Token {
    sha256: String,
    privileges: Vec<String>,
}

/// An identities file in memory.
#[derive(Debug, Default)]
pub struct Identities {
    /// By SPIFFE URI or DNS name, lower-case.
    certificates: BTreeMap<String, Vec<Privilege>>,
    /// By SHA-256 of the token.
    tokens: BTreeMap<[u8; 32], (String, Vec<Privilege>)>,
    /// By number of the user.
    users: BTreeMap<u32, (String, Vec<Privilege>)>,
}

impl Identities {
    /// Reads a file.
    pub fn open(path: &Path) -> Result<Self, IdentitiesError> {
        let io = |source| IdentitiesError::Io { path: path.to_owned(), source };
        let malformed = |why: String| IdentitiesError::Malformed { path: path.to_owned(), why };
        let mode = fs::metadata(path).map_err(io)?.permissions().mode() & 0o777;
        if mode & 0o022 != 0 {
            return Err(IdentitiesError::Exposed { path: path.to_owned(), mode });
        }
        let text = fs::read_to_string(path).map_err(io)?;
        let file: File = toml::from_str(&text).map_err(|e| malformed(e.to_string()))?;
        let count = file.certificate.len() + file.token.len() + file.unix_user.len();
        if count > IDENTITIES_MAX {
            return Err(malformed(format!("it has {count} identities, {IDENTITIES_MAX} at most")));
        }
        let mut identities = Self::default();
        for (name, stored) in file.certificate {
            let privileges = privileges(&stored.privileges)
                .map_err(|why| malformed(format!("certificate `{name}`: {why}")))?;
            identities.certificates.insert(name.to_ascii_lowercase(), privileges);
        }
        for (name, stored) in file.token {
            let wrong = |why: String| malformed(format!("token `{name}`: {why}"));
            let privileges = privileges(&stored.privileges).map_err(wrong)?;
            let digest = crate::tls::Fingerprint::parse(&stored.sha256).map_err(|_| {
                let text = "sha256 is no SHA-256: 64 hexadecimal digits, as printf %s TOKEN | \
                            sha256sum prints";
                wrong(text.to_owned())
            })?;
            identities.tokens.insert(digest.0, (name, privileges));
        }
        for (name, stored) in file.unix_user {
            let wrong = |why: String| malformed(format!("unix_user `{name}`: {why}"));
            let privileges = privileges(&stored.privileges).map_err(wrong)?;
            let known = || uzers::get_user_by_name(&name).map(|user| user.uid());
            let uid = name.parse().ok().or_else(known);
            let uid = uid.ok_or_else(|| wrong("there is no such user on this host".to_owned()))?;
            identities.users.insert(uid, (name, privileges));
        }
        Ok(identities)
    }

    /// Whether client certificates are named.
    #[must_use]
    pub fn names_certificates(&self) -> bool {
        !self.certificates.is_empty()
    }

    /// Who shows this certificate, which was verified: the first of its URIs, then of its DNS
    /// names, that the file has.
    fn of_certificate(&self, certificate: &CertificateDer<'_>) -> Option<Identity> {
        names(certificate).into_iter().find_map(|name| {
            let privileges = self.certificates.get(&name.to_ascii_lowercase())?.clone();
            Some(Identity { user: name, privileges, snapshot: None })
        })
    }

    fn of_user(&self, uid: u32) -> Option<Identity> {
        let (user, privileges) = self.users.get(&uid)?.clone();
        Some(Identity { user, privileges, snapshot: None })
    }

    fn of_token(&self, token: &str) -> Option<Identity> {
        if token.len() < TOKEN_CHARS_MIN {
            return None;
        }
        // Looking up a digest tells by its time at most the digest's first bytes, which lead nobody
        // to the token.
        let (user, privileges) = self.tokens.get(&sha256(token.as_bytes()))?.clone();
        Some(Identity { user, privileges, snapshot: None })
    }
}

fn privileges(texts: &[String]) -> Result<Vec<Privilege>, String> {
    if texts.is_empty() {
        return Err("it needs a privilege: BACKUP_ADMIN, CLONE_ADMIN or MONITOR".to_owned());
    }
    let mut privileges: Vec<_> = texts.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    privileges.sort_unstable();
    privileges.dedup();
    Ok(privileges)
}

/// An identities file that is read again when it has changed. One that has become wrong knows
/// nobody.
#[derive(Debug)]
pub struct IdentitiesFile(Reloaded<Identities, IdentitiesError>);

impl IdentitiesFile {
    /// Reads the file, which must be right at the start.
    pub fn open(path: &Path) -> Result<Self, IdentitiesError> {
        let file = path.to_owned();
        Reloaded::open(vec![file.clone()], move || Identities::open(&file)).map(Self)
    }

    /// What the file says now.
    pub fn current(&self) -> Option<Arc<Identities>> {
        self.0
            .current()
            .inspect_err(|e| warn!(error = %e, "nobody is known by certificate or token"))
            .ok()
    }

    /// Who shows this certificate.
    #[must_use]
    pub fn of_certificate(&self, certificate: &CertificateDer<'_>) -> Option<Identity> {
        self.current()?.of_certificate(certificate)
    }

    /// Who this user of this host is.
    #[must_use]
    pub fn of_user(&self, uid: u32) -> Option<Identity> {
        self.current()?.of_user(uid)
    }

    /// Whose token this is.
    #[must_use]
    pub fn of_token(&self, token: &str) -> Option<Identity> {
        self.current()?.of_token(token)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SanType, string::Ia5String};

    use super::*;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    fn file(text: &str) -> (tempfile::TempDir, Result<Identities, IdentitiesError>) {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("identities.toml");
        fs::write(&path, text).unwrap();
        let read = Identities::open(&path);
        (home, read)
    }

    fn certificate(uris: &[&str], names: &[&str]) -> CertificateDer<'static> {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        for uri in uris {
            let uri = Ia5String::try_from(uri.to_string()).unwrap();
            params.subject_alt_names.push(SanType::URI(uri));
        }
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_is_known_by_its_uri_or_its_name() {
        let text = "[certificate.\"spiffe://a/b\"]\nprivileges = [\"CLONE_ADMIN\", \"MONITOR\"]\n\
                    [certificate.\"Host.db\"]\nprivileges = [\"monitor\"]\n";
        let (_home, identities) = file(text);
        let identities = identities.unwrap();
        let known = |uris: &[&str], names: &[&str]| {
            let identity = identities.of_certificate(&certificate(uris, names));
            identity.map(|identity| (identity.user, identity.privileges))
        };
        let admin = vec![Privilege::CloneAdmin, Privilege::Monitor];
        assert_eq!(
            known(&["spiffe://a/b"], &["x"]),
            Some(("spiffe://a/b".to_owned(), admin.clone()))
        );
        assert_eq!(known(&["spiffe://a/b"], &["host.db"]).unwrap().1, admin);
        assert_eq!(known(&[], &["y", "host.DB"]).unwrap().1, vec![Privilege::Monitor]);
        for (uris, names) in
            [(&["spiffe://a/bc"][..], &["x"][..]), (&[], &["x.host.db"]), (&[], &[])]
        {
            assert_eq!(known(uris, names), None);
        }
    }

    #[test]
    fn a_token_is_known_by_its_digest_and_a_short_one_never() {
        let digest = |token: &str| crate::tls::Fingerprint(sha256(token.as_bytes())).to_string();
        let text = format!(
            "[token.a]\nsha256 = \"{}\"\nprivileges = [\"MONITOR\"]\n\
             [token.short]\nsha256 = \"{}\"\nprivileges = [\"MONITOR\"]\n",
            digest(TOKEN),
            digest("short")
        );
        let (_home, identities) = file(&text);
        let identities = identities.unwrap();
        assert_eq!(identities.of_token(TOKEN).unwrap().user, "a");
        assert_eq!(identities.of_token(&TOKEN.replace('0', "1")), None);
        assert_eq!(identities.of_token("short"), None);
    }

    #[test]
    fn a_user_of_this_host_is_known_by_name_or_number() {
        let text = "[unix_user.root]\nprivileges = [\"CLONE_ADMIN\"]\n\
                    [unix_user.12345]\nprivileges = [\"MONITOR\"]\n";
        let (_home, identities) = file(text);
        let identities = identities.unwrap();
        let known = |uid| identities.of_user(uid).map(|identity| identity.user);
        assert_eq!(known(0).as_deref(), Some("root"));
        assert_eq!(known(12345).as_deref(), Some("12345"));
        assert_eq!(known(12346), None);
    }

    #[test]
    fn a_wrong_file_is_told_by_its_field() {
        for (text, part) in [
            ("[certificate.a]\nprivileges = []", "certificate `a`: it needs a privilege"),
            ("[certificate.a]\nprivileges = [\"ROOT\"]", "`ROOT` is no privilege"),
            ("[token.a]\nsha256 = \"ab\"\nprivileges = [\"MONITOR\"]", "token `a`: sha256"),
            (
                "[unix_user.\"no such\"]\nprivileges = [\"MONITOR\"]",
                "unix_user `no such`: there is",
            ),
            ("[user.a]\n", "unknown field"),
        ] {
            let error = file(text).1.unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    /// Guards the check of the file's mode: without it the file is read.
    #[test]
    fn a_file_that_others_can_write_is_refused() {
        let (home, read) = file("");
        read.unwrap();
        let path = home.path().join("identities.toml");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
        let error = Identities::open(&path).unwrap_err().to_string();
        assert!(error.contains("0664") && error.contains("chmod go-w"), "{error}");
    }
}
