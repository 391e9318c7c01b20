//! Marcot's protocol: types, clients and servers generated from the .proto files; no logic.
//!
//! The .proto files beside this crate are the reference: units, ranges and errors are said there.

#![expect(
    missing_docs,
    clippy::allow_attributes,
    clippy::large_enum_variant,
    reason = "generated code; the .proto files carry the documentation"
)]

/// Words that every other package uses.
pub mod common {
    pub mod v1 {
        tonic::include_proto!("marcot.common.v1");
    }
}

/// Log-in of one connection.
pub mod auth {
    pub mod v1 {
        tonic::include_proto!("marcot.auth.v1");
    }
}

/// What a donor serves.
pub mod donor {
    pub mod v1 {
        tonic::include_proto!("marcot.donor.v1");
    }
}

/// What a recipient serves.
pub mod recipient {
    pub mod v1 {
        tonic::include_proto!("marcot.recipient.v1");
    }
}

/// The encoded `FileDescriptorSet` of all packages, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/marcot.binpb"));
