//! A clone replaces a real server's own data, keeps the old ones, and gives them back.

mod faults;
mod kept;
mod replace;
mod story;
mod ways;
