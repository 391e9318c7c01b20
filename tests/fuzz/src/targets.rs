//! The targets, in the order of their names.

pub mod accounts;
pub mod certificate;
pub mod checkpoint;
pub mod chunk;
pub mod config;
pub mod donor_list;
pub mod frm;
pub mod identities;
pub mod journal;
pub mod list;
pub mod mysql_redo;
pub mod page;
pub mod redo;
pub mod statement;
