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
        _ if is_doublewrite(name) => Class::LeftOut("doublewrite_buffer"),
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
    // In a directory of their own (innodb_doublewrite_dir); a schema of that name has no such files.
    if is_doublewrite(path.name()) {
        return Some(Class::LeftOut("doublewrite_buffer"));
    }
    // The log tables, in which nothing is transactional.
    let is_log = bytes.starts_with(b"mysql/general_log.") || bytes.starts_with(b"mysql/slow_log.");
    is_log.then_some(Class::Late)
}

/// `#ib_16384_0.dblwr` and its like.
fn is_doublewrite(name: &[u8]) -> bool {
    name.starts_with(b"#ib_") && (name.ends_with(b".dblwr") || name.ends_with(b".bdblwr"))
}

/// Whether a file is the definition of a table outside InnoDB; those of the log tables, which are
/// copied, are not looked at.
pub(in crate::innodb) fn is_definition(path: &RelativePath) -> bool {
    let bytes = path.as_bytes();
    let is_log = bytes.starts_with(b"mysql/general_log_") || bytes.starts_with(b"mysql/slow_log_");
    path.parent().is_some() && bytes.ends_with(b".sdi") && !is_log
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(name: &str) -> RelativePath {
        RelativePath::new(name.as_bytes()).unwrap()
    }

    /// Guards a clone of a server with innodb_doublewrite_dir in its data directory: files that change
    /// all the time are in no list. Copied, they never come to rest.
    #[test]
    fn doublewrite_files_stay_where_they_are_in_any_directory() {
        let left = Some(Class::LeftOut("doublewrite_buffer"));
        for name in ["#dblwr/#ib_16384_0.dblwr", "#a/b/#ib_16384_1.bdblwr"] {
            assert_eq!(file(&path(name)), left, "{name}");
        }
        assert_eq!(top(b"#ib_16384_0.dblwr"), left);
        assert_eq!(file(&path("shop/dblwr.ibd")), None);
    }

    #[test]
    fn definitions_are_those_of_tables_outside_innodb() {
        for (name, is) in [
            ("shop/t_345.sdi", true),
            ("mysql/mine_345.sdi", true),
            ("mysql/general_log_224.sdi", false),
            ("mysql/slow_log_225.sdi", false),
            ("shop/t.ibd", false),
            ("t_345.sdi", false),
        ] {
            assert_eq!(is_definition(&path(name)), is, "{name}");
        }
    }
}
