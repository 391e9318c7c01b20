//! Connections that are open, by what they are protected with.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use prometheus_client::{collector::Collector, encoding::DescriptorEncoder};

use super::families::{Families, number};

/// What protects a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// TLS.
    Tls,
    /// Nothing.
    Plaintext,
    /// It does not leave the host: a Unix socket.
    Local,
}

impl Protection {
    const ALL: [Self; 3] = [Self::Tls, Self::Plaintext, Self::Local];

    fn label(self) -> &'static str {
        match self {
            Self::Tls => "tls",
            Self::Plaintext => "plaintext",
            Self::Local => "local",
        }
    }
}

/// Counts open connections; clones share the counts.
#[derive(Debug, Clone, Default)]
pub struct OpenConnections(Arc<[AtomicU64; 3]>);

impl OpenConnections {
    /// Counts one, for as long as what is returned lives.
    #[must_use]
    pub fn count(&self, protection: Protection) -> CountedConnection {
        self.0[protection as usize].fetch_add(1, Ordering::Relaxed);
        CountedConnection { counts: self.clone(), protection }
    }
}

/// A connection that is counted.
#[derive(Debug)]
pub struct CountedConnection {
    counts: OpenConnections,
    protection: Protection,
}

impl Drop for CountedConnection {
    fn drop(&mut self) {
        self.counts.0[self.protection as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

impl Collector for OpenConnections {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let samples = Protection::ALL.map(|protection| {
            let open = self.0[protection as usize].load(Ordering::Relaxed);
            ([("protection", protection.label())], number(open))
        });
        let help = "Connections that are open, by what protects them.";
        Families::new(encoder).gauges("marcot_connections_active", help, samples)
    }
}
