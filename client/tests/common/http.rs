//! A client of one request a connection, over raw TCP: it sends exactly what a test says.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.text()))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().filter_map(|l| l.split_once(": ")).find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|h| h.1)
    }

    /// Data of the events of a stream; comments are dropped.
    pub fn events(&self) -> Vec<String> {
        let blocks = self.text().split("\n\n").filter(|b| !b.is_empty() && !b.starts_with(':'));
        blocks.map(|b| b.strip_prefix("data: ").unwrap().to_string()).collect()
    }

    pub fn lines(&self) -> Vec<Value> {
        self.text().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    }
}

pub async fn get(to: SocketAddr, path: &str) -> Reply {
    send(to, &format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"), b"").await
}

pub async fn post(to: SocketAddr, path: &str, body: &Value) -> Reply {
    post_raw(to, path, "", body.to_string().as_bytes()).await
}

/// With more header lines, each ending in CRLF, and any bytes for a body.
pub async fn post_raw(to: SocketAddr, path: &str, headers: &str, body: &[u8]) -> Reply {
    let host = if headers.to_lowercase().contains("host:") { "" } else { "host: localhost\r\n" };
    let n = body.len();
    let head = format!("POST {path} HTTP/1.1\r\n{host}connection: close\r\ncontent-length: {n}\r\n{headers}\r\n");
    send(to, &head, body).await
}

pub async fn send(to: SocketAddr, head: &str, body: &[u8]) -> Reply {
    let mut s = TcpStream::connect(to).await.unwrap();
    s.write_all(head.as_bytes()).await.unwrap();
    let _ = s.write_all(body).await;
    let mut all = Vec::new();
    let _ = s.read_to_end(&mut all).await;
    let end = all.windows(4).position(|w| w == b"\r\n\r\n").expect("a complete head") + 4;
    let head = String::from_utf8(all[..end].to_vec()).unwrap();
    let mut reply = Reply { status: head[9..12].parse().unwrap(), head, body: all.split_off(end) };
    if reply.header("transfer-encoding") == Some("chunked") {
        reply.body = dechunk(&reply.body);
    }
    reply
}

fn dechunk(mut rest: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let line = rest.windows(2).position(|w| w == b"\r\n").expect("a chunk's length");
        let n = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
        if n == 0 {
            return out;
        }
        out.extend_from_slice(&rest[line + 2..line + 2 + n]);
        rest = &rest[line + 2 + n + 2..];
    }
}
