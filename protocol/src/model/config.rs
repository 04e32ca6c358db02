//! `config.json` and the sentence-transformers files beside it, with everything unsupported refused by name.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Error;

/// The MLP's nonlinearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Activation {
    /// `x * Phi(x)` with the exact normal distribution function.
    Gelu,
}

impl TryFrom<String> for Activation {
    type Error = String;

    fn try_from(name: String) -> Result<Activation, String> {
        match name.as_str() {
            // Two implementations of one function.
            "gelu" | "gelu_python" => Ok(Activation::Gelu),
            _ => Err(format!("hidden_act \"{name}\" is not supported, only \"gelu\" is")),
        }
    }
}

/// How the rows of the last hidden state become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The mean of all rows.
    Mean,
    /// The first row.
    Cls,
}

/// The fields of `config.json` that decide what is computed.
#[derive(Clone, Debug, Deserialize)]
pub struct BertConfig {
    /// Width of a row.
    pub hidden_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Heads, which divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Number of segments.
    pub type_vocab_size: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Added to the variance.
    #[serde(default = "default_eps")]
    pub layer_norm_eps: f64,
    /// The MLP's nonlinearity.
    #[serde(default = "default_activation")]
    pub hidden_act: Activation,
    #[serde(default)]
    position_embedding_type: Option<String>,
    #[serde(default)]
    model_type: Option<String>,
    #[serde(default)]
    is_decoder: bool,
}

fn default_eps() -> f64 {
    1e-12
}

fn default_activation() -> Activation {
    Activation::Gelu
}

impl BertConfig {
    /// Values in a head.
    pub fn head_size(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<BertConfig, Error> {
        let refuse = |why: String| Err(Error::Model(format!("config.json: {why}")));
        let config: BertConfig = match serde_json::from_slice(bytes) {
            Ok(config) => config,
            Err(e) => return refuse(e.to_string()),
        };
        if let Some(kind) = config.model_type.as_deref().filter(|kind| *kind != "bert") {
            return refuse(format!("model_type \"{kind}\" is not supported, only \"bert\" is"));
        }
        if let Some(kind) = config.position_embedding_type.as_deref().filter(|kind| *kind != "absolute") {
            return refuse(format!("position_embedding_type \"{kind}\" is not supported, only \"absolute\" is"));
        }
        if config.is_decoder {
            return refuse("is_decoder is not supported, only encoders are".into());
        }
        for (name, value) in [
            ("hidden_size", config.hidden_size),
            ("num_hidden_layers", config.num_hidden_layers),
            ("num_attention_heads", config.num_attention_heads),
            ("intermediate_size", config.intermediate_size),
            ("max_position_embeddings", config.max_position_embeddings),
            ("type_vocab_size", config.type_vocab_size),
            ("vocab_size", config.vocab_size),
        ] {
            if value == 0 {
                return refuse(format!("{name} is zero"));
            }
        }
        if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            return refuse(format!(
                "hidden_size {} is not a multiple of num_attention_heads {}",
                config.hidden_size, config.num_attention_heads
            ));
        }
        if !(config.layer_norm_eps > 0.0 && config.layer_norm_eps < 1.0) {
            return refuse(format!("layer_norm_eps {} is out of range", config.layer_norm_eps));
        }
        Ok(config)
    }
}

impl Pooling {
    /// From `1_Pooling/config.json`; the mean where there is none.
    pub(super) fn of(dir: &Path, hidden: usize) -> Result<Pooling, Error> {
        let path = dir.join("1_Pooling").join("config.json");
        if !path.exists() {
            return Ok(Pooling::Mean);
        }
        let refuse = |why: String| Err(Error::Model(format!("1_Pooling/config.json: {why}")));
        let fields: Map<String, Value> = match serde_json::from_slice(&read(&path)?) {
            Ok(fields) => fields,
            Err(e) => return refuse(e.to_string()),
        };
        if let Some(width) = fields.get("word_embedding_dimension")
            && width.as_u64() != Some(hidden as u64)
        {
            return refuse(format!("word_embedding_dimension {width} is not hidden_size {hidden}"));
        }
        // Older files have one flag a mode, newer ones the mode's name.
        let mut modes: Vec<&str> = fields
            .iter()
            .filter(|(_, value)| **value == Value::Bool(true))
            .filter_map(|(key, _)| key.strip_prefix("pooling_mode_"))
            .collect();
        if let Some(mode) = fields.get("pooling_mode").and_then(Value::as_str) {
            modes.push(mode);
        }
        match modes[..] {
            ["mean_tokens" | "mean"] => Ok(Pooling::Mean),
            ["cls_token" | "cls"] => Ok(Pooling::Cls),
            [] => refuse("no pooling mode is set".into()),
            [mode] => refuse(format!("pooling mode \"{mode}\" is not supported, mean and cls are")),
            _ => refuse(format!("pooling modes {} are set together", modes.join(", "))),
        }
    }
}

/// Refuses pipelines with modules that would not be run, such as a projection after pooling.
pub(super) fn check_modules(dir: &Path) -> Result<(), Error> {
    #[derive(Deserialize)]
    struct Module {
        #[serde(rename = "type")]
        kind: String,
    }
    let path = dir.join("modules.json");
    if !path.exists() {
        return Ok(());
    }
    let modules: Vec<Module> =
        serde_json::from_slice(&read(&path)?).map_err(|e| Error::Model(format!("modules.json: {e}")))?;
    for module in &modules {
        let name = module.kind.rsplit('.').next().unwrap_or_default();
        if !["Transformer", "Pooling", "Normalize"].contains(&name) {
            return Err(Error::Model(format!("modules.json: module {name} is not supported")));
        }
    }
    Ok(())
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|e| Error::Model(format!("cannot read {}: {e}", path.display())))
}
