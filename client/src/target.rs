//! The connection to one party, dialled when it is first needed and again after it was lost.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt};
use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream};
use tacet_protocol::wire::Message;
use tacet_transport::{TransportError, certificate_from_pem, dial_config, endpoint, send};
use tokio::sync::Mutex;
use tokio::time::timeout;
use zeroize::{Zeroize, Zeroizing};

use crate::config::unhex;
use crate::error::{Rank, Report};
use crate::{ClientError, Party};

/// How long a party may take to shake hands, and again to take the token.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// A connection that was not used for so long is replaced: a party drops one that is silent for ten seconds, as it is when
/// the program that holds it did other work or the party was restarted, and nothing says so until it is used.
const STALE: Duration = Duration::from_secs(8);

/// How long a party may take to prove that it is there.
const PROOF: Duration = Duration::from_secs(1);

/// The first party that does not shake hands now: whoever only heard of a failure meant this one. It failed, since a session
/// was asked for, which is not the same as never having been reached.
pub(crate) async fn silent(targets: &[Target]) -> Option<Report> {
    let gone = |t: &Target, e: ClientError| {
        let reason = match e {
            ClientError::Unreachable { reason, .. } => reason,
            e => e.to_string(),
        };
        Report::new(Rank::Lost, t.failed(format!("it does not answer any more: {reason}")))
    };
    let mut dials: FuturesUnordered<_> =
        targets.iter().map(|t| async move { t.dial(PROOF).await.map_err(|e| gone(t, e)) }).collect();
    while let Some(r) = dials.next().await {
        if let Err(r) = r {
            return Some(r);
        }
    }
    None
}

/// One party, with a socket of its own: parties cannot tell by the port that their clients are one.
pub(crate) struct Target {
    pub party: Party,
    /// What its inputs are sealed to.
    pub public: [u8; 32],
    token: Zeroizing<String>,
    dial: ClientConfig,
    quic: Endpoint,
    /// With the time of its last use.
    live: Mutex<Option<(Connection, Instant)>>,
}

impl Target {
    /// Reads the certificate and binds a socket; needs a runtime, does not dial.
    pub(crate) fn new(party: &Party, token: &str) -> Result<Target, ClientError> {
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
            token: Zeroizing::new(token.into()),
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
        if let Some((c, used)) = live.as_mut().filter(|(c, used)| c.close_reason().is_none() && used.elapsed() < STALE)
        {
            *used = Instant::now();
            return Ok(c.clone());
        }
        let c = self.dial(HANDSHAKE).await?;
        self.show_token(&c, HANDSHAKE).await?;
        *live = Some((c.clone(), Instant::now()));
        Ok(c)
    }

    /// Shows the token within `limit`, since a party keeps no connection for long that does not. Whether it knows the token is said in
    /// answer to the first request.
    async fn show_token(&self, c: &Connection, limit: Duration) -> Result<(), ClientError> {
        let mut m = Message::Token { token: self.token.to_string() };
        let sent = async {
            let (mut tx, _) = c.open_bi().await.map_err(|e| e.to_string())?;
            send(&mut tx, &m).await.map_err(|e| e.to_string())
        };
        let sent = timeout(limit, sent).await;
        if let Message::Token { token } = &mut m {
            token.zeroize();
        }
        sent.unwrap_or_else(|_| Err(format!("it shook hands but took no token within {limit:?}")))
            .map_err(|e| self.unreachable(e))
    }

    /// Opens a session's stream and sends its request and input, which the party takes within `limit`; wipes the token in
    /// it.
    pub(crate) async fn request(
        &self,
        mut m: Message,
        input: Option<Message>,
        limit: Duration,
    ) -> Result<(Connection, SendStream, RecvStream), Report> {
        let c = self.connection().await.map_err(|e| Report::new(Rank::Lost, e))?;
        let sent = async {
            let (mut tx, rx) = c.open_bi().await.map_err(|e| e.to_string())?;
            send(&mut tx, &m).await.map_err(|e| e.to_string())?;
            if let Some(input) = &input {
                // A party that refuses stops reading: its answer says why.
                let _ = send(&mut tx, input).await;
            }
            Ok::<_, String>((tx, rx))
        };
        let sent = self.taken(&c, limit, sent).await;
        if let Message::Request { token, .. } = &mut m {
            token.zeroize();
        }
        let (tx, rx) = sent?;
        Ok((c, tx, rx))
    }

    /// What is sent on a connection, within `limit`: a party may grant no stream and no room in one, for ever. Later
    /// sessions then dial anew; those on this connection keep it.
    pub(crate) async fn taken<T, E: ToString>(
        &self,
        c: &Connection,
        limit: Duration,
        sending: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Report> {
        if let Ok(sent) = timeout(limit, sending).await {
            return sent.map_err(|e| self.broken(c, &e.to_string()));
        }
        // Whoever holds the lock dials, and has found nothing to use.
        if let Ok(mut live) = self.live.try_lock() {
            live.take_if(|(live, _)| live.stable_id() == c.stable_id());
        }
        let reason = format!("it did not take what it was sent within {limit:?}");
        Err(Report::new(Rank::Silence, self.failed(reason)))
    }

    /// A stream that failed: with its connection, or by itself.
    pub(crate) fn broken(&self, c: &Connection, reason: &str) -> Report {
        match c.close_reason() {
            Some(why) => Report::new(Rank::Lost, self.failed(format!("the connection was lost: {why}"))),
            None => Report::new(Rank::Silence, self.failed(reason)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tacet_protocol::Role;
    use tacet_transport::{Identity, accept_config};

    /// A party that shakes hands and no more, on a port that may be taken again.
    fn server(identity: &Identity, addr: SocketAddr) -> Endpoint {
        serving(accept_config(identity, Vec::new()).unwrap(), addr)
    }

    fn serving(config: quinn::ServerConfig, addr: SocketAddr) -> Endpoint {
        let e = endpoint(addr, Some(config)).unwrap();
        let accepting = e.clone();
        tokio::spawn(async move {
            while let Some(i) = accepting.accept().await {
                let Ok(c) = i.await else { continue };
                tokio::spawn(async move { c.closed().await });
            }
        });
        e
    }

    /// A target whose party shakes hands, takes so many streams with so many bytes in each, and says nothing.
    fn stubborn(streams: u32, bytes: u32) -> (Target, Endpoint) {
        let (pem, key) = Identity::generate("alpha").unwrap();
        let mut config = accept_config(&Identity::from_pem(&pem, &key).unwrap(), Vec::new()).unwrap();
        let mut transport = quinn::TransportConfig::default();
        transport.max_concurrent_bidi_streams(streams.into()).stream_receive_window(bytes.into());
        config.transport_config(transport.into());
        let e = serving(config, ([127, 0, 0, 1], 0).into());
        (target(&pem, e.local_addr().unwrap()), e)
    }

    fn target(pem: &str, addr: SocketAddr) -> Target {
        // The port is in no other test's use.
        let file = std::env::temp_dir().join(format!("tacet-target-{}-{}.crt", std::process::id(), addr.port()));
        std::fs::write(&file, pem).unwrap();
        let party = Party {
            name: "alpha".into(),
            role: Role::E1,
            addr,
            certificate: file.clone(),
            seal_public: "ab".repeat(32),
        };
        let t = Target::new(&party, "token").unwrap();
        std::fs::remove_file(&file).unwrap();
        t
    }

    /// What only a test that fails waits for.
    const LONG: Duration = Duration::from_secs(30);
    /// For what never comes.
    const SHORT: Duration = Duration::from_millis(100);

    #[tokio::test]
    async fn a_party_that_takes_no_token_is_named_and_the_next_session_tries_again() {
        for (streams, bytes) in [(0, 1 << 16), (1, 0)] {
            let (t, e) = stubborn(streams, bytes);
            let c = t.dial(HANDSHAKE).await.unwrap();
            let shown = timeout(LONG, t.show_token(&c, SHORT)).await.expect("in time").unwrap_err();
            assert!(matches!(&shown, ClientError::Unreachable { party, .. } if party == "alpha"), "{shown}");
            assert!(shown.to_string().contains("token"), "{shown}");
            drop(e);
        }
        let (t, _e) = stubborn(0, 1 << 16);
        let lost = timeout(LONG, t.connection()).await.expect("in time").unwrap_err();
        assert!(lost.to_string().contains("token"), "{lost}");
        assert!(t.live.try_lock().unwrap().is_none());
    }

    #[tokio::test]
    async fn a_party_that_takes_no_request_is_named_and_dialled_anew_for_the_next() {
        let request = || Message::Request {
            session: [1; 16],
            token: "token".into(),
            model: [2; 32],
            program: [3; 32],
            tokens: 8,
        };
        // Of the streams that it grants, the token takes one.
        for (streams, bytes, input) in [(1, 1 << 16, 0), (2, 1 << 10, 1 << 20)] {
            let (t, _e) = stubborn(streams, bytes);
            let first = t.connection().await.unwrap();
            let input = Some(Message::Input { sealed: vec![0; input] });
            let r = timeout(LONG, t.request(request(), input, SHORT)).await.expect("in time").err().unwrap();
            assert!(matches!(&r.error, ClientError::Failed { party, .. } if party == "alpha"), "{}", r.error);
            assert!(r.rank == Rank::Silence && !r.busy && first.close_reason().is_none());
            assert!(t.live.try_lock().unwrap().is_none());
            assert_ne!(t.connection().await.unwrap().stable_id(), first.stable_id());
        }
    }

    #[tokio::test]
    async fn a_lost_connection_is_dialled_again_and_a_live_one_is_shared() {
        let (pem, key) = Identity::generate("alpha").unwrap();
        let identity = Identity::from_pem(&pem, &key).unwrap();
        let first = server(&identity, ([127, 0, 0, 1], 0).into());
        let addr = first.local_addr().unwrap();
        let t = target(&pem, addr);

        let (a, b) = tokio::join!(t.connection(), t.connection());
        let (a, b) = (a.unwrap(), b.unwrap());
        assert_eq!(a.stable_id(), b.stable_id());
        first.close(0u32.into(), b"stopping");
        let why = a.closed().await.to_string();
        let lost = t.broken(&a, "reset");
        assert!(lost.rank == Rank::Lost && lost.error.to_string().contains("stopping"), "{why} {}", lost.error);
        first.wait_idle().await;
        drop(first);

        let short = t.dial(Duration::from_millis(300)).await.unwrap_err();
        assert!(matches!(&short, ClientError::Unreachable { party, .. } if party == "alpha"), "{short}");
        // The port is free once the first server's tasks have ended.
        let mut tries = 0;
        while let Err(e) = std::net::UdpSocket::bind(addr) {
            tries += 1;
            assert!(tries < 100, "{e}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let second = server(&identity, addr);
        let c = t.connection().await.unwrap();
        assert!(c.close_reason().is_none() && c.stable_id() != a.stable_id());
        assert_eq!(t.connection().await.unwrap().stable_id(), c.stable_id());
        // Long unused: replaced, though nothing says that it is lost.
        if let Some((_, used)) = t.live.lock().await.as_mut() {
            *used -= STALE;
        }
        assert_ne!(t.connection().await.unwrap().stable_id(), c.stable_id());
        drop(second);
    }
}
