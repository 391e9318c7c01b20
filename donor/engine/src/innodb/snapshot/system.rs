//! The system tablespace.

use std::{fs::File, os::unix::fs::FileExt as _, sync::Arc};

use marcot_common::failure::Failure;

use super::path;
use crate::{
    files::tree::Tree,
    innodb::{
        classify::Classifier,
        flavor::Flavor,
        page::{PageFormat, doublewrite_pages},
        tablespace::TablespaceOf,
    },
};

/// The system tablespace's files.
#[derive(Debug)]
pub(super) struct System {
    format: Arc<PageFormat>,
    first_pages: Vec<u32>,
    empty: [std::ops::Range<u32>; 2],
}

impl System {
    /// Looks at the files of the system tablespace.
    pub(super) fn look(
        tree: &Tree,
        classifier: &Classifier,
        flavor: Flavor,
    ) -> Result<Self, Failure> {
        let mut first_pages = Vec::new();
        let mut format: Option<Arc<PageFormat>> = None;
        let mut empty = [0..0, 0..0];
        let mut next: u64 = 0;
        for name in classifier.system() {
            let shown = tree.path().join(String::from_utf8_lossy(name).as_ref());
            let file =
                File::open(&shown).map_err(|e| Failure::io("open tablespace", &shown, &e))?;
            let read = |e: std::io::Error| Failure::io("read tablespace", &shown, &e);
            let size = file.metadata().map_err(read)?.len();
            let known = match &format {
                Some(format) => Arc::clone(format),
                None => {
                    let relative = path(&String::from_utf8_lossy(name))?;
                    let of = TablespaceOf::look(&file, &relative, &shown, 0, flavor, None)?;
                    let page = of.format.physical_page_size();
                    let mut header = vec![0; page];
                    let offset = 5 * page as u64;
                    file.read_exact_at(&mut header, offset).map_err(read)?;
                    empty = doublewrite_pages(&header).map_err(|error| {
                        Failure::precondition(
                            "UNSUPPORTED_TABLESPACE",
                            format!("{}: {error}", shown.display()),
                        )
                    })?;
                    of.format
                }
            };
            first_pages.push(u32::try_from(next).unwrap_or(u32::MAX));
            next += size / known.physical_page_size() as u64;
            format = Some(known);
        }
        let format = format.ok_or_else(|| {
            Failure::precondition("UNSUPPORTED_TABLESPACE", "innodb_data_file_path is empty")
        })?;
        Ok(Self { format, first_pages, empty })
    }

    pub(super) fn file(&self, index: usize) -> TablespaceOf {
        TablespaceOf {
            format: Arc::clone(&self.format),
            first_page: self.first_pages.get(index).copied().unwrap_or(0),
            empty: self.empty.clone(),
        }
    }
}
