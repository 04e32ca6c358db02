//! QUIC with pinned certificates, and framed messages on its streams; shared by parties and clients.
//!
//! Every certificate is self-signed and compared byte for byte with the one the configuration names; TLS still proves
//! possession of its key. There is no certificate authority to trust.
#![forbid(unsafe_code)]

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
pub use quinn::Connection;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{Endpoint, EndpointConfig, MtuDiscoveryConfig, RecvStream, SendStream, TransportConfig, VarInt};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, SignatureScheme};
use tacet_protocol::wipe::Wiped;
use tacet_protocol::wire::{Message, STEP_HEADER, step_header};

/// ALPN of connections between parties.
pub const ALPN_MESH: &[u8] = b"tacet-mesh/1";
/// ALPN of clients.
pub const ALPN_CLIENT: &[u8] = b"tacet-client/1";

/// What can go wrong on a connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// A certificate, key or socket that cannot be used.
    #[error("{0}")]
    Setup(String),
    /// The other side closed, vanished or refused the handshake.
    #[error("connection: {0}")]
    Connection(String),
    /// A frame longer than allowed, or one that does not parse.
    #[error("{0}")]
    Frame(String),
}

/// A certificate with its key.
pub struct Identity {
    /// The certificate peers pin.
    pub certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Certificate and key as PEM, for a new Ed25519 identity.
    pub fn generate(name: &str) -> Result<(String, String), TransportError> {
        let setup = |e: rcgen::Error| TransportError::Setup(format!("certificate: {e}"));
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(setup)?;
        let params = rcgen::CertificateParams::new(vec![name.to_string()]).map_err(setup)?;
        Ok((params.self_signed(&key).map_err(setup)?.pem(), key.serialize_pem()))
    }

    /// Reads PEM texts.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Identity, TransportError> {
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|e| TransportError::Setup(format!("private key: {e}")))?;
        Ok(Identity { certificate: certificate_from_pem(certificate)?, key })
    }
}

/// Reads one certificate.
pub fn certificate_from_pem(pem: &str) -> Result<CertificateDer<'static>, TransportError> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| TransportError::Setup(format!("certificate: {e}")))
}

#[derive(Debug)]
struct Pinned {
    allowed: Vec<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

impl Pinned {
    fn new(allowed: Vec<CertificateDer<'static>>) -> Arc<Pinned> {
        Arc::new(Pinned { allowed, provider: Arc::new(ring::default_provider()) })
    }

    fn check(&self, c: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        if self.allowed.iter().any(|a| a == c) {
            return Ok(());
        }
        Err(rustls::Error::General("the certificate is not the pinned one".into()))
    }

    fn signature(
        &self,
        m: &[u8],
        c: &CertificateDer<'_>,
        d: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(m, c, d, &self.provider.signature_verification_algorithms)
    }
}

const TLS13_ONLY: &str = "only TLS 1.3 is spoken";

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General(TLS13_ONLY.into()))
    }

    fn verify_tls13_signature(
        &self,
        m: &[u8],
        c: &CertificateDer<'_>,
        d: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(m, c, d)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        // Clients have no certificate and bring a token; what a connection without one may do is the server's choice.
        false
    }

    fn verify_client_cert(
        &self,
        end: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General(TLS13_ONLY.into()))
    }

    fn verify_tls13_signature(
        &self,
        m: &[u8],
        c: &CertificateDer<'_>,
        d: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(m, c, d)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// Bytes that a connection may have in flight towards this side before it is known, and once it is a client's. Links
/// between parties hold every stream's window.
const STRANGER: u32 = 64 << 10;
const KNOWN: u32 = 8 << 20;

/// Packets of 6500 bytes where the path carries them, windows of 16 MB: a factor of five over quinn's defaults on loopback. Headers,
/// tags and acknowledgements add 0.7 % to the bytes of steps then, and 2.4 % in packets of 1452 bytes.
fn transport(receive_window: u32) -> Arc<TransportConfig> {
    let mut t = TransportConfig::default();
    let window = VarInt::from_u32(16 << 20);
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(6500);
    t.stream_receive_window(window)
        .receive_window(VarInt::from_u32(receive_window))
        .send_window(64 << 20)
        .mtu_discovery_config(Some(mtu))
        .max_concurrent_bidi_streams(VarInt::from_u32(256))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .keep_alive_interval(Some(Duration::from_secs(2)))
        .max_idle_timeout(Some(VarInt::from_u32(10_000).into()));
    Arc::new(t)
}

fn setup(e: impl std::fmt::Display) -> TransportError {
    TransportError::Setup(e.to_string())
}

/// How to dial a server whose certificate is `server`; `identity` for parties, none for clients.
pub fn dial_config(
    server: CertificateDer<'static>,
    identity: Option<&Identity>,
) -> Result<quinn::ClientConfig, TransportError> {
    let pin = Pinned::new(vec![server]);
    let b = rustls::ClientConfig::builder_with_provider(Arc::clone(&pin.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup)?
        .dangerous()
        .with_custom_certificate_verifier(pin);
    let mut tls = match identity {
        Some(i) => b.with_client_auth_cert(vec![i.certificate.clone()], i.key.clone_key()).map_err(setup)?,
        None => b.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![if identity.is_some() { ALPN_MESH } else { ALPN_CLIENT }.to_vec()];
    let mut c = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).map_err(setup)?));
    c.transport_config(transport(KNOWN));
    Ok(c)
}

/// How a party accepts: `peers` are the certificates of the other parties.
pub fn accept_config(
    identity: &Identity,
    peers: Vec<CertificateDer<'static>>,
) -> Result<quinn::ServerConfig, TransportError> {
    let pin = Pinned::new(peers);
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::clone(&pin.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(setup)?
        .with_client_cert_verifier(pin)
        .with_single_cert(vec![identity.certificate.clone()], identity.key.clone_key())
        .map_err(setup)?;
    tls.alpn_protocols = vec![ALPN_MESH.to_vec(), ALPN_CLIENT.to_vec()];
    let mut c = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).map_err(setup)?));
    c.transport_config(transport(STRANGER));
    Ok(c)
}

/// A UDP socket with 8 MB buffers (as far as the system allows) and the endpoint on it.
pub fn endpoint(listen: SocketAddr, server: Option<quinn::ServerConfig>) -> Result<Endpoint, TransportError> {
    let socket =
        UdpSocket::bind(listen).map_err(|e| TransportError::Setup(format!("cannot bind UDP {listen}: {e}")))?;
    let s = socket2::SockRef::from(&socket);
    let _ = s.set_recv_buffer_size(8 << 20);
    let _ = s.set_send_buffer_size(8 << 20);
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(6500).map_err(setup)?;
    Endpoint::new(config, server, socket, Arc::new(quinn::TokioRuntime)).map_err(setup)
}

/// A stream's error says only that its connection is gone; the reason behind it is what the other side said.
fn lost(e: impl std::error::Error) -> TransportError {
    TransportError::Connection(e.source().map_or_else(|| e.to_string(), |reason| format!("{e}: {reason}")))
}

/// Lets a client's connection hold a request's worth, once its token is known.
pub fn admit(c: &quinn::Connection) {
    c.set_receive_window(VarInt::from_u32(KNOWN));
}

/// Lets a connection hold every stream's window, so that sessions that share a link between parties cannot starve one
/// another.
pub fn widen(c: &quinn::Connection) {
    c.set_receive_window(VarInt::from_u32(1 << 30));
}

/// Writes one frame; its bytes are wiped once they are acknowledged.
pub async fn send(s: &mut SendStream, m: &Message) -> Result<(), TransportError> {
    s.write_chunk(Bytes::from_owner(Wiped::new(m.encode()))).await.map_err(lost)
}

/// Writes the frame of one step without copying its payload, which is wiped once it is acknowledged.
pub async fn send_step(s: &mut SendStream, step: u32, bytes: Wiped<u8>) -> Result<(), TransportError> {
    let header = Bytes::copy_from_slice(&step_header(step, bytes.len()));
    s.write_all_chunks(&mut [header, Bytes::from_owner(bytes)]).await.map_err(lost)
}

/// Reads one frame of at most `limit` bytes after its length.
pub async fn receive(r: &mut RecvStream, limit: usize) -> Result<Message, TransportError> {
    let mut len = [0; 4];
    r.read_exact(&mut len).await.map_err(lost)?;
    let len = u32::from_le_bytes(len) as usize;
    if len > limit {
        return Err(TransportError::Frame(format!("a frame of {len} bytes where at most {limit} are allowed")));
    }
    Message::decode(&read(r, len).await?).map_err(|e| TransportError::Frame(e.to_string()))
}

/// Reads the frame of one step, whose payload length is known; the payload is copied once, and never moved while it grows.
pub async fn receive_step(r: &mut RecvStream, step: u32, len: usize) -> Result<Wiped<u8>, TransportError> {
    let due = step_header(step, len);
    let mut header = [0; STEP_HEADER];
    // A frame of another length may be shorter than a step's header: the length decides before more is read.
    let (length, rest) = header.split_at_mut(4);
    r.read_exact(length).await.map_err(lost)?;
    let frame = |what: String| TransportError::Frame(format!("{what} where step {step} with {len} bytes was due"));
    if length != &due[..4] {
        let n = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
        return Err(frame(format!("a frame of {n} bytes")));
    }
    r.read_exact(rest).await.map_err(lost)?;
    let [version, kind] = [header[4], header[5]];
    if version != due[4] {
        let ours = due[4];
        let text = format!("protocol version {version}; this side speaks {ours}: run the same release everywhere");
        return Err(TransportError::Frame(text));
    }
    if kind != due[5] {
        return Err(frame(format!("a frame of kind {kind}")));
    }
    if header != due {
        return Err(frame("another step".into()));
    }
    read(r, len).await
}

async fn read(r: &mut RecvStream, len: usize) -> Result<Wiped<u8>, TransportError> {
    let mut body = Wiped::new(Vec::with_capacity(len));
    while body.len() < len {
        match r.read_chunk(len - body.len(), true).await.map_err(lost)? {
            Some(c) => body.extend_from_slice(&c.bytes),
            None => return Err(TransportError::Connection("the stream ended within a frame".into())),
        }
    }
    Ok(body)
}
