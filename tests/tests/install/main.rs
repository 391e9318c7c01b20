//! A clone replaces a real server's own data, keeps the old ones, and gives them back.

mod faults;
mod interrupted;
mod kept;
mod paths;
mod replace;
mod story;
mod ways;
