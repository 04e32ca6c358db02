//! Which program of a sequence comes next, at the party that deals it and at those that evaluate it.

use std::sync::Arc;

use tacet_protocol::Error;
use tacet_protocol::plan::DecoderPlanner;
use tacet_protocol::program::Program;
use tacet_protocol::query::LENGTHS;
use tacet_protocol::wire::Next;

/// The programs of a sequence.
#[derive(Clone)]
pub struct Course {
    planner: Arc<DecoderPlanner>,
    /// That of the prompt.
    prompt: Arc<Program>,
    /// Most rows of a program.
    most: usize,
}

impl Course {
    pub fn new(planner: Arc<DecoderPlanner>, prompt: Arc<Program>, most: usize) -> Course {
        Course { planner, prompt, most }
    }

    pub fn first(&self) -> Next {
        Next { number: 0, past: 0, rows: self.prompt.tokens() as u32 }
    }

    /// What follows `last` where nobody says otherwise; none where the sequence is as long as the model takes.
    pub fn step(&self, last: Next) -> Option<Next> {
        last.step().filter(|n| n.end() as usize <= self.planner.longest())
    }

    /// Whether a sequence of `held` positions can go on with `next`.
    ///
    /// # Errors
    /// Nothing that is kept, more than is there, rows that are neither one nor a padded length, too many rows.
    pub fn check(&self, next: Next, held: u32) -> Result<(), String> {
        let Next { past, rows, .. } = next;
        let (end, longest) = (next.end() as usize, self.planner.longest());
        if past == 0 || past > held {
            return Err(format!(
                "{past} of {held} positions cannot be kept: keep one or more, or begin another sequence"
            ));
        }
        if rows != 1 && !LENGTHS.contains(&(rows as usize)) {
            return Err(format!("{rows} rows are neither one nor a padded length"));
        }
        if rows as usize > self.most {
            return Err(format!("{rows} rows, but this party takes {} at once", self.most));
        }
        if end > longest {
            return Err(format!(
                "{rows} rows after {past} positions, but the model takes {longest}: begin another sequence"
            ));
        }
        Ok(())
    }

    /// Whether a dealer can send `next` after `last`: by itself, or because it was asked to and has not sent some in between.
    pub fn follows(&self, last: Option<Next>, next: Next) -> bool {
        match last {
            None => next == self.first(),
            Some(l) => next.number > l.number && self.check(next, l.end()).is_ok(),
        }
    }

    /// # Errors
    /// Those of planning.
    pub fn program(&self, next: Next) -> Result<Arc<Program>, Error> {
        if next == self.first() {
            return Ok(Arc::clone(&self.prompt));
        }
        self.planner.program(true, next.past as usize, next.rows as usize, false).map(Arc::new)
    }
}
