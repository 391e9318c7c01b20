//! Certificates that change while a clone runs, as the kubelet changes those of a Secret.

use std::{os::unix::fs::symlink, path::Path};

use marcot_common::connect::{ClientTls, ConnectOptions, SslMode, connect};
use marcot_proto::recipient::v1::{
    Clone, CloneStatementRequest, GetCloneRequest, State,
    recipient_service_client::RecipientServiceClient,
};
use marcot_tests::{
    Donor, Proxy, Recipient, admin::get, certificates::Certificates, client::wait_for_end,
    new_directory, process, recipient, wait_for,
};
use tonic::transport::Channel;

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
fn expiry(donor: &Donor) -> String {
    let text = get(donor.0.admin.expect("it has an admin port"), "/metrics");
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
    let at =
        Recipient::start(home.path(), &["--ssl-ca", &certificates.ca(), "--donor-timeout", "60s"]);
    let mut client = recipient(&at).await;
    let copy = home.path().join("copy");
    let statement = process::statement(proxy.port(), &copy, "REQUIRE SSL");
    let request = CloneStatementRequest { statement, ..Default::default() };
    let started = client.clone_statement(request).await.expect("accepted").into_inner();
    let name = started.clone.expect("a clone").name;
    wait_for("some of the data", || (proxy.counts().down_bytes > 4 << 20).then_some(()));
    let before = expiry(&donor);
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
    assert_eq!(expiry(&donor), "2461449600", "2048-01-01");
}

/// Exchanges one file of a directory for `from`, in one step; its path.
fn place(directory: &Path, name: &str, from: &str) -> String {
    let (next, at) = (directory.join("next"), directory.join(name));
    std::fs::copy(from, &next).expect("writable");
    rustix::fs::rename(next, &at).expect("writable");
    at.display().to_string()
}

/// A clone over TLS that takes seconds.
struct Slow {
    donor: Donor,
    proxy: Proxy,
    at: Recipient,
    client: RecipientServiceClient<Channel>,
    clone: String,
}

impl Slow {
    /// Begins one below `home`, with options of the donor and of the recipient.
    async fn begin(home: &Path, donor: &[&str], recipient_options: &[&str]) -> Self {
        let data = home.join("data");
        std::fs::create_dir(&data).expect("writable");
        std::fs::write(data.join("file"), vec![7; BYTES]).expect("writable");
        let donor = Donor::start(home, &data, donor);
        let proxy = Proxy::start(donor.0.address);
        proxy.limit(Some(2 << 20));
        // Cuts may fall into the handshakes after other cuts.
        let patient = ["--donor-timeout", "60s"];
        let at = Recipient::start(home, &[recipient_options, &patient].concat());
        let mut client = recipient(&at).await;
        let statement = process::statement(proxy.port(), &home.join("copy"), "REQUIRE SSL");
        let request = CloneStatementRequest { statement, ..Default::default() };
        let started = client.clone_statement(request).await.expect("accepted").into_inner();
        let clone = started.clone.expect("a clone").name;
        Self { donor, proxy, at, client, clone }
    }
}

/// Waits until so many bytes more have come from the donor.
fn pass(proxy: &Proxy, bytes: u64) {
    let until = proxy.counts().down_bytes + bytes;
    wait_for("some of the data", || (proxy.counts().down_bytes > until).then_some(()));
}

/// A clone with a client certificate, under which a file of the donor's is exchanged for `file`; connections
/// are cut before and after it.
async fn cloned_over(own: &Certificates, name: &str, file: &str, serial: u64) -> Clone {
    let home = new_directory();
    let tls = home.path().join("tls");
    std::fs::create_dir(&tls).expect("writable");
    let (chain, key) = own.sign("donor", &["127.0.0.1"]);
    let ca = place(&tls, "client-ca.pem", &own.ca());
    let crl = place(&tls, "client.crl", &own.revocation_list_of(2049, &[1]));
    let options = ["--tls-cert", &chain, "--tls-key", &key, "--tls-client-ca", &ca];
    let options = [&options[..], &["--tls-client-crl", &crl]].concat();
    let (own_chain, own_key) = own.sign_numbered("recipient", &["recipient"], serial);
    let own_options = ["--ssl-ca", &own.ca(), "--ssl-cert", &own_chain, "--ssl-key", &own_key];
    let Slow { donor, proxy, mut client, clone, at: _at } =
        Slow::begin(home.path(), &options, &own_options).await;
    pass(&proxy, 1 << 20);
    // With the files as they were it goes on.
    proxy.cut();
    pass(&proxy, 1 << 20);
    place(&tls, name, file);
    // They are read as somebody connects.
    proxy.cut();
    wait_for("the new files", || {
        donor.0.log().contains("TLS files have been read again").then_some(())
    });
    proxy.limit(None);
    wait_for_end(&mut client, &clone).await
}

/// Guards the donor against recipients whose certificate is revoked, or whose CA is believed no more, while
/// their clones run: no further connection is theirs. A list that names others ends no clone. With files that
/// are read at the start alone all of them complete.
#[tokio::test(flavor = "multi_thread")]
async fn what_clients_are_believed_by_is_read_again_while_clones_run() {
    let home = new_directory();
    let own = Certificates::create(&home.path().join("own"));
    let other = Certificates::create(&home.path().join("other"));
    let revoked = own.revocation_list_of(2048, &[1, 5]);
    let clone = cloned_over(&own, "client.crl", &revoked, 6).await;
    let refused = cloned_over(&own, "client.crl", &revoked, 5).await;
    let stranger = cloned_over(&own, "client-ca.pem", &other.ca(), 7).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert!(clone.retries > 0, "{clone:?}");
    // Both CAs have one name: it is the signature that does not fit.
    for (clone, alert) in [(refused, "CertificateRevoked"), (stranger, "DecryptError")] {
        assert_eq!(clone.state(), State::Failed, "{alert}: {clone:?}");
        let failure = clone.error.expect("it has failed");
        assert_eq!(failure.reason, "TLS_REFUSED", "{failure:?}");
        assert!(failure.message.contains(alert), "{alert}: {failure:?}");
    }
}

/// Guards a clone whose recipient's client certificate is exchanged by one file after the other, and whose
/// connections are cut between the two: it goes on with the files that were right last. Without them
/// (`LastRight`) it ends with TLS_CONFIGURATION. Once both are there, they are what the donor sees: it
/// believes the first certificate no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_clone_goes_on_while_its_client_certificate_is_exchanged_file_by_file() {
    let home = new_directory();
    let own = Certificates::create(&home.path().join("own"));
    let tls = home.path().join("tls");
    std::fs::create_dir(&tls).expect("writable");
    let (chain, key) = own.sign("donor", &["127.0.0.1"]);
    let crl = place(&tls, "client.crl", &own.revocation_list_of(2049, &[1]));
    let options = ["--tls-cert", &chain, "--tls-key", &key, "--tls-client-ca", &own.ca()];
    let options = [&options[..], &["--tls-client-crl", &crl]].concat();
    let first = own.sign_numbered("first", &["recipient"], 5);
    let second = own.sign_numbered("second", &["recipient"], 6);
    let (chain, key) = (place(&tls, "tls.crt", &first.0), place(&tls, "tls.key", &first.1));
    let own_options = ["--ssl-ca", &own.ca(), "--ssl-cert", &chain, "--ssl-key", &key];
    let Slow { donor: _donor, proxy, at, mut client, clone } =
        Slow::begin(home.path(), &options, &own_options).await;
    pass(&proxy, 1 << 20);
    place(&tls, "tls.crt", &second.0);
    proxy.cut();
    wait_for("the files to be found wrong", || {
        at.0.log().contains("TLS files have changed and are wrong").then_some(())
    });
    pass(&proxy, 1 << 20);
    place(&tls, "tls.key", &second.1);
    place(&tls, "client.crl", &own.revocation_list_of(2048, &[1, 5]));
    proxy.cut();
    pass(&proxy, 1 << 20);
    proxy.limit(None);
    let clone = wait_for_end(&mut client, &clone).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    assert!(clone.retries > 1, "{clone:?}");
}

/// Guards the certificate of the recipient's own service: exchanged while a clone runs, it is what the next
/// caller sees, and neither the clone nor who watches it is cut off. Read at the start alone, it is not seen.
#[tokio::test(flavor = "multi_thread")]
async fn a_recipients_own_certificate_is_exchanged_while_its_clone_runs() {
    let home = new_directory();
    let certificates = Certificates::create(&home.path().join("ca"));
    let tls = home.path().join("tls");
    publish(&tls, "v1", certificates.sign("first", &["127.0.0.1"]));
    let data = home.path().join("data");
    std::fs::create_dir(&data).expect("writable");
    std::fs::write(data.join("file"), vec![7; BYTES]).expect("writable");
    let donor = Donor::start(home.path(), &data, &[]);
    let proxy = Proxy::start(donor.0.address);
    proxy.limit(Some(4 << 20));
    let [chain, key] = ["tls.crt", "tls.key"].map(|name| tls.join(name).display().to_string());
    let at = Recipient::start(home.path(), &["--tls-cert", &chain, "--tls-key", &key]);
    let trusting = ClientTls { ca: Some(certificates.ca().into()), ..ClientTls::default() };
    let port = at.0.address.port();
    let options = ConnectOptions::new("127.0.0.1", port, SslMode::Required).with_tls(trusting);
    let first = connect(&options).await.expect("its CA is known");
    let mut client = RecipientServiceClient::new(first.channel.clone());
    let statement = process::statement(proxy.port(), &home.path().join("copy"), "");
    let request = CloneStatementRequest { statement, ..Default::default() };
    let started = client.clone_statement(request).await.expect("accepted").into_inner();
    let name = started.clone.expect("a clone").name;
    wait_for("some of the data", || (proxy.counts().down_bytes > 2 << 20).then_some(()));
    proxy.limit(Some(1 << 20));
    publish(&tls, "v2", certificates.sign("second", &["127.0.0.1"]));
    // The files are looked at as callers come.
    let begun = std::time::Instant::now();
    while connect(&options).await.expect("its CA is known").security.fingerprint
        == first.security.fingerprint
    {
        assert!(begun.elapsed() < marcot_tests::PATIENCE, "the first certificate is shown still");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let get = GetCloneRequest { name: name.clone() };
    let clone = client.get_clone(get).await.expect("still connected").into_inner().clone;
    assert_eq!(clone.expect("a clone").state(), State::InProgress, "it had ended by then");
    proxy.limit(None);
    let clone = wait_for_end(&mut client, &name).await;
    assert_eq!((clone.state(), clone.retries), (State::Completed, 0), "{clone:?}");
}
