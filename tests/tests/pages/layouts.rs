//! Undamaged pages pass.

use std::{collections::BTreeMap, fs};

use marcot_engine::innodb::page::{PageFormat, PageState, lsn};
use marcot_tests::mariadb::Version;

use crate::made::{ALGORITHMS, Algorithm, Made, PAGE_SIZES, Tablespace};

/// Checks each page; returns how many of each state were met.
fn check_all(tablespaces: &[Tablespace]) -> BTreeMap<&'static str, u32> {
    let mut counts = BTreeMap::new();
    for tablespace in tablespaces {
        for (number, page) in tablespace.pages() {
            let state = match tablespace.check(page, number) {
                Ok(PageState::Zero) => "zero",
                Ok(PageState::Valid { lsn: found }) => {
                    assert_eq!(found, lsn(page));
                    "valid"
                }
                Ok(PageState::Unchecked { .. }) => "unchecked",
                Err(error) => panic!("{} page {number}: {error}", tablespace.name),
            };
            *counts.entry(state).or_default() += 1;
        }
    }
    counts
}

fn every_page_passes(version: Version) {
    for algorithm in ALGORITHMS {
        for page_bytes in PAGE_SIZES {
            let made = Made::new(version, page_bytes, algorithm);
            made.fill();
            let tablespaces = made.tablespaces();
            let counts = check_all(&tablespaces);
            println!("{version:?} {algorithm:?} {page_bytes}: {counts:?}");
            assert!(counts["valid"] > 400, "{counts:?}");
            assert!(counts["zero"] > 0, "{counts:?}");
            assert!(!counts.contains_key("unchecked"), "{counts:?}");
            // Each kind is there, and told.
            let format = |name: &str| format_of(&tablespaces, name);
            let full_crc32 = algorithm == Algorithm::FullCrc32;
            for name in ["ibdata1", "ibdata2", "undo001", "plain.ibd"] {
                assert_eq!(format(name).is_full_crc32(), full_crc32, "{name}");
                assert_eq!(format(name).logical_page_size(), page_bytes, "{name}");
                assert!(!format(name).is_page_compressed(), "{name}");
                assert!(!format(name).is_encrypted(), "{name}");
            }
            assert_eq!(format("ibdata2").space_id(), 0);
            assert!(format("page_compressed.ibd").is_page_compressed());
            assert!(format("encrypted.ibd").is_encrypted());
            assert!(format("both.ibd").is_encrypted() && format("both.ibd").is_page_compressed());
            if page_bytes <= 16384 {
                assert_eq!(format("row1.ibd").physical_page_size(), 1024);
                assert!(format("row1_encrypted.ibd").is_encrypted());
                assert!(!format("row1.ibd").is_encrypted());
            }
            let in_second_file = tablespaces.iter().find(|t| t.name == "ibdata2").unwrap();
            assert!(in_second_file.written().len() > 3, "the second file is empty");
        }
    }
}

fn format_of(tablespaces: &[Tablespace], name: &str) -> PageFormat {
    let found = tablespaces.iter().find(|tablespace| tablespace.name == name);
    found.unwrap_or_else(|| panic!("{name} is missing")).format
}

#[test]
fn every_page_of_every_layout_of_10_11_passes() {
    every_page_passes(Version::V10_11);
}

#[test]
fn every_page_of_every_layout_of_11_8_passes() {
    every_page_passes(Version::V11_8);
}

/// Waits for the threads that encrypt. The server takes no connections, so the wait is in what it
/// runs; at most 30 s.
const ENCRYPT_ALL: &str = "BEGIN NOT ATOMIC \
       DECLARE plain, tries INT DEFAULT 1; \
       WHILE plain > 0 AND tries < 300 DO \
         SET tries = tries + 1; \
         DO SLEEP(0.1); \
         SELECT COUNT(*) INTO plain \
           FROM information_schema.innodb_tablespaces_encryption \
           WHERE encryption_scheme = 0 OR rotating_or_flushing; \
       END WHILE; \
     END;";

/// innodb_encrypt_tables is about all tablespaces, the system and undo ones too; their pages 0, and
/// page 5 of the system tablespace, stay plain.
#[test]
fn encrypted_system_and_undo_tablespaces_pass() {
    for algorithm in ALGORITHMS {
        let made = Made::new(Version::V10_11, 16384, algorithm)
            .with(&["--innodb-encrypt-tables=ON", "--innodb-encryption-threads=1"]);
        made.fill();
        made.run(ENCRYPT_ALL);
        let tablespaces = made.tablespaces();
        check_all(&tablespaces);
        let key_version = if algorithm == Algorithm::FullCrc32 { 0..4 } else { 26..30 };
        for name in ["ibdata1", "undo001", "plain.ibd"] {
            let tablespace = tablespaces.iter().find(|t| t.name == name).unwrap();
            assert!(tablespace.format.is_encrypted(), "{name}");
            let written = tablespace.written();
            let is_plain = |page: &[u8]| page[key_version.clone()] == [0; 4];
            let plain: Vec<_> =
                written.iter().filter(|(_, page)| is_plain(page)).map(|(n, _)| *n).collect();
            assert!(plain.contains(&0) && plain.len() * 2 < written.len(), "{name}: {plain:?}");
        }
    }
}

/// What the encryption threads find they write again in place, page after page.
#[test]
fn pages_that_were_encrypted_in_place_pass() {
    for algorithm in ALGORITHMS {
        let made = Made::new(Version::V10_11, 16384, algorithm);
        made.fill();
        let before = made.tablespaces();
        let made = made.with(&["--innodb-encrypt-tables=ON", "--innodb-encryption-threads=2"]);
        made.run(ENCRYPT_ALL);
        let after = made.tablespaces();
        check_all(&after);
        let name = "plain.ibd";
        assert!(!format_of(&before, name).is_encrypted() && format_of(&after, name).is_encrypted());
    }
}

/// Freed pages stay as they were, or are zero where the server scrubs them.
#[test]
fn freed_pages_pass() {
    for scrub in ["OFF", "ON"] {
        for algorithm in ALGORITHMS {
            let scrub = format!("--innodb-immediate-scrub-data-uncompressed={scrub}");
            let made = Made::new(Version::V10_11, 16384, algorithm).with(&[&scrub]);
            made.fill();
            made.run(
                "SET GLOBAL innodb_fast_shutdown = 0;\n\
                 DELETE FROM t.plain WHERE id % 3 <> 0;\n\
                 DELETE FROM t.both WHERE id % 3 <> 0;\n\
                 DELETE FROM t.page_compressed;\n\
                 DELETE FROM t.in_system;\n\
                 ALTER TABLE t.encrypted DROP KEY a;\n\
                 ALTER TABLE t.row8 DROP KEY a;\n\
                 DROP TABLE t.geo;",
            );
            check_all(&made.tablespaces());
        }
    }
}

/// IMPORT TABLESPACE writes a new id into every page that was ever written, freed ones too, and
/// sets their LSNs to zero. Without a .cfg file it takes no table with secondary keys.
#[test]
fn an_imported_tablespace_passes() {
    let layouts = [
        ("plain", ""),
        ("encrypted", "ENCRYPTED=YES"),
        ("page_compressed", "PAGE_COMPRESSED=1"),
        ("row1", "ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE=1"),
    ];
    for algorithm in ALGORITHMS {
        let made = Made::new(Version::V10_11, 16384, algorithm);
        made.fill();
        for (name, options) in layouts {
            made.run(&format!(
                "DELETE FROM t.{name} WHERE id % 3 <> 0;\n\
                 ALTER TABLE t.{name} DROP KEY a;\n\
                 CREATE TABLE t.new_{name} (id INT PRIMARY KEY, a VARCHAR(120), b BLOB) \
                 ENGINE=InnoDB {options};\n\
                 SET GLOBAL innodb_fast_shutdown = 0;\n\
                 ALTER TABLE t.new_{name} DISCARD TABLESPACE;"
            ));
            let file = |name: &str| made.data().join(format!("t/{name}.ibd"));
            fs::copy(file(name), file(&format!("new_{name}"))).unwrap();
            made.run(&format!("ALTER TABLE t.new_{name} IMPORT TABLESPACE;"));
        }
        let tablespaces = made.tablespaces();
        check_all(&tablespaces);
        for (name, _) in layouts {
            let old = format_of(&tablespaces, &format!("{name}.ibd"));
            let new = format_of(&tablespaces, &format!("new_{name}.ibd"));
            assert_eq!(old.flags(), new.flags(), "{name}");
            assert_ne!(old.space_id(), new.space_id(), "{name}");
        }
    }
}
