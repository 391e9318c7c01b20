//! `marcot-recipient supervise`: signals, ends, orphans, with real processes.

mod entrypoint;
mod starting;

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use marcot_tests::{killer::Blow, new_directory, site::Site, wait_for};

/// A supervisor of a shell script.
struct Script {
    child: Child,
    home: tempfile::TempDir,
}

impl Script {
    fn start(text: &str, options: &[&str]) -> Self {
        let home = new_directory();
        let script = home.path().join("server");
        std::fs::write(&script, format!("#!/bin/sh\ncd {}\n{text}\n", home.path().display()))
            .expect("writable");
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&script, mode).expect("our own file");
        let program = std::env::current_exe().expect("a program");
        let program = program.ancestors().nth(2).expect("two above").join("marcot-recipient");
        let log = std::fs::File::create(home.path().join("log")).expect("writable");
        let data = home.path().join("data");
        std::fs::create_dir(&data).expect("writable");
        let child = Command::new(program)
            .args(["supervise", "--listen", "127.0.0.1:0", "--health-command", "true"])
            .arg("--state-directory")
            .arg(home.path().join("state"))
            .arg("--data-directory")
            .arg(&data)
            .args(options)
            .arg("--")
            .arg(&script)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log)
            .spawn()
            .expect("marcot-recipient is built");
        Self { child, home }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn wait_for_file(&self, name: &str) -> String {
        wait_for(name, || {
            std::fs::read_to_string(self.path(name)).ok().filter(|text| text.ends_with('\n'))
        })
    }

    fn signal(&self, blow: Blow) {
        blow.strike(self.child.id());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn end(&mut self) -> Option<i32> {
        let log = self.path("log");
        wait_for("the supervisor to end", || self.child.try_wait().expect("our own child"))
            .code()
            .or_else(|| panic!("{}", std::fs::read_to_string(log).unwrap_or_default()))
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

fn number(text: &str) -> u32 {
    text.trim().parse().expect("a process id")
}

fn is_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Guards the drain: SIGTERM reaches the server behind a script as well, and its exit code is the
/// supervisor's.
#[test]
fn a_stop_reaches_the_server_behind_its_script_and_its_exit_code_is_passed_on() {
    let text = "trap 'echo stopped > stopped; exit 7' TERM; sleep 1000 & echo $! > pid; wait";
    let mut script = Script::start(text, &[]);
    let sleeper = number(&script.wait_for_file("pid"));
    script.signal(Blow::Terminate);
    assert_eq!(script.end(), Some(7));
    assert!(script.path("stopped").exists());
    wait_for("the group's processes to end", || (!is_alive(sleeper)).then_some(()));
}

/// Guards signals that servers take for commands (read the log anew, write a state): each reaches the
/// server, and ends nothing.
#[test]
fn signals_of_operators_are_passed_on() {
    let names = ["HUP", "QUIT", "USR1", "USR2", "WINCH"];
    let traps: Vec<_> = names.map(|name| format!("trap 'echo {name} >> got' {name}")).to_vec();
    // A shell cannot trap what was ignored when it began, as SIGHUP is under nohup.
    let text = format!(
        "exec env --default-signal sh -c \"{}; echo \\$\\$ > pid; while :; do sleep 0.05; done\"",
        traps.join("; ")
    );
    let mut script = Script::start(&text, &[]);
    script.wait_for_file("pid");
    for name in names {
        let status = Command::new("kill")
            .args(["-s", name, &script.child.id().to_string()])
            .status()
            .expect("kill is there");
        assert!(status.success(), "{name}");
        wait_for(name, || {
            let got = std::fs::read_to_string(script.path("got")).unwrap_or_default();
            (got.lines().last() == Some(name)).then_some(())
        });
    }
    assert_eq!(script.child.try_wait().expect("our own child"), None);
    script.signal(Blow::Terminate);
    assert_eq!(script.end(), Some(128 + 15));
}

/// Guards a clean shutdown behind a script that is not `exec`: the script dies of the signal, and
/// this process, PID 1 of a container, must not end before its server has.
#[test]
fn a_server_that_outlives_its_script_is_waited_for() {
    let server = "trap \"sleep 2; echo clean > clean; exit 0\" TERM; echo $$ > pid; \
                  while :; do sleep 0.1; done";
    let mut script = Script::start(&format!("sh -c '{server}' & wait"), &[]);
    script.wait_for_file("pid");
    script.signal(Blow::Terminate);
    assert_eq!(script.end(), Some(128 + 15));
    assert_eq!(std::fs::read_to_string(script.path("clean")).unwrap(), "clean\n");
    // And killed after the grace, although the script has gone.
    let server = "trap \"\" TERM; echo $$ > pid; while :; do sleep 0.1; done";
    let options = ["--stop-grace", "5s"];
    let mut script = Script::start(&format!("sh -c '{server}' & wait"), &options);
    let pid = number(&script.wait_for_file("pid"));
    script.signal(Blow::Terminate);
    assert_eq!(script.end(), Some(128 + 15));
    wait_for("the server to be killed", || (!is_alive(pid)).then_some(()));
}

#[test]
fn a_stop_between_two_starts_passes_on_the_last_exit_code() {
    let mut script = Script::start("exit 9", &[]);
    wait_for("the pause", || script.log().contains("is started again").then_some(()));
    script.signal(Blow::Terminate);
    assert_eq!(script.end(), Some(9));
}

#[test]
fn a_server_that_ignores_sigterm_is_killed_after_the_grace() {
    let text = "trap '' TERM; echo $$ > pid; while :; do sleep 1; done";
    let mut script = Script::start(text, &["--stop-grace", "2s"]);
    let pid = number(&script.wait_for_file("pid"));
    let begun = Instant::now();
    script.signal(Blow::Terminate);
    assert_eq!(script.end(), Some(128 + 9));
    let took = begun.elapsed();
    assert!(took >= Duration::from_secs(2) && took < Duration::from_secs(20), "{took:?}");
    assert!(!is_alive(pid));
}

#[test]
fn a_server_that_ends_by_itself_ends_the_supervisor_with_its_code_or_is_started_again() {
    // Ended in good order: nobody starts it again by default.
    let mut script = Script::start("echo x >> starts; exit 0", &[]);
    assert_eq!(script.end(), Some(0));
    assert_eq!(std::fs::read_to_string(script.path("starts")).unwrap(), "x\n");
    // A failure starts it again, with growing pauses, as often as is allowed.
    let begun = Instant::now();
    let mut script = Script::start("echo x >> starts; exit 9", &["--restart-limit", "2"]);
    assert_eq!(script.end(), Some(9));
    assert_eq!(std::fs::read_to_string(script.path("starts")).unwrap(), "x\nx\nx\n");
    assert!(begun.elapsed() >= Duration::from_secs(3), "pauses of 1 s and 2 s");
    let mut script = Script::start("echo x >> starts; kill -KILL $$", &["--restart", "never"]);
    assert_eq!(script.end(), Some(137));
}

/// Guards the reaper: an orphan that nobody waits for would stay a zombie for ever.
#[test]
fn orphans_are_reaped() {
    let text = "( (sleep 0.2; echo $$ > /dev/null) & echo $! > orphan ); sleep 1000";
    let mut script = Script::start(text, &["--stop-grace", "20s"]);
    let orphan = number(&script.wait_for_file("orphan"));
    wait_for("the orphan to be reaped", || (!is_alive(orphan)).then_some(()));
    script.signal(Blow::Terminate);
    assert_eq!(script.end(), Some(128 + 15));
}

/// Guards the work of PID 1: in a process namespace of its own it has no parent that would help.
#[test]
fn it_is_a_good_first_process_of_a_container() {
    let home = new_directory();
    let program = std::env::current_exe().expect("a program");
    let program = program.ancestors().nth(2).expect("two above").join("marcot-recipient");
    let script = format!(
        "exec {} supervise --listen 127.0.0.1:0 --health-command true --state-directory {h}/state \
         --data-directory {h} --stop-grace 20s -- sh -c '((sleep 0.2; touch {h}/done) & \
         echo $! > {h}/orphan); echo $$ > {h}/pid; exec sleep 1000' > {h}/log 2>&1",
        program.display(),
        h = home.path().display()
    );
    let mut child = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", &script])
        .spawn()
        .expect("unshare is there");
    let read = |name: &str| std::fs::read_to_string(home.path().join(name)).ok();
    wait_for("the server", || read("pid").filter(|text| text.ends_with('\n')));
    let orphan = wait_for("the orphan", || read("orphan").filter(|text| text.ends_with('\n')));
    wait_for("the orphan to end", || read("done"));
    // The namespace's first process and its children, as this side knows them.
    let children = |of: u32| -> Vec<u32> {
        let list = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children"));
        list.unwrap_or_default().split_whitespace().map(number).collect()
    };
    let first = wait_for("the first process", || children(child.id()).first().copied());
    // The server is a child of whichever thread has started it; orphans go to the first. One that has
    // ended and was not waited for is still there.
    let is_orphan = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        line.and_then(|pids| pids.split_whitespace().last()) == Some(orphan.trim())
    };
    wait_for("the orphan to be reaped", || (!children(first).iter().any(is_orphan)).then_some(()));
    Blow::Terminate.strike(first);
    let status = wait_for("the container to end", || child.try_wait().expect("our own child"));
    assert_eq!(status.code(), Some(128 + 15), "{}", read("log").unwrap_or_default());
}

/// Guards what keeps a database up: a server that crashes is started again, without any clone.
#[test]
fn a_mariadb_that_is_killed_is_started_again_and_stops_cleanly() {
    let site = Site::new();
    let mut at = site.supervise(&[]);
    let first = site.server_pid().expect("a server");
    Blow::Kill.strike(first);
    wait_for("another server", || site.server_pid().filter(|&pid| pid != first));
    site.wait_for_server();
    assert_eq!(site.mark(), "old");
    assert_eq!(at.0.terminate(), Some(0), "{}", at.0.log());
    assert_eq!(site.server_pid(), None);
    assert!(at.0.log().contains("Shutdown complete"), "{}", at.0.log());
}

/// Guards the next start after a supervisor was killed: its server does not stay behind.
#[test]
fn a_server_whose_supervisor_was_killed_makes_way_for_the_next() {
    let site = Site::new();
    let mut at = site.supervise(&[]);
    let first = site.server_pid().expect("a server");
    at.0.kill();
    let _at = site.supervise(&[]);
    wait_for("another server", || site.server_pid().filter(|&pid| pid != first));
    site.wait_for_server();
    assert_eq!(site.mark(), "old");
}
