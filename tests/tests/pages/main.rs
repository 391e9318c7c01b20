//! Every page of every tablespace of real servers, of every layout that MariaDB writes, against
//! the page check of engine `innodb`; and the same pages damaged.
//!
//! What is made by `made::Made`: both versions; pages of 4 to 64 KiB; full_crc32 and crc32; in each
//! plain, encrypted, page_compressed and ROW_FORMAT=COMPRESSED tables of all block sizes, undo
//! tablespaces, a system tablespace of two files.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod damage;
mod layouts;
mod made;
