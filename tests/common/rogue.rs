//! A party that misbehaves: it holds a real identity of the lane and speaks the protocol between parties by hand.

use std::collections::HashMap;

use quinn::{Connection, Endpoint, RecvStream, SendStream};
use tacet_party::config::{Config, Peer};
use tacet_protocol::Role;
use tacet_protocol::model::BertModel;
use tacet_protocol::plan::Planner;
use tacet_protocol::prg::Ephemeral;
use tacet_protocol::program::{Kind, Program};
use tacet_protocol::wire::{CONTROL_LIMIT, Dealing, Message, SessionId};
use tacet_transport::{
    Identity, TransportError, accept_config, certificate_from_pem, dial_config, endpoint, receive, send,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::World;

const ROLES: [Role; 3] = [Role::E1, Role::E2, Role::Dealer];

fn rank(role: Role) -> usize {
    ROLES.iter().position(|r| *r == role).unwrap()
}

/// What is wrong with one message of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The frame's second half is missing and the stream ends.
    Truncated,
    /// The frame claims two gigabytes.
    Oversized,
    /// The frame has bytes after its message.
    Trailing,
    /// The frame ends a byte before its message does.
    Short,
    /// Two messages in the wrong order.
    Reordered,
    /// A message twice.
    Replayed,
    /// Another version of the protocol.
    Version,
    /// A kind that nobody knows.
    Unknown,
    /// A valid message that does not belong here.
    OtherKind,
    /// Nothing more comes.
    Silent,
    /// The stream is reset.
    Reset,
}

/// One party of a lane, played by the test.
pub struct Rogue {
    config: Config,
    role: Role,
    model: [u8; 32],
    planner: Planner,
    identity: Identity,
    quic: Endpoint,
    links: HashMap<Role, Connection>,
    /// Streams of the client's connections.
    client: Option<UnboundedReceiver<(SendStream, RecvStream)>>,
}

/// Streams of a session, open as long as this lives.
#[derive(Default)]
pub struct Held(Vec<(SendStream, RecvStream)>);

fn certificate(p: &Peer) -> String {
    std::fs::read_to_string(&p.certificate).unwrap()
}

impl Rogue {
    /// Takes the address and identity of a party that has ended.
    pub fn new(world: &World, party: usize) -> Rogue {
        let config = world.config(party);
        let read = |p: &std::path::Path| std::fs::read_to_string(p).unwrap();
        let identity = Identity::from_pem(&read(&config.certificate), &read(&config.key)).unwrap();
        let pins = config.peer.iter().map(|p| certificate_from_pem(&certificate(p)).unwrap()).collect();
        let quic = endpoint(config.listen, Some(accept_config(&identity, pins).unwrap())).unwrap();
        let model = BertModel::load(&config.model).unwrap();
        Rogue {
            role: config.role,
            model: model.digest(),
            planner: Planner::new(&model).unwrap(),
            identity,
            quic,
            links: HashMap::new(),
            client: None,
            config,
        }
    }

    /// An honest greeting.
    pub fn hello(&self) -> Message {
        Message::Hello {
            name: self.config.name.clone(),
            role: rank(self.role) as u8,
            model: self.model,
            program: self.planner.program(8).unwrap().digest(),
            ephemeral: Ephemeral::new().1,
        }
    }

    /// Dials a peer that waits for this role, sends `greeting`, and returns what came back.
    pub async fn dial(&self, to: Role, greeting: &[u8]) -> (Connection, Result<Message, TransportError>) {
        let peer = self.config.peer.iter().find(|p| p.role == to).unwrap();
        let dial = dial_config(certificate_from_pem(&certificate(peer)).unwrap(), Some(&self.identity)).unwrap();
        let c = self.quic.connect_with(dial, peer.addr, "tacet").unwrap().await.unwrap();
        let (mut tx, mut rx) = c.open_bi().await.unwrap();
        tx.write_all(greeting).await.unwrap();
        let reply = receive(&mut rx, CONTROL_LIMIT).await;
        (c, reply)
    }

    /// Waits for a peer that dials, answers `greeting`, and returns its own.
    pub async fn accept(&self, greeting: &[u8]) -> Option<(Connection, Role)> {
        let c = self.quic.accept().await.unwrap().await.ok()?;
        let (mut tx, mut rx) = c.accept_bi().await.ok()?;
        let Ok(Message::Hello { role, .. }) = receive(&mut rx, CONTROL_LIMIT).await else { return None };
        tx.write_all(greeting).await.ok()?;
        Some((c, ROLES[role as usize]))
    }

    /// Links with both peers as an honest party would.
    pub async fn link(&mut self) {
        for to in ROLES.into_iter().filter(|r| rank(*r) > rank(self.role)) {
            let (c, reply) = self.dial(to, &self.hello().encode()).await;
            assert!(matches!(reply, Ok(Message::Hello { .. })), "{reply:?}");
            self.links.insert(to, c);
        }
        while self.links.len() < 2 {
            if let Some((c, role)) = self.accept(&self.hello().encode()).await {
                self.links.insert(role, c);
            }
        }
    }

    /// Takes the client's connection; run it beside the client's connecting. Later ones are taken too: a client replaces a
    /// connection that it has not used for some seconds.
    pub async fn meet_client(&mut self) {
        let (to, streams) = unbounded_channel();
        self.client = Some(streams);
        let quic = self.quic.clone();
        let first = quic.accept().await.unwrap().await.unwrap();
        tokio::spawn(feed(first, to.clone()));
        tokio::spawn(async move {
            while let Some(next) = quic.accept().await {
                let to = to.clone();
                tokio::spawn(async move {
                    if let Ok(c) = next.await {
                        feed(c, to).await;
                    }
                });
            }
        });
    }

    /// Ends its connections, so that the peers do not have to find out.
    pub async fn leave(self) {
        self.quic.close(0u32.into(), b"leaving");
        self.quic.wait_idle().await;
    }

    /// Accepts one session and spoils message `at` of those that `victim` gets from here; the rest is of the right form,
    /// with zeros for payload. Message 0 is the one that opens a stream, if this role sends one.
    pub async fn session(&mut self, victim: Role, at: usize, fault: Fault) -> Result<Held, TransportError> {
        let lost = |e: quinn::ConnectionError| TransportError::Connection(e.to_string());
        let spoil = |to: Role| if to == victim { at } else { usize::MAX };
        let mut held = Held::default();
        let (mut tx, rx, session, tokens) = loop {
            let (tx, mut rx) = self.client.as_mut().unwrap().recv().await.expect("the client's streams");
            // Of a session that the client has given up.
            let Ok(m) = receive(&mut rx, 1 << 20).await else { continue };
            match m {
                // Shown once on every connection.
                Message::Token { .. } => {}
                Message::Request { session, tokens, .. } => break (tx, rx, session, tokens),
                m => panic!("{m:?} in place of a request"),
            }
        };
        send(&mut tx, &Message::Accept).await?;
        held.0.push((tx, rx));
        let p = self.planner.program(tokens as usize).unwrap();
        if self.role == Role::Dealer {
            for e in [Role::E1, Role::E2] {
                let (mut tx, rx) = self.stream_of(e, session).await?;
                let start = Message::Start { dealing: Dealing::Fresh { nonce: [1; 16] } };
                let frames = [vec![start], steps(&p, e, true)].concat();
                write(&mut tx, &frames, spoil(e), fault).await?;
                held.0.push((tx, rx));
            }
            return Ok(held);
        }
        let (mut tx, rx) = self.links[&Role::Dealer].open_bi().await.map_err(lost)?;
        write(&mut tx, &[Message::Join { session, nonce: [2; 16] }], spoil(Role::Dealer), fault).await?;
        held.0.push((tx, rx));
        let (other, mut frames) = match self.role {
            Role::E1 => (Role::E2, vec![Message::Peer { session }]),
            _ => (Role::E1, Vec::new()),
        };
        let (mut tx, rx) = match self.role {
            Role::E1 => self.links[&other].open_bi().await.map_err(lost)?,
            _ => self.stream_of(other, session).await?,
        };
        frames.extend(steps(&p, other, false));
        write(&mut tx, &frames, spoil(other), fault).await?;
        held.0.push((tx, rx));
        Ok(held)
    }

    /// The stream that a peer opens for a session; what is left of an earlier one is dropped.
    async fn stream_of(&self, peer: Role, session: SessionId) -> Result<(SendStream, RecvStream), TransportError> {
        loop {
            let streams = self.links[&peer].accept_bi().await;
            let (tx, mut rx) = streams.map_err(|e| TransportError::Connection(e.to_string()))?;
            match receive(&mut rx, CONTROL_LIMIT).await {
                Ok(Message::Join { session: s, .. } | Message::Peer { session: s }) if s == session => {
                    return Ok((tx, rx));
                }
                _ => {}
            }
        }
    }
}

/// Hands on the streams of one of the client's connections.
async fn feed(c: Connection, to: UnboundedSender<(SendStream, RecvStream)>) {
    while let Ok(streams) = c.accept_bi().await {
        let _ = to.send(streams);
    }
}

/// The steps that an evaluator expects from the dealer or from the other evaluator, with zeros for payload.
fn steps(p: &Program, to: Role, dealt: bool) -> Vec<Message> {
    let len = |i: usize| match (&p.ops[i].kind, dealt) {
        (Kind::Open, false) => p.opening_len(&p.ops[i]),
        (_, true) => p.dealt_len(i)[rank(to)] as usize,
        _ => 0,
    };
    let steps = (0..p.ops.len()).map(|i| (i as u32, len(i))).filter(|s| s.1 > 0);
    steps.map(|(step, n)| Message::Step { step, bytes: vec![0; n] }).collect()
}

fn set_length(frame: &mut [u8]) {
    let len = (frame.len() - 4) as u32;
    frame[..4].copy_from_slice(&len.to_le_bytes());
}

async fn write(tx: &mut SendStream, frames: &[Message], at: usize, fault: Fault) -> Result<(), TransportError> {
    let lost = |e: quinn::WriteError| TransportError::Connection(e.to_string());
    let mut i = 0;
    while i < frames.len() {
        let mut bytes = frames[i].encode();
        if i == at {
            match fault {
                Fault::Truncated => {
                    tx.write_all(&bytes[..bytes.len() / 2]).await.map_err(lost)?;
                    let _ = tx.finish();
                    return Ok(());
                }
                Fault::Oversized => bytes[..4].copy_from_slice(&(1u32 << 31).to_le_bytes()),
                Fault::Trailing => {
                    bytes.push(0);
                    set_length(&mut bytes);
                }
                Fault::Short => {
                    bytes.pop();
                    set_length(&mut bytes);
                }
                Fault::Reordered => bytes = [frames[i + 1].encode(), bytes].concat(),
                Fault::Replayed => bytes = [bytes.clone(), bytes].concat(),
                Fault::Version => bytes[4] = 200,
                Fault::Unknown => bytes[5] = 200,
                Fault::OtherKind => bytes = Message::Accept.encode(),
                Fault::Silent => return Ok(()),
                Fault::Reset => {
                    let _ = tx.reset(7u32.into());
                    return Ok(());
                }
            }
            i += usize::from(fault == Fault::Reordered);
        }
        tx.write_all(&bytes).await.map_err(lost)?;
        i += 1;
    }
    Ok(())
}
