//! The proxy does what tests rely on it for: each fault reaches both ends as a network's would.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use marcot_tests::{proxy::Proxy, wait_for};

/// A server that answers each byte with `ANSWER_BYTES` of it, and ends with its last client.
struct Echo {
    address: SocketAddr,
    thread: JoinHandle<()>,
}

const ANSWER_BYTES: usize = 1000;

impl Echo {
    fn start(clients: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let thread = std::thread::spawn(move || {
            let each = (0..clients).map(|_| {
                let (mut stream, _) = listener.accept().expect("a client");
                std::thread::spawn(move || {
                    let mut byte = [0];
                    while matches!(stream.read(&mut byte), Ok(1)) {
                        if stream.write_all(&[byte[0]; ANSWER_BYTES]).is_err() {
                            return;
                        }
                    }
                })
            });
            for client in each.collect::<Vec<_>>() {
                client.join().expect("it does not panic");
            }
        });
        Self { address, thread }
    }

    fn end(self) {
        self.thread.join().expect("it does not panic");
    }
}

fn connect(proxy: &Proxy) -> TcpStream {
    let stream = TcpStream::connect(proxy.address()).expect("the proxy takes connections");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket");
    stream
}

fn ask(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    stream.write_all(b"x")?;
    let mut answer = vec![0; ANSWER_BYTES];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

#[test]
fn bytes_pass_unchanged_and_are_counted() {
    let echo = Echo::start(1);
    let proxy = Proxy::start(echo.address);
    let mut stream = connect(&proxy);
    for _ in 0..50 {
        assert_eq!(ask(&mut stream).expect("an answer"), vec![b'x'; ANSWER_BYTES]);
    }
    drop(stream);
    echo.end();
    let counts = proxy.counts();
    assert_eq!((counts.connections, counts.cut), (1, 0));
    assert_eq!((counts.up_bytes, counts.down_bytes), (50, 50 * ANSWER_BYTES as u64));
}

#[test]
fn a_cut_resets_what_is_open_and_lets_others_in() {
    let echo = Echo::start(2);
    let proxy = Proxy::start(echo.address);
    let mut stream = connect(&proxy);
    ask(&mut stream).expect("an answer");
    proxy.cut();
    let error = stream.read(&mut [0]).expect_err("a reset, not an end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let mut later = connect(&proxy);
    ask(&mut later).expect("an answer");
    drop(later);
    echo.end();
    assert_eq!(proxy.counts().cut, 1);
}

#[test]
fn a_proxy_that_is_down_resets_all_until_it_is_up_again() {
    let echo = Echo::start(2);
    let proxy = Proxy::start(echo.address);
    let mut stream = connect(&proxy);
    ask(&mut stream).expect("an answer");
    proxy.take_down();
    assert!(ask(&mut stream).is_err());
    assert!(ask(&mut connect(&proxy)).is_err());
    proxy.pass();
    let mut later = connect(&proxy);
    ask(&mut later).expect("an answer");
    drop(later);
    echo.end();
}

#[test]
fn a_stalled_connection_stays_open_and_goes_on_where_it_was() {
    let echo = Echo::start(1);
    let proxy = Proxy::start(echo.address);
    let mut stream = connect(&proxy);
    ask(&mut stream).expect("an answer");
    proxy.stall();
    stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a socket");
    let error = ask(&mut stream).expect_err("nothing passes");
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    proxy.pass();
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket");
    let mut answer = vec![0; ANSWER_BYTES];
    stream.read_exact(&mut answer).expect("what was asked during the stall");
    drop(stream);
    echo.end();
}

#[test]
fn a_limit_slows_both_directions_together() {
    let echo = Echo::start(1);
    let proxy = Proxy::start(echo.address);
    let mut stream = connect(&proxy);
    proxy.limit(Some(50_000));
    let begun = Instant::now();
    for _ in 0..20 {
        ask(&mut stream).expect("an answer");
    }
    // 20 KB at 50 KB/s.
    assert!(begun.elapsed() >= Duration::from_millis(380), "{:?}", begun.elapsed());
    proxy.limit(None);
    drop(stream);
    echo.end();
}

#[test]
fn a_cut_after_so_many_bytes_comes_there() {
    for bytes in [1_u64, 999, 1000, 1001, 2500] {
        let echo = Echo::start(1);
        let proxy = Proxy::start(echo.address);
        let mut stream = connect(&proxy);
        proxy.cut_after(bytes);
        let mut whole = 0;
        while ask(&mut stream).is_ok() {
            whole += 1;
        }
        // A reset overtakes what the client has not read yet.
        assert!(whole <= bytes / ANSWER_BYTES as u64, "{bytes}: {whole}");
        assert_eq!(proxy.counts().down_bytes, bytes);
        drop(stream);
        echo.end();
    }
}

#[test]
fn one_bit_flips_in_the_byte_that_was_named_and_in_no_other() {
    for offset in [0, 1, 999, 1000, 1500] {
        let echo = Echo::start(1);
        let proxy = Proxy::start(echo.address);
        let mut stream = connect(&proxy);
        proxy.flip_after(offset);
        let mut all = Vec::new();
        for _ in 0..3 {
            all.extend(ask(&mut stream).expect("an answer"));
        }
        let mut expected = vec![b'x'; 3 * ANSWER_BYTES];
        expected[usize::try_from(offset).expect("small")] ^= 0x10;
        assert_eq!(all, expected, "{offset}");
        assert!(!proxy.flips());
        drop(stream);
        echo.end();
    }
}

/// The answer waits for what is done: a donor that is frozen there has not seen that its lock was
/// granted.
#[test]
fn what_waits_for_an_answer_runs_before_the_answer_passes() {
    let echo = Echo::start(1);
    let proxy = Proxy::start(echo.address);
    let mut stream = connect(&proxy);
    ask(&mut stream).expect("an answer");
    let done = Arc::new(AtomicBool::new(false));
    proxy.when_answered("lock", {
        let done = Arc::clone(&done);
        move || done.store(true, Ordering::SeqCst)
    });
    ask(&mut stream).expect("an answer");
    assert!(!done.load(Ordering::SeqCst), "another text went up");
    stream.write_all(b"lock").expect("writable");
    stream.read_exact(&mut [0]).expect("an answer");
    assert!(done.load(Ordering::SeqCst));
    drop(stream);
    echo.end();
}

#[test]
fn a_target_that_is_gone_is_a_reset() {
    let echo = Echo::start(1);
    let address = echo.address;
    let proxy = Proxy::start(address);
    ask(&mut connect(&proxy)).expect("an answer");
    echo.end();
    let mut stream = connect(&proxy);
    wait_for("the reset", || ask(&mut stream).is_err().then_some(()));
}
