//! Certificates that change while a clone runs, as the kubelet changes those of a Secret.

use std::{os::unix::fs::symlink, path::Path};

use marcot_proto::recipient::v1::{CloneStatementRequest, State};
use marcot_tests::{
    Donor, Proxy, Recipient, certificates::Certificates, client::wait_for_end, new_directory,
    process, recipient, wait_for,
};

const BYTES: usize = 32 << 20;

/// Lays files in a directory of their own, reached by a link that is exchanged.
fn publish(directory: &Path, version: &str, (certificate, key): (String, String)) {
    let own = directory.join(version);
    std::fs::create_dir_all(&own).expect("writable");
    std::fs::copy(certificate, own.join("tls.crt")).expect("writable");
    std::fs::copy(key, own.join("tls.key")).expect("writable");
    symlink(version, directory.join("..data_tmp")).expect("writable");
    rustix::fs::rename(directory.join("..data_tmp"), directory.join("..data")).expect("writable");
    for name in ["tls.crt", "tls.key"] {
        drop(symlink(Path::new("..data").join(name), directory.join(name)));
    }
}

/// A metric's value on the admin port.
async fn expiry(donor: &Donor) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let admin = donor.0.admin.expect("it has an admin port");
    let mut stream = tokio::net::TcpStream::connect(admin).await.expect("it listens");
    let request = "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("it answers");
    let name = "marcot_tls_certificate_expiry_timestamp_seconds{file=\"tls-cert\"} ";
    let value = text.split(name).nth(1).unwrap_or_else(|| panic!("{name}: {text}"));
    value.lines().next().unwrap_or_default().to_owned()
}

/// Guards two things: the donor reads its files again, and a clone believes the renewed certificate
/// for the same reason as the first. With either taken out the connections that are cut are not made
/// again, and the clone fails.
#[tokio::test]
async fn a_clone_goes_on_over_a_certificate_that_was_renewed_while_it_ran() {
    let home = new_directory();
    let certificates = Certificates::create(&home.path().join("ca"));
    let tls = home.path().join("tls");
    publish(&tls, "v1", certificates.sign("first", &["127.0.0.1"]));
    let data = home.path().join("data");
    std::fs::create_dir(&data).expect("writable");
    let bytes: Vec<u8> = (0..BYTES).map(|n| (n.wrapping_mul(2_654_435_761) >> 7) as u8).collect();
    std::fs::write(data.join("file"), &bytes).expect("writable");
    let [chain, key] = ["tls.crt", "tls.key"].map(|name| tls.join(name).display().to_string());
    let options = ["--tls-cert", &chain, "--tls-key", &key, "--admin-listen", "127.0.0.1:0"];
    let donor = Donor::start(home.path(), &data, &options);
    let proxy = Proxy::start(donor.0.address);
    proxy.limit(Some(4 << 20));
    let at = Recipient::start(home.path(), &["--ssl-ca", &certificates.ca()]);
    let mut client = recipient(&at).await;
    let copy = home.path().join("copy");
    let statement = process::statement(proxy.port(), &copy, "REQUIRE SSL");
    let request = CloneStatementRequest { statement, ..Default::default() };
    let started = client.clone_statement(request).await.expect("accepted").into_inner();
    let name = started.clone.expect("a clone").name;
    wait_for("some of the data", || (proxy.counts().down_bytes > 4 << 20).then_some(()));
    let before = expiry(&donor).await;
    publish(&tls, "v2", certificates.sign_until("second", &["127.0.0.1"], 2048));
    proxy.cut();
    wait_for("the new certificate", || {
        donor.0.log().contains("TLS files have been read again").then_some(())
    });
    proxy.limit(None);
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert!(clone.retries > 0, "{clone:?}");
    assert_eq!(std::fs::read(copy.join("file")).expect("it was cloned"), bytes);
    assert_eq!(before, "2493072000", "2049-01-01");
    assert_eq!(expiry(&donor).await, "2461449600", "2048-01-01");
}
