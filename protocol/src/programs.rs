//! Programs by length: to spell one out takes milliseconds for a small model and a good part of a second for a large one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Error;
use crate::program::Program;

/// Most programs that are kept.
const MOST: usize = 64;

/// Those that were asked for.
#[derive(Default)]
pub struct Programs(Mutex<HashMap<usize, Arc<Program>>>);

impl Programs {
    fn lock(&self) -> MutexGuard<'_, HashMap<usize, Arc<Program>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one for so many rows, if it was made.
    pub fn made(&self, rows: usize) -> Option<Arc<Program>> {
        self.lock().get(&rows).map(Arc::clone)
    }

    /// The one for so many rows; made if it is not there, beside others that ask.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get(&self, rows: usize, make: impl FnOnce() -> Result<Program, Error>) -> Result<Arc<Program>, Error> {
        if let Some(p) = self.made(rows) {
            return Ok(p);
        }
        let p = Arc::new(make()?);
        let mut cache = self.lock();
        if cache.len() >= MOST {
            cache.clear();
        }
        cache.insert(rows, Arc::clone(&p));
        Ok(p)
    }
}
