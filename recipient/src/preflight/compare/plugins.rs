//! Plugins: each that is active on the donor must be active in the recipient's server, or in its plugin
//! directory, from where the clone's own mysql.plugin loads it. Storage engines among them that
//! tables are in are told apart.

use std::path::Path;

use marcot_common::failure::Failure;
use marcot_engine::server_facts::Plugin;

use super::{NAMES_MAX, not_running};
use crate::preflight::{donor_facts::DonorFacts, findings::Findings, own_server::OwnServer};

/// Adds a finding for each that is missing.
pub(super) fn check(
    donor: &DonorFacts,
    own: &OwnServer,
    in_use: &[String],
    findings: &mut Findings,
) {
    const CHECK: &str = "plugins";
    let Some(theirs) = &donor.server.plugins else {
        return findings.not_checked(CHECK, "the donor does not tell its plugins");
    };
    // It may lie in another container.
    let directory = own.get("plugin_dir").map(|known| Path::new(&known.value));
    let directory = directory.filter(|path| path.is_dir());
    let mut unknown = Vec::new();
    let mut missing = Vec::new();
    for plugin in theirs {
        match look(plugin, own.plugins.as_deref(), directory) {
            Look::There => {}
            Look::Missing => missing.push(plugin),
            Look::Unknown => unknown.push(plugin.name.as_str()),
        }
    }
    for plugin in missing.iter().take(NAMES_MAX) {
        let is_used = in_use.iter().any(|engine| engine.eq_ignore_ascii_case(&plugin.name));
        findings.failed(CHECK, absent(plugin, is_used));
    }
    if missing.len() > NAMES_MAX {
        let count = missing.len() - NAMES_MAX;
        findings.warning(CHECK, format!("{count} more are missing"), String::new());
    }
    if !unknown.is_empty() {
        let shown = unknown.iter().take(NAMES_MAX).copied().collect::<Vec<_>>().join(", ");
        let text = format!(
            "whether {} of the donor's plugins are there is not known ({shown}); {}",
            unknown.len(),
            not_running(own, "plugins")
        );
        findings.not_checked(CHECK, text);
    } else if missing.is_empty() {
        findings.passed(CHECK, format!("all {} of the donor's are there", theirs.len()));
    }
    engines(in_use, own, findings);
}

enum Look {
    There,
    Missing,
    Unknown,
}

fn look(plugin: &Plugin, ours: Option<&[Plugin]>, directory: Option<&Path>) -> Look {
    let is_active =
        ours.is_some_and(|all| all.iter().any(|own| own.name.eq_ignore_ascii_case(&plugin.name)));
    match (is_active, plugin.library.as_str(), directory) {
        (true, _, _) => Look::There,
        (false, "", _) if ours.is_some() => Look::Missing,
        (false, "", _) => Look::Unknown,
        // A name, never a path: the donor has told it.
        (false, library, _) if library.contains('/') => Look::Missing,
        (false, library, Some(directory)) => {
            // MySQL names the file, MariaDB may leave its ending out.
            let named = [library.to_owned(), format!("{library}.so")];
            if named.iter().any(|name| directory.join(name).is_file()) {
                Look::There
            } else {
                Look::Missing
            }
        }
        (false, _, None) => Look::Unknown,
    }
}

fn absent(plugin: &Plugin, is_used: bool) -> Failure {
    let used = if is_used { ", and tables are in it" } else { "" };
    let action = match plugin.library.as_str() {
        "" => "run a server there that has it built in".to_owned(),
        library => format!(
            "put {library} into the recipient server's plugin_dir, or uninstall the plugin on the \
             donor"
        ),
    };
    Failure::precondition(
        "CLONE_PLUGIN_MATCH",
        format!(
            "Clone Donor plugin {} is not active in Recipient ({}){used}",
            plugin.name, plugin.kind
        ),
    )
    .mysql(3870)
    .with("action", action)
}

/// Engines that tables are in.
fn engines(in_use: &[String], own: &OwnServer, findings: &mut Findings) {
    const CHECK: &str = "storage_engines";
    if in_use.is_empty() {
        return findings.not_checked(CHECK, "the donor does not tell which engines tables are in");
    }
    let named = in_use.join(", ");
    let Some(ours) = &own.plugins else {
        let text = format!("tables are in {named}; {}", not_running(own, "engines"));
        return findings.not_checked(CHECK, text);
    };
    let is_there = |engine: &&String| {
        ours.iter().any(|own| own.kind == "STORAGE ENGINE" && own.name.eq_ignore_ascii_case(engine))
    };
    let missing: Vec<&str> =
        in_use.iter().filter(|engine| !is_there(engine)).map(String::as_str).collect();
    if missing.is_empty() {
        return findings.passed(CHECK, format!("tables are in {named}"));
    }
    findings.failed(
        CHECK,
        Failure::precondition(
            "STORAGE_ENGINE_MISSING",
            format!(
                "tables of the donor are in {}, which is not active in the recipient's server (they \
                 are in {named}); install it there, or convert the tables",
                missing.join(", ")
            ),
        )
        .mysql(3870),
    );
}
