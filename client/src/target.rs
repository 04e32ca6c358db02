//! The connection to one party, dialled when it is first needed and again after it was lost.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream};
use tacet_protocol::wire::Message;
use tacet_transport::{TransportError, certificate_from_pem, dial_config, endpoint, send};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::config::unhex;
use crate::error::{Rank, Report};
use crate::{ClientError, Party};

/// How long a party may take to shake hands.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// One party, with a socket of its own: parties cannot tell by the port that their clients are one.
pub(crate) struct Target {
    pub party: Party,
    /// What its inputs are sealed to.
    pub public: [u8; 32],
    dial: ClientConfig,
    quic: Endpoint,
    live: Mutex<Option<Connection>>,
}

impl Target {
    /// Reads the certificate and binds a socket; needs a runtime, does not dial.
    pub(crate) fn new(party: &Party) -> Result<Target, ClientError> {
        let config = |e: TransportError| ClientError::Config(format!("party {}: {e}", party.name));
        let pem = std::fs::read_to_string(&party.certificate)
            .map_err(|e| ClientError::Config(format!("{}: {e}", party.certificate.display())))?;
        let pin = certificate_from_pem(&pem)
            .map_err(|e| ClientError::Config(format!("{}: {e}", party.certificate.display())))?;
        let public = unhex(&party.seal_public).ok_or_else(|| {
            ClientError::Config(format!("seal_public of party {}: 64 hex digits expected", party.name))
        })?;
        let any = match party.addr {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        };
        Ok(Target {
            party: party.clone(),
            public,
            dial: dial_config(pin, None).map_err(config)?,
            quic: endpoint(any, None).map_err(config)?,
            live: Mutex::new(None),
        })
    }

    pub(crate) fn unreachable(&self, reason: impl Into<String>) -> ClientError {
        ClientError::Unreachable { party: self.party.name.clone(), addr: self.party.addr, reason: reason.into() }
    }

    pub(crate) fn failed(&self, reason: impl Into<String>) -> ClientError {
        ClientError::Failed { party: self.party.name.clone(), reason: reason.into() }
    }

    /// A new connection, within `limit`.
    pub(crate) async fn dial(&self, limit: Duration) -> Result<Connection, ClientError> {
        let away = |e: String| self.unreachable(e);
        let connecting =
            self.quic.connect_with(self.dial.clone(), self.party.addr, "tacet").map_err(|e| away(e.to_string()))?;
        let c = timeout(limit, connecting).await.map_err(|_| away(format!("no answer within {limit:?}")))?;
        c.map_err(|e| away(e.to_string()))
    }

    /// The live connection; sessions that find none share one handshake.
    pub(crate) async fn connection(&self) -> Result<Connection, ClientError> {
        let mut live = self.live.lock().await;
        if let Some(c) = live.as_ref().filter(|c| c.close_reason().is_none()) {
            return Ok(c.clone());
        }
        Ok(live.insert(self.dial(HANDSHAKE).await?).clone())
    }

    /// Opens a session's stream and sends its request.
    pub(crate) async fn request(&self, m: &Message) -> Result<(Connection, SendStream, RecvStream), Report> {
        let c = self.connection().await.map_err(|e| Report::new(Rank::Lost, e))?;
        let sent = async {
            let (mut tx, rx) = c.open_bi().await.map_err(|e| e.to_string())?;
            send(&mut tx, m).await.map_err(|e| e.to_string())?;
            Ok::<_, String>((tx, rx))
        };
        match sent.await {
            Ok((tx, rx)) => Ok((c, tx, rx)),
            Err(e) => Err(self.broken(&c, &e)),
        }
    }

    /// A stream that failed: with its connection, or by itself.
    pub(crate) fn broken(&self, c: &Connection, reason: &str) -> Report {
        match c.close_reason() {
            Some(why) => Report::new(Rank::Lost, self.failed(format!("the connection was lost: {why}"))),
            None => Report::new(Rank::Silence, self.failed(reason)),
        }
    }
}
