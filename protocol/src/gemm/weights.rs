//! Public weights, packed for the kernels: less than two bits each where every row has one magnitude, a byte where all of a
//! layer fit, five bits where blocks have sixteen levels, two bytes otherwise. Which it is shows in the time that products take, never in their words.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use super::panels::{Panels, Width};
use super::ternary::{PANEL, Ternary};

/// Public weights of a linear layer, packed for the kernels.
#[derive(Clone)]
pub struct Weights {
    rows_out: usize,
    cols_in: usize,
    pub(super) data: Data,
}

/// The kinds of packed weights.
#[derive(Clone)]
pub(super) enum Data {
    Ternary(Ternary),
    Panels(Panels),
}

/// The kinds by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    Ternary,
    Panels(Width),
}

impl Kind {
    /// In order of preference: weights of four bits that fit bytes are sooner multiplied as such.
    const ALL: [Kind; 4] =
        [Kind::Ternary, Kind::Panels(Width::Narrow), Kind::Panels(Width::Four), Kind::Panels(Width::Wide)];
}

impl Weights {
    /// Packs `w`, row-major, `out` rows of `inp`.
    pub fn new(out: usize, inp: usize, w: &[i16]) -> Weights {
        assert_eq!(w.len(), out * inp, "weights have {out} x {inp} elements");
        let mut packing = Packing::new(out, inp);
        (0..out).for_each(|o| packing.push(&w[o * inp..][..inp]));
        packing.finish()
    }

    /// As [`Weights::new`], of every kind that holds `w`.
    #[cfg(test)]
    pub(super) fn of_every_kind(out: usize, inp: usize, w: &[i16]) -> impl Iterator<Item = Weights> {
        Kind::ALL.into_iter().filter_map(move |kind| {
            let mut packing = Packing { data: Data::new(kind, out, inp), ..Packing::new(out, inp) };
            (0..out).for_each(|o| packing.push(&w[o * inp..][..inp]));
            Some(packing.finish()).filter(|w| w.data.kind() == kind)
        })
    }

    /// Outputs.
    pub fn rows_out(&self) -> usize {
        self.rows_out
    }

    /// Inputs.
    pub fn cols_in(&self) -> usize {
        self.cols_in
    }

    /// Bits that a weight takes, rounded up: 2, 5, 8 or 16.
    pub fn bits(&self) -> u32 {
        match self.data.kind() {
            Kind::Ternary => 2,
            Kind::Panels(Width::Four) => 5,
            Kind::Panels(Width::Narrow) => 8,
            Kind::Panels(Width::Wide) => 16,
        }
    }

    /// The weight of input `i` in output `o`.
    pub fn at(&self, o: usize, i: usize) -> i16 {
        self.data.at(o, i)
    }

    /// What the packed bytes are.
    pub(crate) fn packed(&self) -> Packed {
        let largest = if let Data::Panels(panels) = &self.data { panels.largest } else { 0 };
        Packed { rows_out: self.rows_out, cols_in: self.cols_in, kind: self.data.kind(), largest }
    }

    /// Writes the packed bytes.
    pub(crate) fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        match &self.data {
            Data::Ternary(ternary) => ternary.write(to),
            Data::Panels(panels) => panels.write(to),
        }
    }
}

impl Data {
    fn new(kind: Kind, out: usize, inp: usize) -> Data {
        match kind {
            Kind::Ternary => Data::Ternary(Ternary::new(out, inp)),
            Kind::Panels(width) => Data::Panels(Panels::new(out, inp, width)),
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Data::Ternary(_) => Kind::Ternary,
            Data::Panels(panels) => Kind::Panels(panels.width()),
        }
    }

    /// [`PANEL`] rows, or the last ones, `count` of them, row-major; `false` and nothing where this kind does not hold one.
    fn extend(&mut self, rows: &[i16], count: usize) -> bool {
        match self {
            Data::Ternary(ternary) => ternary.extend(rows, count),
            Data::Panels(panels) => panels.extend(rows, count),
        }
    }

    fn at(&self, o: usize, i: usize) -> i16 {
        match self {
            Data::Ternary(ternary) => ternary.at(o, i),
            Data::Panels(panels) => panels.at(o, i),
        }
    }
}

/// What packed bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Packed {
    rows_out: usize,
    cols_in: usize,
    kind: Kind,
    largest: u32,
}

impl Packed {
    /// Reads what [`Weights::write`] wrote.
    pub(crate) fn read(self, from: &mut dyn Read) -> io::Result<Weights> {
        let Packed { rows_out, cols_in, kind, largest } = self;
        let data = match kind {
            Kind::Ternary => Data::Ternary(Ternary::read(rows_out, cols_in, from)?),
            Kind::Panels(width) => Data::Panels(Panels::read(rows_out, cols_in, width, largest, from)?),
        };
        Ok(Weights { rows_out, cols_in, data })
    }
}

/// Weights that are packed a row at a time, so that no other copy of a layer is held. They are of the first kind that holds
/// all rows so far, and change to another with the first row that it does not hold.
pub(crate) struct Packing {
    rows_out: usize,
    cols_in: usize,
    rows: usize,
    data: Data,
    /// The last rows, not yet packed.
    panel: Vec<i16>,
}

impl Packing {
    /// No row yet of `out` rows of `inp`.
    pub(crate) fn new(out: usize, inp: usize) -> Packing {
        let data = Data::new(Kind::Ternary, out, inp);
        Packing { rows_out: out, cols_in: inp, rows: 0, data, panel: Vec::with_capacity(PANEL * inp) }
    }

    /// The next row.
    pub(crate) fn push(&mut self, row: &[i16]) {
        assert!(row.len() == self.cols_in && self.rows < self.rows_out, "a row of {}", row.len());
        self.panel.extend_from_slice(row);
        self.rows += 1;
        if self.rows.is_multiple_of(PANEL) || self.rows == self.rows_out {
            let first = (self.rows - 1) / PANEL * PANEL;
            while !self.data.extend(&self.panel, self.rows - first) {
                self.data = self.wider(first);
            }
            self.panel.clear();
        }
    }

    /// The first `rows` rows as the next kind that holds them.
    fn wider(&self, rows: usize) -> Data {
        let kinds = Kind::ALL.into_iter().skip_while(|kind| *kind != self.data.kind()).skip(1);
        let holding = kinds.map(|kind| {
            let mut data = Data::new(kind, self.rows_out, self.cols_in);
            let all = (0..rows).step_by(PANEL).all(|first| {
                let panel = (first..first + PANEL).flat_map(|o| (0..self.cols_in).map(move |i| self.data.at(o, i)));
                data.extend(&panel.collect::<Vec<_>>(), PANEL)
            });
            all.then_some(data)
        });
        // The widest holds all.
        holding.flatten().next().unwrap_or_else(|| Data::new(Kind::Panels(Width::Wide), self.rows_out, self.cols_in))
    }

    /// All rows were pushed.
    pub(crate) fn finish(self) -> Weights {
        assert_eq!(self.rows, self.rows_out, "rows of weights");
        Weights { rows_out: self.rows_out, cols_in: self.cols_in, data: self.data }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::noise;
    use super::*;

    fn check(w: &Weights, want: &[i16], bits: u32) {
        let inp = w.cols_in().max(1);
        assert_eq!(w.bits(), bits, "{} x {inp}", w.rows_out());
        assert!((0..want.len()).all(|at| w.at(at / inp, at % inp) == want[at]));
        let mut bytes = Vec::new();
        w.write(&mut bytes).unwrap();
        let again = w.packed().read(&mut &bytes[..]).unwrap();
        assert!((0..want.len()).all(|at| again.at(at / inp, at % inp) == want[at]) && again.packed() == w.packed());
        if let Some(last) = bytes.len().checked_sub(1) {
            assert!(w.packed().read(&mut &bytes[..last]).is_err());
        }
    }

    #[test]
    fn the_first_kind_that_holds_every_row() {
        let mut next = noise(11);
        for (out, inp) in [(1, 2), (33, 7), (70, 12), (130, 40)] {
            let ternary: Vec<i16> = (0..out * inp).map(|at| (next() % 3) as i16 * 9 * (at / inp % 5) as i16).collect();
            let ternary: Vec<i16> = ternary.iter().enumerate().map(|(at, w)| w - 9 * (at / inp % 5) as i16).collect();
            check(&Weights::new(out, inp, &ternary), &ternary, 2);
            for last in [0, out * inp / 2, out * inp - 1] {
                let row = last / inp * inp;
                let mut w = ternary.clone();
                w[row..row + inp].fill(1);
                w[last] = 2;
                check(&Weights::new(out, inp, &w), &w, 8);
                w[last] = 128;
                check(&Weights::new(out, inp, &w), &w, 16);
                w[row..row + inp].fill(i16::MIN);
                check(&Weights::new(out, inp, &w), &w, 16);
            }
            let small: Vec<i16> = (0..out * inp).map(|i| (i * 37 % 256) as i16 - 128).collect();
            check(&Weights::new(out, inp, &small), &small, 8);
        }
        for (out, inp) in [(1, 32), (65, 96)] {
            let apart = |at: usize| (at / 32 * 11 % 900) as i16 + 60;
            let mut w: Vec<i16> = (0..out * inp).map(|at| (next() % 16) as i16 * apart(at) + 40).collect();
            (w[0], w[1], w[2]) = (40, 100, 160);
            check(&Weights::new(out, inp, &w), &w, 5);
            *w.last_mut().unwrap() = -12_000;
            check(&Weights::new(out, inp, &w), &w, 16);
        }
        check(&Weights::new(2, 0, &[]), &[], 2);
        check(&Weights::new(0, 2, &[]), &[], 2);
    }

    #[test]
    fn bytes_of_more_weights_than_are_there_are_refused() {
        let mut bytes = Vec::new();
        let w = Weights::new(40, 5, &[3; 200]);
        w.write(&mut bytes).unwrap();
        for kind in Kind::ALL {
            for (rows_out, cols_in) in
                [(usize::MAX, 64), (40, usize::MAX), (usize::MAX, usize::MAX), (1 << 40, 1 << 20)]
            {
                let packed = Packed { rows_out, cols_in, kind, largest: 3 };
                assert!(packed.read(&mut &bytes[..]).is_err(), "{packed:?}");
            }
        }
    }
}
