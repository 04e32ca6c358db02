//! Decoder language models: one description of every supported family, read from published files, and its float64
//! reference.
//!
//! A directory holds either `config.json` with `model.safetensors` (or `model.safetensors.index.json` and its shards), or
//! one `*.gguf` file; where it has both, the safetensors are read. Every field of a configuration is either understood, or
//! known not to change what is computed, or refused by name with its value; every tensor is either used or refused.

mod embedding;
mod fields;
mod gated;
mod gguf;
mod gpt2;
mod llama;
mod llama_gguf;
mod mistral;
mod plaintext;
mod qwen2;
mod qwen3;
mod rope;
mod source;
#[cfg(test)]
mod tests;
mod weights;

use std::path::{Path, PathBuf};

use super::{Dense, Norm, config};
use crate::Error;
pub use embedding::Embedding;
pub(crate) use embedding::centre;
use fields::Fields;
pub use plaintext::Cache;
pub use rope::Rope;
use weights::Weights;

/// How rows are normalised before attention, before the MLP and at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `w x / sqrt(mean(x^2) + eps)` (Zhang and Sennrich, 2019).
    Rms,
    /// `w (x - mean(x)) / sqrt(var(x) + eps) + b`.
    Layer,
}

/// The MLP's nonlinearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + exp(-x))`.
    Silu,
    /// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`.
    GeluNew,
}

/// The facts that decide the shape of what is computed. All are public.
#[derive(Clone, Debug)]
pub struct Config {
    /// `model_type` of the checkpoint, such as `qwen2`.
    pub family: &'static str,
    /// Number of blocks.
    pub layers: usize,
    /// Width of a row.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; query head `h` reads head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Values in a head; `heads * head_dim` need not be `hidden`.
    pub head_dim: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Number of token ids.
    pub vocab: usize,
    /// Longest sequence, prompt and answer together.
    pub max_positions: usize,
    /// The kind of every norm of the model.
    pub norm: NormKind,
    /// Added to the mean square or to the variance.
    pub eps: f64,
    /// The MLP's nonlinearity.
    pub activation: Activation,
    /// Rotary positions; `None` where positions are learned rows.
    pub rope: Option<Rope>,
    /// Starts a sequence.
    pub bos: Option<u32>,
    /// Each ends an answer.
    pub eos: Vec<u32>,
}

/// One pre-norm block: `x += attention(norm(x))`, then `x += mlp(norm(x))`.
///
/// A bias or a norm's shift that the family does not have is zeros.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    /// Before attention.
    pub attention_norm: Norm,
    /// `hidden` to `heads * head_dim`.
    pub query: Dense,
    /// `hidden` to `kv_heads * head_dim`.
    pub key: Dense,
    /// `hidden` to `kv_heads * head_dim`.
    pub value: Dense,
    /// Of each head of queries and of keys, before rotation; `head_dim` values each, of kind [`NormKind::Rms`].
    pub query_key_norm: Option<(Norm, Norm)>,
    /// `heads * head_dim` to `hidden`.
    pub output: Dense,
    /// Before the MLP.
    pub mlp_norm: Norm,
    /// The MLP.
    pub mlp: Mlp,
}

/// The MLP of a block, with `f` the model's [`Activation`].
#[derive(Clone, Debug)]
pub enum Mlp {
    /// `down(f(gate(x)) * up(x))`.
    Gated {
        /// `hidden` to `intermediate`.
        gate: Dense,
        /// `hidden` to `intermediate`.
        up: Dense,
        /// `intermediate` to `hidden`.
        down: Dense,
    },
    /// `down(f(up(x)))`.
    Plain {
        /// `hidden` to `intermediate`.
        up: Dense,
        /// `intermediate` to `hidden`.
        down: Dense,
    },
}

/// A checkpoint whose files were read over once, for the digest and for where tensors lie; a part is read when it is
/// asked for, so that whoever needs one part at a time holds no more.
pub struct Checkpoint {
    family: Family,
    weights: Weights,
}

/// Which tensors there are, and what of the configuration decides that.
enum Family {
    Gated(gated::Gated),
    Gpt2(gpt2::Gpt2),
}

/// What comes after the last block.
pub(crate) struct Last {
    pub norm: Norm,
    /// `hidden` to `vocab`: the logits.
    pub head: Dense,
}

impl Checkpoint {
    /// Reads a directory's configuration and where its tensors lie.
    ///
    /// # Errors
    /// [`Error::Model`] names the file, the field or the tensor that is damaged or not supported.
    pub fn open(dir: &Path) -> Result<Checkpoint, Error> {
        if !dir.is_dir() {
            return refuse(format!("{} is not a directory", dir.display()));
        }
        if !weights::present(dir)
            && let Some(path) = gguf_of(dir)?
        {
            return llama_gguf::open(&path);
        }
        let bytes = config::read(&dir.join("config.json"))?;
        let mut fields = Fields::parse("config.json", &bytes)?;
        let mut family = match fields.required::<String>("model_type")?.as_str() {
            "llama" => Family::Gated(llama::read(fields)?),
            "mistral" => Family::Gated(mistral::read(fields)?),
            "qwen2" => Family::Gated(qwen2::read(fields)?),
            "qwen3" => Family::Gated(qwen3::read(fields)?),
            "gpt2" => Family::Gpt2(gpt2::read(fields)?),
            other => {
                return refuse(format!(
                    "config.json: model_type \"{other}\" is not supported, llama, mistral, qwen2, qwen3 and gpt2 are"
                ));
            }
        };
        ends_of_answers(family.config_mut(), dir)?;
        Ok(Checkpoint { family, weights: Weights::read(dir, &bytes)? })
    }

    /// The shape and the constants.
    pub fn config(&self) -> &Config {
        match &self.family {
            Family::Gated(f) => &f.config,
            Family::Gpt2(f) => &f.config,
        }
    }

    /// See [`DecoderModel::digest`].
    pub fn digest(&self) -> [u8; 32] {
        self.weights.digest
    }

    /// The tables of tokens, and of positions where they are learned; once. That of tokens is not kept while blocks are read:
    /// it is read again at the end, as the head's weight or by [`Self::embedding`].
    pub(crate) fn tables(&mut self) -> Result<(Vec<f32>, Option<Vec<f32>>), Error> {
        self.config().check()?;
        let positions = match &self.family {
            Family::Gated(_) => None,
            Family::Gpt2(f) => Some(f.positions(&mut self.weights)?),
        };
        let (table, shape) = self.table();
        Ok((self.weights.peek(&table, &shape)?, positions))
    }

    /// Name and shape of the table of tokens.
    fn table(&self) -> (String, [usize; 2]) {
        let name = match &self.family {
            Family::Gated(_) => gated::Gated::TABLE.into(),
            Family::Gpt2(_) => gpt2::Gpt2::table(&self.weights),
        };
        (name, [self.config().vocab, self.config().hidden])
    }

    /// Block `i`; once each.
    pub(crate) fn layer(&mut self, i: usize) -> Result<DecoderLayer, Error> {
        match &self.family {
            Family::Gated(f) => f.layer(&mut self.weights, i),
            Family::Gpt2(f) => f.layer(&mut self.weights, i),
        }
    }

    /// What follows the blocks; once.
    pub(crate) fn last(&mut self) -> Result<Last, Error> {
        match &self.family {
            Family::Gated(f) => f.last(&mut self.weights),
            Family::Gpt2(f) => f.last(&mut self.weights),
        }
    }

    /// Whether the head's weight, which was read, was the table of tokens.
    pub(crate) fn tied(&self) -> bool {
        !self.weights.has(&self.table().0)
    }

    /// The table of tokens where it is not the head's weight; once.
    pub(crate) fn embedding(&mut self) -> Result<Vec<f32>, Error> {
        let (table, shape) = self.table();
        self.weights.take(&table, &shape)
    }

    /// Refuses tensors that nobody took.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        self.weights.finish()
    }

    /// Everything.
    pub(crate) fn model(mut self) -> Result<DecoderModel, Error> {
        let (_, positions) = self.tables()?;
        let layers = (0..self.config().layers).map(|i| self.layer(i)).collect::<Result<_, _>>()?;
        let Last { norm: final_norm, head } = self.last()?;
        let embedding = if self.tied() { None } else { Some(self.embedding()?) };
        self.finish()?;
        let (config, digest) = (self.config().clone(), self.digest());
        Ok(DecoderModel { config, embedding, positions, layers, final_norm, head, digest })
    }
}

impl Family {
    fn config_mut(&mut self) -> &mut Config {
        match self {
            Family::Gated(f) => &mut f.config,
            Family::Gpt2(f) => &mut f.config,
        }
    }
}

/// A model as its authors published it, with every weight once, as `f32`.
pub struct DecoderModel {
    /// The shape and the constants.
    pub config: Config,
    /// `None` where the head's weight is the table.
    embedding: Option<Vec<f32>>,
    /// Learned positions, row-major, `max_positions x hidden`.
    pub positions: Option<Vec<f32>>,
    /// `config.layers` blocks.
    pub layers: Vec<DecoderLayer>,
    /// After the last block.
    pub final_norm: Norm,
    /// `hidden` to `vocab`: the logits.
    pub head: Dense,
    digest: [u8; 32],
}

impl std::fmt::Debug for DecoderModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DecoderModel").field("config", &self.config).field("tied", &self.tied()).finish_non_exhaustive()
    }
}

impl DecoderModel {
    /// Reads a directory.
    ///
    /// # Errors
    /// [`Error::Model`] names the file, the field or the tensor that is missing, damaged or not supported.
    pub fn load(dir: &Path) -> Result<DecoderModel, Error> {
        Checkpoint::open(dir)?.model()
    }

    /// The embedding table, row-major, `vocab x hidden`.
    pub fn embedding(&self) -> &[f32] {
        self.embedding.as_ref().unwrap_or(&self.head.weight)
    }

    /// Whether the head's weight is the embedding table.
    pub fn tied(&self) -> bool {
        self.embedding.is_none()
    }

    /// SHA-256 over the lengths and bytes of the configuration and of the weight files, in the order of their names: what
    /// parties must agree on.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }
}

impl Config {
    /// What a query times a key is multiplied by.
    pub fn score_scale(&self) -> f64 {
        1.0 / libm::sqrt(self.head_dim as f64)
    }

    /// Refuses what no family means and what the arithmetic relies on.
    fn check(&self) -> Result<(), Error> {
        let Config { heads, kv_heads, head_dim, .. } = self;
        if !heads.is_multiple_of(*kv_heads) {
            return refuse(format!("{heads} query heads are not a multiple of {kv_heads} key heads"));
        }
        if self.rope.is_some() && !head_dim.is_multiple_of(2) {
            return refuse(format!("heads of {head_dim} values cannot be rotated, only even widths can"));
        }
        Ok(())
    }
}

/// Several ids may end an answer; where they are said, it is in `generation_config.json`.
fn ends_of_answers(config: &mut Config, dir: &Path) -> Result<(), Error> {
    let path = dir.join("generation_config.json");
    if path.exists() {
        let eos = Fields::parse("generation_config.json", &config::read(&path)?)?.ids("eos_token_id")?;
        if !eos.is_empty() {
            config.eos = eos;
        }
    }
    Ok(())
}

fn gguf_of(dir: &Path) -> Result<Option<PathBuf>, Error> {
    let unreadable = |e| Error::Model(format!("cannot read {}: {e}", dir.display()));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            found.push(path);
        }
    }
    if found.len() > 1 {
        return refuse(format!("{} holds {} gguf files, keep the one to load", dir.display(), found.len()));
    }
    Ok(found.pop())
}

fn refuse<T>(why: String) -> Result<T, Error> {
    Err(Error::Model(why))
}
