//! The client SDK: text to tokens to shares, sealed to each party; the only place where prompt and answer exist in the clear.
//!
//! ```no_run
//! # async fn f() -> Result<(), tacet_client::ClientError> {
//! let parties = tacet_client::Parties::load("parties.toml".as_ref())?;
//! let client = tacet_client::Client::connect(&parties, "models/all-MiniLM-L6-v2".as_ref()).await?;
//! let vectors = client.embed(&["How do I freeze my card?"]).await?;
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]

pub mod generate;
pub mod serve;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quinn::{Connection, RecvStream, SendStream};
use serde::{Deserialize, Serialize};
use tacet_protocol::Role;
use tacet_protocol::model::BertModel;
use tacet_protocol::plan::Planner;
use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::Program;
use tacet_protocol::ring::{mask, pack, packed_len, unpack};
use tacet_protocol::seal::{SealContext, seal};
use tacet_protocol::wire::{CONTROL_LIMIT, Message, SessionId};
use tacet_transport::{TransportError, certificate_from_pem, dial_config, endpoint, receive, send};
use tokenizers::Tokenizer;
use zeroize::{Zeroize, Zeroizing};

/// What can go wrong, with the party that said so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// A file that cannot be used.
    #[error("{0}")]
    Config(String),
    /// The text does not fit the model.
    #[error("text {index}: {tokens} tokens, but the model takes at most {limit}: shorten or split it")]
    TooLong { index: usize, tokens: usize, limit: usize },
    /// A party cannot be reached.
    #[error(
        "party {party} at {addr} cannot be reached: {reason}; check that it runs and that its certificate is the one in parties.toml"
    )]
    Unreachable { party: String, addr: SocketAddr, reason: String },
    /// A party ended the session; `code` is one of the party's stable codes.
    #[error("party {party} refused (code {code}): {text}")]
    Refused { party: String, code: u16, text: String },
    /// A party vanished or sent something else than an answer.
    #[error("party {party} failed: {reason}; the session has ended everywhere, try again")]
    Failed { party: String, reason: String },
    /// No answer within the deadline.
    #[error("no answer within {0:?}")]
    Deadline(Duration),
    /// Planning or encoding.
    #[error(transparent)]
    Protocol(#[from] tacet_protocol::Error),
}

/// `parties.toml`: whom to ask, and this client's token.
#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Parties {
    /// Bearer token, known to all three parties by its hash.
    pub token: String,
    /// The three parties of a lane.
    pub party: Vec<Party>,
}

/// One party as a client sees it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Party {
    /// Name of the organisation.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// Its QUIC address.
    pub addr: SocketAddr,
    /// Its certificate (PEM), pinned; relative to the file.
    pub certificate: PathBuf,
    /// Public key that inputs are sealed to, hex.
    pub seal_public: String,
}

impl Parties {
    /// Reads `parties.toml`.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(path: &Path) -> Result<Parties, ClientError> {
        let bad = |e: String| ClientError::Config(format!("{}: {e}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
        let mut p: Parties = toml::from_str(&text).map_err(|e| bad(e.to_string()))?;
        let base = path.parent().unwrap_or(Path::new("."));
        p.party.iter_mut().for_each(|p| p.certificate = base.join(&p.certificate));
        if [Role::E1, Role::E2, Role::Dealer].iter().any(|r| p.party.iter().filter(|p| p.role == *r).count() != 1) {
            return Err(bad("three [[party]] entries are needed: e1, e2 and dealer".into()));
        }
        Ok(p)
    }
}

/// One embedded text.
#[derive(Clone, Debug, Serialize)]
pub struct Embedding {
    /// Unit vector.
    pub vector: Vec<f64>,
    /// What it took.
    pub stats: Stats,
}

/// Costs of one query as the parties counted them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    /// Tokens of the text.
    pub tokens: usize,
    /// Rounds between the evaluators.
    pub rounds: u32,
    /// Opened payload bytes, each way.
    pub opened_bytes: u64,
    /// Dealt payload bytes, to both evaluators.
    pub dealt_bytes: u64,
    /// Time of the slower evaluator.
    pub online_s: f64,
    /// Time of the dealer, beside the evaluators' own.
    pub dealing_s: f64,
    /// From text to vector.
    pub total_s: f64,
    /// First bytes sent to each party after its header: what it saw of this input.
    pub seen: Vec<(String, Vec<u8>)>,
}

struct Target {
    party: Party,
    public: [u8; 32],
    connection: Connection,
}

/// A connected client with its model's public parts.
pub struct Client {
    targets: Vec<Target>,
    token: Zeroizing<String>,
    model: Arc<BertModel>,
    planner: Planner,
    tokenizer: Tokenizer,
    programs: Mutex<HashMap<usize, Arc<Program>>>,
    deadline: Duration,
}

fn unhex(s: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if s.len() != 64 || !s.is_ascii() {
        return None;
    }
    for (i, o) in out.iter_mut().enumerate() {
        *o = u8::from_str_radix(&s[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(out)
}

fn random<const N: usize>() -> Result<[u8; N], ClientError> {
    let mut b = [0; N];
    getrandom::fill(&mut b).map_err(|e| ClientError::Config(format!("no randomness: {e}")))?;
    Ok(b)
}

impl Client {
    /// Loads the model's directory and connects to all three parties.
    ///
    /// # Errors
    /// Which file or which party is the trouble.
    pub async fn connect(parties: &Parties, model_dir: &Path) -> Result<Client, ClientError> {
        let model = Arc::new(BertModel::load(model_dir)?);
        let planner = Planner::new(&model)?;
        let file = model_dir.join("tokenizer.json");
        let mut tokenizer =
            Tokenizer::from_file(&file).map_err(|e| ClientError::Config(format!("{}: {e}", file.display())))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| ClientError::Config(format!("{}: {e}", file.display())))?;
        let config = |e: TransportError| ClientError::Config(e.to_string());
        let local = SocketAddr::from(([0, 0, 0, 0], 0));
        let quic = endpoint(local, None).map_err(config)?;
        let mut targets = Vec::new();
        for p in &parties.party {
            let pem = std::fs::read_to_string(&p.certificate)
                .map_err(|e| ClientError::Config(format!("{}: {e}", p.certificate.display())))?;
            let dial = dial_config(certificate_from_pem(&pem).map_err(config)?, None).map_err(config)?;
            let away = |reason: String| ClientError::Unreachable { party: p.name.clone(), addr: p.addr, reason };
            let connecting = quic.connect_with(dial, p.addr, "tacet").map_err(|e| away(e.to_string()))?;
            let connection = tokio::time::timeout(Duration::from_secs(5), connecting).await;
            let connection =
                connection.map_err(|_| away("no answer within 5 s".into()))?.map_err(|e| away(e.to_string()))?;
            let public = unhex(&p.seal_public)
                .ok_or_else(|| ClientError::Config(format!("seal_public of {}: 64 hex digits expected", p.name)))?;
            targets.push(Target { party: p.clone(), public, connection });
        }
        let token = Zeroizing::new(parties.token.clone());
        Ok(Client {
            targets,
            token,
            model,
            planner,
            tokenizer,
            programs: Mutex::default(),
            deadline: Duration::from_secs(90),
        })
    }

    /// The model in use, for comparisons in the clear.
    pub fn model(&self) -> &BertModel {
        &self.model
    }

    /// Token ids of a text.
    ///
    /// # Errors
    /// [`ClientError::TooLong`].
    pub fn tokens(&self, index: usize, text: &str) -> Result<Vec<u32>, ClientError> {
        let e = self.tokenizer.encode(text, true).map_err(|e| ClientError::Config(format!("text {index}: {e}")))?;
        let limit = self.model.config.max_position_embeddings.min(512);
        if e.get_ids().len() > limit {
            return Err(ClientError::TooLong { index, tokens: e.get_ids().len(), limit });
        }
        Ok(e.get_ids().to_vec())
    }

    /// The program for a length, which also predicts its cost.
    ///
    /// # Errors
    /// A length the model does not take.
    pub fn program(&self, tokens: usize) -> Result<Arc<Program>, ClientError> {
        let mut cache = self.programs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(p) = cache.get(&tokens) {
            return Ok(Arc::clone(p));
        }
        if cache.len() >= 64 {
            cache.clear();
        }
        let p = Arc::new(self.planner.program(tokens)?);
        cache.insert(tokens, Arc::clone(&p));
        Ok(p)
    }

    /// Embeds texts, one after another, in order.
    ///
    /// # Errors
    /// The first text that fails ends the call; dropping the future cancels the session at all parties.
    pub async fn embed(&self, texts: &[&str]) -> Result<Vec<Embedding>, ClientError> {
        let mut out = Vec::with_capacity(texts.len());
        for (i, text) in texts.iter().enumerate() {
            let ids = self.tokens(i, text)?;
            out.push(self.embed_ids(&ids).await?);
        }
        Ok(out)
    }

    /// Embeds one sequence of token ids.
    ///
    /// # Errors
    /// As [`Self::embed`].
    pub async fn embed_ids(&self, ids: &[u32]) -> Result<Embedding, ClientError> {
        let started = Instant::now();
        let p = self.program(ids.len())?;
        let bits = p.input_bits();
        let mut input = p.encode_input(&self.model.embed_tokens(ids)?)?;
        let session: SessionId = random()?;
        let seed = Zeroizing::new(random::<32>()?);
        let mut half = vec![0; input.len()];
        Prg::new(&SessionKey::from_seed(*seed)).fill(0, 0, bits, &mut half)?;
        input.iter_mut().zip(&half).for_each(|(x, h)| *x = x.wrapping_sub(*h) & mask(bits));
        half.zeroize();
        let packed = Zeroizing::new(pack(&input, bits));
        input.zeroize();

        let mut stats = Stats { tokens: ids.len(), ..Stats::default() };
        let mut open = Vec::new();
        for t in &self.targets {
            let context = SealContext {
                session,
                party: t.party.name.clone(),
                role: t.party.role,
                model_digest: self.model.digest(),
                program_digest: p.digest(),
            };
            let sealed = match t.party.role {
                Role::E1 => seal(&t.public, &context, seed.as_slice())?,
                Role::E2 => seal(&t.public, &context, &packed)?,
                Role::Dealer => Vec::new(),
            };
            stats.seen.push((t.party.name.clone(), sealed.iter().take(24).copied().collect()));
            let request = Message::Request {
                session,
                token: self.token.to_string(),
                model: self.model.digest(),
                program: p.digest(),
                tokens: ids.len() as u32,
                sealed,
            };
            open.push(self.request(t, request));
        }
        let [a, b, c] = open.try_into().map_err(|_| ClientError::Config("three parties are needed".into()))?;
        let all = async { tokio::try_join!(self.answer(0, a, &p), self.answer(1, b, &p), self.answer(2, c, &p)) };
        let (a, b, c) =
            tokio::time::timeout(self.deadline, all).await.map_err(|_| ClientError::Deadline(self.deadline))??;
        let mut sum = vec![0u64; p.output_len()];
        for m in [a, b, c] {
            match m {
                Message::Output { share, rounds, opened, dealt, online_us } => {
                    let words = Zeroizing::new(unpack(&share, p.output_len(), p.output_bits())?);
                    sum.iter_mut().zip(words.iter()).for_each(|(s, w)| *s = s.wrapping_add(*w));
                    stats.rounds = rounds;
                    stats.opened_bytes = opened;
                    stats.dealt_bytes += dealt;
                    stats.online_s = stats.online_s.max(online_us as f64 / 1e6);
                }
                Message::Done { dealing_us, .. } => stats.dealing_s = dealing_us as f64 / 1e6,
                _ => {}
            }
        }
        let mut vector = p.decode_output(&sum);
        let norm = vector.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
        vector.iter_mut().for_each(|v| *v /= norm);
        stats.total_s = started.elapsed().as_secs_f64();
        Ok(Embedding { vector, stats })
    }

    async fn request(&self, t: &Target, request: Message) -> Result<(SendStream, RecvStream), ClientError> {
        let failed = |reason: String| ClientError::Failed { party: t.party.name.clone(), reason };
        let (mut tx, rx) = t.connection.open_bi().await.map_err(|e| failed(e.to_string()))?;
        send(&mut tx, &request).await.map_err(|e| failed(e.to_string()))?;
        Ok((tx, rx))
    }

    /// Acceptance, then the party's part of the answer.
    async fn answer(
        &self,
        i: usize,
        opened: impl Future<Output = Result<(SendStream, RecvStream), ClientError>>,
        p: &Program,
    ) -> Result<Message, ClientError> {
        let party = self.targets[i].party.name.clone();
        let dealer = self.targets[i].party.role == Role::Dealer;
        // Held until the answer is there: a party takes the end of this stream as "the client left".
        let (_tx, mut rx) = opened.await?;
        let limit = CONTROL_LIMIT + packed_len(p.output_len(), 64);
        let mut accepted = false;
        loop {
            let m = receive(&mut rx, limit)
                .await
                .map_err(|e| ClientError::Failed { party: party.clone(), reason: e.to_string() })?;
            match m {
                Message::Accept if !accepted => accepted = true,
                Message::Failure { code, text } => return Err(ClientError::Refused { party, code, text }),
                Message::Output { .. } if accepted && !dealer => return Ok(m),
                Message::Done { .. } if accepted && dealer => return Ok(m),
                m => return Err(ClientError::Failed { party, reason: format!("unexpected {m:?}") }),
            }
        }
    }
}
