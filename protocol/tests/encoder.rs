//! The whole encoder under masked evaluation, three roles in one process, against the f64 model and the cost model.

#[path = "../../tests/common/tiny.rs"]
#[allow(dead_code)]
mod tiny;

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use tacet_protocol::model::BertModel;
use tacet_protocol::plan::Planner;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::Program;
use tacet_protocol::ring::mask;
use tacet_protocol::{DealerSink, Error, EvaluatorIo, Role, run};

/// One evaluator's ends of the channels, with counters of payload bytes.
struct Io {
    dealer: Receiver<(u32, Vec<u8>)>,
    to: Sender<(u32, Vec<u8>)>,
    from: Receiver<(u32, Vec<u8>)>,
    rounds: u32,
    opened: u64,
    dealt: u64,
    /// How often each byte value was received, and the first bytes received.
    seen: Box<[u64; 256]>,
    head: Vec<u8>,
}

impl Io {
    fn record(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.seen[*b as usize] += 1);
        self.head.extend(bytes.iter().take(1024usize.saturating_sub(self.head.len())));
    }
}

fn gone<E>(_: E) -> Error {
    Error::Transport("the other thread ended".into())
}

impl EvaluatorIo for Io {
    fn dealt(&mut self, step: u32, len: usize) -> Result<Vec<u8>, Error> {
        let (s, b) = self.dealer.recv().map_err(gone)?;
        assert_eq!((s, b.len()), (step, len));
        self.dealt += len as u64;
        self.record(&b);
        Ok(b)
    }

    fn exchange(&mut self, step: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        self.rounds += 1;
        self.opened += out.len() as u64;
        self.to.send((step, out)).map_err(gone)?;
        let (s, b) = self.from.recv().map_err(gone)?;
        assert_eq!(s, step);
        self.record(&b);
        Ok(b)
    }
}

struct Sink([Sender<(u32, Vec<u8>)>; 2]);

impl DealerSink for Sink {
    fn send(&mut self, to: Role, step: u32, bytes: Vec<u8>) -> Result<(), Error> {
        self.0[usize::from(to == Role::E2)].send((step, bytes)).map_err(gone)
    }
}

/// Shares `input`, runs the three roles on threads, adds the result shares; checks counted costs.
fn run(p: &Program, input: &[u64], key: u64) -> (Vec<u64>, [Io; 2]) {
    let prg = |i: u8| {
        let mut seed = [i; 32];
        seed[..8].copy_from_slice(&key.to_le_bytes());
        Prg::new(&SessionKey::from_seed(seed))
    };
    let mut s1 = vec![0; input.len()];
    prg(77).fill(0, 0, p.input_bits(), &mut s1).unwrap();
    let s2 = input.iter().zip(&s1).map(|(x, s)| x.wrapping_sub(*s) & mask(p.input_bits())).collect();
    let ((d1, r1), (d2, r2), (a, b), (c, d)) = (channel(), channel(), channel(), channel());
    let io = |dealer, to, from| Io {
        dealer,
        to,
        from,
        rounds: 0,
        opened: 0,
        dealt: 0,
        seen: Box::new([0; 256]),
        head: vec![],
    };
    let (mut io1, mut io2) = (io(r1, a, d), io(r2, c, b));
    let (y1, y2) = std::thread::scope(|s| {
        let dealing = s.spawn(|| run::deal(p, prg(1), prg(2), &mut Sink([d1, d2])).unwrap());
        let e1 = s.spawn(|| run::evaluate(p, Role::E1, prg(1), s1, &mut io1).unwrap());
        let e2 = s.spawn(|| run::evaluate(p, Role::E2, prg(2), s2, &mut io2).unwrap());
        dealing.join().unwrap();
        (e1.join().unwrap(), e2.join().unwrap())
    });
    let cost = p.cost();
    for (io, dealt) in [(&io1, cost.dealt_bytes[0]), (&io2, cost.dealt_bytes[1])] {
        assert_eq!((io.rounds, io.opened, io.dealt), (cost.rounds, cost.opened_bytes, dealt));
    }
    (y1.iter().zip(y2).map(|(a, b)| a.wrapping_add(b) & mask(p.output_bits())).collect(), [io1, io2])
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn real_weights_agree_with_plaintext_and_cost_is_exact() {
    let Some(dir) = std::env::var_os("TACET_MODEL_DIR").map(PathBuf::from) else {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
        return;
    };
    let t = Instant::now();
    let model = BertModel::load(&dir).unwrap();
    println!("load {:?}", t.elapsed());
    let t = Instant::now();
    let planner = Planner::new(&model).unwrap();
    println!("plan {:?}", t.elapsed());
    let layers = model.layers.len() as u32;
    for tokens in [2usize, 9, 32, 128] {
        let ids: Vec<u32> = (0..tokens)
            .map(|i| match i {
                0 => 101,
                _ if i + 1 == tokens => 102,
                _ => 1996 + (i as u32 * 7919) % 9000,
            })
            .collect();
        let p = planner.program(tokens).unwrap();
        assert_eq!(p.digest(), planner.program(tokens).unwrap().digest());
        let c = p.cost();
        let input = p.encode_input(&model.embed_tokens(&ids).unwrap()).unwrap();
        let t = Instant::now();
        let got = p.decode_output(&run(&p, &input, 9).0);
        let took = t.elapsed();
        let cos = cosine(&got, &model.plaintext(&ids).unwrap());
        println!(
            "{tokens} tokens: cosine {cos:.6}, {} rounds a layer, opened {:.1} MB, dealt {:.1} MB, {took:?}",
            c.rounds / layers,
            c.opened_bytes as f64 / 1e6,
            (c.dealt_bytes[0] + c.dealt_bytes[1]) as f64 / 1e6
        );
        assert!(cos >= 0.999, "{tokens} tokens: cosine {cos}");
        assert_eq!(c.rounds, 26 * layers);
        // Both links carry about half of what is dealt.
        assert!(c.dealt_bytes[0].abs_diff(c.dealt_bytes[1]) < (c.dealt_bytes[0] + c.dealt_bytes[1]) * 4 / 5);
        if tokens == 128 {
            assert!(c.opened_bytes <= 60_000_000 && c.dealt_bytes.iter().sum::<u64>() <= 400_000_000);
        }
    }
}

/// Two-sample chi-square statistic with as many degrees of freedom as there are cells less one.
fn chi_square(a: &[u64], b: &[u64]) -> f64 {
    let (na, nb) = (a.iter().sum::<u64>() as f64, b.iter().sum::<u64>() as f64);
    let cell = |(x, y): (&u64, &u64)| {
        let d = *x as f64 * (nb / na).sqrt() - *y as f64 * (na / nb).sqrt();
        if x + y == 0 { 0.0 } else { d * d / (x + y) as f64 }
    };
    a.iter().zip(b).map(cell).sum()
}

/// What one evaluator receives must not depend on the text. (The dealer receives nothing, by its interface.)
#[test]
fn received_bytes_are_statistically_the_same_for_different_inputs() {
    let Some(dir) = std::env::var_os("TACET_MODEL_DIR").map(PathBuf::from) else {
        println!("skipped: TACET_MODEL_DIR does not name a directory with all-MiniLM-L6-v2");
        return;
    };
    const RUNS: u64 = 60;
    let model = BertModel::load(&dir).unwrap();
    let p = Planner::new(&model).unwrap().program(2).unwrap();
    let width = p.input_len();
    // One input of zeros, one as large as the ring allows: far outside what any text gives.
    let inputs =
        [vec![0; width], (0..width as u64).map(|i| (i * 0x9e37_79b9_7f4a_7c15) & mask(p.input_bits())).collect()];
    // Per input and evaluator: counts of byte values, and counts of ones at each of the first 8192 bit positions.
    let mut seen = vec![[[0u64; 256]; 2]; 2];
    let mut ones = vec![[vec![0u64; 8192], vec![0u64; 8192]]; 2];
    for (i, input) in inputs.iter().enumerate() {
        for r in 0..RUNS {
            let (_, io) = run(&p, input, 1 + r * 2 + i as u64);
            for (e, io) in io.iter().enumerate() {
                seen[i][e].iter_mut().zip(io.seen.iter()).for_each(|(a, b)| *a += b);
                ones[i][e].iter_mut().enumerate().for_each(|(j, n)| *n += u64::from(io.head[j / 8] >> (j % 8) & 1));
            }
        }
    }
    for e in 0..2 {
        let x = chi_square(&seen[0][e], &seen[1][e]);
        // 255 degrees of freedom: mean 255, deviation 22.6; six deviations.
        assert!(x < 391.0, "E{}: chi-square {x:.0} over byte values", e + 1);
        let worst = ones[0][e].iter().zip(&ones[1][e]).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        // The difference of two binomials of 60 has deviation 5.5; 8192 positions, six and a half deviations.
        assert!(worst <= 36, "E{}: a bit differs in {worst} of {RUNS} runs", e + 1);
    }
}

/// Small proven scores: what a sharp row gives to its other tokens is not lost below a maximum that is too finely stepped.
#[test]
fn attention_is_accurate_within_a_small_bound() {
    let dir = tiny::Tiny::new(1);
    let first = BertModel::load(&dir.dir).unwrap().embed_tokens(&[1]).unwrap();
    for factor in [0.5, 1.0, 2.0] {
        let mut weights = tiny::weights(1);
        for (name, shape, values) in &mut weights {
            // Every row of queries and keys looks for the first token, which therefore attends to itself most.
            if name.contains("query.weight") || name.contains("key.weight") {
                values.chunks_exact_mut(shape[1]).for_each(|r| {
                    r.iter_mut().zip(&first).for_each(|(w, x)| *w = (x * factor / first.len() as f64) as f32)
                });
            }
            if name.contains("value.weight") || name.contains("attention.output.dense.weight") {
                values.iter_mut().for_each(|v| *v *= 4.0);
            }
        }
        std::fs::write(dir.dir.join("model.safetensors"), tiny::safetensors(&weights)).unwrap();
        let model = BertModel::load(&dir.dir).unwrap();
        let p = Planner::new(&model).unwrap().program(6).unwrap();
        let ids = [1, 9, 17, 25, 33, 41];
        let input = p.encode_input(&model.embed_tokens(&ids).unwrap()).unwrap();
        let got = p.decode_output(&run(&p, &input, 5).0);
        let cos = cosine(&got, &model.plaintext(&ids).unwrap());
        assert!(cos > 0.9999, "factor {factor}: cosine {cos}");
    }
}
