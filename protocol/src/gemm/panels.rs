//! Weights that limbs are multiplied by: of four bits, a byte or two each.

use std::io::{self, Read, Write};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::NR;
use super::nibbles::{self, BLOCK, BYTES, Block};

/// Bytes that are written or read at a time.
const PART: usize = 1 << 18;

/// Weights in panels of [`NR`] outputs.
#[derive(Clone)]
pub(super) struct Panels {
    pub(super) rows_out: usize,
    pub(super) cols_in: usize,
    data: Data,
    /// Largest magnitude.
    pub(super) largest: u32,
}

/// How much room a weight takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Width {
    /// Four bits, and a scale and an offset of each block.
    Four,
    /// A byte.
    Narrow,
    /// Two bytes.
    Wide,
}

/// Panels of [`NR`] outputs; within one, pairs of inputs; within one, an output's two weights side by side.
#[derive(Clone)]
enum Data {
    /// Of whole blocks of inputs.
    Four(Vec<Block>),
    Narrow(Vec<i8>),
    Wide(Vec<i16>),
}

/// Packed weights of [`NR`] outputs, or of some pairs of their inputs.
#[derive(Clone, Copy)]
pub(super) enum Panel<'a> {
    Four(&'a [Block]),
    Narrow(&'a [i8]),
    Wide(&'a [i16]),
}

impl<'a> Panel<'a> {
    /// Those of inputs, multiples of [`Panels::step`].
    pub(super) fn inputs(self, inputs: Range<usize>) -> Panel<'a> {
        match self {
            Panel::Four(d) => Panel::Four(&d[inputs.start / BLOCK..inputs.end / BLOCK]),
            Panel::Narrow(d) => Panel::Narrow(&d[inputs.start * NR..inputs.end * NR]),
            Panel::Wide(d) => Panel::Wide(&d[inputs.start * NR..inputs.end * NR]),
        }
    }
}

impl Panels {
    /// No output yet of `out` with `inp` inputs.
    pub(super) fn new(out: usize, inp: usize, width: Width) -> Panels {
        let all = out.div_ceil(NR) * NR * inp.next_multiple_of(2);
        let data = match width {
            Width::Four => Data::Four(Vec::with_capacity(all / (NR * BLOCK))),
            Width::Narrow => Data::Narrow(Vec::with_capacity(all)),
            Width::Wide => Data::Wide(Vec::with_capacity(all)),
        };
        Panels { rows_out: 0, cols_in: inp, data, largest: 0 }
    }

    /// Packs `w`, row-major, `out` rows of `inp`, a byte or two each.
    pub(super) fn of(out: usize, inp: usize, w: &[i16]) -> Panels {
        let mut panels = Panels::new(out, inp, Width::Narrow);
        if !panels.extend(w, out) {
            panels = Panels::new(out, inp, Width::Wide);
            panels.extend(w, out);
        }
        panels
    }

    /// Whole panels of rows, or the last ones, `count` of them, row-major; `false` and nothing where this width does not hold
    /// one.
    pub(super) fn extend(&mut self, rows: &[i16], count: usize) -> bool {
        let row = |o: usize| &rows[o * self.cols_in..][..self.cols_in];
        let holds = match self.data {
            Data::Four(_) => (0..count).all(|o| nibbles::holds(row(o))),
            Data::Narrow(_) => rows.iter().all(|w| i8::try_from(*w).is_ok()),
            Data::Wide(_) => true,
        };
        if !holds {
            return false;
        }
        let mut panel = vec![0; self.cols_in.next_multiple_of(2) * NR];
        for first in (0..count).step_by(NR) {
            let outputs = first..(first + NR).min(count);
            if let Data::Four(blocks) = &mut self.data {
                let block = |at: usize| Block::new(outputs.clone().map(|o| &row(o)[at..at + BLOCK]));
                blocks.extend((0..self.cols_in).step_by(BLOCK).map(block));
                continue;
            }
            panel.fill(0);
            for (column, o) in outputs.enumerate() {
                for (pair, w) in panel.chunks_exact_mut(2 * NR).zip(row(o).chunks(2)) {
                    pair[2 * column..][..w.len()].copy_from_slice(w);
                }
            }
            match &mut self.data {
                Data::Four(_) => (),
                Data::Narrow(narrow) => narrow.extend(panel.iter().map(|w| *w as i8)),
                Data::Wide(wide) => wide.extend_from_slice(&panel),
            }
        }
        self.largest = rows.iter().fold(self.largest, |m, w| m.max(w.unsigned_abs().into()));
        self.rows_out += count;
        true
    }

    /// How much room a weight takes.
    pub(super) fn width(&self) -> Width {
        match self.data {
            Data::Four(_) => Width::Four,
            Data::Narrow(_) => Width::Narrow,
            Data::Wide(_) => Width::Wide,
        }
    }

    /// Of what every cut of the inputs has to be a multiple.
    pub(super) fn step(&self) -> usize {
        if let Data::Four(_) = self.data { BLOCK } else { 2 }
    }

    /// The weight of input `i` in output `o`.
    pub(super) fn at(&self, o: usize, i: usize) -> i16 {
        let at = (o / NR * self.cols_in.div_ceil(2) * NR + i / 2 * NR + o % NR) * 2 + i % 2;
        match &self.data {
            Data::Four(d) => d[o / NR * (self.cols_in / BLOCK) + i / BLOCK].at(o % NR, i % BLOCK),
            Data::Narrow(d) => d[at].into(),
            Data::Wide(d) => d[at],
        }
    }

    /// Panels.
    pub(super) fn panels(&self) -> usize {
        self.rows_out.div_ceil(NR)
    }

    /// Inputs `inputs`, multiples of [`Panels::step`], of panel `p`.
    pub(super) fn panel(&self, p: usize, inputs: Range<usize>) -> Panel<'_> {
        let first = p * self.cols_in.next_multiple_of(2);
        let all = match &self.data {
            Data::Four(d) => Panel::Four(d),
            Data::Narrow(d) => Panel::Narrow(d),
            Data::Wide(d) => Panel::Wide(d),
        };
        all.inputs(first + inputs.start..first + inputs.end)
    }

    /// Writes the packed bytes.
    pub(super) fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(PART);
        match &self.data {
            Data::Four(d) => d.chunks(PART / BYTES).try_for_each(|part| {
                bytes.clear();
                part.iter().for_each(|block| bytes.extend(block.bytes()));
                to.write_all(&bytes)
            }),
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

    /// What [`Panels::write`] wrote of such weights.
    pub(super) fn read(out: usize, inp: usize, width: Width, largest: u32, from: &mut dyn Read) -> io::Result<Panels> {
        let panel = inp.checked_next_multiple_of(2).and_then(|inp| inp.checked_mul(NR));
        let all = panel.and_then(|panel| panel.checked_mul(out.div_ceil(NR)));
        let mut left = all.ok_or_else(|| io::Error::other("more weights than can be"))?;
        let mut bytes = vec![0; PART];
        // Not more at once than what is there vouches for.
        let mut data = match width {
            Width::Four if !inp.is_multiple_of(BLOCK) => return Err(io::Error::other("a part of a block of weights")),
            Width::Four => Data::Four(Vec::new()),
            Width::Narrow => Data::Narrow(Vec::new()),
            Width::Wide => Data::Wide(Vec::new()),
        };
        while left > 0 {
            let n = left.min(match width {
                Width::Four => PART / BYTES * NR * BLOCK,
                Width::Narrow => PART,
                Width::Wide => PART / 2,
            });
            left -= n;
            match &mut data {
                Data::Four(d) => {
                    let bytes = &mut bytes[..n / (NR * BLOCK) * BYTES];
                    from.read_exact(bytes)?;
                    d.extend(bytes.as_chunks().0.iter().map(Block::from_bytes));
                }
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
        // Limbs are cut for weights of this size.
        if let Data::Four(d) = &data
            && d.iter().any(|block| block.largest() > largest)
        {
            return Err(io::Error::other("a larger weight than the largest"));
        }
        Ok(Panels { rows_out: out, cols_in: inp, data, largest })
    }
}
