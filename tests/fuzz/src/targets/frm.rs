//! The engine's name in a table's definition: no panic.
//!
//! Input: a definition, read as it is, and with the first bytes of one.

use marcot_engine::innodb::mariadb::frm::table_engine;

/// The parser's files.
pub const FILES: &[&str] = &["donor/engine/src/innodb/mariadb/frm.rs"];

/// Runs one input.
pub fn run(data: &[u8]) {
    let _ = table_engine(data);
    let mut definition = data.to_vec();
    if let [first, second, ..] = &mut definition[..] {
        (*first, *second) = (0xfe, 0x01);
    }
    let _ = table_engine(&definition);
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    // Of each engine that has a number, of a partitioned table, and of one that is known by its name.
    let numbered = |number: u8| {
        let mut bytes = vec![0; 64];
        bytes[..4].copy_from_slice(&[0xfe, 1, 10, number]);
        bytes[61] = 12;
        bytes
    };
    let mut seeds: Vec<_> =
        [6, 9, 10, 12, 16, 17, 18, 19, 20, 28, 41, 42, 43, 44].map(numbered).into();
    let mut named = vec![0; 120];
    named[..8].copy_from_slice(&[0xfe, 1, 10, 62, 0, 0, 80, 0]);
    // Behind a row of no bytes and no connect string.
    named[80..90].copy_from_slice(&[0, 0, 6, 0, b'S', b'P', b'I', b'D', b'E', b'R']);
    seeds.push(named);
    seeds.push(b"TYPE=VIEW".to_vec());
    seeds
}
