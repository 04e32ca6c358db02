//! The private decoder: one sequence whose keys and values stay masked at the parties, fed by sealed shares of embeddings.
//!
//! A sequence begins with a prompt of a padded length and goes on by single tokens or by padded turns; each feed is one
//! sealed message to each evaluator and one share of logits back from each. What is forgotten is taken back at the parties
//! with the next feed; where padding has used up the model's positions, that begins another sequence with all
//! that is kept. The dealer is sent no input at all.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::try_join_all;
use quinn::{Connection, RecvStream, SendStream};
use tacet_protocol::Role;
use tacet_protocol::model::decoder::Embedding;
use tacet_protocol::plan::DecoderPlanner;
use tacet_protocol::program::Program;
use tacet_protocol::programs::Programs;
use tacet_protocol::query::{padded, step_digest};
use tacet_protocol::ring::{packed_len, unpack};
use tacet_protocol::seal::{SealContext, seal};
use tacet_protocol::wire::{CONTROL_LIMIT, DealerTime, EvaluatorTime, Message, Next, SessionId, announced};
use tacet_transport::{receive, send};
use tokio::time::{Instant, sleep, timeout};
use zeroize::{Zeroize, Zeroizing};

use crate::error::{Rank, Report};
use crate::generate::{Boxed, Decoder, Positions};
use crate::phases::{Phases, added, seconds};
use crate::serve::OpenDecoder;
use crate::slots::{Part, Slots};
use crate::target::{Target, silent};
use crate::{ClientError, random};

/// The parties of a lane and a decoder's public parts; opens sequences.
pub struct Generator {
    lane: Arc<Lane>,
}

pub(crate) struct Lane {
    pub targets: Vec<Target>,
    pub token: Zeroizing<String>,
    pub model: Embedding,
    pub planner: DecoderPlanner,
    /// Those that a sequence begins with, by rows.
    prompts: Programs,
    pub deadline: Duration,
    spent: Mutex<Spent>,
}

impl std::fmt::Debug for Generator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generator").field("model", &self.lane.model).finish_non_exhaustive()
    }
}

/// What sequences have cost so far, as the parties counted it. A sum that they drive out of bounds stays there.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Spent {
    /// Programs: the prompt's, one a turn of several tokens, and one a single token.
    pub steps: u64,
    /// Rounds between the evaluators.
    pub rounds: u64,
    /// Opened payload bytes, each way.
    pub opened_bytes: u64,
    /// Dealt payload bytes, to both evaluators.
    pub dealt_bytes: u64,
    /// Bytes in which the parties tell one another which program is next.
    pub announced_bytes: u64,
    /// Time of the slower evaluator.
    pub online_s: f64,
    /// Where the time went. The dealer's part is that of the programs before the last: it works ahead, and tells with each
    /// program what those before it took.
    pub phases: Phases,
}

impl Spent {
    /// What was added after `before`.
    pub fn since(&self, before: &Spent) -> Spent {
        Spent {
            steps: self.steps.saturating_sub(before.steps),
            rounds: self.rounds.saturating_sub(before.rounds),
            opened_bytes: self.opened_bytes.saturating_sub(before.opened_bytes),
            dealt_bytes: self.dealt_bytes.saturating_sub(before.dealt_bytes),
            announced_bytes: self.announced_bytes.saturating_sub(before.announced_bytes),
            online_s: self.online_s - before.online_s,
            phases: self.phases.with(&before.phases, |a, b| a - b),
        }
    }

    fn add(&mut self, more: &Spent) {
        self.steps = self.steps.saturating_add(more.steps);
        self.rounds = self.rounds.saturating_add(more.rounds);
        self.opened_bytes = self.opened_bytes.saturating_add(more.opened_bytes);
        self.dealt_bytes = self.dealt_bytes.saturating_add(more.dealt_bytes);
        self.announced_bytes = self.announced_bytes.saturating_add(more.announced_bytes);
        self.online_s += more.online_s;
        self.phases = self.phases.with(&more.phases, |a, b| a + b);
    }
}

impl Generator {
    pub(crate) fn new(
        planner: DecoderPlanner,
        model: Embedding,
        targets: Vec<Target>,
        token: Zeroizing<String>,
        deadline: Duration,
    ) -> Generator {
        Generator {
            lane: Arc::new(Lane {
                targets,
                token,
                model,
                planner,
                prompts: Programs::default(),
                deadline,
                spent: Mutex::default(),
            }),
        }
    }

    /// What this client holds of the model in use: its shape, and the tables that tokens are embedded with.
    pub fn model(&self) -> &Embedding {
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
    /// Programs fed.
    fed: u32,
    slots: Slots,
    /// What the dealer had taken for the programs before the last.
    dealer: DealerTime,
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
        let keep = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        let going_on = self.live.as_ref().filter(|_| keep > 0).and_then(|l| l.slots.parts(keep, tokens.len()));
        let (mut at, mut logits, parts) = match going_on {
            Some(parts) => (keep, Vec::new(), parts),
            None => {
                self.live = None;
                let (n, limit) = (self.tokens.len(), self.lane.planner.longest());
                let slots = Slots::new(limit, self.lane.model.config.rope.is_some());
                let full = ClientError::ContextLength { tokens: n, positions: padded(n).unwrap_or(n), limit };
                let mut parts = slots.parts(0, n).ok_or(full)?;
                let rest = parts.split_off(parts.len().min(1));
                let Some(first) = parts.pop() else { return Ok(Vec::new()) };
                (first.tokens, self.begin(slots, first).await?, rest)
            }
        };
        for part in parts {
            logits = self.go_on(at, part).await?;
            at += part.tokens;
        }
        Ok(logits)
    }

    /// Starts a sequence at the parties; again, while they are full.
    async fn begin(&mut self, slots: Slots, first: Part) -> Result<Vec<f32>, ClientError> {
        let until = Instant::now() + self.lane.deadline;
        let mut pause = Duration::from_millis(50);
        loop {
            match self.attempt(slots.clone(), first).await {
                Err(r) if r.busy && Instant::now() + pause < until => sleep(pause).await,
                r => return r.map_err(|r| r.error),
            }
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    async fn attempt(&mut self, mut slots: Slots, first: Part) -> Result<Vec<f32>, Report> {
        let lane = Arc::clone(&self.lane);
        let own = |e: ClientError| Report::new(Rank::Refusal, e);
        let make = || lane.planner.program(true, 0, first.rows, false);
        let p = lane.prompts.get(first.rows, make).map_err(|e| own(e.into()))?;
        let session = random().map_err(own)?;
        let sealed = lane.sealed(&p, session, p.digest(), &self.tokens[..first.tokens], 0, 0).map_err(own)?;
        let limit = lane.deadline;
        let open = lane.targets.iter().zip(sealed).map(|(t, input)| {
            let request = Message::Request {
                session,
                token: lane.token.to_string(),
                model: lane.model.digest(),
                program: p.digest(),
                tokens: first.rows as u32,
            };
            async move {
                let (connection, tx, rx) = t.request(request, input, limit).await?;
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
        slots.apply(&first);
        let mut live = Live { session, streams, first: p.digest(), fed: 1, slots, dealer: DealerTime::default() };
        let logits = lane.answer(&mut live, &p).await?;
        self.live = Some(live);
        Ok(logits)
    }

    /// Feeds the tokens of `part`, of which the first is number `at`.
    async fn go_on(&mut self, at: usize, part: Part) -> Result<Vec<f32>, ClientError> {
        let lane = Arc::clone(&self.lane);
        // Taken out: after an error, or if this future is dropped, the sequence has ended.
        let Some(mut live) = self.live.take() else {
            return Err(ClientError::Config("the sequence has ended".into()));
        };
        let Part { past, rows, tokens, moves } = part;
        let p = lane.planner.program(true, past, rows, false)?;
        let digest = step_digest(&live.first, live.fed, past, rows);
        let sealed = lane.sealed(&p, live.session, digest, &self.tokens[at..at + tokens], at, moves)?;
        let next = Next { number: live.fed, past: past as u32, rows: rows as u32 };
        // One row after all that is there needs no word.
        let next = Some(Message::Next(next)).filter(|_| (past, rows) != (live.slots.len(), 1));
        for ((s, t), input) in live.streams.iter_mut().zip(&lane.targets).zip(sealed) {
            let Some(input) = input else { continue };
            let (tx, next) = (&mut s.tx, next.as_ref());
            let sending = async {
                if let Some(next) = next {
                    send(tx, next).await?;
                }
                send(tx, &input).await
            };
            t.taken(&s.connection, lane.deadline, sending).await.map_err(|r| r.error)?;
        }
        live.slots.apply(&part);
        live.fed += 1;
        let logits = lane.answer(&mut live, &p).await.map_err(|r| r.error)?;
        self.live = Some(live);
        Ok(logits)
    }
}

async fn within<T>(limit: Duration, f: impl Future<Output = Result<T, Report>>) -> Result<T, Report> {
    timeout(limit, f).await.unwrap_or_else(|_| Err(Report::new(Rank::Silence, ClientError::Deadline(limit))))
}

impl Lane {
    /// Each target's input for the tokens number `at ..`, where past keys move up by `moves` positions.
    fn sealed(
        &self,
        p: &Program,
        session: SessionId,
        digest: [u8; 32],
        tokens: &[u32],
        at: usize,
        moves: i64,
    ) -> Result<Vec<Option<Message>>, ClientError> {
        let embedded = Zeroizing::new(self.model.embed_tokens(tokens, at)?);
        let halves = p.split(&p.encode_moving(&embedded, moves)?)?;
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
            r = shares => r,
            Err(r) = watched => Err(r),
        };
        let outputs = match outputs {
            Err(r) if r.rank >= Rank::Hearsay => return Err(silent(&self.targets).await.unwrap_or(r)),
            r => r?,
        };
        let (mut words, mut slower, mut spent) = (Vec::new(), EvaluatorTime::default(), Spent::default());
        for m in outputs {
            let Message::Output { share, rounds, opened, dealt, time, dealer } = m else { continue };
            let share = Zeroizing::new(share);
            let share = unpack(&share, p.output_len(), p.output_bits());
            words.push(Zeroizing::new(share.map_err(|e| Report::new(Rank::GaveUp, e.into()))?));
            if words.len() == 1 {
                spent.rounds = u64::from(rounds);
                spent.opened_bytes = opened;
                spent.phases = spent.phases.dealt(&added(&dealer, &live.dealer));
                live.dealer = dealer;
            }
            spent.dealt_bytes = spent.dealt_bytes.saturating_add(dealt);
            if time.online >= slower.online {
                slower = time;
            }
        }
        spent.steps = 1;
        spent.announced_bytes = announced();
        spent.online_s = seconds(slower.online, self.deadline);
        spent.phases = Phases::of(&slower, self.deadline).with(&spent.phases, |e, d| e + d);
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
        let kept = len.min(self.tokens.len());
        self.tokens[kept..].zeroize();
        self.tokens.truncate(kept);
        if kept == 0 {
            self.live = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_count_of_a_party_wraps_a_sum() {
        let one = Spent { steps: 1, rounds: u64::from(u32::MAX), announced_bytes: 9, ..Spent::default() };
        let most = Spent { opened_bytes: u64::MAX, dealt_bytes: u64::MAX - 1, ..one.clone() };
        let mut all = Spent::default();
        all.add(&one);
        let before = all.clone();
        all.add(&most);
        all.add(&most);
        assert_eq!((all.opened_bytes, all.dealt_bytes, all.steps), (u64::MAX, u64::MAX, 3));
        let since = all.since(&before);
        assert_eq!((since.opened_bytes, since.steps, since.announced_bytes), (u64::MAX, 2, 18));
        // Of two that were taken the wrong way round, there is nothing between.
        assert_eq!(before.since(&all).dealt_bytes, 0);
    }
}
