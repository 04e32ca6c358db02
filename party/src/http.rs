//! `/healthz`, `/readyz` and `/metrics` over plain HTTP, for orchestrators: counts only, never content, and no bytes from
//! which the exact length of a text or an answer could be told.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use tacet_protocol::Role;

use crate::{Party, lock};

/// Connections at once; more wait to be accepted, at most five seconds a connection before them.
const CONNECTIONS: usize = 32;

/// Serves one short request a connection.
pub async fn serve(party: Arc<Party>, listener: TcpListener) {
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&free).acquire_owned().await else { return };
        let Ok((s, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let party = Arc::clone(&party);
        tokio::spawn(async move {
            let _ = tokio::time::timeout(Duration::from_secs(5), answer(&party, s)).await;
            drop(slot);
        });
    }
}

async fn answer(party: &Party, mut s: TcpStream) -> std::io::Result<()> {
    let mut buf = [0; 1024];
    let n = s.read(&mut buf).await?;
    let path = std::str::from_utf8(&buf[..n]).unwrap_or("").split(' ').nth(1).unwrap_or("");
    let (status, body) = match path {
        "/healthz" => ("200 OK", "ok\n".to_string()),
        "/readyz" if party.ready() => ("200 OK", "ready\n".to_string()),
        "/readyz" => ("503 Service Unavailable", reasons(party)),
        "/metrics" => ("200 OK", metrics(party)),
        _ => ("404 Not Found", "/healthz /readyz /metrics\n".to_string()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    s.write_all(head.as_bytes()).await?;
    s.write_all(body.as_bytes()).await
}

/// Why the party is not ready: a line for each peer that is not linked.
fn reasons(party: &Party) -> String {
    let mut out = String::from("not ready\n");
    if party.draining.load(Ordering::Relaxed) {
        out.push_str("stopping\n");
    }
    let trouble = lock(&party.trouble);
    for p in party.config.peer.iter().filter(|p| party.link(p.role).is_none()) {
        // A peer that dials and is refused by TLS cannot be told from a stranger.
        let unseen = "it has not connected: check that it runs and that each side pins the other's certificate";
        let _ = writeln!(out, "{}: {}", p.name, trouble.get(&p.name).map_or(unseen, String::as_str));
    }
    out
}

fn metrics(party: &Party) -> String {
    let c = &party.counters;
    let mut out = String::new();
    for (name, v) in [
        ("tacet_sessions_accepted_total", &c.accepted),
        ("tacet_sessions_refused_total", &c.refused),
        ("tacet_sessions_completed_total", &c.completed),
        ("tacet_sessions_failed_total", &c.failed),
        ("tacet_opened_bytes_total", &c.opened),
        ("tacet_dealt_bytes_total", &c.dealt),
        ("tacet_dealt_fresh_total", &c.dealt_fresh),
        ("tacet_bundles_used_total", &c.bundles_used),
        ("tacet_bundles_dropped_total", &c.bundles_dropped),
    ] {
        let _ = writeln!(out, "# TYPE {name} counter\n{name} {}", v.load(Ordering::Relaxed));
    }
    let name = party.compute.name().replace(['"', '\\', '\n'], "'");
    let _ = writeln!(out, "# TYPE tacet_backend gauge\ntacet_backend{{name=\"{name}\"}} 1");
    let [products, evaluations] = party.compute.on_adapter();
    let _ = writeln!(out, "# TYPE tacet_gpu_products_total counter\ntacet_gpu_products_total {products}");
    let _ = writeln!(out, "# TYPE tacet_gpu_evaluations_total counter\ntacet_gpu_evaluations_total {evaluations}");
    let f = if party.config.role == Role::Dealer { party.stock.figures() } else { party.pool.figures() };
    let _ = writeln!(
        out,
        "# TYPE tacet_bundles gauge\ntacet_bundles{{state=\"ready\"}} {}\ntacet_bundles{{state=\"dealing\"}} {}\n\
         # TYPE tacet_bundle_bytes gauge\ntacet_bundle_bytes {}\n\
         # TYPE tacet_spooled_bundles gauge\ntacet_spooled_bundles {}\n\
         # TYPE tacet_spooled_bytes gauge\ntacet_spooled_bytes {}",
        f.ready, f.dealing, f.bytes, f.spooled.0, f.spooled.1
    );
    let running = party.config.limits.sessions - party.permits.available_permits();
    let _ = writeln!(out, "# TYPE tacet_sessions gauge\ntacet_sessions {running}");
    out
}
