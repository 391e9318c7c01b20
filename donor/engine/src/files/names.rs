//! The sorted names of one directory, in one compact arena.

use std::{mem::MaybeUninit, os::fd::BorrowedFd};

use rustix::{fs::RawDir, io::Errno};

/// Most bytes that names may take at one time. A directory of a million tables takes 30 MiB.
pub(crate) const NAMES_BYTES_MAX: usize = 64 << 20;

const READ_BYTES: usize = 32 << 10;

/// Why names cannot be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    /// Over the bound.
    #[error("names take more than the allowed memory")]
    TooMany,
    /// The system refused.
    #[error(transparent)]
    System(#[from] Errno),
}

/// Names in ascending order of their bytes.
#[derive(Debug, Default)]
pub(crate) struct Names {
    // Each name: its length in one byte, then its bytes.
    arena: Vec<u8>,
    offsets: Vec<u32>,
}

impl Names {
    /// Reads and sorts the names in `directory`, which must not have been read from before.
    pub(crate) fn read(directory: BorrowedFd<'_>, bytes_max: usize) -> Result<Self, Error> {
        let mut names = Self::default();
        let mut buffer = vec![MaybeUninit::uninit(); READ_BYTES];
        let mut entries = RawDir::new(directory, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                names.push(name, bytes_max)?;
            }
        }
        let arena = &names.arena;
        names.offsets.sort_unstable_by(|&a, &b| name_at(arena, a).cmp(name_at(arena, b)));
        Ok(names)
    }

    fn push(&mut self, name: &[u8], bytes_max: usize) -> Result<(), Error> {
        let length = u8::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?;
        let offset = u32::try_from(self.arena.len()).map_err(|_| Error::TooMany)?;
        self.arena.push(length);
        self.arena.extend_from_slice(name);
        self.offsets.push(offset);
        if self.bytes() > bytes_max {
            return Err(Error::TooMany);
        }
        Ok(())
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.arena.len() + self.offsets.len() * size_of::<u32>()
    }

    pub(crate) fn len(&self) -> usize {
        self.offsets.len()
    }

    pub(crate) fn get(&self, index: usize) -> &[u8] {
        name_at(&self.arena, self.offsets[index])
    }
}

fn name_at(arena: &[u8], offset: u32) -> &[u8] {
    let start = offset as usize + 1;
    &arena[start..start + usize::from(arena[offset as usize])]
}
