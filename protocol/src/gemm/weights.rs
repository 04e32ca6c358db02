//! Public weights, packed for the kernels: a byte each where all of a layer fit, two otherwise.

use std::io::{self, Read, Write};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::NR;

/// Public weights of a linear layer, packed for the kernels.
#[derive(Clone)]
pub struct Weights {
    rows_out: usize,
    cols_in: usize,
    data: Data,
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

impl Weights {
    /// Packs `w`, row-major, `out` rows of `inp`.
    pub fn new(out: usize, inp: usize, w: &[i16]) -> Weights {
        assert_eq!(w.len(), out * inp, "weights have {out} x {inp} elements");
        let mut packing = Packing::new(out, inp);
        (0..out).for_each(|o| packing.push(&w[o * inp..][..inp]));
        packing.finish()
    }

    /// Outputs.
    pub fn rows_out(&self) -> usize {
        self.rows_out
    }

    /// Inputs.
    pub fn cols_in(&self) -> usize {
        self.cols_in
    }

    /// Bytes that a weight takes: 1 where all of them fit.
    pub fn width(&self) -> usize {
        match self.data {
            Data::Narrow(_) => 1,
            Data::Wide(_) => 2,
        }
    }

    /// The weight of input `i` in output `o`.
    pub fn at(&self, o: usize, i: usize) -> i16 {
        let at = (o / NR * self.cols_in.div_ceil(2) * NR + i / 2 * NR + o % NR) * 2 + i % 2;
        match &self.data {
            Data::Narrow(d) => d[at].into(),
            Data::Wide(d) => d[at],
        }
    }

    /// What the packed bytes are.
    pub(crate) fn packed(&self) -> Packed {
        Packed { rows_out: self.rows_out, cols_in: self.cols_in, width: self.width(), largest: self.largest }
    }

    /// Writes the packed bytes.
    pub(crate) fn write(&self, to: &mut dyn Write) -> io::Result<()> {
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
}

/// Bytes that are written or read at a time.
const PART: usize = 1 << 18;

/// What packed bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Packed {
    rows_out: usize,
    cols_in: usize,
    width: usize,
    largest: u32,
}

impl Packed {
    /// Reads what [`Weights::write`] wrote.
    pub(crate) fn read(self, from: &mut dyn Read) -> io::Result<Weights> {
        let Packed { rows_out, cols_in, width, largest } = self;
        let panel = cols_in.next_multiple_of(2).checked_mul(NR);
        let all = panel.and_then(|panel| panel.checked_mul(rows_out.div_ceil(NR)));
        let mut left = all.ok_or_else(|| io::Error::other("more weights than can be"))?;
        let mut bytes = vec![0; PART];
        let mut data = match width {
            1 => Data::Narrow(Vec::with_capacity(left)),
            _ => Data::Wide(Vec::with_capacity(left)),
        };
        while left > 0 {
            let n = left.min(PART / width.clamp(1, 2));
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
        Ok(Weights { rows_out, cols_in, data, largest })
    }
}

/// Weights that are packed a row at a time, so that no other copy of a layer is held.
pub(crate) struct Packing {
    rows_out: usize,
    cols_in: usize,
    rows: usize,
    data: Data,
    /// The panel that rows are put into.
    panel: Vec<i16>,
    largest: u32,
}

impl Packing {
    /// No row yet of `out` rows of `inp`.
    pub(crate) fn new(out: usize, inp: usize) -> Packing {
        let panel = vec![0; inp.next_multiple_of(2) * NR];
        let data = Data::Narrow(Vec::with_capacity(out.div_ceil(NR) * panel.len()));
        Packing { rows_out: out, cols_in: inp, rows: 0, data, panel, largest: 0 }
    }

    /// The next row.
    pub(crate) fn push(&mut self, row: &[i16]) {
        assert!(row.len() == self.cols_in && self.rows < self.rows_out, "a row of {}", row.len());
        let column = self.rows % NR;
        for (pair, w) in self.panel.chunks_exact_mut(2 * NR).zip(row.chunks(2)) {
            pair[2 * column..][..w.len()].copy_from_slice(w);
        }
        self.largest = row.iter().fold(self.largest, |m, w| m.max(w.unsigned_abs().into()));
        self.rows += 1;
        if self.rows.is_multiple_of(NR) || self.rows == self.rows_out {
            self.append();
        }
    }

    fn append(&mut self) {
        let fits = |w: &i16| i8::try_from(*w).is_ok();
        if let Data::Narrow(narrow) = &mut self.data {
            if self.panel.iter().all(fits) {
                narrow.extend(self.panel.iter().map(|w| *w as i8));
                return self.panel.fill(0);
            }
            let mut wide = Vec::with_capacity(self.rows_out.div_ceil(NR) * self.panel.len());
            wide.extend(narrow.iter().map(|w| i16::from(*w)));
            self.data = Data::Wide(wide);
        }
        if let Data::Wide(wide) = &mut self.data {
            wide.extend_from_slice(&self.panel);
        }
        self.panel.fill(0);
    }

    /// All rows were pushed.
    pub(crate) fn finish(self) -> Weights {
        assert_eq!(self.rows, self.rows_out, "rows of weights");
        Weights { rows_out: self.rows_out, cols_in: self.cols_in, data: self.data, largest: self.largest }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_each_until_one_does_not_fit() {
        for (out, inp) in [(1, 1), (33, 7), (70, 12)] {
            let small: Vec<i16> = (0..out * inp).map(|i| (i * 37 % 256) as i16 - 128).collect();
            let w = Weights::new(out, inp, &small);
            assert_eq!(w.width(), 1);
            for at in 0..out * inp {
                assert_eq!(w.at(at / inp, at % inp), small[at]);
                let mut large = small.clone();
                large[at] = 128;
                let w = Weights::new(out, inp, &large);
                assert!(w.width() == 2 && (0..out * inp).all(|i| w.at(i / inp, i % inp) == large[i]));
            }
        }
        assert_eq!(Weights::new(2, 0, &[]).rows_out(), 2);
    }
}
