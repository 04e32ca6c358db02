//! Gates on XOR-shared bits, packed 64 to a word: AND of several bits, and the sum of a row of bits as a ring share.

use std::ops::Range;

use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// A bit vector rotated left by `by`, from word `first` on.
pub(super) fn rotated(x: &[u64], by: usize, first: usize, out: &mut [u64]) {
    let n = x.len();
    let (w, b) = (by / 64, by % 64);
    // The words that the first is made of.
    let mut high = (n - w % n + first) % n;
    let mut low = if high == 0 { n - 1 } else { high - 1 };
    for o in out {
        *o = x[high] << b | (x[low] >> 1) >> (63 - b);
        (low, high) = (high, if high + 1 == n { 0 } else { high + 1 });
    }
}

/// A rotation left by `by` of words of 64 bits or of a single one of fewer, of which there are more than `by`.
pub(super) fn rotate_bits(x: &[u64], by: usize, bits: u32, out: &mut [u64]) {
    match bits {
        64 => rotated(x, by, 0, out),
        _ => out[0] = (x[0] << by | x[0] >> (bits as usize - by)) & mask(bits),
    }
}

/// Bits of one head: `rows` groups of some members of `words` words each.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Groups.
    pub rows: usize,
    /// Words of one member.
    pub words: usize,
}

/// Of some rows those of each segment, counted from its first.
fn of_each(segments: &[Segment], rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut before = 0;
    segments.iter().map(move |s| {
        before += s.rows;
        let own = |row: usize| s.rows - before.saturating_sub(row).min(s.rows);
        own(rows.start)..own(rows.end)
    })
}

/// Words of one member in the rows before `row`.
fn words_before(segments: &[Segment], row: usize) -> usize {
    segments.iter().zip(of_each(segments, 0..row)).map(|(s, rows)| rows.len() * s.words).sum()
}

/// AND over `members` bit vectors of each group.
///
/// `AND_i (m_i ^ l_i) = XOR_S AND_{i not in S} m_i AND_{i in S} l_i`: the dealer deals the products of two or more masks.
#[derive(Clone, Debug)]
pub struct And {
    /// Layout of the input: per segment, `rows x members x words`.
    pub segments: Vec<Segment>,
    /// Bits that are combined, at most five.
    pub members: usize,
}

impl And {
    fn products(&self) -> usize {
        (1 << self.members) - 1 - self.members
    }

    fn total(&self) -> usize {
        self.segments.iter().map(|s| s.rows * s.words).sum()
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.total() * self.products(), 64)]
    }

    /// Dealer: per row and word, the products of two or more masks.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let n = self.products();
        let mut t = d.bits(self.total() * n)?;
        let mut rest = lam;
        for s in &self.segments {
            for _ in 0..s.rows {
                let row;
                (row, rest) = rest.split_at(self.members * s.words);
                vector::run(Masks { members: self.members, row, out: t.room(d, s.words * n) });
            }
        }
        t.end(d);
        Ok(())
    }

    /// Meaning in the clear.
    pub fn plain(&self, x: &[u64]) -> Vec<u64> {
        let mut out = Vec::with_capacity(self.total());
        let mut rest = x;
        for s in &self.segments {
            for _ in 0..s.rows {
                let row;
                (row, rest) = rest.split_at(self.members * s.words);
                out.extend((0..s.words).map(|w| (0..self.members).fold(!0, |a, i| a & row[i * s.words + w])));
            }
        }
        out
    }

    /// Evaluator: XOR share of the conjunctions, per segment `rows x words`.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let n = self.products();
        let dealt = t.half(self.total() * n, 64)?;
        let mut out = vec![0; self.total()];
        let lead = u64::from(t.leads()).wrapping_neg();
        let (rows, first) = (self.segments.iter().map(|s| s.rows).sum(), |row| words_before(&self.segments, row));
        t.divide(
            rows,
            [&mut out],
            |row| [first(row)],
            |rows, [mut y]| {
                let at = first(rows.start);
                let mut dealt = dealt.from(at * n);
                let [mut m, mut l] = [&x.m, &x.l].map(|x| &x[self.members * at..]);
                for (s, own) in self.segments.iter().zip(of_each(&self.segments, rows)) {
                    for _ in own {
                        let (own_m, own_l, to);
                        (own_m, m) = m.split_at(self.members * s.words);
                        (own_l, l) = l.split_at(self.members * s.words);
                        (to, y) = y.split_at_mut(s.words);
                        let dealt = dealt.next(s.words * n);
                        vector::run(Conjunction { members: self.members, m: own_m, l: own_l, lead, dealt, y: to });
                    }
                }
            },
        );
        Ok(out)
    }
}

/// Most bits that are combined.
const MEMBERS: usize = 5;

/// `AND_{i in S} x_i` for every subset `S`, where word `i` of a member stands `words` after word `i` of the one before.
#[inline(always)]
fn subsets<const W: usize>(members: usize, x: &[u64], words: usize, at: usize) -> [[u64; W]; 1 << MEMBERS] {
    let mut all = [[!0; W]; 1 << MEMBERS];
    for s in 1usize..1 << members {
        let x = &x[s.trailing_zeros() as usize * words + at..][..W];
        all[s] = std::array::from_fn(|w| all[s & (s - 1)][w] & x[w]);
    }
    all
}

/// The dealer's products of one row.
struct Masks<'a> {
    members: usize,
    row: &'a [u64],
    out: &'a mut [u64],
}

impl Masks<'_> {
    #[inline(always)]
    fn of<const W: usize>(self) {
        let words = self.row.len() / self.members;
        let mut out = self.out.chunks_exact_mut(W);
        for at in (0..words).step_by(W) {
            let all = subsets::<W>(self.members, self.row, words, at);
            let products = (0usize..1 << self.members).filter(|s| s.count_ones() > 1);
            for (s, to) in products.zip(&mut out) {
                to.copy_from_slice(&all[s]);
            }
        }
    }
}

impl Kernel for Masks<'_> {
    #[inline(always)]
    fn run(self) {
        match self.row.len() / self.members % 4 {
            0 => self.of::<4>(),
            2 => self.of::<2>(),
            _ => self.of::<1>(),
        }
    }
}

/// An evaluator's share of the conjunctions of one row.
struct Conjunction<'a> {
    members: usize,
    m: &'a [u64],
    l: &'a [u64],
    lead: u64,
    dealt: &'a [u64],
    y: &'a mut [u64],
}

impl Conjunction<'_> {
    #[inline(always)]
    fn of<const W: usize>(self) {
        let (words, full) = (self.y.len(), (1usize << self.members) - 1);
        let mut dealt = self.dealt.chunks_exact(W);
        for (at, y) in (0..words).step_by(W).zip(self.y.chunks_exact_mut(W)) {
            let public = subsets::<W>(self.members, self.m, words, at);
            let mut sum: [u64; W] = std::array::from_fn(|w| public[full][w] & self.lead);
            for s in 1..=full {
                // Of one mask an evaluator has its half; of more, what is dealt.
                let term = if s.count_ones() == 1 {
                    Some(&self.l[s.trailing_zeros() as usize * words + at..][..W])
                } else {
                    dealt.next()
                };
                for (sum, (p, t)) in sum.iter_mut().zip(public[full ^ s].iter().zip(term.into_iter().flatten())) {
                    *sum ^= p & t;
                }
            }
            y.copy_from_slice(&sum);
        }
    }
}

impl Kernel for Conjunction<'_> {
    #[inline(always)]
    fn run(self) {
        match self.y.len() % 4 {
            0 => self.of::<4>(),
            2 => self.of::<2>(),
            _ => self.of::<1>(),
        }
    }
}

/// Number of *clear* bits of each row, as an additive share: bit injection and sum in one.
///
/// With `z = c ^ l` for the opened `c`: `z = c + (1 - 2c) l`, so the sum is linear in the dealt bits of `l`. A row's count is
/// right in the ring of its segment, for levels of a maximum that of the head's levels; what shares add up to above is made of
/// dealt halves alone, and is opened under a mask as wide.
#[derive(Clone, Debug)]
pub struct CountClear {
    /// Rows of `words` words.
    pub segments: Vec<Segment>,
    /// Ring of each segment's counts.
    pub rings: Vec<u32>,
}

impl CountClear {
    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        self.segments.iter().zip(&self.rings).map(|(s, k)| (s.rows * s.words * 64, *k)).collect()
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let mut words = lam.iter();
        for (s, mut t) in self.segments.iter().zip(d.tensors(&self.dealt())?) {
            for w in words.by_ref().take(s.rows * s.words) {
                t.room(d, 64).iter_mut().enumerate().for_each(|(j, b)| *b = w >> j & 1);
            }
            t.end(d);
        }
        Ok(())
    }

    /// Meaning in the clear, in units.
    pub fn plain(&self, x: &[u64]) -> Vec<f64> {
        let rows = self.segments.iter().flat_map(|s| std::iter::repeat_n(s.words, s.rows));
        let mut at = 0;
        let count = |words: usize| {
            at += words;
            x[at - words..at].iter().map(|w| f64::from(w.count_zeros())).sum()
        };
        rows.map(count).collect()
    }

    /// Evaluator: one share per row.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let (halves, leads) = (t.halves(&self.dealt())?, t.leads());
        let mut out = vec![0; self.segments.iter().map(|s| s.rows).sum()];
        t.divide(
            out.len(),
            [&mut out],
            |row| [row],
            |rows, [mut out]| {
                let mut m = x.m[words_before(&self.segments, rows.start)..].iter();
                for (((s, rho), own), k) in
                    self.segments.iter().zip(&halves).zip(of_each(&self.segments, rows)).zip(&self.rings)
                {
                    let to;
                    (to, out) = out.split_at_mut(own.len());
                    let mut rho = rho.from(64 * own.start * s.words);
                    for y in to {
                        for m in m.by_ref().take(s.words) {
                            vector::run(Count { m: *m, rho: rho.next(64), sum: y });
                            if leads {
                                *y = y.wrapping_add(u64::from(m.count_zeros()));
                            }
                        }
                        *y &= mask(*k);
                    }
                }
            },
        );
        Ok(out)
    }
}

/// Subtracts what is dealt of 64 bits; see [`CountClear`].
struct Count<'a> {
    m: u64,
    rho: &'a [u64],
    sum: &'a mut u64,
}

impl Kernel for Count<'_> {
    #[inline(always)]
    fn run(self) {
        let mut y = *self.sum;
        for (j, r) in self.rho.iter().enumerate() {
            let c = self.m >> j & 1;
            // (1 - 2c) r, without a branch; the count of clear bits is 1 - z.
            y = y.wrapping_sub((r ^ c.wrapping_neg()).wrapping_add(c));
        }
        *self.sum = y;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{World, masked};
    use super::*;
    use proptest::prelude::*;

    fn segments() -> impl Strategy<Value = Vec<Segment>> {
        prop::collection::vec((1usize..4, 1usize..4).prop_map(|(rows, words)| Segment { rows, words }), 1..3)
    }

    fn total(s: &[Segment]) -> usize {
        s.iter().map(|s| s.rows * s.words).sum()
    }

    proptest! {
        #[test]
        fn conjunctions_are_exact(segments in segments(), members in 2usize..=5, seed in any::<u64>()) {
            let mut w = World::seeded(seed);
            let (x, lam, e) = masked(&w.edges(64, total(&segments) * members), 64, true);
            let g = And { segments, members };
            let want = g.plain(&x);
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            prop_assert_eq!(s[0].iter().zip(&s[1]).map(|(a, b)| a ^ b).collect::<Vec<_>>(), want);
        }

        #[test]
        fn counts_are_exact_in_the_ring_of_their_segment(segments in segments(), rings in prop::collection::vec(1u32..=64, 2), seed in any::<u64>()) {
            let mut w = World::seeded(seed);
            let (x, lam, e) = masked(&w.edges(64, total(&segments)), 64, true);
            let g = CountClear { rings: rings[..segments.len()].to_vec(), segments };
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            let mut rest = x.as_slice();
            let (mut want, mut got) = (vec![], vec![]);
            for (part, ring) in g.segments.iter().zip(&g.rings) {
                for _ in 0..part.rows {
                    let (row, tail) = rest.split_at(part.words);
                    rest = tail;
                    want.push(row.iter().map(|v| u64::from(v.count_zeros())).sum::<u64>() & mask(*ring));
                    got.push(s[0][got.len()].wrapping_add(s[1][got.len()]) & mask(*ring));
                }
            }
            prop_assert_eq!(got, want);
        }

        #[test]
        fn a_rotation_moves_every_bit(x in prop::collection::vec(any::<u64>(), 1..6), by in any::<u16>()) {
            let mut out = vec![0; x.len()];
            rotated(&x, by as usize, 0, &mut out);
            let bit = |x: &[u64], i: usize| x[i / 64 % x.len()] >> (i % 64) & 1;
            for i in 0..64 * x.len() {
                let to = (i + by as usize) % (64 * x.len());
                prop_assert_eq!(bit(&out, to), bit(&x, i), "{}", i);
            }
            for first in 0..x.len() {
                let mut part = vec![0; x.len() - first];
                rotated(&x, by as usize, first, &mut part);
                prop_assert_eq!(&part, &out[first..]);
            }
        }
    }
}
