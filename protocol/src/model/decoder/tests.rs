//! What is refused, by which name, and that no bytes make loading panic. The checkpoints are those of `tests/vectors`.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use safetensors::tensor::{TensorView, serialize};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use sha2::Sha256;

use super::source::Source;
use super::*;

fn vectors(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name)
}

fn file(name: &str) -> Vec<u8> {
    std::fs::read(vectors(name)).unwrap()
}

/// A copy of a checkpoint, to be damaged; it goes away with the test.
struct Copy(PathBuf);

impl Copy {
    fn of(name: &str) -> Copy {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let copy = format!("tacet-decoder-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(copy);
        std::fs::create_dir_all(&path).unwrap();
        for entry in std::fs::read_dir(vectors(name)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
        }
        Copy(path)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.0.join(name), bytes).unwrap();
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.0.join(name)).unwrap()).unwrap()
    }

    /// `Value::Null` in place of a field removes it.
    fn set(&self, field: &str, value: Value) {
        let mut config = self.json("config.json");
        match value {
            Value::Null => config.as_object_mut().unwrap().remove(field),
            value => config.as_object_mut().unwrap().insert(field.into(), value),
        };
        self.write("config.json", config.to_string());
    }

    fn edit(&self, change: impl FnOnce(&mut Tensors)) {
        let bytes = std::fs::read(self.0.join("model.safetensors")).unwrap();
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors =
            parsed.iter().map(|(n, t)| (n.to_string(), (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect();
        change(&mut tensors);
        let views = tensors.iter().map(|(n, (d, s, b))| (n, TensorView::new(*d, s.clone(), b).unwrap()));
        self.write("model.safetensors", serialize(views, None).unwrap());
    }

    fn load(&self) -> Result<DecoderModel, Error> {
        DecoderModel::load(&self.0)
    }

    fn refusal(&self) -> String {
        self.load().unwrap_err().to_string()
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

#[test]
fn configurations_are_refused_by_name() {
    let rope = |kind: &str| json!({"rope_type": kind, "factor": 2.0});
    for (family, field, value, says) in [
        ("llama", "model_type", json!("gemma"), "model_type \"gemma\" is not supported"),
        ("llama", "model_type", Value::Null, "model_type is missing"),
        ("llama", "hidden_act", json!("gelu"), "hidden_act \"gelu\" is not supported, only \"silu\" is"),
        ("llama", "quantization_config", json!({"bits": 4}), "quantization_config {\"bits\":4} is not supported"),
        ("llama", "logit_scale", json!(0.5), "logit_scale 0.5 is not supported"),
        ("llama", "partial_rotary_factor", json!(0.5), "partial_rotary_factor 0.5"),
        ("llama", "rope_interleaved", json!(true), "rope_interleaved true"),
        ("llama", "attention_bias", json!("yes"), "attention_bias \"yes\" is not supported: invalid type"),
        ("llama", "hidden_size", Value::Null, "hidden_size is missing"),
        ("llama", "hidden_size", json!(-32), "hidden_size -32 is not supported"),
        ("llama", "num_hidden_layers", json!(0), "num_hidden_layers 0 is out of range"),
        ("llama", "vocab_size", json!(u64::MAX), "vocab_size 18446744073709551615 is out of range"),
        ("llama", "num_key_value_heads", json!(3), "4 query heads are not a multiple of 3"),
        ("llama", "head_dim", json!(7), "cannot be rotated"),
        ("llama", "rms_norm_eps", json!(0), "rms_norm_eps 0 is out of range"),
        ("llama", "rope_theta", json!(0.5), "rope_theta 0.5 is out of range"),
        ("llama", "rope_scaling", rope("dynamic"), "rope_scaling.rope_type \"dynamic\" is not supported"),
        ("llama", "rope_scaling", rope("yarn"), "rope_scaling.rope_type \"yarn\""),
        ("llama", "rope_scaling", json!({"type": "longrope"}), "rope_scaling.rope_type \"longrope\""),
        ("llama", "rope_scaling", json!({"type": "linear"}), "rope_scaling.factor is missing"),
        ("llama", "rope_scaling", json!({"type": "linear", "factor": -1}), "rope_scaling.factor -1 is out of range"),
        ("llama", "rope_scaling", json!({"beta_fast": 32}), "rope_scaling.beta_fast 32 is not supported"),
        ("llama", "rope_scaling", rope("llama3"), "rope_scaling.low_freq_factor is missing"),
        ("llama", "eos_token_id", json!("</s>"), "eos_token_id is not supported"),
        ("smollm2", "rope_scaling", rope("linear"), "rope_scaling and rope_parameters are set together"),
        ("mistral", "sliding_window", json!(63), "sliding_window 63 is not supported below the model's 64 positions"),
        ("mistral", "attention_bias", json!(true), "attention_bias true is not supported"),
        ("qwen2", "layer_types", json!(["full_attention"]), "layer_types has 1 entries for 2 layers"),
        ("qwen2", "layer_types", json!(["full_attention", "linear_attention"]), "layer_types \"linear_attention\""),
        ("qwen2", "use_mrope", json!(true), "use_mrope true"),
        ("qwen3", "head_dim", Value::Null, "head_dim is missing"),
        ("qwen3", "num_experts", json!(8), "num_experts 8"),
        ("gpt2", "activation_function", json!("gelu"), "activation_function \"gelu\""),
        ("gpt2", "scale_attn_by_inverse_layer_idx", json!(true), "scale_attn_by_inverse_layer_idx true"),
        ("gpt2", "scale_attn_weights", json!(false), "scale_attn_weights false"),
        ("gpt2", "n_ctx", json!(32), "n_ctx 32 is not supported, only 64 is"),
        ("gpt2", "n_head", json!(5), "n_embd 32 is not a multiple of n_head 5"),
        // What the configuration announces and the weights do not hold, and the other way round.
        ("llama", "num_hidden_layers", json!(3), "tensor model.layers.2.input_layernorm.weight is missing"),
        ("llama", "num_hidden_layers", json!(1), "tensor model.layers.1.input_layernorm.weight is in the weights"),
        ("llama", "vocab_size", json!(95), "tensor model.embed_tokens.weight is [96, 32], expected [95, 32]"),
        ("llama", "attention_bias", json!(true), "tensor model.layers.0.self_attn.q_proj.bias is missing"),
        ("llama", "tie_word_embeddings", json!(true), "lm_head.weight is not the embedding"),
        ("llama3", "mlp_bias", json!(false), "mlp.down_proj.bias is in the weights"),
        ("llama3", "tie_word_embeddings", json!(false), "tensor lm_head.weight is missing"),
        ("qwen3", "model_type", json!("qwen2"), "attention_bias false is not supported"),
    ] {
        let copy = Copy::of(family);
        copy.set(field, value);
        let refusal = copy.refusal();
        assert!(refusal.contains(says), "{family}, {field}: {refusal}");
    }
}

#[test]
fn windows_are_read_where_they_do_not_bind() {
    let copy = Copy::of("mistral");
    copy.set("sliding_window", Value::Null);
    assert!(copy.load().is_ok(), "the class's own window of 4096 covers 64 positions");
    copy.set("max_position_embeddings", json!(4097));
    assert!(copy.refusal().contains("sliding_window 4096"), "{}", copy.refusal());

    let copy = Copy::of("qwen2");
    copy.set("use_sliding_window", json!(true));
    copy.set("sliding_window", json!(16));
    assert!(copy.load().is_ok(), "every layer's type is full_attention");
    copy.set("layer_types", json!(["full_attention", "sliding_attention"]));
    assert!(copy.refusal().contains("sliding_window 16"), "{}", copy.refusal());
    copy.set("layer_types", Value::Null);
    assert!(copy.load().is_ok(), "windows begin at layer 28");
    copy.set("max_window_layers", json!(1));
    assert!(copy.refusal().contains("sliding_window 16"), "{}", copy.refusal());
    copy.set("sliding_window", json!(64));
    assert!(copy.load().is_ok());
}

#[test]
fn tensors_are_refused_by_name() {
    let name = "model.layers.1.self_attn.k_proj.weight";
    let changed = |change: &dyn Fn(&mut Tensors)| {
        let copy = Copy::of("llama");
        copy.edit(change);
        copy.refusal()
    };
    let refusal = changed(&|t| drop(t.remove(name)));
    assert_eq!(refusal, format!("model: tensor {name} is missing"));
    let refusal = changed(&|t| t.get_mut(name).unwrap().1 = vec![32, 16]);
    assert_eq!(refusal, format!("model: tensor {name} is [32, 16], expected [16, 32]"));
    let refusal = changed(&|t| t.get_mut(name).unwrap().0 = Dtype::I32);
    assert!(refusal.contains(name) && refusal.contains("I32"), "{refusal}");
    let refusal = changed(&|t| t.get_mut(name).unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
    assert!(refusal.ends_with(&format!("{name} holds a value that is not finite")), "{refusal}");
    let refusal = changed(&|t| drop(t.insert("model.layers.0.extra".into(), (Dtype::F32, vec![1], vec![0; 4]))));
    assert!(refusal.contains("tensor model.layers.0.extra is in the weights"), "{refusal}");
}

#[test]
fn buffers_prefixes_and_repeated_heads_change_nothing() {
    let tokens = [1, 5, 9, 40];
    let want = DecoderModel::load(&vectors("gpt2")).unwrap().logits(&tokens).unwrap();
    let copy = Copy::of("gpt2");
    copy.edit(|t| {
        *t = std::mem::take(t).into_iter().map(|(n, v)| (n.replace("transformer.", ""), v)).collect();
        t.insert("h.0.attn.bias".into(), (Dtype::U8, vec![1, 1, 4, 4], vec![1; 16]));
        t.insert("h.0.attn.masked_bias".into(), (Dtype::F32, vec![1], vec![0; 4]));
        t.insert("lm_head.weight".into(), t["wte.weight"].clone());
    });
    assert_eq!(copy.load().unwrap().logits(&tokens).unwrap(), want);
    copy.edit(|t| t.get_mut("lm_head.weight").unwrap().2[3] ^= 0x80);
    assert!(copy.refusal().contains("lm_head.weight is not the embedding"), "{}", copy.refusal());

    let copy = Copy::of("smollm2");
    let want = copy.load().unwrap().logits(&tokens).unwrap();
    let buffer = "model.layers.0.self_attn.rotary_emb.inv_freq".to_string();
    copy.edit(|t| drop(t.insert(buffer, (Dtype::F32, vec![4], vec![0; 16]))));
    assert_eq!(copy.load().unwrap().logits(&tokens).unwrap(), want);
}

#[test]
fn damaged_files_and_shards_are_refused() {
    let copy = Copy::of("llama");
    let whole = file("llama/model.safetensors");
    for len in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        copy.write("model.safetensors", &whole[..len]);
        let refusal = copy.refusal();
        assert!(refusal.contains("model.safetensors: truncated"), "{len} bytes: {refusal}");
    }
    std::fs::remove_file(copy.0.join("model.safetensors")).unwrap();
    assert!(copy.refusal().contains("has no model.safetensors"), "{}", copy.refusal());
    copy.write("model.safetensors", &whole);
    copy.write("generation_config.json", "[]");
    assert!(copy.refusal().contains("generation_config.json: invalid type"), "{}", copy.refusal());
    copy.write("config.json", "{");
    assert!(copy.refusal().contains("config.json: EOF"), "{}", copy.refusal());

    let copy = Copy::of("llama3");
    let shard = "model-00002-of-00003.safetensors";
    let whole = file(&format!("llama3/{shard}"));
    for len in [0, 7, 100, whole.len() - 1] {
        copy.write(shard, &whole[..len]);
        let refusal = copy.refusal();
        assert!(refusal.contains(&format!("{shard}: truncated")), "{len} bytes: {refusal}");
    }
    copy.write(shard, file("llama3/model-00001-of-00003.safetensors"));
    assert!(copy.refusal().contains("is there twice"), "{}", copy.refusal());
    std::fs::remove_file(copy.0.join(shard)).unwrap();
    assert!(copy.refusal().contains(shard), "{}", copy.refusal());

    let index = "model.safetensors.index.json";
    for (to, says) in [
        (json!("model-00001-of-00003.safetensors"), "though model.safetensors.index.json puts it there"),
        (json!("../model.safetensors"), "\"../model.safetensors\" is not the name"),
        (json!("/etc/passwd"), "\"/etc/passwd\" is not the name"),
        (json!(7), "model.safetensors.index.json: invalid type"),
        (Value::Null, "is not where model.safetensors.index.json puts it"),
    ] {
        let copy = Copy::of("llama3");
        let mut map = copy.json(index);
        match to {
            Value::Null => drop(map["weight_map"].as_object_mut().unwrap().remove("model.norm.weight")),
            to => map["weight_map"]["model.norm.weight"] = to,
        }
        copy.write(index, map.to_string());
        assert!(copy.refusal().contains(says), "{}", copy.refusal());
    }
}

#[test]
fn the_digest_covers_configuration_and_weights() {
    for name in ["llama", "llama3", "gguf-f16"] {
        let model = DecoderModel::load(&vectors(name)).unwrap();
        assert_eq!(model.digest(), Copy::of(name).load().unwrap().digest());
    }
    let before = DecoderModel::load(&vectors("llama")).unwrap().digest();
    let copy = Copy::of("llama");
    copy.edit(|t| t.get_mut("model.norm.weight").unwrap().2[0] ^= 1);
    assert_ne!(copy.load().unwrap().digest(), before);
    let copy = Copy::of("llama");
    copy.set("rope_theta", json!(10001.0));
    assert_ne!(copy.load().unwrap().digest(), before);
    let copy = Copy::of("llama");
    copy.write("generation_config.json", r#"{"eos_token_id": [7]}"#);
    let model = copy.load().unwrap();
    assert_eq!((model.digest(), model.config.eos), (before, vec![7]));
}

#[test]
fn directories_are_told_apart() {
    let copy = Copy::of("gguf-f16");
    copy.write("tokenizer.json", "{}");
    assert_eq!(copy.load().unwrap().config.family, "llama");
    copy.write("other.GGUF", "");
    assert!(copy.refusal().contains("holds 2 gguf files"), "{}", copy.refusal());
    let copy = Copy::of("llama");
    copy.write("model.gguf", "");
    assert!(copy.load().is_ok(), "safetensors come first");
    let nowhere = DecoderModel::load(&copy.0.join("absent")).unwrap_err().to_string();
    assert!(nowhere.contains("absent is not a directory"), "{nowhere}");
}

fn gguf(bytes: &[u8]) -> Result<DecoderModel, Error> {
    llama_gguf::read("model.gguf", Box::new(Cursor::new(bytes.to_vec())), bytes.len() as u64)?.model()
}

/// Adds a metadata entry, and one that keeps the tensors aligned.
fn with_entry(bytes: &[u8], key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    let text = |t: &[u8]| [&(t.len() as u64).to_le_bytes(), t].concat();
    let mut entry = [text(key.as_bytes()), kind.to_le_bytes().to_vec(), value.to_vec()].concat();
    let filler = [text(b"general.filler"), 8u32.to_le_bytes().to_vec()].concat();
    let room = 31 - (entry.len() + filler.len() + 8 + 31) % 32;
    entry.extend([filler, text(&vec![b'-'; room])].concat());
    assert_eq!(entry.len() % 32, 0);
    let mut all = [&bytes[..24], &entry, &bytes[24..]].concat();
    let count = u64::from_le_bytes(all[16..24].try_into().unwrap()) + 2;
    all[16..24].copy_from_slice(&count.to_le_bytes());
    all
}

fn find(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).position(|w| w == what).unwrap()
}

#[test]
fn gguf_files_are_refused_by_name() {
    let whole = file("gguf-f16/model.gguf");
    assert!(gguf(&with_entry(&whole, "general.license", 8, &[0; 8])).is_ok());
    assert!(gguf(&with_entry(&whole, "split.count", 2, &[1, 0])).is_ok());
    let (one, yarn) = (1u32.to_le_bytes(), [&4u64.to_le_bytes()[..], b"yarn"].concat());
    let nested = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
    let long = [8u32.to_le_bytes().as_slice(), &u64::MAX.to_le_bytes()].concat();
    for (key, kind, value, says) in [
        ("llama.expert_count", 4, &one[..], "llama.expert_count 1 is not supported, only 0 is"),
        ("llama.attention.sliding_window", 4, &one, "sliding_window 1 is not supported below"),
        ("llama.logit_scale", 6, &2f32.to_le_bytes(), "llama.logit_scale 2.0 is not supported"),
        ("llama.rope.scaling.type", 8, &yarn, "llama.rope.scaling.type \"yarn\" is not supported"),
        ("split.count", 4, &2u32.to_le_bytes(), "split.count 2 is not supported"),
        ("general.type", 8, &yarn, "general.type \"yarn\""),
        ("general.alignment", 4, &0u32.to_le_bytes(), "general.alignment"),
        ("llama.a", 9, &nested, "llama.a is an array of type 9"),
        ("llama.a", 9, &long, "truncated"),
        ("llama.a", 13, &[], "llama.a has unknown type 13"),
        ("llama.a", 7, &[2], "llama.a is neither true nor false"),
        ("llama.a", 8, &u64::MAX.to_le_bytes(), "bytes long"),
        ("general.architecture", 8, &yarn, "is there twice"),
    ] {
        let refusal = gguf(&with_entry(&whole, key, kind, value)).unwrap_err().to_string();
        assert!(refusal.contains(says), "{key}: {refusal}");
    }
    let patched = |at: usize, with: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        gguf(&bytes).unwrap_err().to_string()
    };
    let says = |refusal: String, what: &str| assert!(refusal.contains(what), "{refusal}");
    says(patched(0, b"GGML"), "not a gguf file");
    says(patched(4, &1u32.to_le_bytes()), "gguf version 1 is not supported");
    says(patched(4, &3u32.to_be_bytes()), "gguf version 50331648");
    says(patched(find(&whole, b"\x05\0\0\0\0\0\0\0llama") + 8, b"qwen2"), "general.architecture \"qwen2\"");
    let tensor = find(&whole, b"blk.0.attn_q.weight") + 19;
    says(patched(tensor, &5u32.to_le_bytes()), "blk.0.attn_q.weight has 5 dimensions");
    says(patched(tensor + 4, &u64::MAX.to_le_bytes()), "blk.0.attn_q.weight cannot have shape");
    says(patched(tensor + 20, &12u32.to_le_bytes()), "blk.0.attn_q.weight is Q4_K, expected F32");
    says(patched(tensor + 20, &99u32.to_le_bytes()), "blk.0.attn_q.weight is type 99");
    says(patched(tensor + 24, &7u64.to_le_bytes()), "does not follow the one before it");
    says(patched(find(&whole, b"blk.0.attn_q.weight"), b"blk.9"), "self_attn.q_proj.weight is missing");
    let longer = [&whole[..], &[0; 33]].concat();
    says(gguf(&longer).unwrap_err().to_string(), "33 bytes follow the last tensor");
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }

    /// One to four changes within the first `within` bytes: a byte, or a number that counts something.
    fn damage(&mut self, bytes: &mut Vec<u8>, within: usize) {
        for _ in 0..=self.below(4) {
            let at = self.below(within);
            match self.below(4) {
                0 => bytes[at] = self.below(256) as u8,
                1 => bytes[at] ^= 1 << self.below(8),
                2 => {
                    let number = (u64::MAX >> self.below(64)).to_le_bytes();
                    let width = [4, 8][self.below(2)].min(bytes.len() - at);
                    bytes[at..at + width].copy_from_slice(&number[..width]);
                }
                _ => bytes.truncate(bytes.len() - self.below(64).min(bytes.len() - within)),
            }
        }
    }
}

/// A model that loads is run as well. Returns how many did.
fn survivors(times: usize, load: impl Fn(&mut Random) -> Result<DecoderModel, Error>) -> usize {
    let mut random = Random(0x7ace7);
    let loaded = (0..times).filter_map(|_| load(&mut random).ok());
    loaded.map(|model| drop(model.logits(&[1, 2, 3]))).count()
}

#[test]
fn damaged_gguf_files_never_panic() {
    let whole = file("gguf-q4_0/model.gguf");
    for len in (0..whole.len()).step_by(7) {
        assert!(gguf(&whole[..len]).is_err(), "{len} of {} bytes", whole.len());
    }
    // Nearly all of the names, counts, types and offsets.
    let header = find(&whole, b"blk.1.ffn_norm.weight");
    let loaded = survivors(20_000, |random| {
        let mut bytes = whole.clone();
        let within = if random.below(8) == 0 { bytes.len() } else { header };
        random.damage(&mut bytes, within);
        gguf(&bytes)
    });
    println!("{loaded} of 20000 damaged files still loaded");
    assert!((1..20_000).contains(&loaded));
}

#[test]
fn damaged_safetensors_and_configurations_never_panic() {
    let (config, weights) = (file("smollm2/config.json"), file("smollm2/model.safetensors"));
    let load = |config: &[u8], weights: &[u8]| {
        let mut fields = Fields::parse("config.json", config)?;
        fields.required::<String>("model_type")?;
        let gated = llama::read(fields)?;
        let (mut tensors, mut hash, mut file) =
            (Weights::new([0; 32]), Sha256::default(), Cursor::new(weights.to_vec()));
        tensors.read_safetensors(&mut Source::new("model", &mut file, weights.len() as u64, &mut hash))?;
        tensors.came_from("model", Box::new(file));
        Checkpoint { family: Family::Gated(gated), weights: tensors }.model()
    };
    assert!(load(&config, &weights).is_ok());
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let loaded = survivors(5_000, |random| {
        let mut weights = weights.clone();
        random.damage(&mut weights, header);
        load(&config, &weights)
    });
    println!("{loaded} of 5000 damaged safetensors still loaded");
    let loaded = survivors(5_000, |random| {
        let mut config = config.clone();
        let within = config.len();
        random.damage(&mut config, within);
        load(&config, &weights)
    });
    println!("{loaded} of 5000 damaged configurations still loaded");
    assert!((1..5_000).contains(&loaded));
}
