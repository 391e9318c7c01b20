//! Names the commit that is built, for `--version` and `marcot_build_info`.
//!
//! Order: git, the variable MARCOT_COMMIT, "unknown"; a debug build does not ask git, for each commit
//! would build every crate again. Runs again only when HEAD moves: a path that does not exist is
//! never watched, since cargo would then run this script on every build.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=MARCOT_COMMIT");
    let is_debug = env::var("PROFILE").is_ok_and(|profile| profile == "debug");
    let asked = if is_debug { None } else { git(&["rev-parse", "--short", "HEAD"]) };
    if asked.is_some() {
        // A commit on a branch leaves HEAD as it is; the log of HEAD grows with every move.
        for name in ["HEAD", "logs/HEAD", "packed-refs"] {
            watch(name);
        }
        if let Some(branch) = git(&["symbolic-ref", "-q", "HEAD"]) {
            watch(&branch);
        }
    }
    let commit = asked
        .or_else(|| env::var("MARCOT_COMMIT").ok())
        .map(|commit| commit.trim().to_owned())
        .filter(|commit| !commit.is_empty() && !commit.contains(char::is_whitespace))
        .unwrap_or_else(|| if is_debug { "debug" } else { "unknown" }.to_owned());
    println!("cargo::rustc-env=MARCOT_BUILD_COMMIT={commit}");
}

/// Watches one of git's own files, in a work tree too, if it is there.
fn watch(name: &str) {
    let path = git(&["rev-parse", "--git-path", name]).map(PathBuf::from);
    if let Some(path) = path.and_then(|path| path.canonicalize().ok()) {
        println!("cargo::rerun-if-changed={}", path.display());
    }
}

/// What git answers; `None` without git, without a repository, or on any error.
fn git(arguments: &[&str]) -> Option<String> {
    let directory = env::var_os("CARGO_MANIFEST_DIR")?;
    let output = Command::new("git")
        .args(arguments)
        .current_dir(Path::new(&directory))
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}
