//! The operator's command at the end of a clone: a mail, a webhook, a label on a pod.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt as _,
    time::Duration,
};

use marcot_proto::recipient::v1 as pb;
use tracing::warn;

use super::Clones;
use crate::server_control::hooks::run_command;

/// Longest life of the command: a stop of the service waits for it.
const COMMAND_MAX: Duration = Duration::from_secs(60);

impl Clones {
    /// Runs the command, if there is one. How it ends changes nothing in the clone.
    pub(super) fn tell_end(&self, clone: &pb::Clone) {
        let Some(command) = self.settings.end_command.clone() else { return };
        let variables = variables(clone);
        let name = clone.name.clone();
        self.tasks.spawn(async move {
            let ran = run_command(&command, COMMAND_MAX, |child| {
                child.envs(variables);
            });
            if let Err(failure) = ran.await {
                warn!(clone = %name, error = %failure, "the command at the end of a clone failed");
            }
        });
    }
}

/// What the command is told in its environment; never a secret.
fn variables(clone: &pb::Clone) -> [(&'static str, OsString); 7] {
    let state = clone.state().as_str_name().trim_start_matches("STATE_");
    let error = clone.error.clone().unwrap_or_default();
    [
        ("MARCOT_CLONE", clone.name.clone().into()),
        ("MARCOT_CLONE_STATE", state.into()),
        ("MARCOT_CLONE_SOURCE", clone.source.clone().into()),
        ("MARCOT_CLONE_DESTINATION", OsStr::from_bytes(&clone.destination).into()),
        ("MARCOT_CLONE_REQUEST_ID", clone.request_id.clone().into()),
        ("MARCOT_CLONE_REASON", error.reason.into()),
        ("MARCOT_CLONE_MESSAGE", error.message.into()),
    ]
}
