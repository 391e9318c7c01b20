//! Data directories made for tests, and comparison by a tool that shares no code with Marcot.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

/// Sizes at which something changes, each with its reason.
pub const INTERESTING_SIZES: [u64; 8] = [
    0,               // no range at all
    1,               // the least range
    4096,            // one block
    (1 << 20) - 1,   // just less than a chunk
    1 << 20,         // a chunk, and the most that travels packed
    (1 << 20) + 1,   // a chunk and a byte: the least that does not travel packed
    (48 << 20) - 7,  // just less than a segment of one stream, two of two
    (48 << 20) + 11, // two segments and three
];

/// Makes a small tree with one of each kind of entry, and files of interesting sizes.
pub fn make(directory: &Path) {
    std::fs::create_dir_all(directory.join("schema/empty directory")).expect("writable");
    for (number, &size) in INTERESTING_SIZES.iter().enumerate() {
        write(&directory.join(format!("schema/{size}.ibd")), size, number as u64);
    }
    for number in 0..100 {
        write(&directory.join(format!("schema/small {number}")), number * 37, number);
    }
    let sparse = std::fs::File::create(directory.join("sparse")).expect("writable");
    sparse.set_len(3 << 30).expect("a file system with holes");
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"an end", (3 << 30) - 6).expect("writable");
    std::fs::hard_link(directory.join("schema/4096.ibd"), directory.join("linked"))
        .expect("a link");
    symlink("schema/4096.ibd", directory.join("symbolic")).expect("a link");
    std::fs::write(directory.join("a name\nof two lines"), b"x").expect("writable");
}

/// Writes a file of pseudo-random bytes.
pub fn write(path: &Path, size: u64, seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(usize::try_from(size).expect("a small file") + 8);
    while (bytes.len() as u64) < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(usize::try_from(size).expect("a small file"));
    std::fs::write(path, bytes).expect("writable");
}

/// Compares two trees by everything that a clone carries.
pub fn assert_identical(original: &Path, copy: &Path) {
    let tool = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tools/compare.py");
    let output = Command::new("python3")
        .arg(tool)
        .arg(original)
        .arg(copy)
        .output()
        .expect("python3 is there: `make test` installs it");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{} and {}:\n{text}", original.display(), copy.display());
}

/// What lies in a directory, by name.
#[must_use]
pub fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    let mut names: Vec<_> = entries
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
