//! Clients that commit every millisecond, each on a row of its own, and note when each commit was
//! acknowledged: what a lock on commits is to those who write.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use mysql::{Conn, prelude::Queryable as _};

use super::{Shared, errors::NONE, lock};

/// How many: one alone cannot tell a lock from a core that it did not get.
pub(super) const PROBES: usize = 3;

/// Their pace.
const PACE: Duration = Duration::from_millis(1);

#[derive(Debug, Default)]
pub(super) struct Probes {
    commits: [Mutex<Vec<Instant>>; PROBES],
}

impl Probes {
    /// Of the client that waited longest.
    pub(super) fn longest_gap(&self, from: Instant, to: Instant) -> Duration {
        let each = self.commits.iter().map(|commits| longest(&lock(commits), from, to));
        each.max().unwrap_or_default()
    }

    /// Of all clients together.
    pub(super) fn longest_silence(&self, from: Instant, to: Instant) -> Duration {
        let mut all: Vec<Instant> = Vec::new();
        for commits in &self.commits {
            let commits = lock(commits);
            // One commit on either side is what a gap at the edge is measured against.
            let first = commits.partition_point(|at| *at < from).saturating_sub(1);
            let end = (commits.partition_point(|at| *at <= to) + 1).min(commits.len());
            all.extend(&commits[first.min(end)..end]);
        }
        all.sort();
        longest(&all, from, to)
    }

    #[cfg(test)]
    fn note(&self, client: usize, at: Instant) {
        lock(&self.commits[client]).push(at);
    }
}

/// Longest time between two commits that follow one another, of those that overlap `from..to`.
fn longest(commits: &[Instant], from: Instant, to: Instant) -> Duration {
    let first = commits.partition_point(|at| *at < from).saturating_sub(1);
    let end = (commits.partition_point(|at| *at <= to) + 1).min(commits.len());
    let within = &commits[first.min(end)..end];
    let inner = within.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default();
    // A client that has gone silent has no second commit to measure by.
    let before = within.first().map_or(to - from, |at| at.saturating_duration_since(from));
    let after = within.last().map_or(to - from, |at| to.saturating_duration_since(*at));
    inner.max(before).max(after)
}

pub(super) fn commit(shared: &Shared, conn: &mut Conn, number: usize) {
    let sql = format!("UPDATE bank.probe SET n = n + 1 WHERE id = {}", number + 1);
    while !shared.stopped() {
        match conn.query_drop(&sql) {
            Ok(()) => lock(&shared.probes.commits[number]).push(Instant::now()),
            // Nobody else writes its row.
            Err(error) => {
                shared.may_meet("probe", NONE, &sql, &error);
                return;
            }
        }
        std::thread::park_timeout(PACE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(begin: Instant, millis: u64) -> Instant {
        begin + Duration::from_millis(millis)
    }

    #[test]
    fn a_gap_is_measured_where_it_overlaps_the_interval() {
        let begin = Instant::now();
        let probes = Probes::default();
        for millis in (0..1000).filter(|n| !(400..700).contains(n)) {
            for client in 0..PROBES {
                probes.note(client, at(begin, millis));
            }
        }
        let gap = |from, to| probes.longest_gap(at(begin, from), at(begin, to)).as_millis();
        let silence = |from, to| probes.longest_silence(at(begin, from), at(begin, to)).as_millis();
        for (from, to, expected) in
            [(0, 900, 301), (0, 300, 1), (500, 600, 301), (650, 990, 301), (710, 990, 1)]
        {
            assert_eq!(gap(from, to), expected, "{from}..{to}");
            assert_eq!(silence(from, to), expected, "{from}..{to}");
        }
    }

    /// Without it, a server that never answers again would have the shortest gap of all.
    #[test]
    fn clients_that_commit_no_more_have_waited_until_the_end() {
        let begin = Instant::now();
        let probes = Probes::default();
        assert_eq!(probes.longest_gap(begin, at(begin, 50)).as_millis(), 50);
        for client in 0..PROBES {
            probes.note(client, at(begin, 10));
        }
        assert_eq!(probes.longest_gap(begin, at(begin, 500)).as_millis(), 490);
        assert_eq!(probes.longest_silence(begin, at(begin, 500)).as_millis(), 490);
    }

    #[test]
    fn one_client_that_waits_is_no_silence_of_all() {
        let begin = Instant::now();
        let probes = Probes::default();
        for millis in 0..100 {
            probes.note(1, at(begin, millis));
            probes.note(2, at(begin, millis));
        }
        for millis in [0, 80, 100] {
            probes.note(0, at(begin, millis));
        }
        assert_eq!(probes.longest_gap(begin, at(begin, 99)).as_millis(), 80);
        assert_eq!(probes.longest_silence(begin, at(begin, 99)).as_millis(), 1);
    }
}
