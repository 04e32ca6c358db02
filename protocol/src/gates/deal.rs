//! The dealer's side of a step: its tensors, of which one half is drawn and the other written into a message.

use super::{BLOCK, Dealt, seeded};
use crate::Error;
use crate::prg::{StepPrg, Words};
use crate::ring::{pack_to, packed_len};
use crate::vector::{self, Kernel};
use crate::wipe::Wiped;

/// The dealer's side of one step.
pub struct Deal {
    prg: [StepPrg; 2],
    slot: u32,
    /// Messages for E1 and E2, of which so many bytes are taken by tensors.
    out: [Vec<u8>; 2],
    pub(super) taken: [usize; 2],
}

/// A tensor that is being dealt: one half is drawn, the other written into the message at its own place.
pub struct Dealing {
    side: usize,
    at: usize,
    bits: u32,
    xor: bool,
    drawn: Words,
    words: Wiped<u64>,
    half: Wiped<u64>,
    len: usize,
}

impl Dealing {
    /// Room for the next `n` words of the tensor; all earlier ones have been written.
    pub fn room(&mut self, d: &mut Deal, n: usize) -> &mut [u64] {
        if self.len >= BLOCK {
            let whole = self.len / 8 * 8;
            self.flush(d, whole);
        }
        if self.words.len() < self.len + n {
            self.words.resize((self.len + n).next_multiple_of(BLOCK), 0);
        }
        self.len += n;
        &mut self.words[self.len - n..self.len]
    }

    fn flush(&mut self, d: &mut Deal, n: usize) {
        self.half.resize(n, 0);
        self.drawn.next(&mut self.half);
        vector::run(Subtract { words: &mut self.words[..n], half: &self.half, xor: self.xor });
        let len = packed_len(n, self.bits);
        pack_to(&self.words[..n], self.bits, &mut d.out[self.side][self.at..][..len]);
        self.at += len;
        self.words.copy_within(n..self.len, 0);
        self.len -= n;
    }

    /// Writes the last words.
    pub fn end(mut self, d: &mut Deal) {
        let n = self.len;
        self.flush(d, n);
    }
}

/// Takes a half off, in the ring or bit by bit.
pub(super) struct Subtract<'a> {
    pub words: &'a mut [u64],
    pub half: &'a [u64],
    pub xor: bool,
}

impl Kernel for Subtract<'_> {
    #[inline(always)]
    fn run(self) {
        let pairs = self.words.iter_mut().zip(self.half);
        if self.xor {
            pairs.for_each(|(w, h)| *w ^= h);
        } else {
            pairs.for_each(|(w, h)| *w = w.wrapping_sub(*h));
        }
    }
}

impl Deal {
    /// Starts dealing for the step of both generators, whose tensors take `len` bytes for E1 and E2.
    pub fn new(prg: [StepPrg; 2], len: [u64; 2]) -> Self {
        // Zeroed by the system where it is fresh.
        Deal { prg, slot: 0, out: len.map(|n| vec![0; n as usize]), taken: [0; 2] }
    }

    fn step(&self) -> u32 {
        self.prg[0].step()
    }

    /// The messages, complete.
    pub fn end(self) -> [Vec<u8>; 2] {
        debug_assert_eq!(
            self.taken,
            self.out.each_ref().map(Vec::len),
            "step {}: what it declares to deal",
            self.step()
        );
        self.out
    }

    /// Begins additive shares mod `2^bits` of a tensor of `n` words.
    pub fn tensor(&mut self, n: usize, bits: u32) -> Result<Dealing, Error> {
        self.begin(n, bits, false)
    }

    /// Begins additive shares of several tensors, which are written side by side.
    pub fn tensors(&mut self, all: &[Dealt]) -> Result<Vec<Dealing>, Error> {
        all.iter().map(|(n, bits)| self.tensor(*n, *bits)).collect()
    }

    /// Begins XOR shares of `n` whole words.
    pub fn bits(&mut self, n: usize) -> Result<Dealing, Error> {
        self.begin(n, 64, true)
    }

    /// Begins XOR shares of `n` words of fewer bits.
    pub fn some_bits(&mut self, n: usize, bits: u32) -> Result<Dealing, Error> {
        self.begin(n, bits, true)
    }

    fn begin(&mut self, n: usize, bits: u32, xor: bool) -> Result<Dealing, Error> {
        let seeded = seeded(self.step(), self.slot);
        let drawn = self.prg[seeded].words(self.slot, bits)?;
        self.slot += 1;
        let at = self.taken[1 - seeded];
        self.taken[1 - seeded] += packed_len(n, bits);
        let empty = || Wiped::new(Vec::new());
        Ok(Dealing { side: 1 - seeded, at, bits, xor, drawn, words: empty(), half: empty(), len: 0 })
    }

    /// What each evaluator draws for itself, in words of 64 bits: a tensor of no words to the other.
    pub fn own(&mut self) -> Result<[Words; 2], Error> {
        let slot = self.slot;
        self.slot += 1;
        let [first, second] = &mut self.prg;
        Ok([first.words(slot, 64)?, second.words(slot, 64)?])
    }

    /// Sends both evaluators the same words, as they are: two tensors, of which either evaluator ignores the one that it draws.
    pub fn both(&mut self, bits: u32, v: &[u64]) {
        for _ in 0..2 {
            let side = 1 - seeded(self.step(), self.slot);
            self.slot += 1;
            let len = packed_len(v.len(), bits);
            pack_to(v, bits, &mut self.out[side][self.taken[side]..][..len]);
            self.taken[side] += len;
        }
    }

    fn whole(&mut self, mut t: Dealing, v: Vec<u64>) {
        let v = Wiped::new(v);
        for part in v.chunks(BLOCK) {
            t.room(self, part.len()).copy_from_slice(part);
        }
        t.end(self);
    }

    /// Deals additive shares of `v` mod 2^bits.
    pub fn share(&mut self, bits: u32, v: Vec<u64>) -> Result<(), Error> {
        let t = self.tensor(v.len(), bits)?;
        self.whole(t, v);
        Ok(())
    }

    /// Deals XOR shares of words of so many bits.
    pub fn xor(&mut self, bits: u32, v: Vec<u64>) -> Result<(), Error> {
        let t = self.some_bits(v.len(), bits)?;
        self.whole(t, v);
        Ok(())
    }
}
