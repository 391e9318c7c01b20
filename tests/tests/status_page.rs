//! The status page of both daemons, and the same in a terminal.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::{net::SocketAddr, path::Path, process::Command};

use marcot_proto::recipient::v1::{
    CancelCloneRequest, CloneLimits, CloneOptions, CloneStatementRequest, GetCloneRequest, State,
};
use marcot_tests::{
    admin::{get, request},
    client::{clone_and_wait, wait_for_end},
    pair::Pair,
    process::statement,
    target_directory,
};

const DONOR: [&str; 2] = ["--admin-listen", "127.0.0.1:0"];

fn fill(data: &Path) {
    std::fs::write(data.join("file"), vec![0x5a; 16 << 20]).unwrap();
}

fn ports(pair: &Pair) -> [SocketAddr; 2] {
    [pair.recipient.0.admin.unwrap(), pair.donor.0.admin.unwrap()]
}

/// What is between the tags of a page.
fn text(page: &str) -> String {
    page.split('<').filter_map(|part| part.split_once('>')).map(|(_, text)| text).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_pages_and_the_command_line_show_a_clone_that_runs() {
    let mut pair = Pair::start_with(&DONOR, &[], fill).await;
    let [recipient, donor] = ports(&pair);
    let idle = get(recipient, "/");
    assert!(text(&idle).contains("No clone runs"), "{idle}");
    assert!(text(&get(donor, "/")).contains("None is held"));
    let limits = CloneLimits { data_bytes_per_second_max: Some(1 << 20), ..Default::default() };
    let request = CloneStatementRequest {
        statement: pair.donor.statement(&pair.home().join("copy"), ""),
        options: Some(CloneOptions { limits: Some(limits), ..Default::default() }),
        ..Default::default()
    };
    let clone = pair.client.clone_statement(request).await.unwrap().into_inner().clone.unwrap();
    let id = clone.name.strip_prefix("clones/").unwrap().to_owned();
    loop {
        let request = GetCloneRequest { name: clone.name.clone() };
        let now = pair.client.get_clone(request).await.unwrap().into_inner().clone.unwrap();
        assert_eq!(now.state(), State::InProgress, "{now:?}");
        if now.verified_bytes > 0 {
            break;
        }
    }
    for path in ["/", &format!("/clones/{id}")] {
        let page = get(recipient, path);
        let shown = text(&page);
        for part in
            [&*id, "In Progress", "FILE COPY", "IDENTIFIED BY &#60;secret&#62;", "1.00 MiB/s"]
        {
            assert!(shown.contains(part), "{part} at {path}: {shown}");
        }
        assert!(page.contains("<progress max=\"1000\" value=\""), "{page}");
        assert!(!page.contains("'secret'"), "{page}");
    }
    let shown = text(&get(donor, "/"));
    for part in [&*id, "FILE COPY", "1 of 8"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let listed = Command::new(target_directory().join("marcot"))
        .args(["donor", "list", "--donor", &pair.donor.0.address.to_string()])
        .output()
        .unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert_eq!(listed.lines().count(), 2, "{listed}");
    assert!(listed.contains(&id) && listed.contains("FILE COPY"), "{listed}");
    let cancel = CancelCloneRequest { name: clone.name.clone() };
    pair.client.cancel_clone(cancel).await.unwrap();
    wait_for_end(&mut pair.client, &clone.name).await;
    let shown = text(&get(recipient, "/"));
    assert!(shown.contains("No clone runs") && shown.contains("Cancelled"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_that_failed_says_why_and_what_to_do() {
    let mut pair = Pair::start_with(&DONOR, &[], fill).await;
    let [recipient, _] = ports(&pair);
    // Nobody listens there, and nobody is given it.
    let port = 9;
    let target = pair.home().join("copy");
    let end = clone_and_wait(&mut pair.client, &statement(port, &target, "")).await;
    assert_eq!(end.state(), State::Failed, "{end:?}");
    let error = end.error.unwrap();
    let page = get(recipient, &format!("/{}", end.name));
    assert!(page.starts_with("HTTP/1.1 200"), "{page}");
    assert!(
        page.contains(&format!("{}, MySQL error {}", error.reason, error.error_number)),
        "{page}"
    );
    assert!(text(&page).contains("docs/troubleshooting.md"), "{page}");
}

/// Guards what the port gives away and what it may be made to do: without the policy a script that
/// got into a page would run. Seen to fail with the header taken out.
#[tokio::test(flavor = "multi_thread")]
async fn pages_are_read_only_and_take_nothing_from_elsewhere() {
    let pair = Pair::start_with(&DONOR, &[], fill).await;
    for port in ports(&pair) {
        let page = get(port, "/").to_lowercase();
        assert!(page.contains("content-security-policy: default-src 'none'; style-src 'self'"));
        for elsewhere in ["http://", "https://", "onclick", "style=", "<script>"] {
            assert!(!page.contains(elsewhere), "{elsewhere}: {page}");
        }
        for asset in ["/assets/status.css", "/assets/status.js"] {
            assert!(page.contains(asset), "{page}");
            assert!(get(port, asset).starts_with("HTTP/1.1 200"), "{asset}");
        }
        for (method, path, code) in [
            ("GET", "/clones/none", "404"),
            ("GET", "/clones/..%2f..%2fetc%2fpasswd", "404"),
            ("POST", "/", "405"),
            ("DELETE", "/", "405"),
        ] {
            let answer = request(port, method, path);
            assert!(answer.starts_with(&format!("HTTP/1.1 {code}")), "{method} {path}: {answer}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_without_a_status_page_still_answers_probes() {
    let options = ["--no-status-page", "--admin-listen", "127.0.0.1:0"];
    let pair = Pair::start_with(&options, &["--no-status-page"], fill).await;
    for port in ports(&pair) {
        assert!(get(port, "/").starts_with("HTTP/1.1 404"));
        assert!(get(port, "/assets/status.js").starts_with("HTTP/1.1 404"));
        assert!(get(port, "/healthz").starts_with("HTTP/1.1 200"));
        assert!(get(port, "/metrics").starts_with("HTTP/1.1 200"));
    }
}
