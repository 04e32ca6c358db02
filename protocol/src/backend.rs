//! Where evaluators and dealers compute: the processor, with the threads that work is divided among, or a device that the caller
//! brings, for products or for all that an evaluator does between two openings.
//!
//! A backend sees what the caller's own memory holds already (shares, masked values and own halves of masks at an
//! evaluator, masks at a dealer) and public weights; it is part of that party. What it computes is exact in the ring, so
//! that it makes no difference to the other parties which one a party uses. How long it takes may depend on shapes only.

use std::sync::Arc;

use zeroize::Zeroizing;

use crate::gates::product::{HeadProduct, Side};
use crate::gemm::{Threads, linear};
use crate::program::{Id, Linear, Program};
use crate::{Error, Role};

/// Computes in Z_2^bits.
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

    /// Threads of the processor for all that is not a product; none where the caller's own does it.
    fn threads(&self) -> Option<Threads> {
        None
    }

    /// A device for all that an evaluator computes of a program; none where it is for products at most.
    ///
    /// # Errors
    /// [`Error::Device`]: nothing was computed.
    fn evaluation(&self, _: &Program, _: Role) -> Result<Option<Box<dyn Evaluation>>, Error> {
        Ok(None)
    }
}

/// What an evaluator has of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Its share.
    Share,
    /// The masked words.
    Masked,
    /// Its half of the mask.
    Mask,
}

/// One evaluation on a device, which keeps the values: an evaluator brings what it draws and receives, and sends what the
/// device packed. Everything on the device is zero or destroyed when this is dropped.
pub trait Evaluation {
    /// Puts a value there that the program starts from; before anything is computed.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn put(&mut self, v: Id, part: Part, words: &[u64]) -> Result<(), Error>;

    /// Computes the next of the program's [`crate::run::segments`], fed as that says; returns the message that opens its
    /// last values, empty after the last segment.
    ///
    /// # Errors
    /// [`Error::Device`]: nothing is to be sent.
    fn run(&mut self, segment: usize, fed: &[u8]) -> Result<Vec<u8>, Error>;

    /// What the program leaves, after the last segment.
    ///
    /// # Errors
    /// [`Error::Device`].
    fn get(&mut self, v: Id, part: Part) -> Result<Vec<u64>, Error>;
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
        Ok(g.sum(0..g.heads, pairs))
    }
}

/// Never fails.
impl Backend for Threads {
    fn linear(&self, layer: &Arc<Linear>, x: &[u64], rows: usize, bits: u32) -> Result<Vec<u64>, Error> {
        let weights = layer.weights()?;
        let mut out = vec![0; rows * weights.rows_out()];
        Threads::linear(self, x, rows, weights, bits, &mut out);
        Ok(out)
    }

    fn product(&self, g: &HeadProduct, pairs: &[(&[u64], &[u64])]) -> Result<Vec<u64>, Error> {
        let mut parts = self.map(g.heads, pairs.len() * g.macs(), |heads| Zeroizing::new(g.sum(heads, pairs)));
        if parts.len() == 1 {
            return Ok(parts.pop().map(|mut p| std::mem::take(&mut *p)).unwrap_or_default());
        }
        let mut out = Vec::with_capacity(g.out_len());
        match g.side {
            Side::Scores => parts.iter().for_each(|part| out.extend_from_slice(part)),
            Side::Attend => {
                let rows = g.grid.rows;
                for row in 0..rows {
                    for part in &parts {
                        let width = part.len() / rows;
                        out.extend_from_slice(&part[row * width..][..width]);
                    }
                }
            }
        }
        Ok(out)
    }

    fn threads(&self) -> Option<Threads> {
        (self.count() > 1).then(|| self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gates::grid::Grid;

    #[test]
    fn threads_give_the_words_of_one() {
        let words = |n: usize, by: u64| (1..=n as u64).map(|i| i.wrapping_mul(by)).collect::<Vec<_>>();
        let grids = [(Grid::square(70), 9, 9), (Grid::causal(40, 100), 8, 2), (Grid::causal(3000, 1), 7, 7)];
        for (grid, heads, kv_heads) in grids {
            for (side, k) in [(Side::Scores, 28), (Side::Attend, 62)] {
                let g = HeadProduct { side, grid, heads, kv_heads, dim: 64, k };
                let n = if side == Side::Scores { grid.rows * heads * 64 } else { heads * grid.len() };
                let (a, b) = (words(n, 0x9e37_79b9_7f4a_7c15), words(grid.keys * kv_heads * 64, 0xbf58_476d_1ce4_e5b9));
                let pairs: [(&[u64], &[u64]); 2] = [(&a, &b), (&a, &b)];
                let want = Cpu.product(&g, &pairs).unwrap();
                for threads in [2, 3] {
                    assert!(Threads::new(threads).unwrap().product(&g, &pairs).unwrap() == want, "{threads}: {g:?}");
                }
            }
        }
    }
}
