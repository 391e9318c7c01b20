//! A log filter in a file, which is read again when it changes.
//!
//! ```text
//! # while we look for what is slow
//! info, marcot_recipient=debug
//! ```

use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::Duration,
};

use tracing::{info, warn};
use tracing_subscriber::{EnvFilter, filter::ParseError};

use crate::reloaded::{Changed, Reloaded};

/// Longest file: a filter has a few words.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// How often the file is looked at: a look is one stat.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// What is wrong with a filter's file.
#[derive(Debug, thiserror::Error)]
pub enum FilterFileError {
    /// The file cannot be read.
    #[error("log filter file {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The filter is wrong.
    #[error("log filter file {path}: `{filter}`: {source}")]
    Filter {
        /// The file.
        path: PathBuf,
        /// What is in it.
        filter: String,
        /// What is wrong with it.
        #[source]
        source: ParseError,
    },
}

/// The file.
#[derive(Debug)]
pub(super) struct FilterFile(Reloaded<String, FilterFileError>);

impl FilterFile {
    /// The file must be right at the start; `default` holds while it has nothing but remarks.
    pub(super) fn open(path: &Path, default: String) -> Result<Self, FilterFileError> {
        let file = path.to_owned();
        Reloaded::open(vec![file.clone()], move || read(&file, &default)).map(Self)
    }

    /// The filter that was right when it was last looked at.
    pub(super) fn current(&self) -> String {
        String::clone(&self.0.last_right().0)
    }

    /// Calls `apply` with the filter after each change, for as long as it is polled. What has become
    /// wrong is told, and the filter stays as it was.
    pub(super) async fn follow(self, apply: impl Fn(EnvFilter)) {
        let mut tick = tokio::time::interval(LOOK_INTERVAL);
        loop {
            tick.tick().await;
            match self.0.last_right() {
                (_, Changed::No) => {}
                (filter, Changed::Yes) => {
                    // It was parsed when it was read.
                    if let Ok(parsed) = EnvFilter::builder().parse(filter.as_str()) {
                        apply(parsed);
                        info!(filter = %filter, "the log filter has changed");
                    }
                }
                (filter, Changed::Wrong(error)) => {
                    warn!(%error, filter = %filter, "the log filter stays as it was");
                }
            }
        }
    }
}

fn read(path: &Path, default: &str) -> Result<String, FilterFileError> {
    let io = |source| FilterFileError::Io { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(io)?;
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(io)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        let why = format!("it has more than {FILE_BYTES_MAX} bytes");
        return Err(io(io::Error::new(io::ErrorKind::InvalidData, why)));
    }
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    let parts = lines.flat_map(|line| line.split(',')).map(str::trim).filter(|p| !p.is_empty());
    let filter = parts.collect::<Vec<_>>().join(",");
    let filter = if filter.is_empty() { default.to_owned() } else { filter };
    match EnvFilter::builder().parse(&filter) {
        Ok(_) => Ok(filter),
        Err(source) => Err(FilterFileError::Filter { path: path.to_owned(), filter, source }),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        sync::{Arc, Mutex},
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_applied_and_a_wrong_one_leaves_what_was_right() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("filter");
        fs::write(&path, "# nothing yet\n").unwrap();
        let file = FilterFile::open(&path, "warn".to_owned()).unwrap();
        assert_eq!(file.current(), "warn");
        let applied = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&applied);
        let following =
            tokio::spawn(file.follow(move |filter| seen.lock().unwrap().push(filter.to_string())));
        for (text, expected) in [
            ("info,\n marcot_donor=debug # loud\n", Some("marcot_donor=debug,info")),
            ("marcot=very_loud", None),
            ("", Some("warn")),
        ] {
            fs::write(&path, text).unwrap();
            tokio::time::sleep(2 * LOOK_INTERVAL).await;
            assert_eq!(applied.lock().unwrap().pop().as_deref(), expected, "{text}");
        }
        following.abort();
    }

    #[test]
    fn a_file_that_is_wrong_at_the_start_is_named() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("filter");
        let open = || FilterFile::open(&path, "info".to_owned()).unwrap_err().to_string();
        assert!(open().contains("filter: No such file"), "{}", open());
        fs::write(&path, "marcot=very_loud").unwrap();
        assert!(open().contains("`marcot=very_loud`"), "{}", open());
        fs::write(&path, "x".repeat(70_000)).unwrap();
        assert!(open().contains("more than 65536 bytes"), "{}", open());
    }
}
