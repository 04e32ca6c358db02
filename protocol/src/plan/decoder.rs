//! Planning a decoder: quantised weights and proven ranges, from which [`super::decode`] lays down a program for any number
//! of new rows after any number of past ones.
//!
//! A pre-norm block reads the residual stream `x` through norms only, so linear layers act on `y = x / rms(x)` with
//! `||y|| <= sqrt(d)`, whatever `x` is; gains are folded into weights, shifts into biases. Layer norms differ in that they take
//! a row's mean out: what is written to the residual is made to have none (see [`super::rows`]), and they are norms like the
//! others. Attention's outputs are convex combinations of values; `|silu(g)| <= |g|` and `|gelu(h)| <= |h|`. The residual's own bound
//! is the embedding's plus what every block can add ([`super::layer`]), and decides how its square is summed.
//!
//! A plan is a proof that every role makes for itself, from the checkpoint, a few blocks at a time; evaluators keep the quantised
//! weights, the dealer and a client only what the program's digest and shapes are made of.

use std::borrow::Cow;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};

use super::Error;
use super::kept::{Progress, Shelf};
use super::layer::{BlockPlan, Context, bounded};
use super::norm::{F_INPUT, PreNorm, SMALLEST};
use super::rows::{Rows, WEIGHT, WIDEST, Wide, quantise, ring_of};
use super::{SLACK, norm, refuse, wide};
use crate::gates::pad;
use crate::gates::rowmax::LONGEST;
use crate::lock;
use crate::model::decoder::{Checkpoint, Config, DecoderLayer, DecoderModel, Embedding, NormKind, centre};
use crate::model::{Dense, Norm};
use crate::program::Program;

/// Ring of scores: wide, since proven ranges are far wider than what real texts use.
pub const K_SCORE: u32 = 36;
/// Bits of a row's largest exponential, as small as it may be.
pub const F_LARGEST: i32 = 13;
/// Scales of attention's reciprocal, and most and fewest of the weighted values: those are sums of exponentials times values,
/// and a row whose largest exponential is `2^-12` has as many bits less of them, whereas its reciprocal has as many more.
pub const F_RECIP: i32 = 14;
pub const F_OUT: (i32, i32) = (24, 18);
/// Degree of the polynomials that functions of a row's scalar are made of, and bits of a position in a window.
pub const DEGREE: usize = 4;
pub const RHO: u32 = 10;

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

/// Most blocks that are planned at once: each of them is held in `f32`.
const SIDE_BY_SIDE: usize = 8;

/// The residual's bound before one block after another, for those who plan them side by side.
struct Residuals {
    /// The block whose turn it is, the bound before it, and the first block that failed.
    at: Mutex<(usize, f64, usize)>,
    moved: Condvar,
}

impl Residuals {
    fn new(first: f64) -> Residuals {
        Residuals { at: Mutex::new((0, first, usize::MAX)), moved: Condvar::new() }
    }

    /// Waits for the turn of block `i`, and gives the bound before it, from which `after` makes the next block's.
    fn pass(&self, i: usize, after: impl FnOnce(f64) -> f64) -> Option<f64> {
        let waiting = self.moved.wait_while(lock(&self.at), |at| at.0 != i && at.2 > i);
        let mut at = waiting.unwrap_or_else(PoisonError::into_inner);
        if at.2 < i {
            return None;
        }
        let before = at.1;
        (at.0, at.1) = (i + 1, after(before));
        self.moved.notify_all();
        Some(before)
    }

    /// Block `i` failed: those after it need not wait.
    fn stop(&self, i: usize) {
        let mut at = lock(&self.at);
        at.2 = at.2.min(i);
        self.moved.notify_all();
    }

    fn stopped(&self) -> bool {
        lock(&self.at).2 < usize::MAX
    }

    fn last(&self) -> f64 {
        lock(&self.at).1
    }
}

/// Says that a block failed unless it is forgotten, be it by a panic.
struct Stopping<'a>(&'a Residuals, usize);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.stop(self.1);
    }
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
            // Grows as files vouch for layers.
            blocks: Vec::new(),
        }
    }

    /// Plans all blocks, several at a time; `take` is asked for one after the other.
    fn blocks<'m>(
        &mut self,
        take: impl FnMut(usize) -> Result<Cow<'m, DecoderLayer>, Error> + Send,
        told: &(dyn Fn(Progress) + Sync),
    ) -> Result<(), Error> {
        let x = Context { c: &self.config, longest: self.longest, smallest: self.smallest, keep: self.keep };
        let layers = self.config.layers;
        let (source, made) = (Mutex::new((0, take)), Mutex::new(Vec::new()));
        let residuals = Residuals::new(self.residual);
        let work = || {
            loop {
                let (i, layer) = {
                    let mut source = lock(&source);
                    let i = source.0;
                    if i == layers || residuals.stopped() {
                        return;
                    }
                    source.0 += 1;
                    (i, (source.1)(i))
                };
                let name = format!("layer {i}");
                let plan = || {
                    let layer = layer?;
                    let bounded = bounded(&name, &x, &layer)?;
                    // None where an earlier block failed, which says why.
                    let Some(before) = residuals.pass(i, |before| bounded.residuals(before)[1]) else {
                        return Ok(None);
                    };
                    bounded.plan(&name, &x, before).map(Some)
                };
                let stopping = Stopping(&residuals, i);
                let plan = plan();
                if plan.is_ok() {
                    std::mem::forget(stopping);
                }
                let mut made = lock(&made);
                made.push((i, plan));
                told(Progress::Planned(made.len(), layers));
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(SIDE_BY_SIDE).min(layers);
        std::thread::scope(|s| {
            (1..threads).for_each(|_| drop(s.spawn(work)));
            work();
        });
        self.residual = residuals.last();
        let mut made = made.into_inner().unwrap_or_else(PoisonError::into_inner);
        made.sort_by_key(|(i, _)| *i);
        for (_, plan) in made {
            self.blocks.extend(plan?);
        }
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
        let head = quantise("head", &rows, 0..rows.len, &units, &bounds, F_INPUT, keep)?;
        last_norm.read_in(head.k);
        let norms = blocks.iter().flat_map(|b| [&b.attention_norm, &b.mlp_norm]).chain([&last_norm]);
        // A share may be read in a narrower ring, never in a wider one.
        let heads = blocks.iter().flat_map(|b| [&b.query, &b.key]).filter(|p| p.norm.is_some()).map(|p| p.wide.k);
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
        p.blocks(|i| Ok(Cow::Borrowed(&model.layers[i])), &|_| ())?;
        p.last(&model.final_norm, &model.head, model.digest())
    }

    /// As [`Self::new`], from the files of a checkpoint a block at a time; and the tables that a client embeds with.
    ///
    /// # Errors
    /// [`Error::Model`] for a tensor that is missing, damaged or not supported, and those of [`Self::new`].
    pub fn read(checkpoint: Checkpoint, keep: Keep) -> Result<(DecoderPlanner, Embedding), Error> {
        Self::read_telling(checkpoint, keep, &|_| ())
    }

    /// As [`Self::read`], of a directory, from the shelf where it has the plan; the plan of a large model is kept there.
    ///
    /// # Errors
    /// As [`Self::read`]; a shelf makes none.
    pub fn load(
        dir: &Path,
        keep: Keep,
        shelf: Option<&Shelf>,
        told: &(dyn Fn(Progress) + Sync),
    ) -> Result<(DecoderPlanner, Embedding), Error> {
        let mut checkpoint = Checkpoint::open(dir)?;
        let (config, digest) = (checkpoint.config().clone(), checkpoint.digest());
        let Some(shelf) = shelf.filter(|s| s.takes(&config)) else {
            return Self::read_telling(checkpoint, keep, told);
        };
        if let Some((planner, path)) = shelf.find(&config, digest, keep) {
            told(Progress::Found(&path));
            let (tokens, positions) = checkpoint.tables()?;
            return Ok((planner, Embedding { config, tokens, positions, digest }));
        }
        let (mut planner, embedding) = Self::read_telling(checkpoint, keep, told)?;
        match shelf.keep(&mut planner) {
            Ok(path) => told(Progress::Kept(&path)),
            Err(e) => told(Progress::NotKept(shelf.dir(), &e)),
        }
        Ok((planner, embedding))
    }

    fn read_telling(
        mut checkpoint: Checkpoint,
        keep: Keep,
        told: &(dyn Fn(Progress) + Sync),
    ) -> Result<(DecoderPlanner, Embedding), Error> {
        let (config, digest) = (checkpoint.config().clone(), checkpoint.digest());
        let (table, positions) = checkpoint.tables()?;
        let mut p = Planning::new(&config, &table, positions.as_deref(), keep);
        drop(table);
        p.blocks(|i| checkpoint.layer(i).map(Cow::Owned), told)?;
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
