//! Gates that copy, add up or scale whole rows.

use tacet_protocol::gates::broadcast::{Broadcast, Variance};
use tacet_protocol::gates::grid::Grid;
use tacet_protocol::gates::local::Gain;
use tacet_protocol::gates::pad::PadKeys;
use tacet_protocol::gates::squares::Squares;

use super::{At, Lowered, causal};
use crate::evaluation::gate::{Gate, THREADS};

/// Workgroups of a kernel that makes rows where it needs their sums, and any words where not.
fn workgroups(rows: usize, cols: usize, summed: bool) -> usize {
    if summed { rows } else { (rows * cols).div_ceil(THREADS) }
}

/// How a kernel finds a row of scores: words and rows of a head, and keys.
fn scores(grid: &Grid) -> [u32; 4] {
    [grid.len() as u32, grid.rows as u32, grid.keys as u32, causal(grid)]
}

/// Some words of a value.
pub(super) fn slice(to: &mut Lowered, at: &At, first: usize, n: usize) {
    to.gate(Gate::Copy, n, &[0, 0, at.share(0) + first as u32, at.out(0)]);
}

pub(super) fn marks(to: &mut Lowered, at: &At, rows: usize) {
    let past = at.len_in(0);
    slice(to, at, 0, past);
    let y = at.out(0) + past as u32;
    match at.inputs.len() {
        1 => to.gate(Gate::Copy, rows, &[1, at.lead(), 0, y]),
        _ => to.gate(Gate::Copy, at.len_in(1), &[0, 0, at.share(1), y]),
    }
}

pub(super) fn gain(to: &mut Lowered, at: &At, g: &Gain) {
    let [gain, mean, bias] = [&g.gain, &g.mean, &g.bias].map(|columns| to.table(columns.iter().map(|c| *c as u64)));
    let (len, cols, summed) = (at.len_in(0), g.gain.len(), !g.mean.is_empty());
    let [x, y] = [at.share(0), at.out(0)];
    let params = [len as u32, x, y, cols as u32, g.k, at.lead(), u32::from(summed), gain, mean, bias];
    to.gate(Gate::Gain, workgroups(len / cols, cols, summed), &params);
}

pub(super) fn row_sum(to: &mut Lowered, at: &At, grid: &Grid) {
    let [head, rows, keys, causal] = scores(grid);
    let k = at.p.values[at.op.outputs[0]].bits;
    let n = at.len_in(0) / grid.len() * grid.rows;
    to.gate(Gate::RowSum, n, &[at.share(0), at.out(0), head, rows, keys, causal, k]);
}

pub(super) fn pad_keys(to: &mut Lowered, at: &At, g: &PadKeys) {
    let [head, rows, keys, causal] = scores(&g.grid);
    let heads = at.len_in(0) / g.grid.len();
    let up = to.table((0..heads).map(|h| g.shift(h)));
    let params = [at.share(0), at.share(1), at.out(0), head, rows, keys, causal, g.k, at.lead(), up];
    to.gate(Gate::PadKeys, heads * g.grid.rows, &params);
}

pub(super) fn broadcast(to: &mut Lowered, at: &At, g: &Broadcast) {
    let [rows, cols, dim] = [g.rows, g.cols, g.dim].map(|n| n as u32);
    let mut params =
        vec![at.masked(0), at.mask(0), at.masked(1), at.mask(1), at.out(0), rows, cols, dim, g.k_x, g.k, at.lead()];
    params.extend((0..at.dealt.len()).flat_map(|slot| at.half(slot)));
    to.gate(Gate::Broadcast, g.rows * g.cols, &params);
}

pub(super) fn variance(to: &mut Lowered, at: &At, g: &Variance) {
    let [square, form] = at.half(0);
    let [m, l, y] = [at.masked(0), at.mask(0), at.out(0)];
    let params = [m, l, y, g.cols as u32, u32::from(g.centre), g.k, at.lead(), square, form];
    to.gate(Gate::Variance, g.rows, &params);
}

pub(super) fn squares(to: &mut Lowered, at: &At, g: &Squares) {
    let shifts = to.table32(g.shift.iter().copied());
    let groups = g.shift.len() / g.dim;
    let own = [at.masked(0), at.out(0), groups as u32, g.dim as u32, g.k_in, g.k_out, at.lead(), shifts];
    let dealt = [0, 1, 2, 3].map(|slot| at.half(slot)).concat();
    to.gate(Gate::Squares, g.out_len(), &[&own, dealt.as_slice()].concat());
}
