//! What the donor says of its server, checked: it is bounded, and text that a terminal can bear.

use std::collections::BTreeMap;

use marcot_common::failure::Failure;
use marcot_engine::server_facts::{Encryption, Plugin, ServerFacts};
use marcot_proto::donor::v1::GetServerInfoResponse;

/// Most of each that a donor may tell, and bytes of a name: far more than any server has.
const VARIABLES_MAX: usize = 512;
const COLLATIONS_MAX: usize = 4096;
const PLUGINS_MAX: usize = 1024;
const KEY_IDS_MAX: usize = 256;
const UNDO_FILES_MAX: usize = 128;
const NAME_BYTES_MAX: usize = 128;

/// Bytes of a variable's value: paths and lists of files.
const VALUE_BYTES_MAX: usize = 4096;

/// A donor's host and server.
#[derive(Debug, Clone, Default)]
pub(super) struct DonorFacts {
    /// Its snapshot engine.
    pub(super) engine: String,
    /// Operating system of its host.
    pub(super) os: String,
    /// Machine of its host.
    pub(super) machine: String,
    /// What its server says.
    pub(super) server: ServerFacts,
}

impl DonorFacts {
    /// Whether its engine talks to a server.
    pub(super) fn has_server(&self) -> bool {
        !self.server.variable("version").is_empty()
    }

    /// Whether that is a MySQL.
    pub(super) fn is_mysql(&self) -> bool {
        self.has_server() && !self.server.variable("version").contains("MariaDB")
    }

    /// Reads the donor's answer.
    pub(super) fn read(info: &GetServerInfoResponse) -> Result<Self, Failure> {
        for (what, count, most) in [
            ("variables", info.variables.len(), VARIABLES_MAX),
            ("collations", info.collations.len(), COLLATIONS_MAX),
            ("server_plugins", info.server_plugins.len(), PLUGINS_MAX),
            ("undo_files", info.undo_files.len(), UNDO_FILES_MAX),
            ("key_ids", info.encryption.as_ref().map_or(0, |e| e.key_ids.len()), KEY_IDS_MAX),
        ] {
            if count > most {
                return Err(Failure::peer_misbehaved(format!(
                    "GetServerInfo tells {count} {what}, {most} are allowed"
                )));
            }
        }
        let plugins = &info.server_plugins;
        for name in [&info.engine, &info.os, &info.machine]
            .into_iter()
            .chain(info.variables.keys())
            .chain(&info.collations)
            .chain(plugins.iter().flat_map(|p| [&p.name, &p.r#type, &p.library]))
        {
            check_text(name, NAME_BYTES_MAX)?;
        }
        for value in info.variables.values().chain(&info.undo_files) {
            check_text(value, VALUE_BYTES_MAX)?;
        }
        let plugin = |p: &marcot_proto::donor::v1::ServerPlugin| Plugin {
            name: p.name.clone(),
            kind: p.r#type.clone(),
            library: p.library.clone(),
        };
        let variables: BTreeMap<String, String> = info.variables.clone().into_iter().collect();
        Ok(Self {
            engine: info.engine.clone(),
            os: info.os.clone(),
            machine: info.machine.clone(),
            server: ServerFacts {
                variables,
                // A server has some of each: a donor that tells none is older than these fields.
                collations: Some(info.collations.clone()).filter(|list| !list.is_empty()),
                plugins: Some(plugins.iter().map(plugin).collect::<Vec<_>>())
                    .filter(|list| !list.is_empty()),
                encryption: info.encryption.as_ref().map(|e| Encryption {
                    tablespaces: e.tablespaces,
                    key_ids: e.key_ids.clone(),
                    redo_log: e.redo_log,
                }),
                undo_files: Some(info.undo_files.clone()).filter(|list| !list.is_empty()),
                keyring_component: None,
            },
        })
    }
}

fn check_text(text: &str, bytes_max: usize) -> Result<(), Failure> {
    // A path may hold any character but a control.
    if text.len() <= bytes_max && !text.chars().any(char::is_control) {
        return Ok(());
    }
    let (length, begin) = (text.len(), text.chars().take(40).collect::<String>());
    Err(Failure::peer_misbehaved(format!(
        "GetServerInfo has a text of {length} bytes or with a control character, `{}`; at most \
         {bytes_max} bytes are allowed",
        begin.escape_debug()
    )))
}

#[cfg(test)]
mod tests {
    use marcot_proto::donor::v1::ServerPlugin;

    use super::*;

    /// Guards the memory, the logs and the terminal of a recipient against what a donor says of
    /// itself.
    #[test]
    fn what_no_server_says_is_refused() {
        let good = GetServerInfoResponse {
            variables: [("version".to_owned(), "10.11.14-MariaDB".to_owned())].into(),
            ..Default::default()
        };
        let facts = DonorFacts::read(&good).unwrap();
        assert!(facts.has_server());
        assert_eq!(facts.server.collations, None);
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        for bad in [
            GetServerInfoResponse { os: "\x1b[31m".to_owned(), ..good.clone() },
            GetServerInfoResponse { collations: vec![long], ..good.clone() },
            GetServerInfoResponse {
                collations: vec!["c".to_owned(); COLLATIONS_MAX + 1],
                ..good.clone()
            },
            GetServerInfoResponse {
                server_plugins: vec![ServerPlugin::default(); PLUGINS_MAX + 1],
                ..good.clone()
            },
            GetServerInfoResponse { undo_files: vec!["a\nb".to_owned()], ..good.clone() },
            GetServerInfoResponse {
                variables: [("v".to_owned(), "x".repeat(VALUE_BYTES_MAX + 1))].into(),
                ..good
            },
        ] {
            assert_eq!(DonorFacts::read(&bad).unwrap_err().reason, "PEER_MISBEHAVED");
        }
    }
}
