//! Cuts a statement into words, strings and symbols, as MySQL does with its default SQL mode.

/// A word, string or symbol, and where it stands: byte offsets.
#[derive(Debug, Clone)]
pub(super) struct Token {
    pub(super) kind: TokenKind,
    pub(super) start: usize,
    pub(super) end: usize,
}

/// What a token is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// A keyword, a bare name, a number, or an IPv6 literal in brackets.
    Bare(String),
    /// A string, its escapes resolved, and the quote that it stood in.
    Quoted(String, char),
    /// `:=`.
    Assign,
    /// Any other character.
    Symbol(char),
}

/// Where the text cannot be cut. Names no part of it: it may be a secret.
#[derive(Debug)]
pub(super) struct BadToken {
    pub(super) offset: usize,
    pub(super) near: &'static str,
    pub(super) expected: &'static str,
}

pub(super) struct Lexer<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Lexer<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    pub(super) fn next_token(&mut self) -> Result<Option<Token>, BadToken> {
        self.skip_blank()?;
        let start = self.at;
        let Some(first) = self.peek() else {
            return Ok(None);
        };
        let kind = match first {
            '\'' | '"' | '`' => self.quoted(first)?,
            '[' => self.bracketed(),
            ':' if self.rest().starts_with(":=") => {
                self.at += 2;
                TokenKind::Assign
            }
            c if is_bare(c) => self.bare(),
            c => {
                self.at += c.len_utf8();
                TokenKind::Symbol(c)
            }
        };
        Ok(Some(Token { kind, start, end: self.at }))
    }

    /// White space and comments: `-- `, `#`, and `/* */`. The content of `/*! */` counts in MySQL
    /// for some versions only; here it is a comment.
    fn skip_blank(&mut self) -> Result<(), BadToken> {
        loop {
            let rest = self.rest();
            let trimmed = rest.trim_start();
            self.at += rest.len() - trimmed.len();
            let line_comment = trimmed.starts_with('#')
                || trimmed.strip_prefix("--").is_some_and(|rest| {
                    rest.chars().next().is_none_or(|c| c.is_whitespace() || c.is_control())
                });
            if line_comment {
                self.at += trimmed.find('\n').unwrap_or(trimmed.len());
            } else if let Some(comment) = trimmed.strip_prefix("/*") {
                let Some(end) = comment.find("*/") else {
                    return Err(BadToken {
                        offset: self.at,
                        near: "an open comment",
                        expected: "`*/` at its end",
                    });
                };
                self.at += end + 4;
            } else {
                return Ok(());
            }
        }
    }

    fn quoted(&mut self, quote: char) -> Result<TokenKind, BadToken> {
        let start = self.at;
        self.at += 1;
        let mut text = String::new();
        while let Some(c) = self.take() {
            if c == quote {
                if self.peek() != Some(quote) {
                    return Ok(TokenKind::Quoted(text, quote));
                }
                // A doubled quote stands for one.
                self.at += 1;
                text.push(quote);
            } else if c == '\\' && quote != '`' {
                match self.take() {
                    Some('0') => text.push('\0'),
                    Some('b') => text.push('\u{8}'),
                    Some('n') => text.push('\n'),
                    Some('r') => text.push('\r'),
                    Some('t') => text.push('\t'),
                    Some('Z') => text.push('\u{1a}'),
                    // These two keep their backslash: they are for patterns.
                    Some(c @ ('%' | '_')) => text.extend(['\\', c]),
                    Some(c) => text.push(c),
                    None => break,
                }
            } else {
                text.push(c);
            }
        }
        Err(BadToken {
            offset: start,
            near: "an open quote",
            expected: "a quote at the end of the string",
        })
    }

    /// An IPv6 literal in brackets, or just a bracket.
    fn bracketed(&mut self) -> TokenKind {
        let rest = self.rest();
        let literal = rest.find(']').map(|end| &rest[1..end]).filter(|literal| {
            literal.contains(':')
                && literal.chars().all(|c| c.is_ascii_hexdigit() || ":.".contains(c))
        });
        match literal {
            Some(literal) => {
                self.at += literal.len() + 2;
                TokenKind::Bare(format!("[{literal}]"))
            }
            None => {
                self.at += 1;
                TokenKind::Symbol('[')
            }
        }
    }

    fn bare(&mut self) -> TokenKind {
        let rest = self.rest();
        let end = rest.find(|c| !is_bare(c)).unwrap_or(rest.len());
        self.at += end;
        TokenKind::Bare(rest[..end].to_owned())
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn take(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }
}

/// Characters of bare names and hosts: `db-1.example.com`.
fn is_bare(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '$' | '.' | '-')
}
