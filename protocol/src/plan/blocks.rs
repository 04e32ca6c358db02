//! Rows of checkpoints that were quantised in blocks: sixteen levels at most, equally far apart, in each 32 weights along the
//! inputs. Such rows stay so in integers, which the kernels read in five bits a weight.
//!
//! The levels are found in the values, whatever the format: half-precision scales and offsets are whole multiples of `2^-24`,
//! and so are weights made of them, exactly. A row that a norm's gain multiplied, or a mean was taken out of, has no levels.

use super::linalg::{nearest, norm};

/// Weights of a block.
const BLOCK: usize = 32;
/// What half-precision numbers are multiples of, inverted.
const FINEST: f64 = (1u64 << 24) as f64;

/// The levels of a block.
struct Levels {
    least: f64,
    apart: f64,
    /// Number of the largest.
    top: f64,
}

/// `None` where there are more than sixteen.
fn levels(block: &[f64]) -> Option<Levels> {
    let whole = |v: &f64| {
        let n = v * FINEST;
        (n.trunc() == n && n.abs() < (1u64 << 52) as f64).then_some(n as i64)
    };
    let least = block.iter().map(whole).try_fold(i64::MAX, |least, n| Some(least.min(n?)))?;
    let most = block.iter().filter_map(whole).fold(least, i64::max);
    let mut apart = most - least;
    for n in block.iter().filter_map(whole) {
        let mut rest = n - least;
        while rest > 0 {
            (apart, rest) = (rest, apart % rest);
        }
        if most - least > 15 * apart {
            return None;
        }
    }
    let top = (most - least).checked_div(apart).unwrap_or(0);
    Some(Levels { least: least as f64 / FINEST, apart: apart as f64 / FINEST, top: top as f64 })
}

/// Puts a row's weights in units into `ints`, as levels that are a number of sixteenths apart and rounded. They are within
/// some one and a half of them, half of it for the rounding. `false` where the row has no levels, or where a block would be
/// `grown` times as long as it is: what is proven of norms of whole blocks holds as for single weights that are rounded.
pub fn in_units(row: &[f64], unit: f64, grown: f64, ints: &mut Vec<f64>) -> bool {
    ints.clear();
    row.len().is_multiple_of(BLOCK)
        && row.chunks_exact(BLOCK).all(|block| {
            let Some(Levels { least, apart, top }) = levels(block) else { return false };
            let from = ints.len();
            // Levels in between make few ones no farther apart than many.
            let finer = if top > 0.0 { (15.0 / top).trunc() } else { 1.0 };
            let sixteenths = 16.0 * apart / finer / unit;
            // Where nearest ones make the block longer, such that are less far apart.
            [nearest(sixteenths), sixteenths.trunc()].into_iter().any(|sixteenths| {
                let level = |v: &f64| if apart > 0.0 { libm::round((v - least) / apart) * finer } else { 0.0 };
                let above = |v: &f64| ((level(v) * sixteenths + 8.0) / 16.0).trunc();
                let left: f64 = block.iter().map(|v| v / unit - above(v)).sum();
                let offset = nearest(left / BLOCK as f64);
                ints.truncate(from);
                ints.extend(block.iter().map(|v| offset + above(v)));
                norm(&ints[from..]) * unit <= norm(block) * grown
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::Weights;

    /// As a file of blocks gives them: a scale of eleven bits times four, plus an offset.
    fn row(apart: f32, least: f32) -> Vec<f64> {
        (0..2 * BLOCK).map(|i| f64::from(apart * ((i * 11 + i / 7) % 16) as f32 + least)).collect()
    }

    #[test]
    fn levels_stay_levels() {
        for (apart, least) in [(0.0137f32, -0.1021f32), (0.5, -4.0), (0.0625, 0.001), (0.0, 0.25), (0.0, 0.0)] {
            let half = |v: f32| f32::from_bits(v.to_bits() & !0x1fff);
            let row = row(half(apart), half(least));
            let largest = row.iter().fold(1e-30, |m: f64, v| m.max(v.abs()));
            let unit = largest / 4095.0;
            let mut ints = Vec::new();
            assert!(in_units(&row, unit, 1.01, &mut ints), "{apart}, {least}");
            for (w, v) in ints.iter().zip(&row) {
                assert!((w * unit - v).abs() <= 1.5 * unit && w.trunc() == *w, "{w} for {v}");
            }
            // The kernels find them.
            let words: Vec<i16> = ints.iter().map(|w| *w as i16).collect();
            assert!(Weights::new(1, words.len(), &words).bits() <= 5, "{apart}, {least}");
        }
    }

    #[test]
    fn rows_without_levels_have_none() {
        let mut ints = Vec::new();
        let with = row(0.0137, -0.1021);
        for (by, plus) in [(1.0 / 3.0, 0.0), (1.0, 1e-3), (f64::INFINITY, 0.0), (f64::NAN, 0.0)] {
            let other: Vec<f64> = with.iter().map(|v| v * by + plus).collect();
            assert!(!in_units(&other, 1e-3, 1.01, &mut ints), "{by}, {plus}");
        }
        assert!(!in_units(&with[1..], 1e-5, 1.01, &mut ints));
        // Units so large that a block would grow.
        let coarse = [0.5625; BLOCK];
        assert!(!in_units(&coarse, 1.0, 1.01, &mut ints));
    }
}
