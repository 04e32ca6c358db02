//! From logits to a token, in the clear.
//!
//! The order of operations is vLLM's (`v1/sample/sampler.py`), which agrees with transformers' `_get_logits_processor`
//! wherever both have the step: logit bias; repetition penalty (prompt and answer); frequency and presence penalties
//! (answer only); temperature, where zero means the largest logit; min-p; top-k; top-p over what top-k left; a draw.
//! Log-probabilities are those of the model itself, before any of these steps, as OpenAI reports them.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use zeroize::Zeroizing;

use super::{GenerateError, parameter};

/// Below this, a temperature means greedy (as vLLM has it): quotients would overflow.
const GREEDY_BELOW: f64 = 1e-5;
/// What stands for the logarithm of zero, which JSON cannot write; OpenAI's value.
const LOG_ZERO: f32 = -9999.0;

/// How to choose a token. The default is the model's own distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the largest. In [0, 100].
    pub temperature: f64,
    /// Keeps the smallest set of tokens with at least this probability. In (0, 1]; 1 is off.
    pub top_p: f64,
    /// Keeps the `k` most probable tokens and those equal to the last of them; 0 is off.
    pub top_k: usize,
    /// Drops tokens less probable than this times the most probable one. In [0, 1]; 0 is off.
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer. Above 0; 1 is off.
    pub repetition_penalty: f64,
    /// How many of the last tokens the repetition penalty looks at; `None` is all.
    pub repetition_window: Option<usize>,
    /// Subtracted once from each token of the answer. In [-2, 2].
    pub presence_penalty: f64,
    /// Subtracted from each token of the answer as often as it occurs. In [-2, 2].
    pub frequency_penalty: f64,
    /// Added to the logits of tokens; each in [-100, 100].
    pub logit_bias: Vec<(u32, f64)>,
    /// Makes the draws repeatable; `None` takes the system's randomness.
    pub seed: Option<u64>,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: None,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

impl Sampling {
    /// Always the largest logit.
    pub fn greedy() -> Sampling {
        Sampling { temperature: 0.0, ..Sampling::default() }
    }

    /// # Errors
    /// [`GenerateError::Parameter`] for the first value outside its range; NaN is outside every range.
    pub fn validate(&self) -> Result<(), GenerateError> {
        let within = |name, v: f64, low: f64, high: f64| match v >= low && v <= high {
            true => Ok(()),
            false => Err(parameter(name, format!("must lie between {low} and {high}, not {v}"))),
        };
        within("temperature", self.temperature, 0.0, 100.0)?;
        within("top_p", self.top_p, f64::MIN_POSITIVE, 1.0)
            .map_err(|_| parameter("top_p", format!("must be above 0 and at most 1, not {}", self.top_p)))?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return Err(parameter("repetition_penalty", format!("must be above 0, not {}", self.repetition_penalty)));
        }
        self.logit_bias.iter().try_for_each(|(_, b)| within("logit_bias", *b, -100.0, 100.0))
    }
}

/// A [`Sampling`] with its generator's state: one per answer.
pub struct Sampler {
    params: Sampling,
    rng: ChaCha20Rng,
}

impl Sampler {
    /// # Errors
    /// A parameter outside its range, or no randomness from the system.
    pub fn new(params: Sampling) -> Result<Sampler, GenerateError> {
        params.validate()?;
        let mut seed = [0; 32];
        match params.seed {
            Some(s) => seed[..8].copy_from_slice(&s.to_le_bytes()),
            None => getrandom::fill(&mut seed).map_err(|e| parameter("seed", format!("no randomness: {e}")))?,
        }
        Ok(Sampler { params, rng: ChaCha20Rng::from_seed(seed) })
    }

    /// The next token after `prompt` and `answer`, given its `[vocab]` logits. A NaN counts as minus infinity.
    ///
    /// # Errors
    /// [`GenerateError::Logits`] if no logit is finite; a bias for a token that the model does not have.
    pub fn sample(&mut self, logits: &[f32], prompt: &[u32], answer: &[u32]) -> Result<u32, GenerateError> {
        let p = &self.params;
        let mut z: Zeroizing<Vec<f64>> = Zeroizing::new(logits.iter().map(|&l| number(f64::from(l))).collect());
        for &(token, bias) in &p.logit_bias {
            match z.get_mut(token as usize) {
                Some(z) => *z += bias,
                None => return Err(parameter("logit_bias", format!("the model has no token {token}"))),
            }
        }
        penalise(p, &mut z, prompt, answer);

        // Candidates, most probable first; ties go to the lower id, so that greedy and drawn answers are repeatable.
        let finite = (0u32..).zip(z.iter().copied()).filter(|(_, z)| *z > f64::NEG_INFINITY);
        let mut c: Zeroizing<Vec<(u32, f64)>> = Zeroizing::new(finite.collect());
        let down = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let Some(&(best, top)) = c.iter().min_by(|a, b| down(a, b)) else {
            return Err(GenerateError::Logits(format!("none of {} is finite", logits.len())));
        };
        if p.temperature < GREEDY_BELOW {
            return Ok(best);
        }
        c.iter_mut().for_each(|(_, z)| *z = (*z - top) / p.temperature);
        if p.min_p > 0.0 {
            c.retain(|(_, z)| z.exp() >= p.min_p);
        }
        if p.top_k > 0 && p.top_k < c.len() {
            let kth = c.select_nth_unstable_by(p.top_k - 1, down).1.1;
            c.retain(|(_, z)| *z >= kth);
        }
        c.sort_unstable_by(down);
        let mut total: f64 = c.iter().map(|(_, z)| z.exp()).sum();
        if p.top_p < 1.0 {
            let mut before = 0.0;
            let kept = c.iter().take_while(|(_, z)| {
                let keep = before < p.top_p * total;
                before += z.exp();
                keep
            });
            let kept = kept.count().max(1);
            c.truncate(kept);
            total = c.iter().map(|(_, z)| z.exp()).sum();
        }
        // 53 uniform bits: every f64 in [0, 1) of that spacing.
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        for (token, z) in c.iter() {
            left -= z.exp();
            if left < 0.0 {
                return Ok(*token);
            }
        }
        // Rounding left a crumb beyond the last candidate.
        Ok(c.last().map_or(best, |c| c.0))
    }
}

/// Neither NaN nor plus infinity: differences of two results are defined.
fn number(x: f64) -> f64 {
    if x.is_nan() { f64::NEG_INFINITY } else { x.min(f64::MAX) }
}

fn penalise(p: &Sampling, z: &mut [f64], prompt: &[u32], answer: &[u32]) {
    if p.repetition_penalty != 1.0 {
        let all = prompt.len() + answer.len();
        let skip = all - p.repetition_window.unwrap_or(all).min(all);
        let seen: HashSet<u32> = prompt.iter().chain(answer).skip(skip).copied().collect();
        for t in seen {
            if let Some(z) = z.get_mut(t as usize) {
                *z = number(if *z > 0.0 { *z / p.repetition_penalty } else { *z * p.repetition_penalty });
            }
        }
    }
    if p.frequency_penalty != 0.0 || p.presence_penalty != 0.0 {
        let mut counts: HashMap<u32, f64> = HashMap::new();
        answer.iter().for_each(|t| *counts.entry(*t).or_default() += 1.0);
        for (t, n) in counts {
            if let Some(z) = z.get_mut(t as usize) {
                *z -= p.frequency_penalty * n + p.presence_penalty;
            }
        }
    }
}

/// A token's log-probability under the model, with the most probable alternatives.
#[derive(Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Natural logarithm; -9999 for zero.
    pub logprob: f32,
    /// The most probable tokens, first first; as many as asked for.
    pub top: Vec<(u32, f32)>,
}

/// Log-probability of `token`, and of the `top` most probable tokens, under `[vocab]` logits.
pub fn logprob(logits: &[f32], token: u32, top: usize) -> TokenLogprob {
    let max = logits.iter().fold(f64::NEG_INFINITY, |m, &l| m.max(number(f64::from(l))));
    let sum: f64 = logits.iter().map(|&l| (number(f64::from(l)) - max).exp()).sum();
    let log = |l: f32| {
        let p = (number(f64::from(l)) - max - sum.ln()) as f32;
        if p.is_finite() { p.max(LOG_ZERO) } else { LOG_ZERO }
    };
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(top + 1);
    for (i, &l) in (0u32..).zip(logits) {
        let l = if l.is_nan() { f32::NEG_INFINITY } else { l };
        if best.len() < top || best.last().is_some_and(|b| l > b.1) {
            let at = best.partition_point(|b| b.1.partial_cmp(&l) != Some(Ordering::Less));
            best.insert(at, (i, l));
            best.truncate(top);
        }
    }
    best.iter_mut().for_each(|b| b.1 = log(b.1));
    TokenLogprob { token, logprob: logits.get(token as usize).map_or(LOG_ZERO, |&l| log(l)), top: best }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(params: Sampling, logits: &[f32], draws: usize) -> Vec<f64> {
        let mut s = Sampler::new(Sampling { seed: Some(7), ..params }).unwrap();
        let mut n = vec![0.0; logits.len()];
        for _ in 0..draws {
            n[s.sample(logits, &[], &[]).unwrap() as usize] += 1.0 / draws as f64;
        }
        n
    }

    fn logits(p: &[f32]) -> Vec<f32> {
        p.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn greedy_takes_the_largest_and_the_first_of_equals() {
        let mut s = Sampler::new(Sampling::greedy()).unwrap();
        assert_eq!(s.sample(&[0.0, 3.0, 3.0, f32::NAN], &[], &[]).unwrap(), 1);
        assert_eq!(s.sample(&[f32::NAN, f32::NEG_INFINITY, -5.0], &[], &[]).unwrap(), 2);
        assert_eq!(s.sample(&[1.0, f32::INFINITY], &[], &[]).unwrap(), 1);
        assert!(matches!(s.sample(&[f32::NAN, f32::NEG_INFINITY], &[], &[]), Err(GenerateError::Logits(_))));
        assert!(matches!(s.sample(&[], &[], &[]), Err(GenerateError::Logits(_))));
    }

    #[test]
    fn temperature_sharpens_as_computed_by_hand() {
        // At temperature 1/2 probabilities are squared: 0.36 and 0.16 of 0.52.
        let f = frequencies(Sampling { temperature: 0.5, ..Sampling::default() }, &logits(&[0.6, 0.4]), 20_000);
        assert!((f[0] - 0.36 / 0.52).abs() < 0.01, "{f:?}");
    }

    #[test]
    fn filters_keep_what_their_definitions_say() {
        let p = logits(&[0.05, 0.4, 0.3, 0.15, 0.1]);
        let kept = |s: Sampling| -> Vec<usize> {
            frequencies(s, &p, 4000).iter().enumerate().filter(|(_, f)| **f > 0.0).map(|(i, _)| i).collect()
        };
        let d = Sampling::default;
        assert_eq!(kept(d()), [0, 1, 2, 3, 4]);
        assert_eq!(kept(Sampling { top_k: 2, ..d() }), [1, 2]);
        assert_eq!(kept(Sampling { top_k: 99, ..d() }), [0, 1, 2, 3, 4]);
        // 0.4 + 0.3 < 0.71 <= 0.4 + 0.3 + 0.15
        assert_eq!(kept(Sampling { top_p: 0.71, ..d() }), [1, 2, 3]);
        assert_eq!(kept(Sampling { top_p: 1e-9, ..d() }), [1]);
        // 0.3 * 0.4 = 0.12
        assert_eq!(kept(Sampling { min_p: 0.3, ..d() }), [1, 2, 3]);
        // top-p acts on what top-k left: 0.4/0.7 = 0.571 < 0.6
        assert_eq!(kept(Sampling { top_k: 2, top_p: 0.57, ..d() }), [1]);
        assert_eq!(kept(Sampling { top_k: 2, top_p: 0.6, ..d() }), [1, 2]);
        // Equals of the k-th stay.
        let f = frequencies(Sampling { top_k: 1, ..d() }, &[1.0, 1.0, 0.0], 100);
        assert!(f[0] > 0.0 && f[1] > 0.0 && f[2] == 0.0);
    }

    #[test]
    fn penalties_and_bias_move_the_largest_logit() {
        let pick = |s: Sampling, l: &[f32], prompt: &[u32], answer: &[u32]| {
            Sampler::new(Sampling { temperature: 0.0, ..s }).unwrap().sample(l, prompt, answer).unwrap()
        };
        let d = Sampling::default;
        // 4/2 < 3; negative logits are multiplied: -2*2 < -3.
        assert_eq!(pick(Sampling { repetition_penalty: 2.0, ..d() }, &[4.0, 3.0], &[0], &[]), 1);
        assert_eq!(pick(Sampling { repetition_penalty: 2.0, ..d() }, &[-2.0, -3.0], &[], &[0]), 1);
        let window = Sampling { repetition_penalty: 2.0, repetition_window: Some(1), ..d() };
        assert_eq!(pick(window, &[4.0, 3.0], &[0], &[1]), 0);
        // The other two look at the answer only: 4 - 2*0.6 = 2.8.
        assert_eq!(pick(Sampling { frequency_penalty: 0.6, ..d() }, &[4.0, 3.0], &[0, 0], &[0]), 0);
        assert_eq!(pick(Sampling { frequency_penalty: 0.6, ..d() }, &[4.0, 3.0], &[], &[0, 0]), 1);
        assert_eq!(pick(Sampling { presence_penalty: 0.9, ..d() }, &[4.0, 3.0], &[], &[0, 0, 0]), 0);
        assert_eq!(pick(Sampling { presence_penalty: 1.1, ..d() }, &[4.0, 3.0], &[], &[0]), 1);
        assert_eq!(pick(Sampling { logit_bias: vec![(2, 100.0)], ..d() }, &[4.0, 3.0, 0.0], &[], &[]), 2);
        // Bias comes before the repetition penalty: (1 + 2)/4 < 1.
        let both = Sampling { logit_bias: vec![(0, 2.0)], repetition_penalty: 4.0, ..d() };
        assert_eq!(pick(both, &[1.0, 1.0], &[0], &[]), 1);
    }

    #[test]
    fn a_seed_repeats_the_draws() {
        let l = vec![0.0; 1000];
        let draw = |seed| {
            let mut s = Sampler::new(Sampling { seed, ..Sampling::default() }).unwrap();
            (0..20).map(|_| s.sample(&l, &[], &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(Some(1)), draw(Some(1)));
        assert_ne!(draw(Some(1)), draw(Some(2)));
        assert_ne!(draw(None), draw(None));
    }

    #[test]
    fn every_parameter_is_refused_by_name_outside_its_range() {
        let d = Sampling::default;
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e9, 1e9] {
            for (name, s) in [
                ("temperature", Sampling { temperature: bad, ..d() }),
                ("top_p", Sampling { top_p: bad, ..d() }),
                ("min_p", Sampling { min_p: bad, ..d() }),
                ("presence_penalty", Sampling { presence_penalty: bad, ..d() }),
                ("frequency_penalty", Sampling { frequency_penalty: bad, ..d() }),
                ("logit_bias", Sampling { logit_bias: vec![(0, bad)], ..d() }),
            ] {
                assert!(
                    matches!(s.validate(), Err(GenerateError::Parameter { name: n, .. }) if n == name),
                    "{name} {bad}"
                );
            }
        }
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(Sampling { repetition_penalty: bad, ..d() }.validate().is_err());
        }
        let mut s = Sampler::new(Sampling { logit_bias: vec![(9, 1.0)], ..d() }).unwrap();
        assert!(matches!(s.sample(&[0.0], &[], &[]), Err(GenerateError::Parameter { name: "logit_bias", .. })));
    }

    #[test]
    fn extreme_logits_and_parameters_never_panic() {
        let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0, -0.0, 1e-40];
        for t in [0.0, 1e-5, 1.0, 100.0] {
            for r in [f64::MIN_POSITIVE, 1.0, f64::MAX] {
                for (top_p, min_p, top_k) in [(1.0, 0.0, 0), (f64::MIN_POSITIVE, 1.0, usize::MAX), (0.5, 0.5, 1)] {
                    let s =
                        Sampling { temperature: t, repetition_penalty: r, top_p, min_p, top_k, ..Sampling::default() };
                    let s =
                        Sampling { presence_penalty: -2.0, frequency_penalty: 2.0, repetition_window: Some(0), ..s };
                    for window in [Some(0), Some(3), Some(usize::MAX), None] {
                        let s = Sampling { repetition_window: window, ..s.clone() };
                        let got = Sampler::new(s).unwrap().sample(&values, &[0, 1, 2, 99], &[3, 4, 5, u32::MAX]);
                        assert!(got.is_ok_and(|t| t != 0 && t != 2));
                    }
                }
            }
        }
        assert_eq!(logprob(&values, 0, 3).logprob, LOG_ZERO);
        assert_eq!(logprob(&[], 4, 3).top.len(), 0);
        assert_eq!(logprob(&[f32::NAN; 4], 1, 2).logprob, LOG_ZERO);
    }

    #[test]
    fn logprobs_are_those_of_the_softmax() {
        let l = logprob(&logits(&[0.5, 0.125, 0.125, 0.25]), 3, 3);
        assert!((l.logprob - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!(l.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 3, 1]);
        assert_eq!(l.top[1].1, l.logprob);
        assert!(logprob(&[1.0, 2.0], 0, 0).top.is_empty());
    }
}
