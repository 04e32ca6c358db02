//! What a device leaves to the processor, for the log of whoever computes with it.

use std::collections::HashSet;

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum About {
    /// Weights without room.
    Weights,
    /// Products without room.
    Products,
    /// Evaluations without room.
    Evaluations,
    /// Kernels of gates that the driver refuses.
    Gates,
}

/// Takes lines, the first about each.
pub(crate) struct Told {
    to: Box<dyn Fn(&str) + Send + Sync>,
    said: HashSet<About>,
}

impl Told {
    pub(crate) fn new(to: impl Fn(&str) + Send + Sync + 'static) -> Told {
        Told { to: Box::new(to), said: HashSet::new() }
    }

    pub(crate) fn once(&mut self, about: About, line: impl FnOnce() -> String) {
        if self.said.insert(about) {
            (self.to)(&line());
        }
    }
}
