//! sysbench's oltp_write_only beside the load. Its errors count, and so does its end: one that it
//! may not ignore ends it.

use std::{
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, Stdio},
};

use crate::{database::Database, wait_for};

/// Errors of a conflict, as `errors::CONFLICTS` has them: counted as err/s, and tried again.
const IGNORED: &str = "--mysql-ignore-errors=1205,1213,1020";

/// What it did, by its reports of each second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sysbench {
    /// Transactions.
    pub transactions: f64,
    /// Transactions that were tried again.
    pub errors: f64,
    /// Connections that were lost and made again.
    pub reconnects: f64,
}

pub(super) struct Running {
    child: Child,
    output: File,
}

impl Running {
    /// At most `rate` transactions per second; 0: as many as the server takes.
    pub(super) fn start(server: &Database, rate: u64) -> Self {
        if server.query("SHOW DATABASES LIKE 'sbtest'").is_empty() {
            drop(server.query("CREATE DATABASE sbtest"));
            let output = command(server, "prepare").output();
            let output = output.expect("sysbench: `make test` installs it");
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "sysbench prepare: {text}");
        }
        let output = tempfile::tempfile().expect("a temporary file");
        let twin = || Stdio::from(output.try_clone().expect("a file can be shared"));
        let rate = format!("--rate={rate}");
        let child = command(server, "run").arg(rate).stdout(twin()).stderr(twin()).spawn();
        Self { child: child.expect("sysbench: `make test` installs it"), output }
    }

    /// Ends it; an error when it had ended by itself or lost a connection.
    pub(super) fn end(mut self) -> Result<Sysbench, String> {
        let early = self.child.try_wait().expect("our own child");
        self.child.kill().expect("our own child");
        let status = self.child.wait().expect("our own child");
        let mut text = String::new();
        self.output.seek(SeekFrom::Start(0)).expect("our own file");
        self.output.read_to_string(&mut text).expect("our own file");
        if early.is_some() || status.signal() != Some(9) {
            let tail: Vec<&str> = text.lines().rev().take(5).collect();
            return Err(format!("sysbench ended by itself with {status}: {tail:?}"));
        }
        let done = parse(&text);
        if done.reconnects > 0.0 {
            return Err(format!("sysbench lost its connection: {done:?}"));
        }
        Ok(done)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        wait_for("sysbench to end", || self.child.try_wait().expect("our own child"));
    }
}

fn command(server: &Database, verb: &str) -> Command {
    let mut command = Command::new("sysbench");
    command
        .args(["oltp_write_only", "--tables=4", "--table-size=10000", "--threads=2", "--time=0"])
        .args(["--db-driver=mysql", "--mysql-user=root", "--mysql-db=sbtest"])
        .arg(format!("--mysql-socket={}", server.socket().display()))
        .args([IGNORED, "--report-interval=1", verb])
        .stdin(Stdio::null());
    command
}

/// Adds up lines as `[ 3s ] thds: 2 tps: 812.10 qps: ... err/s: 0.00 reconn/s: 0.00`.
fn parse(text: &str) -> Sysbench {
    let mut sum = Sysbench::default();
    for line in text.lines().filter(|line| line.contains("tps:")) {
        let field = |key: &str| -> f64 {
            let rest = line.split_once(key).map(|(_, rest)| rest.trim_start());
            rest.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
        };
        sum.transactions += field("tps:");
        sum.errors += field("err/s:");
        sum.reconnects += field("reconn/s:");
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_of_each_second_are_added_up() {
        let text = "[ 1s ] thds: 2 tps: 800.50 qps: 4803.00 (r/w/o: 0.00/3201.00/1602.00) \
                    lat (ms,95%): 4.10 err/s: 2.00 reconn/s: 0.00\nFATAL: no report\n\
                    [ 2s ] thds: 2 tps: 0.50 qps: 3.00 err/s: 1.00 reconn/s: 1.00\n";
        let expected = Sysbench { transactions: 801.0, errors: 3.0, reconnects: 1.0 };
        assert_eq!(parse(text), expected);
    }
}
