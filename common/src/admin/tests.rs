//! A real admin port, asked over HTTP/1.1 and gRPC.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
};
use tonic::{Code, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::*;

const SERVICE: &str = "marcot.donor.v1.DonorService";

struct Port {
    address: SocketAddr,
    readiness: Readiness,
    stop: CancellationToken,
    task: JoinHandle<io::Result<()>>,
}

async fn open() -> Port {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (readiness, stop) = (Readiness::new(), CancellationToken::new());
    let router = router(
        Arc::new(Metrics::new("donor")),
        &readiness,
        &[SERVICE],
        &RequestBodyLayer::new(&[]),
    );
    let task = tokio::spawn(serve(listener, router, stop.clone()));
    Port { address, readiness, stop, task }
}

impl Port {
    /// The whole answer to one request.
    async fn get(&self, path: &str) -> String {
        self.get_with(path, "").await
    }

    async fn get_with(&self, path: &str, headers: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    async fn code(&self, path: &str) -> String {
        let text = self.get(path).await;
        text.split(' ').nth(1).unwrap().to_owned()
    }

    async fn health(&self) -> HealthClient<Channel> {
        let channel = Channel::from_shared(format!("http://{}", self.address)).unwrap();
        HealthClient::new(channel.connect().await.unwrap())
    }
}

fn request(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.to_owned() }
}

#[tokio::test]
async fn readiness_flips_and_liveness_does_not() {
    let port = open().await;
    let mut health = port.health().await;
    let mut check = async |service: &str| {
        health.check(request(service)).await.map(|answer| answer.into_inner().status())
    };
    for (state, code, status) in [
        (ReadyState::Starting, "503", ServingStatus::NotServing),
        (ReadyState::Ready, "200", ServingStatus::Serving),
        (ReadyState::Draining, "503", ServingStatus::NotServing),
    ] {
        port.readiness.advance(state);
        let answer = port.get("/readyz").await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{answer}");
        assert!(answer.ends_with(&format!("\r\n\r\n{state}\n")), "{answer}");
        assert_eq!(check(SERVICE).await.unwrap(), status);
        assert_eq!(port.code("/healthz").await, "200");
        assert_eq!(check("").await.unwrap(), ServingStatus::Serving);
    }
    assert_eq!(check("no.such").await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_watch_tells_every_change() {
    let port = open().await;
    let mut health = port.health().await;
    let mut watch = health.watch(request(SERVICE)).await.unwrap().into_inner();
    let mut next = async || watch.message().await.unwrap().unwrap().status();
    assert_eq!(next().await, ServingStatus::NotServing);
    port.readiness.set_ready();
    assert_eq!(next().await, ServingStatus::Serving);
    port.readiness.set_draining();
    assert_eq!(next().await, ServingStatus::NotServing);
    let mut unknown = health.watch(request("no.such")).await.unwrap().into_inner();
    let status = unknown.message().await.unwrap().unwrap().status();
    assert_eq!(status, ServingStatus::ServiceUnknown);
}

#[tokio::test]
async fn metrics_are_open_metrics_text_for_who_asks_for_it() {
    let port = open().await;
    let accept = "Accept: application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5\r\n";
    let answer = port.get_with("/metrics", accept).await;
    assert!(answer.contains(&format!("content-type: {OPEN_METRICS}\r\n")), "{answer}");
    assert!(answer.contains("marcot_build_info{") && answer.ends_with("# EOF\n"), "{answer}");
    let answer = port.get("/metrics").await;
    assert!(answer.contains(&format!("content-type: {PLAIN_CONTENT_TYPE}\r\n")), "{answer}");
    assert!(answer.contains("# TYPE marcot_build_info gauge\n"), "{answer}");
    assert!(!answer.contains("# EOF"), "{answer}");
}

#[tokio::test]
async fn every_other_path_is_not_found() {
    let port = open().await;
    for path in ["/", "/metrics/", "/readyz/x", "/debug", "/grpc.health.v1.Health", "/a.B/C"] {
        assert_eq!(port.code(path).await, "404", "{path}");
    }
}

#[tokio::test]
async fn the_port_ends_although_a_watch_is_open() {
    let port = open().await;
    let mut health = port.health().await;
    let mut watch = health.watch(request("")).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();
    port.stop.cancel();
    let end = tokio::time::timeout(90 * LAST_CALLS_MAX, port.task).await;
    end.unwrap().unwrap().unwrap();
}

#[test]
fn no_state_comes_back() {
    use ReadyState::{Draining, Ready, Starting};
    for (from, to, allowed) in [
        (Starting, Ready, true),
        (Starting, Draining, true),
        (Ready, Draining, true),
        (Starting, Starting, false),
        (Ready, Starting, false),
        (Ready, Ready, false),
        (Draining, Starting, false),
        (Draining, Ready, false),
        (Draining, Draining, false),
    ] {
        assert_eq!(from.allows(to), allowed, "{from:?} {to:?}");
    }
}
