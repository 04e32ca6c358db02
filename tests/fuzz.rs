//! The bodies of the fuzz targets on random and mutated inputs: what libFuzzer does for longer and with coverage.

#[path = "../fuzz/src/lib.rs"]
#[allow(dead_code)]
mod bodies;

use bodies::Target;
use bodies::tiny::{self, Random};

const ROUNDS: usize = 3000;

/// One to four changes: a bit, a byte at an edge, a cut, a piece repeated, a random tail.
fn mutate(random: &mut Random, mut x: Vec<u8>) -> Vec<u8> {
    for _ in 0..1 + random.below(4) {
        let at = random.below(x.len() + 1);
        match random.below(5) {
            0 if at < x.len() => x[at] ^= 1 << random.below(8),
            1 if at < x.len() => x[at] = [0, 1, 0x7f, 0x80, 0xff, b'0', b'9', b'"'][random.below(8)],
            2 => x.truncate(at),
            3 => {
                let piece = x[at..(at + random.below(32)).min(x.len())].to_vec();
                x.splice(at..at, piece);
            }
            _ => {
                let n = random.below(24);
                x.extend(random.bytes(n));
            }
        }
    }
    x
}

fn run(target: &Target) {
    let seed = tiny::seed();
    let mut random = Random::new(seed);
    let seeds = (target.seeds)();
    if let Some(corpus) = std::env::var_os("TACET_FUZZ_CORPUS") {
        let dir = std::path::Path::new(&corpus).join(target.name);
        std::fs::create_dir_all(&dir).unwrap();
        seeds.iter().enumerate().for_each(|(i, s)| std::fs::write(dir.join(format!("seed-{i}")), s).unwrap());
    }
    let give = |input: &[u8]| {
        if std::panic::catch_unwind(|| (target.body)(input)).is_err() {
            let shown = &input[..input.len().min(400)];
            panic!("{}: TACET_TEST_SEED={seed}: {} bytes: {shown:02x?}", target.name, input.len());
        }
    };
    seeds.iter().for_each(|s| give(s));
    for i in 0..ROUNDS {
        let input = if i % 3 == 0 {
            let n = random.below(200);
            random.bytes(n)
        } else {
            let base = seeds[random.below(seeds.len())].clone();
            mutate(&mut random, base)
        };
        give(&input);
    }
}

#[test]
fn wire() {
    run(&bodies::TARGETS[0]);
}

#[test]
fn ring() {
    run(&bodies::TARGETS[1]);
}

#[test]
fn sealed() {
    run(&bodies::TARGETS[2]);
}

#[test]
fn model() {
    run(&bodies::TARGETS[3]);
}

#[test]
fn config() {
    run(&bodies::TARGETS[4]);
}

#[test]
fn program() {
    run(&bodies::TARGETS[5]);
}
