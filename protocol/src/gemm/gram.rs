//! Gram matrices of rows of 16-bit integers, exact, so that every machine derives the same bounds from them.

use super::panels::Panels;
use super::{KC, Level, MR, NR};

/// `A A^T` of `rows` rows of `cols` integers, row-major.
///
/// By Cauchy and Schwarz no entry is larger than a row's sum of squares; each of these has to be below `2^31`.
pub fn gram(a: &[i16], rows: usize, cols: usize) -> Vec<i32> {
    assert_eq!(a.len(), rows * cols, "{rows} rows of {cols}");
    let mut out = vec![0; rows * rows];
    if a.is_empty() {
        return out;
    }
    let stride = cols.next_multiple_of(2);
    let weights = Panels::of(rows, cols, a);
    let mut padded = Vec::new();
    if stride != cols {
        for row in a.chunks_exact(cols) {
            padded.extend_from_slice(row);
            padded.push(0);
        }
    }
    let a = if stride == cols { a } else { &padded };
    let level = Level::detect();
    for from in (0..stride).step_by(KC) {
        let to = (from + KC).min(stride);
        for p in 0..weights.panels() {
            let panel = weights.panel(p, from..to);
            let columns = p * NR..(p * NR + NR).min(rows);
            // The rows from the panel's own on; the rest is its mirror.
            for first in (columns.start..rows).step_by(MR) {
                let count = MR.min(rows - first);
                let mut tile = [[0; NR]; MR];
                level.limb_tile(&a[first * stride + from..], stride, count, panel, &mut tile);
                for (r, sums) in tile[..count].iter().enumerate() {
                    let out = &mut out[(first + r) * rows..][columns.clone()];
                    out.iter_mut().zip(sums).for_each(|(o, s)| *o = o.wrapping_add(*s));
                }
            }
        }
    }
    for i in 0..rows {
        for j in 0..i {
            out[j * rows + i] = out[i * rows + j];
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::noise;
    use super::*;

    #[test]
    fn equals_sums_of_products() {
        let mut next = noise(3);
        for (rows, cols) in [(1, 1), (3, 5), (33, 7), (70, 130), (45, 4097)] {
            let a: Vec<i16> = (0..rows * cols).map(|_| next() as i16 >> 6).collect();
            let got = gram(&a, rows, cols);
            for (at, got) in got.into_iter().enumerate() {
                let (x, y) = (&a[at / rows * cols..][..cols], &a[at % rows * cols..][..cols]);
                let want: i64 = x.iter().zip(y).map(|(x, y)| i64::from(*x) * i64::from(*y)).sum();
                assert_eq!(i64::from(got), want, "{rows} x {cols} at {at}");
            }
        }
        assert!(gram(&[], 0, 4).is_empty());
    }
}
