//! Looking at each party by itself: is it there, is it the right one, and does it compute the same thing?

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use serde::Serialize;
use tacet_protocol::Role;
use tacet_protocol::program::Program;
use tacet_protocol::wire::{CONTROL_LIMIT, Message};
use tacet_transport::receive;
use tokio::time::{sleep, timeout};

use crate::target::Target;
use crate::{Client, ClientBuilder, ClientError, random};

/// How long a party may take for each step.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a party did, up to the first thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Verdict {
    /// Nobody answers at the address.
    Unreachable,
    /// Somebody answers, without the pinned certificate.
    WrongCertificate,
    /// The party does not take the token, the model or the plan, or has no room: its own words say.
    Refused,
    /// It answers something else than this protocol.
    Garbled,
    /// It knows the token and has the same model and plan.
    Agrees,
}

/// One party as seen from here.
#[derive(Clone, Debug, Serialize)]
pub struct Examined {
    /// Its name in `parties.toml`.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// Its address.
    pub addr: SocketAddr,
    /// How far it came.
    pub verdict: Verdict,
    /// Details, and what to do.
    pub detail: String,
    /// Round trip to it.
    pub rtt_s: Option<f64>,
    /// Packet size that the path carries, bytes of UDP payload.
    pub packet: Option<u16>,
}

impl ClientBuilder {
    /// Loads the model and looks at each party, whatever the others do. Each is asked for a session of which it never
    /// receives a share.
    ///
    /// # Errors
    /// Settings, files and the model; what is wrong with a party is in its [`Examined`].
    pub async fn examine(self) -> Result<Vec<Examined>, ClientError> {
        let client = self.load().await?;
        let p = client.program(8)?;
        Ok(join_all(client.targets.iter().map(|t| client.examine(t, &p))).await)
    }
}

impl Client {
    async fn examine(&self, t: &Target, p: &Program) -> Examined {
        let mut seen = Examined {
            name: t.party.name.clone(),
            role: t.party.role,
            addr: t.party.addr,
            verdict: Verdict::Unreachable,
            detail: String::new(),
            rtt_s: None,
            packet: None,
        };
        let c = match t.connection().await {
            Ok(c) => c,
            Err(ClientError::Unreachable { reason, .. }) if reason.contains("not the pinned one") => {
                seen.verdict = Verdict::WrongCertificate;
                seen.detail = format!(
                    "another certificate than {}: get the party's current one, and if it did not change, somebody else answers there",
                    t.party.certificate.display()
                );
                return seen;
            }
            Err(ClientError::Unreachable { reason, .. }) => {
                seen.detail = format!("{reason}: is it running, is the address right, does a firewall drop UDP?");
                return seen;
            }
            Err(e) => {
                seen.detail = e.to_string();
                return seen;
            }
        };
        (seen.verdict, seen.detail) = match timeout(PATIENCE, self.accepted(t, p)).await {
            Err(_) => (Verdict::Garbled, format!("no answer within {PATIENCE:?} though it shook hands")),
            Ok(Err(e)) => (Verdict::Garbled, e.to_string()),
            Ok(Ok(Message::Accept)) => (Verdict::Agrees, "token, model and plan agree".into()),
            Ok(Ok(Message::Failure { code, text })) => (Verdict::Refused, format!("code {code}: {text}")),
            Ok(Ok(m)) => (Verdict::Garbled, format!("unexpected {m:?}: is it of the same release?")),
        };
        // Larger packets are probed one by one, a round trip each.
        let mut packet = 0;
        for _ in 0..20 {
            sleep(Duration::from_millis(50)).await;
            let now = c.stats().path.current_mtu;
            if std::mem::replace(&mut packet, now) == now && now > 1452 {
                break;
            }
        }
        seen.packet = Some(packet);
        seen.rtt_s = Some(c.rtt().as_secs_f64());
        seen
    }

    /// The party's first word on a session without a share, which is then left.
    async fn accepted(&self, t: &Target, p: &Program) -> Result<Message, ClientError> {
        // Without an input it accepts or refuses, and finds nothing to compute on.
        let request = self.request(p, random()?);
        let (_c, _tx, mut rx) = t.request(request, None, PATIENCE).await.map_err(|r| r.error)?;
        receive(&mut rx, CONTROL_LIMIT).await.map_err(|e| t.failed(e.to_string()))
    }
}
