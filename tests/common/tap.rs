//! A wire tap: it stands before a party under a certificate of its own, passes every byte on, and notes each frame.

use std::path::Path;
use std::sync::{Arc, Mutex};

use quinn::{Connection, Endpoint, RecvStream, SendStream};
use tacet_protocol::wire::Message;
use tacet_transport::{Identity, accept_config, admit, certificate_from_pem, dial_config, endpoint};

/// What an observer of the unsealed stream sees of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Of the client's streams, in their order.
    pub stream: usize,
    pub from_client: bool,
    pub kind: u8,
    /// Bytes, length field included.
    pub len: usize,
    /// Number of tokens, where the frame says one.
    pub tokens: Option<u32>,
}

type Noted = Arc<Mutex<Vec<Frame>>>;

/// A tap before one party.
pub struct Tap {
    noted: Noted,
    _quic: Endpoint,
}

impl Tap {
    /// Stands before `party`: whoever is sent to the entry afterwards goes through the tap.
    pub fn before(party: &mut tacet_client::Party, dir: &Path) -> Tap {
        let (pem, key) = Identity::generate(&party.name).unwrap();
        let real = certificate_from_pem(&std::fs::read_to_string(&party.certificate).unwrap()).unwrap();
        let identity = Identity::from_pem(&pem, &key).unwrap();
        let quic = endpoint(([127, 0, 0, 1], 0).into(), Some(accept_config(&identity, Vec::new()).unwrap())).unwrap();
        let (noted, addr) = (Noted::default(), party.addr);
        let tap = Tap { noted: Arc::clone(&noted), _quic: quic.clone() };
        party.addr = quic.local_addr().unwrap();
        party.certificate = dir.join(format!("tap-{}.crt", party.name));
        std::fs::write(&party.certificate, pem).unwrap();
        tokio::spawn(async move {
            while let Some(incoming) = quic.accept().await {
                let Ok(client) = incoming.await else { continue };
                let out = endpoint(([127, 0, 0, 1], 0).into(), None).unwrap();
                let dial = dial_config(real.clone(), None).unwrap();
                let Ok(party) = out.connect_with(dial, addr, "tacet").unwrap().await else { continue };
                tokio::spawn(connection(client, party, Arc::clone(&noted)));
            }
        });
        tap
    }

    /// The frames of requests since the last call, by stream and direction: which direction's frame came first is a matter of time.
    pub fn take(&self) -> Vec<Frame> {
        let mut all = std::mem::take(&mut *self.noted.lock().unwrap());
        let first = all.iter().map(|f| f.stream).min().unwrap_or(0);
        all.iter_mut().for_each(|f| f.stream -= first);
        all.sort_by_key(|f| (f.stream, !f.from_client));
        all
    }
}

async fn connection(client: Connection, party: Connection, noted: Noted) {
    admit(&client);
    let mut stream = 0;
    while let Ok((back, from)) = client.accept_bi().await {
        let Ok((to, answers)) = party.open_bi().await else { break };
        tokio::spawn(pass(from, to, stream, true, Arc::clone(&noted)));
        tokio::spawn(pass(answers, back, stream, false, Arc::clone(&noted)));
        stream += 1;
    }
    party.close(0u32.into(), b"");
}

/// Passes a stream on to its end; whoever leaves, the other side hears of it.
async fn pass(mut from: RecvStream, mut to: SendStream, stream: usize, from_client: bool, noted: Noted) {
    let mut buffer = Vec::new();
    loop {
        let chunk = tokio::select! {
            c = from.read_chunk(1 << 20, true) => c,
            _ = to.stopped() => return,
        };
        let Ok(Some(chunk)) = chunk else { break };
        buffer.extend_from_slice(&chunk.bytes);
        while let Some(len) = buffer.first_chunk().map(|l| 4 + u32::from_le_bytes(*l) as usize)
            && buffer.len() >= len
        {
            let frame: Vec<u8> = buffer.drain(..len).collect();
            let tokens = match Message::decode(&frame[4..]).unwrap() {
                Message::Request { tokens, .. } => Some(tokens),
                _ => None,
            };
            // A connection's first stream shows the client's token, whenever it may arrive.
            if stream > 0 {
                noted.lock().unwrap().push(Frame { stream, from_client, kind: frame[5], len, tokens });
            }
        }
        if to.write_all(&chunk.bytes).await.is_err() {
            return;
        }
    }
    let _ = to.finish();
}
