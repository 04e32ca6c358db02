//! The protocol's one error type: every variant names what was being done.

/// What can go wrong in planning or evaluating.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model directory or file that cannot be used.
    #[error("model: {0}")]
    Model(String),
    /// A tensor whose range cannot be proven to fit its ring.
    #[error("plan: {op}: {reason}")]
    Plan { op: String, reason: String },
    /// Bytes of a peer or a client that do not parse.
    #[error("malformed {what}: {reason}")]
    Malformed { what: &'static str, reason: String },
    /// A mask index that was used before, or steps out of order.
    #[error("randomness: step {step} slot {slot} was already used or skipped back")]
    MaskReuse { step: u32, slot: u32 },
    /// Sealing or unsealing failed (wrong key, wrong session, tampered bytes).
    #[error("sealed input rejected: {0}")]
    Sealed(&'static str),
    /// The transport gave up; the text says which party and why.
    #[error("transport: {0}")]
    Transport(String),
    /// The device that computes products gave up; the text says which one and why.
    #[error("device: {0}")]
    Device(String),
}
