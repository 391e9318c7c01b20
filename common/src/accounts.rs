//! The accounts file: who may log in, with what privileges, and a verifier of each password.
//!
//! The verifier is that of OPAQUE (RFC 9807) with Argon2id: the password is not in it, does not
//! cross the wire, and cannot be guessed offline without this file. The file also holds the
//! server's own OPAQUE secrets: whoever reads it can try passwords, so it must be its owner's alone.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use opaque_ke::{
    CipherSuite, ClientRegistration, ClientRegistrationFinishParameters, ServerRegistration,
    ServerSetup,
};
use rand::rngs::OsRng;
use serde::{Deserialize, Serialize};

use crate::{connection::Privilege, durable::write_atomically, reloaded::Reloaded};

/// What the log-in is made of. A change of any part makes every accounts file unreadable.
#[derive(Debug)]
pub(crate) struct Suite;

impl CipherSuite for Suite {
    type OprfCs = opaque_ke::Ristretto255;
    type KeyExchange = opaque_ke::TripleDh<opaque_ke::Ristretto255, sha2::Sha512>;
    type Ksf = argon2::Argon2<'static>;
}

/// Version of the file's format.
const VERSION: u32 = 1;

/// Longest account name, bytes.
pub const NAME_BYTES_MAX: usize = 128;

/// Most accounts in a file: it is read whole.
const ACCOUNTS_MAX: usize = 10_000;

/// What is wrong with an accounts file or a change of it.
#[derive(Debug, thiserror::Error)]
pub enum AccountsError {
    /// The file cannot be read or written.
    #[error("accounts file {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others can read the file.
    #[error(
        "accounts file {path} has mode {mode:04o}: others could read its secrets; chmod 600 {path}"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The file's content is wrong.
    #[error("accounts file {path}: {why}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Which field, and why.
        why: String,
    },
    /// The account is there already.
    #[error("account `{0}` exists; remove it first, or choose another name")]
    Exists(String),
    /// There is no such account.
    #[error("there is no account `{0}`")]
    Unknown(String),
    /// A name that no statement could name.
    #[error("`{0}` is no account name: 1 to {NAME_BYTES_MAX} bytes without control characters")]
    BadName(String),
    /// An account that may do nothing is a mistake.
    #[error("account `{0}` needs a privilege: BACKUP_ADMIN, CLONE_ADMIN or MONITOR")]
    NoPrivilege(String),
}

/// An account, without its verifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Name.
    pub name: String,
    /// Privileges, ascending.
    pub privileges: Vec<Privilege>,
    /// When it was added, RFC 3339.
    pub created: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    /// The server's OPAQUE setup, base64.
    server_setup: String,
    #[serde(default, rename = "account")]
    accounts: BTreeMap<String, Stored>,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    privileges: Vec<String>,
    /// OPAQUE registration record, base64.
    verifier: String,
    created: String,
}

/// An accounts file in memory.
pub struct Accounts {
    path: PathBuf,
    setup: ServerSetup<Suite>,
    accounts: BTreeMap<String, Stored>,
}

impl std::fmt::Debug for Accounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Accounts({}, {} accounts)", self.path.display(), self.accounts.len())
    }
}

impl Accounts {
    /// Reads a file.
    pub fn open(path: &Path) -> Result<Self, AccountsError> {
        let io = |source| AccountsError::Io { path: path.to_owned(), source };
        let malformed = |why: String| AccountsError::Malformed { path: path.to_owned(), why };
        let mode = fs::metadata(path).map_err(io)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(AccountsError::Exposed { path: path.to_owned(), mode });
        }
        let text = fs::read_to_string(path).map_err(io)?;
        let file: File = toml::from_str(&text).map_err(|e| {
            // Its own text shows the line, and what is secret in it.
            let before = e.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            malformed(format!("line {}: {}", before.matches('\n').count() + 1, e.message()))
        })?;
        if file.version != VERSION {
            let version = file.version;
            return Err(malformed(format!("version is {version}, this program reads {VERSION}")));
        }
        if file.accounts.len() > ACCOUNTS_MAX {
            return Err(malformed(format!("it has more than {ACCOUNTS_MAX} accounts")));
        }
        let setup = BASE64
            .decode(&file.server_setup)
            .ok()
            .and_then(|bytes| ServerSetup::deserialize(&bytes).ok())
            .ok_or_else(|| malformed("server_setup is damaged".to_owned()))?;
        for (name, stored) in &file.accounts {
            check_name(name)?;
            privileges_of(stored).map_err(|why| malformed(format!("account `{name}`: {why}")))?;
            verifier_of(stored)
                .ok_or_else(|| malformed(format!("account `{name}`: verifier is damaged")))?;
        }
        Ok(Self { path: path.to_owned(), setup, accounts: file.accounts })
    }

    /// Reads a file, or begins a new one if there is none. Nothing is written yet.
    pub fn open_or_create(path: &Path) -> Result<Self, AccountsError> {
        match Self::open(path) {
            Err(AccountsError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Self {
                    path: path.to_owned(),
                    setup: ServerSetup::new(&mut OsRng),
                    accounts: BTreeMap::new(),
                })
            }
            other => other,
        }
    }

    /// Adds an account. It is there once `save` has returned.
    pub fn add(
        &mut self,
        name: &str,
        password: &str,
        privileges: &[Privilege],
    ) -> Result<(), AccountsError> {
        check_name(name)?;
        if privileges.is_empty() {
            return Err(AccountsError::NoPrivilege(name.to_owned()));
        }
        if self.accounts.contains_key(name) {
            return Err(AccountsError::Exists(name.to_owned()));
        }
        let verifier = self.register(name, password).ok_or_else(|| AccountsError::Malformed {
            path: self.path.clone(),
            why: "its server_setup does not work".to_owned(),
        })?;
        let created = jiff::Timestamp::try_from(SystemTime::now()).unwrap_or_default();
        self.accounts.insert(
            name.to_owned(),
            Stored {
                privileges: written(privileges),
                verifier,
                created: created.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            },
        );
        Ok(())
    }

    /// Both sides of OPAQUE's registration, in one process.
    fn register(&self, name: &str, password: &str) -> Option<String> {
        let client = ClientRegistration::<Suite>::start(&mut OsRng, password.as_bytes()).ok()?;
        let server =
            ServerRegistration::<Suite>::start(&self.setup, client.message, name.as_bytes())
                .ok()?;
        let finished = client
            .state
            .finish(
                &mut OsRng,
                password.as_bytes(),
                server.message,
                ClientRegistrationFinishParameters::default(),
            )
            .ok()?;
        let record = ServerRegistration::<Suite>::finish(finished.message);
        Some(BASE64.encode(record.serialize()))
    }

    /// Gives an account other privileges; its password stays. They hold from the next log-in on,
    /// once `save` has returned.
    pub fn set_privileges(
        &mut self,
        name: &str,
        privileges: &[Privilege],
    ) -> Result<(), AccountsError> {
        if privileges.is_empty() {
            return Err(AccountsError::NoPrivilege(name.to_owned()));
        }
        let stored = self.accounts.get_mut(name);
        let stored = stored.ok_or_else(|| AccountsError::Unknown(name.to_owned()))?;
        stored.privileges = written(privileges);
        Ok(())
    }

    /// Removes an account. It is gone once `save` has returned.
    pub fn remove(&mut self, name: &str) -> Result<(), AccountsError> {
        let removed = self.accounts.remove(name);
        removed.map(|_| ()).ok_or_else(|| AccountsError::Unknown(name.to_owned()))
    }

    /// All accounts by name.
    #[must_use]
    pub fn list(&self) -> Vec<Account> {
        let account = |(name, stored): (&String, &Stored)| Account {
            name: name.clone(),
            privileges: privileges_of(stored).unwrap_or_default(),
            created: stored.created.clone(),
        };
        self.accounts.iter().map(account).collect()
    }

    /// Writes the file: the old one or the new one is there, whatever happens.
    pub fn save(&self) -> Result<(), AccountsError> {
        let file = File {
            version: VERSION,
            server_setup: BASE64.encode(self.setup.serialize()),
            accounts: self.accounts.clone(),
        };
        let text = toml::to_string(&file).map_err(|e| AccountsError::Malformed {
            path: self.path.clone(),
            why: e.to_string(),
        })?;
        let text = format!(
            "# Accounts of a Marcot service; written by `marcot account`. Keep it secret.\n{text}"
        );
        write_atomically(&self.path, text.as_bytes(), 0o600)
            .map_err(|source| AccountsError::Io { path: self.path.clone(), source })
    }

    pub(crate) fn setup(&self) -> &ServerSetup<Suite> {
        &self.setup
    }

    pub(crate) fn verifier(&self, name: &str) -> Option<ServerRegistration<Suite>> {
        self.accounts.get(name).and_then(verifier_of)
    }

    /// The privileges of an account.
    #[must_use]
    pub fn privileges(&self, name: &str) -> Option<Vec<Privilege>> {
        self.accounts.get(name).and_then(|stored| privileges_of(stored).ok())
    }
}

fn check_name(name: &str) -> Result<(), AccountsError> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(AccountsError::BadName(name.escape_debug().take(160).collect()));
    }
    Ok(())
}

/// Privileges as the file has them: ascending, each once.
fn written(privileges: &[Privilege]) -> Vec<String> {
    let mut privileges = privileges.to_vec();
    privileges.sort_unstable();
    privileges.dedup();
    privileges.iter().map(ToString::to_string).collect()
}

fn privileges_of(stored: &Stored) -> Result<Vec<Privilege>, String> {
    stored.privileges.iter().map(|text| text.parse()).collect()
}

fn verifier_of(stored: &Stored) -> Option<ServerRegistration<Suite>> {
    let bytes = BASE64.decode(&stored.verifier).ok()?;
    ServerRegistration::deserialize(&bytes).ok()
}

/// An accounts file that is read again when it has changed.
#[derive(Debug)]
pub struct AccountsFile(Reloaded<Accounts, AccountsError>);

impl AccountsFile {
    /// Reads the file, which must be right at the start.
    pub fn open(path: &Path) -> Result<Self, AccountsError> {
        let file = path.to_owned();
        Reloaded::open(vec![file.clone()], move || Accounts::open(&file)).map(Self)
    }

    /// The accounts as the file has them now. A file that has become wrong is an error: an account
    /// that was removed must not live on in memory.
    pub fn current(&self) -> Result<Arc<Accounts>, AccountsError> {
        self.0.current()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_kept_and_read_again_when_they_change() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("accounts.toml");
        let mut accounts = Accounts::open_or_create(&path).unwrap();
        accounts.add("clone", "s3cret", &[Privilege::BackupAdmin]).unwrap();
        assert!(matches!(
            accounts.add("clone", "x", &[Privilege::Monitor]),
            Err(AccountsError::Exists(_))
        ));
        accounts.save().unwrap();
        assert!(!fs::read_to_string(&path).unwrap().contains("s3cret"));
        let file = AccountsFile::open(&path).unwrap();
        assert_eq!(file.current().unwrap().privileges("clone"), Some(vec![Privilege::BackupAdmin]));
        let mut accounts = Accounts::open(&path).unwrap();
        accounts.remove("clone").unwrap();
        accounts.save().unwrap();
        assert_eq!(file.current().unwrap().list(), []);
    }

    #[test]
    fn privileges_change_and_the_password_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("accounts.toml");
        let mut accounts = Accounts::open_or_create(&path).unwrap();
        accounts.add("a", "b", &[Privilege::Monitor]).unwrap();
        let verifier = accounts.accounts["a"].verifier.clone();
        let asked = [Privilege::CloneAdmin, Privilege::BackupAdmin, Privilege::CloneAdmin];
        accounts.set_privileges("a", &asked).unwrap();
        accounts.save().unwrap();
        let accounts_again = Accounts::open(&path).unwrap();
        let expected = vec![Privilege::BackupAdmin, Privilege::CloneAdmin];
        assert_eq!(accounts_again.privileges("a"), Some(expected));
        assert_eq!(accounts_again.accounts["a"].verifier, verifier);
        let unknown = accounts.set_privileges("nobody", &asked);
        assert!(matches!(unknown, Err(AccountsError::Unknown(_))));
        let none = accounts.set_privileges("a", &[]);
        assert!(matches!(none, Err(AccountsError::NoPrivilege(_))));
    }

    /// Guards the check of the file's mode: without it the file is read.
    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("accounts.toml");
        Accounts::open_or_create(&path).unwrap().save().unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = Accounts::open(&path).unwrap_err().to_string();
        assert!(error.contains("0640") && error.contains("chmod 600"), "{error}");
    }

    /// Guards the file's secrets: without its own words a syntax error shows the line that it is in.
    #[test]
    fn an_error_shows_nothing_of_a_verifier() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("accounts.toml");
        let mut accounts = Accounts::open_or_create(&path).unwrap();
        accounts.add("a", "b", &[Privilege::Monitor]).unwrap();
        accounts.save().unwrap();
        let good = fs::read_to_string(&path).unwrap();
        let verifier = &accounts.accounts["a"].verifier;
        for wrong in [format!("{verifier}\n"), format!("\"{verifier}\n"), "[]".to_owned()] {
            let text = good.replace(&format!("\"{verifier}\""), &wrong);
            fs::write(&path, &text).unwrap();
            let error = Accounts::open(&path).unwrap_err().to_string();
            assert!(!error.contains(&verifier[..8]), "{error}");
            let line = text.lines().position(|line| line.starts_with("verifier")).unwrap() + 1;
            assert!(error.contains(&format!("line {line}: ")), "{error}");
        }
    }

    #[test]
    fn a_wrong_file_is_told_by_its_field() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("accounts.toml");
        let mut accounts = Accounts::open_or_create(&path).unwrap();
        accounts.add("a", "b", &[Privilege::Monitor]).unwrap();
        accounts.save().unwrap();
        let good = fs::read_to_string(&path).unwrap();
        for (from, to, expected) in [
            ("version = 1", "version = 9", "version is 9"),
            ("verifier = \"", "verifier = \"AA", "account `a`: verifier is damaged"),
            ("MONITOR", "ROOT", "account `a`: `ROOT` is no privilege"),
            ("server_setup = \"", "server_setup = \"AA", "server_setup is damaged"),
            ("created", "born", "unknown field"),
        ] {
            fs::write(&path, good.replacen(from, to, 1)).unwrap();
            let error = Accounts::open(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
