//! A server with the Hugging Face hub's paths, as far as fetching a public model goes.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sha2::{Digest, Sha256};

/// The revision of every repository.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Contents of files by their names.
pub type Files = BTreeMap<String, Vec<u8>>;

/// A running server; its threads end with the test's process.
pub struct Hub {
    addr: SocketAddr,
    /// First lines of the requests so far.
    pub asked: Arc<Mutex<Vec<String>>>,
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

impl Hub {
    /// Repositories with their files; `.safetensors` are announced with their digest and lie elsewhere. The weights of one called `damaged` are not what is announced, those of `short` end
    /// early, and those of `slow` take hours.
    pub fn start(repositories: &[(&str, Files)]) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let all: BTreeMap<String, Files> = repositories.iter().map(|(n, f)| (n.to_string(), f.clone())).collect();
        let (all, asked) = (Arc::new(all), Arc::<Mutex<Vec<String>>>::default());
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for s in listener.incoming() {
                let (all, log) = (Arc::clone(&all), Arc::clone(&log));
                std::thread::spawn(move || answer(s.unwrap(), &all, &log));
            }
        });
        Hub { addr, asked }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }
}

/// One request a connection.
fn answer(mut s: TcpStream, all: &BTreeMap<String, Files>, log: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(s.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(line) = lines.next() else { return };
    lines.take_while(|l| !l.is_empty()).for_each(drop);
    log.lock().unwrap().push(line.clone());
    let words: Vec<&str> = line.split(' ').collect();
    let (head_only, path) = (words[0] == "HEAD", words[1]);
    let parts: Vec<&str> = path.trim_start_matches('/').splitn(5, '/').collect();
    let mut send = |status: &str, headers: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n{headers}\r\n");
        let _ = s.write_all(head.as_bytes());
        let _ = s.write_all(if head_only { b"" } else { body });
    };
    let (repository, file, elsewhere) = match parts[..] {
        ["elsewhere", owner, model, file] => (format!("{owner}/{model}"), file, true),
        [owner, model, "resolve", "main" | COMMIT, file] => (format!("{owner}/{model}"), file, false),
        _ => return send("404 Not Found", "content-length: 0\r\n", b""),
    };
    let Some(files) = all.get(&repository) else { return send("401 Unauthorized", "content-length: 0\r\n", b"") };
    let Some(bytes) = files.get(file) else { return send("404 Not Found", "content-length: 0\r\n", b"") };
    let (n, large) = (bytes.len(), file.ends_with(".safetensors"));
    match (elsewhere, large) {
        (false, false) => {
            let headers =
                format!("content-length: {n}\r\netag: \"{}\"\r\nx-repo-commit: {COMMIT}\r\n", &sha256(bytes)[..40]);
            send("200 OK", &headers, bytes);
        }
        (false, true) => {
            let headers = format!(
                "content-length: 0\r\nlocation: /elsewhere/{repository}/{file}\r\nx-linked-etag: \"{}\"\r\n\
                 x-linked-size: {n}\r\nx-repo-commit: {COMMIT}\r\n",
                sha256(bytes)
            );
            send("302 Found", &headers, b"");
        }
        (true, _) => {
            let headers = format!("content-length: {n}\r\n");
            match repository.rsplit('/').next() {
                Some("damaged") => send("200 OK", &headers, &vec![7; n]),
                Some("short") => send("200 OK", &headers, &bytes[..n - 1]),
                Some("slow") => {
                    send("200 OK", &headers, &bytes[..n / 2]);
                    // Until the other end is gone.
                    while s.write_all(b"-").is_ok() {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
                _ => send("200 OK", &headers, bytes),
            }
        }
    }
}
