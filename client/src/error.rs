//! What can go wrong, which party it was, and what to do.

use std::net::SocketAddr;
use std::time::Duration;

/// What can go wrong. Every variant that concerns a party names it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// A file or a setting that cannot be used.
    #[error("{0}")]
    Config(String),
    /// The text does not fit the model.
    #[error("text {index}: {tokens} tokens, but the model takes at most {limit}: shorten or split it")]
    TooLong { index: usize, tokens: usize, limit: usize },
    /// A sequence does not fit the model; `positions` are its tokens with their padding.
    #[error(
        "{tokens} tokens take {positions} positions with their padding, but the model has {limit}: shorten the text, or begin another conversation"
    )]
    ContextLength { tokens: usize, positions: usize, limit: usize },
    /// One text of several failed; `index` counts from 0.
    #[error("text {index}: {source}")]
    Text { index: usize, source: Box<ClientError> },
    /// A party cannot be reached.
    #[error(
        "party {party} at {addr} cannot be reached: {reason}; check that it runs and that its certificate is the one in parties.toml"
    )]
    Unreachable { party: String, addr: SocketAddr, reason: String },
    /// A party ended the session; `code` is one of the party's stable codes.
    #[error("party {party} refused (code {code}): {text}")]
    Refused { party: String, code: u16, text: String },
    /// A party vanished or sent something else than an answer.
    #[error("party {party} failed: {reason}; the session has ended everywhere, try again")]
    Failed { party: String, reason: String },
    /// No answer within the deadline.
    #[error("no answer within {0:?}: give the client a longer deadline, or ask for less at once")]
    Deadline(Duration),
    /// Planning or encoding.
    #[error(transparent)]
    Protocol(#[from] tacet_protocol::Error),
}

impl ClientError {
    /// Names the text that failed, unless the error does so itself.
    pub(crate) fn of_text(self, index: usize) -> ClientError {
        match self {
            e @ (ClientError::TooLong { .. } | ClientError::Text { .. }) => e,
            e => ClientError::Text { index, source: Box::new(e) },
        }
    }

    /// The error behind [`ClientError::Text`]; any other one is its own cause.
    pub fn cause(&self) -> &ClientError {
        match self {
            ClientError::Text { source, .. } => source.cause(),
            e => e,
        }
    }

    /// The text that failed, if the error is about one.
    pub fn index(&self) -> Option<usize> {
        match self {
            ClientError::TooLong { index, .. } | ClientError::Text { index, .. } => Some(*index),
            _ => None,
        }
    }

    /// The party that failed or refused, if it was one.
    pub fn party(&self) -> Option<&str> {
        match self.cause() {
            ClientError::Unreachable { party, .. }
            | ClientError::Refused { party, .. }
            | ClientError::Failed { party, .. } => Some(party),
            _ => None,
        }
    }
}

/// Codes of [`ClientError::Refused`]: the party's `session::code`, which is part of the protocol.
pub(crate) mod code {
    pub const BUSY: u16 = 2;
    pub const PEER: u16 = 5;
    pub const PROTOCOL: u16 = 6;
    pub const DEADLINE: u16 = 7;
}

/// How much a report says about why a session ended; less is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// The party itself refused: nobody else can know more.
    Refusal,
    /// The connection to the party is gone.
    Lost,
    /// Another party says that it cannot reach this one.
    Named,
    /// The party itself gave up.
    GaveUp,
    /// The party saw another one fail and does not say which.
    Hearsay,
    /// A stream ended without a word.
    Silence,
}

/// One party's report of a session that failed.
#[derive(Debug)]
pub(crate) struct Report {
    pub error: ClientError,
    pub rank: Rank,
    /// The party refused in place of accepting, for lack of room: no share of the session was used.
    pub busy: bool,
}

impl Report {
    pub(crate) fn new(rank: Rank, error: ClientError) -> Report {
        Report { error, rank, busy: false }
    }

    /// What `party` said when it ended the session; `others` are the names and roles of the rest of the lane.
    pub(crate) fn refusal<'a>(
        party: &str,
        accepted: bool,
        code: u16,
        text: String,
        others: impl Iterator<Item = (&'a str, String)>,
    ) -> Report {
        let named = |(name, role): &(&str, String)| {
            text.starts_with(&format!("party {name} (")) || text.starts_with(&format!("{role} did not join"))
        };
        if code == code::PEER
            && let Some((name, _)) = others.into_iter().find(named)
        {
            let reason = format!("party {party} says: {text}");
            return Report::new(Rank::Named, ClientError::Failed { party: name.to_string(), reason });
        }
        let rank = match code {
            code::PROTOCOL if text.starts_with("another party") => Rank::Hearsay,
            code::PEER => Rank::Hearsay,
            code::PROTOCOL | code::DEADLINE => Rank::GaveUp,
            _ => Rank::Refusal,
        };
        let busy = code == code::BUSY && !accepted;
        Report { error: ClientError::Refused { party: party.to_string(), code, text }, rank, busy }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(code: u16, accepted: bool, text: &str) -> Report {
        let others = [("beta", "E2".to_string()), ("gamma", "Dealer".to_string())];
        Report::refusal("alpha", accepted, code, text.into(), others.into_iter())
    }

    #[test]
    fn a_party_that_another_cannot_reach_is_the_one_that_failed() {
        for text in ["party gamma (Dealer) is not connected", "Dealer did not join the session in time"] {
            let r = said(code::PEER, true, text);
            assert_eq!((r.rank, r.error.party()), (Rank::Named, Some("gamma")));
            assert!(r.error.to_string().contains("party alpha says"), "{}", r.error);
        }
        let r = said(code::PEER, true, "party gammaray (Dealer) is not connected");
        assert_eq!((r.rank, r.error.party()), (Rank::Hearsay, Some("alpha")));
    }

    #[test]
    fn refusals_say_more_than_what_follows_from_them() {
        let own = said(1, false, "this token is not known here").rank;
        let gave_up = said(code::DEADLINE, true, "the session took longer than 60 s").rank;
        let other = said(code::PROTOCOL, true, "another party: connection: reset").rank;
        assert!(own < Rank::Lost && Rank::Named < gave_up && gave_up < other && other < Rank::Silence);
    }

    #[test]
    fn only_a_refusal_before_acceptance_leaves_the_shares_unused() {
        assert!(said(code::BUSY, false, "all 16 sessions are taken").busy);
        assert!(!said(code::BUSY, true, "all sessions are taken").busy);
        assert!(!said(1, false, "this token is not known here").busy);
    }

    #[test]
    fn an_index_is_named_once() {
        let long = ClientError::TooLong { index: 3, tokens: 600, limit: 512 }.of_text(3);
        assert!(matches!(long, ClientError::TooLong { .. }) && long.index() == Some(3));
        let e = ClientError::Refused { party: "alpha".into(), code: 1, text: "no".into() }.of_text(2).of_text(2);
        assert_eq!(e.to_string(), "text 2: party alpha refused (code 1): no");
        assert!(e.index() == Some(2) && e.party() == Some("alpha"));
    }
}
