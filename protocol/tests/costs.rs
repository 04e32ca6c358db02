//! What is dealt, by kind of gate: bytes an element of GELU, and a score with all that its softmax takes.
//!
//! Counts are exact and depend on a model's proven ranges, so a gate that grows shows here and not only in a sum over the model.

#[path = "../../tests/common/tiny.rs"]
#[allow(dead_code)]
mod tiny;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::json;
use tacet_protocol::model::BertModel;
use tacet_protocol::model::decoder::DecoderModel;
use tacet_protocol::plan::{DecoderPlanner, Planner};
use tacet_protocol::program::{OpLine, Program};

/// What belongs to a nonlinearity: its series, the bits of its interval, and the putting together of both.
const GELU: [&str; 3] = ["cosine-series", "tails", "join"];

/// What belongs to a score: its product, the row's maximum, the exponential, and what weighs values by it.
fn of_a_score(l: &OpLine) -> bool {
    match l.op {
        "row-max" | "and" | "count" | "reached" | "exp" | "flag-rescale" => true,
        "spline" => l.detail.ends_with("reciprocal"),
        "broadcast" => l.detail.ends_with(": attention"),
        "product" => l.detail.ends_with("scores (log2)"),
        _ => false,
    }
}

/// Elements that the layers' operations of this kind make first.
fn elements(p: &Program, op: &str) -> usize {
    p.ops.iter().filter(|o| o.kind.name() == op).map(|o| p.values[o.outputs[0]].len()).sum()
}

/// Dealt bytes of these operations, by kind, for each of `n`.
fn each(p: &Program, n: usize, pick: impl Fn(&OpLine) -> bool) -> BTreeMap<&'static str, f64> {
    let mut sums = BTreeMap::new();
    for l in p.describe().iter().filter(|l| pick(l)) {
        *sums.entry(l.op).or_insert(0.0) += l.dealt_bytes as f64 / n as f64;
    }
    sums
}

fn total(parts: &BTreeMap<&'static str, f64>) -> f64 {
    parts.values().sum()
}

/// Bytes of an element of the nonlinearity, and of a score.
fn show(name: &str, p: &Program) -> [f64; 2] {
    let all = each(p, 1, |_| true);
    assert_eq!(total(&all) as u64, p.cost().dealt_bytes.iter().sum::<u64>());
    let gelu = each(p, elements(p, "join"), |l| GELU.contains(&l.op));
    let score = each(p, elements(p, "exp"), of_a_score);
    println!("{name}: dealt {all:.0?}");
    println!("an element of GELU: {:.1} B of {gelu:.1?}", total(&gelu));
    println!("a score: {:.1} B of {score:.1?}", total(&score));
    [total(&gelu), total(&score)]
}

#[test]
fn gelu_and_softmax_of_real_weights_take_few_bytes_an_element() {
    let Some(dir) = std::env::var_os("TACET_MODEL_DIR").map(PathBuf::from) else {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
        return;
    };
    let p = Planner::new(&BertModel::load(&dir).unwrap()).unwrap().program(128).unwrap();
    assert_eq!((elements(&p, "join"), elements(&p, "exp")), (6 * 128 * 1536, 6 * 12 * 128 * 128));
    let [gelu, score] = show("all-MiniLM-L6-v2, 128 tokens", &p);
    // 61.5 and 89.2, of which 3.5 are the score's own product and 4.2 the values'.
    assert!(gelu <= 62.5, "an element of GELU takes {gelu:.1} B");
    assert!(score <= 90.5, "a score takes {score:.1} B");
}

/// One block of GPT-2 small's shape with random weights: a nonlinearity's input has a norm before it, so that its range is
/// that of any block.
#[test]
fn the_finer_gelu_of_a_decoder_takes_few_bytes_an_element() {
    let (d, words) = (768, 512);
    let mut random = tiny::Random::new(3);
    let mut tensors = Vec::new();
    let mut tensor = |name: &str, shape: &[usize], centre: f32| {
        let mut uniform = || (random.word() >> 40) as f32 / (1 << 24) as f32 - 0.5;
        // Two uniform ones: near enough to a bell of deviation 0.02.
        let values = (0..shape.iter().product()).map(|_| centre + 0.05 * (uniform() + uniform())).collect();
        tensors.push((name.to_string(), shape.to_vec(), values));
    };
    tensor("wte.weight", &[words, d], 0.0);
    tensor("wpe.weight", &[1024, d], 0.0);
    for (name, inp, out) in
        [("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d), ("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d)]
    {
        tensor(&format!("h.0.{name}.weight"), &[inp, out], 0.0);
        tensor(&format!("h.0.{name}.bias"), &[out], 0.0);
    }
    for name in ["h.0.ln_1", "h.0.ln_2", "ln_f"] {
        tensor(&format!("{name}.weight"), &[d], 1.0);
        tensor(&format!("{name}.bias"), &[d], 0.0);
    }
    let config = json!({
        "model_type": "gpt2", "n_embd": d, "n_layer": 1, "n_head": 12, "n_positions": 1024, "vocab_size": words,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": true,
    });
    let folder = tiny::Tiny::new(1);
    std::fs::write(folder.dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.dir.join("model.safetensors"), tiny::safetensors(&tensors)).unwrap();
    let planner = DecoderPlanner::new(&DecoderModel::load(&folder.dir).unwrap()).unwrap();
    // Rows have costs of their own, which few scores share where few keys are seen: 242.9 and 117.8.
    for (rows, most) in [(32, 246.0), (128, 119.5)] {
        let p = planner.program(true, 0, rows, false).unwrap();
        assert_eq!(elements(&p, "join"), rows * 4 * d);
        let [gelu, score] = show(&format!("GPT-2 small's shape, {rows} tokens"), &p);
        assert!(gelu <= 79.5, "an element of GELU takes {gelu:.1} B");
        assert!(score <= most, "a score takes {score:.1} B");
    }
}

/// A family's checkpoint of two blocks; rounds of a prompt, a block's and besides; the bytes that eight tokens of one open each
/// way and are dealt, and those of the step after them.
type Family = (&'static str, [u32; 2], [u64; 2], [u64; 2]);

const FAMILIES: [Family; 8] = [
    ("llama", [19, 3], [56_502, 342_695], [8_488, 56_893]),
    ("llama3", [19, 3], [69_427, 382_956], [10_988, 64_930]),
    ("smollm2", [19, 3], [56_807, 352_671], [8_553, 58_255]),
    ("mistral", [19, 3], [56_655, 344_007], [8_507, 57_043]),
    ("qwen2", [19, 3], [60_349, 361_725], [8_957, 62_347]),
    ("qwen3", [20, 2], [70_500, 495_883], [10_083, 75_040]),
    ("gpt2", [18, 3], [49_327, 278_735], [7_865, 48_942]),
    ("gguf-q8_0", [19, 3], [56_502, 342_695], [8_488, 56_893]),
];

/// More than what is reached, by more than a hundredth, is a regression; less is to be written down here.
#[test]
fn prompts_and_steps_of_every_family_cost_what_they_did() {
    let vectors = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    for (name, [block, besides], prompt, step) in FAMILIES {
        let model = DecoderModel::load(&vectors.join(name)).unwrap();
        let planner = DecoderPlanner::new(&model).unwrap();
        for (past, rows, due) in [(0, 8, prompt), (8, 1, step)] {
            let c = planner.program(true, past, rows, false).unwrap().cost();
            let got = [c.opened_bytes, c.dealt_bytes.iter().sum()];
            println!("{name}, {rows} rows after {past}: {} rounds, {got:?} bytes", c.rounds);
            let near = got.iter().zip(&due).all(|(got, due)| got.abs_diff(*due) * 100 < *due);
            assert!(near, "{name}, {rows} rows after {past}: {got:?} bytes opened and dealt where {due:?} were");
            // Those of steps are beside what steps compute, in the decoders' tests.
            assert!(
                past > 0 || c.rounds == block * model.config.layers as u32 + besides,
                "{name}: {} rounds",
                c.rounds
            );
        }
    }
}
