//! Daemons under test: started until they take calls, ended when dropped, their logs shown when a
//! test fails.

use std::{
    fs::File,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{
    killer::{Blow, Killer},
    target_directory, wait_for,
};

/// Makes the names of each daemon's files others than those of the last.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// A process that is killed when it is dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
    /// Where it takes calls.
    pub address: SocketAddr,
    /// Its admin port, if it has one.
    pub admin: Option<SocketAddr>,
    /// Of its certificate, if it has one.
    pub fingerprint: Option<String>,
}

impl Daemon {
    fn start(name: &str, home: &Path, arguments: &[String], environment: &[(&str, &str)]) -> Self {
        Self::start_around(name, home, arguments, &[], environment)
    }

    /// A daemon that runs a command of its own, with more variables in its environment.
    fn start_around(
        name: &str,
        home: &Path,
        arguments: &[String],
        command: &[String],
        environment: &[(&str, &str)],
    ) -> Self {
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let ready = home.join(format!("{name}-{number}.ready"));
        let log = home.join(format!("{name}-{number}.log"));
        let output = File::create(&log).expect("home is writable");
        let mut child = Command::new(target_directory().join(name))
            .args(arguments)
            .args(["--listen", "127.0.0.1:0", "--log", "info"])
            .arg("--ready-file")
            .arg(&ready)
            .args((!command.is_empty()).then_some("--"))
            .args(command)
            // Stories whose donor is gone for good end soon; those about waiting say how long.
            .env("MARCOT_DONOR_TIMEOUT", "3s")
            // Those about a donor that is full say how long it is waited for.
            .env("MARCOT_QUEUE_WAIT", "0s")
            // Recipients that were killed leave snapshots, and all are on one address; the story about
            // shares says another number.
            .env("MARCOT_SNAPSHOTS_PER_PEER_MAX", "1024")
            // Every donor of a story is on this host; those about the list say another.
            .env("MARCOT_DONOR_LIST", "127.0.0.1:*,[::1]:*")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a file can be shared"))
            .stderr(output)
            .spawn()
            .unwrap_or_else(|e| panic!("start {name}: {e}"));
        let text = wait_for(&format!("{name} to take calls"), || {
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                panic!("{name} ended with {status}:\n{}", read(&log));
            }
            std::fs::read_to_string(&ready).ok()
        });
        let field = |key: &str| -> Option<String> {
            let (_, rest) = text.split_once(&format!("\"{key}\":\""))?;
            rest.split('"').next().map(str::to_owned)
        };
        let address = |key| field(key).map(|text| text.parse().expect("an address"));
        Self {
            address: address("listen").expect("a daemon tells where it listens"),
            admin: address("admin_listen"),
            fingerprint: field("fingerprint"),
            child,
            log,
        }
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        read(&self.log)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Most memory that it has held, bytes.
    #[must_use]
    pub fn peak_rss_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))
            .expect("a running process has a status");
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("VmHWM");
        let kib = line.split_whitespace().nth(1).expect("a number");
        kib.parse::<u64>().expect("a number") << 10
    }

    /// From now on the most memory is what it holds now, or will hold.
    pub fn forget_peak_rss(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.pid()), "5")
            .expect("a process of ours can be told so");
    }

    /// Open descriptors now.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count)
    }

    /// Kills it without a word.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Stops it in its tracks until `thaw`.
    pub fn freeze(&self) {
        Blow::Freeze.strike(self.pid());
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        Blow::Thaw.strike(self.pid());
    }

    /// Strikes a process when `text` appears in this one's log.
    #[must_use]
    pub fn strike_at_line(&self, text: &str, pid: u32, blow: Blow) -> Killer {
        Killer::at_line(&self.log, text, pid, blow)
    }

    /// Asks it to end, and waits for its exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        Blow::Terminate.strike(self.pid());
        self.wait()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Option<i32> {
        wait_for("the daemon to end", || self.child.try_wait().expect("our own child")).code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), read(&self.log));
        }
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// A donor.
#[derive(Debug)]
pub struct Donor(pub Daemon);

impl Donor {
    /// Starts a donor of `data_directory`, with more options.
    #[must_use]
    pub fn start(home: &Path, data_directory: &Path, options: &[&str]) -> Self {
        Self::start_with(home, data_directory, options, &[])
    }

    /// As `start`, with more variables in its environment.
    #[must_use]
    pub fn start_with(
        home: &Path,
        data_directory: &Path,
        options: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let mut arguments =
            vec!["--data-directory".to_owned(), data_directory.display().to_string()];
        if !options.contains(&"--spool-directory") {
            arguments.extend(["--spool-directory".to_owned(), home.display().to_string()]);
        }
        arguments.extend(options.iter().map(ToString::to_string));
        Self(Daemon::start("marcot-donor", home, &arguments, environment))
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.0.address.port()
    }

    /// A statement that clones it to `target`.
    #[must_use]
    pub fn statement(&self, target: &Path, clause: &str) -> String {
        statement(self.port(), target, clause)
    }
}

/// A statement that clones what answers on a port of this host to `target`.
#[must_use]
pub fn statement(port: u16, target: &Path, clause: &str) -> String {
    format!(
        "CLONE INSTANCE FROM 'clone'@'127.0.0.1':{port} IDENTIFIED BY 'secret' \
         DATA DIRECTORY = '{}' {clause}",
        target.display()
    )
}

/// A recipient.
#[derive(Debug)]
pub struct Recipient(pub Daemon);

impl Recipient {
    /// Starts a recipient that may write below `home`, with more options.
    #[must_use]
    pub fn start(home: &Path, options: &[&str]) -> Self {
        Self::start_with(home, options, &[])
    }

    /// As `start`, with more variables in its environment.
    #[must_use]
    pub fn start_with(home: &Path, options: &[&str], environment: &[(&str, &str)]) -> Self {
        let state = home.join("state");
        let mut arguments = vec!["--state-directory".to_owned(), state.display().to_string()];
        arguments.extend(["--allow-directory".to_owned(), home.display().to_string()]);
        arguments.extend(["--spool-directory".to_owned(), home.display().to_string()]);
        arguments.extend(["--admin-listen".to_owned(), "127.0.0.1:0".to_owned()]);
        arguments.extend(options.iter().map(ToString::to_string));
        Self(Daemon::start("marcot-recipient", home, &arguments, environment))
    }

    /// Starts a recipient that supervises `command`.
    #[must_use]
    pub fn supervise(
        home: &Path,
        options: &[&str],
        command: &[String],
        environment: &[(&str, &str)],
    ) -> Self {
        let mut arguments = vec!["supervise".to_owned()];
        arguments.extend(["--spool-directory".to_owned(), home.display().to_string()]);
        arguments.extend(options.iter().map(ToString::to_string));
        Self(Daemon::start_around("marcot-recipient", home, &arguments, command, environment))
    }
}
