//! Two QUIC ends on loopback, each in a thread of its own, that send steps to each other.

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc::Sender;

use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream, ServerConfig};
use tacet_transport::{Identity, accept_config, dial_config, endpoint, widen};

pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// A stream both ways, and what has to live as long.
pub type Stream = (Endpoint, Connection, SendStream, RecvStream);

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

pub fn runtime() -> Outcome<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Of one party, for the end that accepts and the one that dials.
pub fn configs() -> Outcome<(ServerConfig, ClientConfig)> {
    let (certificate, key) = Identity::generate("party")?;
    let identity = Identity::from_pem(&certificate, &key)?;
    let pin = identity.certificate.clone();
    Ok((accept_config(&identity, vec![pin.clone()])?, dial_config(pin, Some(&identity))?))
}

/// Tells where it listens, and takes the first connection.
pub async fn accepted(quic: ServerConfig, at: Sender<SocketAddr>) -> Outcome<Stream> {
    let e = endpoint(LOOPBACK, Some(quic))?;
    at.send(e.local_addr()?)?;
    let c = e.accept().await.ok_or("closed")?.await?;
    widen(&c);
    let (tx, rx) = c.accept_bi().await?;
    Ok((e, c, tx, rx))
}

pub async fn dialled(quic: ClientConfig, to: SocketAddr) -> Outcome<Stream> {
    let e = endpoint(LOOPBACK, None)?;
    let c = e.connect_with(quic, to, "party")?.await?;
    widen(&c);
    let (tx, rx) = c.open_bi().await?;
    Ok((e, c, tx, rx))
}
