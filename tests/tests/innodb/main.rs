//! Clones of live MariaDB servers under a write load: the clone starts by the stock server's crash
//! recovery, holds exactly the transactions up to its coordinates, and catches up as a replica.

mod cancels;
mod encrypted;
mod faults;
mod imports;
mod kills;
mod kindness;
mod locks;
mod matrix;
mod moments;
mod points;
mod refusals;
mod replicas;
mod restarts;
mod unwritten;
