//! The private decoder: one sequence whose keys and values stay masked at the parties, fed by sealed shares of embeddings.
//!
//! A sequence begins with a prompt, padded to one of [`LENGTHS`], and goes on a token at a time; each feed is one sealed
//! message to each evaluator and one share of logits back from each. Forgetting tokens ends the sequence at the parties:
//! the next feed begins a new one with all that is kept. The dealer is sent no input at all.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::try_join_all;
use quinn::{Connection, RecvStream, SendStream};
use tacet_protocol::Role;
use tacet_protocol::model::decoder::DecoderModel;
use tacet_protocol::plan::DecoderPlanner;
use tacet_protocol::program::Program;
use tacet_protocol::query::{LENGTHS, padded, step_digest};
use tacet_protocol::ring::{packed_len, unpack};
use tacet_protocol::seal::{SealContext, seal};
use tacet_protocol::wire::{CONTROL_LIMIT, Message, SessionId};
use tacet_transport::{receive, send};
use tokio::time::{Instant, sleep, timeout};
use zeroize::Zeroizing;

use crate::error::{Rank, Report};
use crate::generate::{Boxed, Decoder, Positions};
use crate::serve::OpenDecoder;
use crate::target::Target;
use crate::{ClientError, random};

/// The parties of a lane and a decoder's public parts; opens sequences.
pub struct Generator {
    lane: Arc<Lane>,
}

pub(crate) struct Lane {
    pub targets: Vec<Target>,
    pub token: Zeroizing<String>,
    pub model: DecoderModel,
    pub planner: DecoderPlanner,
    pub deadline: Duration,
    spent: Mutex<Spent>,
}

impl std::fmt::Debug for Generator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator").field("model", &self.lane.model).finish_non_exhaustive()
    }
}

/// What sequences have cost so far, as the parties counted it.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Spent {
    /// Programs: the prompt's and one a token.
    pub steps: u64,
    /// Rounds between the evaluators.
    pub rounds: u64,
    /// Opened payload bytes, each way.
    pub opened_bytes: u64,
    /// Dealt payload bytes, to both evaluators.
    pub dealt_bytes: u64,
    /// Time of the slower evaluator.
    pub online_s: f64,
}

impl Spent {
    /// What was added after `before`.
    pub fn since(&self, before: &Spent) -> Spent {
        Spent {
            steps: self.steps - before.steps,
            rounds: self.rounds - before.rounds,
            opened_bytes: self.opened_bytes - before.opened_bytes,
            dealt_bytes: self.dealt_bytes - before.dealt_bytes,
            online_s: self.online_s - before.online_s,
        }
    }

    fn add(&mut self, more: &Spent) {
        self.steps += more.steps;
        self.rounds += more.rounds;
        self.opened_bytes += more.opened_bytes;
        self.dealt_bytes += more.dealt_bytes;
        self.online_s += more.online_s;
    }
}

impl Generator {
    pub(crate) fn load(
        dir: &Path,
        targets: Vec<Target>,
        token: Zeroizing<String>,
        deadline: Duration,
    ) -> Result<Generator, ClientError> {
        let model = DecoderModel::load(dir)?;
        let planner = DecoderPlanner::new(&model)?;
        Ok(Generator { lane: Arc::new(Lane { targets, token, model, planner, deadline, spent: Mutex::default() }) })
    }

    /// The model in use, for comparisons in the clear.
    pub fn model(&self) -> &DecoderModel {
        &self.lane.model
    }

    /// Most positions of a sequence, padding included.
    pub fn longest(&self) -> usize {
        self.lane.planner.longest()
    }

    /// Connects to all three parties at once.
    ///
    /// # Errors
    /// The party that cannot be reached.
    pub async fn connect(&self) -> Result<(), ClientError> {
        try_join_all(self.lane.targets.iter().map(Target::connection)).await.map(drop)
    }

    /// Costs of all sequences so far.
    pub fn spent(&self) -> Spent {
        self.lane.spent.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// An empty sequence; the parties hear of it with its first tokens.
    pub fn sequence(&self) -> Sequence {
        Sequence { lane: Arc::clone(&self.lane), tokens: Zeroizing::default(), live: None }
    }
}

impl OpenDecoder for Generator {
    fn open(&self) -> Boxed<'_, Result<Box<dyn Decoder>, ClientError>> {
        Box::pin(async {
            self.connect().await?;
            Ok(Box::new(self.sequence()) as Box<dyn Decoder>)
        })
    }
}

/// One party's stream of a sequence.
struct Stream {
    connection: Connection,
    tx: SendStream,
    rx: RecvStream,
}

/// A sequence that runs at the parties.
struct Live {
    session: SessionId,
    /// One a target, in their order.
    streams: Vec<Stream>,
    /// Digest of the first program.
    first: [u8; 32],
    /// Padded length of the prompt, and positions so far.
    marked: usize,
    past: usize,
}

/// A sequence of tokens; dropping it ends it at the parties.
pub struct Sequence {
    lane: Arc<Lane>,
    tokens: Zeroizing<Vec<u32>>,
    live: Option<Live>,
}

impl Sequence {
    /// Feeds tokens; logits of the last.
    async fn extend(&mut self, tokens: &[u32]) -> Result<Vec<f32>, ClientError> {
        let mut at = 0;
        let mut logits = Vec::new();
        if self.live.is_none() {
            self.tokens.extend_from_slice(tokens);
            at = self.tokens.len().min(LENGTHS[LENGTHS.len() - 1]);
            logits = self.begin(at).await?;
        } else {
            let before = self.tokens.len();
            self.tokens.extend_from_slice(tokens);
            at += before;
        }
        while at < self.tokens.len() {
            logits = self.step(at).await?;
            at += 1;
        }
        Ok(logits)
    }

    /// Starts a sequence at the parties with the first `n` tokens; again, while they are full.
    async fn begin(&mut self, n: usize) -> Result<Vec<f32>, ClientError> {
        let until = Instant::now() + self.lane.deadline;
        let mut pause = Duration::from_millis(50);
        loop {
            match self.attempt(n).await {
                Err(r) if r.busy && Instant::now() + pause < until => sleep(pause).await,
                r => return r.map_err(|r| r.error),
            }
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    async fn attempt(&mut self, n: usize) -> Result<Vec<f32>, Report> {
        let lane = Arc::clone(&self.lane);
        let own = |e: ClientError| Report::new(Rank::Refusal, e);
        let marked = padded(n).unwrap_or(n);
        let p = lane.planner.program(marked, 0, marked, false).map_err(|e| own(e.into()))?;
        let session = random().map_err(own)?;
        let sealed = lane.sealed(&p, session, p.digest(), &self.tokens[..n], 0).map_err(own)?;
        let open = lane.targets.iter().zip(sealed).map(|(t, input)| {
            let request = Message::Request {
                session,
                token: lane.token.to_string(),
                model: lane.model.digest(),
                program: p.digest(),
                tokens: marked as u32,
            };
            async move {
                let (connection, tx, rx) = t.request(request, input).await?;
                Ok::<_, Report>(Stream { connection, tx, rx })
            }
        });
        let mut streams = try_join_all(open).await?;
        let accepted = streams.iter_mut().zip(&lane.targets).map(|(s, t)| async {
            match receive(&mut s.rx, CONTROL_LIMIT).await.map_err(|e| t.broken(&s.connection, &e.to_string()))? {
                Message::Accept => Ok(()),
                m => Err(lane.refusal(t, m, false)),
            }
        });
        within(lane.deadline, try_join_all(accepted)).await?;
        let mut live = Live { session, streams, first: p.digest(), marked, past: marked };
        let logits = lane.answer(&mut live, &p).await?;
        self.live = Some(live);
        Ok(logits)
    }

    /// Feeds the token at `at`.
    async fn step(&mut self, at: usize) -> Result<Vec<f32>, ClientError> {
        let lane = Arc::clone(&self.lane);
        // Taken out: after an error, or if this future is dropped, the sequence has ended.
        let Some(mut live) = self.live.take() else {
            return Err(ClientError::Config("the sequence has ended".into()));
        };
        let p = lane.planner.program(live.marked, live.past, 1, false)?;
        let digest = step_digest(&live.first, live.past);
        let sealed = lane.sealed(&p, live.session, digest, &self.tokens[at..=at], at)?;
        for ((s, t), input) in live.streams.iter_mut().zip(&lane.targets).zip(sealed) {
            if let Some(input) = input {
                send(&mut s.tx, &input).await.map_err(|e| t.broken(&s.connection, &e.to_string()).error)?;
            }
        }
        live.past += 1;
        let logits = lane.answer(&mut live, &p).await.map_err(|r| r.error)?;
        self.live = Some(live);
        Ok(logits)
    }
}

async fn within<T>(limit: Duration, f: impl Future<Output = Result<T, Report>>) -> Result<T, Report> {
    timeout(limit, f).await.unwrap_or_else(|_| Err(Report::new(Rank::Silence, ClientError::Deadline(limit))))
}

impl Lane {
    /// Each target's input for the tokens at positions `at ..`.
    fn sealed(
        &self,
        p: &Program,
        session: SessionId,
        digest: [u8; 32],
        tokens: &[u32],
        at: usize,
    ) -> Result<Vec<Option<Message>>, ClientError> {
        let embedded = Zeroizing::new(self.model.embed_tokens(tokens, at)?);
        let halves = p.split(&p.encode_input(&embedded)?)?;
        let input = |t: &Target| {
            let context = SealContext {
                session,
                party: t.party.name.clone(),
                role: t.party.role,
                model_digest: self.model.digest(),
                program_digest: digest,
            };
            let half: &[u8] = match t.party.role {
                Role::E1 => halves.seed.as_slice(),
                Role::E2 => &halves.packed,
                Role::Dealer => return Ok(None),
            };
            Ok(Some(Message::Input { sealed: seal(&t.public, &context, half)? }))
        };
        self.targets.iter().map(input).collect()
    }

    /// Both evaluators' shares of a program's logits; watches the dealer for a word meanwhile.
    async fn answer(&self, live: &mut Live, p: &Program) -> Result<Vec<f32>, Report> {
        let limit = CONTROL_LIMIT + packed_len(p.output_len(), 64);
        let (mut evaluators, mut dealer) = (Vec::new(), None);
        for (s, t) in live.streams.iter_mut().zip(&self.targets) {
            if t.party.role == Role::Dealer { dealer = Some((s, t)) } else { evaluators.push((s, t)) }
        }
        let shares = evaluators.into_iter().map(|(s, t)| async move {
            match receive(&mut s.rx, limit).await.map_err(|e| t.broken(&s.connection, &e.to_string()))? {
                m @ Message::Output { .. } => Ok(m),
                m => Err(self.refusal(t, m, true)),
            }
        });
        let shares = within(self.deadline, try_join_all(shares));
        let watched = async {
            let Some((s, t)) = dealer else { return std::future::pending().await };
            match receive(&mut s.rx, CONTROL_LIMIT).await {
                Ok(m) => Err::<(), _>(self.refusal(t, m, true)),
                Err(e) => Err(t.broken(&s.connection, &e.to_string())),
            }
        };
        // A dealer that ends its stream is done with its part only when the evaluators are done with theirs.
        let outputs = tokio::select! {
            r = shares => r?,
            Err(r) = watched => return Err(r),
        };
        let (mut words, mut slowest, mut spent) = (Vec::new(), 0, Spent::default());
        for m in outputs {
            let Message::Output { share, rounds, opened, dealt, online_us } = m else { continue };
            let share = Zeroizing::new(share);
            let share = unpack(&share, p.output_len(), p.output_bits());
            words.push(Zeroizing::new(share.map_err(|e| Report::new(Rank::GaveUp, e.into()))?));
            if words.len() == 1 {
                spent.rounds += u64::from(rounds);
                spent.opened_bytes += opened;
            }
            spent.dealt_bytes += dealt;
            slowest = slowest.max(online_us);
        }
        spent.steps = 1;
        spent.online_s = slowest as f64 / 1e6;
        self.spent.lock().unwrap_or_else(PoisonError::into_inner).add(&spent);
        let [a, b] = &words[..] else {
            let e = ClientError::Config("parties.toml needs two evaluators".into());
            return Err(Report::new(Rank::Refusal, e));
        };
        let logits = p.decode_output(a, b, 1).map_err(|e| Report::new(Rank::GaveUp, e.into()))?;
        Ok(Zeroizing::new(logits).iter().map(|v| *v as f32).collect())
    }

    fn refusal(&self, t: &Target, m: Message, accepted: bool) -> Report {
        let Message::Failure { code, text } = m else {
            return Report::new(Rank::GaveUp, t.failed(format!("unexpected {m:?}")));
        };
        let others = self.targets.iter().map(|o| &o.party).filter(|o| o.name != t.party.name);
        Report::refusal(&t.party.name, accepted, code, text, others.map(|o| (o.name.as_str(), format!("{:?}", o.role))))
    }
}

impl Decoder for Sequence {
    fn feed<'a>(
        &'a mut self,
        tokens: &'a [u32],
        positions: Positions,
    ) -> Boxed<'a, Result<Vec<Vec<f32>>, ClientError>> {
        Box::pin(async move {
            if positions == Positions::Last {
                return Ok(vec![self.extend(tokens).await?]);
            }
            // The parties give the last position's logits: every position is the last of its own program.
            let mut all = Vec::with_capacity(tokens.len());
            for t in tokens {
                all.push(self.extend(std::slice::from_ref(t)).await?);
            }
            Ok(all)
        })
    }

    fn len(&self) -> usize {
        self.tokens.len()
    }

    fn truncate(&mut self, len: usize) {
        if len < self.tokens.len() {
            self.tokens.truncate(len);
            self.live = None;
        }
    }
}
