//! The statement as DBAs type it, rightly and wrongly.

use proptest::prelude::*;

use super::*;

fn instance(text: &str) -> (String, String, u16, String, Option<String>, SslMode) {
    match Statement::parse(text) {
        Ok(Statement::Instance { user, host, port, password, data_directory, ssl_mode }) => {
            (user, host, port, password.expose().to_owned(), data_directory, ssl_mode)
        }
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn local_takes_every_sign_of_assignment_and_any_case() {
    for text in [
        "CLONE LOCAL DATA DIRECTORY = '/p'",
        "clone local data directory '/p';",
        "Clone Local Data Directory := \"/p\" ;",
        "CLONE\tLOCAL\nDATA DIRECTORY='/p'",
        "/* why */ CLONE LOCAL -- here\nDATA # there\nDIRECTORY = '/p' -- end",
        "CLONE LOCAL DATA DIRECTORY='/p'/*! 80017 x */",
    ] {
        let expected = Statement::Local { data_directory: "/p".to_owned() };
        assert_eq!(Statement::parse(text), Ok(expected), "{text}");
    }
}

#[test]
fn instance_takes_quotes_bare_names_and_addresses() {
    let plain = ("u".into(), "h".into(), 3306, "p".into(), None, SslMode::Preferred);
    for text in [
        "CLONE INSTANCE FROM 'u'@'h':3306 IDENTIFIED BY 'p'",
        "clone instance from u@h:3306 identified by \"p\";",
        "CLONE INSTANCE FROM `u`@`h`:3306 IDENTIFIED BY 'p'",
        "CLONE INSTANCE FROM 'u' @ 'h':3306 IDENTIFIED BY 'p'",
    ] {
        assert_eq!(instance(text), plain, "{text}");
    }
    for (host, expected) in [
        ("db-1.example.com", "db-1.example.com"),
        ("127.0.0.1", "127.0.0.1"),
        ("'::1'", "::1"),
        ("'[::1]'", "::1"),
        ("[fe80::1:2]", "fe80::1:2"),
    ] {
        let text = format!("CLONE INSTANCE FROM u@{host}:1 IDENTIFIED BY ''");
        assert_eq!(instance(&text).1, expected, "{text}");
    }
}

#[test]
fn clauses_come_in_their_order() {
    let text = "CLONE INSTANCE FROM 'u'@'h':1 IDENTIFIED BY 'p' \
                DATA DIRECTORY = '/d' REQUIRE NO SSL";
    let (.., directory, ssl_mode) = instance(text);
    assert_eq!((directory, ssl_mode), (Some("/d".to_owned()), SslMode::Disabled));
    let text = "CLONE INSTANCE FROM 'u'@'h':1 IDENTIFIED BY 'p' REQUIRE SSL";
    assert_eq!(instance(text).5, SslMode::Required);
    let text = "CLONE INSTANCE FROM 'u'@'h':1 IDENTIFIED BY 'p' REQUIRE SSL DATA DIRECTORY '/d'";
    assert!(Statement::parse(text).unwrap_err().expected.contains("end of the statement"));
}

#[test]
fn escapes_are_mysqls() {
    let text = r#"CLONE INSTANCE FROM 'o''x'@'h':1 IDENTIFIED BY 'a\'b\\c\nd\%e"f'"#;
    let (user, _, _, password, ..) = instance(text);
    assert_eq!(user, "o'x");
    assert_eq!(password, "a'b\\c\nd\\%e\"f");
}

#[test]
fn a_wrong_statement_is_told_where_and_what() {
    for (text, column, expected) in [
        ("CLONE", 6, "LOCAL or INSTANCE"),
        ("CLONE REMOTE", 7, "LOCAL or INSTANCE"),
        ("CLONE LOCAL DATA DIRECTORY /p", 28, "path in quotes"),
        ("CLONE INSTANCE FROM 'u' IDENTIFIED BY 'p'", 25, "`@`"),
        ("CLONE INSTANCE FROM 'u'@'h' IDENTIFIED BY 'p'", 29, "`:`"),
        ("CLONE INSTANCE FROM 'u'@'h' :3306 IDENTIFIED BY 'p'", 29, "without white space"),
        ("CLONE INSTANCE FROM 'u'@'h': 3306 IDENTIFIED BY 'p'", 28, "without white space"),
        ("CLONE INSTANCE FROM 'u'@'h':99999 IDENTIFIED BY 'p'", 29, "port from 1 to 65535"),
        ("CLONE INSTANCE FROM 'u'@'h':0 IDENTIFIED BY 'p'", 29, "port from 1 to 65535"),
        ("CLONE INSTANCE FROM 'u'@'%':1 IDENTIFIED BY 'p'", 25, "one donor"),
        ("CLONE INSTANCE FROM 'u'@'[[::1]]':1 IDENTIFIED BY 'p'", 25, "one donor"),
        ("CLONE INSTANCE FROM CURRENT_USER@h:1 IDENTIFIED BY 'p'", 21, "donor's user"),
        ("CLONE INSTANCE FROM 'u'@'h':1 IDENTIFIED BY secret", 45, "password in quotes"),
        ("CLONE LOCAL DATA DIRECTORY '/p", 28, "quote at the end"),
        ("/* CLONE", 1, "`*/`"),
        ("CLONE LOCAL DATA DIRECTORY '/p' x", 33, "end of the statement"),
    ] {
        let error = Statement::parse(text).unwrap_err();
        assert_eq!((error.line, error.column), (1, column), "{text}: {error}");
        assert!(error.expected.contains(expected), "{text}: {error}");
        assert!(!error.near.contains("secret"), "{error}");
    }
    let error = Statement::parse("CLONE LOCAL DATA DIRECTRY '/p'").unwrap_err();
    assert_eq!(error.near, "`DIRECTRY`");
    let error = Statement::parse("CLONE\n  LOCAL\n  ÄÖ x").unwrap_err();
    assert_eq!((error.line, error.column), (3, 3));
    let failure = Failure::from(error);
    assert_eq!((failure.mysql_error, failure.reason.as_ref()), (Some(1064), "SYNTAX_ERROR"));
}

#[test]
fn redacted_hides_the_secret_and_debug_does_too() {
    let text = "CLONE INSTANCE FROM 'u'@'h':1 IDENTIFIED BY 'hunter2' DATA DIRECTORY '/d'";
    let statement = Statement::parse(text).unwrap();
    let redacted = statement.redacted();
    assert_eq!(
        redacted,
        "CLONE INSTANCE FROM 'u'@'h':1 IDENTIFIED BY <secret> DATA DIRECTORY = '/d'"
    );
    assert!(!format!("{statement:?}").contains("hunter2"));
}

/// Guards the password: a quote that is missing or one too many turns strings inside out, and a
/// word that is missing puts the password in its place.
#[test]
fn one_slip_of_the_finger_shows_no_password() {
    const SECRET: &str = "hunter2";
    for right in [
        "CLONE INSTANCE FROM 'u'@'h':1 IDENTIFIED BY 'hunter2' DATA DIRECTORY '/d' REQUIRE SSL",
        "CLONE INSTANCE FROM u@h:1 IDENTIFIED BY 'x hunter2 y'",
        "CLONE INSTANCE FROM u@h:1 IDENTIFIED BY hunter2",
        "CLONE INSTANCE FROM u@h:1 IDENTIFIED hunter2",
        "CLONE INSTANCE FROM u@h:1 hunter2",
        "CLONE INSTANCE FROM u hunter2",
    ] {
        for at in 0..right.len() {
            let mut texts = vec![format!("{}{}", &right[..at], &right[at + 1..])];
            texts.extend(
                ["'", "\"", "`", "/*", "#", ":", " "]
                    .map(|slip| format!("{}{slip}{}", &right[..at], &right[at..])),
            );
            for text in texts {
                if let Err(error) = Statement::parse(&text) {
                    assert!(!error.to_string().contains(SECRET), "{text}: {error}");
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn any_text_is_a_statement_or_an_error(text in "\\PC{0,200}") {
        drop(Statement::parse(&text));
    }

    #[test]
    fn tokens_in_any_order_do_not_panic(words in prop::collection::vec(
        prop::sample::select(vec![
            "CLONE", "INSTANCE", "LOCAL", "FROM", "'u'", "@", "'h'", ":", "3306", "IDENTIFIED",
            "BY", "DATA", "DIRECTORY", "=", ":=", "REQUIRE", "NO", "SSL", ";", "'", "`", "\\", "[",
        ]), 0..20))
    {
        drop(Statement::parse(&words.join(" ")));
        drop(Statement::parse(&words.concat()));
    }

    /// Guards the password: whatever is wrong around it, no error shows it.
    #[test]
    fn no_error_shows_the_password(before in "[ -~]{0,30}", after in "[ -~]{0,30}") {
        let secret = "Zq9Xw7Kj";
        for text in [
            format!("CLONE INSTANCE FROM {before}'u'@'h':1 IDENTIFIED BY '{secret}' {after}"),
            format!("CLONE INSTANCE FROM 'u'@'h':1 IDENTIFIED BY {secret} {after}"),
            format!("CLONE INSTANCE FROM 'u'@'h':1 IDENTIFIED BY '{secret} {after}"),
            format!("CLONE INSTANCE FROM 'u'@'h':1 '{secret}' {after}"),
            format!("CLONE INSTANCE FROM 'u'@'{secret}':x {after}"),
        ] {
            if let Err(error) = Statement::parse(&text) {
                prop_assert!(!error.to_string().contains(secret), "{error}");
            }
        }
    }

    #[test]
    fn what_was_redacted_reads_the_same_again(
        user in "[^\\x00]{1,12}", directory in "[^\\x00]{0,20}", port in 1u16..,
    ) {
        let statement = Statement::Instance {
            user,
            host: "db.example".to_owned(),
            port,
            password: String::from("x").into(),
            data_directory: Some(directory),
            ssl_mode: SslMode::Required,
        };
        let text = statement.redacted().replacen("<secret>", "'x'", 1);
        if text.matches("'x'").count() == 1 {
            prop_assert_eq!(Statement::parse(&text), Ok(statement));
        }
    }
}
