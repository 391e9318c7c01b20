//! What a database server says of itself, as far as a donor's and a recipient's are compared.

use std::collections::BTreeMap;

/// A server's own account of itself. What it was not asked for, or would not tell, is `None`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerFacts {
    /// Its variables, by name, among those that are compared or say where files are.
    pub variables: BTreeMap<String, String>,
    /// Names of all its collations, ascending.
    pub collations: Option<Vec<String>>,
    /// Its active plugins, ascending by name.
    pub plugins: Option<Vec<Plugin>>,
    /// What is encrypted at rest.
    pub encryption: Option<Encryption>,
    /// Names of the files of its undo tablespaces, as it names them.
    pub undo_files: Option<Vec<String>>,
    /// Of a MySQL: whether a component that keeps keys is active, which no list of plugins has.
    pub keyring_component: Option<bool>,
}

/// An active plugin.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Plugin {
    /// Its name.
    pub name: String,
    /// What it is, e.g. `STORAGE ENGINE`.
    pub kind: String,
    /// The library that it comes from; empty: built into the server.
    pub library: String,
}

/// MariaDB's: whether tables of Aria are encrypted, the server's own among them.
const ARIA_ENCRYPTS: &str = "aria_encrypt_tables";

/// Encryption at rest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encryption {
    /// Encrypted tablespaces.
    pub tablespaces: u64,
    /// Ids of their keys, ascending, where the server tells them.
    pub key_ids: Vec<u32>,
    /// Whether the redo log is encrypted.
    pub redo_log: bool,
}

impl ServerFacts {
    /// What is encrypted at rest among what a copy holds, and so needs keys: nothing, if that is so;
    /// `None` when the server does not tell all of it.
    #[must_use]
    pub fn encrypted(&self) -> Option<Vec<String>> {
        let Encryption { tablespaces, key_ids, redo_log } = self.encryption.as_ref()?;
        let ids = key_ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let aria = self.variable(ARIA_ENCRYPTS);
        let parts = [
            (*tablespaces > 0).then(|| match ids.as_str() {
                "" => format!("{tablespaces} tablespaces"),
                ids => format!("{tablespaces} tablespaces (keys {ids})"),
            }),
            redo_log.then(|| "the redo log".to_owned()),
            aria.eq_ignore_ascii_case("ON").then(|| format!("Aria tables ({ARIA_ENCRYPTS})")),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        let is_told = !self.variable("version").contains("MariaDB") || !aria.is_empty();
        (is_told || !parts.is_empty()).then_some(parts)
    }

    /// Whether the binary log is encrypted, which a copy of a MariaDB does not hold.
    #[must_use]
    pub fn encrypts_binlog(&self) -> bool {
        self.variable("encrypt_binlog").eq_ignore_ascii_case("ON")
    }

    /// A variable; empty when the server has none of that name.
    #[must_use]
    pub fn variable(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }
}
