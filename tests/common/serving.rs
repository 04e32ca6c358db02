//! A `tacet serve` process and one request after another to it.
#![allow(dead_code)] // Each test file uses its own part.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

/// A process that ends with the test.
pub struct Serving {
    child: Child,
    at: String,
    token: String,
    /// What it said of itself.
    pub head: Value,
}

pub struct Reply {
    pub status: u16,
    pub body: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

impl Serving {
    /// On a port of its own; the arguments contain `--json`.
    pub fn start(args: &[&str], environment: &[(&str, &str)]) -> Serving {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tacet"));
        command.args(["serve", "--listen", "127.0.0.1:0"]).args(args).envs(environment.iter().copied());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let head: Value = serde_json::from_str(&line).expect("it says where it listens");
        let at = head["ollama"].as_str().unwrap().trim_start_matches("http://").to_string();
        Serving { child, at, token: head["token"].as_str().unwrap().to_string(), head }
    }

    pub fn get(&self, path: &str) -> Reply {
        self.send(&format!("GET {path}"), "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(&format!("POST {path}"), &body.to_string())
    }

    fn send(&self, request: &str, body: &str) -> Reply {
        let mut all = String::new();
        self.open(request, body).read_to_string(&mut all).unwrap();
        let (head, body) = all.split_once("\r\n\r\n").expect("a complete head");
        Reply { status: head[9..12].parse().unwrap(), body: body.to_string() }
    }

    /// A connection with one request sent.
    pub fn open(&self, request: &str, body: &str) -> TcpStream {
        let mut s = TcpStream::connect(&self.at).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        // Of HTTP 1.0, so that no body comes in chunks.
        let (at, token, n) = (&self.at, &self.token, body.len());
        let head = format!("host: {at}\r\nauthorization: Bearer {token}\r\ncontent-length: {n}\r\n");
        write!(s, "{request} HTTP/1.0\r\n{head}\r\n{body}").unwrap();
        s
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}
