//! The CLONE statement, as DBAs type it for MySQL's clone plugin.
//!
//! ```text
//! CLONE LOCAL DATA DIRECTORY [= | :=] 'path'
//! CLONE INSTANCE FROM 'user'@'host':port IDENTIFIED BY 'password'
//!       [DATA DIRECTORY [= | :=] 'path'] [REQUIRE [NO] SSL]
//! ```
//! Beyond the plugin, the host may be an IPv6 literal. Errors carry MySQL's number, the column and
//! what was expected, and never a word of the password.

mod lexer;

use std::fmt;

use tonic::Code;
use zeroize::Zeroizing;

use self::lexer::{Lexer, Token, TokenKind};
use crate::{connect::SslMode, failure::Failure};

/// Longest statement, bytes.
pub const STATEMENT_BYTES_MAX: usize = 64 << 10;

/// Words of the grammar.
pub const KEYWORDS: [&str; 11] = [
    "CLONE",
    "LOCAL",
    "INSTANCE",
    "FROM",
    "IDENTIFIED",
    "BY",
    "DATA",
    "DIRECTORY",
    "REQUIRE",
    "NO",
    "SSL",
];

/// A password: shown by nothing, and wiped when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(Zeroizing<String>);

impl Password {
    /// The password itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Password {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

/// A statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Statement {
    /// CLONE LOCAL.
    Local {
        /// As typed.
        data_directory: String,
    },
    /// CLONE INSTANCE.
    Instance {
        /// Account on the donor.
        user: String,
        /// Name or literal, without brackets.
        host: String,
        /// 1 to 65535.
        port: u16,
        /// Its password.
        password: Password,
        /// As typed; `None` replaces the recipient's own.
        data_directory: Option<String>,
        /// REQUIRE clause.
        ssl_mode: SslMode,
    },
}

/// Where a statement is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("syntax error at line {line}, column {column}, near {near}: {expected} expected")]
pub struct StatementError {
    /// From 1.
    pub line: usize,
    /// From 1, in characters of the line.
    pub column: usize,
    /// What stands there, without secrets.
    pub near: String,
    /// What should stand there.
    pub expected: String,
}

impl From<StatementError> for Failure {
    fn from(error: StatementError) -> Self {
        Self::new(Code::InvalidArgument, "SYNTAX_ERROR", error.to_string())
            .mysql(1064)
            .with("line", error.line)
            .with("column", error.column)
            .with("expected", error.expected)
    }
}

impl Statement {
    /// Reads a statement.
    pub fn parse(text: &str) -> Result<Self, StatementError> {
        let mut parser = Parser::new(text)?;
        parser.keyword("CLONE")?;
        let statement = match parser.one_of(&["LOCAL", "INSTANCE"])? {
            0 => {
                parser.keyword("DATA")?;
                Self::Local { data_directory: parser.directory()? }
            }
            _ => parser.instance()?,
        };
        parser.end()?;
        Ok(statement)
    }

    /// The statement with its secret hidden, as MySQL rewrites it for its logs.
    #[must_use]
    pub fn redacted(&self) -> String {
        match self {
            Self::Local { data_directory } => {
                format!("CLONE LOCAL DATA DIRECTORY = {}", quote(data_directory))
            }
            Self::Instance { user, host, port, data_directory, ssl_mode, .. } => {
                let mut text = format!(
                    "CLONE INSTANCE FROM {}@{}:{port} IDENTIFIED BY <secret>",
                    quote(user),
                    quote(host)
                );
                if let Some(directory) = data_directory {
                    text.push_str(" DATA DIRECTORY = ");
                    text.push_str(&quote(directory));
                }
                text.push_str(match ssl_mode {
                    SslMode::Preferred => "",
                    SslMode::Required => " REQUIRE SSL",
                    SslMode::Disabled => " REQUIRE NO SSL",
                });
                text
            }
        }
    }
}

/// Writes a string literal.
fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('\'');
    for c in text.chars() {
        match c {
            '\'' => quoted.push_str("\\'"),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\0' => quoted.push_str("\\0"),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{1a}' => quoted.push_str("\\Z"),
            c => quoted.push(c),
        }
    }
    quoted.push('\'');
    quoted
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<Token>,
    next: usize,
    /// From this token on nothing of the text is shown: a password may be in it.
    secret_from: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Result<Self, StatementError> {
        let mut parser = Self { text, tokens: Vec::new(), next: 0, secret_from: usize::MAX };
        if text.len() > STATEMENT_BYTES_MAX {
            let expected = format!("a statement of at most {STATEMENT_BYTES_MAX} bytes");
            return Err(parser.error_at(0, "the beginning", &expected));
        }
        let mut lexer = Lexer::new(text);
        loop {
            match lexer.next_token() {
                Ok(Some(token)) => parser.tokens.push(token),
                Ok(None) => return Ok(parser),
                // Where a quote is missing, the rest of the text may be the password.
                Err(bad) => return Err(parser.error_at(bad.offset, bad.near, bad.expected)),
            }
        }
    }

    fn instance(&mut self) -> Result<Statement, StatementError> {
        self.keyword("FROM")?;
        self.secret_from = self.next;
        let user = self.text_token("the donor's user, as in 'user'@'host':port")?;
        self.symbol('@', "`@` and the donor's host, as in 'user'@'host':port")?;
        let host = self.host()?;
        let port = self.port()?;
        self.keyword("IDENTIFIED")?;
        self.keyword("BY")?;
        let password = match self.peek() {
            Some(TokenKind::Quoted(text, quote)) if *quote != '`' => text.clone(),
            _ => return Err(self.error("the password in quotes")),
        };
        self.next += 1;
        let mut data_directory = None;
        if self.is_keyword("DATA") {
            self.next += 1;
            data_directory = Some(self.directory()?);
        }
        let mut ssl_mode = SslMode::Preferred;
        if self.is_keyword("REQUIRE") {
            self.next += 1;
            ssl_mode = match self.one_of(&["SSL", "NO"])? {
                0 => SslMode::Required,
                _ => {
                    self.keyword("SSL")?;
                    SslMode::Disabled
                }
            };
        }
        let password = Password::from(password);
        Ok(Statement::Instance { user, host, port, password, data_directory, ssl_mode })
    }

    /// `DIRECTORY [= | :=] 'path'`, after DATA.
    fn directory(&mut self) -> Result<String, StatementError> {
        self.keyword("DIRECTORY")?;
        if matches!(self.peek(), Some(TokenKind::Assign | TokenKind::Symbol('='))) {
            self.next += 1;
        }
        match self.peek() {
            Some(TokenKind::Quoted(text, quote)) if *quote != '`' => {
                let text = text.clone();
                self.next += 1;
                Ok(text)
            }
            _ => Err(self.error("the directory's path in quotes")),
        }
    }

    fn host(&mut self) -> Result<String, StatementError> {
        let host = match self.peek() {
            Some(TokenKind::Quoted(text, _) | TokenKind::Bare(text)) => text.clone(),
            _ => return Err(self.error("the donor's host")),
        };
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(&host);
        if host.is_empty() || host.contains(['%', '[', ']']) {
            return Err(self.error("the host name or address of one donor"));
        }
        let host = host.to_owned();
        self.next += 1;
        Ok(host)
    }

    /// `:port`, without white space around the colon, as the plugin wants it.
    fn port(&mut self) -> Result<u16, StatementError> {
        const COLON: &str = "`:` and the donor's port, without white space,";
        let host_end = self.tokens[self.next - 1].end;
        match self.tokens.get(self.next) {
            Some(token) if token.kind == TokenKind::Symbol(':') && token.start == host_end => {}
            _ => return Err(self.error(COLON)),
        }
        let colon = self.next;
        self.next += 1;
        let number = match self.tokens.get(self.next) {
            Some(Token { kind: TokenKind::Bare(text), start, .. })
                if *start == self.tokens[colon].end =>
            {
                text.clone()
            }
            _ => {
                self.next = colon;
                return Err(self.error(COLON));
            }
        };
        let port = number.parse().ok().filter(|&port: &u16| port != 0);
        let port = port.ok_or_else(|| self.error("a port from 1 to 65535"))?;
        self.next += 1;
        Ok(port)
    }

    fn text_token(&mut self, expected: &str) -> Result<String, StatementError> {
        match self.peek() {
            Some(TokenKind::Bare(text)) if text.eq_ignore_ascii_case("CURRENT_USER") => {
                Err(self.error(expected))
            }
            Some(TokenKind::Quoted(text, _) | TokenKind::Bare(text)) if !text.is_empty() => {
                let text = text.clone();
                self.next += 1;
                Ok(text)
            }
            _ => Err(self.error(expected)),
        }
    }

    fn symbol(&mut self, symbol: char, expected: &str) -> Result<(), StatementError> {
        if self.peek() != Some(&TokenKind::Symbol(symbol)) {
            return Err(self.error(expected));
        }
        self.next += 1;
        Ok(())
    }

    fn keyword(&mut self, word: &str) -> Result<(), StatementError> {
        self.one_of(&[word]).map(|_| ())
    }

    fn one_of(&mut self, words: &[&str]) -> Result<usize, StatementError> {
        match words.iter().position(|word| self.is_keyword(word)) {
            Some(index) => {
                self.next += 1;
                Ok(index)
            }
            None => Err(self.error(&words.join(" or "))),
        }
    }

    fn is_keyword(&self, word: &str) -> bool {
        matches!(self.peek(), Some(TokenKind::Bare(text)) if text.eq_ignore_ascii_case(word))
    }

    fn end(&mut self) -> Result<(), StatementError> {
        while self.peek() == Some(&TokenKind::Symbol(';')) {
            self.next += 1;
        }
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(self.error("the end of the statement")),
        }
    }

    fn peek(&self) -> Option<&TokenKind> {
        self.tokens.get(self.next).map(|token| &token.kind)
    }

    /// The present token is not what was expected.
    fn error(&self, expected: &str) -> StatementError {
        let Some(token) = self.tokens.get(self.next) else {
            return self.error_at(self.text.len(), "the end", expected);
        };
        let near = match &token.kind {
            // A string may be the password, in the wrong place.
            TokenKind::Quoted(..) => "a string in quotes".to_owned(),
            TokenKind::Bare(_) | TokenKind::Symbol(_) if self.may_be_secret(token) => {
                "a word".to_owned()
            }
            _ => {
                let shown: String = self.text[token.start..token.end].chars().take(40).collect();
                format!("`{}`", shown.escape_debug())
            }
        };
        self.error_at(token.start, &near, expected)
    }

    /// Who forgets a word types the password in its place, and a quote that is missing, or one too
    /// many, turns strings inside out. Signs and words of the grammar tell nothing anywhere.
    fn may_be_secret(&self, token: &Token) -> bool {
        let of_grammar = match &token.kind {
            TokenKind::Bare(word) => KEYWORDS.iter().any(|k| k.eq_ignore_ascii_case(word)),
            kind => matches!(kind, TokenKind::Symbol(':' | ';' | '=' | '@')),
        };
        let is_quoted = |token: &Token| matches!(token.kind, TokenKind::Quoted(..));
        let exposed =
            self.next >= self.secret_from || self.tokens[..self.next].iter().any(is_quoted);
        exposed && !of_grammar
    }

    fn error_at(&self, offset: usize, near: &str, expected: &str) -> StatementError {
        let before = &self.text[..offset.min(self.text.len())];
        let line = before.rsplit('\n').next().unwrap_or_default();
        StatementError {
            line: before.matches('\n').count() + 1,
            column: line.chars().count() + 1,
            near: near.to_owned(),
            expected: expected.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests;
