//! Clones of live MySQL servers under a write load: the clone starts by the stock server's crash
//! recovery, holds exactly the transactions up to its coordinates, and catches up as a replica.
//!
//! `make test-mysql` runs them.

mod accounts;
mod faults;
mod install;
mod matrix;
mod refusals;
mod replicas;
mod server;
