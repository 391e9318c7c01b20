//! What the linker and libFuzzer join with this program: the fuzzer's one module with unsafe code.
//! Everywhere else in it the compiler refuses it, but for the entry that libFuzzer's own macro makes.

#![expect(unsafe_code, reason = "tables that the linker makes have no other way to them")]

use std::{slice, sync::atomic::AtomicU8};

// The linker's names of the two tables' ends, and of the program's first byte. A crate that counts its
// own blocks has declarations of the same names: this one is compiled without.
unsafe extern "C" {
    #[link_name = "__start___sancov_cntrs"]
    static COUNTERS_START: AtomicU8;
    #[link_name = "__stop___sancov_cntrs"]
    static COUNTERS_STOP: AtomicU8;
    #[link_name = "__start___sancov_pcs"]
    static PLACES_START: Place;
    #[link_name = "__stop___sancov_pcs"]
    static PLACES_STOP: Place;
    #[link_name = "__executable_start"]
    static PROGRAM_START: u8;
}

/// An entry of the table of addresses.
#[repr(C)]
pub struct Place {
    pub address: usize,
    /// 1: a function begins there.
    flags: usize,
}

/// A counter of each block of this program, and where it is.
pub fn tables() -> (&'static [AtomicU8], &'static [Place]) {
    // SAFETY: the linker puts each pair of names around one table, which lives as long as the
    // program and is written by counters of single bytes only.
    unsafe {
        let (start, stop) = (&raw const COUNTERS_START, &raw const COUNTERS_STOP);
        let counters = slice::from_raw_parts(start, stop.offset_from_unsigned(start));
        let (start, stop) = (&raw const PLACES_START, &raw const PLACES_STOP);
        (counters, slice::from_raw_parts(start, stop.offset_from_unsigned(start)))
    }
}

/// The program's first byte.
pub fn program_start() -> usize {
    (&raw const PROGRAM_START).addr()
}

/// What libFuzzer would call, were it asked to run anything here.
// SAFETY: no other part of this program has the name.
#[expect(improper_ctypes_definitions, reason = "as libfuzzer-sys declares it")]
#[unsafe(no_mangle)]
pub extern "C" fn rust_fuzzer_test_input(_: &[u8]) -> i32 {
    0
}
