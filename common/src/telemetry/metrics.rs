//! The metrics of one process: build, process, RPCs, and what each crate adds.
//!
//! Names have base units and, for Marcot's own, the prefix `marcot_`. No id, path or peer is ever a
//! label.

use std::{
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use prometheus_client::{encoding::text::encode, metrics::info::Info, registry::Registry};

use super::{
    certificates::{CertificateCollector, Kind},
    connections::OpenConnections,
    process::ProcessCollector,
    rpc::RpcCalls,
};
use crate::config::COMMIT;

/// What [`Metrics::encode`] is, for HTTP.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What [`Metrics::encode_plain`] is, for HTTP.
pub const PLAIN_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics of this process.
pub struct Metrics {
    registry: Mutex<Registry>,
    rpc: RpcCalls,
    certificates: CertificateCollector,
    connections: OpenConnections,
}

impl Metrics {
    /// The metrics that every service has. `role` is "donor" or "recipient".
    #[must_use]
    pub fn new(role: &'static str) -> Self {
        let mut registry = Registry::default();
        let build = Info::new(vec![
            ("version", env!("CARGO_PKG_VERSION")),
            ("commit", COMMIT),
            ("role", role),
        ]);
        registry.register("marcot_build", "What this process was built from", build);
        registry.register_collector(Box::new(ProcessCollector));
        let rpc = RpcCalls::default();
        registry.register_collector(Box::new(rpc.clone()));
        let certificates = CertificateCollector::default();
        registry.register_collector(Box::new(certificates.clone()));
        let connections = OpenConnections::default();
        registry.register_collector(Box::new(connections.clone()));
        Self { registry: Mutex::new(registry), rpc, certificates, connections }
    }

    /// Tells when a certificate ends, which is asked for at each scrape; `file` is the option that
    /// names it.
    pub fn add_certificate(
        &self,
        file: &'static str,
        expiry: impl Fn() -> Option<SystemTime> + Send + Sync + 'static,
    ) {
        self.certificates.add(Kind::Certificate, file, expiry);
    }

    /// The same of revocation lists, which run out when their CA should have issued the next ones.
    pub fn add_revocation_list(
        &self,
        file: &'static str,
        next_update: impl Fn() -> Option<SystemTime> + Send + Sync + 'static,
    ) {
        self.certificates.add(Kind::RevocationList, file, next_update);
    }

    /// Adds metrics: full names, with the prefix `marcot_`; the help without a full stop.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.lock());
    }

    /// Writes all metrics as OpenMetrics text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.lock())?;
        Ok(text)
    }

    /// The same in the older format of Prometheus, for whoever does not ask for OpenMetrics.
    pub fn encode_plain(&self) -> Result<String, fmt::Error> {
        Ok(plain(&self.encode()?))
    }

    /// Where servers count their calls.
    pub(super) fn rpc(&self) -> &RpcCalls {
        &self.rpc
    }

    /// Where listeners count their connections.
    #[must_use]
    pub fn connections(&self) -> OpenConnections {
        self.connections.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        // A panic while metrics are written leaves the registry as it was.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// OpenMetrics as Prometheus's text format 0.0.4 has it: families have the names of their samples,
/// there are no units, an info is a gauge.
fn plain(text: &str) -> String {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let types: std::collections::HashMap<&str, &str> = types.collect();
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        let head = (words.next(), words.next(), words.next(), words.next());
        let (what, name, rest) = match head {
            (Some("#"), Some("UNIT" | "EOF"), ..) => continue,
            (Some("#"), Some(what), Some(name), rest) => (what, name, rest.unwrap_or_default()),
            _ => {
                out.push_str(line);
                out.push('\n');
                continue;
            }
        };
        let (ending, kind) = match types.get(name) {
            Some(&"counter") => ("_total", "counter"),
            Some(&"info") => ("_info", "gauge"),
            Some(kind) => ("", *kind),
            None => ("", "untyped"),
        };
        let rest = if what == "TYPE" { kind } else { rest };
        out.push_str(&format!("# {what} {name}{ending} {rest}\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use prometheus_client::{metrics::counter::Counter, registry::Unit};

    use super::*;

    /// Endings that say the unit of a value.
    const UNITS: [&str; 3] = ["_seconds", "_bytes", "_ratio"];

    /// Names that are counts of things, and so have no unit.
    const COUNTS: [&str; 5] = [
        "process_open_fds",
        "process_max_fds",
        "marcot_build",
        "marcot_connections_active",
        "marcot_calls_failed",
    ];

    #[test]
    fn every_metric_has_one_help_a_type_a_unit_and_known_samples() {
        let metrics = Metrics::new("donor");
        metrics.register(|registry| {
            registry.register_with_unit(
                "marcot_wire_sent",
                "Bytes sent",
                Unit::Bytes,
                Counter::<u64>::default(),
            );
        });
        let text = metrics.encode().unwrap();
        assert!(text.ends_with("# EOF\n"));
        let mut types = BTreeMap::new();
        let mut helps = BTreeSet::new();
        for line in text.lines() {
            let words: Vec<&str> = line.splitn(4, ' ').collect();
            match words[..] {
                ["#", "HELP", name, help] => {
                    assert!(helps.insert(name.to_owned()), "{name} twice");
                    assert!(
                        help.len() > 5 && help.ends_with('.') && !help.ends_with(".."),
                        "{help}"
                    );
                }
                ["#", "TYPE", name, kind] => drop(types.insert(name.to_owned(), kind.to_owned())),
                ["#", "UNIT", name, unit] => assert!(name.ends_with(&format!("_{unit}"))),
                ["#", "EOF"] => {}
                _ => {
                    let name = line.split(['{', ' ']).next().unwrap();
                    let (family, kind) = family_of(&types, name);
                    assert!(helps.contains(family), "{name} has no help");
                    assert_eq!(kind == "counter", name.ends_with("_total"), "{name} is a {kind}");
                }
            }
        }
        for name in types.keys() {
            let has_unit = UNITS.iter().any(|unit| name.ends_with(unit));
            assert!(has_unit || COUNTS.contains(&name.as_str()), "{name} has no unit");
            assert!(
                name.starts_with("marcot_")
                    || name.starts_with("process_")
                    || name.starts_with("rpc_")
            );
        }
        assert!(types.contains_key("marcot_wire_sent_bytes"));
    }

    /// The family that a sample belongs to, and its type.
    fn family_of<'a>(types: &'a BTreeMap<String, String>, name: &str) -> (&'a str, &'a str) {
        types
            .iter()
            .filter(|(family, _)| name.starts_with(family.as_str()))
            .max_by_key(|(family, _)| family.len())
            .map(|(family, kind)| (family.as_str(), kind.as_str()))
            .unwrap_or_else(|| panic!("{name} belongs to no family"))
    }

    #[test]
    fn the_older_format_has_families_by_the_names_of_their_samples() {
        let text = "# HELP a_bytes A.\n# TYPE a_bytes counter\n# UNIT a_bytes bytes\n\
                    a_bytes_total{x=\"# TYPE\"} 1\n# HELP b B c.\n# TYPE b info\nb_info{v=\"1\"} 1\n\
                    # HELP c C.\n# TYPE c histogram\nc_sum 2.0\n# EOF\n";
        let expected = "# HELP a_bytes_total A.\n# TYPE a_bytes_total counter\n\
                        a_bytes_total{x=\"# TYPE\"} 1\n# HELP b_info B c.\n# TYPE b_info gauge\n\
                        b_info{v=\"1\"} 1\n# HELP c C.\n# TYPE c histogram\nc_sum 2.0\n";
        assert_eq!(plain(text), expected);
    }

    #[test]
    fn the_build_is_told_with_version_commit_and_role() {
        let text = Metrics::new("recipient").encode().unwrap();
        let line = format!(
            "marcot_build_info{{version=\"{}\",commit=\"{COMMIT}\",role=\"recipient\"}} 1",
            env!("CARGO_PKG_VERSION")
        );
        assert!(text.contains(&line), "{text}");
    }
}
