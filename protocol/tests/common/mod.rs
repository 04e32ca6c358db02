//! The three roles of a program on threads of one process, with what each evaluator received counted.

use std::sync::mpsc::{Receiver, Sender, channel};

use tacet_protocol::prg::{Prg, SessionKey};
use tacet_protocol::program::Program;
use tacet_protocol::run::{self, DealerState, EvaluatorState};
use tacet_protocol::{DealerSink, Error, EvaluatorIo, Role};
use zeroize::Zeroizing;

/// One evaluator's ends of the channels, with counters of payload bytes.
pub struct Io {
    dealer: Receiver<(u32, Vec<u8>)>,
    to: Sender<(u32, Vec<u8>)>,
    from: Receiver<(u32, Vec<u8>)>,
    pub rounds: u32,
    opened: u64,
    dealt: u64,
    /// How often each byte value was received, and the first bytes received.
    pub seen: Box<[u64; 256]>,
    pub head: Vec<u8>,
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

/// What the three keep between the programs of a session.
#[derive(Default)]
pub struct States(DealerState, [EvaluatorState; 2]);

impl States {
    /// Forgets the positions past the first `keep`.
    #[allow(dead_code)]
    pub fn cut(&mut self, keep: usize) {
        self.0.cut(keep);
        self.1.iter_mut().for_each(|s| s.cut(keep));
    }
}

/// Shares `input` and runs the three roles; the result shares, and checked costs.
pub fn run(p: &Program, input: &[Zeroizing<Vec<u64>>], key: u64, states: &mut States) -> ([Vec<u64>; 2], [Io; 2]) {
    let prg = |i: u8| {
        let mut seed = [i; 32];
        seed[..8].copy_from_slice(&key.to_le_bytes());
        Prg::new(&SessionKey::from_seed(seed))
    };
    let halves = p.split(input).unwrap();
    let s1 = p.expand(Role::E1, halves.seed.as_slice()).unwrap();
    let s2 = p.expand(Role::E2, &halves.packed).unwrap();
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
    let States(dealer, [st1, st2]) = states;
    let (y1, y2) = std::thread::scope(|s| {
        let dealing = s.spawn(|| run::deal_next(p, prg(1), prg(2), dealer, &mut Sink([d1, d2])).unwrap());
        let e1 = s.spawn(|| run::evaluate_next(p, Role::E1, prg(1), s1, st1, &mut io1).unwrap());
        let e2 = s.spawn(|| run::evaluate_next(p, Role::E2, prg(2), s2, st2, &mut io2).unwrap());
        dealing.join().unwrap();
        (e1.join().unwrap(), e2.join().unwrap())
    });
    let cost = p.cost();
    for (io, dealt) in [(&io1, cost.dealt_bytes[0]), (&io2, cost.dealt_bytes[1])] {
        assert_eq!((io.rounds, io.opened, io.dealt), (cost.rounds, cost.opened_bytes, dealt));
    }
    ([y1, y2], [io1, io2])
}
