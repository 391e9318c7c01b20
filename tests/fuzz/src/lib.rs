//! Fuzz targets of all that reads what others have written: a donor, a caller, a person, a disk.
//!
//! Each target is a module of `targets` with the files of its parser, `run`, which looks at one
//! input and asserts what must hold of it, and `seeds`, the inputs that libFuzzer begins with. A
//! program of the same name in `bin` joins it with libFuzzer; `main.rs` writes the seeds and tells
//! the coverage.

#![forbid(unsafe_code)]

pub mod scratch;
pub mod targets;

/// What is fuzzed.
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Files of its parser, from the project's root.
    pub files: &'static [&'static str],
    /// Runs one input.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($name:ident),*) => {
        /// All targets.
        pub const TARGETS: &[Target] = &[$(Target {
            name: stringify!($name),
            files: targets::$name::FILES,
            run: targets::$name::run,
            seeds: targets::$name::seeds,
        }),*];
    };
}

targets![
    accounts,
    certificate,
    checkpoint,
    chunk,
    config,
    donor_list,
    frm,
    identities,
    journal,
    list,
    mysql_redo,
    page,
    redo,
    statement
];

/// Joins a target with libFuzzer.
#[macro_export]
macro_rules! fuzz {
    ($name:ident) => {
        libfuzzer_sys::fuzz_target!(|data: &[u8]| marcot_fuzz::targets::$name::run(data));
    };
}

/// Puts a big-endian number where there is room for it.
pub fn put(bytes: &mut [u8], offset: usize, value: u32) {
    if let Some(field) = bytes.get_mut(offset..offset + 4) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

/// The parts of an input between NULs, which stand in none of the texts.
pub fn parts(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    data.split(|&byte| byte == 0)
}
