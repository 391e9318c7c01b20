//! What the server says: passed on, and its last lines kept for the error of a failed start.

use std::{
    collections::VecDeque,
    fs::File,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use marcot_common::failure::Failure;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Lines that are kept.
const LINES_MAX: usize = 200;

/// Bytes of a line that are kept.
const LINE_BYTES_MAX: usize = 1000;

/// Lines that an error tells.
const ERROR_LINES_MAX: usize = 5;

/// Bytes at the end of an error log that are looked at.
const LOG_BYTES_MAX: u64 = 64 << 10;

/// Bytes of an error log, from where a start began, that are looked at for how that went: a recovery
/// says some hundred lines.
const START_BYTES_MAX: u64 = 1 << 20;

/// How a server stands, by its own log. MariaDB and MySQL use the same words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Logged {
    /// It has said nothing of it, or that it has ended.
    #[default]
    Nothing,
    /// It starts.
    Starting,
    /// It takes connections.
    Ready,
}

impl Logged {
    /// What is known after one more line.
    fn after(self, line: &str) -> Self {
        if line.contains("Starting MariaDB") || line.contains("starting as process") {
            Self::Starting
        } else if line.contains("ready for connections") && !line.contains("X Plugin") {
            Self::Ready
        } else if line.contains("Shutdown complete") {
            // A server that an entrypoint script has run to set things up.
            Self::Nothing
        } else {
            self
        }
    }
}

/// The server's last words.
#[derive(Debug)]
pub struct Output {
    error_log: Option<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<String>,
    partial: Vec<u8>,
    /// Where the error log ended when the server was started.
    log_begin: u64,
    /// Whether it was, by this process.
    has_started: bool,
    logged: Logged,
}

impl Output {
    pub(crate) fn new(error_log: Option<PathBuf>) -> Self {
        Self { error_log, state: Mutex::default() }
    }

    /// Forgets what an earlier start has said.
    pub(crate) fn begin(&self) {
        let metadata = self.error_log.as_ref().and_then(|path| path.metadata().ok());
        let mut state = self.lock();
        let log_begin = metadata.map_or(0, |m| m.len());
        *state = State { log_begin, has_started: true, ..State::default() };
    }

    /// Passes on all that comes, to standard error, and keeps lines.
    pub(super) async fn follow(&self, mut from: impl AsyncRead + Unpin) {
        let mut buffer = vec![0; 8192];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            // Whoever reads our log may have gone; the server must not notice.
            drop(std::io::stderr().write_all(&buffer[..read]));
            self.keep(&buffer[..read]);
        }
    }

    fn keep(&self, bytes: &[u8]) {
        let mut state = self.lock();
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&state.partial).into_owned();
                state.partial.clear();
                state.logged = state.logged.after(&line);
                if state.lines.len() == LINES_MAX {
                    state.lines.pop_front();
                }
                state.lines.push_back(line);
            } else if state.partial.len() < LINE_BYTES_MAX {
                state.partial.push(byte);
            }
        }
    }

    /// How the server stands, by its own log.
    pub(super) fn logged(&self) -> Logged {
        let (begin, said) = {
            let state = self.lock();
            (state.log_begin, state.logged)
        };
        let lines = self.read_log(|end| if begin > end { 0 } else { begin }, START_BYTES_MAX);
        match lines.iter().fold(Logged::Nothing, |logged, line| logged.after(line)) {
            Logged::Nothing => said,
            logged => logged,
        }
    }

    /// Whether its log says that it has begun to start since this process has started it, be it that it
    /// has ended again.
    pub(crate) fn has_begun(&self) -> bool {
        let (begin, has_started) = {
            let state = self.lock();
            (state.log_begin, state.has_started)
        };
        let lines = self.read_log(|end| if begin > end { 0 } else { begin }, START_BYTES_MAX);
        has_started && lines.iter().any(|line| Logged::Nothing.after(line) != Logged::Nothing)
    }

    /// The last lines that the server has marked as errors; without any, its last line.
    #[must_use]
    pub fn error_lines(&self) -> Vec<String> {
        let state = self.lock();
        let mut lines: Vec<String> = state.lines.iter().cloned().collect();
        let (begin, has_started) = (state.log_begin, state.has_started);
        // A log that is shorter than it was has been rotated.
        let tail = |end: u64| {
            let begin = if begin > end { 0 } else { begin };
            begin.max(end.saturating_sub(LOG_BYTES_MAX))
        };
        lines.extend(self.read_log(tail, LOG_BYTES_MAX));
        drop(state);
        // Of a server that an earlier process has started: its last start.
        let is_start = |line: &String| Logged::Nothing.after(line) == Logged::Starting;
        if !has_started && let Some(at) = lines.iter().rposition(is_start) {
            lines.drain(..at);
        }
        let errors: Vec<String> =
            lines.iter().filter(|line| line.contains("[ERROR]")).cloned().collect();
        let told =
            if errors.is_empty() { lines.into_iter().rev().take(1).collect() } else { errors };
        let skipped = told.len().saturating_sub(ERROR_LINES_MAX);
        told.into_iter().skip(skipped).collect()
    }

    /// The failure, with what the server has logged as errors.
    pub(crate) fn told(&self, failure: Failure) -> Failure {
        let lines = self.error_lines();
        if lines.is_empty() {
            return failure;
        }
        let message = format!("{}; the server's log says: {}", failure.message, lines.join(" | "));
        Failure { message, ..failure }
    }

    /// Lines of the error log, from where `begin` says for a log that ends there.
    fn read_log(&self, begin: impl Fn(u64) -> u64, bytes_max: u64) -> Vec<String> {
        let read = || -> std::io::Result<String> {
            let Some(path) = &self.error_log else {
                return Ok(String::new());
            };
            let mut file = File::open(path)?;
            let end = file.metadata()?.len();
            file.seek(SeekFrom::Start(begin(end)))?;
            let mut text = Vec::new();
            file.take(bytes_max).read_to_end(&mut text)?;
            Ok(String::from_utf8_lossy(&text).into_owned())
        };
        read().unwrap_or_default().lines().map(str::to_owned).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_errors_are_told_and_older_starts_forgotten() {
        let output = Output::new(None);
        output.begin();
        for i in 0..300 {
            output.keep(format!("2026 {i} [Note] fine\n").as_bytes());
        }
        assert_eq!(output.error_lines(), ["2026 299 [Note] fine"]);
        for i in 0..10 {
            output.keep(format!("2026 [ERROR] number {i}").as_bytes());
            output.keep(b" goes on\nand then\n");
        }
        let lines = output.error_lines();
        assert_eq!(lines.len(), ERROR_LINES_MAX);
        assert_eq!(lines[4], "2026 [ERROR] number 9 goes on");
        output.begin();
        assert!(output.error_lines().is_empty());
    }

    /// Guards who is waited for: lines of MariaDB 10.11 and 11.8, of MySQL 9.7, and of an entrypoint that
    /// runs a server first to set things up.
    #[test]
    fn a_start_is_followed_by_the_servers_own_words() {
        let output = Output::new(None);
        output.begin();
        assert_eq!(output.logged(), Logged::Nothing);
        for (line, logged) in [
            ("0 [Note] Starting MariaDB 10.11.18-MariaDB source revision 19 as process 7", 1),
            ("0 [Note] InnoDB: Starting crash recovery from checkpoint LSN=1", 1),
            ("0 [Note] mariadbd: ready for connections.", 2),
            ("0 [Note] mariadbd: Shutdown complete", 0),
            ("0 [Note] mariadbd (server 11.8.2-MariaDB) starting as process 9 ...", 1),
            (
                "0 [System] [MY-010116] [Server] /usr/sbin/mysqld (mysqld 9.7.0) starting as process 1",
                1,
            ),
            (
                "0 [System] [MY-011323] [Server] X Plugin ready for connections. Bind-address: '::'",
                1,
            ),
            ("0 [System] [MY-010931] [Server] mysqld: ready for connections. Version: '9.7.0'", 2),
            ("9 [Warning] Aborted connection 7", 2),
        ] {
            output.keep(format!("{line}\n").as_bytes());
            let expected = [Logged::Nothing, Logged::Starting, Logged::Ready][logged];
            assert_eq!(output.logged(), expected, "{line}");
        }
        output.begin();
        assert_eq!(output.logged(), Logged::Nothing);
    }

    /// Guards the server that an earlier process has started: what it says of its last start is told, and
    /// not what it had said of others; and no old log shows that a server is there. Of one that this process
    /// has started it does, also where that has ended in order.
    #[test]
    fn of_a_server_that_was_started_before_the_last_start_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("error.log");
        let start = "[Note] x starting as process 1\n[ERROR] of it\n";
        let end = "[ERROR] Aborting\n[Note] x: Shutdown complete\n";
        std::fs::write(&path, format!("[ERROR] older\n{start}")).unwrap();
        let output = Output::new(Some(path.clone()));
        assert_eq!(output.error_lines(), ["[ERROR] of it"]);
        assert!(!output.has_begun());
        output.begin();
        assert!(output.error_lines().is_empty() && !output.has_begun());
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(format!("{start}{end}").as_bytes()).unwrap();
        assert_eq!((output.logged(), output.has_begun()), (Logged::Nothing, true));
        assert_eq!(output.error_lines(), ["[ERROR] of it", "[ERROR] Aborting"]);
    }

    #[test]
    fn a_log_file_is_read_from_where_the_start_began() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("error.log");
        std::fs::write(&path, "[ERROR] an old one\nit was ready for connections\n").unwrap();
        let output = Output::new(Some(path.clone()));
        output.begin();
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"[Note] x starting as process 1\n[ERROR] the new one\n").unwrap();
        assert_eq!(output.error_lines(), ["[ERROR] the new one"]);
        assert_eq!(output.logged(), Logged::Starting);
        file.write_all(b"[Note] x: ready for connections.\n").unwrap();
        assert_eq!(output.logged(), Logged::Ready);
    }
}
