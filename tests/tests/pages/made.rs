//! Data directories of real servers, shut down, and their tablespaces.

use std::{
    fmt::Write as _,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use marcot_engine::innodb::page::{
    PageError, PageFormat, PageState, TRX_SYS_PAGE, doublewrite_pages,
};
use marcot_tests::{
    mariadb::{self, Options, Version},
    new_directory,
};

/// Pages of all sizes that a server can have.
pub(crate) const PAGE_SIZES: [usize; 5] = [4096, 8192, 16384, 32768, 65536];

/// innodb_checksum_algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Algorithm {
    FullCrc32,
    Crc32,
}

pub(crate) const ALGORITHMS: [Algorithm; 2] = [Algorithm::FullCrc32, Algorithm::Crc32];

/// A data directory whose server is shut down.
pub(crate) struct Made {
    home: tempfile::TempDir,
    options: Options,
    page_bytes: usize,
}

/// One file of pages.
pub(crate) struct Tablespace {
    pub(crate) name: String,
    pub(crate) format: PageFormat,
    /// Number of its first page.
    pub(crate) first: u32,
    doublewrite: [Range<u32>; 2],
    bytes: Vec<u8>,
}

impl Made {
    /// A server that has run nothing yet.
    pub(crate) fn new(version: Version, page_bytes: usize, algorithm: Algorithm) -> Self {
        let home = new_directory();
        let keys = home.path().join("keys");
        fs::write(&keys, format!("1;{:064x}\n", 7)).unwrap();
        // The doublewrite buffer ends in the first file, whose end `fill` passes. The server takes
        // less than the file when it is no whole number of extents.
        let extent = (1 << 20 >> page_bytes.trailing_zeros()).max(64);
        let first_file_mib = (4 * extent * page_bytes) >> 20;
        let arguments = [
            format!("--innodb-page-size={page_bytes}"),
            format!(
                "--innodb-checksum-algorithm={}",
                if algorithm == Algorithm::Crc32 { "crc32" } else { "full_crc32" }
            ),
            format!("--innodb-data-file-path=ibdata1:{first_file_mib}M;ibdata2:4M:autoextend"),
            "--innodb-undo-tablespaces=2".to_owned(),
            "--innodb-log-file-size=8M".to_owned(),
            // Nothing here is about a crash.
            "--innodb-flush-method=nosync".to_owned(),
            "--plugin-load-add=file_key_management".to_owned(),
            format!("--file-key-management-filename={}", keys.display()),
        ];
        let options = Options { version, arguments: arguments.into(), ..Options::default() };
        fs::create_dir(home.path().join("data")).unwrap();
        Self { home, options, page_bytes }
    }

    /// Adds arguments that are about files.
    pub(crate) fn with(mut self, arguments: &[&str]) -> Self {
        self.options = self.options.with(arguments);
        self
    }

    /// Runs statements, one a line, and shuts the server down.
    pub(crate) fn run(&self, sql: &str) {
        mariadb::bootstrap(&self.data(), &self.options, sql.as_bytes());
    }

    /// Makes and fills a table of each layout.
    pub(crate) fn fill(&self) {
        // Rows that compress, but not to nothing.
        let rows = "SELECT seq, CONCAT(seq, REPEAT('x', seq % 100)), REPEAT(MD5(seq), 90)";
        let mut sql = "CREATE DATABASE t CHARACTER SET latin1;\nUSE t;\n".to_owned();
        for (name, table_options) in self.layouts() {
            writeln!(
                sql,
                "CREATE TABLE t.{name} (id INT PRIMARY KEY, a VARCHAR(120), b BLOB, KEY (a)) \
                 ENGINE=InnoDB {table_options};\n\
                 INSERT INTO t.{name} {rows} FROM seq_1_to_200;"
            )
            .unwrap();
        }
        sql += "CREATE TABLE t.geo (id INT PRIMARY KEY, p POINT NOT NULL, SPATIAL KEY (p)) \
                ENGINE=InnoDB;\n\
                INSERT INTO t.geo SELECT seq, POINT(seq, seq * 7 % 1000) FROM seq_1_to_2000;\n\
                CREATE TABLE t.words (id INT PRIMARY KEY, a TEXT, FULLTEXT KEY (a)) ENGINE=InnoDB;\n\
                INSERT INTO t.words SELECT seq, CONCAT('word', seq) FROM seq_1_to_300;\n\
                SET GLOBAL innodb_file_per_table = 0;\n";
        let system_rows = 6 << 20 >> 12;
        writeln!(
            sql,
            "CREATE TABLE t.in_system (id INT PRIMARY KEY, a VARCHAR(120), b BLOB) ENGINE=InnoDB;\n\
             INSERT INTO t.in_system {rows} FROM seq_1_to_{system_rows};"
        )
        .unwrap();
        self.run(&sql);
    }

    /// Changes every row of what `fill` made.
    pub(crate) fn change(&self) {
        let mut sql = String::new();
        for (name, _) in self.layouts() {
            writeln!(sql, "UPDATE t.{name} SET a = REVERSE(a), b = REVERSE(b);").unwrap();
        }
        self.run(&sql);
    }

    /// Tables by name, and what makes their layout.
    fn layouts(&self) -> Vec<(String, String)> {
        let mut layouts: Vec<(String, String)> = [
            ("plain", ""),
            ("plain2", ""),
            ("redundant", "ROW_FORMAT=REDUNDANT"),
            ("compact", "ROW_FORMAT=COMPACT"),
            ("encrypted", "ENCRYPTED=YES"),
            ("encrypted2", "ENCRYPTED=YES"),
            ("page_compressed", "PAGE_COMPRESSED=1"),
            ("page_compressed2", "PAGE_COMPRESSED=1"),
            ("both", "PAGE_COMPRESSED=1 ENCRYPTED=YES"),
            ("both2", "PAGE_COMPRESSED=1 ENCRYPTED=YES"),
        ]
        .map(|(name, options)| (name.to_owned(), options.to_owned()))
        .into();
        // ROW_FORMAT=COMPRESSED ends at pages of 16 KiB.
        if self.page_bytes <= 16384 {
            for kib in [1, 2, 4, 8, 16].into_iter().filter(|kib| kib << 10 <= self.page_bytes) {
                let options = format!("ROW_FORMAT=COMPRESSED KEY_BLOCK_SIZE={kib}");
                layouts.push((format!("row{kib}"), options.clone()));
                layouts.push((format!("row{kib}_encrypted"), format!("{options} ENCRYPTED=YES")));
            }
        }
        layouts
    }

    /// Of the server; ROW_FORMAT=COMPRESSED tables have smaller ones.
    pub(crate) fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.home.path().join("data")
    }

    /// All tablespaces, the temporary one left out, in order of their names.
    pub(crate) fn tablespaces(&self) -> Vec<Tablespace> {
        let top = self.data();
        let bytes = fs::read(top.join("ibdata1")).unwrap();
        let format = PageFormat::from_first_page(&bytes).unwrap();
        let page = format.physical_page_size();
        let trx_sys = TRX_SYS_PAGE as usize * page;
        let doublewrite = doublewrite_pages(&bytes[trx_sys..][..page]).unwrap();
        let first = u32::try_from(bytes.len() / page).unwrap();
        let system = |name: &str, first, bytes| Tablespace {
            name: name.to_owned(),
            format,
            first,
            doublewrite: doublewrite.clone(),
            bytes,
        };
        let mut all = vec![
            system("ibdata1", 0, bytes),
            system("ibdata2", first, fs::read(top.join("ibdata2")).unwrap()),
        ];
        for path in files(&top).into_iter().chain(files(&top.join("t"))) {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if name.starts_with("undo") || name.ends_with(".ibd") {
                let bytes = fs::read(&path).unwrap();
                let format = PageFormat::from_first_page(&bytes)
                    .unwrap_or_else(|error| panic!("{name}: {error}"));
                all.push(Tablespace { name, format, first: 0, doublewrite: [0..0, 0..0], bytes });
            }
        }
        all
    }
}

impl Tablespace {
    /// All pages with their numbers, the doublewrite buffer's left out.
    pub(crate) fn pages(&self) -> impl Iterator<Item = (u32, &[u8])> {
        (self.first..)
            .zip(self.bytes.chunks(self.format.physical_page_size()))
            .filter(|(number, _)| !self.doublewrite.iter().any(|range| range.contains(number)))
    }

    /// Pages that were ever written.
    pub(crate) fn written(&self) -> Vec<(u32, &[u8])> {
        self.pages().filter(|(_, page)| page.iter().any(|byte| *byte != 0)).collect()
    }

    pub(crate) fn check(&self, page: &[u8], number: u32) -> Result<PageState, PageError> {
        self.format.check(page, number)
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Random numbers whose seed is printed, and taken back from MARCOT_TEST_SEED.
#[derive(Clone, Copy)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        let seed = match std::env::var("MARCOT_TEST_SEED") {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => std::process::id().into(),
        };
        println!("MARCOT_TEST_SEED={seed}");
        Self(seed)
    }

    /// Others, the same each time.
    pub(crate) fn fork(self, number: usize) -> Self {
        Self(self.0 ^ (number as u64) << 32)
    }

    pub(crate) fn below(&mut self, end: usize) -> usize {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ mixed >> 31) % end as u64).unwrap()
    }
}
