//! Who may clone from whom, who may do what, and who is believed.

mod accounts;
mod addresses;
mod capture;
mod database;
mod preflight;
mod roles;
mod rotation;
mod socket;
