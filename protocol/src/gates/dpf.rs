//! Incremental distributed point functions: of one path through a binary tree, two keys that add up to a value at each of some
//! nodes of the path and to nothing at every other node.
//!
//! The tree is the correlated one of the half-tree construction (Guo, Yang, Wang, Zhang, Xie, Liu, Zhao: Half-Tree: Halving the
//! Cost of Tree Expansion in COT and DPF, Eurocrypt 2023); values at inner nodes make it incremental (Boneh, Boyle, Corrigan-Gibbs,
//! Gilboa, Ishai: Lightweight Techniques for Private Heavy Hitters, S&P 2021). Each evaluator has a seed for every node, whose
//! lowest bit is the node's control bit. On the path both seeds differ by one secret word `D` with a lowest bit of one; off it they
//! are the same. A node's children are `h + t c` and `h + s + t c` for its seed `s`, its control bit `t`, the hash `h = H(s)`, and the
//! level's public code `c = H(s_1) + H(s_2) + [the path goes right] 0 + [left] D`, all of it exclusive or. Where the path has a value
//! `v`, words `w = H(s + 2 j)` of either seed are drawn, and the public correction `+-(v - w_1 + w_2)` is added where `t` is one:
//! what the evaluators then have, `w_1 + t_1 c` and `-(w_2 + t_2 c)`, adds up to `v` on the path and to zero off it.
//!
//! Who sees what: an evaluator sees its root seed, which it draws itself, and codes and corrections. Of each of these, one summand
//! is a hash of a seed that only the other evaluator has, which is its own seed plus `D`, `D` being unknown to it: codes and
//! corrections are uniform to it as long as `H` is circular correlation robust, and every seed and tweak is hashed for one purpose
//! only. `H(x) = P(S(x)) + S(x)` for a permutation `P` and the linear orthomorphism `S` is that in the ideal permutation model (Guo,
//! Katz, Wang, Yu: Efficient and Secure Multiparty Computation from Fixed-Key Block Ciphers, S&P 2020). `P` is AES under a public
//! key, a fresh one for every gate, so that what is learned offline of one permutation serves against the rows of one gate only.

use aes::cipher::{BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Block};

use zeroize::Zeroize;

use crate::wipe::Wiped;

/// `H`, of many seeds at a time.
pub(super) struct Hash {
    cipher: Aes128,
    spread: Vec<Block>,
    blocks: Vec<Block>,
}

/// The linear orthomorphism.
fn spread(x: u128) -> u128 {
    let (high, low) = ((x >> 64) as u64, x as u64);
    u128::from(high ^ low) << 64 | u128::from(high)
}

impl Hash {
    /// Under the public key of a gate.
    pub fn new(key: [u64; 2]) -> Hash {
        let key = joined(key).to_le_bytes();
        Hash { cipher: Aes128::new(&key.into()), spread: Vec::new(), blocks: Vec::new() }
    }

    /// `out = H(x)`, from whose end on hashes are put.
    fn append(&mut self, x: &[u128], tweak: u128, out: &mut Wiped<u128>) {
        let n = x.len();
        if self.spread.len() < n {
            self.spread.resize(n, Block::default());
            self.blocks.resize(n, Block::default());
        }
        let (from, to) = (&mut self.spread[..n], &mut self.blocks[..n]);
        from.iter_mut().zip(x).for_each(|(b, x)| *b = spread(x ^ tweak).to_le_bytes().into());
        self.cipher.encrypt_blocks_b2b(from, to).expect("as long as one another");
        let hash = |(a, b): (&Block, &Block)| u128::from_le_bytes((*a).into()) ^ u128::from_le_bytes((*b).into());
        out.extend(from.iter().zip(to.iter()).map(hash));
    }

    /// `H` of seeds, from which those of their children are made.
    pub fn of(&mut self, seeds: &[u128], out: &mut Wiped<u128>) {
        out.clear();
        self.append(seeds, 0, out);
    }

    /// What the words of values at nodes are drawn from: all nodes' first blocks, then all nodes' second ones, and so on.
    pub fn words(&mut self, seeds: &[u128], blocks: usize, out: &mut Wiped<u128>) {
        out.clear();
        (1..=blocks as u128).for_each(|j| self.append(seeds, j << 1, out));
    }
}

impl Drop for Hash {
    fn drop(&mut self) {
        for b in self.spread.iter_mut().chain(&mut self.blocks) {
            b.as_mut_slice().zeroize();
        }
    }
}

/// A seed or a code, of two words.
pub(super) fn joined([low, high]: [u64; 2]) -> u128 {
    u128::from(high) << 64 | u128::from(low)
}

/// The inverse of [`joined`].
pub(super) fn halved(x: u128) -> [u64; 2] {
    [x as u64, (x >> 64) as u64]
}

/// A root seed as drawn, with the control bit of E1, which is zero, or of E2.
pub(super) fn root(drawn: [u64; 2], evaluator: usize) -> u128 {
    joined(drawn) & !1 | evaluator as u128
}

/// All ones where the control bit is one.
#[inline(always)]
fn control(seed: u128) -> u128 {
    (seed & 1).wrapping_neg()
}

/// Both children of a node.
#[inline(always)]
pub(super) fn children(seed: u128, hash: u128, code: u128) -> [u128; 2] {
    let left = hash ^ control(seed) & code;
    [left, left ^ seed]
}

/// Bits of the lanes of a block, of which each gives a word of so many bits.
pub(super) fn lane(bits: u32) -> u32 {
    match bits {
        0..=32 => 32,
        33..=64 => 64,
        _ => 128,
    }
}

/// Blocks that so many words take.
pub(super) fn blocks(terms: usize, bits: u32) -> usize {
    (terms * lane(bits) as usize).div_ceil(128)
}

/// All ones over the low bits.
pub(super) fn mask(bits: u32) -> u128 {
    u128::MAX >> (128 - bits)
}

/// The block that word `j` is in.
#[inline(always)]
pub(super) fn block(j: usize, bits: u32) -> usize {
    j * lane(bits) as usize / 128
}

/// The bits below word `j` in a half of its block, and which half that is, unless words take whole blocks.
#[inline(always)]
pub(super) fn place(j: usize, bits: u32) -> (u32, Option<u32>) {
    let at = j as u32 * lane(bits) % 128;
    (at % 64, (bits <= 64).then_some(at / 64))
}

/// Word `j` of node `i` of `n`, of [`Hash::words`], mod `2^bits`.
fn word(hashes: &[u128], (i, n): (usize, usize), j: usize, bits: u32) -> u128 {
    let (by, half) = place(j, bits);
    hashes[block(j, bits) * n + i] >> (by + 64 * half.unwrap_or(0)) & mask(bits)
}

/// A word of a value on the path as an evaluator, not yet negated, has it at a node.
#[inline(always)]
pub(super) fn corrected(seed: u128, word: u128, correction: u128) -> u128 {
    word.wrapping_add(control(seed) & correction)
}

/// Paths of several rows as the dealer walks them down, all of them by a level at a time.
pub(super) struct Paths {
    /// Seeds of E1 and after them of E2.
    seeds: Wiped<u128>,
    hashes: Wiped<u128>,
}

impl Paths {
    /// From the root seeds of E1 and then of E2.
    pub fn new(roots: impl Iterator<Item = u128>) -> Paths {
        Paths { seeds: Wiped::new(roots.collect()), hashes: Wiped::new(Vec::new()) }
    }

    /// A level down, of each row to the right where `right` says so; codes go to `code`.
    pub fn down(&mut self, hash: &mut Hash, right: impl Fn(usize) -> bool, mut code: impl FnMut(usize, u128)) {
        let n = self.seeds.len() / 2;
        hash.of(&self.seeds, &mut self.hashes);
        let (first, second) = self.seeds.split_at_mut(n);
        for (row, (a, b)) in first.iter_mut().zip(second).enumerate() {
            let (h, g, right) = (self.hashes[row], self.hashes[n + row], right(row));
            let difference = *a ^ *b;
            let c = h ^ g ^ if right { 0 } else { difference };
            *a = children(*a, h, c)[usize::from(right)];
            *b = children(*b, g, c)[usize::from(right)];
            code(row, c);
        }
    }

    /// Corrections of `terms` words mod `2^bits` of each row, for the values that `value` says.
    pub fn correct(
        &mut self,
        hash: &mut Hash,
        (terms, bits): (usize, u32),
        value: impl Fn(usize, usize) -> u128,
        mut correction: impl FnMut(usize, usize, u128),
    ) {
        let n = self.seeds.len() / 2;
        hash.words(&self.seeds, blocks(terms, bits), &mut self.hashes);
        for row in 0..n {
            for j in 0..terms {
                let [h, g] = [row, n + row].map(|i| word(&self.hashes, (i, 2 * n), j, bits));
                let c = value(row, j).wrapping_sub(h).wrapping_add(g);
                // Added where it is E1's control bit that is one, taken off where it is E2's.
                let second = self.seeds[n + row] & 1 == 1;
                correction(row, j, if second { c.wrapping_neg() } else { c } & mask(bits));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every node of a level, by evaluator.
    fn level(hash: &mut Hash, root: u128, codes: &[u128]) -> Vec<u128> {
        let mut out = Wiped::new(Vec::new());
        codes.iter().fold(vec![root], |seeds, code| {
            hash.of(&seeds, &mut out);
            seeds.iter().zip(out.iter()).flat_map(|(s, h)| children(*s, *h, *code)).collect()
        })
    }

    proptest! {
        #[test]
        fn a_value_stands_at_its_node_and_nothing_elsewhere(
            key in any::<[u64; 2]>(),
            roots in prop::collection::vec(any::<[[u64; 2]; 2]>(), 1..4),
            (depth, path) in (1usize..7, any::<u64>()),
            (terms, bits, values) in (1usize..6, 1u32..=128, any::<[u128; 5]>()),
        ) {
            let mut hash = Hash::new(key);
            let seeds = |i: usize| roots.iter().map(move |r| root(r[i], i));
            let mut paths = Paths::new(seeds(0).chain(seeds(1)));
            let mut codes = vec![vec![0; depth]; roots.len()];
            for at in 1..=depth {
                // Rows go ways of their own.
                let right = |row: usize| path.rotate_left(row as u32) >> (depth - at) & 1 == 1;
                paths.down(&mut hash, right, |row, c| codes[row][at - 1] = c);
                // At inner nodes as at leaves.
                let mut corrections = vec![[0; 5]; roots.len()];
                let value = |row: usize, j: usize| values[j].wrapping_add(row as u128);
                paths.correct(&mut hash, (terms, bits), value, |row, j, c| corrections[row][j] = c);
                for (row, r) in roots.iter().enumerate() {
                    let on = (path.rotate_left(row as u32) & ((1 << depth) - 1)) >> (depth - at);
                    let [a, b] = [0, 1].map(|i| level(&mut hash, root(r[i], i), &codes[row][..at]));
                    for (node, (a, b)) in a.iter().zip(&b).enumerate() {
                        prop_assert_eq!(a == b, node as u64 != on);
                        let mut made = |seed: u128| {
                            let mut h = Wiped::new(Vec::new());
                            hash.words(&[seed], blocks(terms, bits), &mut h);
                            let of = |j: usize| corrected(seed, word(&h, (0, 1), j, bits), corrections[row][j]);
                            (0..terms).map(of).collect::<Vec<_>>()
                        };
                        for (j, (x, y)) in made(*a).into_iter().zip(made(*b)).enumerate() {
                            let want = if node as u64 == on { value(row, j) } else { 0 };
                            prop_assert_eq!(x.wrapping_sub(y) & mask(bits), want & mask(bits));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn hashes_are_frozen() {
        // AES-128 of 00..0f under the key 00..0f is known; here the input is what the orthomorphism makes of it.
        let mut out = Wiped::new(Vec::new());
        let key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        let plain = 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100_u128;
        let (high, low) = ((plain >> 64) as u64, plain as u64);
        // spread(x) = plain.
        let x = u128::from(low) << 64 | u128::from(high ^ low);
        Hash::new(key).of(&[x], &mut out);
        let aes = u128::from_le_bytes([
            0x0a, 0x94, 0x0b, 0xb5, 0x41, 0x6e, 0xf0, 0x45, 0xf1, 0xc3, 0x94, 0x58, 0xc6, 0x53, 0xea, 0x5a,
        ]);
        assert_eq!(out[0], aes ^ plain);
    }
}
