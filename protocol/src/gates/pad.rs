//! Hiding how many keys of a row are padding: padded keys' scores are lowered until their exponentials are zero.
//!
//! The client shares a bit per key, 0 for padding, and pads with copies of the first row, so that in every layer a
//! padded key's score equals that of a real one up to rounding. Lowered by [`LEVELS`] steps of the row maximum, it is
//! below the maximum's bound by more than the exponential's windows reach, so its flag is certainly set and its weight
//! is exactly zero, while the maximum is that of the real keys. Linear in shares, hence local: no party learns a bit.

use super::exp::VANISHED;
use super::grid::Grid;
use crate::ring::mask;

/// Steps of the row maximum by which a padded key is lowered: those from which on its exponential is zero, and one for the
/// rounding that tells a copy from its original.
pub const LEVELS: u32 = VANISHED + 1;

/// Adds `levels (keep_j - 1 / 2)` steps to every score of key `j`, which keeps scores centred in their ring.
#[derive(Clone, Debug)]
pub struct PadKeys {
    /// The scores of each head.
    pub grid: Grid,
    /// Per head, steps of the row maximum by which a padded key is lowered, at least [`LEVELS`].
    pub levels: Vec<u32>,
    /// Per head, log2 of the number of maximum levels over the whole ring.
    pub level_bits: Vec<u32>,
    /// Ring of scores; the shared bits are in this ring or a wider one.
    pub k: u32,
}

impl PadKeys {
    /// Units by which head `h` raises real keys, after all were lowered by half of it.
    pub fn shift(&self, h: usize) -> u64 {
        u64::from(self.levels[h]) << (self.k - self.level_bits[h])
    }

    /// Evaluator: share of the moved scores from shares of scores and of the bits, one a key.
    pub fn eval(&self, leads: bool, scores: &[u64], keep: &[u64]) -> Vec<u64> {
        let mut out = Vec::with_capacity(scores.len());
        for (h, head) in scores.chunks_exact(self.grid.len()).enumerate() {
            let up = self.shift(h);
            let down = if leads { up / 2 } else { 0 };
            let by: Vec<u64> = keep.iter().map(|b| b.wrapping_mul(up).wrapping_sub(down)).collect();
            for (_, row) in self.grid.split(head) {
                out.extend(row.iter().zip(&by).map(|(s, b)| s.wrapping_add(*b) & mask(self.k)));
            }
        }
        out
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, scores: &[f64], keep: &[f64]) -> Vec<f64> {
        let mut out = Vec::with_capacity(scores.len());
        for (h, head) in scores.chunks_exact(self.grid.len()).enumerate() {
            for (_, row) in self.grid.split(head) {
                out.extend(row.iter().zip(keep).map(|(s, b)| s + self.shift(h) as f64 * (b - 0.5)));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::signed;

    #[test]
    fn moves_are_exact_on_shares() {
        let g = PadKeys { grid: Grid::causal(1, 3), levels: vec![LEVELS, 30], level_bits: vec![7, 9], k: 28 };
        let (s1, keep1) = ([0x0fff_fff0u64; 18], [5u64, 0x0fff_ffff, 7, 1]);
        let s2: Vec<u64> = (0..18).map(|i| (i * i * 1000) as u64).collect();
        let keep2: Vec<u64> = keep1.iter().zip([1u64, 0, 0, 1]).map(|(p, x)| x.wrapping_sub(*p) & mask(32)).collect();
        let sum = |a: &[u64], b: &[u64]| -> Vec<f64> {
            a.iter().zip(b).map(|(a, b)| signed(a.wrapping_add(*b) & mask(28), 28) as f64).collect()
        };
        let got = sum(&g.eval(true, &s1, &keep1), &g.eval(false, &s2, &keep2));
        assert_eq!(got, g.plain(&sum(&s1, &s2), &[1.0, 0.0, 0.0, 1.0]));
    }
}
