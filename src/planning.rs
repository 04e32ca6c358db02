//! Where plans of large models are kept, and what is said while one is made.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tacet_client::{Client, ClientBuilder};
use tacet_protocol::lock;
use tacet_protocol::plan::{Progress, Shelf};

use crate::fetch;

/// How long nothing is said at a time.
const EVERY: Duration = Duration::from_secs(5);

/// The folder in the user's cache; none without a home.
pub fn dir() -> Option<PathBuf> {
    fetch::cache().ok().map(|dir| dir.join("plans"))
}

/// The same as plans are looked for there.
pub fn shelf() -> Option<Shelf> {
    dir().map(Shelf::new)
}

/// A client that keeps plans there, and says how they come about.
pub fn client() -> ClientBuilder {
    let client = Client::builder().planning(told);
    match dir() {
        Some(dir) => client.plans(dir),
        None => client,
    }
}

/// Says on standard error how far planning is, where it takes long enough to wonder.
pub fn told(p: Progress) {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    match p {
        Progress::Planned(done, all) => {
            let mut last = lock(&LAST);
            if last.get_or_insert_with(Instant::now).elapsed() > EVERY {
                *last = Some(Instant::now());
                eprintln!("planned {done} of {all} blocks");
            }
        }
        Progress::Found(path) => eprintln!("the plan is that in {}", path.display()),
        Progress::Kept(path) => eprintln!("the plan is kept in {}", path.display()),
        Progress::NotKept(dir, e) => eprintln!("the plan cannot be kept in {}: {e}", dir.display()),
    }
}
