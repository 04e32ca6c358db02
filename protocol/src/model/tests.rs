use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};
use serde_json::{Value, json};

use super::tensors::f16_to_f32;
use super::*;

const H: usize = 12;
const TOKENS: [u32; 5] = [3, 7, 29, 0, 11];

/// A model directory that goes away with the test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Dir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tacet-model-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Dir(path)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    fn refusal(&self) -> String {
        BertModel::load(&self.0).unwrap_err().to_string()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

struct Tiny {
    config: Value,
    tensors: BTreeMap<String, Tensor>,
}

impl Tiny {
    fn save(&self) -> Dir {
        let dir = Dir::new();
        dir.write("config.json", self.config.to_string());
        dir.write("model.safetensors", self.safetensors());
        dir
    }

    fn safetensors(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(n, t)| (n, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
        serialize(views, None).unwrap()
    }

    fn rename(&mut self, new: impl Fn(&str) -> String) {
        self.tensors = std::mem::take(&mut self.tensors).into_iter().map(|(n, t)| (new(&n), t)).collect();
    }

    /// Keeps the upper half of every value's bits, which is what bf16 is.
    fn truncate_to_bf16(&mut self) {
        for tensor in self.tensors.values_mut() {
            tensor.dtype = Dtype::BF16;
            tensor.bytes = tensor.bytes.chunks_exact(4).flat_map(|b| [b[2], b[3]]).collect();
        }
    }
}

/// Two blocks with weights from a linear congruential generator, in the order below.
fn tiny() -> Tiny {
    const F: usize = 20;
    let (positions, words, segments) = (16, 30, 2);
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("embeddings.word_embeddings.weight".into(), vec![words, H]),
        ("embeddings.position_embeddings.weight".into(), vec![positions, H]),
        ("embeddings.token_type_embeddings.weight".into(), vec![segments, H]),
        ("embeddings.LayerNorm.weight".into(), vec![H]),
        ("embeddings.LayerNorm.bias".into(), vec![H]),
    ];
    for l in 0..2 {
        for (name, shape) in [
            ("attention.self.query", vec![H, H]),
            ("attention.self.key", vec![H, H]),
            ("attention.self.value", vec![H, H]),
            ("attention.output.dense", vec![H, H]),
            ("attention.output.LayerNorm", vec![H]),
            ("intermediate.dense", vec![F, H]),
            ("output.dense", vec![H, F]),
            ("output.LayerNorm", vec![H]),
        ] {
            let bias = vec![shape[0]];
            shapes.push((format!("encoder.layer.{l}.{name}.weight"), shape));
            shapes.push((format!("encoder.layer.{l}.{name}.bias"), bias));
        }
    }
    let mut state = 1u32;
    let tensors = shapes.into_iter().map(|(name, shape)| {
        let bytes = (0..shape.iter().product::<usize>())
            .flat_map(|_| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                ((state >> 16) as f32 / 65536.0 - 0.5).to_le_bytes()
            })
            .collect();
        (name, Tensor { dtype: Dtype::F32, shape, bytes })
    });
    Tiny {
        tensors: tensors.collect(),
        config: json!({
            "model_type": "bert", "hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 3,
            "intermediate_size": F, "max_position_embeddings": positions, "type_vocab_size": segments,
            "vocab_size": words, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
            "position_embedding_type": "absolute", "hidden_dropout_prob": 0.1,
        }),
    }
}

/// From the numpy specification, run on the same weights and [`TOKENS`].
const TINY_MEAN: [f64; H] = [
    -0.18774494774295578,
    -0.0387784016483204,
    -0.19999684437633433,
    0.1292598357367957,
    -0.21825924137427055,
    0.8102825895533282,
    -0.43042936064549,
    -0.5406957431021864,
    -0.32996788954283685,
    -0.6474970633941134,
    -0.4116858815254972,
    -0.6683510619009135,
];
const TINY_FIRST: [f64; 3] = [-0.16664351670968225, -0.04062830031104113, -0.19390899927403865];

fn assert_close(got: &[f64], want: &[f64], within: f64) {
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= within, "value {i}: {g}, expected {w}");
    }
}

#[test]
fn tiny_model_equals_the_specification() {
    let model = BertModel::load(&tiny().save().0).unwrap();
    let pooled = model.plaintext(&TOKENS).unwrap();
    assert_eq!(pooled.len(), H);
    assert_close(&pooled, &TINY_MEAN, 1e-12);
    assert_close(&model.plaintext_hidden(&TOKENS).unwrap()[..3], &TINY_FIRST, 1e-12);
    assert_eq!(model.embed_tokens(&TOKENS).unwrap().len(), TOKENS.len() * H);
    assert_eq!(model.layers[0].intermediate.out, 20);
}

#[test]
fn every_length_gives_rows_independent_of_tiling() {
    let model = BertModel::load(&tiny().save().0).unwrap();
    for n in 1..=9u32 {
        let tokens: Vec<u32> = (0..n).collect();
        let hidden = model.plaintext_hidden(&tokens).unwrap();
        assert_eq!(hidden.len(), n as usize * H);
        assert!(hidden.iter().all(|v| v.is_finite()));
    }
}

#[test]
fn other_names_for_the_same_tensors() {
    let mut model = tiny();
    model.rename(|n| format!("bert.{}", n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")));
    let model = BertModel::load(&model.save().0).unwrap();
    assert_close(&model.plaintext(&TOKENS).unwrap(), &TINY_MEAN, 1e-12);
}

#[test]
fn narrow_tensors_are_widened() {
    let mut narrow = tiny();
    narrow.truncate_to_bf16();
    let model = BertModel::load(&narrow.save().0).unwrap();
    assert_close(&model.plaintext(&TOKENS).unwrap(), &TINY_MEAN, 0.1);

    let mut narrow = tiny();
    let bias = narrow.tensors.get_mut("encoder.layer.1.output.dense.bias").unwrap();
    bias.dtype = Dtype::F16;
    bias.bytes = [0x3c00u16.to_le_bytes(); H].concat();
    assert_eq!(BertModel::load(&narrow.save().0).unwrap().layers[1].output.bias, [1.0; H]);
}

#[test]
fn half_precision_is_exact() {
    for (half, single) in [
        (0x0000u16, 0.0f32),
        (0x0001, 5.9604645e-8),
        (0x03ff, 6.097555e-5),
        (0x0400, 6.1035156e-5),
        (0x3555, 0.33325195),
        (0xc000, -2.0),
        (0x7bff, 65504.0),
        (0xfc00, f32::NEG_INFINITY),
    ] {
        assert_eq!(f16_to_f32(half), single, "{half:#06x}");
    }
    assert!(f16_to_f32(0x7e00).is_nan());
    assert!(f16_to_f32(0x8000).is_sign_negative());
}

#[test]
fn pooling_is_read_and_changes_the_digest() {
    let dir = tiny().save();
    let mean = BertModel::load(&dir.0).unwrap();
    assert_eq!(mean.pooling, Pooling::Mean);
    assert_eq!(mean.digest(), BertModel::load(&dir.0).unwrap().digest());

    dir.write("1_Pooling/config.json", r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}"#);
    let cls = BertModel::load(&dir.0).unwrap();
    assert_eq!(cls.pooling, Pooling::Cls);
    assert_ne!(cls.digest(), mean.digest());
    assert_close(&cls.plaintext(&TOKENS).unwrap(), &TINY_FIRST, 1e-12);

    dir.write("1_Pooling/config.json", r#"{"word_embedding_dimension": 12, "pooling_mode": "mean"}"#);
    assert_eq!(BertModel::load(&dir.0).unwrap().digest(), mean.digest());
}

#[test]
fn pooling_and_modules_are_refused_by_name() {
    let dir = tiny().save();
    for (file, says) in [
        (json!({"pooling_mode_max_tokens": true}), "pooling mode \"max_tokens\" is not supported"),
        (json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}), "cls_token, mean_tokens"),
        (json!({"pooling_mode_cls_token": false}), "no pooling mode"),
        (json!({"pooling_mode_mean_tokens": true, "word_embedding_dimension": 13}), "word_embedding_dimension 13"),
        (json!([1]), "1_Pooling/config.json"),
    ] {
        dir.write("1_Pooling/config.json", file.to_string());
        assert!(dir.refusal().contains(says), "{}", dir.refusal());
    }
    dir.write("modules.json", r#"[{"type": "sentence_transformers.models.Dense"}]"#);
    assert!(dir.refusal().contains("module Dense"), "{}", dir.refusal());
}

#[test]
fn configurations_are_refused_by_name() {
    for (field, value, says) in [
        ("hidden_act", json!("gelu_new"), "hidden_act \"gelu_new\" is not supported"),
        ("hidden_act", json!("relu"), "hidden_act \"relu\""),
        ("position_embedding_type", json!("relative_key"), "position_embedding_type \"relative_key\""),
        ("model_type", json!("roberta"), "model_type \"roberta\""),
        ("is_decoder", json!(true), "is_decoder"),
        ("num_attention_heads", json!(5), "num_attention_heads 5"),
        ("num_attention_heads", json!(0), "num_attention_heads is zero"),
        ("vocab_size", json!(-1), "config.json"),
        ("layer_norm_eps", json!(0), "layer_norm_eps"),
        ("num_hidden_layers", json!(3), "encoder.layer.2.attention.self.query.weight is missing"),
        ("vocab_size", json!(31), "word_embeddings.weight is [30, 12], expected [31, 12]"),
        ("hidden_size", json!(u64::MAX / 3 * 3), "expected [30, "),
    ] {
        let mut model = tiny();
        model.config[field] = value;
        let refusal = model.save().refusal();
        assert!(refusal.contains(says), "{field}: {refusal}");
    }
    let mut model = tiny();
    model.config.as_object_mut().unwrap().remove("intermediate_size");
    assert!(model.save().refusal().contains("intermediate_size"));
}

#[test]
fn tensors_are_refused_by_name() {
    let name = "encoder.layer.1.attention.self.key.weight";
    let mut model = tiny();
    model.tensors.remove(name);
    assert_eq!(model.save().refusal(), format!("model: model.safetensors: tensor {name} is missing"));

    let mut model = tiny();
    model.tensors.get_mut(name).unwrap().shape = vec![H * H];
    let refusal = model.save().refusal();
    assert!(refusal.ends_with(&format!("tensor {name} is [144], expected [12, 12]")), "{refusal}");

    let mut model = tiny();
    model.tensors.get_mut(name).unwrap().dtype = Dtype::I32;
    let refusal = model.save().refusal();
    assert!(refusal.contains(name) && refusal.contains("I32"), "{refusal}");

    let mut model = tiny();
    model.tensors.get_mut(name).unwrap().bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(model.save().refusal().contains(&format!("{name} holds a value that is not finite")));
}

#[test]
fn damaged_files_are_refused() {
    let dir = tiny().save();
    let whole = tiny().safetensors();
    for len in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        dir.write("model.safetensors", &whole[..len]);
        let refusal = dir.refusal();
        assert!(refusal.contains("model.safetensors: truncated"), "{len} bytes: {refusal}");
    }
    dir.write("config.json", "{");
    assert!(dir.refusal().contains("config.json"));
    std::fs::remove_file(dir.0.join("config.json")).unwrap();
    assert!(dir.refusal().contains("config.json"));
    let nowhere = BertModel::load(&dir.0.join("absent")).unwrap_err().to_string();
    assert!(nowhere.contains("absent is not a directory"), "{nowhere}");
}

#[test]
fn tokens_are_checked_and_not_repeated_in_errors() {
    let model = BertModel::load(&tiny().save().0).unwrap();
    assert!(model.embed_tokens(&[]).is_err());
    assert!(model.embed_tokens(&[1; 16]).is_ok());
    let long = model.embed_tokens(&[1; 17]).unwrap_err().to_string();
    assert!(long.contains("17 tokens") && long.contains("16 positions"), "{long}");
    let outside = model.plaintext(&[1, 987654]).unwrap_err().to_string();
    assert!(outside.contains("token 1 ") && !outside.contains("987654"), "{outside}");
}

/// Token ids, and the first values of the specification's unit vector for them, with its embedding sums in float64 too
/// (in float32, as published code adds them, these differ by 3e-9).
const REAL: [(&[u32], [f64; 8]); 2] = [
    // The quick brown fox jumps over the lazy dog.
    (
        &[101, 1996, 4248, 2829, 4419, 14523, 2058, 1996, 13971, 3899, 1012, 102],
        [
            0.043933537170,
            0.058934399948,
            0.048178383425,
            0.077548095048,
            0.026744415728,
            -0.037629602534,
            -0.002605089965,
            -0.059943047706,
        ],
    ),
    // A man is playing a guitar on stage.
    (
        &[101, 1037, 2158, 2003, 2652, 1037, 2858, 2006, 2754, 1012, 102],
        [
            0.018590751537,
            0.035836884435,
            -0.015210183325,
            -0.078206308125,
            -0.143276211083,
            0.004202048270,
            0.074919214921,
            -0.017194317766,
        ],
    ),
];
/// The same for tokens `37 i mod 30000 + 1`, `i < 128`.
const REAL_LONG: [f64; 8] = [
    0.027398431796,
    0.007813140688,
    -0.056042226597,
    0.037621256898,
    -0.106720767436,
    -0.023736440741,
    0.024183653005,
    -0.134573761125,
];

#[test]
fn published_weights_equal_the_specification() {
    let Some(dir) = std::env::var_os("TACET_MODEL_DIR") else {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
        return;
    };
    let model = BertModel::load(Path::new(&dir)).unwrap();
    let unit = |tokens: &[u32]| {
        let y = model.plaintext(tokens).unwrap();
        let norm = y.iter().map(|v| v * v).sum::<f64>().sqrt();
        y.iter().map(|v| v / norm).collect::<Vec<f64>>()
    };
    for (tokens, want) in REAL {
        assert_close(&unit(tokens), &want, 1e-11);
    }
    let long: Vec<u32> = (0..128).map(|i| i * 37 % 30000 + 1).collect();
    let start = std::time::Instant::now();
    assert_close(&unit(&long), &REAL_LONG, 1e-11);
    println!("128 tokens in {:.2?}", start.elapsed());
}
