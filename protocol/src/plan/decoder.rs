//! Planning a decoder: quantised weights and proven ranges, from which [`super::decode`] lays down a program for any number
//! of new rows after any number of past ones.
//!
//! A pre-norm block reads the residual stream `x` through norms only, so linear layers act on `y = x / rms(x)` with
//! `||y|| <= sqrt(d)`, whatever `x` is; gains are folded into weights, shifts into biases. Layer norms differ in that they take
//! a row's mean out: what is written to the residual is made to have none (see [`super::rows`]), and they are norms like the
//! others. Attention's outputs are convex combinations of values; `|silu(g)| <= |g|` and `|gelu(h)| <= |h|`. The residual's own bound
//! is the embedding's plus what every block can add ([`super::layer`]), and decides how its square is summed.
//!
//! A plan is a proof that every role makes for itself, from the checkpoint, a block at a time; evaluators keep the quantised
//! weights, the dealer and a client only what the program's digest and shapes are made of.

use super::Error;
use super::layer::{BlockPlan, Context, block};
use super::norm::{PreNorm, SMALLEST};
use super::rows::{Rows, WEIGHT, WIDEST, Wide, quantise, ring_of};
use super::{SLACK, norm, refuse, wide};
use crate::gates::pad;
use crate::gates::rowmax::LONGEST;
use crate::model::decoder::{Checkpoint, Config, DecoderLayer, DecoderModel, Embedding, NormKind, centre};
use crate::model::{Dense, Norm};
use crate::program::Program;

/// Ring of scores: wide, since proven ranges are far wider than what real texts use.
pub const K_SCORE: u32 = 36;
/// Bits of a row's largest exponential, as small as it may be.
pub const F_LARGEST: i32 = 11;
/// Scales of values, of the weighted values and of the reciprocal of attention.
pub const F_VALUE: i32 = 14;
pub const F_OUT: i32 = 16;
pub const F_RECIP: i32 = 19;

/// Whether a planner keeps the quantised weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// An evaluator, which applies them.
    Weights,
    /// A dealer or a client, which needs shapes, scales and digests only.
    Shapes,
}

/// Everything about a decoder that does not depend on how many tokens there are.
pub struct DecoderPlanner {
    pub(super) config: Config,
    /// Longest sequence: the model's, or what the row maximum takes.
    pub(super) longest: usize,
    pub(super) blocks: Vec<BlockPlan>,
    pub(super) last_norm: PreNorm,
    pub(super) head: Wide,
    /// Ring of the residual stream.
    pub(super) k: u32,
    /// Bound on an element of an embedded token.
    pub(super) embedded: f64,
    pub(super) model: [u8; 32],
}

/// A planner half way: the blocks so far.
struct Planning {
    config: Config,
    longest: usize,
    keep: bool,
    embedded: f64,
    smallest: f64,
    residual: f64,
    blocks: Vec<BlockPlan>,
}

impl Planning {
    fn new(c: &Config, table: &[f32], positions: Option<&[f32]>, keep: Keep) -> Planning {
        // Bounds on an element and on a row, and the mean squares of rows.
        let facts = |table: &[f32]| {
            let (mut element, mut row, mut squares) = (0f64, 0f64, Vec::new());
            for r in table.chunks_exact(c.hidden) {
                let mut r = wide(r);
                if c.norm == NormKind::Layer {
                    centre(&mut r);
                }
                element = r.iter().fold(element, |m, v| m.max(v.abs()));
                row = row.max(norm(&r));
                squares.push(norm(&r) * norm(&r) / c.hidden as f64);
            }
            (element, row, squares)
        };
        let (element, row, mut squares) = facts(table);
        let (shift, moved, _) = facts(positions.unwrap_or(&[]));
        // Rows of hardly used tokens may be as small as they like.
        squares.sort_by(f64::total_cmp);
        let common = squares.get(squares.len() / 50).copied().unwrap_or(SMALLEST);
        Planning {
            config: c.clone(),
            longest: c.max_positions.min(LONGEST),
            keep: keep == Keep::Weights,
            embedded: (element + shift) * SLACK,
            smallest: SMALLEST.min(common.max(SMALLEST / 1024.0)),
            residual: (row + moved) * SLACK,
            blocks: Vec::with_capacity(c.layers),
        }
    }

    fn layer(&mut self, l: &DecoderLayer) -> Result<(), Error> {
        let x = Context { c: &self.config, longest: self.longest, smallest: self.smallest, keep: self.keep };
        self.blocks.push(block(&format!("layer {}", self.blocks.len()), &x, l, &mut self.residual)?);
        Ok(())
    }

    fn last(self, n: &Norm, head: &Dense, model: [u8; 32]) -> Result<DecoderPlanner, Error> {
        let Planning { config: c, longest, keep, embedded, smallest, residual, blocks } = self;
        let rows = Rows::reading(&c, &[head], n);
        let (facts, root) = (rows.facts(), libm::sqrt(c.hidden as f64));
        let bounds: Vec<f64> = facts.iter().zip(&rows.bias).map(|(f, b)| f.norm * root + b.abs()).collect();
        let unit = facts.iter().fold(1e-30, |m: f64, f| m.max(f.largest)) / WEIGHT;
        let units = vec![unit; rows.len];
        let mut last_norm = PreNorm::new(&c, residual, smallest);
        last_norm.spare("final norm", ring_of(&bounds, &units, 0))?;
        let head = quantise("head", &rows, 0..rows.len, &units, &bounds, last_norm.f, keep)?;
        last_norm.k = head.k;
        let norms = blocks.iter().flat_map(|b| [&b.attention_norm, &b.mlp_norm]).chain([&last_norm]);
        // A share may be read in a narrower ring, never in a wider one.
        let heads = blocks.iter().filter_map(|b| Some(b.head_norm.as_ref()?.wide.k));
        let k = norms.map(|n| n.ring(&c)).chain(heads).fold(0, u32::max);
        if k > WIDEST {
            let reason = format!("proven up to {residual:.0}, which needs a ring of {k} bits");
            return Err(refuse("residual stream", reason));
        }
        Ok(DecoderPlanner { config: c, longest, blocks, last_norm, head, k, embedded, model })
    }
}

impl DecoderPlanner {
    /// Quantises the weights, which are kept, and proves the ranges.
    ///
    /// # Errors
    /// [`Error::Plan`] names the operation that cannot be bounded within its ring.
    pub fn new(model: &DecoderModel) -> Result<DecoderPlanner, Error> {
        let mut p = Planning::new(&model.config, model.embedding(), model.positions.as_deref(), Keep::Weights);
        model.layers.iter().try_for_each(|l| p.layer(l))?;
        p.last(&model.final_norm, &model.head, model.digest())
    }

    /// As [`Self::new`], from the files of a checkpoint a block at a time; and the tables that a client embeds with.
    ///
    /// # Errors
    /// [`Error::Model`] for a tensor that is missing, damaged or not supported, and those of [`Self::new`].
    pub fn read(mut checkpoint: Checkpoint, keep: Keep) -> Result<(DecoderPlanner, Embedding), Error> {
        let (config, digest) = (checkpoint.config().clone(), checkpoint.digest());
        let (table, positions) = checkpoint.tables()?;
        let mut p = Planning::new(&config, &table, positions.as_deref(), keep);
        drop(table);
        for i in 0..config.layers {
            p.layer(&checkpoint.layer(i)?)?;
        }
        let last = checkpoint.last()?;
        let planner = p.last(&last.norm, &last.head, digest)?;
        let tokens = if checkpoint.tied() {
            last.head.weight
        } else {
            drop(last);
            checkpoint.embedding()?
        };
        checkpoint.finish()?;
        Ok((planner, Embedding { config, tokens, positions, digest }))
    }

    /// Most positions of a sequence, prompt and answer together.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// Logits of a position.
    pub fn vocab(&self) -> usize {
        self.config.vocab
    }

    /// The program for `rows` new positions after `past` ones: logits of the last position, or of all new ones if `every`.
    /// Where positions are `marked`, all but the last row of several may be padding, and so may past ones; a single later row
    /// never is.
    ///
    /// The first program of a sequence carries the digest over the model that all later ones follow from; theirs is zero,
    /// since spelling out every parameter would take longer than to run them.
    ///
    /// # Errors
    /// [`Error::Plan`] for a sequence that is too long.
    pub fn program(&self, marked: bool, past: usize, rows: usize, every: bool) -> Result<Program, Error> {
        if rows == 0 || past + rows > self.longest {
            let reason = format!("{rows} positions after {past}, but the model takes {}", self.longest);
            return Err(refuse("input", reason));
        }
        super::decode::program(self, marked, past, rows, every)
    }
}

/// Levels by which a padded key is lowered where scores may be anything in their range: the range itself, and what makes
/// an exponential vanish.
pub fn hidden_levels(level_bits: u32) -> u32 {
    ((1 << level_bits) - 9 - pad::LEVELS) / 2 + pad::LEVELS
}
