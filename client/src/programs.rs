//! Programs by length: to spell one out takes milliseconds for a small model and a good part of a second for a large one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tacet_protocol::Error;
use tacet_protocol::program::Program;

/// Most programs that are kept.
const MOST: usize = 64;

/// Those that were asked for.
#[derive(Default)]
pub(crate) struct Programs(Mutex<HashMap<usize, Arc<Program>>>);

impl Programs {
    /// The one for so many rows; made if it is not there, beside others that ask.
    pub fn get(&self, rows: usize, make: impl FnOnce() -> Result<Program, Error>) -> Result<Arc<Program>, Error> {
        let cache = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(p) = cache().get(&rows) {
            return Ok(Arc::clone(p));
        }
        let p = Arc::new(make()?);
        let mut cache = cache();
        if cache.len() >= MOST {
            cache.clear();
        }
        cache.insert(rows, Arc::clone(&p));
        Ok(p)
    }
}
