//! The engine's pure parsers, taken in by their files: the engine as a whole would have the gRPC
//! stack built once more, with instrumentation.

#[path = "../../../donor/engine/src/innodb"]
pub mod innodb {
    pub mod mariadb {
        pub mod frm;
        pub mod redo;
    }
    pub mod mysql {
        pub mod redo;
    }
    pub mod page;
}

/// Puts a big-endian number where there is room for it.
pub fn put(bytes: &mut [u8], offset: usize, value: u32) {
    if let Some(field) = bytes.get_mut(offset..offset + 4) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}
