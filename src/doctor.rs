//! `tacet doctor`: what this machine, this model and these parties look like, before anyone asks why something fails.

use std::net::UdpSocket;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::Args as ClapArgs;
use tacet_client::Client;
use tacet_party::config::hex;
use tacet_protocol::model::BertModel;
use tacet_protocol::plan::Planner;

use crate::fetch;

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

/// Receive buffer that the system grants of the 8 MB asked for.
fn udp_buffer() -> Result<usize> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let s = socket2::SockRef::from(&socket);
    s.set_recv_buffer_size(8 << 20)?;
    Ok(s.recv_buffer_size()?)
}

/// Prints findings; fails if a party does not answer a query.
pub async fn run(args: Args) -> Result<()> {
    let dir = fetch::model_dir(args.model.as_deref())?;
    let model = BertModel::load(&dir)?;
    let plan = Planner::new(&model)?.program(8)?.digest();
    let clock = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let buffer = udp_buffer()?;
    let query = match &args.parties {
        Some(file) => {
            let client = Client::builder().parties_file(file).model(&dir).connect().await?;
            // A whole session: certificates, token, digests and the links between the parties all have to agree.
            Some(client.embed(&["ping"]).await?.remove(0).stats.total_s)
        }
        None => None,
    };
    let (model_digest, plan_digest) = (hex(&model.digest()), hex(&plan));
    if args.json {
        let v = serde_json::json!({
            "version": env!("CARGO_PKG_VERSION"), "unix_time": clock, "udp_receive_buffer": buffer,
            "model": dir, "model_digest": model_digest, "plan_digest": plan_digest, "query_s": query,
        });
        println!("{}", serde_json::to_string(&v)?);
        return Ok(());
    }
    println!("tacet           {}", env!("CARGO_PKG_VERSION"));
    println!("clock           {clock} s since 1970 (UTC)");
    println!("UDP buffer      {} KB of the 8192 KB asked for", buffer / 1024);
    if buffer < 4 << 20 {
        println!("                under 4 MB: raise net.core.rmem_max and net.core.wmem_max for speed");
    }
    println!("model           {}", dir.display());
    println!("model digest    {model_digest}");
    println!("plan digest     {plan_digest}");
    match query {
        Some(s) => println!("parties         all three answered a query in {s:.3} s"),
        None => println!("parties         not asked: give --parties parties.toml"),
    }
    Ok(())
}
