//! Qwen3, dense (Yang et al., 2025): Llama's block with norms of the heads of queries and keys, and heads of any width.

use super::fields::{Fields, INERT};
use super::gated::{Gated, windows};
use super::{Activation, Config, NormKind, Rope};
use crate::Error;

pub(super) fn read(mut f: Fields) -> Result<Gated, Error> {
    let (layers, max_positions) = (f.size("num_hidden_layers")?, f.size("max_position_embeddings")?);
    let head_dim = f.size("head_dim")?;
    let attention_bias = f.or("attention_bias", false)?;
    f.only("hidden_act", "silu")?;
    windows(&mut f, layers, max_positions)?;
    let gated = Gated {
        config: Config {
            family: "qwen3",
            layers,
            hidden: f.size("hidden_size")?,
            heads: f.size("num_attention_heads")?,
            kv_heads: f.size("num_key_value_heads")?,
            head_dim,
            intermediate: f.size("intermediate_size")?,
            vocab: f.size("vocab_size")?,
            max_positions,
            norm: NormKind::Rms,
            eps: f.positive("rms_norm_eps", Some(1e-6))?,
            activation: Activation::Silu,
            rope: Some(Rope::read(&mut f, head_dim)?),
            bos: f.ids("bos_token_id")?.first().copied(),
            eos: f.ids("eos_token_id")?,
        },
        tied: f.or("tie_word_embeddings", false)?,
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        mlp_bias: false,
        query_key_norm: true,
    };
    f.finish(&[INERT])?;
    Ok(gated)
}
