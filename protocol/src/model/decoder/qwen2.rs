//! Qwen2 and Qwen2.5 (Yang et al., 2024): Llama's block with biases on queries, keys and values.

use super::fields::{Fields, INERT};
use super::gated::{Gated, windows};
use super::{Activation, Config, NormKind, Rope};
use crate::Error;

pub(super) fn read(mut f: Fields) -> Result<Gated, Error> {
    let (hidden, heads) = (f.size("hidden_size")?, f.size("num_attention_heads")?);
    let head_dim = f.head_dim("head_dim", hidden, heads)?;
    let (layers, max_positions) = (f.size("num_hidden_layers")?, f.size("max_position_embeddings")?);
    f.only("hidden_act", "silu")?;
    windows(&mut f, layers, max_positions)?;
    let gated = Gated {
        config: Config {
            family: "qwen2",
            layers,
            hidden,
            heads,
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
        qkv_bias: true,
        output_bias: false,
        mlp_bias: false,
        query_key_norm: false,
    };
    // Qwen2.5 says that its rotary positions are not the multimodal ones.
    f.only("use_mrope", false)?;
    f.finish(&[INERT])?;
    Ok(gated)
}
