//! A site's server that belongs to nobody here: commands stop and start it, or a person does.

use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, kill_process};

use super::Site;
use crate::{Recipient, mariadb, volume::run, wait_for};

impl Site {
    /// Starts the server, as a service manager does.
    pub fn start_server(&self) {
        run("sh", &["-c", &self.launch("true")]);
        self.wait_for_server();
    }

    /// A recipient with commands that stop and start the server, with more options.
    #[must_use]
    pub fn with_hooks(&self, options: &[&str], environment: &[(&str, &str)]) -> Recipient {
        let at = shown(&self.socket);
        // As a service manager would: the closed start has its own arguments, and one server runs. One
        // that is on its way down is waited for.
        let start = format!(
            "echo $MARCOT_START >> {told}; while [ -e {waits} ]; do sleep 0.1; done; \
             for i in $(seq 50); do [ -e /proc/$(tail -n 1 {pids})/exe ] || break; sleep 0.2; done; \
             [ -e /proc/$(tail -n 1 {pids})/exe ] && {{ echo twice >> {told}; exit 1; }}; \
             [ -e {fails} ] && exit 1; [ \"$MARCOT_START\" = first ] && closed=--skip-networking; \
             [ -e {late} ] && late='sleep 2'; {}",
            self.launch("$late"),
            told = shown(&self.path("told")),
            pids = shown(&self.pids()),
            late = shown(&self.path("late")),
            waits = shown(&self.path("start-waits")),
            fails = shown(&self.path("start-fails")),
        );
        // What `mariadb-admin shutdown` does, or a service manager that does not wait.
        let stop = format!(
            "[ -e {by_signal} ] && exec kill -TERM $(tail -n 1 {pids}); \
             mariadb --no-defaults --user=root --socket={at} --execute=SHUTDOWN; [ ! -e {fails} ]",
            by_signal = shown(&self.path("stop-by-signal")),
            pids = shown(&self.pids()),
            fails = shown(&self.path("stop-fails"))
        );
        let own = ["--database-socket", &at, "--database-user", "root"];
        let limit: &[&str] = match options.contains(&"--stop-timeout") {
            true => &[],
            false => &["--stop-timeout", "20s"],
        };
        let commands = ["--stop-command", &stop, "--start-command", &start];
        self.unmanaged(&[&own[..], limit, &commands, options].concat(), environment)
    }

    /// A recipient that can neither stop nor start the server, with more options.
    #[must_use]
    pub fn unmanaged(&self, options: &[&str], environment: &[(&str, &str)]) -> Recipient {
        let data = shown(&self.data);
        let options = [&["--data-directory", &data][..], options].concat();
        Recipient::start_with(self.home.path(), &options, environment)
    }

    /// What the start command was told, in order, and `twice` where a server ran already.
    #[must_use]
    pub fn told(&self) -> String {
        std::fs::read_to_string(self.path("told")).unwrap_or_default()
    }

    /// The server ends as it does for a person.
    pub fn shut_server_down(&self) {
        let process = self.server_pid().map(|pid| PathBuf::from(format!("/proc/{pid}/exe")));
        drop(mariadb::ask(&self.socket, "SHUTDOWN"));
        // It lets go of one lock after the other.
        let has_ended = || process.as_ref().is_none_or(|exe| !exe.exists());
        wait_for("the server to end", || has_ended().then_some(()));
    }

    /// Kills all servers that were started so, and forgets what was told.
    pub fn end_servers(&self) {
        let started = std::fs::read_to_string(self.pids()).unwrap_or_default();
        for pid in started.lines().filter_map(|line| line.parse().ok()) {
            // Nobody else's process of that number.
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&command).contains(&shown(&self.data))
                && let Some(process) = Pid::from_raw(pid)
            {
                let _sent = kill_process(process, Signal::KILL);
            }
        }
        drop(std::fs::remove_file(self.pids()));
        drop(std::fs::remove_file(self.path("told")));
    }

    /// A shell's line that starts the server, after `first`; `$closed` are more arguments.
    fn launch(&self, first: &str) -> String {
        let quoted: Vec<String> = self.command().iter().map(|word| format!("'{word}'")).collect();
        format!(
            "({first}; exec {} $closed) >> {} 2>&1 & echo $! >> {}",
            quoted.join(" "),
            shown(&self.path("server.log")),
            shown(&self.pids())
        )
    }

    fn pids(&self) -> PathBuf {
        self.path("pids")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.end_servers();
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
