//! Products by several threads. Every one is exact, so that how it is divided shows in the time only, and that is decided by
//! shapes.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use rayon::{Scope, ThreadPool, ThreadPoolBuilder};

use super::input::Input;
use super::{Level, MR, Weights, linear};
use crate::Error;

/// Multiply-accumulates, of which a part has to have as many to be worth waking a thread for: some forty microseconds.
const PART: usize = 1 << 20;

/// Threads that wait for work to share; a clone stands for the same ones.
#[derive(Clone)]
pub struct Threads(Arc<ThreadPool>);

impl Threads {
    /// So many threads; 0 for one a core of the machine.
    ///
    /// # Errors
    /// [`Error::Device`]: the system does not give them.
    pub fn new(threads: usize) -> Result<Threads, Error> {
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("compute {i}"));
        pool.build().map(|pool| Threads(Arc::new(pool))).map_err(|e| Error::Device(format!("{threads} threads: {e}")))
    }

    /// Threads.
    pub fn count(&self) -> usize {
        self.0.current_num_threads()
    }

    /// Runs `work` on the calling thread, which may give jobs to these; returns when all are done.
    pub(crate) fn scope<'s, T>(&self, work: impl FnOnce(&Scope<'s>) -> T) -> T {
        self.0.in_place_scope(work)
    }

    /// Does the work on each of all these, some at once.
    pub(crate) fn each<T: Send>(&self, all: Vec<T>, work: impl Fn(T) + Send + Sync) {
        self.0.install(|| all.into_par_iter().for_each(work));
    }

    /// As [`linear`].
    pub fn linear(&self, x: &[u64], rows: usize, w: &Weights, bits: u32, out: &mut [u64]) {
        let (inp, width) = (w.cols_in(), w.rows_out());
        assert_eq!((x.len(), out.len()), (rows * inp, rows * width), "{rows} rows of {inp} inputs and {width} outputs");
        let parts = self.parts(rows * inp * width);
        if parts == 1 {
            return linear(x, rows, w, bits, out);
        }
        self.0.install(|| {
            let input = Input::new(Level::detect(), x, w, bits, true);
            let tall = rows.div_ceil(parts).next_multiple_of(input.tile().min(rows));
            let panels = w.panels().div_ceil(parts);
            if rows == 1 {
                out.par_chunks_mut(panels * w.panel()).enumerate().for_each(|(i, out)| {
                    input.outputs(0..1, i * panels..((i + 1) * panels).min(w.panels()), out);
                });
            } else if rows >= parts * MR {
                out.par_chunks_mut(tall * width).enumerate().for_each(|(i, out)| {
                    input.outputs(i * tall..((i + 1) * tall).min(rows), 0..w.panels(), out);
                });
            } else {
                let columns = |panels: Range<usize>| {
                    let columns = panels.start * w.panel()..(panels.end * w.panel()).min(width);
                    let mut out = vec![0; rows * columns.len()];
                    input.outputs(0..rows, panels, &mut out);
                    (columns, out)
                };
                let made: Vec<_> = split(w.panels(), parts).into_par_iter().map(columns).collect();
                for (columns, part) in made {
                    for (out, part) in out.chunks_exact_mut(width).zip(part.chunks_exact(columns.len())) {
                        out[columns.clone()].copy_from_slice(part);
                    }
                }
            }
        });
    }

    /// What `part` makes of each of some ranges that are `0..n` together, for `macs` multiply-accumulates in all.
    pub(crate) fn map<T: Send>(&self, n: usize, macs: usize, part: impl Fn(Range<usize>) -> T + Send + Sync) -> Vec<T> {
        let ranges = split(n, self.parts(macs));
        match ranges.len() {
            1 => ranges.into_iter().map(part).collect(),
            _ => self.0.install(|| ranges.into_par_iter().map(part).collect()),
        }
    }

    /// Into how many parts so many multiply-accumulates are divided.
    fn parts(&self, macs: usize) -> usize {
        (macs / PART).clamp(1, self.count())
    }
}

/// `0..n` in at most `parts` ranges of like lengths.
fn split(n: usize, parts: usize) -> Vec<Range<usize>> {
    let each = n.div_ceil(parts).max(1);
    (0..n).step_by(each).map(|from| from..(from + each).min(n)).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::noise;
    use super::*;

    #[test]
    fn every_division_gives_the_same_words() {
        let mut next = noise(7);
        for threads in [1, 2, 3, 5] {
            let pool = Threads::new(threads).unwrap();
            assert_eq!(pool.count(), threads);
            for (rows, inp, out) in [(1, 1500, 3001), (1, 4128, 1300), (3, 1001, 1500), (70, 300, 333), (23, 2047, 129)]
            {
                let x: Vec<u64> = (0..rows * inp).map(|_| next()).collect();
                // Of two bytes, of one, of four bits where there are whole blocks, and ternary.
                for shift in [0, 8, 12, 15] {
                    let mut w: Vec<i16> = (0..out * inp).map(|_| next() as i16 >> shift).collect();
                    if shift == 15 {
                        w.iter_mut().for_each(|w| *w += next() as i16 & 1);
                    }
                    let w = Weights::new(out, inp, &w);
                    for bits in [17, 32, 47, 62] {
                        let (mut want, mut got) = (vec![1; rows * out], vec![2; rows * out]);
                        linear(&x, rows, &w, bits, &mut want);
                        pool.linear(&x, rows, &w, bits, &mut got);
                        assert!(got == want, "{threads} threads: {rows} x {inp} -> {out}, {bits} bits");
                    }
                }
            }
            for n in [0, 1, 7, 64] {
                let made: Vec<usize> = pool.map(n, usize::MAX, |part| part.collect::<Vec<_>>()).concat();
                assert_eq!(made, (0..n).collect::<Vec<_>>());
            }
        }
        Threads::new(2).unwrap().linear(&[], 0, &Weights::new(2, 3, &[1; 6]), 32, &mut []);
    }
}
