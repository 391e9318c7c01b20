//! Accounts of the database that is cloned: a caller logs in to it as itself, and needs the
//! privileges there that the donor's own account needs for a clone.

use std::time::Duration;

use marcot_common::{connection::Privilege, failure::Failure, login::DatabaseAccounts};
use tonic::Code;

use super::server::{
    DatabaseConfig, NOT_NOW, Server, Session, SqlError, WAY_NOT_KNOWN, check_privileges,
};

/// Longest wait for an answer of the server's: a log-in has 20 s.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// How an account may be known by its password alone, as SHOW CREATE USER says it: MariaDB's short
/// form and its VIA, and MySQL's WITH.
const BY_PASSWORD: [&str; 5] = [
    "IDENTIFIED BY PASSWORD '",
    "IDENTIFIED VIA mysql_native_password USING '",
    "IDENTIFIED VIA ed25519 USING '",
    "IDENTIFIED WITH 'mysql_native_password' AS '",
    "IDENTIFIED WITH 'caching_sha2_password' AS ",
];

/// The server's accounts.
#[derive(Debug)]
pub struct ServerAccounts {
    server: Server,
}

impl ServerAccounts {
    /// Checks how the server is to be reached; it need not run yet.
    pub fn new(config: &DatabaseConfig) -> Result<Self, Failure> {
        Ok(Self { server: Server::new(config)? })
    }
}

impl DatabaseAccounts for ServerAccounts {
    fn log_in(&self, user: &str, password: &str) -> Result<Vec<Privilege>, Failure> {
        let mut session = self
            .server
            .connect_as(user, password, ANSWER_MAX)
            .map_err(|error| refused(user, error))?;
        check_account(&mut session, user)?;
        check_privileges(&mut session).map_err(|failure| lacks_privilege(user, failure))?;
        Ok(vec![Privilege::BackupAdmin])
    }
}

/// The server knows an account by what the donor's process is, not by the password, when it has
/// unix_socket for it: then the log-in proves nothing about the caller. The same goes for an account
/// of another name that the server took this user for.
fn check_account(session: &mut Session, user: &str) -> Result<(), Failure> {
    let mut ask = |sql| {
        let row = session.row(sql).map_err(|error| refused(user, error))?;
        Ok::<_, Failure>(row.map(|row| row.text(0)).unwrap_or_default())
    };
    let account = ask("SELECT CURRENT_USER()")?;
    let name = account.rsplit_once('@').map_or("", |(name, _)| name);
    let made = ask("SHOW CREATE USER CURRENT_USER()")?;
    if name == user && is_by_password(&made) {
        return Ok(());
    }
    Err(Failure::new(
        Code::Unauthenticated,
        "ACCOUNT_WITHOUT_PASSWORD",
        format!(
            "the database takes user '{user}' for its account {account}, which is not known by a \
             password alone; clone with an account that is (mysql_native_password, ed25519, \
             caching_sha2_password)"
        ),
    )
    .mysql(1045))
}

/// Whether the statement that makes an account wants a password and takes nothing else instead.
fn is_by_password(made: &str) -> bool {
    // Behind the name, which may hold anything but a quote of its own kind.
    let Some((_, way)) = made.split_once(" IDENTIFIED ") else { return false };
    let way = format!("IDENTIFIED {way}");
    // Without what is quoted: a verifier may hold any word.
    let lower = way.split('\'').step_by(2).collect::<String>().to_ascii_lowercase();
    let other = ["unix_socket", "auth_socket", "gssapi", "named_pipe", "pam", "invalid"];
    BY_PASSWORD.iter().any(|known| way.starts_with(known))
        && other.iter().all(|word| !lower.contains(word))
}

/// What the server says to a log-in, in the words of the plugin's donor.
fn refused(user: &str, error: SqlError) -> Failure {
    match error {
        // The same as for an account of a file, whoever it is. A MySQL asks for any of the ways that its
        // accounts have where there is no such user, so that nobody can tell.
        SqlError::Server { code: code @ (1045 | 1524 | 1698 | WAY_NOT_KNOWN), message } => {
            // 1524: a way that the server does not know any more.
            if matches!(code, 1524 | WAY_NOT_KNOWN) {
                tracing::warn!(user, why = message, "the database wants another kind of log-in");
            }
            Failure::new(
                Code::Unauthenticated,
                "ACCESS_DENIED",
                format!("Access denied for user '{user}'; check user and password"),
            )
            .mysql(1045)
        }
        SqlError::Server { code, message } if NOT_NOW.contains(&code) => Failure::new(
            Code::Unavailable,
            "DATABASE_UNREACHABLE",
            format!("the donor's database takes no connection now: error {code}: {message}"),
        )
        .mysql(code.into()),
        SqlError::Server { code: code @ (3118 | 4151), message } => {
            Failure::new(Code::Unauthenticated, "ACCOUNT_LOCKED", message).mysql(code.into())
        }
        // 1820 comes from a server that lets such a user in, to change the password and no more.
        SqlError::Server { code: 1820 | 1862, .. } => Failure::new(
            Code::Unauthenticated,
            "PASSWORD_EXPIRED",
            format!(
                "the password of user '{user}' has expired: change it with a client of the database"
            ),
        )
        .mysql(1862),
        SqlError::Server { code, message } => Failure::new(
            Code::Unauthenticated,
            "DATABASE_LOG_IN_REFUSED",
            format!("the database refused user '{user}': error {code}: {message}"),
        )
        .mysql(code.into()),
        SqlError::Lost(text) => Failure::new(
            Code::Unavailable,
            "DATABASE_UNREACHABLE",
            format!("log in to the donor's database: {text}"),
        )
        .mysql(2013),
    }
}

fn lacks_privilege(user: &str, failure: Failure) -> Failure {
    // 1227, or 1142 where it lacks a table, 1370 a function.
    let number = match failure.mysql_error {
        Some(number) if failure.reason == "DATABASE_PRIVILEGE_MISSING" => number,
        _ => return failure,
    };
    let text = format!(
        "user '{user}' of the donor's database may not be cloned from: {}",
        failure.message.replace("to the donor's account", "to that user")
    );
    Failure::new(Code::PermissionDenied, "PRIVILEGE_REQUIRED", text).mysql(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards against an account that the server knows by the donor's own process: with
    /// `is_by_password` made to say true, anybody logs in as it.
    #[test]
    fn only_accounts_known_by_a_password_alone_pass() {
        let user = "CREATE USER `u`@`%`";
        for (way, expected) in [
            (" IDENTIFIED BY PASSWORD '*2470C0C06DEE42FD1618BB99005ADCA2EC9D1E19'", true),
            (" IDENTIFIED VIA ed25519 USING 'ZIgUREUg5PVgQ6LskhXmO+eZLS0nC8be6HPjYWR4YJY'", true),
            (" IDENTIFIED VIA ed25519 USING 'pAm/unix_socket+'", true),
            (" IDENTIFIED WITH 'caching_sha2_password' AS '$A$005$x' REQUIRE NONE", true),
            ("", false),
            (" IDENTIFIED VIA unix_socket", false),
            (" IDENTIFIED VIA mysql_native_password USING '*2' OR unix_socket", false),
            (" IDENTIFIED VIA unix_socket OR mysql_native_password USING '*2'", false),
            (" IDENTIFIED VIA pam USING 'mariadb'", false),
            (" IDENTIFIED WITH 'auth_socket'", false),
            (" IDENTIFIED WITH 'mysql_clear_password' AS 'x'", false),
        ] {
            assert_eq!(is_by_password(&format!("{user}{way}")), expected, "{way}");
        }
    }
}
