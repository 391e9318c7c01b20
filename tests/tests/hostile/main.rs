//! Peers that send, or ask for, what no right peer does. Each ends in a typed error within its bound, costs
//! no more than 32 MiB of memory and no descriptor, and harms no honest clone beside it.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod donors;
mod endless_donors;
mod recipients;
mod staging;
mod strangers;
mod victim;
