//! What donor, recipient and command line mean by the same words.

pub mod access;
pub mod accounts;
pub mod admin;
pub mod checksum;
pub mod chunk;
pub mod config;
pub mod connect;
pub mod connection;
pub mod durable;
pub mod entry;
pub mod failure;
pub mod host;
pub mod listener;
pub mod login;
pub mod os;
pub mod path;
pub mod position;
pub mod replication;
pub mod server;
pub mod shutdown;
pub mod spool;
pub mod statement;
pub mod telemetry;
pub mod time;
pub mod tls;
pub mod wire;
