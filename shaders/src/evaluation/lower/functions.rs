//! Functions of one value: polynomials in windows and the choice among them, tails and joins.

use tacet_protocol::gates::join::Join;
use tacet_protocol::gates::piecewise::{Piecewise, Scales};
use tacet_protocol::gates::select::Select;
use tacet_protocol::gates::tails::{REACH, Tails};

use super::{At, Lowered};
use crate::evaluation::gate::Gate;

pub(super) fn join(to: &mut Lowered, at: &At, g: &Join) {
    let mult = to.table(g.mult.iter().map(|m| *m as u64));
    let quarters = g.quarters().map(|q| to.table(q));
    let wraps = g.wraps().map(|w| to.table(w));
    let mut params = vec![
        at.masked(0),
        at.mask(0),
        at.masked(1),
        at.mask(1),
        at.masked(2),
        at.masked(3),
        at.out(0),
        at.lead(),
        g.k_in,
        g.k_series,
        g.k_out,
        g.drop,
        g.mult.len() as u32,
        mult,
        g.shift,
    ];
    params.extend([quarters, wraps].concat());
    params.push(to.table([g.series_wrap()]));
    params.extend((0..at.dealt.len()).flat_map(|slot| at.half(slot)));
    to.gate(Gate::Join, g.len, &params);
}

pub(super) fn tails(to: &mut Lowered, at: &At, g: &Tails) {
    let between = to.table32(g.inner.iter().map(|inner| REACH + inner));
    let (len, cols, [half, form]) = (g.len as u32, g.inner.len() as u32, at.half(0));
    let params = [len, at.masked(0), at.out(0), at.out(1), at.lead(), g.k - 7, cols, between, half, form];
    to.gate(Gate::Tails, g.out_len(), &params);
}

pub(super) fn piecewise(to: &mut Lowered, at: &At, g: &Piecewise) {
    let Scales { drop, count, windows, degree, .. } = g.scales;
    let flag = |s: usize| {
        let [half, form] = at.half(1 + s);
        [half, form, g.scales.flag_bits(s)]
    };
    let flags = to.table32((0..count - 1).flat_map(flag));
    let [coef, form] = at.half(0);
    let (y, made, stride) = (at.out(0), at.out(1), Scales::stride(windows));
    let [count, windows, terms] = [count, windows, degree + 1].map(|n| n as u32);
    let params = [at.masked(0), y, made, count, drop, stride, windows, terms, g.rho_bits, g.k_out, coef, form, flags];
    to.gate(Gate::Piecewise, g.rows, &params);
}

pub(super) fn select(to: &mut Lowered, at: &At, g: &Select) {
    let mut halves = (0..at.dealt.len()).map(|slot| at.half(slot));
    let mut each = Vec::new();
    for (s, shift) in g.shifts.iter().enumerate() {
        let table = g.table(s);
        let [drop, add] = [-shift, *shift].map(|by| by.max(0) as u32);
        each.extend([drop, add, g.wrap(*shift), table.flags, table.zeros]);
        let dealt = |k: u32| if k > 0 { halves.next() } else { None };
        each.extend(table.rings.map(dealt).into_iter().flat_map(Option::unwrap_or_default));
    }
    let each = to.table32(each);
    let (scales, reach) = (g.shifts.len() as u32, g.reach as u32);
    let params = [at.masked(0), at.masked(1), at.out(0), scales, reach, g.k_in, g.k_out, each];
    to.gate(Gate::Select, g.rows, &params);
}
