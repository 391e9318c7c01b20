//! A TCP proxy on loopback that does to a connection what a network does: cuts, stalls, slowness,
//! bits that flip. And it tells when a server has answered a statement: the one moment at which a
//! lock is held for certain and its holder does not know it yet.
//!
//! It has a thread of its own, so a test that waits does not hold it up. *Up* is from the client
//! to the target, *down* is from the target to the client.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    runtime::Runtime,
    sync::watch,
    time::Instant,
};

/// Most bytes that are read at once; a limited connection reads less.
const PIECE_BYTES: usize = 64 << 10;

/// What is recorded of each connection's way down.
const RECORDED_DOWN_MAX: usize = 64 << 10;

/// For how long what a server has said still passes, once it takes nothing any more.
const LAST_WORD_MAX: Duration = Duration::from_millis(200);

/// A limited connection waits this often in a second, so that a new limit is felt soon.
const PIECES_PER_SECOND: u64 = 20;

/// A proxy; its connections are cut when it is dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// Taken when the proxy is dropped.
    runtime: Option<Runtime>,
}

/// What has passed so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Connections taken.
    pub connections: u64,
    /// Of them, those that were ended by a reset of ours.
    pub cut: u64,
    /// Bytes from clients to the target.
    pub up_bytes: u64,
    /// Bytes from the target to clients.
    pub down_bytes: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Rules {
    /// Nothing is forwarded; connections stay open.
    is_stalled: bool,
    /// New connections are reset at once.
    is_down: bool,
    /// Of both directions of all connections together.
    bytes_per_second: Option<u64>,
    /// Of each direction of each connection.
    each_bytes_per_second: Option<u64>,
    /// Connections taken under a lower number are reset.
    cuts: u64,
}

struct Shared {
    target: Mutex<SocketAddr>,
    /// The address that connections to the target come from, if it is to be another than usual.
    source: Option<Ipv4Addr>,
    rules: watch::Sender<Rules>,
    /// Bytes down until all connections are cut.
    allowance: Mutex<Option<u64>>,
    /// Bytes down until one has a bit flipped.
    flip: Mutex<Option<u64>>,
    /// What to do once the answer to a text has come.
    answered: Mutex<Option<Answered>>,
    /// How long answers to a text take longer.
    delay: Mutex<Option<(&'static str, Duration)>>,
    /// What has passed, once it is to be recorded.
    record: Mutex<Option<Vec<u8>>>,
    /// When the limit lets the next byte pass.
    next: Mutex<Instant>,
    connections: AtomicU64,
    cut: AtomicU64,
    up_bytes: AtomicU64,
    down_bytes: AtomicU64,
}

struct Answered {
    text: &'static str,
    act: Box<dyn FnOnce() + Send>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

/// What one connection's two directions tell each other.
#[derive(Debug, Default)]
struct Exchange {
    /// The text went up, its answer has not come down.
    is_asked: AtomicBool,
    /// The text whose answers take longer went up, its answer has not come down.
    is_delayed: AtomicBool,
}

impl Proxy {
    /// Starts a proxy of `target` that lets everything pass.
    #[must_use]
    pub fn start(target: SocketAddr) -> Self {
        Self::start_from(target, None)
    }

    /// The same; the target sees its connections come from that address of this host.
    #[must_use]
    pub fn start_from(target: SocketAddr, source: Option<Ipv4Addr>) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a socket of ours");
        let address = listener.local_addr().expect("a bound socket");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("proxy")
            .enable_all()
            .build()
            .expect("a thread");
        let shared = Arc::new(Shared {
            target: Mutex::new(target),
            source,
            rules: watch::Sender::new(Rules::default()),
            allowance: Mutex::new(None),
            flip: Mutex::new(None),
            answered: Mutex::new(None),
            delay: Mutex::new(None),
            record: Mutex::new(None),
            next: Mutex::new(Instant::now()),
            connections: AtomicU64::new(0),
            cut: AtomicU64::new(0),
            up_bytes: AtomicU64::new(0),
            down_bytes: AtomicU64::new(0),
        });
        runtime.spawn(accept(listener, Arc::clone(&shared)));
        Self { address, shared, runtime: Some(runtime) }
    }

    /// Where it takes connections.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Undoes all but the limit: what was stalled goes on, new connections are taken.
    pub fn pass(&self) {
        *self.shared.allowance.lock().expect("no holder panics") = None;
        *self.shared.flip.lock().expect("no holder panics") = None;
        self.shared.rules.send_modify(|rules| {
            rules.is_stalled = false;
            rules.is_down = false;
        });
    }

    /// Connects later ones to another target: one that was started again elsewhere.
    pub fn set_target(&self, target: SocketAddr) {
        *self.shared.target.lock().expect("no holder panics") = target;
    }

    /// Resets every open connection; later ones pass.
    pub fn cut(&self) {
        self.shared.rules.send_modify(|rules| rules.cuts += 1);
    }

    /// Resets every open connection, and each new one, until `pass`.
    pub fn take_down(&self) {
        self.shared.rules.send_modify(|rules| {
            rules.cuts += 1;
            rules.is_down = true;
        });
    }

    /// Forwards nothing more, in either direction, until `pass`; connections stay open and new ones
    /// are taken. This is what both ends see when the other's machine is gone.
    pub fn stall(&self) {
        self.shared.rules.send_modify(|rules| rules.is_stalled = true);
    }

    /// Lets no more than this pass, both directions and all connections together.
    pub fn limit(&self, bytes_per_second: Option<u64>) {
        assert_ne!(bytes_per_second, Some(0), "to forward nothing is `stall`");
        self.shared.rules.send_modify(|rules| rules.bytes_per_second = bytes_per_second);
    }

    /// Lets no more than this pass in each direction of each connection.
    pub fn limit_each(&self, bytes_per_second: Option<u64>) {
        assert_ne!(bytes_per_second, Some(0), "to forward nothing is `stall`");
        self.shared.rules.send_modify(|rules| rules.each_bytes_per_second = bytes_per_second);
    }

    /// Resets every open connection once exactly so many more bytes have gone down; later
    /// connections pass. A client may receive fewer: a reset overtakes what it has not read.
    pub fn cut_after(&self, bytes: u64) {
        *self.shared.allowance.lock().expect("no holder panics") = Some(bytes);
    }

    /// Flips one bit of the byte that goes down after exactly so many more.
    pub fn flip_after(&self, bytes: u64) {
        *self.shared.flip.lock().expect("no holder panics") = Some(bytes);
    }

    /// Whether that bit is still to be flipped.
    #[must_use]
    pub fn flips(&self) -> bool {
        self.shared.flip.lock().expect("no holder panics").is_some()
    }

    /// Whether a cut or a flip after so many bytes is still to come.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.flips() || self.shared.allowance.lock().expect("no holder panics").is_some()
    }

    /// Runs `act` once, when the first answer comes after `text` has gone up on one connection; the
    /// answer passes when it has returned. A text that is split over two reads is not found:
    /// statements are sent in one piece.
    pub fn when_answered(&self, text: &'static str, act: impl FnOnce() + Send + 'static) {
        let answered = Answered { text, act: Box::new(act) };
        *self.shared.answered.lock().expect("no holder panics") = Some(answered);
    }

    /// Answers that come after `text` has gone up on their connection take longer by `pause`; zero: no
    /// more.
    pub fn delay_answers(&self, text: &'static str, pause: Duration) {
        let delay = (!pause.is_zero()).then_some((text, pause));
        *self.shared.delay.lock().expect("no holder panics") = delay;
    }

    /// Records what passes from now on: all that goes up, and of each connection the first 64 KiB
    /// that come down, which hold its log-in; the rest is a clone's data.
    pub fn record(&self) {
        *self.shared.record.lock().expect("no holder panics") = Some(Vec::new());
    }

    /// What was recorded.
    #[must_use]
    pub fn recorded(&self) -> Vec<u8> {
        self.shared.record.lock().expect("no holder panics").clone().unwrap_or_default()
    }

    /// What has passed so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let get = |count: &AtomicU64| count.load(Ordering::SeqCst);
        Counts {
            connections: get(&self.shared.connections),
            cut: get(&self.shared.cut),
            up_bytes: get(&self.shared.up_bytes),
            down_bytes: get(&self.shared.down_bytes),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.take_down();
        // A runtime that waits for its end may not be dropped by a test's own runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn accept(listener: std::net::TcpListener, shared: Arc<Shared>) {
    let listener = TcpListener::from_std(listener).expect("within the proxy's runtime");
    loop {
        let Ok((client, _)) = listener.accept().await else {
            // No descriptor is left: whoever has them must end first.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        shared.connections.fetch_add(1, Ordering::SeqCst);
        let target = *shared.target.lock().expect("no holder panics");
        tokio::spawn(connection(client, target, Arc::clone(&shared)));
    }
}

async fn connection(mut client: TcpStream, target: SocketAddr, shared: Arc<Shared>) {
    let begun = *shared.rules.borrow();
    if begun.is_down {
        shared.cut.fetch_add(1, Ordering::SeqCst);
        return reset(&client);
    }
    let Ok(mut server) = connect(target, shared.source).await else {
        // The client learns it as it would without a proxy.
        return reset(&client);
    };
    // The ends' own writes decide what is sent together.
    for end in [&client, &server] {
        drop(end.set_nodelay(true));
    }
    let mut rules = shared.rules.subscribe();
    let is_reset = {
        // Halves that are borrowed: owned ones say a polite end before the reset.
        let (client_read, client_write) = client.split();
        let (server_read, server_write) = server.split();
        let exchange = Exchange::default();
        let both = async {
            let up = async {
                let ended =
                    forward(client_read, server_write, Direction::Up, &shared, &exchange).await;
                if ended.is_err() {
                    // A server that takes no more may have said why: that goes first.
                    tokio::time::sleep(LAST_WORD_MAX).await;
                }
                ended
            };
            let down = forward(server_read, client_write, Direction::Down, &shared, &exchange);
            tokio::try_join!(biased; down, up)
        };
        tokio::select! {
            // A reset of one end is passed on to the other.
            ended = both => ended.is_err(),
            _ = rules.wait_for(|rules| rules.cuts > begun.cuts) => {
                shared.cut.fetch_add(1, Ordering::SeqCst);
                true
            }
        }
    };
    if is_reset {
        reset(&client);
        reset(&server);
    }
}

async fn connect(target: SocketAddr, source: Option<Ipv4Addr>) -> io::Result<TcpStream> {
    let Some(source) = source else { return TcpStream::connect(target).await };
    let socket = TcpSocket::new_v4()?;
    socket.bind((source, 0).into())?;
    socket.connect(target).await
}

/// Makes the close of a connection a reset.
fn reset(stream: &TcpStream) {
    drop(stream.set_zero_linger());
}

async fn forward(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    direction: Direction,
    shared: &Shared,
    exchange: &Exchange,
) -> io::Result<()> {
    let mut buffer = vec![0; PIECE_BYTES];
    let mut rules = shared.rules.subscribe();
    let mut passed = 0;
    let mut own_turn = Instant::now();
    loop {
        let now = *rules.wait_for(|rules| !rules.is_stalled).await.expect("the sender is shared");
        let each = now.each_bytes_per_second;
        let most = now.bytes_per_second.or(each).map_or(PIECE_BYTES as u64, |rate| {
            (rate / PIECES_PER_SECOND).clamp(1, PIECE_BYTES as u64)
        });
        let most = usize::try_from(most).expect("at most a piece");
        let read = from.read(&mut buffer[..most]).await?;
        // What arrived before a stall does not pass during it, an end neither.
        drop(rules.wait_for(|rules| !rules.is_stalled).await);
        if read == 0 {
            return to.shutdown().await;
        }
        shared.wait_for_turn(read as u64).await;
        if let Some(rate) = each {
            // Time that nobody used is not saved up.
            own_turn =
                own_turn.max(Instant::now()) + Duration::from_secs_f64(read as f64 / rate as f64);
            tokio::time::sleep_until(own_turn).await;
        }
        shared.watch(&buffer[..read], direction, exchange);
        if let Some(pause) = shared.delay(&buffer[..read], direction, exchange) {
            tokio::time::sleep(pause).await;
        }
        if direction == Direction::Up || passed < RECORDED_DOWN_MAX {
            if let Some(record) = shared.record.lock().expect("no holder panics").as_mut() {
                record.extend_from_slice(&buffer[..read]);
            }
            passed += read;
        }
        if direction == Direction::Down {
            shared.flip(&mut buffer[..read]);
        }
        let (allowed, is_last) = shared.take_allowance(read, direction);
        to.write_all(&buffer[..allowed]).await?;
        let count = match direction {
            Direction::Up => &shared.up_bytes,
            Direction::Down => &shared.down_bytes,
        };
        count.fetch_add(allowed as u64, Ordering::SeqCst);
        if is_last {
            shared.rules.send_modify(|rules| rules.cuts += 1);
            // The connection's own task sees the cut and drops this one.
            std::future::pending::<()>().await;
        }
    }
}

impl Shared {
    async fn wait_for_turn(&self, bytes: u64) {
        let Some(rate) = self.rules.borrow().bytes_per_second else { return };
        let turn = {
            let mut next = self.next.lock().expect("no holder panics");
            // Time that nobody used is not saved up.
            let turn = (*next).max(Instant::now());
            *next = turn + Duration::from_secs_f64(bytes as f64 / rate as f64);
            *next
        };
        tokio::time::sleep_until(turn).await;
    }

    /// Acts when this piece is the answer that is waited for.
    fn watch(&self, piece: &[u8], direction: Direction, exchange: &Exchange) {
        let mut answered = self.answered.lock().expect("no holder panics");
        let Some(waiting) = answered.as_ref() else { return };
        match direction {
            Direction::Up => {
                let text = waiting.text.as_bytes();
                if piece.windows(text.len()).any(|window| window == text) {
                    exchange.is_asked.store(true, Ordering::SeqCst);
                }
            }
            Direction::Down => {
                if exchange.is_asked.swap(false, Ordering::SeqCst)
                    && let Some(waiting) = answered.take()
                {
                    (waiting.act)();
                }
            }
        }
    }

    /// How long this piece is kept, when it is an answer that takes longer.
    fn delay(&self, piece: &[u8], direction: Direction, exchange: &Exchange) -> Option<Duration> {
        let (text, pause) = (*self.delay.lock().expect("no holder panics"))?;
        match direction {
            Direction::Up => {
                if piece.windows(text.len()).any(|window| window == text.as_bytes()) {
                    exchange.is_delayed.store(true, Ordering::SeqCst);
                }
                None
            }
            Direction::Down => exchange.is_delayed.swap(false, Ordering::SeqCst).then_some(pause),
        }
    }

    /// Flips a bit when its byte is in this piece.
    fn flip(&self, piece: &mut [u8]) {
        let mut flip = self.flip.lock().expect("no holder panics");
        let Some(left) = *flip else { return };
        match usize::try_from(left).ok().and_then(|at| piece.get_mut(at)) {
            Some(byte) => {
                *byte ^= 1;
                *flip = None;
            }
            None => *flip = Some(left - piece.len() as u64),
        }
    }

    /// How many of the bytes may pass, and whether they are the last.
    fn take_allowance(&self, bytes: usize, direction: Direction) -> (usize, bool) {
        let mut allowance = self.allowance.lock().expect("no holder panics");
        let Some(left) = *allowance else { return (bytes, false) };
        if direction == Direction::Up {
            return (bytes, false);
        }
        let allowed = usize::try_from(left).map_or(bytes, |left| left.min(bytes));
        let left = left - allowed as u64;
        *allowance = (left > 0).then_some(left);
        (allowed, left == 0)
    }
}
