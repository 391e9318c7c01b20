//! What a daemon's admin port answers.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
};

/// An answer, whole: its first line, headers and body.
pub fn request(address: SocketAddr, method: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("the admin port listens");
    let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers in UTF-8");
    answer
}

/// The answer to GET.
pub fn get(address: SocketAddr, path: &str) -> String {
    request(address, "GET", path)
}
