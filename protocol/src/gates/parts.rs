//! An evaluator's work on one operation in parts, on several threads.
//!
//! A gate makes its outputs unit by unit: a row, or 64 elements whose bits are a word. A part is a range of units, with its own
//! slices of the outputs, and reads the dealt tensors from its own place on ([`super::Half::from`]): every word is what it is in
//! one part. How many parts there are depends on how many words are dealt, which shapes say, and on the number of threads; never
//! on a value.

use std::ops::Range;

use crate::gemm::Threads;

/// Dealt words of which a part has as many to be worth waking a thread for: some fifty microseconds' work.
const LEAST: usize = 1 << 14;

/// Parts for each thread, so that one that is late, or has longer rows, holds up the others less.
const EACH: usize = 2;

/// What divides work.
#[derive(Clone)]
pub(crate) struct Parts {
    threads: Option<Threads>,
    least: usize,
}

impl Parts {
    /// Among these threads; without them everything is one part, on the calling thread.
    pub fn new(threads: Option<Threads>) -> Parts {
        Parts { threads, least: LEAST }
    }

    /// As many parts as there can be.
    #[cfg(test)]
    pub fn least(threads: Threads) -> Parts {
        Parts { threads: Some(threads), least: 1 }
    }

    /// Units of a part, for `n` units of work on so many words.
    pub fn units(&self, n: usize, words: usize) -> usize {
        let parts = self.threads.as_ref().map_or(1, |t| (words / self.least).clamp(1, EACH * t.count()));
        n.div_ceil(parts).max(1)
    }

    /// Does every part's work.
    pub fn each<T: Send>(&self, mut parts: Vec<T>, work: impl Fn(T) + Send + Sync) {
        match &self.threads {
            Some(threads) if parts.len() > 1 => threads.each(parts, work),
            _ => parts.drain(..).for_each(work),
        }
    }

    /// Makes `n` units of work on so many words, where unit `u` begins at word `at(u)` of each output.
    pub fn divide<const N: usize>(
        &self,
        (n, words): (usize, usize),
        mut out: [&mut [u64]; N],
        at: impl Fn(usize) -> [usize; N],
        work: impl Fn(Range<usize>, [&mut [u64]; N]) + Send + Sync,
    ) {
        let each = self.units(n, words);
        if each >= n {
            return work(0..n, out);
        }
        let cut = |from: usize| {
            let to = (from + each).min(n);
            let (starts, ends) = (at(from), at(to));
            let own = std::array::from_fn(|i| {
                let rest = std::mem::take(&mut out[i]);
                let len = if to == n { rest.len() } else { ends[i] - starts[i] };
                let (head, tail) = rest.split_at_mut(len);
                out[i] = tail;
                head
            });
            (from..to, own)
        };
        let parts = (0..n).step_by(each).map(cut).collect();
        self.each(parts, |(units, own)| work(units, own));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_made_once_in_its_place() {
        let pool = Threads::new(3).unwrap();
        let ways = [Parts::new(None), Parts::new(Some(pool.clone())), Parts::least(pool)];
        for parts in &ways {
            for n in [0, 1, 5, 6, 7, 100, 1000] {
                // Unit `u` has `u % 3` words of one output and two of the other, of which the last is short by one.
                let first = |u: usize| (0..u).map(|u| u % 3).sum::<usize>();
                let (mut a, mut b) = (vec![0; first(n)], vec![0; (2 * n).saturating_sub(1)]);
                parts.divide(
                    (n, 64 * n),
                    [&mut a, &mut b],
                    |u| [first(u), 2 * u],
                    |units, [a, b]| {
                        let own = units.clone().flat_map(|u| std::iter::repeat_n(u as u64 + 1, u % 3));
                        assert_eq!(a.len(), units.clone().map(|u| u % 3).sum::<usize>());
                        a.iter_mut().zip(own).for_each(|(a, u)| *a += u);
                        b.chunks_mut(2).zip(units).for_each(|(b, u)| b.iter_mut().for_each(|b| *b += u as u64 + 1));
                    },
                );
                let want = (0..n).flat_map(|u| std::iter::repeat_n(u as u64 + 1, u % 3));
                assert!(a.into_iter().eq(want));
                assert!(b.iter().enumerate().all(|(i, b)| *b == i as u64 / 2 + 1));
            }
        }
        assert_eq!((ways[0].units(10, 1 << 30), ways[1].units(12, 1 << 30), ways[1].units(12, 100)), (10, 2, 12));
    }
}
