//! Ends or freezes a process at a moment of a test's choice: when a line appears in a log, or after
//! a time that a seed decides. The seed is printed, and `SEED=n` takes it back.

use std::{
    path::{Path, PathBuf},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::PATIENCE;

/// How often a log is looked at: what a line tells of lasts longer.
const LOOK: Duration = Duration::from_millis(1);

/// What is done to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    /// It ends without a word (SIGKILL).
    Kill,
    /// It is asked to end (SIGTERM).
    Terminate,
    /// It is stopped in its tracks (SIGSTOP).
    Freeze,
    /// It goes on (SIGCONT).
    Thaw,
}

impl Blow {
    /// Strikes a process that a test has started.
    pub fn strike(self, pid: u32) {
        let signal = match self {
            Self::Kill => Signal::KILL,
            Self::Terminate => Signal::TERM,
            Self::Freeze => Signal::STOP,
            Self::Thaw => Signal::CONT,
        };
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("a process of this test");
    }
}

/// A blow that waits for its moment.
pub struct Killer {
    thread: JoinHandle<Result<Instant, String>>,
}

impl Killer {
    /// Strikes when `text` appears in a log, after what it holds now.
    #[must_use]
    pub fn at_line(log: &Path, text: &str, pid: u32, blow: Blow) -> Self {
        let (log, text) = (log.to_owned(), text.to_owned());
        let known = length(&log);
        Self::spawn(move |deadline| {
            while !holds(&log, known, &text) {
                if Instant::now() >= deadline {
                    return Err(format!("`{text}` does not appear in {}", log.display()));
                }
                std::thread::park_timeout(LOOK);
            }
            blow.strike(pid);
            Ok(Instant::now())
        })
    }

    /// Strikes within `window` from now, when the seed says.
    #[must_use]
    pub fn at_moment(seed: u64, window: Duration, pid: u32, blow: Blow) -> Self {
        let moment = Instant::now() + delay(seed, window);
        Self::spawn(move |_| {
            while Instant::now() < moment {
                std::thread::park_timeout((moment - Instant::now().min(moment)).min(LOOK));
            }
            blow.strike(pid);
            Ok(Instant::now())
        })
    }

    fn spawn(work: impl FnOnce(Instant) -> Result<Instant, String> + Send + 'static) -> Self {
        let deadline = Instant::now() + PATIENCE;
        let thread = std::thread::Builder::new().name("killer".to_owned());
        Self { thread: thread.spawn(move || work(deadline)).expect("a thread") }
    }

    /// Waits for the blow, and tells when it fell.
    pub fn struck(self) -> Instant {
        let struck = self.thread.join().expect("the killer does not panic");
        struck.unwrap_or_else(|text| panic!("{text}"))
    }
}

fn length(log: &PathBuf) -> usize {
    std::fs::read(log).map_or(0, |bytes| bytes.len())
}

fn holds(log: &PathBuf, known: usize, text: &str) -> bool {
    let bytes = std::fs::read(log).unwrap_or_default();
    let new = bytes.get(known..).unwrap_or_default();
    String::from_utf8_lossy(new).contains(text)
}

/// A seed of this run; `SEED` gives an earlier one back. It is shown when the test fails.
#[must_use]
pub fn seed() -> u64 {
    let given = std::env::var("SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |since| u64::from(since.subsec_nanos()))
    });
    eprintln!("SEED={seed}");
    seed
}

/// A time below `window`, the same for the same seed.
fn delay(seed: u64, window: Duration) -> Duration {
    // SplitMix64: neighbouring seeds give moments far apart.
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    window.mul_f64((z ^ (z >> 31)) as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;
    use crate::wait_for;

    fn sleeper() -> Child {
        Command::new("sleep").arg("60").spawn().expect("sleep")
    }

    fn state(child: &Child) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).expect("it runs");
        let (_, rest) = stat.rsplit_once(") ").expect("a state");
        rest.chars().next().expect("a state")
    }

    #[test]
    fn a_process_is_frozen_and_killed_when_a_line_appears() {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        std::fs::write(&log, "the point is fixed\n").expect("writable");
        let mut child = sleeper();
        let killer = Killer::at_line(&log, "the point is fixed", child.id(), Blow::Freeze);
        assert_ne!(state(&child), 'T', "a line that was there before is none");
        std::fs::write(&log, "the point is fixed\nonce more: the point is fixed\n").expect("ok");
        let _at = killer.struck();
        wait_for("it to stop", || (state(&child) == 'T').then_some(()));
        Blow::Thaw.strike(child.id());
        wait_for("it to go on", || (state(&child) != 'T').then_some(()));
        let killer = Killer::at_moment(7, Duration::from_millis(30), child.id(), Blow::Kill);
        let _at = killer.struck();
        assert!(!child.wait().expect("our own child").success());
    }

    #[test]
    fn a_seed_gives_its_moment_back() {
        let window = Duration::from_secs(1);
        assert_eq!(delay(42, window), delay(42, window));
        let mut moments: Vec<Duration> = (0..100).map(|seed| delay(seed, window)).collect();
        assert!(moments.iter().all(|moment| *moment <= window));
        moments.sort();
        assert!(moments[10] < window / 4 && moments[90] > window * 3 / 4, "{moments:?}");
    }
}
