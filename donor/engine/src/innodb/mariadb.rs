//! What is MariaDB's own: its backup locks, its redo log, its table definitions.

pub mod frm;
pub mod redo;

pub(super) mod binlog;
pub(super) mod composed;
pub(super) mod log_file;
pub(super) mod privileges;
pub(super) mod replica_rest;
