//! Rotary positions (Su et al., 2021) in the rotate-half layout: value `i` of a head turns with value `i + head_dim / 2`.

use super::fields::Fields;
use crate::Error;

/// The angles that queries and keys are rotated by. No supported scaling multiplies the rotated values.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Radians a position, `head_dim / 2` values.
    pub inverse_frequencies: Vec<f64>,
}

impl Rope {
    /// `theta^(-2 i / head_dim)`.
    pub(super) fn new(theta: f64, head_dim: usize) -> Rope {
        let exponent = |i: usize| -2.0 * i as f64 / head_dim as f64;
        Rope { inverse_frequencies: (0..head_dim / 2).map(|i| libm::pow(theta, exponent(i))).collect() }
    }

    /// From `rope_theta` and `rope_scaling`, or from `rope_parameters`, which newer files have in their place.
    pub(super) fn read(f: &mut Fields, head_dim: usize) -> Result<Rope, Error> {
        let (older, newer) = (f.object("rope_scaling")?, f.object("rope_parameters")?);
        if older.is_some() && newer.is_some() {
            return f.refuse("rope_scaling", "and rope_parameters are set together, keep one".into());
        }
        let outside = f.theta("rope_theta", 10_000.0)?;
        let Some(mut scaling) = older.or(newer) else {
            return Ok(Rope::new(outside, head_dim));
        };
        // Where both are given, the one inside is the newer.
        let mut rope = Rope::new(scaling.theta("rope_theta", outside)?, head_dim);
        let (older, newer): (Option<String>, Option<String>) =
            (scaling.or("type", None)?, scaling.or("rope_type", None)?);
        match newer.or(older).as_deref() {
            None | Some("default") => {}
            Some("linear") => {
                let factor = scaling.positive("factor", None)?;
                rope.scale(|_| factor);
            }
            Some("llama3") => rope.llama3(&mut scaling)?,
            Some(other) => {
                return scaling.refuse("rope_type", format!("\"{other}\" is not supported, linear and llama3 are"));
            }
        }
        scaling.finish(&[])?;
        Ok(rope)
    }

    /// Divides each frequency by what `by` gives for it.
    pub(super) fn scale(&mut self, mut by: impl FnMut(f64) -> f64) {
        self.inverse_frequencies.iter_mut().for_each(|f| *f /= by(*f));
    }

    /// Llama 3.1: slow turns are divided by `factor`, fast ones kept, those between interpolated.
    fn llama3(&mut self, f: &mut Fields) -> Result<(), Error> {
        let factor = f.positive("factor", None)?;
        let (low, high) = (f.positive("low_freq_factor", None)?, f.positive("high_freq_factor", None)?);
        let original = f.size("original_max_position_embeddings")? as f64;
        if low >= high {
            return f.refuse("high_freq_factor", format!("{high} is not above low_freq_factor {low}"));
        }
        self.scale(|frequency| {
            let turns = original * frequency / (2.0 * std::f64::consts::PI);
            let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            1.0 / ((1.0 - smooth) / factor + smooth)
        });
        Ok(())
    }

    /// Rotates one head at `position`, in place.
    pub(crate) fn rotate(&self, head: &mut [f64], position: usize) {
        let (left, right) = head.split_at_mut(self.inverse_frequencies.len());
        for ((a, b), frequency) in left.iter_mut().zip(right).zip(&self.inverse_frequencies) {
            let (sin, cos) = libm::sincos(position as f64 * frequency);
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
