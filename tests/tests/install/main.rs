//! A clone replaces a real server's own data, keeps the old ones, and gives them back.

mod crashes;
mod faults;
mod given_up;
mod guards;
mod halfway;
mod held;
mod hooks;
mod interrupted;
mod kept;
mod paths;
mod replace;
mod story;
mod ways;
