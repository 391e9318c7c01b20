//! The accounts file: no panic, what is read and written is read again, names and privileges are
//! right, and no error shows what the file keeps secret.
//!
//! Input: a file, in which `@SETUP@` and `@VERIFIER@` stand for right values, which are long.

use std::sync::{Once, OnceLock};

use marcot_common::{
    accounts::{Accounts, AccountsError, AccountsFile, NAME_BYTES_MAX},
    connection::Privilege,
};

use crate::scratch;

/// The parser's files.
pub const FILES: &[&str] = &["common/src/accounts.rs"];

/// The long values of a file.
struct Secrets {
    setup: String,
    verifier: String,
}

/// Bytes of a secret that tell something.
const SHOWN_MAX: usize = 12;

/// Runs one input.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let secrets = secrets();
    let whole = text.replace("@SETUP@", &secrets.setup).replace("@VERIFIER@", &secrets.verifier);
    let path = scratch::file("accounts.toml", whole.as_bytes());
    let mut accounts = match Accounts::open(&path) {
        Ok(accounts) => accounts,
        Err(error) => return shows_no_secret(text, &error),
    };
    let listed = accounts.list();
    for account in &listed {
        let name = &account.name;
        assert!(!name.is_empty() && name.len() <= NAME_BYTES_MAX, "{name}");
        assert!(!name.chars().any(char::is_control), "{name}");
        assert_eq!(accounts.privileges(name).as_ref(), Some(&account.privileges));
    }
    let file = AccountsFile::open(&path).expect("it was right a moment ago");
    accounts.save().expect("what was read is written");
    assert_eq!(file.current().expect("what was written is right").list(), listed);
    if let Some(account) = listed.first() {
        let asked = [Privilege::Monitor, Privilege::BackupAdmin, Privilege::Monitor];
        accounts.set_privileges(&account.name, &asked).expect("it is there");
        assert!(accounts.set_privileges(&account.name, &[]).is_err());
        accounts.save().expect("what was changed is written");
        let ascending = Some(vec![Privilege::BackupAdmin, Privilege::Monitor]);
        assert_eq!(Accounts::open(&path).expect("right").privileges(&account.name), ascending);
        accounts.remove(&account.name).expect("it is there");
        let gone = accounts.remove(&account.name);
        assert!(matches!(gone, Err(AccountsError::Unknown(_))));
        assert_eq!(accounts.list()[..], listed[1..]);
    }
    add_once(accounts);
}

/// Of a file that is made in the beginning.
fn secrets() -> &'static Secrets {
    static SECRETS: OnceLock<Secrets> = OnceLock::new();
    SECRETS.get_or_init(|| {
        let path = scratch::directory().join("made.toml");
        let mut accounts = Accounts::open_or_create(&path).expect("there is none yet");
        accounts.add("a", "p", &[Privilege::Monitor]).expect("it is new");
        accounts.save().expect("room for a file");
        let text = std::fs::read_to_string(&path).expect("it was written");
        let value = |key: &str| {
            let (_, rest) = text.split_once(&format!("\n{key} = \"")).expect("it has the key");
            rest.split('"').next().unwrap_or_default().to_owned()
        };
        Secrets { setup: value("server_setup"), verifier: value("verifier") }
    })
}

/// A new password is made hard to guess, which takes long: once in a run.
fn add_once(mut accounts: Accounts) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for wrong in ["", "a\n", &"x".repeat(NAME_BYTES_MAX + 1)] {
            let added = accounts.add(wrong, "p", &[Privilege::Monitor]);
            assert!(matches!(added, Err(AccountsError::BadName(_))));
        }
        let none = accounts.add("somebody new", "p", &[]);
        assert!(matches!(none, Err(AccountsError::NoPrivilege(_))));
        accounts.add("somebody new", "p", &[Privilege::Monitor]).expect("it is new");
        accounts.save().expect("what was added is written");
        let again = accounts.add("somebody new", "p", &[Privilege::Monitor]);
        assert!(matches!(again, Err(AccountsError::Exists(_))));
        let missing = scratch::directory().join("missing.toml");
        let begun = Accounts::open_or_create(&missing).expect("a new one is begun");
        assert!(begun.list().is_empty() && format!("{begun:?}").contains("0 accounts"));
    });
}

/// An error goes to the log. Secrets that stand where others belong are not known as such.
fn shows_no_secret(text: &str, error: &AccountsError) {
    let stands_right =
        |word: &str, key: &str| text.match_indices(word).all(|(at, _)| text[..at].ends_with(key));
    let error = error.to_string();
    for (word, key, secret) in [
        ("@SETUP@", "\nserver_setup = \"", &secrets().setup),
        ("@VERIFIER@", "\nverifier = \"", &secrets().verifier),
    ] {
        if stands_right(word, key) {
            let shown = secret.as_bytes().windows(SHOWN_MAX);
            let shown = shown.filter_map(|part| std::str::from_utf8(part).ok());
            assert!(!shown.into_iter().any(|part| error.contains(part)), "{error}");
        }
    }
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let account = |name: &str, privileges: &str| {
        format!(
            "[account.{name}]\nprivileges = [{privileges}]\nverifier = \"@VERIFIER@\"\n\
             created = \"2026-01-02T03:04:05Z\"\n"
        )
    };
    let head = "version = 1\nserver_setup = \"@SETUP@\"\n\n";
    [
        head.to_owned(),
        format!("{head}{}", account("clone", "\"BACKUP_ADMIN\"")),
        format!("{head}{}{}", account("a", "\"monitor\", \"CLONE_ADMIN\""), account("\"b c\"", "")),
        format!("{head}{}", account("a", "\"ROOT\"")),
        format!("{head}{}", account("\"\\n\"", "\"MONITOR\"")),
        head.replace('1', "2"),
        head.replace("@SETUP@", "AAAA"),
        format!("{head}{}", account("a", "").replace("@VERIFIER@", "AAAA")),
        format!("{head}[accounts]\n"),
    ]
    .map(String::into_bytes)
    .into()
}
