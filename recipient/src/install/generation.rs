//! Which data stand in a data directory: the id of the clone that put them there.
//!
//! A caller that names the generation it means to replace cannot replace what another clone has put
//! there meanwhile.

use std::path::Path;

use marcot_common::{durable::write_atomically, failure::Failure};

use crate::sabotage;

/// File in a data directory. Engines leave it out of clones.
pub const FILE: &str = ".marcot-generation";

/// File in a data directory whose data were removed for a clone that is not there yet: a server that
/// starts on it would make new, empty data. Engines leave it out of clones.
pub const DISCARDED_FILE: &str = ".marcot-discarded";

/// The generation of data that no clone has put there.
const INITIAL: &str = "initial";

/// Longest generation that is read: an id has 36 bytes.
const BYTES_MAX: usize = 64;

/// The generation of what stands in a data directory.
#[must_use]
pub fn of(data_directory: &Path) -> String {
    match std::fs::read_to_string(data_directory.join(FILE)) {
        Ok(text) if !text.trim().is_empty() => text.trim().chars().take(BYTES_MAX).collect(),
        _ => INITIAL.to_owned(),
    }
}

/// Writes a tree's generation, durable when this returns.
pub fn write(tree: &Path, clone_id: &str) -> Result<(), Failure> {
    let path = tree.join(FILE);
    let text = format!("{clone_id}\n");
    if sabotage::leaves_out("generation") {
        return std::fs::write(&path, text).map_err(|e| Failure::io("write", &path, &e));
    }
    write_atomically(&path, text.as_bytes(), 0o644).map_err(|e| Failure::io("write", &path, &e))
}

/// Says that the data go for a clone, durable when this returns.
pub fn mark_discarded(data_directory: &Path, clone_id: &str) -> Result<(), Failure> {
    let path = data_directory.join(DISCARDED_FILE);
    write_atomically(&path, format!("{clone_id}\n").as_bytes(), 0o644)
        .map_err(|e| Failure::io("write", &path, &e))
}

/// Whether the data were removed for a clone that is not there yet.
#[must_use]
pub fn was_discarded(data_directory: &Path) -> bool {
    data_directory.join(DISCARDED_FILE).symlink_metadata().is_ok()
}

/// Refuses to replace another generation than the caller has named.
pub fn check(data_directory: &Path, expected: &str) -> Result<String, Failure> {
    let present = of(data_directory);
    if expected.is_empty() || expected == present {
        return Ok(format!("{} holds generation {present}", data_directory.display()));
    }
    Err(Failure::precondition(
        "GENERATION_CHANGED",
        format!(
            "{} holds generation {present}, the request names {expected}: other data stand there \
             than the caller has seen; look at them, and clone again",
            data_directory.display()
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_generation_than_expected_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        check(directory.path(), "").unwrap();
        check(directory.path(), INITIAL).unwrap();
        write(directory.path(), "one").unwrap();
        check(directory.path(), "one").unwrap();
        let failure = check(directory.path(), INITIAL).unwrap_err();
        assert_eq!(failure.reason, "GENERATION_CHANGED");
    }
}
