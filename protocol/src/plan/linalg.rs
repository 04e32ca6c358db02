//! Certified bounds on matrices, in f64 with a fixed order of operations so that every party computes the same bits.

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

    /// Rows `at .. at + n`.
    pub fn slice(&self, at: usize, n: usize) -> Matrix {
        Matrix { rows: n, cols: self.cols, data: self.data[at * self.cols..][..n * self.cols].to_vec() }
    }

    /// `A A^T`.
    pub fn gram(&self) -> Matrix {
        let n = self.rows;
        let data = (0..n * n).map(|i| dot(self.row(i / n), self.row(i % n))).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

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
