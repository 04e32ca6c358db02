//! Inputs of a layer as the kernels of its weights take them.

use std::ops::Range;

use rayon::prelude::*;

use super::limbs::Limbs;
use super::panels::Panels;
use super::ternary::{self, Ternary};
use super::weights::{Data, Weights};
use super::{Level, MR, NR, outputs};
use crate::wipe::Wiped;

/// Rows of inputs and the weights that they are multiplied by, in one ring.
pub(super) struct Input<'a> {
    level: Level,
    bits: u32,
    by: By<'a>,
}

enum By<'a> {
    /// Words as they are.
    Ternary(&'a Ternary, &'a [u64]),
    /// Words split into limbs.
    Panels(&'a Panels, Limbs, Wiped<i16>),
}

impl<'a> Input<'a> {
    /// Rows of words `x`, which may have bits above the ring, on the threads that this is called by if `parallel`.
    pub(super) fn new(level: Level, x: &'a [u64], w: &'a Weights, bits: u32, parallel: bool) -> Input<'a> {
        let by = match &w.data {
            Data::Ternary(ternary) => By::Ternary(ternary, x),
            Data::Panels(w) => {
                let (limbs, cols) = (Limbs::new(bits, w.largest, w.step()), w.cols_in);
                let row_len = limbs.count() * cols.next_multiple_of(2);
                let mut a = Wiped::new(vec![0; x.len() / cols * row_len]);
                if parallel {
                    let rows = a.par_chunks_mut(MR * row_len).zip(x.par_chunks(MR * cols));
                    rows.for_each(|(a, x)| level.split(x, cols, &limbs, a));
                } else {
                    level.split(x, cols, &limbs, &mut a);
                }
                By::Panels(w, limbs, a)
            }
        };
        Input { level, bits, by }
    }

    /// Rows that are best gone through together.
    pub(super) fn tile(&self) -> usize {
        match &self.by {
            By::Ternary(..) => ternary::TILE,
            By::Panels(_, limbs, _) => MR / limbs.count(),
        }
    }

    /// Outputs of some panels of some rows, row-major.
    pub(super) fn outputs(&self, rows: Range<usize>, panels: Range<usize>, out: &mut [u64]) {
        match &self.by {
            By::Ternary(ternary, x) => {
                let x = &x[rows.start * ternary.cols_in()..rows.end * ternary.cols_in()];
                self.level.ternary(x, ternary, panels, self.bits, out);
            }
            By::Panels(w, limbs, a) => {
                let row_len = limbs.count() * w.cols_in.next_multiple_of(2);
                let a = &a[rows.start * row_len..rows.end * row_len];
                outputs(self.level, limbs, a, w, panels, self.bits, out);
            }
        }
    }
}

impl Weights {
    /// Panels.
    pub(super) fn panels(&self) -> usize {
        self.rows_out().div_ceil(self.panel())
    }

    /// Outputs of a panel.
    pub(super) fn panel(&self) -> usize {
        match self.data {
            Data::Ternary(_) => ternary::PANEL,
            Data::Panels(_) => NR,
        }
    }
}
