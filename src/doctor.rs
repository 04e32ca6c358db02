//! `tacet doctor`: what this machine, this model and these parties look like, before anyone asks why something fails.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use clap::Args as ClapArgs;
use serde::Serialize;
use tacet_client::{Client, Examined, Verdict};
use tacet_party::config::hex;
use tacet_party::plans::Plans;
use tacet_protocol::plan::Keep;
use tacet_protocol::wire;

use crate::{fetch, planning};

pub const EXAMPLES: &str = "\
Examples:
  tacet doctor                              # this machine and the model
  tacet doctor --parties parties.toml       # and each of the three parties, then a query through all of them

Exit status 1 if something that is needed fails.";

/// UDP buffers under this cost speed.
const BUFFER: usize = 4 << 20;

#[derive(ClapArgs)]
pub struct Args {
    /// Model directory or name
    #[arg(long)]
    model: Option<String>,
    /// Also ask the parties of this file
    #[arg(long)]
    parties: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// As it should be.
    Ok,
    /// Works, but not at its best.
    Warning,
    /// Needed, and wrong.
    Failed,
    /// For the reader.
    Note,
}

#[derive(Serialize)]
struct Finding {
    name: String,
    status: Status,
    detail: String,
}

#[derive(Serialize)]
struct Report {
    ok: bool,
    findings: Vec<Finding>,
    /// As a client sees them; empty if none were asked.
    parties: Vec<Examined>,
    /// Seconds of one query through all three.
    query_s: Option<f64>,
}

impl Report {
    fn add(&mut self, name: impl Into<String>, status: Status, detail: impl Into<String>) {
        self.ok &= status != Status::Failed;
        self.findings.push(Finding { name: name.into(), status, detail: detail.into() });
    }
}

/// Prints findings.
///
/// # Errors
/// If anything that is needed fails.
pub async fn run(args: Args) -> Result<()> {
    let mut r = Report { ok: true, findings: Vec::new(), parties: Vec::new(), query_s: None };
    machine(&mut r);
    let dir = model(&mut r, args.model.as_deref()).await;
    match (&args.parties, dir) {
        (Some(file), Some(dir)) => parties(&mut r, file, &dir).await,
        (Some(_), None) => r.add("parties", Status::Failed, "not asked, since the model cannot be read"),
        (None, _) => r.add("parties", Status::Note, "not asked: give --parties parties.toml"),
    }
    if args.json {
        crate::print(&format!("{}\n", serde_json::to_string(&r)?))?;
    } else {
        for f in &r.findings {
            let mark = match f.status {
                Status::Ok => "ok",
                Status::Warning => "WARNING",
                Status::Failed => "FAILED",
                Status::Note => "",
            };
            println!("{:<14}{mark:<9}{}", f.name, f.detail);
        }
    }
    match r.findings.iter().filter(|f| f.status == Status::Failed).count() {
        0 => Ok(()),
        n => bail!("{n} of {} checks failed", r.findings.len()),
    }
}

fn machine(r: &mut Report) {
    let version = format!("{}, protocol {}", env!("CARGO_PKG_VERSION"), wire::VERSION);
    r.add("tacet", Status::Note, version);
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(t) => r.add("clock", Status::Note, format!("{} (this machine's; nothing depends on it)", utc(t.as_secs()))),
        Err(_) => r.add("clock", Status::Warning, "before 1970: set it, logs will mislead"),
    }
    match udp_buffer() {
        Ok(n) if n >= BUFFER => r.add("UDP buffer", Status::Ok, format!("{} KB", n / 1024)),
        Ok(n) => r.add(
            "UDP buffer",
            Status::Warning,
            format!("{} KB: for speed set net.core.rmem_max and net.core.wmem_max to {BUFFER} or more", n / 1024),
        ),
        Err(e) => r.add("UDP buffer", Status::Failed, format!("no UDP socket: {e}")),
    }
    gpus(r, &adapters(Path::new("/sys/class/drm"), Path::new("/proc/driver/nvidia/gpus")));
}

/// A line for each adapter that a party may compute on, and what `--backend auto` takes.
#[cfg(feature = "gpu")]
fn gpus(r: &mut Report, listed: &[String]) {
    let found = tacet_shaders::adapters();
    for a in &found {
        let yes = |b: bool| if b { "yes" } else { "no" };
        let binding = a.binding >> 20;
        let detail = format!(
            "{a}; driver {}; bindings of {binding} MiB; 64-bit integers {}, subgroups {}",
            a.driver,
            yes(a.int64),
            yes(a.subgroups)
        );
        r.add("GPU", Status::Note, detail);
    }
    // The kernel lists servers' video controllers too, so that this is no warning.
    if !listed.is_empty() && !found.iter().any(|a| a.hardware) {
        let listed = listed.join(", ");
        r.add("GPU", Status::Note, format!("{listed}: listed by the kernel, but no Vulkan driver offers it"));
    }
    let Some(best) = found.iter().find(|a| a.hardware) else {
        return r.add("backend", Status::Note, "auto takes the CPU");
    };
    let pays = || -> Result<bool, tacet_protocol::Error> {
        let gpu = tacet_shaders::Gpu::open(tacet_shaders::Choice::Hardware)?;
        gpu.pays(&tacet_protocol::gemm::Threads::new(0)?)
    };
    match pays() {
        Ok(true) => r.add("backend", Status::Note, format!("auto takes {}", best.name)),
        Ok(false) => r.add("backend", Status::Note, format!("auto takes the CPU, which is faster than {}", best.name)),
        Err(e) => r.add("backend", Status::Warning, format!("auto takes the CPU: {e}")),
    }
}

#[cfg(not(feature = "gpu"))]
fn gpus(r: &mut Report, listed: &[String]) {
    let seen = if listed.is_empty() { "none seen".to_string() } else { listed.join(", ") };
    r.add("GPU", Status::Note, format!("{seen}; this build computes on the CPU"));
}

/// Graphics adapters that the kernel lists: NVIDIA's by their driver's name, others by driver, vendor and device numbers.
fn adapters(drm: &Path, nvidia: &Path) -> Vec<String> {
    let entries = |dir: &Path| {
        let mut all: Vec<PathBuf> = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
        all.sort();
        all
    };
    let mut seen = Vec::new();
    for gpu in entries(nvidia) {
        let text = std::fs::read_to_string(gpu.join("information")).unwrap_or_default();
        let model = text.lines().find_map(|l| l.strip_prefix("Model:")).unwrap_or("NVIDIA adapter");
        seen.push(model.trim().to_string());
    }
    for card in entries(drm) {
        let name = card.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let number = name.strip_prefix("card").filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
        let read = |file: &str| std::fs::read_to_string(card.join("device").join(file)).ok();
        let (Some(_), Some(vendor)) = (number, read("vendor")) else { continue };
        if vendor.trim() != "0x10de" || seen.is_empty() {
            let device = read("device").unwrap_or_default();
            seen.push(format!("{name} ({}:{})", vendor.trim(), device.trim()));
        }
    }
    seen
}

/// Receive buffer that the system grants of the 8 MB asked for; Linux counts its own bookkeeping, half of it.
fn udp_buffer() -> std::io::Result<usize> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let s = socket2::SockRef::from(&socket);
    s.set_recv_buffer_size(8 << 20)?;
    let n = s.recv_buffer_size()?;
    Ok(if cfg!(target_os = "linux") { n / 2 } else { n })
}

/// `2026-11-24 21:05:03 UTC` from seconds since 1970, by the civil calendar's 400-year cycle.
fn utc(s: u64) -> String {
    let (days, time) = (s / 86_400 + 719_468, s % 86_400);
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = cycle * 400 + year + next;
    format!("{year:04}-{month:02}-{date:02} {:02}:{:02}:{:02} UTC", time / 3600, time / 60 % 60, time % 60)
}

async fn model(r: &mut Report, name: Option<&str>) -> Option<PathBuf> {
    let load = async || -> Result<(PathBuf, String, String)> {
        let dir = fetch::model_dir(name).await?;
        let (plans, model) = Plans::load(&dir, Keep::Shapes, planning::shelf().as_ref(), &planning::told)?;
        let plan = plans.first(8)?.digest();
        Ok((dir, hex(&model), hex(&plan)))
    };
    match load().await {
        Ok((dir, model, plan)) => {
            r.add("model", Status::Ok, dir.display().to_string());
            r.add("model digest", Status::Note, model);
            r.add("plan digest", Status::Note, plan);
            Some(dir)
        }
        Err(e) => {
            r.add("model", Status::Failed, format!("{e:#}"));
            None
        }
    }
}

async fn parties(r: &mut Report, file: &Path, model: &Path) {
    let builder = || Client::builder().parties_file(file).model(model);
    let seen = match builder().examine().await {
        Ok(seen) => seen,
        Err(e) => return r.add("parties", Status::Failed, e.to_string()),
    };
    for p in &seen {
        let status = if p.verdict == Verdict::Agrees { Status::Ok } else { Status::Failed };
        let mut detail = format!("{:?} at {}: {}", p.role, p.addr, p.detail);
        if let (Some(rtt), Some(packet)) = (p.rtt_s, p.packet) {
            detail += &format!("; round trip {:.2} ms, packets of {packet} bytes", rtt * 1e3);
        }
        r.add(format!("party {}", p.name), status, detail);
    }
    r.parties = seen;
    if !r.parties.iter().all(|p| p.verdict == Verdict::Agrees) {
        return r.add("query", Status::Note, "not tried, since a party does not take part");
    }
    let query = async { builder().connect().await?.embed(&["ping"]).await };
    match query.await {
        Ok(e) => {
            r.query_s = Some(e[0].stats.total_s);
            r.add("query", Status::Ok, format!("all three answered in {:.3} s", e[0].stats.total_s));
        }
        Err(e) => r.add("query", Status::Failed, e.cause().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_named_from_what_the_kernel_lists() {
        let dir = std::env::temp_dir().join(format!("tacet-doctor-{}", std::process::id()));
        let (drm, nvidia) = (dir.join("drm"), dir.join("nvidia"));
        for (file, text) in [
            ("drm/card0/device/vendor", "0x1002\n"),
            ("drm/card0/device/device", "0x744c\n"),
            ("drm/card1/device/vendor", "0x10de\n"),
            ("drm/card0-DP-1/status", "connected\n"),
            ("nvidia/0000:01:00.0/information", "Model: \t\t NVIDIA H100\nIRQ: 5\n"),
        ] {
            std::fs::create_dir_all(dir.join(file).parent().unwrap()).unwrap();
            std::fs::write(dir.join(file), text).unwrap();
        }
        assert_eq!(adapters(&drm, &nvidia), ["NVIDIA H100", "card0 (0x1002:0x744c)"]);
        assert!(adapters(&dir.join("no"), &dir.join("such")).is_empty());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn dates() {
        for (s, want) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_164_800 + 86_399, "2024-02-29 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(s), want);
        }
    }
}
