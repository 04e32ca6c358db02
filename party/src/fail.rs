//! Why a session ends, as its client is told.

use tacet_protocol::Error;
use tacet_transport::TransportError;

/// A stable code for programs and a text for people.
#[derive(Debug)]
pub struct Fail {
    pub code: u16,
    pub text: String,
}

/// Codes of [`Fail`]; stable, for programs.
pub mod code {
    /// The token is not known.
    pub const UNAUTHORISED: u16 = 1;
    /// Too many sessions, no room for a bundle, or the party is stopping.
    pub const BUSY: u16 = 2;
    /// Another model or plan.
    pub const DIGEST: u16 = 3;
    /// A request that cannot be served: length, sealing, a repeated session name.
    pub const REQUEST: u16 = 4;
    /// Another party is not reachable or did not join.
    pub const PEER: u16 = 5;
    /// The evaluation failed.
    pub const PROTOCOL: u16 = 6;
    /// The session took too long.
    pub const DEADLINE: u16 = 7;
}

pub fn fail(code: u16, text: impl Into<String>) -> Fail {
    Fail { code, text: text.into() }
}

impl From<TransportError> for Fail {
    fn from(e: TransportError) -> Fail {
        fail(code::PROTOCOL, format!("another party: {e}"))
    }
}

impl From<Error> for Fail {
    fn from(e: Error) -> Fail {
        match e {
            // Its channels end with the streams behind them, and these with another party.
            Error::Transport(text) => fail(code::PROTOCOL, format!("another party: {text}")),
            e => fail(code::PROTOCOL, e.to_string()),
        }
    }
}
