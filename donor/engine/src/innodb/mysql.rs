//! What is MySQL's own: its redo log of many files, the consumer that keeps them, the point that
//! `log_status` names, and the end of the binary log that decides prepared transactions.

pub mod redo;

pub(super) mod binlog;
pub(super) mod classify;
pub(super) mod composed;
pub(super) mod consumer;
pub(super) mod log_files;
pub(super) mod log_status;
pub(super) mod sdi;
pub(super) mod server;
