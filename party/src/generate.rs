//! Sessions of a decoder: a padded prompt, then one program after another, until the client leaves or is idle too long.
//!
//! **Order.** Unless its client says otherwise, a sequence goes on by one row. The dealer needs no word for that: it deals
//! such programs one after another, as far ahead as the evaluators' buffers take them, so that a token's dealing has mostly
//! arrived when the token does. A client that goes on in another way says so to both evaluators ([`Next`], with its input):
//! how many positions are kept, and how many rows come (one, or a padded length). The evaluators tell the dealer, which
//! acts when both have said the same: it ends the program it is dealing, forgets the masks of what is not kept, and deals on
//! from there. Programs of the other continuation that it has not announced it does not send; those that it has, the
//! evaluators drop, up to the program that is due. It cannot be mistaken: what was dealt ahead is one row after all positions
//! so far or more, what is due is more rows or after fewer.
//!
//! **Agreement.** Each program that is dealt has a number, which only ever grows. The dealer writes number, positions and rows
//! before a program's steps; the evaluators write them to one another before a program's openings; an input is sealed for
//! them and for how many came before it. Whoever sees something else than it expects ends the session on all three.
//!
//! **Why no mask repeats.** A program's masks come from the session's key with its number. A number is dealt once and
//! evaluated at most once, in ascending order; a program that is dropped is never evaluated, so its masks hide nothing,
//! and what is dealt in its place has another number and other masks. The keys and values that stay were opened by programs
//! that were evaluated, under masks of theirs, and are read by products only.
//!
//! **Who sees what.** As for any program (see [`tacet_protocol::gates`]). Between programs the evaluators keep masked keys
//! and values with their own halves of the masks, and the dealer keeps the masks. All three learn the padded
//! lengths of the prompt and of each turn, the number of single tokens, after which position a turn goes on, and when.
//! What they keep is wiped when it is taken back and when the session ends, however it ends.
//!
//! **Bounds.** One word about what comes next per input, and one input per answer: a client that takes back after every
//! answer makes the dealer waste what it deals ahead and one row's program, each time for a program that it waits for.
//! What an evaluator reads and drops is what fits its buffers and the stream's, and the rest of one program. A sequence has room for the model's longest
//! one, padding included.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use quinn::{RecvStream, SendStream};
use tacet_protocol::plan::DecoderPlanner;
use tacet_protocol::program::Program;
use tacet_protocol::query::step_digest;
use tacet_protocol::run::EvaluatorState;
use tacet_protocol::seal::SealContext;
use tacet_protocol::wire::{CONTROL_LIMIT, DealerTime, Dealing, Message, Next, SessionId};
use tacet_protocol::{Error, Role};
use tacet_transport::{TransportError, receive};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use zeroize::Zeroize;

use crate::Party;
use crate::clock::micros;
use crate::course::Course;
use crate::engine::{self, Announced, Dealable, Evaluation, Place, Space, collect, dealt_steps};
use crate::fail::{Fail, code, fail};
use crate::flow::{Held, Room, channel};
use crate::session::{CLIENT, Met, both, input, meet, next_frame, nonce, opened, output, running, session_prg, tell};

/// A client that leaves is heard of from the other parties too, at times before it is from itself, which is what counts.
const FAREWELL: Duration = Duration::from_secs(1);

/// A session that was admitted.
pub struct Sequence {
    pub session: SessionId,
    pub planner: Arc<DecoderPlanner>,
    /// The first program.
    pub plan: Arc<Program>,
    pub place: Place,
}

/// Serves a whole sequence; the client ends it by leaving.
pub async fn serve(party: &Arc<Party>, s: Sequence, tx: &mut SendStream, rx: &mut RecvStream) -> Result<(), Fail> {
    let course = Course::new(Arc::clone(&s.planner), Arc::clone(&s.plan), party.config.limits.tokens);
    match party.config.role {
        Role::Dealer => tokio::select! {
            r = deal(party, s.session, course) => r,
            // It sends nothing here while the sequence lasts.
            _ = rx.read_chunk(1, true) => Ok(()),
        },
        role => evaluate(party, role, s, course, tx, rx).await,
    }
}

/// A program that the evaluators ask for, how often they have asked with this, and whether the dealer can go on with it.
type Asked = (Announced, oneshot::Sender<Result<(), Fail>>);

/// The dealer's place in a sequence, on the dealing's thread.
struct Dealer {
    course: Course,
    asked: Receiver<Asked>,
    /// The program dealt last, and the first one since the evaluators last asked.
    last: Option<Next>,
    since: Announced,
}

impl Dealer {
    /// What to deal now; waits where nothing can follow by itself. None when the session has ended.
    fn next(&mut self) -> Option<Announced> {
        let Some(last) = self.last else {
            self.last = Some(self.since.next);
            return Some(self.since);
        };
        let next = loop {
            let step = self.course.step(last);
            let asked = match (self.asked.try_recv(), step) {
                (Ok(a), _) => Some(a),
                (Err(TryRecvError::Disconnected), _) => return None,
                (Err(TryRecvError::Empty), Some(_)) => None,
                (Err(TryRecvError::Empty), None) => Some(self.asked.recv().ok()?),
            };
            match asked {
                None => break step?,
                Some((Announced { next, asked }, answer)) => {
                    let (checked, number) = (self.check(next, last), last.number.checked_add(1)?);
                    let going = checked.is_ok();
                    let _ = answer.send(checked);
                    if going {
                        self.since = Announced { next: Next { number, ..next }, asked };
                        break self.since.next;
                    }
                }
            }
        };
        self.last = Some(next);
        Some(Announced { next, asked: self.since.asked })
    }

    /// Whether the evaluators can be where they say and go on like this.
    fn check(&self, next: Next, last: Next) -> Result<(), Fail> {
        let since = self.since.next;
        if next.number < since.number || next.number > last.number {
            let (from, to) = (since.number, last.number);
            let text =
                format!("the evaluators say that they ran program {}, but {from} to {to} were dealt", next.number);
            return Err(fail(code::PROTOCOL, text));
        }
        let held = since.end() + (next.number - since.number);
        self.course.check(next, held).map_err(|e| fail(code::PROTOCOL, e))
    }
}

/// What one evaluator asks for; none where it has left.
async fn asked(rx: &mut RecvStream) -> Result<Option<Next>, Fail> {
    match receive(rx, CONTROL_LIMIT).await {
        Ok(Message::Next(n)) => Ok(Some(n)),
        Ok(m) => Err(fail(code::PROTOCOL, format!("{m:?} from an evaluator in a sequence"))),
        Err(TransportError::Connection(_)) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Passes on what both evaluators ask for, until one of them leaves.
async fn pass(rx: [&mut RecvStream; 2], to: Sender<Asked>, count: &AtomicU32, limit: Duration) -> Result<(), Fail> {
    let [rx1, rx2] = rx;
    for times in 1.. {
        let (a, b) = {
            let (a, b) = (asked(rx1), asked(rx2));
            tokio::pin!(a, b);
            let late = |_| fail(code::DEADLINE, "one evaluator asks for a program, the other does not");
            tokio::select! {
                r = &mut a => match r? {
                    Some(n) => (Some(n), timeout(limit, b).await.map_err(late)??),
                    None => return Ok(()),
                },
                r = &mut b => match r? {
                    Some(n) => (timeout(limit, a).await.map_err(late)??, Some(n)),
                    None => return Ok(()),
                },
            }
        };
        let (Some(a), Some(b)) = (a, b) else { return Ok(()) };
        if a != b {
            return Err(fail(code::PROTOCOL, "the evaluators do not agree on what comes next"));
        }
        // From here on what was dealt for the other continuation is not sent any more.
        count.store(times, Release);
        let (answer, answered) = oneshot::channel();
        let _ = to.send((Announced { next: a, asked: times }, answer));
        // No answer: the dealing has ended with an evaluator's stream, which the next read tells.
        answered.await.unwrap_or(Ok(()))?;
    }
    Ok(())
}

async fn deal(party: &Arc<Party>, session: SessionId, course: Course) -> Result<(), Fail> {
    let limits = &party.config.limits;
    let (mut j1, mut j2) = both(party, session).await?;
    let place = running(party).await?;
    let _busy = party.stock.busy();
    let ours = nonce()?;
    let start = Message::Start { dealing: Dealing::Fresh { nonce: ours } };
    for (to, whom) in [(&mut j1.tx, "E1"), (&mut j2.tx, "E2")] {
        tell(to, &start, limits.join_s, whom).await?;
    }
    let (links, nonces) = ([j1.link.clone(), j2.link.clone()], [j1.nonce, j2.nonce]);
    party.counters.dealt_fresh.fetch_add(1, Relaxed);
    let ((to, asked), mut volume) = (std::sync::mpsc::channel(), Volume::new(party));
    let first = Announced { next: course.first(), asked: 0 };
    let (mut dealer, count) = (Dealer { course: course.clone(), asked, last: None, since: first }, AtomicU32::new(0));
    let next = move || -> Result<Option<Dealable>, Error> {
        let Some(announced) = dealer.next() else { return Ok(None) };
        let plan = course.program(announced.next)?;
        // The whole of it is moved here, not a copy of a number.
        let volume = &mut volume;
        volume.dealt += plan.cost().dealt_bytes.iter().sum::<u64>();
        let prg = [(Role::E1, 0), (Role::E2, 1)]
            .map(|(role, i)| session_prg(&links[i], role, announced.next.number, &session, &nonces[i], &ours));
        Ok(Some(Dealable { plan, prg, next: Some(announced) }))
    };
    let dealing = async {
        let (streams, compute) = ([&mut j1.tx, &mut j2.tx], Arc::clone(&party.compute));
        let ended = engine::deal_all(next, streams, limits.buffer(), None, place, compute, &count).await;
        sleep(FAREWELL).await;
        ended.map(drop)
    };
    tokio::select! {
        r = dealing => r,
        r = pass([&mut j1.rx, &mut j2.rx], to, &count, Duration::from_secs(limits.join_s)) => r,
    }
}

/// A sequence's bytes, which are its number of tokens times what one takes: counted when it has ended, rounded up to a power
/// of two, so that who reads metrics learns the number to a factor of two at best.
struct Volume {
    party: Arc<Party>,
    opened: u64,
    dealt: u64,
}

impl Volume {
    fn new(party: &Arc<Party>) -> Volume {
        Volume { party: Arc::clone(party), opened: 0, dealt: 0 }
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let c = &self.party.counters;
        for (counter, bytes) in [(&c.opened, self.opened), (&c.dealt, self.dealt)] {
            if bytes > 0 {
                counter.fetch_add(bytes.next_power_of_two(), Relaxed);
            }
        }
    }
}

/// A program that is dealt, what the dealer has taken for those before it, and its steps.
type Step = (Next, Arc<Program>, DealerTime, UnboundedReceiver<Held>);

/// Receives the dealing of one program after another, ahead of the client.
async fn read(
    from_dealer: &mut RecvStream,
    course: Course,
    role: Role,
    buffer: usize,
    to: mpsc::Sender<Step>,
) -> Result<(), Fail> {
    let room = Room::new(buffer);
    let mut last: Option<Next> = None;
    loop {
        let (next, so_far) = match receive(from_dealer, CONTROL_LIMIT).await? {
            Message::Announce { next, so_far } => (next, so_far),
            m => return Err(fail(code::PROTOCOL, format!("{m:?} from the dealer in place of a program's number"))),
        };
        if !course.follows(last, next) {
            let text = format!("the dealer deals program {}, {} rows after {}", next.number, next.rows, next.past);
            return Err(fail(code::PROTOCOL, format!("{text}: that does not follow what it dealt before")));
        }
        last = Some(next);
        // Beside the network's thread.
        let of = course.clone();
        let planned = tokio::task::spawn_blocking(move || of.program(next)).await;
        let p = planned.map_err(|_| fail(code::PROTOCOL, "planning stopped"))??;
        let (dealt_tx, dealt) = channel();
        if to.send((next, Arc::clone(&p), so_far, dealt)).await.is_err() {
            return Ok(());
        }
        collect(from_dealer, dealt_steps(&p, role), Space::Shared(room.clone()), dealt_tx).await?;
    }
}

/// The dealt program that is `due` after `held` positions; drops what was dealt for another continuation.
async fn due(steps: &mut mpsc::Receiver<Step>, due: Next, held: u32) -> Result<Step, Fail> {
    while let Some(step) = steps.recv().await {
        let next = step.0;
        if (next.past, next.rows) == (due.past, due.rows) {
            return Ok(step);
        }
        if (due.past, due.rows) == (held, 1) || next.past < held || next.rows != 1 {
            let text = format!("the dealer deals {} rows after {}, due are {}", next.rows, next.past, due.rows);
            return Err(fail(code::PROTOCOL, format!("{text} after {}", due.past)));
        }
    }
    // Whoever reads the dealing says why it has ended, after a moment for what else there is to hear.
    std::future::pending().await
}

async fn evaluate(
    party: &Arc<Party>,
    role: Role,
    s: Sequence,
    course: Course,
    tx: &mut SendStream,
    rx: &mut RecvStream,
) -> Result<(), Fail> {
    let limits = &party.config.limits;
    let (session, first) = (s.session, s.plan.digest());
    let context = |digest: [u8; 32]| SealContext {
        session,
        party: party.config.name.clone(),
        role,
        model_digest: party.model,
        program_digest: digest,
    };
    let prompt = input(party, rx, &context(first), &s.plan).await?;
    let left = || fail(code::REQUEST, "the client left");
    let joining = async {
        let met = meet(party, role, session).await?;
        Ok::<_, Fail>((met, if role == Role::E1 { s.place.clone() } else { running(party).await? }))
    };
    let (met, place) = tokio::select! {
        r = joining => r?,
        _ = tx.stopped() => return Err(left()),
    };
    let Met { dealer, ours, keep: mut to_dealer, mut from_dealer, dealing, mut to_peer, mut from_peer } = met;
    let Dealing::Fresh { nonce } = dealing else {
        return Err(fail(code::PROTOCOL, "a sequence is dealt while it runs, but the dealer names a bundle"));
    };
    // It stops the stream when it or the other evaluator has ended, which between two steps nothing else would say.
    let abandoned = to_dealer.stopped();
    let (to, mut steps) = mpsc::channel(2);
    let reading = read(&mut from_dealer, course.clone(), role, limits.buffer(), to);
    let evaluating = async {
        let mut volume = Volume::new(party);
        let (mut state, mut prompt) = (EvaluatorState::default(), Some(prompt));
        let (mut fed, mut ran) = (course.first(), 0);
        loop {
            let held = state.positions() as u32;
            let mut frame = None;
            if prompt.is_none() {
                // No input of one row is longer than the prompt's.
                let Some(m) = fed_frame(party, rx, s.plan.half_len(role)).await? else { return Ok(()) };
                (fed, frame) = fed_next(&course, fed, held, m)?;
                if (fed.past, fed.rows) != (held, 1) {
                    tell(&mut to_dealer, &Message::Next(Next { number: ran, ..fed }), limits.session_s, "the dealer")
                        .await?;
                }
            }
            let started = Instant::now();
            let step = tokio::select! {
                r = timeout(Duration::from_secs(limits.session_s), due(&mut steps, fed, held)) => {
                    r.map_err(|_| fail(code::DEADLINE, "the dealer does not deal what is due"))??
                }
                _ = tx.stopped() => return Err(left()),
            };
            let (next, plan, so_far, dealt) = step;
            let waited = started.elapsed();
            let input = match prompt.take() {
                Some(i) => i,
                None => {
                    let m = match frame {
                        Some(m) => m,
                        None => fed_frame(party, rx, plan.half_len(role)).await?.ok_or_else(left)?,
                    };
                    let digest = step_digest(&first, fed.number, fed.past as usize, fed.rows as usize);
                    opened(party, &context(digest), &plan, m)?
                }
            };
            let prg = session_prg(&dealer, role, next.number, &session, &ours, &nonce);
            ran = next.number;
            let room = Room::new(limits.buffer());
            let (place, compute) = (place.clone(), Arc::clone(&party.compute));
            let work = engine::evaluate(
                Evaluation { plan, next: Some(next), role, prg, input, state, dealt, room, place, compute },
                (&mut to_peer, &mut from_peer),
            );
            let limit = Duration::from_secs(limits.session_s);
            let mut done = tokio::select! {
                r = timeout(limit, work) => {
                    r.map_err(|_| fail(code::DEADLINE, format!("a step took longer than {} s", limits.session_s)))??
                }
                _ = tx.stopped() => return Err(left()),
            };
            volume.opened += done.opened;
            volume.dealt += done.dealt;
            done.time.dealer += micros(waited);
            state = answer(tx, output(done, started, so_far), limits.session_s).await?;
        }
    };
    let gone = async {
        let f = tokio::select! {
            Err(f) = reading => f,
            _ = abandoned => fail(code::PEER, "another party ended the session"),
        };
        sleep(FAREWELL).await;
        f
    };
    tokio::select! {
        r = evaluating => r,
        f = gone => Err(f),
    }
}

/// Sends a share of logits to its client; what the next program starts from.
async fn answer(
    tx: &mut SendStream,
    (mut answer, state): (Message, EvaluatorState),
    seconds: u64,
) -> Result<EvaluatorState, Fail> {
    let sent = tell(tx, &answer, seconds, CLIENT).await;
    if let Message::Output { share, .. } = &mut answer {
        share.zeroize();
    }
    sent?;
    Ok(state)
}

/// The program of what a client feeds after `last`, and the input if that is what came.
fn fed_next(course: &Course, last: Next, held: u32, m: Message) -> Result<(Next, Option<Message>), Fail> {
    let refused = |e: String| fail(code::REQUEST, e);
    let number = last.number.checked_add(1).ok_or_else(|| refused("the sequence is too long".into()))?;
    let (next, input) = match m {
        Message::Next(n) if n.number != number => {
            return Err(refused(format!("program {} is announced, the next one is {number}", n.number)));
        }
        Message::Next(n) => (n, None),
        m => (Next { number, past: held, rows: 1 }, Some(m)),
    };
    course.check(next, held).map_err(refused)?;
    Ok((next, input))
}

/// What a client feeds next, a frame with a half of at most `len` bytes; none where it has left between two steps.
async fn fed_frame(party: &Party, rx: &mut RecvStream, len: usize) -> Result<Option<Message>, Fail> {
    let idle = party.config.limits.idle_s;
    match timeout(Duration::from_secs(idle), next_frame(rx, len)).await {
        Err(_) => Err(fail(code::DEADLINE, format!("the client was idle for {idle} s"))),
        Ok(frame) => frame.transpose(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tacet_protocol::model::decoder::DecoderModel;

    fn dealer() -> (Dealer, Sender<Asked>) {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocol/tests/vectors/llama");
        let planner = Arc::new(DecoderPlanner::new(&DecoderModel::load(&dir).unwrap()).unwrap());
        let prompt = Arc::new(planner.program(true, 0, 8, false).unwrap());
        let course = Course::new(planner, prompt, 32);
        let (to, asked) = std::sync::mpsc::channel();
        let since = Announced { next: course.first(), asked: 0 };
        (Dealer { since, course, asked, last: None }, to)
    }

    fn ask(to: &Sender<Asked>, number: u32, past: u32, rows: u32) -> oneshot::Receiver<Result<(), Fail>> {
        let (answer, answered) = oneshot::channel();
        to.send((Announced { next: Next { number, past, rows }, asked: 1 }, answer)).unwrap();
        answered
    }

    #[test]
    fn a_dealer_that_repeats_a_number_or_deals_what_cannot_follow_is_found() {
        let course = dealer().0.course;
        let next = |number, past, rows| Next { number, past, rows };
        assert!(course.follows(None, next(0, 0, 8)) && !course.follows(None, next(1, 0, 8)));
        assert!(!course.follows(None, next(0, 0, 16)) && !course.follows(None, next(0, 8, 1)));
        let last = Some(next(3, 10, 1));
        for good in [next(4, 11, 1), next(9, 11, 8), next(4, 5, 1)] {
            assert!(course.follows(last, good));
        }
        for bad in [next(3, 11, 1), next(2, 11, 1), next(4, 12, 1), next(4, 0, 8), next(4, 11, 3), next(4, 60, 8)] {
            assert!(!course.follows(last, bad), "{bad:?}");
        }
        assert!(!course.follows(Some(next(u32::MAX, 10, 1)), next(0, 11, 1)), "numbers do not begin again");
        assert_eq!(course.step(next(u32::MAX, 10, 1)), None);
    }

    #[tokio::test]
    async fn only_what_was_dealt_ahead_is_dropped_on_the_way_to_what_is_due() {
        let course = dealer().0.course;
        let found = |dealt: &[(u32, u32)], wanted: (u32, u32), held: u32| {
            let (to, mut steps) = mpsc::channel(8);
            for (number, (past, rows)) in dealt.iter().enumerate() {
                let next = Next { number: number as u32, past: *past, rows: *rows };
                assert!(
                    to.try_send((next, course.program(course.first()).unwrap(), DealerTime::default(), channel().1))
                        .is_ok()
                );
            }
            async move {
                let wanted = Next { number: 0, past: wanted.0, rows: wanted.1 };
                due(&mut steps, wanted, held).await.map(|s| s.0.number).map_err(|f| f.text)
            }
        };
        assert_eq!(found(&[(8, 1), (9, 1)], (8, 1), 8).await, Ok(0));
        assert_eq!(found(&[(8, 1), (9, 1), (8, 8)], (8, 8), 8).await, Ok(2));
        assert_eq!(found(&[(8, 1), (9, 1), (5, 1)], (5, 1), 8).await, Ok(2));
        assert!(found(&[(9, 1)], (8, 1), 8).await.unwrap_err().contains("due are 1 after 8"));
        assert!(found(&[(8, 1), (5, 8)], (5, 1), 8).await.is_err() && found(&[(7, 1)], (5, 1), 8).await.is_err());
    }

    #[test]
    fn numbers_ascend_whatever_is_taken_back() {
        let (mut d, to) = dealer();
        let mut dealt: Vec<Next> = (0..5).map(|_| d.next().unwrap().next).collect();
        assert_eq!(
            dealt.iter().map(|n| (n.past, n.rows)).collect::<Vec<_>>(),
            [(0, 8), (8, 1), (9, 1), (10, 1), (11, 1)]
        );
        // The evaluators have run programs 0 to 2, that is, hold ten positions.
        let mut answer = ask(&to, 2, 6, 16);
        let more: Vec<Announced> = (0..3).map(|_| d.next().unwrap()).collect();
        assert!(more.iter().all(|a| a.asked == 1));
        dealt.extend(more.iter().map(|a| a.next));
        assert!(answer.try_recv().unwrap().is_ok());
        assert_eq!(dealt[5..].iter().map(|n| (n.past, n.rows)).collect::<Vec<_>>(), [(6, 16), (22, 1), (23, 1)]);
        assert!(dealt.iter().enumerate().all(|(i, n)| n.number == i as u32));
        for (number, past, rows, why) in [
            (2, 6, 8, "5 to 7 were dealt"),
            (8, 6, 8, "5 to 7 were dealt"),
            (5, 23, 8, "23 of 22 positions"),
            (7, 25, 8, "25 of 24 positions"),
            (6, 0, 8, "0 of 23"),
            (6, 5, 5, "neither one nor"),
            (6, 5, 48, "takes 32 at once"),
        ] {
            let mut answer = ask(&to, number, past, rows);
            let before = d.last.unwrap();
            assert_eq!(d.next().unwrap().next.past, before.end(), "it goes on");
            let text = answer.try_recv().unwrap().unwrap_err().text;
            assert!(text.contains(why), "{text}");
            d.last = Some(before);
        }
        // At the longest it waits, here for nobody.
        while d.last.unwrap().end() < 64 {
            d.next().unwrap();
        }
        let mut answer = ask(&to, 5, 3, 1);
        assert_eq!((d.next().unwrap().next.past, d.last.unwrap().rows), (3, 1));
        assert!(answer.try_recv().unwrap().is_ok());
        drop(to);
        assert!(d.next().is_none());
    }
}
