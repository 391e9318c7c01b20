//! What an engine tells of its work while it works.

use std::{fmt, sync::Arc, time::Duration};

/// What a server's users have waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocked {
    /// DDL, and MariaDB's writes to tables without transactions.
    Ddl,
    /// Commits.
    Commits,
}

type Tell = dyn Fn(Blocked, Duration) + Send + Sync;

/// Is told of every time that something was blocked, also where what it was for has failed.
#[derive(Clone, Default)]
pub struct Observer(Option<Arc<Tell>>);

impl Observer {
    /// Tells `tell`, which must not wait.
    #[must_use]
    pub fn new(tell: impl Fn(Blocked, Duration) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(tell)))
    }

    pub(crate) fn blocked(&self, what: Blocked, how_long: Duration) {
        if let Some(tell) = &self.0 {
            tell(what, how_long);
        }
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}
