//! Passwords: from a file, the environment, a prompt or standard input; never from an argument.

use std::{
    io::{self, IsTerminal as _},
    path::Path,
};

use marcot_common::failure::Failure;
use zeroize::Zeroizing;

/// Longest password, bytes.
const BYTES_MAX: u64 = 4096;

/// Reads a password: from `file`, else from the environment, else from a prompt.
pub(super) fn read(
    file: Option<&Path>,
    variable: &str,
    prompt: &str,
) -> Result<Zeroizing<String>, Failure> {
    if let Some(path) = file {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Failure::io("read the password from", path, &e))?;
        return Ok(first_line(text));
    }
    if let Ok(text) = std::env::var(variable) {
        return Ok(Zeroizing::new(text));
    }
    if io::stdin().is_terminal() {
        return ask(prompt);
    }
    Err(Failure::invalid(
        "NO_PASSWORD",
        format!("no password: give a password file or ${variable}, or run this on a terminal"),
    ))
}

/// Reads a new password: twice from a terminal, else one line of standard input.
pub(super) fn read_new(prompt: &str) -> Result<Zeroizing<String>, Failure> {
    let failed = |e: io::Error| Failure::io("read", Path::new("standard input"), &e);
    if !io::stdin().is_terminal() {
        let mut line = String::new();
        let mut input = io::Read::take(io::stdin(), BYTES_MAX);
        io::Read::read_to_string(&mut input, &mut line).map_err(failed)?;
        let password = first_line(line);
        if password.is_empty() {
            return Err(Failure::invalid("NO_PASSWORD", "standard input holds no password"));
        }
        return Ok(password);
    }
    let first = ask(prompt)?;
    if first != ask("Again: ")? {
        return Err(Failure::invalid("PASSWORDS_DIFFER", "the two passwords differ"));
    }
    Ok(first)
}

fn ask(prompt: &str) -> Result<Zeroizing<String>, Failure> {
    rpassword::prompt_password(prompt)
        .map(Zeroizing::new)
        .map_err(|e| Failure::io("read a password from", Path::new("the terminal"), &e))
}

/// Asks for a yes; without a terminal there is none.
pub(super) fn confirm(what: &str) -> Result<(), Failure> {
    eprintln!("{what}");
    let refused =
        || Err(Failure::invalid("NOT_CONFIRMED", "not confirmed; type yes, or give --yes"));
    if !io::stdin().is_terminal() {
        return refused();
    }
    eprint!("Type yes to go on: ");
    let mut answer = String::new();
    let read = io::stdin().read_line(&mut answer);
    if read.is_ok() && answer.trim() == "yes" { Ok(()) } else { refused() }
}

fn first_line(text: String) -> Zeroizing<String> {
    let text = Zeroizing::new(text);
    Zeroizing::new(text.lines().next().unwrap_or_default().to_owned())
}
