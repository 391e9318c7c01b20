//! How a server that has just started shows that it is whole.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use marcot_common::failure::Failure;
use marcot_engine::{
    DatabaseConfig,
    innodb::{health, paths},
};
use tonic::Code;

use super::{Health, hooks::run_command};
use crate::source::blocking;

/// Between two questions to a server that does not answer yet.
const ASK_PAUSE: Duration = Duration::from_millis(250);

/// Longest life of a health command.
const COMMAND_MAX: Duration = Duration::from_secs(60);

/// Longest wait for the health of a server that answers: what is wrong then stays wrong.
const ANSWERING_MAX: Duration = Duration::from_secs(30);

/// Longest wait for a sign of life of a server on this host, or for a command that looks for one.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// What is asked.
#[derive(Debug, Clone)]
pub struct HealthCheck {
    /// A command that ends with 0 once the server is healthy; it is asked instead of the database.
    pub command: Option<String>,
    /// How the database is reached.
    pub database: DatabaseConfig,
    /// Its data directory, whose schemas must be there.
    pub data_directory: PathBuf,
}

impl HealthCheck {
    /// Asks until the server is healthy. `ended` tells when there is no use in asking on.
    pub async fn wait(
        &self,
        limit: Duration,
        ended: impl Fn() -> Option<Failure> + Send + Sync,
    ) -> Result<Health, Failure> {
        self.wait_within(limit, ANSWERING_MAX, ended).await
    }

    async fn wait_within(
        &self,
        limit: Duration,
        answering_max: Duration,
        ended: impl Fn() -> Option<Failure> + Send + Sync,
    ) -> Result<Health, Failure> {
        let begun = Instant::now();
        let mut answering: Option<Instant> = None;
        loop {
            let failure = match self.ask().await {
                Ok(health) => return Ok(Health { took: begun.elapsed(), ..health }),
                Err(failure) => failure,
            };
            if let Some(ended) = ended() {
                return Err(ended);
            }
            if paths::is_refusal(&failure) {
                return Err(failure);
            }
            if self.is_answer(&failure) {
                answering.get_or_insert_with(Instant::now);
            }
            let waited = answering.map_or(Duration::ZERO, |since| since.elapsed());
            if begun.elapsed() >= limit || waited >= answering_max {
                return Err(Failure::new(
                    Code::Unavailable,
                    "SERVER_NOT_HEALTHY",
                    format!(
                        "the server on {} was not healthy after {} s: {}",
                        self.data_directory.display(),
                        begun.elapsed().as_secs(),
                        failure.message
                    ),
                ));
            }
            tokio::time::sleep(ASK_PAUSE).await;
        }
    }

    /// Whether the server takes part in anything yet; `None` when nobody can tell.
    pub async fn answers(&self) -> Option<bool> {
        if self.database.socket.is_some() || self.database.url.is_some() {
            let database = self.database.clone();
            let answer = blocking(move || health::answers(&database, ANSWER_MAX)).await;
            // Whoever refuses a log-in has come up.
            return Some(answer.as_ref().err().is_none_or(is_answer));
        }
        let command = self.command.as_ref()?;
        // One that fails may have its reasons.
        run_command(command, ANSWER_MAX, |_| {}).await.ok().map(|()| true)
    }

    /// Whether it was the server that gave the failure. A command that fails says nothing of that:
    /// its server may still recover.
    fn is_answer(&self, failure: &Failure) -> bool {
        self.command.is_none() && is_answer(failure)
    }

    async fn ask(&self) -> Result<Health, Failure> {
        if let Some(command) = &self.command {
            run_command(command, COMMAND_MAX, |_| {}).await?;
            return Ok(Health::default());
        }
        let (database, directory) = (self.database.clone(), self.data_directory.clone());
        blocking(move || {
            let health = health::check(&database, &directory, &schemas(&directory))?;
            Ok(Health {
                version: health.version,
                schemas: health.schemas,
                tables_read: health.tables_read,
                took: Duration::ZERO,
            })
        })
        .await
    }
}

fn is_answer(failure: &Failure) -> bool {
    // One that has too many connections is up.
    matches!(failure.mysql_error, Some(1040 | 1203 | 1226))
        || failure.reason != "DATABASE_UNREACHABLE" && failure.reason != "DATABASE_LOST"
}

/// Schemas that have a directory, those with names that are written as they are.
fn schemas(data_directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(data_directory) else {
        return Vec::new();
    };
    let is_plain =
        |name: &String| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '$');
    entries
        .flatten()
        // Other directories (lost+found, undo, a log's) have neither of these.
        .filter(|entry| is_schema(&entry.path()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(is_plain)
        .collect()
}

fn is_schema(directory: &Path) -> bool {
    if directory.join("db.opt").exists() {
        return true;
    }
    let Ok(mut files) = std::fs::read_dir(directory) else {
        return false;
    };
    // MySQL has neither db.opt nor .frm.
    let is_table = |path: &Path| {
        path.extension().is_some_and(|e| ["frm", "ibd", "sdi"].iter().any(|known| e == *known))
    };
    files.any(|file| file.is_ok_and(|file| is_table(&file.path())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking_by(command: &str) -> HealthCheck {
        HealthCheck {
            command: Some(command.to_owned()),
            database: DatabaseConfig::default(),
            data_directory: PathBuf::from("/nowhere"),
        }
    }

    /// Guards recoveries of any length: a command that fails until the server has recovered is
    /// asked again, up to the limit and not only for as long as a server that answers.
    #[tokio::test]
    async fn a_command_is_asked_again_until_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        let count = directory.path().join("count").display().to_string();
        let check = asking_by(&format!("echo x >> {count}; [ $(wc -l < {count}) -ge 4 ]"));
        let limit = Duration::from_secs(60);
        check.wait_within(limit, Duration::from_millis(1), || None).await.unwrap();
        let check = asking_by("echo it recovers; exit 1");
        let failure = check.wait(Duration::from_millis(300), || None).await.unwrap_err();
        assert_eq!(failure.reason, "SERVER_NOT_HEALTHY");
        assert!(failure.message.contains("it recovers"), "{failure}");
    }
}
