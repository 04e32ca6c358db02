//! Llama-architecture GGUF files as the published checkpoint they were converted from.
//!
//! The converter renames everything, and it permutes the rows of queries and keys: ggml turns value `2 i` of a head with
//! value `2 i + 1`, where the checkpoint turns `i` with `i + head_dim / 2`. The tokeniser in the metadata is not read; a
//! `tokenizer.json` lies beside the file.

use std::path::Path;

use sha2::Digest;

use super::fields::Fields;
use super::gated::{Gated, covers};
use super::source::{Bytes, Source};
use super::weights::{self, Weights, hasher};
use super::{Activation, Checkpoint, Config, Family, NormKind, Rope, gguf, refuse};
use crate::Error;

/// Descriptions, the tokeniser, and facts that the tensors' own types and the scaling's factor say again.
const INERT: &[&str] = &[
    "general.",
    "llama.rope.scaling.finetuned",
    "llama.rope.scaling.original_context_length",
    "quantize.",
    "tokenizer.",
];

/// Names in a file and in a checkpoint, without the layer and without `.weight` or `.bias`.
const NAMES: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

pub(super) fn open(path: &Path) -> Result<Checkpoint, Error> {
    let (file, len) = weights::open(path)?;
    read(&path.file_name().unwrap_or_default().to_string_lossy(), Box::new(file), len)
}

/// A whole file of `len` bytes.
pub(super) fn read(name: &str, mut file: Box<dyn Bytes>, len: u64) -> Result<Checkpoint, Error> {
    let mut hash = hasher();
    let mut source = Source::new(name, &mut file, len, &mut hash);
    let (metadata, contents) = gguf::header(&mut source)?;
    let mut f = Fields::new(name, metadata);
    let architecture: String = f.required("general.architecture")?;
    if architecture != "llama" {
        return f.refuse("general.architecture", format!("\"{architecture}\" is not supported, \"llama\" is"));
    }
    let mut weights = contents.read(&mut source)?;
    weights.digest = hash.finalize().into();
    weights.came_from(name, file);
    build(f, weights)
}

fn build(mut f: Fields, weights: Weights) -> Result<Checkpoint, Error> {
    f.only("general.type", "model")?;
    f.only("split.count", 1)?;
    f.only("split.no", 0)?;
    f.or("split.tensors.count", 0u64)?;
    f.only("llama.expert_count", 0)?;
    f.only("llama.expert_used_count", 0)?;
    let hidden = f.size("llama.embedding_length")?;
    let heads = f.size("llama.attention.head_count")?;
    let kv_heads = f.optional_size("llama.attention.head_count_kv")?.unwrap_or(heads);
    let head_dim = f.head_dim("llama.attention.key_length", hidden, heads)?;
    f.only("llama.attention.value_length", head_dim)?;
    f.only("llama.rope.dimension_count", head_dim)?;
    let max_positions = f.size("llama.context_length")?;
    let window = f.or("llama.attention.sliding_window", None)?;
    covers(&f, window, max_positions)?;
    let layers = f.size("llama.block_count")?;
    let mut w = rename(weights, heads, kv_heads, head_dim)?;
    let rows = w.rows("model.embed_tokens.weight").unwrap_or(0);
    let mut rope = scaled_rope(&mut f, head_dim)?;
    if w.has("rope_freqs.weight") {
        let factors = w.take("rope_freqs.weight", &[head_dim / 2])?;
        if factors.iter().any(|by| *by <= 0.0) {
            return refuse("tensor rope_freqs.weight holds a value that is not above zero".into());
        }
        let mut factors = factors.iter();
        rope.scale(|_| factors.next().map_or(1.0, |by| f64::from(*by)));
    }
    let biased = |name: &str| w.has(&format!("model.layers.0.{name}.bias"));
    let gated = Gated {
        config: Config {
            family: "llama",
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            intermediate: f.size("llama.feed_forward_length")?,
            vocab: f.optional_size("llama.vocab_size")?.unwrap_or(rows),
            max_positions,
            norm: NormKind::Rms,
            eps: f.positive("llama.attention.layer_norm_rms_epsilon", None)?,
            activation: Activation::Silu,
            rope: Some(rope),
            bos: f.ids("tokenizer.ggml.bos_token_id")?.first().copied(),
            eos: f.ids("tokenizer.ggml.eos_token_id")?,
        },
        tied: !w.has("lm_head.weight"),
        qkv_bias: biased("self_attn.q_proj"),
        output_bias: biased("self_attn.o_proj"),
        mlp_bias: biased("mlp.gate_proj"),
        query_key_norm: false,
    };
    f.finish(&[INERT])?;
    Ok(Checkpoint { family: Family::Gated(gated), weights: w })
}

/// A factor without a type is linear, as in ggml.
fn scaled_rope(f: &mut Fields, head_dim: usize) -> Result<Rope, Error> {
    let mut rope = Rope::new(f.theta("llama.rope.freq_base", 10_000.0)?, head_dim);
    let older = f.positive("llama.rope.scale_linear", Some(1.0))?;
    let factor = f.positive("llama.rope.scaling.factor", Some(older))?;
    match f.or("llama.rope.scaling.type", String::from("linear"))?.as_str() {
        "none" => {}
        "linear" => rope.scale(|_| factor),
        other => {
            let why = format!("\"{other}\" is not supported, none and linear are");
            return f.refuse("llama.rope.scaling.type", why);
        }
    }
    Ok(rope)
}

fn rename(weights: Weights, heads: usize, kv_heads: usize, head_dim: usize) -> Result<Weights, Error> {
    let name = |name: &str| -> Option<String> {
        match name {
            "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
            "output_norm.weight" => return Some("model.norm.weight".into()),
            "output.weight" => return Some("lm_head.weight".into()),
            _ => {}
        }
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (part, kind) = rest.rsplit_once('.')?;
        let (_, part) = NAMES.iter().find(|(theirs, _)| *theirs == part)?;
        Some(format!("model.layers.{layer}.{part}.{kind}"))
    };
    weights.renamed(|theirs, shape| {
        // What has no name of ours keeps its own, and is used as it is or refused by it.
        let ours = name(&theirs).unwrap_or(theirs);
        let heads = match ours.rsplit('.').nth(1) {
            Some("q_proj") => heads,
            Some("k_proj") => kv_heads,
            _ => return Ok((ours, None)),
        };
        if shape.first().is_some_and(|rows| *rows != heads * head_dim) {
            return refuse(format!("tensor {ours} is {shape:?}, expected {heads} heads of {head_dim} rows"));
        }
        Ok((ours, Some(head_dim)))
    })
}
