//! Which kind of server it is.

/// MariaDB or MySQL: the same engine underneath, other locks, logs and words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flavor {
    /// MariaDB.
    MariaDb,
    /// MySQL, and what is made of it.
    MySql,
}

impl Flavor {
    /// By what the server says is its version.
    #[must_use]
    pub(super) fn of_version(version: &str) -> Self {
        if version.contains("MariaDB") { Self::MariaDb } else { Self::MySql }
    }
}
