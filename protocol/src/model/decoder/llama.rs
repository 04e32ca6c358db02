//! Llama 2 and 3, and those published as Llama, such as SmolLM2 and TinyLlama (Touvron et al., 2023).

use super::fields::{Fields, INERT};
use super::gated::Gated;
use super::{Activation, Config, NormKind, Rope};
use crate::Error;

pub(super) fn read(mut f: Fields) -> Result<Gated, Error> {
    let (hidden, heads) = (f.size("hidden_size")?, f.size("num_attention_heads")?);
    let head_dim = f.head_dim("head_dim", hidden, heads)?;
    let attention_bias = f.or("attention_bias", false)?;
    f.only("hidden_act", "silu")?;
    f.only("is_llama_config", true)?;
    f.only("rope_interleaved", false)?;
    let gated = Gated {
        config: Config {
            family: "llama",
            layers: f.size("num_hidden_layers")?,
            hidden,
            heads,
            kv_heads: f.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            intermediate: f.size("intermediate_size")?,
            vocab: f.size("vocab_size")?,
            max_positions: f.size("max_position_embeddings")?,
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
        mlp_bias: f.or("mlp_bias", false)?,
        query_key_norm: false,
    };
    f.finish(&[INERT])?;
    Ok(gated)
}
