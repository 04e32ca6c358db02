//! Real factors of columns, and the integers that a rescale multiplies by: made once for a layer, shared by all programs.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::pow2;
use crate::gates::rescale::MOST_SHIFT;

/// Bits of the largest multiplier.
const BITS: i32 = 26;

/// A factor for every column, each times `2^power`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(from = "Vec<f64>", into = "Vec<f64>")]
pub struct Factors {
    values: Arc<Vec<f64>>,
    /// `round(2^shift value)`.
    mult: Arc<Vec<i64>>,
    shift: i32,
    power: i32,
    /// Largest magnitude of a value.
    top: f64,
    /// Whether every value is a power of two.
    by_shifts: bool,
}

impl From<Vec<f64>> for Factors {
    fn from(values: Vec<f64>) -> Factors {
        let top = values.iter().fold(1e-30f64, |m, c| m.max(c.abs()));
        let shift = BITS.saturating_sub(libm::ceil(libm::log2(top)) as i32);
        let mult = values.iter().map(|c| libm::round(c * pow2(shift)) as i64).collect();
        let by_shifts = values.iter().all(|s| s.to_bits().trailing_zeros() >= f64::MANTISSA_DIGITS - 1);
        Factors { values: Arc::new(values), mult: Arc::new(mult), shift, power: 0, top, by_shifts }
    }
}

impl From<Factors> for Vec<f64> {
    fn from(f: Factors) -> Vec<f64> {
        f.values.iter().map(|v| v * pow2(f.power)).collect()
    }
}

impl Factors {
    /// The same factor for so many columns.
    pub fn even(factor: f64, columns: usize) -> Factors {
        vec![factor; columns].into()
    }

    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Each times a power of two.
    pub fn times(&self, power: i32) -> Factors {
        Factors { power: self.power + power, ..self.clone() }
    }

    /// Largest magnitude.
    pub fn largest(&self) -> f64 {
        self.top * pow2(self.power)
    }

    /// Whether every factor is a power of two.
    pub fn by_shifts(&self) -> bool {
        self.by_shifts
    }

    /// Factors without the power of two, and its exponent.
    pub fn parts(&self) -> (Arc<Vec<f64>>, i32) {
        (Arc::clone(&self.values), self.power)
    }

    /// Integers and their binary exponent: factors are `mult / 2^shift`.
    pub fn fixed(&self) -> (Arc<Vec<i64>>, u32) {
        let shift = self.shift.saturating_sub(self.power);
        let fits = shift.clamp(0, MOST_SHIFT as i32);
        if fits == shift {
            return (Arc::clone(&self.mult), shift as u32);
        }
        let mult = self.values.iter().map(|c| libm::round(c * pow2(self.power + fits)) as i64).collect();
        (Arc::new(mult), fits as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_those_of_the_factors_whatever_the_power() {
        for (values, powers) in [(vec![0.3, -0.7, 1e-9], false), (vec![0.5, -4.0], true), (vec![0.0; 3], true)] {
            let f = Factors::from(values.clone());
            assert_eq!(f.by_shifts(), powers);
            for power in [-120, -90, -3, 0, 5, 24, 33] {
                let f = f.times(power - 2).times(2);
                let (mult, shift) = f.fixed();
                assert!(shift <= 100 && mult.iter().all(|m| m.abs() < 1 << 62));
                let top = f.largest();
                for (v, m) in values.iter().zip(mult.iter()) {
                    let (want, got) = (v * pow2(power), *m as f64 * pow2(-(shift as i32)));
                    assert!((want - got).abs() <= (top * pow2(-BITS + 1)).max(pow2(-101)), "{got} for {want}");
                }
                let whole: Vec<f64> = f.into();
                assert_eq!(whole, values.iter().map(|v| v * pow2(power)).collect::<Vec<_>>());
            }
        }
    }
}
