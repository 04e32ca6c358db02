//! An evaluator's side of a step: its halves of the dealt tensors, drawn or unpacked as they are read.

use std::ops::Range;

use super::parts::Parts;
use super::{BLOCK, Dealt, index, seeded};
use crate::prg::{StepPrg, Words};
use crate::ring::{check_packed, packed_len, unpack_to, word_at};
use crate::wipe::Wiped;
use crate::{Error, Role};

/// An evaluator's side of one step: its halves of the dealt tensors, in the order they were dealt.
pub struct Take<'a> {
    prg: StepPrg,
    role: Role,
    slot: u32,
    pub(super) rest: &'a [u8],
    /// Words of the tensors so far.
    words: usize,
    parts: Parts,
}

/// An evaluator's half of a dealt tensor, drawn or unpacked as it is read: either in order, or entry by entry.
pub struct Half<'a> {
    source: Source<'a>,
    bits: u32,
    len: usize,
    /// Words that have entered the buffer.
    read: usize,
    buffer: Wiped<u64>,
    /// The buffer's words that wait.
    waiting: Range<usize>,
}

enum Source<'a> {
    Drawn(Box<Words>),
    Sent(&'a [u8]),
}

impl<'a> Half<'a> {
    /// The same tensor to be read in order from word `at` on, whatever has been read of this one; entries are numbered as in
    /// this one.
    pub fn from(&self, at: usize) -> Half<'a> {
        // Eight words begin at a byte.
        let read = at / 8 * 8;
        let source = match &self.source {
            Source::Drawn(w) => Source::Drawn(Box::new(w.from(read))),
            Source::Sent(bytes) => Source::Sent(bytes),
        };
        let mut half = Half { source, read, buffer: Wiped::new(Vec::new()), waiting: 0..0, ..*self };
        half.next(at - read);
        half
    }

    /// Fills `out` with the words that come next.
    pub fn read(mut self, out: &mut [u64]) {
        let waiting = self.waiting.len().min(out.len());
        let (head, tail) = out.split_at_mut(waiting);
        head.copy_from_slice(self.next(waiting));
        match &mut self.source {
            Source::Drawn(w) => w.next(tail),
            Source::Sent(bytes) => unpack_to(&bytes[self.read / 8 * self.bits as usize..], self.bits, tail),
        }
    }

    /// The next `n` words.
    ///
    /// # Panics
    /// If the tensor has fewer.
    pub fn next(&mut self, n: usize) -> &[u64] {
        if self.waiting.len() < n {
            self.buffer.copy_within(self.waiting.clone(), 0);
            let have = self.waiting.len();
            let more = (n - have).next_multiple_of(BLOCK).min(self.len - self.read);
            if self.buffer.len() < have + more {
                self.buffer.resize(have + more, 0);
            }
            let to = &mut self.buffer[have..have + more];
            match &mut self.source {
                Source::Drawn(w) => w.next(to),
                // A multiple of eight words ends at a byte.
                Source::Sent(bytes) => unpack_to(&bytes[self.read / 8 * self.bits as usize..], self.bits, to),
            }
            self.read += more;
            self.waiting = 0..have + more;
        }
        let from = self.waiting.start;
        self.waiting.start += n;
        &self.buffer[from..from + n]
    }

    /// Entry `i` of table `t`, where every table has `n` entries; tables are asked for in order.
    pub fn pick(&mut self, t: usize, n: usize, i: usize) -> u64 {
        match self.source {
            Source::Drawn(_) => self.next(n)[i],
            Source::Sent(bytes) => word_at(bytes, self.bits, t * n + i),
        }
    }

    /// Words from `at` on, out of order.
    pub fn at(&mut self, at: usize, out: &mut [u64]) {
        match &mut self.source {
            Source::Drawn(w) => {
                w.seek(at);
                w.next(out);
            }
            Source::Sent(bytes) => {
                out.iter_mut().enumerate().for_each(|(i, o)| *o = word_at(bytes, self.bits, at + i));
            }
        }
    }
}

impl<'a> Take<'a> {
    /// `msg` is the dealer's whole message for the generator's step.
    pub fn new(prg: StepPrg, role: Role, msg: &'a [u8]) -> Self {
        Take { prg, role, slot: 0, rest: msg, words: 0, parts: Parts::new(None) }
    }

    /// The same, so divided.
    pub(crate) fn by(self, parts: Parts) -> Self {
        Take { parts, ..self }
    }

    /// Makes `n` units of a gate's outputs in parts, of tensors that have been taken: `part` is given a range of units, and of
    /// each output what is theirs, where unit `u` begins at word `at(u)`.
    pub fn divide<const N: usize>(
        &self,
        n: usize,
        out: [&mut [u64]; N],
        at: impl Fn(usize) -> [usize; N],
        part: impl Fn(Range<usize>, [&mut [u64]; N]) + Send + Sync,
    ) {
        self.parts.divide((n, self.words), out, at, part);
    }

    /// This evaluator's half of the next tensor, of `len` words.
    pub fn half(&mut self, len: usize, bits: u32) -> Result<Half<'a>, Error> {
        let (step, slot) = (self.prg.step(), self.slot);
        self.slot += 1;
        self.words += len;
        let source = if seeded(step, slot) == index(self.role) {
            Source::Drawn(Box::new(self.prg.words(slot, bits)?))
        } else {
            let bytes = packed_len(len, bits);
            let Some((head, tail)) = self.rest.split_at_checked(bytes) else {
                return Err(Error::Malformed {
                    what: "dealt message",
                    reason: format!("step {step}: {} bytes missing", bytes - self.rest.len()),
                });
            };
            self.rest = tail;
            check_packed(head, len, bits)?;
            Source::Sent(head)
        };
        Ok(Half { source, bits, len, read: 0, buffer: Wiped::new(Vec::new()), waiting: 0..0 })
    }

    /// This evaluator's halves of the next tensors, which are read side by side.
    pub fn halves(&mut self, all: &[Dealt]) -> Result<Vec<Half<'a>>, Error> {
        all.iter().map(|(n, bits)| self.half(*n, *bits)).collect()
    }

    /// All of this evaluator's half of the next tensor.
    pub fn next(&mut self, n: usize, bits: u32) -> Result<Vec<u64>, Error> {
        let mut out = vec![0; n];
        self.half(n, bits)?.read(&mut out);
        Ok(out)
    }

    /// What this evaluator draws for itself, see [`super::Deal::own`].
    pub fn own(&mut self) -> Result<Words, Error> {
        let slot = self.slot;
        self.slot += 1;
        self.prg.words(slot, 64)
    }

    /// What is sent to both evaluators, see [`super::Deal::both`].
    pub fn both(&mut self, n: usize, bits: u32) -> Result<Vec<u64>, Error> {
        let mut out = vec![0; n];
        for _ in 0..2 {
            let half = self.half(n, bits)?;
            if let Source::Sent(_) = half.source {
                half.read(&mut out);
            }
        }
        Ok(out)
    }

    /// This evaluator, 0 or 1.
    pub fn index(&self) -> usize {
        index(self.role)
    }

    /// Whether this evaluator adds the public part of a result.
    pub fn leads(&self) -> bool {
        self.role == Role::E1
    }
}

/// [`Half::from`] of tensors that are read side by side.
pub fn from<'a>(halves: &[Half<'a>], at: usize) -> Vec<Half<'a>> {
    halves.iter().map(|half| half.from(at)).collect()
}
