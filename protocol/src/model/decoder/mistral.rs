//! Mistral (Jiang et al., 2023): Llama's block with attention to a window of the latest positions.

use super::fields::{Fields, INERT};
use super::gated::{Gated, covers};
use super::{Activation, Config, NormKind, Rope};
use crate::Error;

pub(super) fn read(mut f: Fields) -> Result<Gated, Error> {
    let (hidden, heads) = (f.size("hidden_size")?, f.size("num_attention_heads")?);
    let head_dim = f.head_dim("head_dim", hidden, heads)?;
    let max_positions = f.size("max_position_embeddings")?;
    f.only("hidden_act", "silu")?;
    // Absent is not null: the published class has a window of its own.
    let window = f.or("sliding_window", Some(4096))?;
    covers(&f, window, max_positions)?;
    let gated = Gated {
        config: Config {
            family: "mistral",
            layers: f.size("num_hidden_layers")?,
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
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        query_key_norm: false,
    };
    f.finish(&[INERT])?;
    Ok(gated)
}
