//! Where the parties' time went, as they say. They are not believed more than they have to be: a number is what fits into the
//! time that the client itself would have waited, or into a day where the work may have been done before.

use std::time::Duration;

use serde::Serialize;
use tacet_protocol::wire::{DealerTime, EvaluatorTime};

/// Seconds of the slower evaluator and of the dealer; they depend on shapes, machines and networks, never on a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Phases {
    /// The evaluator's arithmetic: all but its two waits.
    pub computing_s: f64,
    /// What of that its thread had of a processor; the rest is other threads', an adapter's, or waiting for a processor.
    pub computing_processor_s: f64,
    /// Waiting for the dealer's steps.
    pub dealer_wait_s: f64,
    /// Waiting for the other evaluator's openings.
    pub peer_wait_s: f64,
    /// The dealer's arithmetic.
    pub dealing_s: f64,
    /// What of that its thread had of a processor.
    pub dealing_processor_s: f64,
    /// The dealer's waiting for room at the evaluators.
    pub room_wait_s: f64,
}

/// Longest dealing that is believed.
const DAY: Duration = Duration::from_secs(86_400);

/// Seconds, at most so many.
pub(crate) fn seconds(us: u64, most: Duration) -> f64 {
    Duration::from_micros(us).min(most).as_secs_f64()
}

/// Seconds of a whole dealing, waits included.
pub(crate) fn dealing(t: &DealerTime) -> f64 {
    seconds(t.dealing, DAY)
}

impl Phases {
    /// Of an evaluator for which the client waits so long `at most`.
    pub(crate) fn of(t: &EvaluatorTime, most: Duration) -> Phases {
        let s = |us| seconds(us, most);
        Phases {
            computing_s: s(t.computing),
            computing_processor_s: s(t.processor),
            dealer_wait_s: s(t.dealer),
            peer_wait_s: s(t.peer),
            ..Phases::default()
        }
    }

    /// With what a dealing took.
    pub(crate) fn dealt(self, t: &DealerTime) -> Phases {
        Phases {
            dealing_s: seconds(t.dealing.saturating_sub(t.room), DAY),
            dealing_processor_s: seconds(t.processor, DAY),
            room_wait_s: seconds(t.room, DAY),
            ..self
        }
    }

    /// Phase by phase.
    pub fn with(&self, other: &Phases, f: impl Fn(f64, f64) -> f64) -> Phases {
        Phases {
            computing_s: f(self.computing_s, other.computing_s),
            computing_processor_s: f(self.computing_processor_s, other.computing_processor_s),
            dealer_wait_s: f(self.dealer_wait_s, other.dealer_wait_s),
            peer_wait_s: f(self.peer_wait_s, other.peer_wait_s),
            dealing_s: f(self.dealing_s, other.dealing_s),
            dealing_processor_s: f(self.dealing_processor_s, other.dealing_processor_s),
            room_wait_s: f(self.room_wait_s, other.room_wait_s),
        }
    }
}

/// What was added to a running total; nothing where a dealer's numbers fall.
pub(crate) fn added(now: &DealerTime, before: &DealerTime) -> DealerTime {
    DealerTime {
        dealing: now.dealing.saturating_sub(before.dealing),
        processor: now.processor.saturating_sub(before.processor),
        room: now.room.saturating_sub(before.room),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_number_of_a_party_is_out_of_bounds() {
        let most = Duration::from_secs(60);
        for n in [0, 1, 59_999_999, 60_000_000, u64::MAX] {
            let e = EvaluatorTime { online: n, computing: n, processor: n, dealer: n, peer: n };
            for room in [0, n, u64::MAX] {
                let d = DealerTime { dealing: n, processor: n, room };
                let p = Phases::of(&e, most).dealt(&d);
                let waits = [p.computing_s, p.computing_processor_s, p.dealer_wait_s, p.peer_wait_s, seconds(n, most)];
                assert!(waits.iter().all(|s| *s == (n as f64 / 1e6).min(60.0)), "{p:?}");
                for s in [p.dealing_s, p.dealing_processor_s, p.room_wait_s, dealing(&d)] {
                    assert!((0.0..=86_400.0).contains(&s), "{p:?}");
                }
            }
        }
        let (a, b) =
            (DealerTime { dealing: 5, processor: 1, room: 2 }, DealerTime { dealing: 3, processor: 9, room: 2 });
        assert_eq!(added(&a, &b), DealerTime { dealing: 2, processor: 0, room: 0 });
    }
}
