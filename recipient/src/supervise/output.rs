//! What the server says: passed on, and its last lines kept for the error of a failed start.

use std::{
    collections::VecDeque,
    fs::File,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Lines that are kept.
const LINES_MAX: usize = 200;

/// Bytes of a line that are kept.
const LINE_BYTES_MAX: usize = 1000;

/// Lines that an error tells.
const ERROR_LINES_MAX: usize = 5;

/// Bytes at the end of an error log that are looked at.
const LOG_BYTES_MAX: u64 = 64 << 10;

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
}

impl Output {
    pub(super) fn new(error_log: Option<PathBuf>) -> Self {
        Self { error_log, state: Mutex::default() }
    }

    /// Forgets what an earlier start has said.
    pub(super) fn begin(&self) {
        let metadata = self.error_log.as_ref().and_then(|path| path.metadata().ok());
        let mut state = self.lock();
        *state = State { log_begin: metadata.map_or(0, |m| m.len()), ..State::default() };
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
                if state.lines.len() == LINES_MAX {
                    state.lines.pop_front();
                }
                state.lines.push_back(line);
            } else if state.partial.len() < LINE_BYTES_MAX {
                state.partial.push(byte);
            }
        }
    }

    /// The last lines that the server has marked as errors; without any, its last line.
    #[must_use]
    pub fn error_lines(&self) -> Vec<String> {
        let state = self.lock();
        let mut lines: Vec<String> = state.lines.iter().cloned().collect();
        lines.extend(self.read_log(state.log_begin));
        drop(state);
        let errors: Vec<String> =
            lines.iter().filter(|line| line.contains("[ERROR]")).cloned().collect();
        let told =
            if errors.is_empty() { lines.into_iter().rev().take(1).collect() } else { errors };
        let skipped = told.len().saturating_sub(ERROR_LINES_MAX);
        told.into_iter().skip(skipped).collect()
    }

    fn read_log(&self, begin: u64) -> Vec<String> {
        let read = || -> std::io::Result<String> {
            let Some(path) = &self.error_log else {
                return Ok(String::new());
            };
            let mut file = File::open(path)?;
            let end = file.metadata()?.len();
            // A log that is shorter than it was has been rotated.
            let begin = if begin > end { 0 } else { begin };
            file.seek(SeekFrom::Start(begin.max(end.saturating_sub(LOG_BYTES_MAX))))?;
            let mut text = Vec::new();
            file.take(LOG_BYTES_MAX).read_to_end(&mut text)?;
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

    #[test]
    fn a_log_file_is_read_from_where_the_start_began() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("error.log");
        std::fs::write(&path, "[ERROR] an old one\n").unwrap();
        let output = Output::new(Some(path.clone()));
        output.begin();
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"[Note] x\n[ERROR] the new one\n").unwrap();
        assert_eq!(output.error_lines(), ["[ERROR] the new one"]);
    }
}
