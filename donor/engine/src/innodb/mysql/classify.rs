//! What the files are that only MySQL has.

use marcot_common::path::RelativePath;

use super::log_files::LOG_DIRECTORY;
use crate::innodb::classify::Class;

/// Files that make a server itself and not its donor (R13): its UUID, its persisted variables, its
/// keys and where its keyring is.
const IDENTITY: &[&[u8]] = &[
    b"auto.cnf",
    b"mysqld-auto.cnf",
    b"mysqld.my",
    b"ca.pem",
    b"ca-key.pem",
    b"server-cert.pem",
    b"server-key.pem",
    b"client-cert.pem",
    b"client-key.pem",
    b"private_key.pem",
    b"public_key.pem",
];

/// A file in the data directory itself.
pub(in crate::innodb) fn top(name: &[u8]) -> Option<Class> {
    Some(match name {
        _ if IDENTITY.contains(&name) => Class::LeftOut("identity"),
        // The keyring holds the keys of the clone's tables too: it is for the operator to bring.
        _ if name.starts_with(b"component_keyring") || name == b"keyring" => {
            Class::LeftOut("keyring")
        }
        _ if name.ends_with(b".dblwr") || name.ends_with(b".bdblwr") => {
            Class::LeftOut("doublewrite_buffer")
        }
        _ if name.starts_with(b"undo_") && name.ends_with(b"_trunc.log") => Class::Plain,
        _ if name.ends_with(b".ibu") || name.starts_with(b"undo_") => Class::Undo,
        _ => return None,
    })
}

/// A file in a directory.
pub(in crate::innodb) fn file(path: &RelativePath) -> Option<Class> {
    let bytes = path.as_bytes();
    let directory = path.parent()?;
    if directory.as_bytes() == LOG_DIRECTORY.as_bytes() {
        return Some(Class::Redo);
    }
    if bytes.ends_with(b".ibu") {
        return Some(Class::Undo);
    }
    // The log tables, in which nothing is transactional.
    let is_log = bytes.starts_with(b"mysql/general_log.") || bytes.starts_with(b"mysql/slow_log.");
    is_log.then_some(Class::Late)
}
