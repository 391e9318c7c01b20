//! What donor, recipient and command line mean by the same words.

pub mod chunk;
pub mod entry;
pub mod failure;
pub mod path;
pub mod position;
pub mod spool;
pub mod wire;
