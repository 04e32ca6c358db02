//! One function for every decoder that takes bytes from outside: no bytes make it panic, hang, or break what it promises.
//!
//! libFuzzer runs them (see README.md), and so does an ordinary test of the workspace above, which includes this file.
#![forbid(unsafe_code)]

#[path = "../../tests/common/tiny.rs"]
#[allow(dead_code)]
pub mod tiny;

use std::path::Path;
use std::sync::OnceLock;

use tacet_party::config::{Clients, Config};
use tacet_protocol::model::BertModel;
use tacet_protocol::plan::Planner;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::{Kind, Program};
use tacet_protocol::ring::{mask, pack, packed_len, unpack};
use tacet_protocol::seal::{OVERHEAD, SealContext, SealKeyPair, open, seal};
use tacet_protocol::wire::{DealerTime, Dealing, EvaluatorTime, Message, Next};
use tacet_protocol::{Error, EvaluatorIo, Role, run};
use tiny::Tiny;

/// A body with inputs that reach deep into it.
pub struct Target {
    pub name: &'static str,
    pub body: fn(&[u8]),
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 6] = [
    Target { name: "wire", body: wire, seeds: wire_seeds },
    Target {
        name: "ring",
        body: ring,
        seeds: || vec![vec![13; 60], vec![1, 0, 255], vec![64, 2, 9, 9, 9, 9, 9, 9, 9, 9]],
    },
    Target { name: "sealed", body: sealed, seeds: seal_seeds },
    Target { name: "model", body: model, seeds: model_seeds },
    Target { name: "config", body: config, seeds: config_seeds },
    Target { name: "program", body: program, seeds: || vec![vec![0], vec![1; 9], vec![2; 64], (0..=255).collect()] },
];

/// The first byte, and the rest.
fn split(data: &[u8]) -> (u8, &[u8]) {
    data.split_first().map_or((0, &[]), |(first, rest)| (*first, rest))
}

/// A frame after its length. What is accepted has one encoding, and does not print what it holds.
pub fn wire(data: &[u8]) {
    if let Ok(m) = Message::decode(data) {
        assert_eq!(&m.encode()[4..], data);
        assert!(format!("{m:?}").len() < 24);
    }
}

fn wire_seeds() -> Vec<Vec<u8>> {
    let all = [
        Message::Hello { name: "alpha".into(), role: 1, model: [1; 32], program: [2; 32], ephemeral: [3; 32] },
        Message::Request { session: [4; 16], token: "t".into(), model: [1; 32], program: [2; 32], tokens: 7 },
        Message::Accept,
        Message::Failure { code: 12, text: "no".into() },
        Message::Join { session: [4; 16], nonce: [5; 16] },
        Message::Token { token: "t".into() },
        Message::Input { sealed: vec![9; 5] },
        Message::Start { dealing: Dealing::Fresh { nonce: [5; 16] } },
        Message::Start { dealing: Dealing::Ahead { bundle: [6; 16] } },
        Message::Prepare { bundle: [6; 16], program: [2; 32], tokens: 8, nonce: [5; 16] },
        Message::Ready { nonce: [5; 16] },
        Message::Peer { session: [4; 16] },
        Message::Step { step: 3, bytes: vec![1, 2, 3] },
        Message::Output {
            share: vec![8; 3],
            rounds: 1,
            opened: 2,
            dealt: 3,
            time: EvaluatorTime::default(),
            dealer: DealerTime::default(),
        },
        Message::Done { dealt: [1, 2], time: DealerTime::default(), ahead: true },
        Message::Next(Next { number: 3, past: 40, rows: 8 }),
        Message::Announce { next: Next { number: 3, past: 40, rows: 8 }, so_far: DealerTime::default() },
    ];
    all.iter().map(|m| m.encode()[4..].to_vec()).collect()
}

/// Ring, number of words, packed words. What is accepted packs to the same bytes again.
pub fn ring(data: &[u8]) {
    let (bits, rest) = split(data);
    let (n, bytes) = split(rest);
    for n in [n as usize, bytes.len() * 8 / usize::from(bits.max(1)), usize::MAX, usize::MAX / 64 + 1] {
        if let Ok(words) = unpack(bytes, n, u32::from(bits)) {
            assert!(words.len() == n && words.iter().all(|w| *w <= mask(u32::from(bits))));
            assert_eq!(pack(&words, u32::from(bits)), bytes);
        }
    }
}

fn context() -> SealContext {
    SealContext {
        session: [7; 16],
        party: "north".into(),
        role: Role::E2,
        model_digest: [8; 32],
        program_digest: [9; 32],
    }
}

fn keys() -> &'static SealKeyPair {
    static KEYS: OnceLock<SealKeyPair> = OnceLock::new();
    KEYS.get_or_init(|| SealKeyPair::from_secret([5; 32]))
}

/// A sealed share, or a public key with a share to seal to it.
pub fn sealed(data: &[u8]) {
    let (what, rest) = split(data);
    if what & 1 == 0 {
        // Only who knows the public key can seal, and the seed below is the one ciphertext that the fuzzer knows.
        if let Ok(plain) = open(keys(), &context(), rest) {
            assert_eq!(plain.len() + OVERHEAD, rest.len());
        }
    } else if let Some((public, plain)) = rest.split_first_chunk::<32>()
        && let Ok(sealed) = seal(public, &context(), plain)
    {
        assert_eq!(sealed.len(), plain.len() + OVERHEAD);
    }
}

fn seal_seeds() -> Vec<Vec<u8>> {
    let sealed = seal(&keys().public(), &context(), b"half").unwrap();
    let public = keys().public().to_vec();
    vec![[&[0][..], &sealed].concat(), [&[1][..], &public, b"half"].concat(), vec![0; 1 + OVERHEAD]]
}

thread_local! {
    /// A valid directory, whose files a body replaces and puts back.
    static DIR: Tiny = Tiny::new(1);
}

/// Applies changes of three bytes each: two of position (scaled to the whole length), one of value.
fn patch(bytes: &mut [u8], changes: &[u8]) {
    for c in changes.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([c[0], c[1]])) * bytes.len() / 65536;
        bytes[at] = c[2];
    }
}

/// Overwrites whole weights: two bytes of position, four of a value that may be any float.
fn reweigh(file: &mut [u8], changes: &[u8]) {
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let weights = (file.len() - header) / 4;
    for c in changes.chunks_exact(6) {
        let at = usize::from(u16::from_le_bytes([c[0], c[1]])) * weights / 65536;
        file[header + 4 * at..][..4].copy_from_slice(&c[2..6]);
    }
}

/// A model directory with one file of these bytes, or changed by them. What loads and can be bounded is a whole program.
pub fn model(data: &[u8]) {
    let (what, rest) = split(data);
    DIR.with(|tiny| {
        let file = match what % 7 {
            0 | 1 => "config.json",
            2..=4 => "model.safetensors",
            5 => "modules.json",
            _ => "1_Pooling/config.json",
        };
        let path = tiny.dir.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let valid = std::fs::read(&path).ok();
        let mut bytes = valid.clone().unwrap_or_default();
        match what % 7 {
            1 | 2 => patch(&mut bytes, rest),
            3 => reweigh(&mut bytes, rest),
            _ => bytes = rest.to_vec(),
        }
        std::fs::write(&path, bytes).unwrap();
        let loaded = BertModel::load(&tiny.dir);
        match valid {
            Some(valid) => std::fs::write(&path, valid).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        if let Ok(model) = loaded
            && let Ok(planner) = Planner::new(&model)
            && let Ok(p) = planner.program(8)
        {
            assert_eq!(p.digest(), planner.program(8).unwrap().digest());
            assert!(p.cost().rounds > 0 && p.describe().len() == p.ops.len());
            assert!(p.values.iter().all(|v| (1..=64).contains(&v.bits)), "a ring that is none");
        }
    });
}

fn model_seeds() -> Vec<Vec<u8>> {
    let huge = [&[3, 1, 90][..], &f32::MAX.to_le_bytes(), &[0, 200], &(-1e30f32).to_le_bytes()].concat();
    vec![
        [&[0][..], tiny::config(1).to_string().as_bytes()].concat(),
        [&[4][..], &tiny::safetensors(&tiny::weights(1))].concat(),
        vec![1, 30, 90, b'9', 7, 120, b'0'],
        vec![2, 0, 0, 1, 9, 1, b'9'],
        huge,
        vec![3],
        b"\x05[{\"type\": \"sentence_transformers.models.Normalize\"}]".to_vec(),
        b"\x06{\"pooling_mode_cls_token\": true, \"word_embedding_dimension\": 32}".to_vec(),
    ]
}

/// `party.toml`, `clients.toml` or `parties.toml`.
pub fn config(data: &[u8]) {
    let (what, rest) = split(data);
    DIR.with(|tiny| {
        let file = tiny.dir.join("some.toml");
        std::fs::write(&file, rest).unwrap();
        match what % 3 {
            0 => {
                if let Ok(c) = Config::load(&file) {
                    assert!(c.peer.len() == 2 && c.key.starts_with(&tiny.dir) || c.key.is_absolute());
                    toml::from_str::<Config>(std::str::from_utf8(rest).unwrap()).unwrap();
                }
            }
            1 => {
                if let Ok(c) = tacet_party::config::parse::<Clients>(Path::new(&file)) {
                    assert!(!c.knows("") || !c.client.is_empty());
                    assert!(
                        c.client
                            .iter()
                            .all(|c| tacet_party::config::unhex(&c.token_sha256).is_none_or(|h| h.len() == 32))
                    );
                }
            }
            _ => {
                if let Ok(p) = tacet_client::Parties::load(&file) {
                    assert!(p.party.len() >= 3);
                }
            }
        }
    });
}

fn config_seeds() -> Vec<Vec<u8>> {
    let party = concat!(
        "\0name = \"alpha\"\nrole = \"e1\"\nlisten = \"0.0.0.0:7001\"\nhttp = \"127.0.0.1:7081\"\nmodel = \"m\"\n",
        "certificate = \"a.crt\"\nkey = \"a.key\"\nseal_key = \"a.seal\"\nclients = \"clients.toml\"\n",
        "[limits]\nsessions = 4\ntokens = 99\njoin_s = 1\nsession_s = 2\ndrain_s = 3\n",
        "[[peer]]\nname = \"b\"\nrole = \"e2\"\naddr = \"198.51.100.2:7001\"\ncertificate = \"b.crt\"\n",
        "[[peer]]\nname = \"c\"\nrole = \"dealer\"\naddr = \"[::1]:7001\"\ncertificate = \"/c.crt\"\n",
    );
    let clients = "\u{1}[[client]]\nname = \"clinic\"\ntoken_sha256 = \"00ff\"\n";
    let mut parties = String::from("\u{2}token = \"t\"\n");
    for role in ["e1", "e2", "dealer"] {
        parties += &format!("[[party]]\nname = \"{role}\"\nrole = \"{role}\"\naddr = \"127.0.0.1:1\"\n");
        parties += "certificate = \"x.crt\"\nseal_public = \"00\"\n";
    }
    [party, clients, &parties].map(|t| t.as_bytes().to_vec()).to_vec()
}

fn tiny_program() -> &'static Program {
    static PROGRAM: OnceLock<Program> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let tiny = Tiny::new(1);
        Planner::new(&BertModel::load(&tiny.dir).unwrap()).unwrap().program(8).unwrap()
    })
}

/// An evaluator's world made of bytes, repeated without end.
struct Script<'a> {
    program: &'static Program,
    role: Role,
    bytes: &'a [u8],
    at: usize,
    /// Clear the bits that an honest packing leaves clear, so that the words get past the parser.
    honest: bool,
    /// One message has another length.
    odd: Option<u8>,
}

impl Script<'_> {
    fn next(&mut self, step: u32, packed: &[(usize, u32)]) -> Vec<u8> {
        let mut out = Vec::new();
        for &(n, bits) in packed {
            for _ in 0..packed_len(n, bits) {
                out.push(self.bytes.get(self.at).copied().unwrap_or(0xff));
                self.at = if self.at < self.bytes.len() { self.at + 1 } else { 0 };
            }
            let used = n * bits as usize % 8;
            if let Some(last) = out.last_mut().filter(|_| self.honest && used > 0) {
                *last &= (1 << used) - 1;
            }
        }
        if self.odd == Some(step as u8) {
            out.truncate(self.at % (out.len() + 1));
        }
        out
    }
}

impl EvaluatorIo for Script<'_> {
    fn dealt(&mut self, step: u32, len: usize) -> Result<Vec<u8>, Error> {
        let side = usize::from(self.role == Role::E2);
        let all = self.program.ops[step as usize].kind.dealt();
        let bytes = |n: usize| tacet_protocol::gates::dealt_bytes(step, &all[..n])[side];
        let own: Vec<_> = (0..all.len()).filter(|i| bytes(i + 1) > bytes(*i)).map(|i| all[i]).collect();
        let out = self.next(step, &own);
        assert!(out.len() == len || self.odd.is_some());
        Ok(out)
    }

    fn exchange(&mut self, step: u32, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        let p = self.program;
        let op = &p.ops[step as usize];
        assert!(matches!(op.kind, Kind::Open) && out.len() == p.opening_len(op));
        let packed: Vec<_> = op.inputs.iter().map(|v| (p.values[*v].len(), p.values[*v].bits)).collect();
        Ok(self.next(step, &packed))
    }
}

/// Everything that an evaluator receives in a session: its half of the input, dealt messages and openings.
pub fn program(data: &[u8]) {
    let (how, rest) = split(data);
    let (odd, bytes) = split(rest);
    let p = tiny_program();
    let role = if how & 1 == 0 { Role::E1 } else { Role::E2 };
    let (honest, odd) = (how & 2 == 0, (how & 4 != 0).then_some(odd));
    let mut io = Script { program: p, role, bytes, at: 0, honest, odd };
    let packed: Vec<_> = p.inputs().map(|v| (p.values[v].len(), p.values[v].bits)).collect();
    let half = io.next(u32::MAX, &packed);
    let Ok(input) = p.expand(Role::E2, &half) else { return };
    let prg = Prg::new(&SessionKey::from_seed([how; 32]));
    match run::evaluate(p, role, prg, input, &mut io) {
        Ok(share) => assert!(share.len() == p.output_len() && share.iter().all(|w| *w <= mask(p.output_bits()))),
        // Words of the right form are never refused: what they say cannot be told from a masked value.
        Err(e) => assert!(!honest || odd.is_some(), "{e}"),
    }
}
