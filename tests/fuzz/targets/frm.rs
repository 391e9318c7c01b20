//! The engine's name in a table's definition: no panic.
//!
//! Input: a definition, read as it is, and with the first bytes of one.

#![no_main]

use libfuzzer_sys::fuzz_target;
use marcot_fuzz::innodb::mariadb::frm::table_engine;

fuzz_target!(|data: &[u8]| {
    let _ = table_engine(data);
    let mut definition = data.to_vec();
    if let [first, second, ..] = &mut definition[..] {
        (*first, *second) = (0xfe, 0x01);
    }
    let _ = table_engine(&definition);
});
