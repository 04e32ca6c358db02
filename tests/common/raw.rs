//! A client below the SDK: it chooses its halves and its bytes itself.

use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream, TransportConfig, VarInt};
use tacet_client::Client;
use tacet_protocol::Role;
use tacet_protocol::program::Program;
use tacet_protocol::seal::{SealContext, seal};
use tacet_protocol::wire::{Message, SessionId};
use tacet_transport::{certificate_from_pem, dial_config, endpoint, receive, send};

use super::{World, join_all};

/// Connections to the three parties, and what requests to them carry.
pub struct Raw {
    pub connections: Vec<Connection>,
    parties: Vec<tacet_client::Party>,
    token: String,
    model: [u8; 32],
}

/// A party's last word: its answer, or a code and its text.
pub type Answer = Result<Message, (u16, String)>;

impl Raw {
    pub async fn connect(world: &World, client: &Client) -> Raw {
        Raw::with(world, client, TransportConfig::default()).await
    }

    /// One that lets parties write to it no byte of any stream.
    pub async fn deaf(world: &World, client: &Client) -> Raw {
        let mut deaf = TransportConfig::default();
        deaf.stream_receive_window(VarInt::from_u32(0));
        Raw::with(world, client, deaf).await
    }

    async fn with(world: &World, client: &Client, transport: TransportConfig) -> Raw {
        let transport = Arc::new(transport);
        let quic = endpoint(([127, 0, 0, 1], 0).into(), None).unwrap();
        let mut connections = Vec::new();
        for p in &world.lane.parties.party {
            let pem = std::fs::read_to_string(&p.certificate).unwrap();
            let mut dial = dial_config(certificate_from_pem(&pem).unwrap(), None).unwrap();
            dial.transport_config(Arc::clone(&transport));
            connections.push(quic.connect_with(dial, p.addr, "tacet").unwrap().await.unwrap());
        }
        Raw {
            connections,
            parties: world.lane.parties.party.clone(),
            token: world.lane.parties.token.clone(),
            model: client.model().digest(),
        }
    }

    /// A valid request.
    pub fn request(&self, session: SessionId, p: &Program) -> Message {
        let (model, program, tokens) = (self.model, p.digest(), p.tokens() as u32);
        Message::Request { session, token: self.token.clone(), model, program, tokens }
    }

    /// A half, sealed to a party.
    pub fn input(&self, party: usize, session: SessionId, p: &Program, plain: &[u8]) -> Message {
        let target = &self.parties[party];
        let context = SealContext {
            session,
            party: target.name.clone(),
            role: target.role,
            model_digest: self.model,
            program_digest: p.digest(),
        };
        let public = tacet_party::config::unhex(&target.seal_public).unwrap();
        Message::Input { sealed: seal(&public, &context, plain).unwrap() }
    }

    /// A session with these halves; what each party said last.
    pub async fn session(&self, session: SessionId, p: &Program, halves: [&[u8]; 2]) -> Vec<Answer> {
        let plain = [halves[0], halves[1], &[]];
        join_all((0..3).map(|i| async move {
            let (mut tx, mut rx) = self.connections[i].open_bi().await.unwrap();
            send(&mut tx, &self.request(session, p)).await.unwrap();
            if self.parties[i].role != Role::Dealer {
                send(&mut tx, &self.input(i, session, p, plain[i])).await.unwrap();
            }
            last_word(&mut rx).await
        }))
        .await
    }
}

/// Everything up to the answer or the refusal.
pub async fn last_word(rx: &mut RecvStream) -> Answer {
    loop {
        let m = tokio::time::timeout(Duration::from_secs(30), receive(rx, 1 << 20)).await.expect("an answer");
        match m {
            Ok(Message::Accept) => {}
            Ok(Message::Failure { code, text }) => return Err((code, text)),
            Ok(m) => return Ok(m),
            Err(e) => return Err((0, e.to_string())),
        }
    }
}

/// Writes bytes as they are; what the party said last. The stream stays open unless `finish`.
pub async fn bytes(c: &Connection, bytes: &[u8], finish: bool) -> Answer {
    let (mut tx, mut rx): (SendStream, RecvStream) = c.open_bi().await.unwrap();
    // The party may have had enough of them before they are all written: its last word says so.
    if tx.write_all(bytes).await.is_ok() && finish {
        let _ = tx.finish();
    }
    last_word(&mut rx).await
}
