//! Who waits for a place: first come, first served.
//!
//! A caller that waits asks again and again; between two calls its ticket keeps its turn for a moment.
//! Pure: the caller says what time it is.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Tickets at one time: more callers than that have no use for a place in a queue. Some 200 bytes each.
pub const TICKETS_MAX: usize = 64;

/// How long a ticket whose caller does not wait at this moment keeps its turn: longer than it takes to
/// ask again, short enough for those behind one that has gone.
pub const TICKET_KEPT: Duration = Duration::from_secs(10);

/// Longest wait that one call may ask for (OpenSnapshotRequest.queue_wait).
pub const WAIT_MAX: Duration = Duration::from_secs(60 * 60);

/// Tickets in their order.
#[derive(Debug, Default)]
pub struct Queue {
    tickets: VecDeque<Ticket>,
}

#[derive(Debug)]
struct Ticket {
    id: String,
    /// Calls that wait with it now.
    waiting: usize,
    /// When the last of them left.
    left: Instant,
}

/// What becomes of a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// It is its turn, and its ticket is used up.
    Now,
    /// It waits: its place, from 1, and how many wait.
    Later {
        /// Its place.
        place: usize,
        /// How many wait.
        of: usize,
    },
    /// So many wait already.
    Full,
}

impl Queue {
    /// Whether the caller `id` may have one of `free` places; else it is given a ticket if it `waits`.
    pub fn ask(&mut self, id: &str, free: usize, waits: bool, now: Instant) -> Turn {
        self.tickets.retain(|ticket| ticket.waiting > 0 || now - ticket.left < TICKET_KEPT);
        let place = self.tickets.iter().position(|ticket| ticket.id == id);
        let before = place.unwrap_or(self.tickets.len());
        if before < free {
            if let Some(place) = place {
                self.tickets.remove(place);
            }
            return Turn::Now;
        }
        if place.is_none() {
            if !waits {
                return Turn::Later { place: before + 1, of: before };
            }
            if self.tickets.len() >= TICKETS_MAX {
                return Turn::Full;
            }
            self.tickets.push_back(Ticket { id: id.to_owned(), waiting: 0, left: now });
        }
        Turn::Later { place: before + 1, of: self.tickets.len() }
    }

    /// A call waits with a ticket.
    pub fn begin_to_wait(&mut self, id: &str) {
        if let Some(ticket) = self.tickets.iter_mut().find(|ticket| ticket.id == id) {
            ticket.waiting += 1;
        }
    }

    /// It waits no longer.
    pub fn end_to_wait(&mut self, id: &str, now: Instant) {
        if let Some(ticket) = self.tickets.iter_mut().find(|ticket| ticket.id == id) {
            ticket.waiting = ticket.waiting.saturating_sub(1);
            ticket.left = now;
        }
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tickets.len()
    }

    /// Whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tickets.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards the order: who comes when a place is free, and others wait, waits behind them.
    #[test]
    fn places_are_given_in_the_order_in_which_they_were_asked_for() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        assert_eq!(queue.ask("a", 0, true, now), Turn::Later { place: 1, of: 1 });
        assert_eq!(queue.ask("b", 0, true, now), Turn::Later { place: 2, of: 2 });
        assert_eq!(queue.ask("a", 0, true, now), Turn::Later { place: 1, of: 2 });
        assert_eq!(queue.ask("c", 1, true, now), Turn::Later { place: 3, of: 3 });
        assert_eq!(queue.ask("b", 1, true, now), Turn::Later { place: 2, of: 3 });
        assert_eq!(queue.ask("a", 1, true, now), Turn::Now);
        assert_eq!(queue.ask("c", 2, true, now), Turn::Now);
        assert_eq!(queue.ask("b", 1, true, now), Turn::Now);
        assert!(queue.is_empty());
    }

    /// Guards those behind a caller that has gone: its turn is kept for a moment and no longer.
    #[test]
    fn a_caller_that_does_not_come_again_loses_its_turn() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.ask("gone", 0, true, now);
        queue.begin_to_wait("gone");
        queue.ask("next", 0, true, now);
        let later = now + TICKET_KEPT * 2;
        assert_eq!(queue.ask("next", 1, true, later), Turn::Later { place: 2, of: 2 });
        queue.end_to_wait("gone", later);
        let soon = later + TICKET_KEPT / 2;
        assert_eq!(queue.ask("next", 1, true, soon), Turn::Later { place: 2, of: 2 });
        assert_eq!(queue.ask("next", 1, true, later + TICKET_KEPT), Turn::Now);
    }

    /// Guards the memory of a donor that everybody asks.
    #[test]
    fn so_many_may_wait_and_one_more_is_refused() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for n in 0..TICKETS_MAX {
            queue.ask(&n.to_string(), 0, true, now);
        }
        assert_eq!(queue.ask("more", 0, true, now), Turn::Full);
        let all = TICKETS_MAX;
        assert_eq!(queue.ask("unwilling", 0, false, now), Turn::Later { place: all + 1, of: all });
        assert_eq!(queue.len(), TICKETS_MAX);
    }
}
