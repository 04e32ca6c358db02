//! Links between parties: who dials whom, the greeting, and where a peer's streams go.
//!
//! E1 dials E2 and the dealer, E2 dials the dealer. The dialler greets first; both compare model and plan before the link
//! counts as up, so that no share flows between parties that would compute different things.

use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use tacet_protocol::Role;
use tacet_protocol::prg::Ephemeral;
use tacet_protocol::wire::{CONTROL_LIMIT, Message};
use tacet_transport::{ALPN_MESH, TransportError, receive, send};
use tokio::time::timeout;

use crate::config::Peer;
use crate::meeting::Joined;
use crate::pool::{self, Prepare};
use crate::{Link, Party, lock, session};

fn rank(r: Role) -> u8 {
    match r {
        Role::E1 => 0,
        Role::E2 => 1,
        Role::Dealer => 2,
    }
}

/// Whether the first role dials the second.
pub fn dials(a: Role, b: Role) -> bool {
    rank(a) < rank(b)
}

/// Connects, greets, serves the link until it breaks, and starts over.
pub async fn keep_dialling(party: Arc<Party>, quic: Endpoint, peer: Peer, config: quinn::ClientConfig) {
    loop {
        let result = async {
            let connecting = quic.connect_with(config.clone(), peer.addr, "tacet").map_err(|e| e.to_string())?;
            let c =
                timeout(Duration::from_secs(5), connecting).await.map_err(|_| "no answer within 5 s".to_string())?;
            let c = c.map_err(|e| e.to_string())?;
            let link = timeout(Duration::from_secs(5), greet(&party, &c, &peer, true)).await;
            let link = link.map_err(|_| "no greeting within 5 s".to_string())??;
            run(&party, link, &peer).await;
            Err::<(), String>("the connection ended".into())
        };
        if let Err(e) = result.await {
            note(&party, &peer, Some(e));
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

fn note(party: &Party, peer: &Peer, trouble: Option<String>) {
    let mut t = lock(&party.trouble);
    match trouble {
        None => {
            t.remove(&peer.name);
            eprintln!("link up peer={} role={:?}", peer.name, peer.role);
        }
        Some(e) => {
            if t.get(&peer.name) != Some(&e) {
                eprintln!("link down peer={} reason={e:?}", peer.name);
                t.insert(peer.name.clone(), e);
            }
        }
    }
    drop(t);
    if party.ready() {
        eprintln!("ready role={:?} name={} listen={}", party.config.role, party.config.name, party.config.listen);
    }
}

/// Takes a connection from a peer or a client, told apart by protocol name and pinned certificate.
pub async fn accepted(party: Arc<Party>, incoming: Incoming, pins: Vec<CertificateDer<'static>>) {
    let slot = Arc::clone(&party.connections).try_acquire_owned().ok();
    if slot.is_none() {
        // Peers get through, if they really are at their addresses.
        if !party.config.peer.iter().any(|p| p.addr.ip() == incoming.remote_address().ip()) {
            return incoming.refuse();
        }
        if !incoming.remote_address_validated() {
            let _ = incoming.retry();
            return;
        }
    }
    let Ok(Ok(c)) = timeout(Duration::from_secs(5), async { incoming.await }).await else { return };
    let mesh = c
        .handshake_data()
        .and_then(|d| d.downcast::<quinn::crypto::rustls::HandshakeData>().ok())
        .is_some_and(|d| d.protocol.as_deref() == Some(ALPN_MESH));
    if !mesh {
        let Some(slot) = slot else {
            return c.close(4u32.into(), b"too many connections: try again shortly");
        };
        return session::client(party, c, slot).await;
    }
    drop(slot);
    let certificate = c.peer_identity().and_then(|i| i.downcast::<Vec<CertificateDer<'static>>>().ok());
    let known = certificate.and_then(|v| v.first().and_then(|c| pins.iter().position(|p| p == c)));
    let Some(peer) = known.map(|i| party.config.peer[i].clone()).filter(|p| dials(p.role, party.config.role)) else {
        c.close(1u32.into(), b"a party's connection needs its pinned certificate");
        return;
    };
    match timeout(Duration::from_secs(5), greet(&party, &c, &peer, false)).await {
        Ok(Ok(link)) => {
            run(&party, link, &peer).await;
            note(&party, &peer, Some("the connection ended".into()));
        }
        Ok(Err(e)) => note(&party, &peer, Some(e)),
        Err(_) => note(&party, &peer, Some("no greeting within 5 s".into())),
    }
}

/// First frame of a stream that a peer opened, and whom it is for.
async fn stream_from_peer(party: Arc<Party>, from: Role, link: Link, tx: SendStream, mut rx: RecvStream) {
    let limit = Duration::from_secs(party.config.limits.join_s);
    let Ok(Ok(first)) = timeout(limit, receive(&mut rx, CONTROL_LIMIT)).await else { return };
    match (first, from, party.config.role) {
        (Message::Join { session, nonce }, _, Role::Dealer) => {
            party.meeting.put((session, from), Joined { tx, rx, nonce, link }, limit);
        }
        (Message::Peer { session }, Role::E1, Role::E2) => {
            party.meeting.put((session, from), Joined { tx, rx, nonce: [0; 16], link }, limit);
        }
        (Message::Prepare { bundle, program, tokens, nonce }, Role::Dealer, _) => {
            let p = Prepare { bundle, program, tokens: tokens as usize, nonce };
            pool::prepare(party, link, tx, rx, p).await;
        }
        _ => {}
    }
}

async fn greet(party: &Party, c: &Connection, peer: &Peer, first: bool) -> Result<Link, String> {
    let text = |e: TransportError| e.to_string();
    let (mut tx, mut rx) = if first { c.open_bi().await } else { c.accept_bi().await }.map_err(|e| e.to_string())?;
    let (ours, public) = Ephemeral::new();
    let hello = Message::Hello {
        name: party.config.name.clone(),
        role: rank(party.config.role),
        model: party.model,
        program: party.plan,
        ephemeral: public,
    };
    send(&mut tx, &hello).await.map_err(text)?;
    let reply = receive(&mut rx, CONTROL_LIMIT).await.map_err(text)?;
    let Message::Hello { name, role, model, program, ephemeral } = reply else {
        return Err(format!("{reply:?} in place of a greeting"));
    };
    let wrong = if role != rank(peer.role) {
        Some("its role is not the configured one")
    } else if name != peer.name {
        Some("its name is not the configured one")
    } else if model != party.model {
        Some("it has another model: compare the digests that `tacet doctor` prints")
    } else if program != party.plan {
        Some("it plans this model differently: run the same release everywhere")
    } else {
        None
    };
    if let Some(w) = wrong {
        c.close(2u32.into(), w.as_bytes());
        return Err(w.into());
    }
    let secret = ours.agree(ephemeral).map_err(|e| e.to_string())?;
    Ok(Link { connection: c.clone(), secret: Arc::new(secret) })
}

/// Registers the link and hands its streams to waiting sessions until it breaks.
async fn run(party: &Arc<Party>, link: Link, peer: &Peer) {
    let c = link.connection.clone();
    tacet_transport::widen(&c);
    if let Some(old) = lock(&party.links).insert(peer.role, link.clone()) {
        // What still hangs on it, bundles above all, must not wait for its idle timeout.
        old.connection.close(0u32.into(), b"replaced by a newer connection");
    }
    note(party, peer, None);
    party.stock.changed();
    while let Ok((tx, rx)) = c.accept_bi().await {
        tokio::spawn(stream_from_peer(Arc::clone(party), peer.role, link.clone(), tx, rx));
    }
}
