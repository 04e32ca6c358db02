//! Certified bounds on matrices, in f64 with a fixed order of operations so that every party computes the same bits, and
//! in integers where matrices are large.

use crate::gemm::gram::gram;

/// A row-major f64 matrix.
#[derive(Clone)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Entries.
    pub data: Vec<f64>,
}

impl Matrix {
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.cols..][..self.cols]
    }

    /// `W diag(gain)` with each row then centred: what acts on a vector whose entries sum to zero.
    pub fn on_normalised(weight: &[f32], rows: usize, gain: &[f64]) -> Matrix {
        let cols = gain.len();
        let mut data = Vec::with_capacity(rows * cols);
        for r in weight.chunks_exact(cols) {
            let v: Vec<f64> = r.iter().zip(gain).map(|(w, g)| *w as f64 * g).collect();
            let mean = v.iter().sum::<f64>() / cols as f64;
            data.extend(v.iter().map(|x| x - mean));
        }
        Matrix { rows, cols, data }
    }

    /// Every row.
    pub fn each(&self) -> Vec<&[f64]> {
        self.data.chunks_exact(self.cols).collect()
    }

    /// Rows `at .. at + n`.
    pub fn slice(&self, at: usize, n: usize) -> Matrix {
        Matrix { rows: n, cols: self.cols, data: self.data[at * self.cols..][..n * self.cols].to_vec() }
    }

    /// `A A^T`.
    pub fn gram(&self) -> Matrix {
        let n = self.rows;
        let mut data = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let v = dot(self.row(i), self.row(j));
                (data[i * n + j], data[j * n + i]) = (v, v);
            }
        }
        Matrix { rows: n, cols: n, data }
    }

    /// `A^T A`.
    pub fn gram_columns(&self) -> Matrix {
        let n = self.cols;
        let mut data = vec![0.0; n * n];
        // The upper half; the lower is its mirror.
        for r in self.data.chunks_exact(n) {
            for (i, out) in data.chunks_exact_mut(n).enumerate() {
                out[i..].iter_mut().zip(&r[i..]).for_each(|(o, v)| *o += r[i] * v);
            }
        }
        for i in 0..n {
            for j in 0..i {
                data[i * n + j] = data[j * n + i];
            }
        }
        Matrix { rows: n, cols: n, data }
    }

    /// `A B` for square matrices.
    pub fn times(&self, b: &Matrix) -> Matrix {
        let n = self.rows;
        let mut data = vec![0.0; n * n];
        for (a, out) in self.data.chunks_exact(n).zip(data.chunks_exact_mut(n)) {
            for (x, row) in a.iter().zip(b.data.chunks_exact(n)) {
                out.iter_mut().zip(row).for_each(|(o, v)| *o += x * v);
            }
        }
        Matrix { rows: n, cols: n, data }
    }

    /// `A^T x`.
    pub fn transpose_times(&self, x: &[f64]) -> Vec<f64> {
        let mut out = vec![0.0; self.cols];
        for (r, x) in self.data.chunks_exact(self.cols).zip(x) {
            out.iter_mut().zip(r).for_each(|(o, v)| *o += x * v);
        }
        out
    }
}

/// Sum of products, in index order.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Four fixed lanes: the compiler may vectorise, and the order stays the same on every machine.
    let mut s = [0.0; 4];
    let (ca, cb) = (a.chunks_exact(4), b.chunks_exact(4));
    let tail: f64 = ca.remainder().iter().zip(cb.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in ca.zip(cb) {
        for i in 0..4 {
            s[i] += x[i] * y[i];
        }
    }
    s[0] + s[1] + s[2] + s[3] + tail
}

/// Euclidean norm.
pub fn norm(a: &[f64]) -> f64 {
    libm::sqrt(dot(a, a))
}

/// Upper bound on the largest eigenvalue of a product of positive semidefinite matrices, all of whose eigenvalues are real
/// and non-negative: `tr(M^(2^s))^(1 / 2^s)`, which is never below it and tends to it.
pub fn eigenvalue_bound(m: &Matrix, squarings: u32) -> f64 {
    let trace = |m: &Matrix| (0..m.rows).map(|i| m.data[i * m.rows + i]).sum::<f64>();
    let mut m = m.clone();
    let mut log = 0.0;
    for s in 0..=squarings {
        let t = trace(&m);
        if t <= 0.0 {
            return 0.0;
        }
        log += libm::log(t) / (1u64 << s) as f64;
        if s < squarings {
            m.data.iter_mut().for_each(|v| *v /= t);
            m = m.times(&m);
        }
    }
    // One part in 10^9 for the rounding of the sums.
    libm::exp(log) * (1.0 + 1e-9)
}

/// The nearest integer, ties to even, for magnitudes below `2^51`; what is larger stays out of any 16 bits.
#[inline]
pub fn nearest(v: f64) -> f64 {
    // The sum has no bits below one.
    const MAGIC: f64 = 1.5 * (1u64 << 52) as f64;
    (v + MAGIC) - MAGIC
}

/// Largest norm of a row of integers whose Gram matrix is exact.
const EXACT: f64 = 46_000.0;

/// Upper bound on the spectral norm of a matrix of `rows x cols` that `row` makes a row at a time, as often as it is asked.
///
/// The matrix is a multiple of one in 16-bit integers plus what rounding left; the norm of the sum is at most the sum of the
/// norms. The integers' Gram matrix `G` is exact, and the largest eigenvalue of `G` is at most `tr(G^(2^s))^(1 / 2^s)`, each
/// power taken in the same way. For large matrices this is some hundred times faster than [`eigenvalue_bound`].
pub fn spectral_bound(rows: usize, cols: usize, row: &mut dyn FnMut(usize) -> Vec<f64>) -> f64 {
    // The Gram matrix of the shorter side: of rows, or of columns.
    let (n, len) = (rows.min(cols), rows.max(cols));
    let across = cols < rows;
    let (mut largest, mut squares) = (0f64, vec![0.0; n]);
    for i in 0..rows {
        for (j, v) in row(i).into_iter().enumerate() {
            largest = largest.max(v.abs());
            squares[if across { j } else { i }] += v * v;
        }
    }
    let Some(scale) = scale(largest, &squares, len) else { return 0.0 };
    let (mut ints, mut left) = (vec![0i16; n * len], 0.0);
    for i in 0..rows {
        for (j, v) in row(i).into_iter().enumerate() {
            let q = nearest(v * scale);
            left += (v * scale - q) * (v * scale - q);
            ints[if across { j * len + i } else { i * len + j }] = q as i16;
        }
    }
    (libm::sqrt(eigenvalue(&gram(&ints, n, len), n, 2)) + libm::sqrt(left)) / scale * (1.0 + 1e-9)
}

/// What rows of these squares and largest entry are multiplied by to be exact; `None` for zeros.
fn scale(largest: f64, squares: &[f64], len: usize) -> Option<f64> {
    let norm = libm::sqrt(squares.iter().fold(0.0, |m, s| s.max(m)));
    // Rounding adds at most half a unit an entry.
    let by = ((EXACT - 0.5 * libm::sqrt(len as f64)) / norm).min(32_000.0 / largest);
    (norm > 0.0 && by.is_finite()).then_some(by)
}

/// Upper bound on the largest eigenvalue of a symmetric matrix of integers, by so many squarings.
fn eigenvalue(g: &[i32], n: usize, squarings: u32) -> f64 {
    let row_squares = |r: &[i32]| r.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
    let squares: Vec<f64> = g.chunks_exact(n).map(row_squares).collect();
    let frobenius = libm::sqrt(squares.iter().sum());
    let largest = g.iter().fold(0f64, |m, v| m.max(f64::from(*v).abs()));
    let Some(scale) = scale(largest, &squares, n).filter(|_| squarings > 0) else { return frobenius };
    let mut left = 0.0;
    let ints: Vec<i16> = g
        .iter()
        .map(|v| {
            let v = f64::from(*v) * scale;
            let q = nearest(v);
            left += (v - q) * (v - q);
            q as i16
        })
        .collect();
    // Symmetric, so the Gram matrix is the square.
    let bound = (libm::sqrt(eigenvalue(&gram(&ints, n, n), n, squarings - 1)) + libm::sqrt(left)) / scale;
    bound.min(frobenius)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spectral_bound_is_above_and_close() {
        let mut state = 1u64;
        let mut noise = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f64 / (1 << 24) as f64 - 0.5
        };
        for (rows, cols, outlier) in [(40, 90, 1.0), (90, 40, 1.0), (64, 64, 30.0), (1, 5, 1.0), (5, 1, 1.0)] {
            let mut m = Matrix { rows, cols, data: (0..rows * cols).map(|_| noise()).collect() };
            m.data[..cols].iter_mut().for_each(|v| *v *= outlier);
            let got = spectral_bound(rows, cols, &mut |i| m.row(i).to_vec());
            // Power iteration from below.
            let mut x: Vec<f64> = (0..cols).map(|_| noise()).collect();
            let mut below = 0.0;
            for _ in 0..500 {
                let y: Vec<f64> = (0..rows).map(|i| dot(m.row(i), &x)).collect();
                x = m.transpose_times(&y);
                below = libm::sqrt(norm(&x));
                x.iter_mut().for_each(|v| *v /= below * below);
            }
            assert!(got >= below && got < 1.4 * below, "{rows} x {cols}: {got} for {below}");
        }
        assert_eq!(spectral_bound(2, 3, &mut |_| vec![0.0; 3]), 0.0);
    }

    #[test]
    fn eigenvalue_bound_is_above_and_close() {
        let a = Matrix { rows: 2, cols: 2, data: vec![3.0, 1.0, 1.0, 3.0] };
        for s in [0, 3, 6] {
            let b = eigenvalue_bound(&a, s);
            assert!((4.0..=6.1).contains(&b), "{b}");
        }
        assert!(eigenvalue_bound(&a, 7) < 4.03);
    }
}
