//! The command is an image's entrypoint script, which sets a server up and then runs it.

use std::{os::unix::fs::PermissionsExt as _, path::PathBuf};

use marcot_proto::recipient::v1::{RollbackCloneRequest, State};
use marcot_tests::{site::Site, wait_for};

/// Writes a script, and returns the server's command behind it.
pub(crate) fn behind_script(site: &Site, text: &str) -> Vec<String> {
    let script: PathBuf = site.path("entrypoint");
    std::fs::write(&script, format!("#!/bin/sh\n{text}\n")).expect("writable");
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&script, mode).expect("our own file");
    let mut command = vec![script.display().to_string()];
    command.extend(site.command());
    command
}

/// Servers that have ended cleanly, by their log. (InnoDB says `Shutdown completed` for itself.)
pub(crate) fn clean_ends(log: &str) -> usize {
    log.lines().filter(|line| line.ends_with(": Shutdown complete")).count()
}

/// Guards an image's own entrypoint: it is run for every start, with the start's arguments at the end,
/// never on a directory that it would set up anew; and the server behind one that does not become it
/// is stopped and waited for as well.
#[tokio::test(flavor = "multi_thread")]
async fn an_entrypoint_script_is_run_at_every_start_of_an_install_and_of_its_roll_back() {
    for run in ["exec \"$@\"", "\"$@\" &\nwait"] {
        let site = Site::new();
        let text = format!(
            "for last; do :; done\necho \"$last\" >> {calls}\n\
             [ -d {data}/mysql ] || {{ echo empty >> {calls}; exit 3; }}\n{run}",
            calls = site.path("calls").display(),
            data = site.data.display(),
        );
        let mut at = site.supervise_command(&[], &behind_script(&site, &text));
        site.wait_for_server();
        let (mut client, clone) = site.replace(&at).await;
        assert_eq!(clone.state(), State::Completed, "{run}: {clone:?}");
        assert_eq!(site.mark(), "new");
        let request = RollbackCloneRequest { name: clone.name.clone(), discard_writes: true };
        client.rollback_clone(request).await.expect("it is rolled back");
        site.wait_for_server();
        assert_eq!(site.mark(), "old");
        assert_eq!(site.damaged_tables(), "");
        let calls = std::fs::read_to_string(site.path("calls")).expect("a file");
        let own = site.command().pop().expect("an argument");
        // The first start on the clone, and the one that opens it, end with the same argument.
        let expected = [&own, "--event-scheduler=OFF", "--event-scheduler=OFF", &own];
        assert_eq!(calls.lines().collect::<Vec<_>>(), expected, "{run}");
        let log = || at.0.log();
        let starts = log().matches("ready for connections").count();
        wait_for("each server but the last to have been stopped cleanly", || {
            (clean_ends(&log()) == starts - 1).then_some(())
        });
        let code = if run.starts_with("exec") { 0 } else { 128 + 15 };
        assert_eq!(at.0.terminate(), Some(code), "{}", at.0.log());
        assert_eq!(site.server_pid(), None);
    }
}
