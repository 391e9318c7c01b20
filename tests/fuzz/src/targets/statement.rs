//! The CLONE statement: no panic, what is read is read again from what it prints, and no error
//! shows a word of the password.
//!
//! Input: a statement.

use marcot_common::{
    connect::SslMode,
    statement::{STATEMENT_BYTES_MAX, Statement},
};

/// The parser's files.
pub const FILES: &[&str] = &["common/src/statement.rs", "common/src/statement/lexer.rs"];

/// Stands for a password: in no word of any other part.
const SECRET: &str = "Xq7secretZ9";

/// Runs one input.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let statement = match Statement::parse(text) {
        Ok(statement) => statement,
        Err(error) => {
            let lines = text.matches('\n').count() + 1;
            assert!((1..=lines).contains(&error.line) && error.column >= 1);
            assert!(error.column <= text.chars().count() + 1);
            assert!(error.near.len() <= 40 * 10 + 2, "{error}");
            return;
        }
    };
    assert!(text.len() <= STATEMENT_BYTES_MAX);
    assert_eq!(Statement::parse(&print(&statement)).as_ref(), Ok(&statement));
    let redacted = statement.redacted();
    let Statement::Instance { user, password, host, port, .. } = &statement else {
        assert_eq!(Statement::parse(&redacted), Ok(statement));
        return;
    };
    assert!(!user.is_empty() && !host.is_empty() && *port > 0);
    let (head, tail) = redacted.split_once(" IDENTIFIED BY <secret>").expect("it has a password");
    if !user.contains("IDENTIFIED BY") && !host.contains("IDENTIFIED BY") {
        let again = format!("{head} IDENTIFIED BY {}{tail}", quoted(password.expose()));
        assert_eq!(Statement::parse(&again).as_ref(), Ok(&statement));
    }
    hides_the_password(&statement, data);
}

/// Whoever leaves something out behind FROM learns what is wrong, and a log learns no secret.
fn hides_the_password(statement: &Statement, data: &[u8]) {
    let Statement::Instance { user, host, port, data_directory, ssl_mode, .. } = statement else {
        return;
    };
    let text = print(&Statement::Instance {
        user: user.clone(),
        host: host.clone(),
        port: *port,
        password: SECRET.to_owned().into(),
        data_directory: data_directory.clone(),
        ssl_mode: *ssl_mode,
    });
    if text.matches(SECRET).count() != 1 {
        return;
    }
    let behind_from = text.find(" FROM ").map_or(0, |at| at + 6);
    let secret = text.find(SECRET).unwrap_or(0);
    let number = |at: usize| usize::from(data.get(at).copied().unwrap_or(0));
    // A part before the password and a part behind it, of any length.
    let cut = |from: usize, to: usize, seed: usize| {
        let start = from + seed % (to - from + 1);
        let end = start + (seed / 7) % (to - start + 1);
        let is_whole = text.is_char_boundary(start) && text.is_char_boundary(end);
        if is_whole { start..end } else { from..from }
    };
    let before = cut(behind_from, secret, number(0) * 256 + number(1) + data.len());
    let behind = cut(secret + SECRET.len(), text.len(), number(2) * 256 + number(3));
    let left = [&text[..before.start], &text[before.end..behind.start], &text[behind.end..]];
    if let Err(error) = Statement::parse(&left.concat()) {
        assert!(!error.to_string().contains(SECRET), "{error}");
    }
}

fn print(statement: &Statement) -> String {
    match statement {
        Statement::Local { data_directory } => {
            format!("clone local data directory {}", quoted(data_directory))
        }
        Statement::Instance { user, host, port, password, data_directory, ssl_mode } => {
            let mut text = format!(
                "CLONE INSTANCE FROM {}@{}:{port} IDENTIFIED BY {}",
                quoted(user),
                quoted(host),
                quoted(password.expose())
            );
            if let Some(directory) = data_directory {
                text.push_str(&format!(" DATA DIRECTORY := {}", quoted(directory)));
            }
            text.push_str(match ssl_mode {
                SslMode::Preferred => "",
                SslMode::Required => " REQUIRE SSL",
                SslMode::Disabled => " REQUIRE NO SSL;",
            });
            text
        }
    }
}

/// Another way than the parser's own: quotes are doubled, and nothing else has an escape.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\"\""))
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    [
        "CLONE LOCAL DATA DIRECTORY = '/clones/a'",
        "clone local data directory := \"/a \\n\\t\\r\\b\\Z\\0\\%\\_\\q ''\\'\" ;;",
        "CLONE INSTANCE FROM 'u'@'h':4407 IDENTIFIED BY 'p'",
        "CLONE INSTANCE FROM u@db-1.example:1 IDENTIFIED BY \"p\"\"q\" DATA DIRECTORY '/d' REQUIRE SSL;",
        "/* a */ CLONE INSTANCE -- b\nFROM `u`@[fd00::1.2.3.4]:65535 # c\n IDENTIFIED BY '\\\\' \
         DATA DIRECTORY = 'd' REQUIRE NO SSL",
        "CLONE INSTANCE FROM CURRENT_USER@'%':0 IDENTIFIED BY",
        "CLONE INSTANCE FROM 'u'@'[::1]' : 1 IDENTIFIED BY p",
        "CLONE INSTANCE FROM u@[x]:1",
        "CLONE INSTANCE 'u' /*",
        "CLONE LOCAL DATA 'x",
        "CLONE LOCAL DATA DIRECTORY `a`",
        "CLONE LOCAL DATA DIRECTORY 'a' 'b'",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}
