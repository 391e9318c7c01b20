//! What a server program says of itself while no server runs: `--verbose --help` prints the values
//! that it would start with, from its configuration and arguments, and touches no data.

use std::{collections::BTreeMap, ffi::OsString, path::PathBuf, process::Stdio, time::Duration};

use marcot_common::failure::Failure;
use tokio::{io::AsyncReadExt as _, process::Command};

use crate::supervise::children;

/// Longest wait for its text: it takes a tenth of a second on a slow host.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// Most bytes of its text; MariaDB's has 200 KiB.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// A server program, and how it is started.
#[derive(Debug, Clone, Default)]
pub struct ServerBinary {
    /// The program.
    pub path: PathBuf,
    /// Arguments that the server gets.
    pub arguments: Vec<OsString>,
}

impl ServerBinary {
    /// Asks for the variables that it would start with.
    pub async fn ask(&self) -> Result<BTreeMap<String, String>, Failure> {
        let shown = self.path.display();
        let failed = |why: String| {
            let text = format!("--server-binary {shown} --verbose --help: {why}");
            Failure::precondition("SERVER_BINARY", text)
        };
        let mut command = Command::new(&self.path);
        command
            .args(&self.arguments)
            .args(["--verbose", "--help"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let (mut child, _own) =
            children::spawn(&mut command).map_err(|e| failed(format!("cannot be started: {e}")))?;
        let stdout = child.stdout.take().ok_or_else(|| failed("has no output".to_owned()))?;
        let mut text = Vec::new();
        let answer = async {
            stdout.take(ANSWER_BYTES_MAX).read_to_end(&mut text).await?;
            if text.len() as u64 >= ANSWER_BYTES_MAX {
                child.kill().await?;
            }
            child.wait().await
        };
        let status = tokio::time::timeout(ANSWER_MAX, answer)
            .await
            .map_err(|_| failed(format!("has not ended in {} s", ANSWER_MAX.as_secs())))?
            .map_err(|e| failed(e.to_string()))?;
        let variables = read(&String::from_utf8_lossy(&text));
        if !status.success() || !variables.contains_key("version") {
            return Err(failed(format!(
                "ended with {status}, and printed {} bytes that no MariaDB or MySQL server prints; \
                 give the server's own program, as mariadbd or mysqld",
                text.len()
            )));
        }
        Ok(variables)
    }
}

/// Reads the first line, `Ver V for OS on MACHINE`, and the table of variables.
fn read(text: &str) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    let words: Vec<&str> = text.lines().next().unwrap_or_default().split_whitespace().collect();
    for (before, name) in
        [("Ver", "version"), ("for", "version_compile_os"), ("on", "version_compile_machine")]
    {
        if let Some(at) = words.iter().position(|word| *word == before)
            && let Some(value) = words.get(at + 1)
        {
            variables.insert(name.to_owned(), (*value).to_owned());
        }
    }
    let table = text
        .lines()
        .skip_while(|line| !line.starts_with("Variables (--variable-name=value)"))
        .skip_while(|line| !line.starts_with("---"))
        .skip(1)
        .take_while(|line| !line.trim().is_empty());
    for line in table {
        let Some((name, value)) = line.split_once(char::is_whitespace) else { continue };
        let value = match value.trim() {
            "(No default value)" => "",
            "TRUE" => "ON",
            "FALSE" => "OFF",
            value => value,
        };
        // The running server's own form of them has more to it, or they are only its own words.
        variables.entry(name.replace('-', "_")).or_insert_with(|| value.to_owned());
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_variables_is_read_as_the_server_would_say_them() {
        let text = "\
/usr/sbin/mariadbd  Ver 10.11.18-MariaDB-0+deb12u1 for debian-linux-gnu on x86_64 (Debian 12)
Copyright

  --innodb-page-size=#
Variables (--variable-name=value)
and boolean options {FALSE|TRUE}    Value (after reading options)
----------------------------------- -----------------------------
innodb-page-size                                             8192
innodb-data-file-path                  ibdata1:12M:autoextend
innodb-undo-directory                         (No default value)
read-only                                                   FALSE
version                                 10.11.18-MariaDB-0+deb12u1

To see what values a running server is using
read-only TRUE
";
        let variables = read(text);
        for (name, value) in [
            ("version", "10.11.18-MariaDB-0+deb12u1"),
            ("version_compile_os", "debian-linux-gnu"),
            ("version_compile_machine", "x86_64"),
            ("innodb_page_size", "8192"),
            ("innodb_data_file_path", "ibdata1:12M:autoextend"),
            ("innodb_undo_directory", ""),
            ("read_only", "OFF"),
        ] {
            assert_eq!(variables.get(name).map(String::as_str), Some(value), "{name}");
        }
    }

    #[tokio::test]
    async fn a_program_that_is_no_server_is_told() {
        for (path, text) in
            [("/bin/true", "printed 0 bytes"), ("/nonexistent", "cannot be started")]
        {
            let binary = ServerBinary { path: path.into(), arguments: Vec::new() };
            let failure = binary.ask().await.unwrap_err();
            assert!(failure.message.contains(text), "{failure}");
        }
    }
}
