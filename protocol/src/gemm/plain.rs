//! Weights of a byte or two each.

use std::io::{self, Read, Write};
use std::ops::Range;

use super::NR;

/// Bytes that are written or read at a time.
const PART: usize = 1 << 18;

/// Weights as they are.
#[derive(Clone)]
pub(super) struct Plain {
    pub(super) rows_out: usize,
    pub(super) cols_in: usize,
    data: Data,
    /// Largest magnitude.
    pub(super) largest: u32,
}

/// Panels of [`NR`] outputs; within one, pairs of inputs; within one, an output's two weights side by side.
#[derive(Clone)]
enum Data {
    Narrow(Vec<i8>),
    Wide(Vec<i16>),
}

/// Packed weights of [`NR`] outputs, or of some pairs of their inputs.
#[derive(Clone, Copy)]
pub(super) enum Panel<'a> {
    Narrow(&'a [i8]),
    Wide(&'a [i16]),
}

impl Plain {
    /// No output yet of `out` with `inp` inputs; weights of a byte each, or of two where `wide`.
    pub(super) fn new(out: usize, inp: usize, wide: bool) -> Plain {
        let all = out.div_ceil(NR) * NR * inp.next_multiple_of(2);
        let data = if wide { Data::Wide(Vec::with_capacity(all)) } else { Data::Narrow(Vec::with_capacity(all)) };
        Plain { rows_out: 0, cols_in: inp, data, largest: 0 }
    }

    /// Packs `w`, row-major, `out` rows of `inp`.
    pub(super) fn of(out: usize, inp: usize, w: &[i16]) -> Plain {
        let mut plain = Plain::new(out, inp, false);
        if !plain.extend(w, out) {
            plain = Plain::new(out, inp, true);
            plain.extend(w, out);
        }
        plain
    }

    /// Whole panels of rows, or the last ones, `count` of them, row-major; `false` and nothing where a byte is too narrow.
    pub(super) fn extend(&mut self, rows: &[i16], count: usize) -> bool {
        if matches!(self.data, Data::Narrow(_)) && !rows.iter().all(|w| i8::try_from(*w).is_ok()) {
            return false;
        }
        let mut panel = vec![0; self.cols_in.next_multiple_of(2) * NR];
        for first in (0..count).step_by(NR) {
            panel.fill(0);
            for column in 0..NR.min(count - first) {
                let row = &rows[(first + column) * self.cols_in..][..self.cols_in];
                for (pair, w) in panel.chunks_exact_mut(2 * NR).zip(row.chunks(2)) {
                    pair[2 * column..][..w.len()].copy_from_slice(w);
                }
            }
            match &mut self.data {
                Data::Narrow(narrow) => narrow.extend(panel.iter().map(|w| *w as i8)),
                Data::Wide(wide) => wide.extend_from_slice(&panel),
            }
        }
        self.largest = rows.iter().fold(self.largest, |m, w| m.max(w.unsigned_abs().into()));
        self.rows_out += count;
        true
    }

    /// Whether a weight takes two bytes.
    pub(super) fn wide(&self) -> bool {
        matches!(self.data, Data::Wide(_))
    }

    /// The weight of input `i` in output `o`.
    pub(super) fn at(&self, o: usize, i: usize) -> i16 {
        let at = (o / NR * self.cols_in.div_ceil(2) * NR + i / 2 * NR + o % NR) * 2 + i % 2;
        match &self.data {
            Data::Narrow(d) => d[at].into(),
            Data::Wide(d) => d[at],
        }
    }

    /// Panels.
    pub(super) fn panels(&self) -> usize {
        self.rows_out.div_ceil(NR)
    }

    /// Inputs `inputs`, even numbers, of panel `p`.
    pub(super) fn panel(&self, p: usize, inputs: Range<usize>) -> Panel<'_> {
        let first = p * self.cols_in.next_multiple_of(2);
        let range = (first + inputs.start) * NR..(first + inputs.end) * NR;
        match &self.data {
            Data::Narrow(d) => Panel::Narrow(&d[range]),
            Data::Wide(d) => Panel::Wide(&d[range]),
        }
    }

    /// Writes the packed bytes.
    pub(super) fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(PART);
        match &self.data {
            Data::Narrow(d) => d.chunks(PART).try_for_each(|part| {
                bytes.clear();
                bytes.extend(part.iter().map(|w| w.cast_unsigned()));
                to.write_all(&bytes)
            }),
            Data::Wide(d) => d.chunks(PART / 2).try_for_each(|part| {
                bytes.clear();
                bytes.extend(part.iter().flat_map(|w| w.to_le_bytes()));
                to.write_all(&bytes)
            }),
        }
    }

    /// What [`Plain::write`] wrote of such weights.
    pub(super) fn read(out: usize, inp: usize, wide: bool, largest: u32, from: &mut dyn Read) -> io::Result<Plain> {
        let panel = inp.checked_next_multiple_of(2).and_then(|inp| inp.checked_mul(NR));
        let all = panel.and_then(|panel| panel.checked_mul(out.div_ceil(NR)));
        let mut left = all.ok_or_else(|| io::Error::other("more weights than can be"))?;
        let mut bytes = vec![0; PART];
        // Not more at once than what is there vouches for.
        let mut data = if wide { Data::Wide(Vec::new()) } else { Data::Narrow(Vec::new()) };
        while left > 0 {
            let n = left.min(PART / if wide { 2 } else { 1 });
            left -= n;
            match &mut data {
                Data::Narrow(d) => {
                    from.read_exact(&mut bytes[..n])?;
                    d.extend(bytes[..n].iter().map(|b| b.cast_signed()));
                }
                Data::Wide(d) => {
                    from.read_exact(&mut bytes[..2 * n])?;
                    d.extend(bytes[..2 * n].as_chunks().0.iter().copied().map(i16::from_le_bytes));
                }
            }
        }
        Ok(Plain { rows_out: out, cols_in: inp, data, largest })
    }
}
