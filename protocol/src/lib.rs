//! Dealer-assisted masked evaluation of transformers: rings, gates, programs, sealing and wire format.
//!
//! This crate performs no I/O but that of model files and of the plans kept of them. An evaluator is a function over an [`EvaluatorIo`]; the dealer writes into a
//! [`DealerSink`]; whoever owns the sockets implements the two.
#![deny(unsafe_code)]

pub mod backend;
pub mod error;
pub mod gates;
pub mod gemm;
pub mod model;
pub mod plan;
pub mod prg;
pub mod program;
pub mod programs;
pub mod query;
pub mod ring;
pub mod run;
pub mod seal;
pub mod twin;
#[allow(unsafe_code)]
mod vector;
pub mod wipe;
pub mod wire;

pub use error::Error;

use std::sync::{Mutex, MutexGuard, PoisonError};

use backend::{Backend, Cpu};

/// Locks ignoring poison: for critical sections that leave their data whole.
pub fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Who a process is within a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// First evaluator. Adds public constants to its shares.
    E1,
    /// Second evaluator.
    E2,
    /// Dealer: knows every mask, never a masked value.
    Dealer,
}

/// What an evaluator needs from the outside, in program order. Implementations may block.
pub trait EvaluatorIo {
    /// The dealer's message for `step`, exactly `len` bytes.
    fn dealt(&mut self, step: u32, len: usize) -> Result<Vec<u8>, Error>;
    /// Sends this evaluator's opening for `step` and returns the other's, which has the same length.
    fn exchange(&mut self, step: u32, out: Vec<u8>) -> Result<Vec<u8>, Error>;
    /// Where products are computed.
    fn backend(&self) -> &dyn Backend {
        &Cpu
    }
}

/// Where the dealer's messages go, in program order for each evaluator. Implementations may block (back-pressure).
pub trait DealerSink {
    /// `to` is [`Role::E1`] or [`Role::E2`].
    fn send(&mut self, to: Role, step: u32, bytes: Vec<u8>) -> Result<(), Error>;
    /// Where products are computed.
    fn backend(&self) -> &dyn Backend {
        &Cpu
    }
}
