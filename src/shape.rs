//! Checkpoints of known shapes with random weights, for speed only: what they say is noise.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::{Map, Value, json};

/// A model whose shape is known by heart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// all-MiniLM-L6-v2: 6 layers of 384
    Minilm,
    /// BERT base: 12 layers of 768
    BertBase,
    /// GPT-2 small: 12 layers of 768, 50,257 words
    Gpt2,
    /// TinyLlama 1.1B: 22 layers of 2048, grouped queries
    Tinyllama,
    /// Llama 2 7B: 32 layers of 4096
    #[value(name = "llama-7b")]
    Llama7b,
}

/// Words that the tokeniser of a shape knows: a model's directory has to have one.
const WORDS: usize = 1000;

/// Writes a checkpoint with random weights; the same every time. Ternary, weights of layers are -1, 0 and 1 times one
/// magnitude, and norms have no gain that would scale them.
pub fn write(dir: &Path, shape: Shape, ternary: bool) -> Result<()> {
    let (config, tensors) = match shape {
        Shape::Minilm => bert(6, 384, 12, 1536),
        Shape::BertBase => bert(12, 768, 12, 3072),
        Shape::Gpt2 => gpt2(12, 768, 12, 50257),
        Shape::Tinyllama => llama(22, 2048, [32, 4], 5632),
        Shape::Llama7b => llama(32, 4096, [32, 32], 11008),
    };
    std::fs::write(dir.join("config.json"), config.to_string())?;
    std::fs::write(dir.join("tokenizer.json"), tokenizer().to_string())?;
    let path = dir.join("model.safetensors");
    let bytes = tensors.iter().map(|(_, shape, _)| 2 * shape.iter().product::<usize>()).sum::<usize>();
    weights(&path, &tensors, ternary).with_context(|| format!("{}, of {} MB", path.display(), bytes / 1_000_000))
}

fn tokenizer() -> Value {
    let mut vocab: Map<String, Value> = (1..WORDS).map(|i| (format!("w{i}"), json!(i))).collect();
    vocab.insert("[UNK]".into(), json!(0));
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    })
}

/// Name, shape, and the value around which the elements lie with a standard deviation of about 0.02.
type Tensor = (String, Vec<usize>, f32);

fn bert(layers: usize, d: usize, heads: usize, mlp: usize) -> (Value, Vec<Tensor>) {
    let config = json!({
        "model_type": "bert", "hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": mlp, "max_position_embeddings": 512, "type_vocab_size": 2, "vocab_size": 30522,
        "layer_norm_eps": 1e-12, "hidden_act": "gelu", "position_embedding_type": "absolute",
    });
    let mut t: Vec<Tensor> = Vec::new();
    for (name, rows) in [("word", 30522), ("position", 512), ("token_type", 2)] {
        t.push((format!("embeddings.{name}_embeddings.weight"), vec![rows, d], 0.0));
    }
    let norm = |t: &mut Vec<Tensor>, name: String| {
        t.push((format!("{name}.weight"), vec![d], 1.0));
        t.push((format!("{name}.bias"), vec![d], 0.0));
    };
    norm(&mut t, "embeddings.LayerNorm".into());
    for l in 0..layers {
        let at = format!("encoder.layer.{l}");
        for (name, out, inp) in [
            ("attention.self.query", d, d),
            ("attention.self.key", d, d),
            ("attention.self.value", d, d),
            ("attention.output.dense", d, d),
            ("intermediate.dense", mlp, d),
            ("output.dense", d, mlp),
        ] {
            t.push((format!("{at}.{name}.weight"), vec![out, inp], 0.0));
            t.push((format!("{at}.{name}.bias"), vec![out], 0.0));
        }
        norm(&mut t, format!("{at}.attention.output.LayerNorm"));
        norm(&mut t, format!("{at}.output.LayerNorm"));
    }
    (config, t)
}

fn gpt2(layers: usize, d: usize, heads: usize, vocab: usize) -> (Value, Vec<Tensor>) {
    let config = json!({
        "model_type": "gpt2", "n_embd": d, "n_layer": layers, "n_head": heads, "n_positions": 1024, "vocab_size": vocab,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": true,
    });
    let mut t: Vec<Tensor> =
        vec![("wte.weight".into(), vec![vocab, d], 0.0), ("wpe.weight".into(), vec![1024, d], 0.0)];
    for l in 0..layers {
        for (name, inp, out) in
            [("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d), ("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d)]
        {
            t.push((format!("h.{l}.{name}.weight"), vec![inp, out], 0.0));
            t.push((format!("h.{l}.{name}.bias"), vec![out], 0.0));
        }
        for name in ["ln_1", "ln_2"] {
            t.push((format!("h.{l}.{name}.weight"), vec![d], 1.0));
            t.push((format!("h.{l}.{name}.bias"), vec![d], 0.0));
        }
    }
    t.push(("ln_f.weight".into(), vec![d], 1.0));
    t.push(("ln_f.bias".into(), vec![d], 0.0));
    (config, t)
}

fn llama(layers: usize, d: usize, [heads, kv_heads]: [usize; 2], mlp: usize) -> (Value, Vec<Tensor>) {
    let vocab = 32000;
    let config = json!({
        "model_type": "llama", "hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp, "max_position_embeddings": 2048, "vocab_size": vocab,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false,
    });
    let kv = d / heads * kv_heads;
    let mut t: Vec<Tensor> = vec![("model.embed_tokens.weight".into(), vec![vocab, d], 0.0)];
    for l in 0..layers {
        let at = format!("model.layers.{l}");
        for (name, out, inp) in [
            ("self_attn.q_proj", d, d),
            ("self_attn.k_proj", kv, d),
            ("self_attn.v_proj", kv, d),
            ("self_attn.o_proj", d, d),
            ("mlp.gate_proj", mlp, d),
            ("mlp.up_proj", mlp, d),
            ("mlp.down_proj", d, mlp),
        ] {
            t.push((format!("{at}.{name}.weight"), vec![out, inp], 0.0));
        }
        t.push((format!("{at}.input_layernorm.weight"), vec![d], 1.0));
        t.push((format!("{at}.post_attention_layernorm.weight"), vec![d], 1.0));
    }
    t.push(("model.norm.weight".into(), vec![d], 1.0));
    t.push(("lm_head.weight".into(), vec![vocab, d], 0.0));
    (config, t)
}

/// Writes BF16 tensors one after another, so that a large model never stands in memory.
fn weights(path: &Path, tensors: &[Tensor], ternary: bool) -> Result<()> {
    let (mut header, mut at) = (Map::new(), 0);
    for (name, shape, _) in tensors {
        let len = 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [at, at + len]}));
        at += len;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    for (name, shape, centre) in tensors {
        // Tables of words and positions, and the logits of tied ones, are as wide as ever.
        let matrix = shape.len() > 1 && name.contains(".layers.");
        for _ in 0..shape.iter().product::<usize>() {
            // Two uniform ones: near enough to a bell.
            let bell = 0.05 * (uniform() + uniform());
            let v = match (ternary, matrix) {
                (false, _) => centre + bell,
                (true, true) if bell.abs() < 0.01 => 0.0,
                (true, true) => 0.03f32.copysign(bell),
                (true, false) if *centre == 1.0 => 1.0,
                (true, false) => bell,
            };
            out.write_all(&((v.to_bits() >> 16) as u16).to_le_bytes())?;
        }
    }
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::Folder;
    use tacet_protocol::model::decoder::Checkpoint;

    #[test]
    fn a_shape_is_a_checkpoint_in_a_private_folder_that_goes() {
        let folder = Folder::make("tacet-shape").unwrap();
        let dir = folder.0.clone();
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&dir).unwrap().permissions());
        assert_eq!(mode & 0o777, 0o700);
        write(&dir, Shape::Gpt2, false).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let c = checkpoint.config();
        assert_eq!([c.layers, c.hidden, c.heads, c.vocab], [12, 768, 12, 50257]);
        drop(folder);
        assert!(!dir.exists());
    }
}
