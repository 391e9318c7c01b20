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

impl Encryption {
    /// Whether a server needs keys to read the data.
    #[must_use]
    pub fn needs_keys(&self) -> bool {
        self.tablespaces > 0 || self.redo_log
    }
}

impl ServerFacts {
    /// A variable; empty when the server has none of that name.
    #[must_use]
    pub fn variable(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }
}
