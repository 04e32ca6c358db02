//! Picking, of a function's values at several scales ([`super::piecewise`]), the one at the finest scale that holds `x`.
//!
//! Flag `s` says that `x` is small enough for scale `s`, and is right where flag `s + reach` is, if there is one: so
//! `F_s = f_s f_(s + reach) f_(s + 2 reach) ...` is the truth, and what holds of a scale holds of wider ones. The value picked is
//! `v_n + sum_s F_s (v_s - v_(s + 1))` over all scales but the widest `n`: from the first `F_s` that is one on, all terms but
//! one cancel.
//!
//! `F_s` is a function of a few opened flags and their masks, so the dealer deals, for every possible opening of these, `F_s`
//! and its products with what the masks of both values contribute. As in [`super::rescale`], a value `v` above `-q = -2^(k_in - 2)`
//! and below `q` is `m' - q - l + 2^k_in u b` for `m' = v + q + l mod 2^k_in`, with the public `u = 1 - msb(m')` and the
//! mask's `b = msb(l)`; values out of that range cancel with themselves. Where a scale's unit is finer than the result's, what is
//! made of `m'` and of `l` is rounded, each once wherever it stands, so that the result is within a unit. Evaluators see the opened values and flags, each
//! under a mask of its own, and read the dealt tables at places that only these decide.

use super::{Deal, Dealt, Half, Masked, Take};
use crate::Error;
use crate::ring::mask;

/// Picks one value per row.
#[derive(Clone, Debug)]
pub struct Select {
    /// Rows.
    pub rows: usize,
    /// Per scale, log2 of its unit in units of the result; above `-k_in` and below `k_out`.
    pub shifts: Vec<i32>,
    /// How many scales wider the flag is that one relies on, at least one.
    pub reach: usize,
    /// Ring of the values at every scale; the picked one is below a quarter of it.
    pub k_in: u32,
    /// Ring of the result.
    pub k_out: u32,
}

/// What is dealt of a scale.
pub struct Table {
    /// Flags that decide on it.
    pub flags: u32,
    /// Bits that are zero of all that is added.
    pub zeros: u32,
    /// Of `F`, of its products with the top bits of this scale's mask and of the next one's, and of that with both masks; what has a ring of no bits is
    /// not dealt.
    pub rings: [u32; 4],
}

impl Select {
    fn scales(&self) -> usize {
        self.shifts.len()
    }

    /// What is dealt of scale `s`.
    pub fn table(&self, s: usize) -> Table {
        let flags = (self.scales() - 1 - s).div_ceil(self.reach) as u32;
        let next = self.shifts.get(s + 1);
        let zeros = next.map_or(self.shifts[s], |n| self.shifts[s].min(*n)).max(0) as u32;
        let wrap = |shift: &i32| self.k_out.saturating_sub(self.wrap(*shift));
        let whole = self.k_out - zeros;
        Table { flags, zeros, rings: [whole, wrap(&self.shifts[s]), next.map_or(0, wrap), whole] }
    }

    fn tables(&self) -> Vec<Table> {
        (0..self.scales()).map(|s| self.table(s)).collect()
    }

    /// What is dealt: of each scale what is not in a ring of no bits.
    pub fn dealt(&self) -> Vec<Dealt> {
        let of = |t: Table| t.rings.map(|k| (self.rows << t.flags, k));
        self.tables().into_iter().flat_map(of).filter(|(_, k)| *k > 0).collect()
    }

    /// The flags that decide on scale `s`, side by side.
    fn gathered(&self, s: usize, flags: u64) -> usize {
        let bits = (s..self.scales() - 1).step_by(self.reach).enumerate();
        bits.fold(0, |all, (i, s)| all | (flags >> s & 1) << i) as usize
    }

    /// log2 of what a wrapped value of a scale adds.
    pub fn wrap(&self, shift: i32) -> u32 {
        self.k_in.saturating_add_signed(shift)
    }

    /// Values at the unit of the result, those of scale `s` less those of the next.
    fn stepped(&self, s: usize, v: &[u64]) -> u64 {
        let at = |s: usize| v.get(s).map_or(0, |v| scaled(*v, self.shifts[s]));
        at(s).wrapping_sub(at(s + 1))
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lv: &[u64], lf: &[u64]) -> Result<(), Error> {
        let mut tensors = d.tensors(&self.dealt())?;
        let tables = self.tables();
        for (lv, lf) in lv.chunks_exact(self.scales()).zip(lf) {
            let mut to = tensors.iter_mut();
            let top = |s: usize| lv.get(s).map_or(0, |l| l >> (self.k_in - 1));
            for (s, Table { flags, zeros, rings }) in tables.iter().enumerate() {
                // All flags are set where what is opened is the complement of their masks.
                let case = self.gathered(s, !lf);
                let entries = [1, top(s), top(s + 1), self.stepped(s, lv) >> zeros];
                for (_, entry) in rings.iter().zip(entries).filter(|(k, _)| **k > 0) {
                    if let Some(t) = to.next() {
                        let room = t.room(d, 1 << flags);
                        room.fill(0);
                        room[case] = entry;
                    }
                }
            }
        }
        tensors.into_iter().for_each(|t| t.end(d));
        Ok(())
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, v: &[f64], flags: &[u64]) -> Vec<f64> {
        let value = |(v, f): (&[f64], &u64)| {
            let all = |s: usize| self.gathered(s, !f) == 0;
            let picked = (0..v.len()).find(|s| all(*s)).unwrap_or(v.len() - 1);
            v[picked] * libm::exp2(f64::from(self.shifts[picked]))
        };
        v.chunks_exact(self.scales()).zip(flags).map(value).collect()
    }

    /// Evaluator: one share per row.
    pub fn eval(&self, t: &mut Take, v: &Masked, flags: &Masked) -> Result<Vec<u64>, Error> {
        let halves = t.halves(&self.dealt())?;
        let tables = self.tables();
        let quarter = 1u64 << (self.k_in - 2);
        let mut out = vec![0; self.rows];
        t.divide(
            self.rows,
            [&mut out],
            |row| [row],
            |rows, [out]| {
                let words = self.dealt().into_iter().map(|(len, _)| len / self.rows.max(1));
                let mut halves: Vec<Half> =
                    halves.iter().zip(words).map(|(h, words)| h.from(rows.start * words)).collect();
                let (mut public, mut wrapped) = (vec![0; self.scales()], vec![0; self.scales()]);
                for (r, y) in rows.zip(out) {
                    let m = &v.m[r * self.scales()..][..self.scales()];
                    for ((m, public), wrapped) in m.iter().zip(&mut public).zip(&mut wrapped) {
                        let m = m.wrapping_add(quarter) & mask(self.k_in);
                        (*public, *wrapped) = (m.wrapping_sub(quarter), 1 - (m >> (self.k_in - 1)));
                    }
                    let mut halves = halves.iter_mut();
                    for (s, table) in tables.iter().enumerate() {
                        let case = self.gathered(s, flags.m[r]);
                        let mut entry = || halves.next().map_or(0, |h| h.pick(r, 1 << table.flags, case));
                        let dealt = table.rings.map(|k| if k > 0 { entry() } else { 0 });
                        let [one, top, next, masks] = dealt;
                        *y = y.wrapping_add(one.wrapping_mul(self.stepped(s, &public)));
                        *y = y.wrapping_sub(masks << table.zeros);
                        if table.rings[1] > 0 {
                            *y = y.wrapping_add((wrapped[s] * top) << self.wrap(self.shifts[s]));
                        }
                        if table.rings[2] > 0 {
                            *y = y.wrapping_sub((wrapped[s + 1] * next) << self.wrap(self.shifts[s + 1]));
                        }
                    }
                    *y &= mask(self.k_out);
                }
            },
        );
        Ok(out)
    }
}

/// `round(2^shift v)` of a word with a sign.
fn scaled(v: u64, shift: i32) -> u64 {
    let drop = shift.min(0).unsigned_abs();
    ((v as i64).wrapping_add(1 << drop >> 1) >> drop << shift.max(0)) as u64
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, add, masked};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_finest_scale_that_all_flags_it_relies_on_allow_is_picked(
            (rows, k_in, k_out) in (1usize..5, 3u32..=62, 1u32..=64),
            shifts in prop::collection::vec(0.0f64..1.0, 1..=12),
            (reach, picked) in (1usize..=4, 0.0f64..1.0),
            seed in any::<u64>(),
        ) {
            let mut w = World::seeded(seed);
            let scales = shifts.len();
            let picked = (picked * scales as f64) as usize;
            let shift = |s: &f64| (s * f64::from(k_out + k_in - 2)) as i32 - (k_in - 2) as i32;
            let shifts: Vec<i32> = shifts.iter().map(shift).collect();
            let mut v = w.edges(k_in, rows * scales);
            for (i, [v, ..]) in v.iter_mut().enumerate() {
                // What is not picked may be anything.
                if i % scales == picked {
                    let quarter = crate::ring::signed(*v, k_in) >> 1;
                    *v = quarter.max(1 - (1 << (k_in - 2))) as u64 & mask(k_in);
                }
            }
            let (v, lv, ev) = masked(&v, k_in, false);
            let mut flags = w.edges(64, rows);
            for [f, ..] in &mut flags {
                // Right from the picked one on and where the one relied upon is, anything before.
                let right = (0..scales.saturating_sub(1)).filter(|s| s + reach >= picked || s + reach + 1 >= scales);
                right.for_each(|s| *f = *f & !(1 << s) | u64::from(s >= picked) << s);
            }
            let (flags, lf, ef) = masked(&flags, 64, true);
            let g = Select { rows, shifts, reach, k_in, k_out };
            let s = w.run(&g.dealt(), |d| g.deal(d, &lv, &lf), |t, i| g.eval(t, &ev[i], &ef[i]));
            let values: Vec<f64> = v.iter().map(|v| crate::ring::signed(*v, k_in) as f64).collect();
            let plain = g.plain(&values, &flags);
            for (row, got) in add(&s, k_out).into_iter().enumerate() {
                let v = crate::ring::signed(v[row * scales + picked], k_in);
                let want = scaled(v as u64, g.shifts[picked]);
                let off = crate::ring::signed((got as u64).wrapping_sub(want) & mask(k_out), k_out);
                prop_assert!(off.abs() <= i64::from(g.shifts[picked] < 0), "off by {}", off);
                prop_assert_eq!(plain[row], v as f64 * libm::exp2(f64::from(g.shifts[picked])));
            }
        }
    }
}
