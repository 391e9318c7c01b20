//! The recipient's donor list and the donor's list of addresses.

use marcot_common::failure::Failure;
use marcot_proto::recipient::v1::{
    CloneInstanceRequest, CloneStatementRequest, FindingStatus, SslMode, State,
    ValidateCloneRequest, validate_clone_request::Request as Asked,
};
use marcot_tests::{Donor, Pair, Recipient, client::clone_error, new_directory, recipient, tree};

/// Guards the empty list: with `not_listed` made to pass where nothing is listed, the clone runs.
#[tokio::test]
async fn a_recipient_without_a_donor_list_clones_from_nobody() {
    let home = new_directory();
    let data = home.path().join("data");
    std::fs::create_dir(&data).expect("writable");
    tree::make(&data);
    let donor = Donor::start(home.path(), &data, &[]);
    let at = Recipient::start_with(home.path(), &[], &[("MARCOT_DONOR_LIST", "")]);
    let mut client = recipient(&at).await;
    let statement = donor.statement(&home.path().join("copy"), "");
    let status = client
        .clone_statement(CloneStatementRequest { statement, ..Default::default() })
        .await
        .expect_err("no donor is listed");
    let failure = Failure::from_status(&status);
    assert_eq!((failure.reason.as_ref(), failure.mysql_error), ("DONOR_NOT_LISTED", Some(3869)));
    let told = format!(
        "Clone system configuration: 127.0.0.1:{} is not found in clone_valid_donor_list: NULL; no \
         donor may be cloned from until the recipient is started with --donor-list",
        donor.port()
    );
    assert_eq!(failure.message, told);
    assert!(!donor.0.log().contains("snapshot opened"), "{}", donor.0.log());
    assert!(
        client
            .list_clones(marcot_proto::recipient::v1::ListClonesRequest::default())
            .await
            .expect("an answer")
            .into_inner()
            .clones
            .is_empty()
    );
}

/// Guards the match of the addresses that a name leads to, in the job itself: `localhost` is not
/// listed, 127.0.0.2 is, and what is connected to is what was matched.
#[tokio::test]
async fn a_name_that_leads_to_no_listed_address_is_not_connected_to() {
    let mut pair = Pair::start(&[], &["--donor-list", "127.0.0.2:*,10.0.0.0/8:*"]).await;
    let statement = pair.donor.statement(&pair.home().join("copy"), "");
    let statement = statement.replace("127.0.0.1", "localhost");
    let error = clone_error(&mut pair.client, &statement).await;
    assert_eq!((error.reason.as_str(), error.error_number), ("DONOR_NOT_LISTED", 3869));
    assert!(error.message.contains("it leads to "), "{}", error.message);
    assert!(!pair.donor.0.log().contains("snapshot opened"), "{}", pair.donor.0.log());
}

/// IPv6 from the statement to the socket: a list's addresses and networks hold for it, and those of IPv4 do not.
#[tokio::test]
async fn a_donor_on_ipv6_is_cloned_from_where_its_address_or_network_is_listed() {
    let home = new_directory();
    let data = home.path().join("data");
    std::fs::create_dir(&data).expect("writable");
    std::fs::write(data.join("file"), b"content").expect("writable");
    let donor = Donor::start(home.path(), &data, &["--listen", "[::1]:0"]);
    assert!(donor.0.address.is_ipv6(), "{}", donor.0.address);
    for (n, (list, is_listed)) in [
        ("[::1]:*", true),
        ("[::1/128]:*", true),
        ("[0:0:0:0:0:0:0:1]:*", true),
        ("127.0.0.0/8:*,0.0.0.0/0:*", false),
        // A network reaches loopback only where it is all loopback.
        ("[fd00::/8]:*,[::/0]:*", false),
    ]
    .into_iter()
    .enumerate()
    {
        let state = home.path().join(n.to_string());
        std::fs::create_dir(&state).expect("writable");
        let at = Recipient::start(&state, &["--donor-list", list]);
        let mut client = recipient(&at).await;
        let statement = donor.statement(&state.join("copy"), "").replace("127.0.0.1", "::1");
        if is_listed {
            let clone = marcot_tests::client::clone_and_wait(&mut client, &statement).await;
            assert_eq!(clone.state(), State::Completed, "{list}: {clone:?}");
            tree::assert_identical(&data, &state.join("copy"));
        } else {
            let error = clone_error(&mut client, &statement).await;
            assert_eq!(error.reason, "DONOR_NOT_LISTED", "{list}: {error:?}");
        }
    }
}

/// Guards a list that changes: a donor is allowed once the file names it, and no longer than it does,
/// without a restart. With the list as it was at the start the second clone is refused.
#[tokio::test]
async fn a_donor_list_in_a_file_holds_as_it_is_now() {
    let home = new_directory();
    let data = home.path().join("data");
    std::fs::create_dir(&data).expect("writable");
    tree::make(&data);
    let donor = Donor::start(home.path(), &data, &[]);
    let file = home.path().join("donors");
    std::fs::write(&file, "# nobody yet\n").expect("writable");
    let options = ["--donor-list-file", &file.display().to_string()];
    let at = Recipient::start_with(home.path(), &options, &[("MARCOT_DONOR_LIST", "")]);
    let mut client = recipient(&at).await;
    let statement = donor.statement(&home.path().join("copy"), "");
    assert_eq!(clone_error(&mut client, &statement).await.reason, "DONOR_NOT_LISTED");
    std::fs::write(&file, format!("127.0.0.1:{} # ours\n", donor.port())).expect("writable");
    let clone = marcot_tests::client::clone_and_wait(&mut client, &statement).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
    let statement = donor.statement(&home.path().join("another"), "");
    std::fs::write(&file, "127.0.0.1").expect("writable");
    assert_eq!(clone_error(&mut client, &statement).await.reason, "DONOR_NOT_LISTED");
    assert!(at.0.log().contains("no donor may be cloned from"), "{}", at.0.log());
    std::fs::write(&file, "127.0.0.2:*").expect("writable");
    assert_eq!(clone_error(&mut client, &statement).await.reason, "DONOR_NOT_LISTED");
}

/// The plugin's way: what is listed is what must be written.
#[tokio::test]
async fn the_exact_way_takes_the_statements_words_only() {
    let list = ["--donor-match", "exact", "--donor-list"];
    let home = new_directory();
    let data = home.path().join("data");
    std::fs::create_dir(&data).expect("writable");
    tree::make(&data);
    let donor = Donor::start(home.path(), &data, &[]);
    let listed = format!("localhost:{}", donor.port());
    let at = Recipient::start(home.path(), &[&list[..], &[&listed]].concat());
    let mut client = recipient(&at).await;
    let statement = donor.statement(&home.path().join("copy"), "");
    assert_eq!(clone_error(&mut client, &statement).await.error_number, 3869);
    let statement = statement.replace("127.0.0.1", "LOCALHOST");
    let clone = marcot_tests::client::clone_and_wait(&mut client, &statement).await;
    assert_eq!(clone.state(), State::Completed, "{clone:?}");
}

/// Guards the recipient against being used as a scanner of metadata services: no connection is made.
#[tokio::test]
async fn addresses_of_the_clouds_own_services_are_refused_whatever_the_list_holds() {
    let mut pair = Pair::start(&[], &["--donor-list", "0.0.0.0/0:*,[::/0]:*,*:*"]).await;
    for host in ["169.254.169.254", "fd00:ec2::254", "127.0.0.1", "2130706433", "0x7f.1"] {
        let request = CloneInstanceRequest {
            host: host.to_owned(),
            port: 80,
            user: "u".to_owned(),
            // In TLS a host that is no name is refused before it is looked up.
            ssl_mode: SslMode::Disabled.into(),
            data_directory: pair.home().join("copy").display().to_string().into(),
            ..Default::default()
        };
        let request = ValidateCloneRequest { request: Some(Asked::CloneInstance(request)) };
        let answer = pair.client.validate_clone(request).await.expect("an answer").into_inner();
        let finding = answer.findings.iter().find(|f| f.check == "donor").expect("a finding");
        assert_eq!(finding.status(), FindingStatus::Failed, "{host}");
        assert_eq!((finding.reason.as_str(), finding.error_number), ("DONOR_NOT_LISTED", 3869));
    }
}

/// Guards the donor's `--allow-from`: without its line in the policy the clone runs.
#[tokio::test]
async fn a_donor_answers_only_the_addresses_that_it_allows() {
    let mut pair = Pair::start(&["--allow-from", "10.0.0.0/8,192.0.2.1"], &[]).await;
    let statement = pair.donor.statement(&pair.home().join("copy"), "");
    let error = clone_error(&mut pair.client, &statement).await;
    assert_eq!((error.reason.as_str(), error.error_number), ("ADDRESS_NOT_ALLOWED", 3862));
    assert_eq!(error.metadata["donor_mysql_error"], "1130");
    assert_eq!(
        error.message,
        "donor: host 127.0.0.1 is not allowed to connect to this server; add it to its --allow-from"
    );
}
