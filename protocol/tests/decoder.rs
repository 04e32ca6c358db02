//! Decoders under masked evaluation, three roles in one process: prefill and single steps with keys and values that stay
//! masked between programs, against the f64 model.

mod common;
#[path = "../../tests/common/trained.rs"]
mod trained;

use std::path::PathBuf;

use common::{States, run};
use tacet_protocol::model::decoder::{Checkpoint, DecoderModel};
use tacet_protocol::plan::{DecoderPlanner, Keep};
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::query;
use tacet_protocol::ring::signed;
use tacet_protocol::twin::{self, Plain};
use tacet_protocol::{Error, EvaluatorIo, Role, run as interpret};
use trained::trained;

fn top(logits: &[f64]) -> usize {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap()
}

/// Largest error relative to the spread of `want`.
fn error(got: &[f64], want: &[f64]) -> f64 {
    let spread = want.iter().copied().fold(f64::MIN, f64::max) - want.iter().copied().fold(f64::MAX, f64::min);
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / spread
}

/// What happens to a sequence: new tokens in rows of a padded length, or all positions past the first few are forgotten.
#[derive(Clone, Copy)]
enum Event {
    Feed(usize),
    Rewind(usize),
}
use Event::{Feed, Rewind};

/// A sequence as its parties and its client hold it, masked and in the twin.
#[derive(Default)]
struct Sequence {
    states: States,
    twin: Vec<Vec<f64>>,
    key: u64,
    /// Of every position, whether it is a token.
    real: Vec<bool>,
    /// Position less number of a token, as the kept keys have it.
    base: i64,
}

impl Sequence {
    /// Feeds `tokens`, the first of which is the `at`-th; the last one's logits, masked and in the twin, whose every value
    /// is within its proven bound.
    fn feed(&mut self, model: &DecoderModel, planner: &DecoderPlanner, tokens: &[u32], at: usize) -> [Vec<f64>; 2] {
        let past = self.real.len();
        let rows = if tokens.len() == 1 && past > 0 { 1 } else { query::padded(tokens.len()).unwrap() };
        let p = planner.program(true, past, rows, false).unwrap();
        let x = model.embed_tokens(tokens, at).unwrap();
        let base = (past + rows - tokens.len()) as i64 - at as i64;
        let moves = if past > 0 && model.config.rope.is_some() { base - self.base } else { 0 };
        let input = p.encode_moving(&x, moves).unwrap();
        let units: Vec<Vec<f64>> = p
            .inputs()
            .zip(&input)
            .map(|(v, x)| x.iter().map(|x| signed(*x, p.values[v].bits) as f64).collect())
            .collect();
        let within = |v: usize, made: &Plain| {
            let (v, Plain::Real(made)) = (&p.values[v], made) else { return };
            let largest = made.iter().fold(0f64, |m, x| m.max(x.abs()));
            assert!(v.bound == 0.0 || largest <= v.bound, "{}: {largest:.3e}, proven {:.3e}", v.name, v.bound);
        };
        let plain = twin::evaluate(&p, &units, &mut self.twin, within).unwrap();
        let plain = plain.iter().map(|v| v * p.values[p.output()].ulp).collect();
        let ([a, b], io) = run(&p, &input, self.key, &mut self.states);
        if self.key < 2 || rows > 1 {
            let cost = p.cost();
            println!(
                "{rows} rows after {past}: {} rounds, opened {:.2} MB, dealt {:.2} MB",
                io[0].rounds,
                cost.opened_bytes as f64 / 1e6,
                cost.dealt_bytes.iter().sum::<u64>() as f64 / 1e6
            );
        }
        self.real.extend((0..rows).map(|i| i >= rows - tokens.len()));
        (self.base, self.key) = (base, self.key + 1);
        [p.decode_output(&a, &b, 1).unwrap(), plain]
    }

    /// Forgets all but the first `tokens` tokens, and the padding that lies after them.
    fn rewind(&mut self, tokens: usize) {
        let ends = self.real.iter().enumerate().filter(|(_, r)| **r).nth(tokens - 1).unwrap().0 + 1;
        self.states.cut(ends);
        self.twin.iter_mut().for_each(|v| v.truncate(v.len() / self.real.len() * ends));
        self.real.truncate(ends);
    }
}

/// Masked and in the twin: logits of the last position after each part of `tokens`: a padded first one, then single ones.
fn private(model: &DecoderModel, planner: &DecoderPlanner, tokens: &[u32], first: usize) -> Vec<[Vec<f64>; 2]> {
    let mut s = Sequence::default();
    let mut out = vec![s.feed(model, planner, &tokens[..first], 0)];
    out.extend((first..tokens.len()).map(|at| s.feed(model, planner, &tokens[at..=at], at)));
    out
}

fn stories() -> Option<(DecoderModel, Vec<u32>)> {
    let dir = trained()?;
    let ids = serde_json::from_slice(&std::fs::read(dir.join("greedy_200_ids.json")).unwrap()).unwrap();
    Some((DecoderModel::load(&dir).unwrap(), ids))
}

#[test]
fn a_real_llama_continues_as_published() {
    let Some((model, ids)) = stories() else { return };
    let planner = DecoderPlanner::new(&model).unwrap();
    let tokens = &ids[..ids.len() - 1];
    assert_eq!(tokens.len(), 200);
    let got = private(&model, &planner, tokens, 1);
    let want = model.logits(tokens).unwrap();
    let (mut worst, mut rounding, mut approximation) = (0f64, 0f64, 0f64);
    let (mut clear, mut published) = (0, 0);
    for (([got, plain], want), next) in got.iter().zip(want.chunks_exact(planner.vocab())).zip(&ids[1..]) {
        worst = worst.max(error(got, want));
        rounding = rounding.max(error(got, plain));
        approximation = approximation.max(error(plain, want));
        clear += usize::from(top(got) == top(want));
        published += usize::from(top(got) == *next as usize);
    }
    println!(
        "of {}, {clear} agree with f64 and {published} with the published text; largest error {worst:.4} of the spread ({rounding:.4} to the twin, {approximation:.4} of the twin)",
        got.len()
    );
    // Two of the 200 steps have nearly tied logits.
    assert!(clear >= 198 && published >= 198);
    assert!(worst < 0.01);
}

/// A sequence whose tokens are chosen as it goes.
struct Greedy<'a> {
    model: &'a DecoderModel,
    planner: &'a DecoderPlanner,
    sequence: Sequence,
    text: Vec<u32>,
}

impl<'a> Greedy<'a> {
    fn new(model: &'a DecoderModel, planner: &'a DecoderPlanner, prompt: &[u32], key: u64) -> Greedy<'a> {
        Greedy { model, planner, sequence: Sequence { key, ..Sequence::default() }, text: prompt.to_vec() }
    }

    fn step(&mut self) {
        let at = if self.sequence.real.is_empty() { 0 } else { self.text.len() - 1 };
        let [logits, _] = self.sequence.feed(self.model, self.planner, &self.text[at..], at);
        self.text.push(top(&logits) as u32);
    }
}

/// Roundings depend on masks, so logits differ in their last bits from run to run; what a user reads does not.
#[test]
fn sequences_side_by_side_give_the_tokens_of_each_alone() {
    let Some((model, ids)) = stories() else { return };
    let planner = DecoderPlanner::new(&model).unwrap();
    let prompts = [&ids[..5], &ids[20..29], &ids[60..80]];
    let alone: Vec<Vec<u32>> = (0u64..)
        .zip(prompts)
        .map(|(i, prompt)| {
            let mut g = Greedy::new(&model, &planner, prompt, 1000 * i);
            (0..20).for_each(|_| g.step());
            g.text.clone()
        })
        .collect();
    let mut together: Vec<Greedy> =
        (0u64..).zip(prompts).map(|(i, p)| Greedy::new(&model, &planner, p, 1000 * i + 500)).collect();
    for _ in 0..20 {
        std::thread::scope(|s| together.iter_mut().for_each(|g| drop(s.spawn(|| g.step()))));
    }
    assert!(together.iter().map(|g| &g.text).eq(&alone));
}

#[derive(serde::Deserialize)]
struct Expected {
    tokens: Vec<u32>,
    logits: Vec<Vec<f64>>,
}

/// Each family's tiny checkpoint, of which transformers computed the logits: all positions at once, and token by token.
#[test]
fn every_family_agrees_with_transformers_in_prefill_and_in_steps() {
    let vectors = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    for name in ["llama", "llama3", "smollm2", "mistral", "qwen2", "qwen3", "gpt2", "gguf-q8_0"] {
        let dir = vectors.join(name);
        let want: Expected = serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
        let model = DecoderModel::load(&dir).unwrap();
        let planner = DecoderPlanner::new(&model).unwrap_or_else(|e| panic!("{name}: {e}"));
        let n = want.tokens.len();

        let p = planner.program(false, 0, n, true).unwrap();
        let x = model.embed_tokens(&want.tokens, 0).unwrap();
        let ([a, b], _) = run(&p, &p.encode_input(&x).unwrap(), 1, &mut States::default());
        let all = p.decode_output(&a, &b, n).unwrap();
        let prefill: Vec<f64> =
            all.chunks_exact(planner.vocab()).zip(&want.logits).map(|(got, want)| error(got, want)).collect();

        let steps = private(&model, &planner, &want.tokens, 3);
        let decoded: Vec<f64> = steps.iter().zip(&want.logits[2..]).map(|([got, _], want)| error(got, want)).collect();
        let worst = |errors: &[f64]| errors.iter().copied().fold(0.0, f64::max);
        let layers = model.config.layers as u32;
        let rounds = planner.program(false, n - 1, 1, false).unwrap().cost().rounds;
        println!(
            "{name}: largest error {:.4} of the spread in prefill, {:.4} in steps; {rounds} rounds for {layers} layers",
            worst(&prefill),
            worst(&decoded)
        );
        for (got, want) in all.chunks_exact(planner.vocab()).zip(&want.logits) {
            assert_eq!(top(got), top(want), "{name} prefill");
        }
        for ([got, _], want) in steps.iter().zip(&want.logits[2..]) {
            assert_eq!(top(got), top(want), "{name} steps");
        }
        assert!(worst(&prefill) <= 0.01 && worst(&decoded) <= 0.01, "{name}");
        let most = match name {
            "gpt2" => 16 * layers + 3,
            "qwen3" => 18 * layers + 2,
            _ => 17 * layers + 3,
        };
        assert_eq!(rounds, most, "{name}");

        // A prompt at once, padded, and the same tokens one by one.
        let [got, _] = &private(&model, &planner, &want.tokens, n)[0];
        let single = private(&model, &planner, &want.tokens, 1);
        let [one, _] = &single[n - 1];
        assert_eq!(top(got), top(one), "{name} prompt and tokens");
        assert!(error(got, one) <= 0.01, "{name}: {} between prompt and tokens", error(got, one));
    }
}

struct Nobody;

impl EvaluatorIo for Nobody {
    fn dealt(&mut self, _: u32, len: usize) -> Result<Vec<u8>, Error> {
        Ok(vec![0; len])
    }

    fn exchange(&mut self, _: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        Ok(out)
    }
}

/// A dealer and a client plan without weights, from the files and a block at a time, what evaluators plan with them.
#[test]
fn planning_without_weights_gives_the_same_program_that_cannot_be_evaluated() {
    let vectors = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    for name in ["llama3", "qwen3", "gpt2", "gguf-q4_1"] {
        let dir = vectors.join(name);
        let model = DecoderModel::load(&dir).unwrap();
        let whole = DecoderPlanner::new(&model).unwrap().program(true, 0, 8, false).unwrap();
        for keep in [Keep::Weights, Keep::Shapes] {
            let (planner, embedding) = DecoderPlanner::read(Checkpoint::open(&dir).unwrap(), keep).unwrap();
            let p = planner.program(true, 0, 8, false).unwrap();
            assert_eq!(
                (p.digest(), p.cost(), embedding.digest()),
                (whole.digest(), whole.cost(), model.digest()),
                "{name}"
            );
            assert_eq!(embedding.embed_tokens(&[1, 5], 3).unwrap(), model.embed_tokens(&[1, 5], 3).unwrap(), "{name}");
            let input = p.inputs().map(|v| vec![0; p.values[v].len()]).collect();
            let prg = Prg::new(&SessionKey::from_seed([1; 32]));
            let done = interpret::evaluate(&p, Role::E1, prg, input, &mut Nobody);
            match keep {
                Keep::Weights => assert!(done.is_ok(), "{name}"),
                Keep::Shapes => assert!(done.unwrap_err().to_string().contains("planned without weights"), "{name}"),
            }
        }
    }
}

/// Any checkpoint of one's own, such as one that was trained, with what it really has of large gains and channels.
#[test]
fn a_named_checkpoint_agrees_with_f64() {
    let Some(dir) = std::env::var_os("TACET_DECODER_DIR") else {
        println!("skipped: TACET_DECODER_DIR does not name a decoder's directory");
        return;
    };
    let model = DecoderModel::load(&PathBuf::from(dir)).unwrap();
    let planner = DecoderPlanner::new(&model).unwrap();
    let vocab = model.config.vocab as u32;
    let tokens: Vec<u32> = (1..12u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    let want = model.logits(&tokens).unwrap();
    let got = private(&model, &planner, &tokens, 8);
    for ([got, plain], want) in got.iter().zip(want.chunks_exact(vocab as usize).skip(7)) {
        let (all, rounding, approximation) = (error(got, want), error(got, plain), error(plain, want));
        println!("{all:.4} of the spread ({rounding:.4} to the twin, {approximation:.4} of the twin)");
        assert!(all < 0.01);
    }
}

/// Turns of several tokens, padded in between, and tokens taken back: the logits are those of the tokens by themselves,
/// wherever positions come from.
#[test]
fn padded_later_turns_and_forgotten_ones_leave_no_trace() {
    let vectors = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    let families = ["llama", "llama3", "smollm2", "mistral", "qwen2", "qwen3", "gpt2"];
    let mut dirs: Vec<PathBuf> = families.iter().map(|name| vectors.join(name)).collect();
    dirs.extend(trained());
    for dir in dirs {
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        let model = DecoderModel::load(&dir).unwrap();
        let planner = DecoderPlanner::new(&model).unwrap();
        let (mut s, mut tokens, mut fed) = (Sequence::default(), Vec::<u32>::new(), 0u32);
        // The second rewind ends within the first program, whose keys have moved twice by then; the last one leaves a token.
        let events =
            [Feed(3), Feed(1), Feed(5), Feed(1), Feed(1), Feed(2), Rewind(10), Feed(3), Rewind(2), Feed(5), Feed(1)];
        let (mut worst, mut rounding, mut moved) = (0f64, 0f64, 0);
        for event in events.into_iter().chain([Rewind(1), Feed(2), Feed(1)]) {
            let n = match event {
                Rewind(n) => {
                    s.rewind(n);
                    tokens.truncate(n);
                    continue;
                }
                Feed(n) => n,
            };
            let at = tokens.len();
            tokens.extend((0..n as u32).map(|i| 3 + (fed + i) * 7 % 29));
            fed += n as u32;
            let before = s.base;
            let [got, plain] = s.feed(&model, &planner, &tokens[at..], at);
            moved += usize::from(s.base != before && at > 0);
            let want = model.logits(&tokens).unwrap();
            let want = &want[(tokens.len() - 1) * planner.vocab()..];
            worst = worst.max(error(&got, want));
            rounding = rounding.max(error(&got, &plain));
            assert_eq!(top(&got), top(want), "{name} after {} tokens", tokens.len());
        }
        println!(
            "{name}: largest error {worst:.4} of the spread ({rounding:.4} to the twin); past keys moved {moved} times"
        );
        assert!(worst <= 0.01 && moved >= 4, "{name}");
    }
}
