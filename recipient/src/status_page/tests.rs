//! What the page makes of a clone.

use marcot_proto::{
    common::v1::{Coordinates, Stage},
    recipient::v1::State,
};

use super::*;

fn running() -> Clone {
    Clone {
        name: "clones/0190".to_owned(),
        state: State::InProgress.into(),
        statement: "CLONE INSTANCE FROM 'a'@'db':4407 IDENTIFIED BY <secret>".to_owned(),
        source: "db:4407".to_owned(),
        destination: "/srv/clones/a".as_bytes().to_vec().into(),
        stages: vec![StageProgress {
            stage: Stage::FileCopy.into(),
            state: State::InProgress.into(),
            estimate_bytes: 4 << 20,
            data_bytes: 1 << 20,
            data_speed: 1 << 20,
            ..Default::default()
        }],
        ..Default::default()
    }
}

#[test]
fn a_running_clone_shows_its_stages_and_how_far_they_are() {
    let page = clone_html(&running());
    for part in ["In Progress", "FILE COPY", "value=\"250\"", "1.00 MiB/s", "/srv/clones/a"] {
        assert!(page.contains(part), "{part}: {page}");
    }
    assert!(!page.contains("Nothing moves"), "{page}");
}

/// Guards who looks at the page: what a donor or a caller has said is text. Seen to fail with one field
/// not escaped (`|safe`).
#[test]
fn what_a_peer_or_a_caller_says_is_no_markup() {
    let script = "<script>alert(1)</script>";
    let clone = Clone {
        statement: script.to_owned(),
        source: script.to_owned(),
        destination: script.as_bytes().to_vec().into(),
        stall_reason: script.to_owned(),
        user: script.to_owned(),
        error: Some(Failure {
            reason: script.to_owned(),
            message: script.to_owned(),
            ..Default::default()
        }),
        coordinates: Some(Coordinates {
            binlog_file: script.as_bytes().to_vec().into(),
            gtid_executed: script.to_owned(),
            ..Default::default()
        }),
        ..running()
    };
    let page = clone_html(&clone);
    assert!(!page.contains("<script"), "{page}");
    assert!(page.matches("&#60;script&#62;").count() >= 7, "{page}");
}

#[test]
fn an_error_is_told_with_its_number_its_reason_and_each_violation() {
    let mut failure = marcot_common::failure::Failure::precondition("TARGET_EXISTS", "two things");
    failure = failure.mysql(1007);
    let clone = Clone {
        state: State::Failed.into(),
        error: Some(failure.to_wire()),
        stall_reason: "no byte for 12 s".to_owned(),
        ..running()
    };
    let page = clone_html(&clone);
    for part in ["two things", "TARGET_EXISTS, MySQL error 1007", "no byte for 12 s"] {
        assert!(page.contains(part), "{part}: {page}");
    }
}
