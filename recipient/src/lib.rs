//! The recipient: pulls a data directory from a donor, writes, verifies and installs it.
//!
//! ```text
//! api -> job -> preflight -> list -> plan -> fetch -> staging -> verify -> install
//!                  |                          |
//!              donor_client <---- source ---> engine in process (CLONE LOCAL)
//! ```
//! `job::CloneJob::run` names every stage of a clone in order.

#![forbid(unsafe_code)]

pub mod api;
pub mod certificate;
pub mod cli;
pub mod copy_journal;
pub mod counts;
pub mod donor_client;
pub mod fetch;
pub mod gate;
pub mod growing;
pub mod install;
pub mod install_options;
pub mod job;
pub mod journal;
pub mod label;
pub mod limits;
pub mod list;
pub mod metrics;
mod order;
pub mod plan;
pub mod preflight;
pub mod progress;
pub mod queueing;
pub mod replica;
pub mod request;
pub mod retry;
pub mod reuse;
mod sabotage;
pub mod seed;
pub mod server;
pub mod server_control;
pub mod settings;
pub mod source;
pub mod staging;
pub mod stall;
pub mod status_page;
pub mod supervise;
pub mod target;
pub mod told;
pub mod tuner;
pub mod verify;
pub mod writer;
