//! Staged tree against list: everything listed is there, nothing else is, and all is durable.

use std::{collections::HashMap, fs::File, io, path::Path};

use marcot_common::{
    entry::{Attributes, Entry, Kind},
    failure::Failure,
};
use rustix::fs::FileType;
use tonic::Code;

use crate::{certificate, list::FileList, sabotage, staging::Staging};

/// A staged tree that is whole, has its final attributes, and is durable. Install takes only this.
#[derive(Debug)]
pub struct VerifiedTree {
    /// Entries in it.
    pub entries: u64,
}

/// Gives every entry its final attributes, from the leaves up, and compares it with the list.
/// `certify` writes the certificate of what was compared; `stop` is asked between entries.
pub fn verify(
    staging: &Staging,
    list: &FileList,
    root: Option<&Attributes>,
    certify: &mut dyn FnMut() -> Result<(), Failure>,
    stop: &dyn Fn() -> Result<(), Failure>,
) -> Result<VerifiedTree, Failure> {
    // Of an earlier run of this clone, which ended before it installed.
    certificate::remove(staging)?;
    let expected = list.totals().entries;
    let staged = count_entries(&staging.tree(), stop)?;
    if staged != expected {
        return Err(mismatch(format!(
            "the staged tree holds {staged} entries, {expected} are listed"
        )));
    }
    check_links(staging, list)?;
    // Last, for a directory may forbid a look into it; from the leaves up, for the same reason.
    for entry in list.entries_backwards() {
        stop()?;
        check(staging, &entry?)?;
    }
    certify()?;
    if let Some(root) = root {
        // Its owner must be able to move the tree: a directory takes its `..` along.
        let mode = root.mode | 0o300;
        staging.finish_root(&Attributes { mode, ..root.clone() })?;
    }
    if !sabotage::leaves_out("verify") {
        staging.sync()?;
        let tree = staging.tree();
        File::open(&tree)
            .and_then(|directory| directory.sync_all())
            .map_err(|e| Failure::io("sync", &tree, &e))?;
    }
    Ok(VerifiedTree { entries: staged })
}

fn check(staging: &Staging, entry: &Entry) -> Result<(), Failure> {
    let staged = staging.look(&entry.path)?;
    let found = FileType::from_raw_mode(staged.st_mode);
    let expected = match &entry.kind {
        Some(Kind::Regular { .. } | Kind::HardLink { .. }) => FileType::RegularFile,
        Some(Kind::Directory) => FileType::Directory,
        Some(Kind::Symlink { .. }) => FileType::Symlink,
        None => {
            return Err(Failure::bug(format!("{} is in the whole tree's list", entry.path)));
        }
    };
    if found != expected {
        return Err(mismatch(format!(
            "{} is staged as {found:?}, listed as {expected:?}",
            entry.path
        )));
    }
    match &entry.kind {
        Some(Kind::Regular { size, .. }) => {
            let staged_size = u64::try_from(staged.st_size).unwrap_or(0);
            if staged_size != *size {
                let path = &entry.path;
                return Err(mismatch(format!("{path} has {staged_size} bytes, {size} are listed")));
            }
            // Files that were copied as a whole have their attributes already.
            let time = (staged.st_mtime, u32::try_from(staged.st_mtime_nsec).unwrap_or(0));
            let mode = staged.st_mode & 0o7777;
            if time != entry.attributes.modify_time || mode != entry.attributes.mode {
                staging.finish_path(entry)?;
            }
        }
        Some(Kind::Directory) => staging.finish_path(entry)?,
        Some(Kind::Symlink { target }) if staging.read_link(&entry.path)? != **target => {
            return Err(mismatch(format!("{} is staged with another target", entry.path)));
        }
        _ => {}
    }
    Ok(())
}

fn check_links(staging: &Staging, list: &FileList) -> Result<(), Failure> {
    let links = list.link_targets()?;
    let mut inodes = HashMap::with_capacity(links.len());
    for (file_id, path) in &links {
        inodes.insert(*file_id, staging.look(path)?.st_ino);
    }
    if links.is_empty() {
        return Ok(());
    }
    for entry in list.entries()? {
        let entry = entry?;
        if let Some(Kind::HardLink { file_id }) = &entry.kind
            && inodes.get(file_id) != Some(&staging.look(&entry.path)?.st_ino)
        {
            return Err(mismatch(format!("{} is staged as another file", entry.path)));
        }
    }
    Ok(())
}

/// Counts what is really in a tree, in memory bounded by its depth.
fn count_entries(tree: &Path, stop: &dyn Fn() -> Result<(), Failure>) -> Result<u64, Failure> {
    let failed = |path: &Path, e: &io::Error| Failure::io("read directory", path, e);
    let mut count = 0;
    let mut open = vec![(tree.to_owned(), std::fs::read_dir(tree).map_err(|e| failed(tree, &e))?)];
    while let Some((path, entries)) = open.last_mut() {
        stop()?;
        let Some(entry) = entries.next() else {
            open.pop();
            continue;
        };
        let entry = entry.map_err(|e| failed(path, &e))?;
        count += 1;
        if entry.file_type().map_err(|e| failed(&entry.path(), &e))?.is_dir() {
            let path = entry.path();
            let entries = std::fs::read_dir(&path).map_err(|e| failed(&path, &e))?;
            open.push((path, entries));
        }
    }
    Ok(count)
}

fn mismatch(why: String) -> Failure {
    Failure::new(Code::DataLoss, "MANIFEST_MISMATCH", why)
        .with("hint", "something else writes into the staging directory, or this is a bug")
}
