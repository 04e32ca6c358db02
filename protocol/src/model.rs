//! BERT-family sentence encoders: reading a model directory, the public embedding, and the float64 reference.
//!
//! A directory holds `config.json` and `model.safetensors` as published, and perhaps what sentence-transformers puts
//! beside them (`modules.json`, `1_Pooling/config.json`). Anything the rest of this crate would compute differently from
//! the model's authors is refused by name here, rather than silently approximated later.

mod config;
pub mod decoder;
mod plaintext;
mod tensors;
#[cfg(test)]
mod tests;

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::Error;
pub use config::{Activation, BertConfig, Pooling};
use tensors::Tensors;

/// A linear layer, `y = W x + b`.
#[derive(Clone, Debug)]
pub struct Dense {
    /// Row-major, `out` rows of `inp`.
    pub weight: Vec<f32>,
    /// `out` values.
    pub bias: Vec<f32>,
    /// Number of outputs.
    pub out: usize,
    /// Number of inputs.
    pub inp: usize,
}

/// The affine part of a layer normalisation.
#[derive(Clone, Debug)]
pub struct Norm {
    /// Multiplies the normalised row.
    pub weight: Vec<f32>,
    /// Is added afterwards.
    pub bias: Vec<f32>,
}

/// The tables that tokens are embedded with, row-major, `hidden_size` values a row.
#[derive(Clone, Debug)]
pub struct Embeddings {
    /// One row per token id.
    pub word: Vec<f32>,
    /// One row per position.
    pub position: Vec<f32>,
    /// One row per segment; only the first is used.
    pub token_type: Vec<f32>,
    /// Applied to the sum of the three.
    pub norm: Norm,
}

/// One transformer block, normalised after each of its two residual sums.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Query projection.
    pub query: Dense,
    /// Key projection.
    pub key: Dense,
    /// Value projection.
    pub value: Dense,
    /// Mixes the heads.
    pub attention_output: Dense,
    /// After attention and its residual.
    pub attention_norm: Norm,
    /// Up-projection of the MLP.
    pub intermediate: Dense,
    /// Down-projection of the MLP.
    pub output: Dense,
    /// After the MLP and its residual.
    pub output_norm: Norm,
}

/// A model as its authors published it, with every weight as `f32`.
pub struct BertModel {
    /// The shape and the constants.
    pub config: BertConfig,
    /// How rows become one vector.
    pub pooling: Pooling,
    /// Token, position and segment tables.
    pub embeddings: Embeddings,
    /// `config.num_hidden_layers` blocks.
    pub layers: Vec<Layer>,
    digest: [u8; 32],
}

impl std::fmt::Debug for BertModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BertModel")
            .field("config", &self.config)
            .field("pooling", &self.pooling)
            .finish_non_exhaustive()
    }
}

/// Whether a directory's `config.json` says that it is an encoder of the BERT family; anything else is read as a decoder.
pub fn is_encoder(dir: &Path) -> bool {
    let kind = |bytes: Vec<u8>| serde_json::from_slice::<serde_json::Value>(&bytes).ok();
    match config::read(&dir.join("config.json")).ok().and_then(kind) {
        Some(c) => c.get("model_type").is_none_or(|t| t == "bert"),
        None => false,
    }
}

impl BertModel {
    /// Reads `config.json`, `model.safetensors` and the sentence-transformers files of a directory.
    pub fn load(dir: &Path) -> Result<BertModel, Error> {
        if !dir.is_dir() {
            return Err(Error::Model(format!("{} is not a directory", dir.display())));
        }
        let config_bytes = config::read(&dir.join("config.json"))?;
        let config = BertConfig::parse(&config_bytes)?;
        config::check_modules(dir)?;
        let pooling = Pooling::of(dir, config.hidden_size)?;
        let weights = config::read(&dir.join("model.safetensors"))?;
        let digest = digest(&config_bytes, &weights, pooling);

        let tensors = Tensors::parse(&weights)?;
        let (h, f) = (config.hidden_size, config.intermediate_size);
        let embeddings = Embeddings {
            word: tensors.matrix("embeddings.word_embeddings.weight", config.vocab_size, h)?,
            position: tensors.matrix("embeddings.position_embeddings.weight", config.max_position_embeddings, h)?,
            token_type: tensors.matrix("embeddings.token_type_embeddings.weight", config.type_vocab_size, h)?,
            norm: tensors.norm("embeddings.LayerNorm", h)?,
        };
        let layers = (0..config.num_hidden_layers)
            .map(|i| {
                let p = format!("encoder.layer.{i}");
                Ok(Layer {
                    query: tensors.dense(&format!("{p}.attention.self.query"), h, h)?,
                    key: tensors.dense(&format!("{p}.attention.self.key"), h, h)?,
                    value: tensors.dense(&format!("{p}.attention.self.value"), h, h)?,
                    attention_output: tensors.dense(&format!("{p}.attention.output.dense"), h, h)?,
                    attention_norm: tensors.norm(&format!("{p}.attention.output.LayerNorm"), h)?,
                    intermediate: tensors.dense(&format!("{p}.intermediate.dense"), f, h)?,
                    output: tensors.dense(&format!("{p}.output.dense"), h, f)?,
                    output_norm: tensors.norm(&format!("{p}.output.LayerNorm"), h)?,
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        Ok(BertModel { config, pooling, embeddings, layers, digest })
    }

    /// SHA-256 over the bytes of `config.json` and `model.safetensors`, and the pooling: what parties must agree on.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }
}

/// Lengths go in first, so that no two pairs of files give the same input to the hash.
fn digest(config: &[u8], weights: &[u8], pooling: Pooling) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"tacet model 1\0");
    for part in [config, weights] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.update([match pooling {
        Pooling::Mean => 0,
        Pooling::Cls => 1,
    }]);
    hash.finalize().into()
}
