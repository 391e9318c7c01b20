//! What stands in a data directory beside its tables: what an install adds, carries over, and gives.

use std::{
    fs::Permissions,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
};

use marcot_tests::site::Site;

/// A file of the server's identity that both sides have, and one that only the donor has.
const IDENTITY: &str = "auto.cnf";
const DONORS_OWN: &str = "client-key.pem";

const GENERATION: &str = ".marcot-generation";

/// More than one page, so that not an inode could hold it.
fn identity(whose: &str) -> String {
    format!("{whose}\n").repeat(1000)
}

/// Gives a donor what only its attributes or its name tell of.
pub(crate) fn prepare_donor(source: &Path) {
    std::fs::write(source.join(IDENTITY), identity("the donor's")).unwrap();
    std::fs::write(source.join(DONORS_OWN), identity("the donor's")).unwrap();
    let empty = source.join("app/empty.opt");
    std::fs::write(&empty, "").unwrap();
    std::fs::set_permissions(&empty, Permissions::from_mode(0o640)).unwrap();
    std::fs::create_dir(source.join("nothing_in_it")).unwrap();
}

/// Gives the old data an identity.
pub(crate) fn prepare_old(data: &Path) {
    let path = data.join(IDENTITY);
    std::fs::write(&path, identity("mine")).unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
}

/// What is wrong beside the tables of a tree that says it is `mark`.
pub(crate) fn check(site: &Site, saved: &Path, mark: &str, id: &str) -> Result<(), String> {
    let source = site.path("source");
    let (like, generation) = match mark {
        "old" => (saved, None),
        "new" => (source.as_path(), Some(format!("{id}\n"))),
        mix => return Err(mix.to_owned()),
    };
    let found = std::fs::read_to_string(site.data.join(GENERATION)).ok();
    if found != generation {
        return Err(format!("{mark} stands, and {GENERATION} holds {found:?}"));
    }
    let found = std::fs::read_to_string(site.data.join(IDENTITY)).unwrap_or_default();
    if found != identity("mine") {
        return Err(format!("{mark} stands, and {IDENTITY} holds {} bytes", found.len()));
    }
    if site.data.join(DONORS_OWN).exists() {
        return Err(format!("{mark} stands with the donor's {DONORS_OWN}"));
    }
    for schema in ["app", "mysql", "only_new", "nothing_in_it"] {
        if like.join(schema).exists() {
            compare(&like.join(schema), &site.data.join(schema))?;
        }
    }
    Ok(())
}

/// Whether all that is in `like` is in `found`, with the same mode and owner.
fn compare(like: &Path, found: &Path) -> Result<(), String> {
    let shown = |path: &Path| -> Result<(u32, u32, u32), String> {
        let metadata = path.symlink_metadata().map_err(|e| format!("{}: {e}", path.display()))?;
        Ok((metadata.mode(), metadata.uid(), metadata.gid()))
    };
    let (expected, is) = (shown(like)?, shown(found)?);
    if expected != is {
        let text = format!("{} has mode, user, group {is:?}, not {expected:?}", found.display());
        return Err(text);
    }
    if like.is_dir() {
        for entry in std::fs::read_dir(like).unwrap().flatten() {
            compare(&entry.path(), &found.join(entry.file_name()))?;
        }
    }
    Ok(())
}
