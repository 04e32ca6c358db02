//! Where the products of an evaluator and of a dealer are computed: the processor, or a device that the caller brings.
//!
//! A backend sees what the caller's own memory holds already (shares, masked values and own halves of masks at an
//! evaluator, masks at a dealer) and public weights; it is part of that party. What it computes is exact in the ring, so
//! that it makes no difference to the other parties which one a party uses. How long it takes may depend on shapes only.

use std::sync::Arc;

use crate::Error;
use crate::gates::product::HeadProduct;
use crate::gemm::linear;
use crate::program::Linear;

/// Computes matrix products in Z_2^bits.
pub trait Backend: Send + Sync {
    /// `x W^T`, `rows` rows of outputs, without the bias; `x` may have bits above the ring.
    ///
    /// # Errors
    /// [`Error::Device`]: nothing was computed.
    fn linear(&self, layer: &Arc<Linear>, x: &[u64], rows: usize, bits: u32) -> Result<Vec<u64>, Error>;

    /// The sum of the products `a b`, head by head, laid out as the gate says.
    ///
    /// # Errors
    /// [`Error::Device`]: nothing was computed.
    fn product(&self, g: &HeadProduct, pairs: &[(&[u64], &[u64])]) -> Result<Vec<u64>, Error>;
}

/// The calling thread; never fails.
pub struct Cpu;

impl Backend for Cpu {
    fn linear(&self, layer: &Arc<Linear>, x: &[u64], rows: usize, bits: u32) -> Result<Vec<u64>, Error> {
        let weights = layer.weights()?;
        let mut out = vec![0; rows * weights.rows_out()];
        linear(x, rows, weights, bits, &mut out);
        Ok(out)
    }

    fn product(&self, g: &HeadProduct, pairs: &[(&[u64], &[u64])]) -> Result<Vec<u64>, Error> {
        Ok(g.sum(pairs))
    }
}
