//! The engine of a table that is not in a tablespace: what its `.sdi` file says. Tables of InnoDB
//! have none.

/// Bytes of the file that hold the table's own properties: its columns come before, so all of it is
/// read, up to what no table has.
pub(in crate::innodb) const SDI_BYTES_MAX: usize = 4 << 20;

/// Engines whose tables have no files of their own, or none that hold rows.
const WITHOUT_ROWS: [&str; 3] = ["MEMORY", "BLACKHOLE", "PERFORMANCE_SCHEMA"];

/// What the engine is called of a table whose definition does not say it.
const UNREADABLE: &str = "its .sdi file cannot be read";

/// The engine that a table's `.sdi` names, if its rows are in files that are not copied with care. What
/// cannot be read may be such a table: it is none that is copied.
#[must_use]
pub(in crate::innodb) fn foreign_engine(bytes: &[u8]) -> Option<String> {
    let Some(engine) = engine(bytes) else { return Some(UNREADABLE.to_owned()) };
    (!WITHOUT_ROWS.contains(&engine.to_uppercase().as_str())).then_some(engine)
}

fn engine(bytes: &[u8]) -> Option<String> {
    let sdi: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    if sdi.get("dd_object_type")? != "Table" {
        return None;
    }
    Some(sdi.get("dd_object")?.get("engine")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::{UNREADABLE, foreign_engine};

    #[test]
    fn a_table_of_myisam_is_told_and_one_without_rows_is_not() {
        let sdi = |engine: &str| {
            format!(
                "{{\"dd_object_type\":\"Table\",\"dd_object\":{{\"name\":\"t\",\"engine\":\"{engine}\"}}}}"
            )
        };
        assert_eq!(foreign_engine(sdi("MyISAM").as_bytes()).as_deref(), Some("MyISAM"));
        assert_eq!(foreign_engine(sdi("BLACKHOLE").as_bytes()), None);
    }

    /// Guards tables whose rows would be copied while they are written: a definition that is cut,
    /// damaged or of another form says nothing of the engine, and was taken for one that is copied.
    #[test]
    fn a_definition_that_cannot_be_read_is_none_of_a_table_that_is_copied() {
        for bytes in [
            &b"no JSON"[..],
            b"",
            b"{\"dd_object_type\":\"Table\",\"dd_object\":{\"name\":\"t\",\"engi",
            b"{\"dd_object_type\":\"Table\",\"dd_object\":{\"name\":\"t\"}}",
            b"{\"dd_object_type\":\"Schema\"}",
        ] {
            assert_eq!(foreign_engine(bytes).as_deref(), Some(UNREADABLE), "{bytes:?}");
        }
    }
}
