//! A verified tree becomes a data directory.
//!
//! Where nothing stands yet it takes one rename (`fresh`). Where a server's data stands, the steps
//! of `step` are gone through, each durable in a journal before the next (`replacement`); the old
//! tree is kept until the new one is accepted. After a crash `reconcile` says what becomes of an
//! install, and `installer` does what needs the server.

pub mod fresh;
pub mod generation;
pub mod hold;
pub mod identity;
pub mod installer;
pub mod locks;
pub mod mounts;
pub mod place;
pub mod reconcile;
pub mod recorded;
pub mod replacement;
pub mod step;
mod trees;
