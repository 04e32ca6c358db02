//! Wire format: versioned, length-bounded frames; trailing bytes are rejected.
//!
//! A frame is `length: u32 LE | version: u8 | kind: u8 | body`, where `length` counts everything after itself. Byte strings
//! carry a `u32` length. A reader states how long a frame may be before it reads one.

use crate::Error;

/// Version of the format and of the protocol behind it.
pub const VERSION: u8 = 9;
/// Bytes of a frame before its body.
pub const HEADER: usize = 6;
/// Bound on frames that carry no tensor.
pub const CONTROL_LIMIT: usize = 16 * 1024;
/// Bytes a step's frame adds to its payload, header excluded.
const STEP_OVERHEAD: usize = 8;
/// Bytes an input's frame has after its length, besides what was sealed.
pub const INPUT_OVERHEAD: usize = 6;

/// Name of one run of a program, chosen by the client at random.
pub type SessionId = [u8; 16];
/// Name of one dealing of a whole program ahead of any session, chosen by the dealer at random.
pub type BundleId = [u8; 16];

/// Where a session's masks and corrections come from; the dealer chooses, so that both evaluators agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dealing {
    /// Dealt now: the nonce is the dealer's part of the session key's freshness, the steps follow on this stream.
    Fresh { nonce: [u8; 16] },
    /// Dealt ahead, under this name.
    Ahead { bundle: BundleId },
}

/// Which program of a sequence comes next: public, and the same at all who take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    /// Which one, as the stream that carries this counts: programs that the client feeds, or programs that are dealt.
    pub number: u32,
    /// Positions that are kept; what lies behind is forgotten.
    pub past: u32,
    /// New positions: one, or a padded length.
    pub rows: u32,
}

impl Next {
    /// Positions when the program is done.
    pub fn end(&self) -> u32 {
        self.past.saturating_add(self.rows)
    }

    /// What follows where nobody says otherwise: one more row. None after the last number, since none is used twice.
    pub fn step(&self) -> Option<Next> {
        Some(Next { number: self.number.checked_add(1)?, past: self.end(), rows: 1 })
    }
}

/// Where an evaluator's time went, in microseconds. It depends on shapes, machines and networks, never on values; whoever
/// reads it takes the evaluator's word for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EvaluatorTime {
    /// From the input, with the other parties met, to the share of the result.
    pub online: u64,
    /// Of it, computing: neither of the waits.
    pub computing: u64,
    /// Of computing, what its thread had of a processor; more is other threads' or an adapter's.
    pub processor: u64,
    /// Waiting for the dealer's steps.
    pub dealer: u64,
    /// Waiting for the other evaluator's openings.
    pub peer: u64,
}

/// Where a dealer's time went, as [`EvaluatorTime`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DealerTime {
    /// Dealing, without pauses for sessions and the planning of further programs.
    pub dealing: u64,
    /// What its thread had of a processor, planning included.
    pub processor: u64,
    /// Of dealing, waiting until the evaluators have room.
    pub room: u64,
}

/// Everything that is ever sent.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message {
    /// First on every connection between parties, both ways.
    Hello { name: String, role: u8, model: [u8; 32], program: [u8; 32], ephemeral: [u8; 32] },
    /// A client's token ahead of any request, so that a party keeps the connection; answered by `Accept`.
    Token { token: String },
    /// A client's request to one party.
    Request { session: SessionId, token: String, model: [u8; 32], program: [u8; 32], tokens: u32 },
    /// A client's half for one evaluator, sealed to it; follows the request without waiting.
    Input { sealed: Vec<u8> },
    /// The party takes part.
    Accept,
    /// The session ends; `code` is for programs, `text` for people.
    Failure { code: u16, text: String },
    /// Evaluator to dealer: ready for this session.
    Join { session: SessionId, nonce: [u8; 16] },
    /// Dealer to evaluator: both have joined.
    Start { dealing: Dealing },
    /// E1 to E2: the stream of this session's openings.
    Peer { session: SessionId },
    /// A dealt message or an opening.
    Step { step: u32, bytes: Vec<u8> },
    /// Evaluator to client: its share of the result, and what it counted. `dealer` is what an [`Message::Announce`] said.
    Output { share: Vec<u8>, rounds: u32, opened: u64, dealt: u64, time: EvaluatorTime, dealer: DealerTime },
    /// Dealer to client; `ahead` is whether the dealing began before the session.
    Done { dealt: [u64; 2], time: DealerTime, ahead: bool },
    /// Dealer to evaluator, first on a stream that then carries a whole program's steps ahead of any session.
    Prepare { bundle: BundleId, program: [u8; 32], tokens: u32, nonce: [u8; 16] },
    /// Evaluator to dealer: there is room for the bundle.
    Ready { nonce: [u8; 16] },
    /// Of a sequence. Client to evaluator: the program of the input that follows, where it is not one more row. Evaluator to
    /// dealer: the same, where `number` is the last program that was evaluated. Evaluators to one another: the program whose
    /// openings follow.
    Next(Next),
    /// Of a sequence. Dealer to evaluator: the program whose steps follow, and what all those before it have taken.
    Announce { next: Next, so_far: DealerTime },
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Kinds only: bodies hold tokens and shares.
        write!(f, "Message(kind {})", self.kind())
    }
}

fn bad(reason: impl Into<String>) -> Error {
    Error::Malformed { what: "frame", reason: reason.into() }
}

/// Bytes that a sequence takes for each of its programs besides steps, inputs and outputs: the dealer's word to both
/// evaluators, and that of each to the other.
pub fn announced() -> u64 {
    let next = Next { number: 0, past: 0, rows: 0 };
    let word =
        Message::Announce { next, so_far: DealerTime::default() }.encode().len() + Message::Next(next).encode().len();
    2 * word as u64
}

fn put_all(out: &mut Vec<u8>, numbers: &[u64]) {
    numbers.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], Error> {
        if n > self.0.len() {
            return Err(bad(format!("{} bytes missing", n - self.0.len())));
        }
        let (head, tail) = self.0.split_at(n);
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, Error> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.array().map(u64::from_le_bytes)
    }

    fn next(&mut self) -> Result<Next, Error> {
        Ok(Next { number: self.u32()?, past: self.u32()?, rows: self.u32()? })
    }

    fn dealer(&mut self) -> Result<DealerTime, Error> {
        Ok(DealerTime { dealing: self.u64()?, processor: self.u64()?, room: self.u64()? })
    }

    fn evaluator(&mut self) -> Result<EvaluatorTime, Error> {
        let [online, computing, processor] = [self.u64()?, self.u64()?, self.u64()?];
        Ok(EvaluatorTime { online, computing, processor, dealer: self.u64()?, peer: self.u64()? })
    }

    fn flag(&mut self) -> Result<bool, Error> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [f] => Err(bad(format!("a flag of {f}"))),
        }
    }

    fn bytes(&mut self) -> Result<Vec<u8>, Error> {
        let n = self.u32()? as usize;
        Ok(self.take(n)?.to_vec())
    }

    fn text(&mut self, limit: usize) -> Result<String, Error> {
        let b = self.bytes()?;
        if b.len() > limit {
            return Err(bad(format!("a text of {} bytes, {limit} allowed", b.len())));
        }
        String::from_utf8(b).map_err(|_| bad("a text that is not UTF-8"))
    }
}

fn put(out: &mut Vec<u8>, b: &[u8]) {
    out.extend_from_slice(&(b.len() as u32).to_le_bytes());
    out.extend_from_slice(b);
}

/// Bytes of a step's frame before its payload: large payloads are sent and received without another copy.
pub const STEP_HEADER: usize = HEADER + STEP_OVERHEAD;

/// What comes before a step's payload of `len` bytes.
pub fn step_header(step: u32, len: usize) -> [u8; STEP_HEADER] {
    let mut h = [0; STEP_HEADER];
    h[..4].copy_from_slice(&((len + STEP_HEADER - 4) as u32).to_le_bytes());
    (h[4], h[5]) = (VERSION, STEP_KIND);
    h[6..10].copy_from_slice(&step.to_le_bytes());
    h[10..].copy_from_slice(&(len as u32).to_le_bytes());
    h
}

const STEP_KIND: u8 = 8;

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Message::Hello { .. } => 1,
            Message::Request { .. } => 2,
            Message::Accept => 3,
            Message::Failure { .. } => 4,
            Message::Join { .. } => 5,
            Message::Start { .. } => 6,
            Message::Peer { .. } => 7,
            Message::Step { .. } => STEP_KIND,
            Message::Output { .. } => 9,
            Message::Done { .. } => 10,
            Message::Prepare { .. } => 11,
            Message::Ready { .. } => 12,
            Message::Input { .. } => 13,
            Message::Token { .. } => 14,
            Message::Next(_) => 15,
            Message::Announce { .. } => 16,
        }
    }

    /// The whole frame.
    pub fn encode(&self) -> Vec<u8> {
        let mut o = vec![0, 0, 0, 0, VERSION, self.kind()];
        match self {
            Message::Hello { name, role, model, program, ephemeral } => {
                put(&mut o, name.as_bytes());
                o.push(*role);
                o.extend_from_slice(model);
                o.extend_from_slice(program);
                o.extend_from_slice(ephemeral);
            }
            Message::Request { session, token, model, program, tokens } => {
                o.extend_from_slice(session);
                put(&mut o, token.as_bytes());
                o.extend_from_slice(model);
                o.extend_from_slice(program);
                o.extend_from_slice(&tokens.to_le_bytes());
            }
            Message::Input { sealed } => put(&mut o, sealed),
            Message::Token { token } => put(&mut o, token.as_bytes()),
            Message::Accept => {}
            Message::Failure { code, text } => {
                o.extend_from_slice(&code.to_le_bytes());
                put(&mut o, text.as_bytes());
            }
            Message::Join { session, nonce } => {
                o.extend_from_slice(session);
                o.extend_from_slice(nonce);
            }
            Message::Start { dealing } => {
                let (tag, name) = match dealing {
                    Dealing::Fresh { nonce } => (0, nonce),
                    Dealing::Ahead { bundle } => (1, bundle),
                };
                o.push(tag);
                o.extend_from_slice(name);
            }
            Message::Peer { session } => o.extend_from_slice(session),
            Message::Step { step, bytes } => {
                o = step_header(*step, bytes.len()).to_vec();
                o.extend_from_slice(bytes);
            }
            Message::Output { share, rounds, opened, dealt, time, dealer } => {
                put(&mut o, share);
                o.extend_from_slice(&rounds.to_le_bytes());
                put_all(
                    &mut o,
                    &[*opened, *dealt, time.online, time.computing, time.processor, time.dealer, time.peer],
                );
                put_all(&mut o, &[dealer.dealing, dealer.processor, dealer.room]);
            }
            Message::Done { dealt, time, ahead } => {
                put_all(&mut o, &[dealt[0], dealt[1], time.dealing, time.processor, time.room]);
                o.push(u8::from(*ahead));
            }
            Message::Prepare { bundle, program, tokens, nonce } => {
                o.extend_from_slice(bundle);
                o.extend_from_slice(program);
                o.extend_from_slice(&tokens.to_le_bytes());
                o.extend_from_slice(nonce);
            }
            Message::Ready { nonce } => o.extend_from_slice(nonce),
            Message::Next(n) => {
                [n.number, n.past, n.rows].iter().for_each(|v| o.extend_from_slice(&v.to_le_bytes()));
            }
            Message::Announce { next: n, so_far: t } => {
                [n.number, n.past, n.rows].iter().for_each(|v| o.extend_from_slice(&v.to_le_bytes()));
                put_all(&mut o, &[t.dealing, t.processor, t.room]);
            }
        }
        let len = (o.len() - 4) as u32;
        o[..4].copy_from_slice(&len.to_le_bytes());
        o
    }

    /// Parses what follows a frame's length.
    ///
    /// # Errors
    /// [`Error::Malformed`] for another version, an unknown kind, missing or trailing bytes.
    pub fn decode(frame: &[u8]) -> Result<Message, Error> {
        let mut r = Reader(frame);
        let [version, kind] = r.array()?;
        if version != VERSION {
            return Err(bad(format!(
                "protocol version {version}; this side speaks {VERSION}: run the same release everywhere"
            )));
        }
        let m = match kind {
            1 => Message::Hello {
                name: r.text(256)?,
                role: r.array::<1>()?[0],
                model: r.array()?,
                program: r.array()?,
                ephemeral: r.array()?,
            },
            2 => Message::Request {
                session: r.array()?,
                token: r.text(256)?,
                model: r.array()?,
                program: r.array()?,
                tokens: r.u32()?,
            },
            3 => Message::Accept,
            4 => Message::Failure { code: u16::from_le_bytes(r.array()?), text: r.text(1024)? },
            5 => Message::Join { session: r.array()?, nonce: r.array()? },
            6 => Message::Start {
                dealing: match r.flag()? {
                    false => Dealing::Fresh { nonce: r.array()? },
                    true => Dealing::Ahead { bundle: r.array()? },
                },
            },
            7 => Message::Peer { session: r.array()? },
            STEP_KIND => Message::Step { step: r.u32()?, bytes: r.bytes()? },
            9 => Message::Output {
                share: r.bytes()?,
                rounds: r.u32()?,
                opened: r.u64()?,
                dealt: r.u64()?,
                time: r.evaluator()?,
                dealer: r.dealer()?,
            },
            10 => Message::Done { dealt: [r.u64()?, r.u64()?], time: r.dealer()?, ahead: r.flag()? },
            11 => Message::Prepare { bundle: r.array()?, program: r.array()?, tokens: r.u32()?, nonce: r.array()? },
            12 => Message::Ready { nonce: r.array()? },
            13 => Message::Input { sealed: r.bytes()? },
            14 => Message::Token { token: r.text(256)? },
            15 => Message::Next(r.next()?),
            16 => Message::Announce { next: r.next()?, so_far: r.dealer()? },
            k => return Err(bad(format!("unknown kind {k}"))),
        };
        if !r.0.is_empty() {
            return Err(bad(format!("{} trailing bytes", r.0.len())));
        }
        Ok(m)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEALER: DealerTime = DealerTime { dealing: 5, processor: 6, room: 7 };
    const EVALUATOR: EvaluatorTime = EvaluatorTime { online: 5, computing: 6, processor: 7, dealer: 8, peer: 9 };

    fn samples() -> Vec<Message> {
        vec![
            Message::Hello { name: "alpha".into(), role: 1, model: [1; 32], program: [2; 32], ephemeral: [3; 32] },
            Message::Request { session: [4; 16], token: "t".into(), model: [1; 32], program: [2; 32], tokens: 7 },
            Message::Input { sealed: vec![9; 5] },
            Message::Token { token: "t".into() },
            Message::Accept,
            Message::Failure { code: 12, text: "no".into() },
            Message::Join { session: [4; 16], nonce: [5; 16] },
            Message::Start { dealing: Dealing::Fresh { nonce: [5; 16] } },
            Message::Start { dealing: Dealing::Ahead { bundle: [6; 16] } },
            Message::Peer { session: [4; 16] },
            Message::Step { step: 3, bytes: vec![1, 2, 3] },
            Message::Output { share: vec![8; 3], rounds: 1, opened: 2, dealt: 3, time: EVALUATOR, dealer: DEALER },
            Message::Done { dealt: [1, 2], time: DEALER, ahead: true },
            Message::Prepare { bundle: [6; 16], program: [2; 32], tokens: 7, nonce: [5; 16] },
            Message::Ready { nonce: [5; 16] },
            Message::Next(Next { number: 3, past: 40, rows: 8 }),
            Message::Announce { next: Next { number: 3, past: 40, rows: 8 }, so_far: DEALER },
        ]
    }

    #[test]
    fn frozen_vectors() {
        let frame = |kind: u8, body: &[&[u8]]| {
            let body = body.concat();
            [&(body.len() as u32 + 2).to_le_bytes()[..], &[VERSION, kind], &body].concat()
        };
        let words = |w: &[u64]| w.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        assert_eq!(Message::Accept.encode(), [2, 0, 0, 0, 9, 3]);
        assert_eq!(
            Message::Step { step: 3, bytes: vec![1, 2, 3] }.encode(),
            [13, 0, 0, 0, 9, 8, 3, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3]
        );
        assert_eq!(
            Message::Failure { code: 12, text: "no".into() }.encode(),
            [10, 0, 0, 0, 9, 4, 12, 0, 2, 0, 0, 0, b'n', b'o']
        );
        assert_eq!(Message::Start { dealing: Dealing::Fresh { nonce: [5; 16] } }.encode(), frame(6, &[&[0], &[5; 16]]));
        assert_eq!(
            Message::Start { dealing: Dealing::Ahead { bundle: [6; 16] } }.encode(),
            frame(6, &[&[1], &[6; 16]])
        );
        assert_eq!(
            Message::Done { dealt: [1, 2], time: DEALER, ahead: true }.encode(),
            frame(10, &[&words(&[1, 2, 5, 6, 7]), &[1]])
        );
        assert_eq!(
            Message::Output { share: vec![8; 3], rounds: 1, opened: 2, dealt: 3, time: EVALUATOR, dealer: DEALER }
                .encode(),
            frame(9, &[&[3, 0, 0, 0, 8, 8, 8, 1, 0, 0, 0], &words(&[2, 3, 5, 6, 7, 8, 9, 5, 6, 7])])
        );
        assert_eq!(
            Message::Announce { next: Next { number: 3, past: 40, rows: 8 }, so_far: DEALER }.encode(),
            frame(16, &[&[3, 0, 0, 0, 40, 0, 0, 0, 8, 0, 0, 0], &words(&[5, 6, 7])])
        );
        assert_eq!(announced(), 2 * (18 + 42));
        assert_eq!(
            Message::Prepare { bundle: [6; 16], program: [2; 32], tokens: 7, nonce: [5; 16] }.encode(),
            frame(11, &[&[6; 16], &[2; 32], &[7, 0, 0, 0], &[5; 16]])
        );
        assert_eq!(Message::Ready { nonce: [5; 16] }.encode(), frame(12, &[&[5; 16]]));
        assert_eq!(Message::Input { sealed: vec![9; 5] }.encode(), frame(13, &[&[5, 0, 0, 0], &[9; 5]]));
        assert_eq!(Message::Token { token: "t".into() }.encode(), frame(14, &[&[1, 0, 0, 0, b't']]));
        assert_eq!(
            Message::Next(Next { number: 3, past: 40, rows: 8 }).encode(),
            [14, 0, 0, 0, 9, 15, 3, 0, 0, 0, 40, 0, 0, 0, 8, 0, 0, 0]
        );
        let request =
            Message::Request { session: [4; 16], token: "t".into(), model: [1; 32], program: [2; 32], tokens: 7 };
        assert_eq!(request.encode(), frame(2, &[&[4; 16], &[1, 0, 0, 0, b't'], &[1; 32], &[2; 32], &[7, 0, 0, 0]]));
    }

    #[test]
    fn bad_frames_are_refused() {
        let start = |tag: u8, len: usize| [&[VERSION, 6, tag][..], &vec![5; len]].concat();
        let done = |flag: u8| [&[VERSION, 10][..], &[0; 40], &[flag]].concat();
        assert!(Message::decode(&start(0, 16)).is_ok() && Message::decode(&done(0)).is_ok());
        for bad in [
            vec![],
            vec![VERSION],
            vec![VERSION - 1, 3],
            vec![VERSION + 1, 3],
            vec![VERSION, 99],
            vec![VERSION, 3, 0],
            vec![VERSION, 8, 3, 0, 0, 0, 4, 0, 0, 0, 1],
            vec![VERSION, 4, 0, 0, 1, 0, 0, 0, 255],
            start(2, 16),
            start(0, 15),
            start(1, 17),
            done(2),
            [&[VERSION, 11][..], &[0; 67]].concat(),
            [&[VERSION, 12][..], &[0; 17]].concat(),
            vec![VERSION, 13, 2, 0, 0, 0, 1],
            [&[VERSION, 14, 1, 1, 0, 0][..], &[b't'; 257]].concat(),
            [&[VERSION, 15][..], &[0; 11]].concat(),
            [&[VERSION, 15][..], &[0; 13]].concat(),
            [&[VERSION, 16][..], &[0; 35]].concat(),
            [&[VERSION, 16][..], &[0; 37]].concat(),
        ] {
            assert!(Message::decode(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn round_trips_and_no_mutation_panics() {
        let mut seed = 1u64;
        for m in samples() {
            let e = m.encode();
            assert!(Message::decode(&e[4..]).is_ok_and(|d| d == m));
            for cut in 4..e.len() {
                assert!(Message::decode(&e[4..cut]).is_err());
            }
            for i in 4..e.len() {
                for _ in 0..8 {
                    seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                    let mut x = e.clone();
                    x[i] = (seed >> 56) as u8;
                    let _ = Message::decode(&x[4..]);
                }
            }
        }
    }
}
