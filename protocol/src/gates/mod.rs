//! The gates: each turns masked values into a share without any communication between the evaluators.
//!
//! All rest on one identity: where `f(m - l) = sum_t a_t(m) b_t(l)`, the dealer, which knows the mask `l`, deals
//! shares of `b_t(l)` and the evaluators, which know `m = x + l`, apply the public `a_t(m)`. Each file holds one
//! functionality with its dealer side, its evaluator side and what it deals.
//!
//! Who sees what: an evaluator sees `m` (uniform, since the other evaluator's half of `l` is unknown to it) and
//! its own half of each dealt value (a PRG output, or the value minus a PRG output it does not know); what is sent to both as it is
//! ([`spline`]) is masked by hashes of what only the other has. The dealer receives nothing. Table positions read by an evaluator depend on `m` only, which is public to both.
//!
//! What is exact: sums, linear layers, products and gates on bits, whatever the masks are. A gate that rounds does so
//! term by term, some of `m` and some of `l`, so its result depends on the masks within the units that it states: the
//! same input under other masks gives a result that is as near to the real one, not the same bits.

pub mod bits;
pub mod broadcast;
pub mod cosine;
mod deal;
mod dpf;
pub mod exp;
pub mod grid;
pub mod hadamard;
pub mod join;
pub mod local;
pub mod pad;
pub(crate) mod parts;
pub mod powers;
pub mod product;
pub mod reached;
pub mod rescale;
pub mod residual;
pub mod rotate;
pub mod rowmax;
pub mod spline;
pub mod squares;
pub mod tails;
mod take;
pub mod turn;

use crate::ring::packed_len;
use crate::vector::{self, Kernel};
use crate::wipe::wipe;
use crate::{Error, Role};

use deal::Subtract;
pub use deal::{Deal, Dealing};
use take::from;
pub use take::{Half, Take};

/// A value known to both evaluators as `m = x + l` mod 2^bits, with this evaluator's half of `l`.
#[derive(Default)]
pub struct Masked {
    /// The masked words, equal at both evaluators.
    pub m: Vec<u64>,
    /// This evaluator's half of the mask.
    pub l: Vec<u64>,
}

impl Masked {
    /// Zeroes and empties both.
    pub fn wipe(&mut self) {
        wipe(&mut self.m);
        wipe(&mut self.l);
    }
}

/// The masks of a value as the dealer knows them: the halves added mod 2^bits, and E1's alone.
///
/// What a gate adds up of a mask it may take of each half: either evaluator computes its own part, and what is dealt is the
/// carry, by which the halves' sum exceeds the mask.
#[derive(Clone, Copy)]
pub struct Halves<'a> {
    /// Both, added.
    pub sum: &'a [u64],
    /// E1's.
    pub first: &'a [u64],
}

impl<'a> Halves<'a> {
    /// Deals carries and top bits, in a ring of `ring` bits, of columns `first .. first + n` of `rows x stride` masks of `bits`
    /// bits.
    fn deal_bits(
        self,
        d: &mut Deal,
        (rows, stride): (usize, usize),
        (first, n): (usize, usize),
        (bits, ring): (u32, u32),
    ) -> Result<(), Error> {
        let (mut carry, mut top) = (d.tensor(rows * n, ring)?, d.tensor(rows * n, ring)?);
        for row in 0..rows {
            let at = row * stride + first;
            let l = self.part(at..at + n);
            vector::run(Bits { l, bits, carry: carry.room(d, n), top: top.room(d, n) });
        }
        carry.end(d);
        top.end(d);
        Ok(())
    }

    /// Those of some elements.
    fn part(&self, range: std::ops::Range<usize>) -> Halves<'a> {
        Halves { sum: &self.sum[range.clone()], first: &self.first[range] }
    }
}

/// Whether the halves of each mask add to more than their ring holds, and the mask's top bit.
struct Bits<'a> {
    l: Halves<'a>,
    bits: u32,
    carry: &'a mut [u64],
    top: &'a mut [u64],
}

impl Kernel for Bits<'_> {
    #[inline(always)]
    fn run(self) {
        let halves = self.l.sum.iter().zip(self.l.first);
        for ((carry, top), (l, first)) in self.carry.iter_mut().zip(self.top).zip(halves) {
            (*carry, *top) = (u64::from(l < first), l >> (self.bits - 1));
        }
    }
}

/// One dealt tensor: element count and ring.
pub type Dealt = (usize, u32);

/// The tensors of [`Deal::both`].
pub fn to_both(n: usize, bits: u32) -> [Dealt; 2] {
    [(n, bits); 2]
}

/// Words that dealt tensors are drawn, packed and unpacked at a time, a multiple of eight.
pub(crate) const BLOCK: usize = 1024;

/// The evaluator, 0 or 1, that expands its half of slot `slot` from a seed; the other receives words.
/// Alternates within a step, and from step to step as in the sequence of Thue and Morse, whose sums over any stride stay small:
/// both links carry about half, whatever the number of a layer's steps.
pub(crate) fn seeded(step: u32, slot: u32) -> usize {
    ((step.count_ones() + slot) & 1) as usize
}

/// Bytes sent to E1 and E2 for the dealt tensors of one step.
pub fn dealt_bytes(step: u32, tensors: &[Dealt]) -> [u64; 2] {
    let mut out = [0; 2];
    for (slot, &(n, bits)) in tensors.iter().enumerate() {
        out[1 - seeded(step, slot as u32)] += packed_len(n, bits) as u64;
    }
    out
}

/// What belongs to the columns of a tensor that is read 64 elements at a time: as many as there are and 64 more, round and
/// round.
fn cycle<T: Clone>(columns: &[T]) -> Vec<T> {
    columns.iter().cycle().take(columns.len() + 64).cloned().collect()
}

/// 0 for E1, 1 for E2.
pub fn index(role: Role) -> usize {
    usize::from(role != Role::E1)
}

/// The nearest integer as a word, for magnitudes below 2^51.
#[inline(always)]
pub fn rounded(v: f64) -> u64 {
    // The integer stands in the low bits of the sum.
    const MAGIC: f64 = 1.5 * (1u64 << 52) as f64;
    (v + MAGIC).to_bits().wrapping_sub(MAGIC.to_bits())
}

/// `round(v * mult / 2^shift)` mod 2^64, half up; `v` unsigned below 2^63.
pub fn scaled(v: u64, mult: i64, shift: u32) -> u64 {
    let p = v as i128 * mult as i128;
    if shift == 0 { p as u64 } else { ((p + (1i128 << (shift - 1))) >> shift) as u64 }
}

/// How [`scaled`] is computed for values of so many bits: the products fit a word, or two whose sum is easy to shift, or
/// need 128 bits. All three give the same words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    One,
    Two,
    Wide,
}

impl Width {
    /// For values below `2^bits` and these multipliers.
    pub fn of(bits: u32, mult: &[i64], shift: u32) -> Width {
        let top = mult.iter().map(|m| 64 - m.unsigned_abs().leading_zeros()).max().unwrap_or(0);
        if shift <= 61 && bits + top <= 61 {
            Width::One
        } else if (33..=90).contains(&shift) && bits <= 63 && top <= 29 {
            Width::Two
        } else {
            Width::Wide
        }
    }
}

/// [`scaled`] by one of the ways of [`Width`].
#[inline(always)]
pub fn scaled_as(width: Width, v: u64, mult: i64, shift: u32) -> u64 {
    match width {
        Width::One => (((v as i64).wrapping_mul(mult)).wrapping_add(1 << shift >> 1) >> shift) as u64,
        Width::Two => {
            let (hi, lo) = ((v >> 32) as i64, (v & 0xffff_ffff) as i64);
            let carry = lo.wrapping_mul(mult) >> 32;
            (hi.wrapping_mul(mult).wrapping_add(1 << (shift - 33)).wrapping_add(carry) >> (shift - 32)) as u64
        }
        Width::Wide => scaled(v, mult, shift),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Both evaluators and the dealer side by side, for gate tests.
    use std::sync::LazyLock;

    use super::parts::Parts;
    use super::*;
    use crate::gemm::Threads;
    use crate::prg::{Prg, SessionKey};
    use crate::ring::mask;

    /// The words of [`World::edges`], their masks, and both evaluators' views.
    pub fn masked(x: &[[u64; 3]], bits: u32, xor: bool) -> (Vec<u64>, Vec<u64>, [Masked; 2]) {
        let add = |a: u64, b: u64| if xor { a ^ b } else { a.wrapping_add(b) & mask(bits) };
        let lam: Vec<u64> = x.iter().map(|[_, a, b]| add(*a, *b)).collect();
        let m: Vec<u64> = x.iter().zip(&lam).map(|([x, ..], l)| add(*x, *l)).collect();
        let half = |i: usize| Masked { m: m.clone(), l: x.iter().map(|v| v[i]).collect() };
        let e = [half(1), half(2)];
        (x.iter().map(|[x, ..]| *x).collect(), lam, e)
    }

    pub struct World {
        pub prg: [Prg; 2],
        pub eval: [Prg; 2],
        /// The evaluators' once more, for several threads.
        again: [Prg; 2],
        pub step: u32,
        seed: u64,
    }

    impl World {
        pub fn new() -> Self {
            let p = |i: u8| Prg::new(&SessionKey::from_seed([i; 32]));
            World { prg: [p(1), p(2)], eval: [p(1), p(2)], again: [p(1), p(2)], step: 0, seed: 0x9e37_79b9_7f4a_7c15 }
        }

        pub fn seeded(seed: u64) -> Self {
            World { seed: seed | 1, ..World::new() }
        }

        /// `n` words with both halves of their masks, each as often as not at an edge: zero, all ones, the sign bit, a
        /// quarter of the ring, and their neighbours.
        pub fn edges(&mut self, bits: u32, n: usize) -> Vec<[u64; 3]> {
            let mut word = || {
                let (edge, near) = (self.word() & 3, [0, 1, u64::MAX][self.word() as usize % 3]);
                let w = if self.word() & 1 == 0 { self.word() } else { (edge << (bits - 1) >> 1).wrapping_add(near) };
                w & mask(bits)
            };
            (0..n).map(|_| [word(), word(), word()]).collect()
        }

        pub fn word(&mut self) -> u64 {
            self.seed ^= self.seed << 13;
            self.seed ^= self.seed >> 7;
            self.seed ^= self.seed << 17;
            self.seed.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        /// Masks `x`; returns the mask and both evaluators' views.
        pub fn mask(&mut self, x: &[u64], bits: u32) -> (Vec<u64>, [Masked; 2]) {
            let mk = mask(bits);
            let l: [Vec<u64>; 2] = std::array::from_fn(|_| x.iter().map(|_| self.word() & mk).collect());
            let lam: Vec<u64> = l[0].iter().zip(&l[1]).map(|(a, b)| a.wrapping_add(*b) & mk).collect();
            let m: Vec<u64> = x.iter().zip(&lam).map(|(x, l)| x.wrapping_add(*l) & mk).collect();
            let [a, b] = l;
            (lam, [Masked { m: m.clone(), l: a }, Masked { m, l: b }])
        }

        pub fn mask_bits(&mut self, x: &[u64]) -> (Vec<u64>, [Masked; 2]) {
            let l: [Vec<u64>; 2] = std::array::from_fn(|_| x.iter().map(|_| self.word()).collect());
            let lam: Vec<u64> = l[0].iter().zip(&l[1]).map(|(a, b)| a ^ b).collect();
            let m: Vec<u64> = x.iter().zip(&lam).map(|(x, l)| x ^ l).collect();
            let [a, b] = l;
            (lam, [Masked { m: m.clone(), l: a }, Masked { m, l: b }])
        }

        /// Runs one gate on both sides, checks what it declares to deal, and that evaluators make the same in as many parts as
        /// can be; returns both evaluators' outputs.
        pub fn run<T: PartialEq>(
            &mut self,
            dealt: &[Dealt],
            deal: impl FnOnce(&mut Deal) -> Result<(), Error>,
            eval: impl Fn(&mut Take, usize) -> Result<T, Error>,
        ) -> [T; 2] {
            self.step += 1;
            let prg = self.prg.each_mut().map(|prg| prg.step(self.step).unwrap());
            let mut d = Deal::new(prg, dealt_bytes(self.step, dealt));
            deal(&mut d).unwrap();
            assert_eq!(d.taken.map(|n| n as u64), dealt_bytes(self.step, dealt));
            let out = d.end();
            std::array::from_fn(|i| {
                let role = [Role::E1, Role::E2][i];
                let mut t = Take::new(self.eval[i].step(self.step).unwrap(), role, &out[i]);
                let r = eval(&mut t, i).unwrap();
                assert!(t.rest.is_empty(), "a dealt byte was not used");
                static THREADS: LazyLock<Threads> = LazyLock::new(|| Threads::new(3).unwrap());
                let t = Take::new(self.again[i].step(self.step).unwrap(), role, &out[i]);
                let mut t = t.by(Parts::least(THREADS.clone()));
                assert!(eval(&mut t, i).unwrap() == r, "several parts make something else");
                r
            })
        }
    }

    pub fn add(s: &[Vec<u64>; 2], bits: u32) -> Vec<i64> {
        s[0].iter().zip(&s[1]).map(|(a, b)| crate::ring::signed(a.wrapping_add(*b) & mask(bits), bits)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{World, add};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn scaling_is_the_same_however_it_is_computed(
            (bits, shift) in (1u32..=63, 0u32..=100),
            mult in -(1i64 << 28)..=1 << 28,
            v in any::<u64>(),
        ) {
            for v in [v, u64::MAX, 0, 1 << (bits - 1)] {
                let v = v & crate::ring::mask(bits);
                prop_assert_eq!(scaled_as(Width::of(bits, &[mult], shift), v, mult, shift), scaled(v, mult, shift));
            }
        }

        #[test]
        fn a_half_is_read_from_anywhere(
            (n, bits, step) in (0usize..5000, 1u32..=64, 1u32..3),
            (from, some, seed) in (0.0f64..=1.0, 0.0f64..=1.0, any::<u64>()),
        ) {
            let mut w = World::seeded(seed);
            w.step = step - 1;
            let from = (from * n as f64) as usize;
            let some = (some * (n - from) as f64) as usize;
            let v: Vec<u64> = w.edges(bits, n).iter().map(|[x, ..]| *x).collect();
            let all = w.run(&[(n, bits)], |d| d.share(bits, v.clone()), |t, _| {
                let half = t.half(n, bits)?;
                let (mut whole, mut rest) = (vec![0; n], vec![0; n - from - some]);
                let mut part = half.from(from);
                let first = part.next(some).to_vec();
                part.read(&mut rest);
                half.read(&mut whole);
                Ok(whole[from..] == [first, rest].concat())
            });
            prop_assert!(all[0] && all[1]);
        }

        #[test]
        fn dealt_halves_add_up_and_alternate(n in 0usize..20, bits in 1u32..=64, step in 1u32..4, seed in any::<u64>()) {
            let mut w = World::seeded(seed);
            w.step = step - 1;
            let v: Vec<u64> = w.edges(bits, n).iter().map(|[x, ..]| *x).collect();
            let dealt = [(n, bits), (n, 64)];
            let [a, b] = w.run(
                &dealt,
                |d| {
                    d.share(bits, v.clone())?;
                    d.xor(64, v.clone())
                },
                |t, _| Ok((t.next(n, bits)?, t.next(n, 64)?)),
            );
            let want: Vec<i64> = v.iter().map(|v| crate::ring::signed(*v, bits)).collect();
            prop_assert_eq!(add(&[a.0, b.0], bits), want);
            prop_assert_eq!(a.1.iter().zip(&b.1).map(|(a, b)| a ^ b).collect::<Vec<_>>(), v);
            // A tensor is sent to one evaluator only, the next one to the other.
            let (first, second) = (packed_len(n, bits) as u64, 8 * n as u64);
            let want = if step.count_ones() % 2 == 1 { [first, second] } else { [second, first] };
            prop_assert_eq!(dealt_bytes(step, &dealt), want);
        }
    }
}
