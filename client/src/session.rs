//! One private session: three requests, three answers, and what to report when there are fewer.
//!
//! A session is a future; dropping it ends its three streams, which each party takes as "the client left".

use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt};
use tacet_protocol::Role;
use tacet_protocol::program::Program;
use tacet_protocol::query::Halves;
use tacet_protocol::ring::packed_len;
use tacet_protocol::seal::{SealContext, seal};
use tacet_protocol::wire::{CONTROL_LIMIT, DealerTime, Message, SessionId};
use tacet_transport::receive;
use tokio::time::{Instant as Clock, sleep, timeout, timeout_at};
use zeroize::Zeroizing;

use crate::error::{Rank, Report};
use crate::phases::{Phases, dealing, seconds};
use crate::shares;
use crate::target::{Target, silent};
use crate::{Client, ClientError, Embedding, Glimpse, Stats, random};

/// How long the first report of a failure waits for one that says more.
const GRACE: Duration = Duration::from_secs(1);
/// Pauses between tries at full parties double from the first to the second.
const PAUSE: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];

impl Client {
    /// Embeds one sequence of token ids.
    ///
    /// # Errors
    /// As [`Self::embed`], without an index.
    pub async fn embed_ids(&self, ids: &[u32]) -> Result<Embedding, ClientError> {
        Ok(self.session(ids).await?.0)
    }

    /// As [`Self::embed_ids`], and what each evaluator saw of the first `n` values of the input.
    ///
    /// # Errors
    /// As [`Self::embed_ids`].
    pub async fn embed_ids_shown(&self, ids: &[u32], n: usize) -> Result<(Embedding, Glimpse), ClientError> {
        let (embedding, halves) = self.session(ids).await?;
        let glimpse = shares::glimpse(&self.model, &*self.program(ids.len())?, ids, &halves, n)?;
        Ok((embedding, glimpse))
    }

    async fn session(&self, ids: &[u32]) -> Result<(Embedding, Halves), ClientError> {
        let started = Instant::now();
        let p = self.program(ids.len())?;
        let tries = async {
            let mut pause = PAUSE[0];
            loop {
                match self.attempt(&p, ids).await {
                    Err(r) if r.busy && self.retry_busy => {}
                    r => return r.map_err(|r| r.error),
                }
                // Apart from the others that were refused with this one.
                let [a, b] = random::<2>()?;
                sleep(pause.mul_f64(0.5 + f64::from(u16::from_le_bytes([a, b])) / 65536.0)).await;
                pause = (pause * 2).min(PAUSE[1]);
            }
        };
        let done = timeout(self.deadline, tries).await;
        let (answers, halves) = done.map_err(|_| ClientError::Deadline(self.deadline))??;
        let mut stats = Stats { tokens: ids.len(), ..Stats::default() };
        let vector = shares::join(&p, &tally(answers, self.deadline, &mut stats), ids.len())?;
        stats.total_s = started.elapsed().as_secs_f64();
        Ok((Embedding { vector, stats }, halves))
    }

    /// One session under a name and a seed of its own.
    async fn attempt(&self, p: &Program, ids: &[u32]) -> Result<(Vec<Message>, Halves), Report> {
        let own = |e: ClientError| Report::new(Rank::Refusal, e);
        let halves = shares::split(&self.model, p, ids).map_err(own)?;
        let session = random().map_err(own)?;
        let mut running = FuturesUnordered::new();
        for t in &self.targets {
            let input = self.input(t, p, session, &halves).map_err(own)?;
            running.push(self.answer(t, self.request(p, session), input, p));
        }
        let mut answers = Vec::new();
        let mut found: Option<Report> = None;
        let mut until = None;
        loop {
            let next = match until {
                None => running.next().await,
                Some(at) => timeout_at(at, running.next()).await.unwrap_or(None),
            };
            match next {
                None => break,
                Some(Ok(m)) => answers.push(m),
                Some(Err(r)) => {
                    until = until.or(Some(Clock::now() + GRACE));
                    if found.as_ref().is_none_or(|f| r.rank < f.rank) {
                        found = Some(r);
                    }
                }
            }
            if found.as_ref().is_some_and(|f| f.rank == Rank::Refusal) {
                break;
            }
        }
        match found {
            None => Ok((answers, halves)),
            Some(r) if r.rank >= Rank::Hearsay => Err(silent(&self.targets).await.unwrap_or(r)),
            Some(r) => Err(r),
        }
    }

    /// What every party is asked; it accepts or refuses before it reads an input.
    pub(crate) fn request(&self, p: &Program, session: SessionId) -> Message {
        Message::Request {
            session,
            token: self.token.to_string(),
            model: self.model.digest(),
            program: p.digest(),
            tokens: p.tokens() as u32,
        }
    }

    /// What an evaluator is sent after the request; the dealer has no input.
    fn input(
        &self,
        t: &Target,
        p: &Program,
        session: SessionId,
        halves: &Halves,
    ) -> Result<Option<Message>, ClientError> {
        let context = SealContext {
            session,
            party: t.party.name.clone(),
            role: t.party.role,
            model_digest: self.model.digest(),
            program_digest: p.digest(),
        };
        let sealed = match t.party.role {
            Role::E1 => seal(&t.public, &context, halves.seed.as_slice())?,
            Role::E2 => seal(&t.public, &context, &halves.packed)?,
            Role::Dealer => return Ok(None),
        };
        Ok(Some(Message::Input { sealed }))
    }

    /// Acceptance, then the party's part of the answer.
    async fn answer(
        &self,
        t: &Target,
        request: Message,
        input: Option<Message>,
        p: &Program,
    ) -> Result<Message, Report> {
        // The stream is held until the answer is there: a party takes its end as "the client left".
        let (c, _tx, mut rx) = t.request(request, input, self.deadline).await?;
        let limit = CONTROL_LIMIT + packed_len(p.output_len(), 64);
        let dealer = t.party.role == Role::Dealer;
        let mut accepted = false;
        loop {
            match receive(&mut rx, limit).await.map_err(|e| t.broken(&c, &e.to_string()))? {
                Message::Accept if !accepted => accepted = true,
                Message::Failure { code, text } => {
                    let others = self.targets.iter().map(|o| &o.party).filter(|o| o.name != t.party.name);
                    let others = others.map(|o| (o.name.as_str(), format!("{:?}", o.role)));
                    return Err(Report::refusal(&t.party.name, accepted, code, text, others));
                }
                m @ Message::Output { .. } if accepted && !dealer => return Ok(m),
                m @ Message::Done { .. } if accepted && dealer => return Ok(m),
                m => return Err(Report::new(Rank::GaveUp, t.failed(format!("unexpected {m:?}")))),
            }
        }
    }
}

/// Adds up what the parties counted, within a client's patience; returns the evaluators' packed shares of the result.
fn tally(answers: Vec<Message>, patience: Duration, stats: &mut Stats) -> Vec<Zeroizing<Vec<u8>>> {
    let mut shares = Vec::new();
    let (mut slower, mut dealer) = (Phases::default(), DealerTime::default());
    for m in answers {
        match m {
            Message::Output { share, rounds, opened, dealt, time, .. } => {
                shares.push(Zeroizing::new(share));
                stats.rounds = rounds;
                stats.opened_bytes = opened;
                stats.dealt_bytes = stats.dealt_bytes.saturating_add(dealt);
                let online_s = seconds(time.online, patience);
                if online_s >= stats.online_s {
                    (stats.online_s, slower) = (online_s, Phases::of(&time, patience));
                }
            }
            Message::Done { time, ahead, .. } => {
                stats.dealing_s = dealing(&time);
                stats.dealt_ahead = ahead;
                dealer = time;
            }
            _ => {}
        }
    }
    stats.phases = slower.dealt(&dealer);
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use tacet_protocol::wire::EvaluatorTime;

    #[test]
    fn no_count_of_a_party_wraps_a_sum() {
        let output = |dealt| Message::Output {
            share: Vec::new(),
            rounds: u32::MAX,
            opened: u64::MAX,
            dealt,
            time: EvaluatorTime::default(),
            dealer: DealerTime::default(),
        };
        let mut stats = Stats::default();
        let shares = tally(vec![output(u64::MAX), output(2)], Duration::from_secs(1), &mut stats);
        assert_eq!((shares.len(), stats.dealt_bytes, stats.opened_bytes), (2, u64::MAX, u64::MAX));
    }
}
