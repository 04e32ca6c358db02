//! What can go wrong with a device. Whatever it is, nothing was computed and nothing may be sent.

/// Why a device does not compute.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GpuError {
    /// No adapter of the kind asked for.
    #[error("no graphics adapter: {0}")]
    NoAdapter(String),
    /// An adapter that cannot be opened.
    #[error("{adapter} cannot be opened: {reason}")]
    Unusable { adapter: String, reason: String },
    /// The device is gone or does not answer; it has to be opened again.
    #[error("{adapter} was lost: {reason}")]
    Lost { adapter: String, reason: String },
    /// The device has no memory left for what was asked.
    #[error("{adapter} is out of memory: give it fewer sessions or a smaller model, or compute with --backend cpu")]
    OutOfMemory { adapter: String },
    /// The driver or its layers refuse what was asked.
    #[error("{adapter} refused: {reason}")]
    Refused { adapter: String, reason: String },
    /// An operand of which not even the smallest part fits a buffer.
    #[error("{adapter} takes buffers of {limit} bytes: {what} does not fit; compute with --backend cpu")]
    TooLarge { adapter: String, what: String, limit: usize },
}

impl From<GpuError> for tacet_protocol::Error {
    fn from(e: GpuError) -> Self {
        tacet_protocol::Error::Device(e.to_string())
    }
}
