//! Which storage engine a table is in, from its definition (.frm).
//!
//! Pure. The layout is that of `TABLE_SHARE::init_from_binary_frm_image` (sql/table.cc), the
//! numbers are `legacy_db_type` (sql/handler.h), which are fixed.

/// Bytes of a definition that are looked at; longer ones name their engine by number all the same.
pub const FRM_BYTES: usize = 64 << 10;

const PARTITION: u8 = 20;

/// What a definition says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableEngine {
    /// A view, or no definition of a table.
    None,
    /// An engine whose files are copied, by its name.
    Copied(&'static str),
    /// Another one, by its name or number.
    Other(String),
}

/// Reads a definition; `bytes` are its first ones.
#[must_use]
pub fn table_engine(bytes: &[u8]) -> TableEngine {
    let [0xfe, 0x01, _, number, ..] = bytes else {
        return TableEngine::None;
    };
    let Some(default) = bytes.get(61) else {
        return TableEngine::None;
    };
    // A partitioned table names the engine of its partitions here.
    let number = if *number == PARTITION { *default } else { *number };
    match number {
        6 => TableEngine::Copied("MEMORY"),
        9 => TableEngine::Copied("MyISAM"),
        10 => TableEngine::Copied("MRG_MyISAM"),
        12 => TableEngine::Copied("InnoDB"),
        16 => TableEngine::Copied("ARCHIVE"),
        17 => TableEngine::Copied("CSV"),
        19 => TableEngine::Copied("BLACKHOLE"),
        28 => TableEngine::Copied("PERFORMANCE_SCHEMA"),
        42 => TableEngine::Copied("Aria"),
        44 => TableEngine::Copied("SEQUENCE"),
        18 => TableEngine::Other("FEDERATED".to_owned()),
        41 => TableEngine::Other("S3".to_owned()),
        43 => TableEngine::Other("TokuDB".to_owned()),
        number => {
            TableEngine::Other(name(bytes).unwrap_or_else(|| format!("with the number {number}")))
        }
    }
}

/// The engine's name, which follows the default row and the connect string.
fn name(bytes: &[u8]) -> Option<String> {
    let u16_at = |at: usize| -> Option<usize> {
        Some(usize::from(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?)))
    };
    let u32_at = |at: usize| -> Option<usize> {
        usize::try_from(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?)).ok()
    };
    let keys = match u16_at(14)? {
        0xffff => u32_at(47)?,
        length => length,
    };
    let row = u16_at(6)?.checked_add(keys)?;
    let connect_string = row.checked_add(u16_at(16)?)?;
    let start = connect_string.checked_add(2 + u16_at(connect_string)?)?;
    let length = u16_at(start)?;
    let name = bytes.get(start + 2..start.checked_add(2 + length)?)?;
    let is_name = !name.is_empty() && name.len() <= 64 && name.iter().all(u8::is_ascii_graphic);
    is_name.then(|| String::from_utf8_lossy(name).into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn definition(number: u8, partitions: u8, name: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..4].copy_from_slice(&[0xfe, 0x01, 10, number]);
        bytes[61] = partitions;
        // Keys at 64, none of them; a row of 3 bytes; a connect string of 2; the name.
        bytes[6..8].copy_from_slice(&64u16.to_le_bytes());
        bytes[16..18].copy_from_slice(&3u16.to_le_bytes());
        bytes.extend([0; 3]);
        bytes.extend([2, 0, b'c', b's']);
        bytes.extend(u16::try_from(name.len()).unwrap().to_le_bytes());
        bytes.extend(name);
        bytes
    }

    #[test]
    fn engines_are_told_by_number_and_others_by_name() {
        let innodb = TableEngine::Copied("InnoDB");
        assert_eq!(table_engine(&definition(12, 0, b"InnoDB")), innodb);
        assert_eq!(table_engine(&definition(20, 12, b"partition")), innodb);
        let other = TableEngine::Other("ROCKSDB".to_owned());
        assert_eq!(table_engine(&definition(45, 0, b"ROCKSDB")), other);
        assert_eq!(table_engine(&definition(41, 0, b"S3")), TableEngine::Other("S3".to_owned()));
        assert_eq!(table_engine(b"TYPE=VIEW\nquery=select 1"), TableEngine::None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer(mut bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert_ne!(table_engine(&bytes), TableEngine::Other(String::new()));
            if bytes.len() > 4 {
                bytes[..2].copy_from_slice(&[0xfe, 0x01]);
                prop_assert_ne!(table_engine(&bytes), TableEngine::Other(String::new()));
            }
        }
    }
}
