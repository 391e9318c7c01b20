//! Shows where a statement is wrong, and never what may be its secret.
//!
//! Only words of the grammar are shown as typed: whatever else stands there may be the password in
//! the wrong place, and a quote that is missing makes strings of what is none.

use marcot_common::{
    failure::Failure,
    statement::{KEYWORDS, Statement, StatementError},
};

/// What stands for anything that is no word of the grammar.
const HIDDEN: &str = "***";

/// Finds a syntax error here, where it can be pointed at: the failure, and the lines to show.
pub(super) fn parse(text: &str) -> Result<Statement, (String, Failure)> {
    Statement::parse(text).map_err(|error| (show(text, &error), error.into()))
}

/// The statement's line up to the error, what stands there if it may be shown, and a caret below.
fn show(text: &str, error: &StatementError) -> String {
    let before = hide(&text[..offset_of(text, error)]);
    let near = error.near.strip_prefix('`').and_then(|near| near.strip_suffix('`'));
    let caret = " ".repeat(before.chars().count());
    format!("  {before}{}\n  {caret}^", near.unwrap_or_default())
}

/// Where in the text the error's line and column are, bytes.
fn offset_of(text: &str, error: &StatementError) -> usize {
    let lines: usize =
        text.split_inclusive('\n').take(error.line.saturating_sub(1)).map(str::len).sum();
    let column: usize =
        text[lines..].chars().take(error.column.saturating_sub(1)).map(char::len_utf8).sum();
    lines + column
}

/// The last line of what stands before the error, `***` for each word that may be secret.
fn hide(before: &str) -> String {
    let mut shown = String::new();
    for piece in pieces(before) {
        let of_grammar = KEYWORDS.iter().any(|word| word.eq_ignore_ascii_case(piece));
        match piece {
            "\n" => shown.clear(),
            _ if of_grammar || matches!(piece, "=" | ":=") => shown.push_str(piece),
            _ if piece.starts_with(char::is_whitespace) => shown.push(' '),
            _ => shown.push_str(HIDDEN),
        }
    }
    shown
}

/// Cuts into words and white space, a new line by itself; a string in quotes is part of a word. A
/// backslash takes the next character with it.
fn pieces(text: &str) -> Vec<&str> {
    let mut cuts = Vec::new();
    let mut open = None;
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match open {
            Some(_) if c == '\\' => drop(characters.next()),
            Some(quote) if c == quote => open = None,
            Some(_) => {}
            None if matches!(c, '\'' | '"' | '`') => open = Some(c),
            None if c.is_whitespace() => cuts.extend([at, at + c.len_utf8()]),
            None => {}
        }
    }
    cuts.push(text.len());
    let mut begin = 0;
    let cut = |end: usize| {
        let piece = &text[begin..end];
        begin = end;
        piece
    };
    cuts.into_iter().map(cut).filter(|piece| !piece.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        parse(text).unwrap_err().0
    }

    #[test]
    fn a_caret_stands_under_the_place() {
        assert_eq!(shown("CLONE REMOTE"), "  CLONE REMOTE\n        ^");
        assert_eq!(
            shown("CLONE INSTANCE FROM 'u'@'h' :3306 IDENTIFIED BY 'hunter2'"),
            "  CLONE INSTANCE FROM *** :\n                          ^"
        );
        assert_eq!(
            shown("CLONE INSTANCE\nFROM u@h:1\n  IDENTIFIED BY 'hunter2' REQUIRE TLS"),
            "    IDENTIFIED BY *** REQUIRE \n                              ^"
        );
        assert_eq!(shown("CLONE é"), "  CLONE é\n        ^");
        assert_eq!(shown(""), "  \n  ^");
    }

    /// Guards the password: whatever is wrong around it, it is not shown.
    #[test]
    fn one_slip_of_the_finger_shows_no_password() {
        for right in [
            "CLONE INSTANCE FROM 'u'@'h':1 IDENTIFIED BY 'hunter2' DATA DIRECTORY '/d' x",
            "CLONE INSTANCE FROM u@h:1 IDENTIFIED BY 'a\\'b hunter2 y' x",
            "CLONE INSTANCE FROM u@h:1\nIDENTIFIED BY hunter2 DATA DIRECTORY '/d",
            "CLONE INSTANCE FROM u@h:1 hunter2",
        ] {
            for at in 0..right.len() {
                for slip in ["", "'", "\"", "`", "/*", "#", "\\", "\n"] {
                    let text = format!("{}{slip}{}", &right[..at], &right[at + 1..]);
                    let Err((shown, failure)) = parse(&text) else { continue };
                    assert!(!shown.contains("hunter2"), "{text}: {shown}");
                    assert!(!failure.message.contains("hunter2"), "{text}: {failure}");
                }
            }
        }
    }
}
