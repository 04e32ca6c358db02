//! The block that Llama made common: RMS norms, rotary positions, grouped queries and a gated MLP. Its families differ in
//! their configuration, in biases, and in norms of queries and keys.

use super::fields::Fields;
use super::weights::Weights;
use super::{Config, DecoderLayer, Last, Mlp};
use crate::Error;

/// What a family's file makes of a configuration.
pub(super) struct Gated {
    pub(super) config: Config,
    /// Whether the head's weight is the embedding table.
    pub(super) tied: bool,
    /// Whether the projections to queries, keys and values have biases.
    pub(super) qkv_bias: bool,
    /// Whether the projection after attention has one.
    pub(super) output_bias: bool,
    /// Whether those of the MLP do.
    pub(super) mlp_bias: bool,
    /// Whether the heads of queries and keys are normalised.
    pub(super) query_key_norm: bool,
}

impl Gated {
    /// Token ids -> [n, h].
    pub(super) const TABLE: &str = "model.embed_tokens.weight";

    /// Block `i`, by its Hugging Face names.
    pub(super) fn layer(&self, w: &mut Weights, i: usize) -> Result<DecoderLayer, Error> {
        let c = &self.config;
        let (h, f) = (c.hidden, c.intermediate);
        let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let (p, a) = (format!("model.layers.{i}"), format!("model.layers.{i}.self_attn"));
        Ok(DecoderLayer {
            // 1. [n, h] -> [n, h]
            attention_norm: w.norm(&format!("{p}.input_layernorm"), h, false)?,
            // 2. [n, h] -> [n, heads, d], [n, kv_heads, d], [n, kv_heads, d]
            query: w.dense(&format!("{a}.q_proj"), q, h, self.qkv_bias)?,
            key: w.dense(&format!("{a}.k_proj"), kv, h, self.qkv_bias)?,
            value: w.dense(&format!("{a}.v_proj"), kv, h, self.qkv_bias)?,
            // 3. each [d] -> [d], then rotated
            query_key_norm: match self.query_key_norm {
                true => Some((
                    w.norm(&format!("{a}.q_norm"), c.head_dim, false)?,
                    w.norm(&format!("{a}.k_norm"), c.head_dim, false)?,
                )),
                false => None,
            },
            // 4. causal attention: [n, heads, d] -> [n, h], added to the rows
            output: w.dense(&format!("{a}.o_proj"), h, q, self.output_bias)?,
            // 5. [n, h] -> [n, f], [n, f] -> [n, h], added to the rows
            mlp_norm: w.norm(&format!("{p}.post_attention_layernorm"), h, false)?,
            mlp: Mlp::Gated {
                gate: w.dense(&format!("{p}.mlp.gate_proj"), f, h, self.mlp_bias)?,
                up: w.dense(&format!("{p}.mlp.up_proj"), f, h, self.mlp_bias)?,
                down: w.dense(&format!("{p}.mlp.down_proj"), h, f, self.mlp_bias)?,
            },
        })
    }

    /// [n, h] -> [n, h] -> [n, vocab].
    pub(super) fn last(&self, w: &mut Weights) -> Result<Last, Error> {
        let c = &self.config;
        let norm = w.norm("model.norm", c.hidden, false)?;
        Ok(Last { norm, head: w.head(Self::TABLE, (c.vocab, c.hidden), self.tied)? })
    }
}

/// `sliding_window`, `use_sliding_window`, `max_window_layers` and `layer_types` of Qwen. A window is supported where no
/// sequence is longer than it, and then it changes nothing.
pub(super) fn windows(f: &mut Fields, layers: usize, max_positions: usize) -> Result<(), Error> {
    let used = f.or("use_sliding_window", false)?;
    let window = f.or::<Option<u64>>("sliding_window", Some(4096))?.filter(|_| used);
    let first = f.or("max_window_layers", 28u64)?;
    let slides = match f.or::<Option<Vec<String>>>("layer_types", None)? {
        Some(types) => {
            if types.len() != layers {
                return f.refuse("layer_types", format!("has {} entries for {layers} layers", types.len()));
            }
            if let Some(other) = types.iter().find(|t| !["full_attention", "sliding_attention"].contains(&t.as_str())) {
                return f.refuse("layer_types", format!("\"{other}\" is not supported"));
            }
            types.iter().any(|t| t == "sliding_attention")
        }
        None => first < layers as u64,
    };
    match window {
        Some(_) if slides => covers(f, window, max_positions),
        _ => Ok(()),
    }
}

/// Refuses a window that a sequence of `max_positions` would not fit in.
pub(super) fn covers(f: &Fields, window: Option<u64>, max_positions: usize) -> Result<(), Error> {
    match window {
        Some(window) if window < max_positions as u64 => {
            let why = format!("{window} is not supported below the model's {max_positions} positions");
            f.refuse("sliding_window", format!("{why}; lower max_position_embeddings to use the model within it"))
        }
        _ => Ok(()),
    }
}
