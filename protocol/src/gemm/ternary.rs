//! Weights of -1, 0 and 1 times a magnitude of each output's own, and their products by sums looked up in tables: the method
//! of four Russians (Arlazarov, Dinic, Kronrod and Faradzev 1970), as T-MAC has it for networks (arXiv 2407.00088).
//!
//! Three weights have 27 signed sums of three words, half of them the negatives of the others. A code of five bits names one:
//! the magnitude of `9 t_0 + 3 t_1 + t_2` and its sign above. Six codes are a word of 32 bits, so that 18 weights take 1.8
//! bits each. With AVX-512 a table is two registers, from which one instruction looks sixteen outputs' sums up (`planes`), and
//! with NEON a byte of each (`byte_planes`); elsewhere, and of many rows, tables have the sums of several rows side by side
//! and stay in the first-level cache ([`tables`]). Magnitudes multiply the sums of whole blocks, in the ring, so that every
//! result is that of the same weights in 16 bits, bit for bit.
//!
//! Indices of tables are weights, which are public, and their contents are sums of shares. What is read, and when, depends on
//! weights and shapes only. Tables and sums are wiped.
//!
//! [`tables`]: super::tables

use std::io::{self, Read, Write};
use std::ops::Range;

/// Outputs of a panel.
pub(super) const PANEL: usize = 64;
/// Rows that are best gone through together.
pub(super) const TILE: usize = 16;
/// Weights of a code.
pub(super) const GROUP: usize = 3;
/// Codes of a word.
pub(super) const CODES: usize = 6;
/// Weights of a word.
pub(super) const PACKED: usize = GROUP * CODES;
/// Bits of a code; the top one is its sign.
pub(super) const CODE: u32 = 5;
/// The largest code without its sign.
const MOST: u32 = 13;

/// A word of each output of a panel, at the start of a line of the cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Words(pub(super) [u32; PANEL]);

/// Panels of [`PANEL`] outputs, a word of each output after that of the one before, for all words of a row.
#[derive(Clone)]
pub(super) struct Ternary {
    cols_in: usize,
    words: Vec<Words>,
    /// Of each output.
    scales: Vec<u16>,
}

/// The one magnitude of all weights but zeros, zero where there is no other; `None` where they have several.
pub(super) fn magnitude(row: &[i16]) -> Option<u16> {
    let first = row.iter().find(|w| **w != 0).map_or(0, |w| w.unsigned_abs());
    let same = row.iter().all(|w| *w == 0 || w.unsigned_abs() == first);
    // Such that both signs are weights.
    (same && first <= i16::MAX.unsigned_abs()).then_some(first)
}

impl Ternary {
    /// No output yet of `out` with `inp` inputs.
    pub(super) fn new(out: usize, inp: usize) -> Ternary {
        let words = Vec::with_capacity(out.div_ceil(PANEL) * inp.div_ceil(PACKED));
        Ternary { cols_in: inp, words, scales: Vec::with_capacity(out) }
    }

    /// Inputs.
    pub(super) fn cols_in(&self) -> usize {
        self.cols_in
    }

    /// Words of an output.
    pub(super) fn words_in(&self) -> usize {
        self.cols_in.div_ceil(PACKED)
    }

    /// A panel of `count` rows, row-major; `false` and nothing where one has several magnitudes.
    pub(super) fn extend(&mut self, rows: &[i16], count: usize) -> bool {
        let row = |o: usize| &rows[o * self.cols_in..][..self.cols_in];
        let Some(scales) = (0..count).map(|o| magnitude(row(o))).collect::<Option<Vec<u16>>>() else {
            return false;
        };
        self.scales.extend(scales);
        let mut panel = vec![Words([0; PANEL]); self.words_in()];
        for o in 0..count {
            for (words, weights) in panel.iter_mut().zip(row(o).chunks(PACKED)) {
                for (g, three) in weights.chunks(GROUP).enumerate() {
                    let n = (0..GROUP).fold(0, |n, i| 3 * n + three.get(i).map_or(0, |w| i32::from(w.signum())));
                    let code = n.unsigned_abs() | u32::from(n < 0) << (CODE - 1);
                    words.0[o] |= code << (CODE * g as u32);
                }
            }
        }
        self.words.append(&mut panel);
        true
    }

    /// The weight of input `i` in output `o`.
    pub(super) fn at(&self, o: usize, i: usize) -> i16 {
        let word = self.words[o / PANEL * self.words_in() + i / PACKED].0[o % PANEL];
        let code = word >> (CODE * (i % PACKED / GROUP) as u32);
        // Digits of a number that is made positive.
        let half = 1 << (CODE - 1);
        let n = (code & (half - 1)) as i32;
        let n = if code & half == 0 { MOST as i32 + n } else { MOST as i32 - n };
        let digit = n / [9, 3, 1][i % GROUP] % 3 - 1;
        digit as i16 * self.scales[o] as i16
    }

    /// Words `words` of the outputs of panel `p`.
    pub(super) fn panel(&self, p: usize, words: Range<usize>) -> &[Words] {
        &self.words[p * self.words_in()..][words]
    }

    /// Magnitudes of the outputs of some panels, hardly more than there are outputs.
    pub(super) fn scales(&self, panels: Range<usize>) -> &[u16] {
        &self.scales[panels.start * PANEL..(panels.end * PANEL).min(self.scales.len())]
    }

    /// All bytes: words, then magnitudes.
    pub(super) fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(4 * PANEL);
        for words in &self.words {
            bytes.clear();
            bytes.extend(words.0.iter().flat_map(|w| w.to_le_bytes()));
            to.write_all(&bytes)?;
        }
        self.scales.iter().try_for_each(|s| to.write_all(&s.to_le_bytes()))
    }

    /// What [`Ternary::write`] wrote for so many outputs and inputs.
    pub(super) fn read(out: usize, inp: usize, from: &mut dyn Read) -> io::Result<Ternary> {
        let mut read = Ternary { cols_in: inp, words: Vec::new(), scales: Vec::new() };
        let panels = out.div_ceil(PANEL).checked_mul(read.words_in());
        for _ in 0..panels.ok_or_else(|| io::Error::other("more weights than can be"))? {
            let mut bytes = [0; 4 * PANEL];
            from.read_exact(&mut bytes)?;
            let (words, _) = bytes.as_chunks();
            let words: [u32; PANEL] = std::array::from_fn(|o| u32::from_le_bytes(words[o]));
            if !words.iter().all(|w| well_formed(*w)) {
                return Err(io::Error::other("a code of no three weights"));
            }
            read.words.push(Words(words));
        }
        for _ in 0..out {
            let mut bytes = [0; 2];
            from.read_exact(&mut bytes)?;
            let scale = u16::from_le_bytes(bytes);
            if scale > i16::MAX.unsigned_abs() {
                return Err(io::Error::other("a weight that 16 bits do not hold"));
            }
            read.scales.push(scale);
        }
        Ok(read)
    }
}

/// Whether every code of a word is one of three weights: no magnitude is 14 or 15.
fn well_formed(word: u32) -> bool {
    let second = (0..CODES).fold(0, |bits, g| bits | 2 << (CODE * g as u32));
    word >> (CODE * CODES as u32) == 0 && word & word >> 1 & word >> 2 & second == 0
}

#[cfg(test)]
mod tests {
    use super::super::tests::noise;
    use super::*;

    #[test]
    fn weights_come_back() {
        let mut next = noise(5);
        for (out, inp) in [(1, 1), (3, 18), (64, 19), (65, 17), (130, 55), (7, 0)] {
            for magnitude in [0, 1, 77, i16::MAX] {
                let w: Vec<i16> = (0..out * inp).map(|_| (next() % 3) as i16 - 1).map(|t| t * magnitude).collect();
                let mut packed = Ternary::new(out, inp);
                for o in (0..out).step_by(PANEL) {
                    let count = PANEL.min(out - o);
                    assert!(packed.extend(&w[o * inp..][..count * inp], count));
                }
                let same = |t: &Ternary| (0..w.len()).all(|at| t.at(at / inp, at % inp) == w[at]);
                assert!(same(&packed) && packed.scales.len() == out, "{out} x {inp}");
                let mut bytes = Vec::new();
                packed.write(&mut bytes).unwrap();
                assert!(same(&Ternary::read(out, inp, &mut &bytes[..]).unwrap()));
                assert!(Ternary::read(out, inp, &mut &bytes[1..]).is_err());
                assert!(Ternary::read(usize::MAX, inp, &mut &bytes[..]).is_err());
            }
        }
    }

    #[test]
    fn bytes_that_are_no_weights_are_refused() {
        let mut packed = Ternary::new(1, 3);
        assert!(packed.extend(&[5, -5, 0], 1) && !packed.extend(&[1, 2, 0], 1) && !packed.extend(&[i16::MIN; 3], 1));
        let mut bytes = Vec::new();
        packed.write(&mut bytes).unwrap();
        for (at, bad) in [(0, 14), (0, 15), (0, 31), (3, 0x40), (3, 0x80), (bytes.len() - 1, 0x80)] {
            let mut bytes = bytes.clone();
            bytes[at] = bad;
            assert!(Ternary::read(1, 3, &mut &bytes[..]).is_err(), "byte {at}: {bad}");
        }
    }
}
