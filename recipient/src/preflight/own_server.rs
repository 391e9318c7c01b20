//! What is known of the server that is to run on the clone: as the operator or the caller expects it,
//! as it says while it runs, or as its program says.

use std::collections::BTreeMap;

use marcot_common::failure::Failure;
use marcot_engine::{innodb::facts, server_facts::Plugin};

use super::{binary::ServerBinary, findings::Findings};
use crate::{request::CloneRequest, settings::Settings, source::blocking};

/// Variables whose values may be expected.
pub const EXPECTABLE: [&str; 12] = [
    "version",
    "version_compile_os",
    "version_compile_machine",
    "innodb_page_size",
    "innodb_data_file_path",
    "innodb_undo_tablespaces",
    "character_set_server",
    "character_set_filesystem",
    "collation_server",
    "lower_case_table_names",
    "max_allowed_packet",
    "plugin_dir",
];

/// Longest value that may be expected, bytes.
const VALUE_BYTES_MAX: usize = 1024;

/// Says what is wrong with a value that is expected.
pub fn check_expected(name: &str, value: &str) -> Result<(), String> {
    if !EXPECTABLE.contains(&name) {
        return Err(format!(
            "`{}` is not compared: {} are",
            name.escape_debug(),
            EXPECTABLE.join(", ")
        ));
    }
    if value.is_empty() || value.len() > VALUE_BYTES_MAX || value.chars().any(char::is_control) {
        let length = value.len();
        return Err(format!(
            "the value of {name} has {length} bytes or a control character; 1 to {VALUE_BYTES_MAX} \
             bytes are allowed"
        ));
    }
    Ok(())
}

/// The server on the recipient's side.
#[derive(Debug, Default)]
pub(super) struct OwnServer {
    pub(super) values: BTreeMap<String, Known>,
    /// Names of its collations.
    pub(super) collations: Option<Vec<String>>,
    /// Its active plugins.
    pub(super) plugins: Option<Vec<Plugin>>,
    /// Of a MySQL: whether a component that keeps keys is active.
    pub(super) keyring_component: Option<bool>,
    /// Why nothing more is known.
    pub(super) why_not: String,
}

/// A variable's value, and where it is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) value: String,
    pub(super) origin: &'static str,
}

impl OwnServer {
    /// A variable.
    pub(super) fn get(&self, name: &str) -> Option<&Known> {
        self.values.get(name)
    }

    /// Takes over what is not known yet.
    pub(super) fn add(
        &mut self,
        values: impl IntoIterator<Item = (String, String)>,
        origin: &'static str,
    ) {
        for (name, value) in values {
            self.values.entry(name).or_insert(Known { value, origin });
        }
    }

    /// Variables, by name.
    pub(super) fn variables(&self) -> BTreeMap<String, String> {
        self.values.iter().map(|(name, known)| (name.clone(), known.value.clone())).collect()
    }

    /// Asks everybody there is. What is expected goes before what is said; the program goes before
    /// the running server where the clone is not for that one.
    pub(super) async fn ask(
        request: &CloneRequest,
        settings: &Settings,
        findings: &mut Findings,
    ) -> Self {
        let mut own = Self::default();
        own.add(request.expected_server.clone(), "as the call expects it");
        own.add(settings.expected_server.clone(), "as --expect-server has it");
        let mut why_not = Vec::new();
        let binary_first = !request.replaces && settings.server_binary.is_some();
        if binary_first {
            own.ask_binary(settings.server_binary.as_ref(), findings).await;
            why_not
                .push("--server-binary is asked, as no server runs on a new directory".to_owned());
        } else {
            if let Err(why) = own.ask_running(settings).await {
                why_not.push(why);
            }
            own.ask_binary(settings.server_binary.as_ref(), findings).await;
        }
        if settings.server_binary.is_none() && own.plugins.is_none() {
            why_not.push(
                "give --database-socket of the server, --server-binary, or --expect-server"
                    .to_owned(),
            );
        }
        own.why_not = why_not.join("; ");
        own
    }

    async fn ask_running(&mut self, settings: &Settings) -> Result<(), String> {
        let database = settings.engine.as_ref().map(|engine| engine.database.clone());
        let Some(database) = database.filter(|d| d.socket.is_some() || d.url.is_some()) else {
            return Err("no server on this side is known".to_owned());
        };
        let asked = blocking(move || facts::ask(&database)).await;
        let facts = asked.map_err(|failure: Failure| failure.message)?;
        self.add(facts.variables, "of the running server");
        self.collations = facts.collations;
        self.plugins = facts.plugins;
        self.keyring_component = facts.keyring_component;
        Ok(())
    }

    async fn ask_binary(&mut self, binary: Option<&ServerBinary>, findings: &mut Findings) {
        const CHECK: &str = "server_binary";
        let Some(binary) = binary else { return };
        match binary.ask().await {
            Ok(variables) => {
                let version = variables.get("version").cloned().unwrap_or_default();
                findings.passed(CHECK, format!("{} is {version}", binary.path.display()));
                self.add(variables, "of --server-binary");
            }
            Err(failure) => findings.failed(CHECK, failure),
        }
    }
}
