//! A random BERT checkpoint small enough to plan and run in milliseconds, in a folder that goes away with it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Map, Value, json};

/// Width of a row, of the MLP, and the numbers of heads, positions and words.
pub const HIDDEN: usize = 32;
const MLP: usize = 64;
const HEADS: usize = 2;
const POSITIONS: usize = 64;
pub const WORDS: usize = 64;

/// xorshift64*: enough for weights and for choosing what to tamper with, and the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        // A state of zero would stay zero.
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.word() >> 33) as usize % n
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| (self.word() >> 56) as u8).collect()
    }
}

/// The seed of a randomised test: `TACET_TEST_SEED`, or fresh; printed, so that a failure can be repeated.
pub fn seed() -> u64 {
    let given = std::env::var("TACET_TEST_SEED").ok().and_then(|s| s.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        now.as_nanos() as u64
    });
    println!("TACET_TEST_SEED={seed}");
    seed
}

/// A model directory with `config.json`, `model.safetensors` and `tokenizer.json`.
pub struct Tiny {
    pub dir: PathBuf,
}

impl Tiny {
    pub fn new(layers: usize) -> Tiny {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tacet-tiny-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("config.json"), config(layers).to_string()).unwrap();
        std::fs::write(dir.join("model.safetensors"), safetensors(&weights(layers))).unwrap();
        std::fs::write(dir.join("tokenizer.json"), tokenizer().to_string()).unwrap();
        Tiny { dir }
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

pub fn config(layers: usize) -> Value {
    json!({
        "model_type": "bert", "hidden_size": HIDDEN, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "intermediate_size": MLP, "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "vocab_size": WORDS,
        "layer_norm_eps": 1e-12, "hidden_act": "gelu", "position_embedding_type": "absolute",
    })
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

type Tensor = (String, Vec<usize>, Vec<f32>);

/// Named, shaped tensors with values of the size that trained ones have.
pub fn weights(layers: usize) -> Vec<Tensor> {
    let mut random = Random::new(1);
    let mut tensors = Vec::new();
    let mut tensor = |name: String, shape: Vec<usize>| {
        let n = shape.iter().product::<usize>();
        let centre = if name.ends_with("LayerNorm.weight") { 1.0 } else { 0.0 };
        let values = (0..n).map(|_| ((random.word() >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.4 + centre).collect();
        tensors.push((name, shape, values));
    };
    for (name, rows) in [("word", WORDS), ("position", POSITIONS), ("token_type", 2)] {
        tensor(format!("embeddings.{name}_embeddings.weight"), vec![rows, HIDDEN]);
    }
    tensor("embeddings.LayerNorm.weight".into(), vec![HIDDEN]);
    tensor("embeddings.LayerNorm.bias".into(), vec![HIDDEN]);
    for l in 0..layers {
        for (name, shape) in [
            ("attention.self.query", vec![HIDDEN, HIDDEN]),
            ("attention.self.key", vec![HIDDEN, HIDDEN]),
            ("attention.self.value", vec![HIDDEN, HIDDEN]),
            ("attention.output.dense", vec![HIDDEN, HIDDEN]),
            ("attention.output.LayerNorm", vec![HIDDEN]),
            ("intermediate.dense", vec![MLP, HIDDEN]),
            ("output.dense", vec![HIDDEN, MLP]),
            ("output.LayerNorm", vec![HIDDEN]),
        ] {
            let bias = vec![shape[0]];
            tensor(format!("encoder.layer.{l}.{name}.weight"), shape);
            tensor(format!("encoder.layer.{l}.{name}.bias"), bias);
        }
    }
    tensors
}

/// `u64` length of the header, the header, the values: the safetensors format.
pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let start = data.len();
        values.iter().for_each(|v| data.extend(v.to_le_bytes()));
        header.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}
