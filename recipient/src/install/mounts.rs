//! Mounts below a directory: what is removed or moved must not reach through them.

use std::{
    ffi::OsStr,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
};

use marcot_common::failure::Failure;

/// Refuses a directory that another file system is mounted in.
pub fn refuse_mounts_in(directory: &Path) -> Result<(), Failure> {
    let Ok(table) = std::fs::read("/proc/self/mountinfo") else {
        // Without /proc there is nothing to read them from.
        return Ok(());
    };
    let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    let Some(mounted) = mount_points(&table).find(|point| is_below(point, &directory)) else {
        return Ok(());
    };
    Err(Failure::precondition(
        "NESTED_MOUNT",
        format!(
            "{} is mounted in {}: what is removed or replaced there would reach into it; unmount it \
             first",
            mounted.display(),
            directory.display()
        ),
    ))
}

fn is_below(path: &Path, directory: &Path) -> bool {
    path != directory && path.starts_with(directory)
}

/// The fifth field of each line.
fn mount_points(table: &[u8]) -> impl Iterator<Item = PathBuf> {
    table.split(|&b| b == b'\n').filter_map(|line| {
        let field = line.split(|&b| b == b' ').nth(4)?;
        Some(PathBuf::from(std::ffi::OsString::from_vec(unescape(field))))
    })
}

/// Blanks, tabs, line ends and backslashes are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| first == b'\\');
        let octal = digits.and_then(|d| u8::from_str_radix(OsStr::from_bytes(d).to_str()?, 8).ok());
        match octal {
            Some(byte) => {
                text.push(byte);
                rest = &after[3..];
            }
            None => {
                text.push(first);
                rest = after;
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_with_what_is_escaped_in_them() {
        let table = b"22 1 8:1 / / rw - ext4 /dev/sda rw\n\
                      23 22 8:2 / /srv/my\\040data/a\\134b rw - ext4 /dev/sdb rw\n\
                      24 22 8:3 / /srv/my\\040data2 rw - xfs /dev/sdc rw\n";
        let points: Vec<_> = mount_points(table).collect();
        assert_eq!(points[1], Path::new("/srv/my data/a\\b"));
        let below: Vec<_> =
            points.iter().filter(|point| is_below(point, Path::new("/srv/my data"))).collect();
        assert_eq!(below, [&points[1]]);
    }
}
