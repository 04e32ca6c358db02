//! Gates on XOR-shared bits, packed 64 to a word: AND of several bits, and the sum of a row of bits as a ring share.

use super::{Deal, Dealt, Masked, Take};
use crate::Error;
use crate::ring::mask;
use crate::vector::{self, Kernel};

/// Rotates a bit vector left by `by`.
pub(super) fn rotate(x: &[u64], by: usize, out: &mut [u64]) {
    let n = x.len();
    let (w, b) = (by / 64, by % 64);
    // The words that word 0 is made of.
    let mut high = if w % n == 0 { 0 } else { n - w % n };
    let mut low = if high == 0 { n - 1 } else { high - 1 };
    for o in out {
        *o = x[high] << b | (x[low] >> 1) >> (63 - b);
        (low, high) = (high, if high + 1 == n { 0 } else { high + 1 });
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

/// AND over `members` bit vectors of each group.
///
/// `AND_i (m_i ^ l_i) = XOR_S AND_{i not in S} m_i AND_{i in S} l_i`: the dealer deals the products of two or more masks.
#[derive(Clone, Debug)]
pub struct And {
    /// Layout of the input: per segment, `rows x members x words`.
    pub segments: Vec<Segment>,
    /// Bits that are combined.
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

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let mut out = Vec::with_capacity(self.total() * self.products());
        self.each(lam, |l| {
            for s in 1usize..1 << self.members {
                if s.count_ones() > 1 {
                    out.push((0..self.members).filter(|i| s >> i & 1 == 1).fold(!0, |a, i| a & l[i]));
                }
            }
        });
        d.xor(out)
    }

    /// Calls `f` with the members of every (group, word), in output order.
    fn each(&self, x: &[u64], mut f: impl FnMut(&[u64; 8])) {
        let mut at = 0;
        for s in &self.segments {
            for _ in 0..s.rows {
                for w in 0..s.words {
                    let mut l = [0; 8];
                    for (i, l) in l.iter_mut().enumerate().take(self.members) {
                        *l = x[at + i * s.words + w];
                    }
                    f(&l);
                }
                at += self.members * s.words;
            }
        }
    }

    /// Meaning in the clear.
    pub fn plain(&self, x: &[u64]) -> Vec<u64> {
        let mut out = Vec::with_capacity(self.total());
        self.each(x, |l| out.push(l[..self.members].iter().fold(!0, |a, b| a & b)));
        out
    }

    /// Evaluator: XOR share of the conjunctions, per segment `rows x words`.
    pub fn eval(&self, t: &mut Take, x: &Masked) -> Result<Vec<u64>, Error> {
        let dealt = t.next(self.total() * self.products(), 64)?;
        let mut own = Vec::with_capacity(self.total());
        self.each(&x.l, |l| own.push(*l));
        let mut out = Vec::with_capacity(self.total());
        let (mut at, leads) = (0, t.leads());
        self.each(&x.m, |m| {
            let l = &own[out.len()];
            let mut y = 0;
            for s in 0usize..1 << self.members {
                let public = (0..self.members).filter(|i| s >> i & 1 == 0).fold(!0, |a, i| a & m[i]);
                let term = match s.count_ones() {
                    0 => u64::from(leads).wrapping_neg(),
                    1 => l[s.trailing_zeros() as usize],
                    _ => {
                        at += 1;
                        dealt[at - 1]
                    }
                };
                y ^= public & term;
            }
            out.push(y);
        });
        Ok(out)
    }
}

/// Number of *clear* bits of each row, as an additive share: bit injection and sum in one.
///
/// With `z = c ^ l` for the opened `c`: `z = c + (1 - 2c) l`, so the sum is linear in the dealt bits of `l`.
#[derive(Clone, Debug)]
pub struct CountClear {
    /// Rows of `words` words.
    pub segments: Vec<Segment>,
    /// Ring of the count.
    pub k: u32,
}

impl CountClear {
    fn bits(&self) -> usize {
        self.segments.iter().map(|s| s.rows * s.words * 64).sum()
    }

    /// What is dealt.
    pub fn dealt(&self) -> Vec<Dealt> {
        vec![(self.bits(), self.k)]
    }

    /// Dealer.
    pub fn deal(&self, d: &mut Deal, lam: &[u64]) -> Result<(), Error> {
        let mut t = d.tensor(self.bits(), self.k)?;
        for w in lam {
            t.room(d, 64).iter_mut().enumerate().for_each(|(j, b)| *b = w >> j & 1);
        }
        t.end(d);
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
        let mut rho = t.half(self.bits(), self.k)?;
        let mut words = x.m.iter();
        let mut out = Vec::new();
        for s in &self.segments {
            for _ in 0..s.rows {
                let mut y = 0u64;
                for m in words.by_ref().take(s.words) {
                    vector::run(Count { m: *m, rho: rho.next(64), sum: &mut y });
                    if t.leads() {
                        y = y.wrapping_add(u64::from(m.count_zeros()));
                    }
                }
                out.push(y & mask(self.k));
            }
        }
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
    use super::super::testing::{World, add, masked};
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
            let mut want = vec![];
            g.each(&x, |l| want.push(l[..members].iter().fold(!0, |a, b| a & b)));
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            prop_assert_eq!(s[0].iter().zip(&s[1]).map(|(a, b)| a ^ b).collect::<Vec<_>>(), want);
        }

        // A row has up to 192 bits, and the count is read as signed here.
        #[test]
        fn counts_are_exact(segments in segments(), k in 9u32..=64, seed in any::<u64>()) {
            let mut w = World::seeded(seed);
            let (x, lam, e) = masked(&w.edges(64, total(&segments)), 64, true);
            let g = CountClear { segments, k };
            let s = w.run(&g.dealt(), |d| g.deal(d, &lam), |t, i| g.eval(t, &e[i]));
            let mut rest = x.as_slice();
            let mut want = vec![];
            for s in &g.segments {
                for _ in 0..s.rows {
                    let (row, tail) = rest.split_at(s.words);
                    rest = tail;
                    want.push(row.iter().map(|v| i64::from(v.count_zeros())).sum::<i64>());
                }
            }
            prop_assert_eq!(add(&s, k), want);
        }

        #[test]
        fn a_rotation_moves_every_bit(x in prop::collection::vec(any::<u64>(), 1..6), by in any::<u16>()) {
            let mut out = vec![0; x.len()];
            rotate(&x, by as usize, &mut out);
            let bit = |x: &[u64], i: usize| x[i / 64 % x.len()] >> (i % 64) & 1;
            for i in 0..64 * x.len() {
                let to = (i + by as usize) % (64 * x.len());
                prop_assert_eq!(bit(&out, to), bit(&x, i), "{}", i);
            }
        }
    }
}
