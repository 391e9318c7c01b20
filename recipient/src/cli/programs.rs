//! `marcot copy-programs`: puts the programs of this image where a database's container finds them.

use std::{io::ErrorKind, path::Path};

use marcot_common::failure::Failure;

/// What a database's container is given: who supervises, and how one talks to it.
const PROGRAMS: [&str; 2] = ["marcot-recipient", "marcot"];

/// Copies the programs that lie beside this one. What an earlier try has left is replaced.
pub(super) fn copy(directory: &Path) -> Result<(), Failure> {
    let own = std::env::current_exe().map_err(|e| Failure::io("find", Path::new("marcot"), &e))?;
    let beside = own.parent().unwrap_or(Path::new("/"));
    for name in PROGRAMS {
        let (from, to) = (beside.join(name), directory.join(name));
        match std::fs::remove_file(&to) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(Failure::io("replace", &to, &e));
            }
            _ => {}
        }
        std::fs::copy(&from, &to).map_err(|e| Failure::io("copy to", &to, &e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_the_programs_beside_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let failure = copy(directory.path()).unwrap_err();
        assert!(failure.message.contains("marcot-recipient"), "{failure}");
    }
}
