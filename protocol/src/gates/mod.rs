//! The gates: each turns masked values into a share without any communication between the evaluators.
//!
//! All rest on one identity: where `f(m - l) = sum_t a_t(m) b_t(l)`, the dealer, which knows the mask `l`, deals
//! shares of `b_t(l)` and the evaluators, which know `m = x + l`, apply the public `a_t(m)`. Each file holds one
//! functionality with its dealer side, its evaluator side and what it deals.
//!
//! Who sees what: an evaluator sees `m` (uniform, since the other evaluator's half of `l` is unknown to it) and
//! its own half of each dealt value (a PRG output, or the value minus a PRG output it does not know). The dealer
//! receives nothing. Table positions read by an evaluator depend on `m` only, which is public to both.

pub mod bits;
pub mod broadcast;
pub mod cosine;
pub mod exp;
pub mod grid;
pub mod hadamard;
pub mod pad;
pub mod piecewise;
pub mod product;
pub mod reached;
pub mod rescale;
pub mod rotate;
pub mod rowmax;
pub mod turn;

use crate::prg::Prg;
use crate::ring::{mask, pack, packed_len, unpack};
use crate::{Error, Role};
use zeroize::Zeroize;

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
        self.m.zeroize();
        self.l.zeroize();
    }
}

/// One dealt tensor: element count and ring.
pub type Dealt = (usize, u32);

/// The evaluator, 0 or 1, that expands its half of slot `slot` from a seed; the other receives words.
/// Alternates so that both links carry half.
fn seeded(step: u32, slot: u32) -> usize {
    ((step + slot) & 1) as usize
}

/// Bytes sent to E1 and E2 for the dealt tensors of one step.
pub fn dealt_bytes(step: u32, tensors: &[Dealt]) -> [u64; 2] {
    let mut out = [0; 2];
    for (slot, &(n, bits)) in tensors.iter().enumerate() {
        out[1 - seeded(step, slot as u32)] += packed_len(n, bits) as u64;
    }
    out
}

/// The dealer's side of one step.
pub struct Deal<'a> {
    prg: &'a mut [Prg; 2],
    step: u32,
    slot: u32,
    /// Messages for E1 and E2.
    pub out: [Vec<u8>; 2],
}

impl<'a> Deal<'a> {
    /// Starts dealing for `step`.
    pub fn new(prg: &'a mut [Prg; 2], step: u32) -> Self {
        Deal { prg, step, slot: 0, out: [Vec::new(), Vec::new()] }
    }

    fn split(&mut self, bits: u32, mut v: Vec<u64>, sub: impl Fn(u64, u64) -> u64) -> Result<(), Error> {
        let side = seeded(self.step, self.slot);
        let mut r = vec![0; v.len()];
        self.prg[side].fill(self.step, self.slot, bits, &mut r)?;
        let mk = mask(bits);
        for (v, r) in v.iter_mut().zip(&r) {
            *v = sub(*v, *r) & mk;
        }
        self.out[1 - side].extend_from_slice(&pack(&v, bits));
        self.slot += 1;
        Ok(())
    }

    /// Deals additive shares of `v` mod 2^bits.
    pub fn share(&mut self, bits: u32, v: Vec<u64>) -> Result<(), Error> {
        self.split(bits, v, u64::wrapping_sub)
    }

    /// Deals XOR shares of whole words.
    pub fn xor(&mut self, v: Vec<u64>) -> Result<(), Error> {
        self.split(64, v, |a, b| a ^ b)
    }
}

/// An evaluator's side of one step: its halves of the dealt tensors, in the order they were dealt.
pub struct Take<'a> {
    prg: &'a mut Prg,
    role: Role,
    step: u32,
    slot: u32,
    rest: &'a [u8],
}

impl<'a> Take<'a> {
    /// `msg` is the dealer's whole message for `step`.
    pub fn new(prg: &'a mut Prg, role: Role, step: u32, msg: &'a [u8]) -> Self {
        Take { prg, role, step, slot: 0, rest: msg }
    }

    /// This evaluator's half of the next tensor.
    pub fn next(&mut self, n: usize, bits: u32) -> Result<Vec<u64>, Error> {
        let slot = self.slot;
        self.slot += 1;
        if seeded(self.step, slot) == index(self.role) {
            let mut out = vec![0; n];
            self.prg.fill(self.step, slot, bits, &mut out)?;
            return Ok(out);
        }
        let len = packed_len(n, bits);
        if self.rest.len() < len {
            return Err(Error::Malformed {
                what: "dealt message",
                reason: format!("step {}: {} bytes missing", self.step, len - self.rest.len()),
            });
        }
        let (head, tail) = self.rest.split_at(len);
        self.rest = tail;
        unpack(head, n, bits)
    }

    /// Whether this evaluator adds the public part of a result.
    pub fn leads(&self) -> bool {
        self.role == Role::E1
    }
}

/// 0 for E1, 1 for E2.
pub fn index(role: Role) -> usize {
    usize::from(role != Role::E1)
}

/// `round(v * mult / 2^shift)` mod 2^64, half up; `v` unsigned below 2^63.
pub fn scaled(v: u64, mult: i64, shift: u32) -> u64 {
    let p = v as i128 * mult as i128;
    if shift == 0 { p as u64 } else { ((p + (1i128 << (shift - 1))) >> shift) as u64 }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Both evaluators and the dealer side by side, for gate tests.
    use super::*;
    use crate::prg::SessionKey;

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
        pub step: u32,
        seed: u64,
    }

    impl World {
        pub fn new() -> Self {
            let p = |i: u8| Prg::new(&SessionKey::from_seed([i; 32]));
            World { prg: [p(1), p(2)], eval: [p(1), p(2)], step: 0, seed: 0x9e37_79b9_7f4a_7c15 }
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

        /// Runs one gate on both sides, checks what it declares to deal, returns both evaluators' outputs.
        pub fn run<T>(
            &mut self,
            dealt: &[Dealt],
            deal: impl FnOnce(&mut Deal) -> Result<(), Error>,
            eval: impl Fn(&mut Take, usize) -> Result<T, Error>,
        ) -> [T; 2] {
            self.step += 1;
            let mut d = Deal::new(&mut self.prg, self.step);
            deal(&mut d).unwrap();
            let out = d.out;
            assert_eq!(out.each_ref().map(|o| o.len() as u64), dealt_bytes(self.step, dealt));
            std::array::from_fn(|i| {
                let role = [Role::E1, Role::E2][i];
                let mut t = Take::new(&mut self.eval[i], role, self.step, &out[i]);
                let r = eval(&mut t, i).unwrap();
                assert!(t.rest.is_empty(), "a dealt byte was not used");
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
        fn dealt_halves_add_up_and_alternate(n in 0usize..20, bits in 1u32..=64, step in 1u32..4, seed in any::<u64>()) {
            let mut w = World::seeded(seed);
            w.step = step - 1;
            let v: Vec<u64> = w.edges(bits, n).iter().map(|[x, ..]| *x).collect();
            let dealt = [(n, bits), (n, 64)];
            let [a, b] = w.run(
                &dealt,
                |d| {
                    d.share(bits, v.clone())?;
                    d.xor(v.clone())
                },
                |t, _| Ok((t.next(n, bits)?, t.next(n, 64)?)),
            );
            let want: Vec<i64> = v.iter().map(|v| crate::ring::signed(*v, bits)).collect();
            prop_assert_eq!(add(&[a.0, b.0], bits), want);
            prop_assert_eq!(a.1.iter().zip(&b.1).map(|(a, b)| a ^ b).collect::<Vec<_>>(), v);
            // A tensor is sent to one evaluator only, the next one to the other.
            let (first, second) = (packed_len(n, bits) as u64, 8 * n as u64);
            let want = if step % 2 == 1 { [first, second] } else { [second, first] };
            prop_assert_eq!(dealt_bytes(step, &dealt), want);
        }
    }
}
