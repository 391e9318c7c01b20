//! The name that a clone's binary log has, as recipient and donor mean it.

/// Capability of a donor that takes `OpenSnapshotRequest.binlog_base`.
pub const BINLOG_BASE: &str = "binlog_base";

/// Longest base name, bytes: a number and a dot are added to it, and a name has 255.
pub const BASE_BYTES_MAX: usize = 128;

/// Whether a text can be a log's base name, without a directory.
#[must_use]
pub fn is_base(text: &str) -> bool {
    (1..=BASE_BYTES_MAX).contains(&text.len())
        && !text.starts_with('.')
        && !text.chars().any(|c| c == '/' || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards the tree: a recipient names a file in the clone, and no other place.
    #[test]
    fn a_base_name_is_one_name() {
        for good in ["bin", "mysql-bin", "db1.log"] {
            assert!(is_base(good), "{good}");
        }
        let long = "x".repeat(BASE_BYTES_MAX + 1);
        for bad in ["", ".", "..", ".x", "a/b", "/bin", "a\nb", &long] {
            assert!(!is_base(bad), "{bad}");
        }
    }
}
