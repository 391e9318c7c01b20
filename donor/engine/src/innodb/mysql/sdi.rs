//! The engine of a table that is not in a tablespace: what its `.sdi` file says. Tables of InnoDB
//! have none.

/// Bytes of the file that hold the table's own properties: its columns come before, so all of it is
/// read, up to what no table has.
pub(in crate::innodb) const SDI_BYTES_MAX: usize = 4 << 20;

/// Engines whose tables have no files of their own, or none that hold rows.
const WITHOUT_ROWS: [&str; 3] = ["MEMORY", "BLACKHOLE", "PERFORMANCE_SCHEMA"];

/// The engine that a table's `.sdi` names, if its rows are in files that are not copied with care.
#[must_use]
pub(in crate::innodb) fn foreign_engine(bytes: &[u8]) -> Option<String> {
    let sdi: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    if sdi.get("dd_object_type")? != "Table" {
        return None;
    }
    let engine = sdi.get("dd_object")?.get("engine")?.as_str()?;
    (!WITHOUT_ROWS.contains(&engine.to_uppercase().as_str())).then(|| engine.to_owned())
}

#[cfg(test)]
mod tests {
    use super::foreign_engine;

    #[test]
    fn a_table_of_myisam_is_told_and_one_without_rows_is_not() {
        let sdi = |engine: &str| {
            format!(
                "{{\"dd_object_type\":\"Table\",\"dd_object\":{{\"name\":\"t\",\"engine\":\"{engine}\"}}}}"
            )
        };
        assert_eq!(foreign_engine(sdi("MyISAM").as_bytes()).as_deref(), Some("MyISAM"));
        assert_eq!(foreign_engine(sdi("BLACKHOLE").as_bytes()), None);
        assert_eq!(foreign_engine(b"{\"dd_object_type\":\"Schema\"}"), None);
        assert_eq!(foreign_engine(b"no JSON"), None);
    }
}
