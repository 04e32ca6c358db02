//! Idle conversations, so that the next turn of a chat does not evaluate the whole of it again.
//!
//! Requests do not say which conversation they continue; the tokens do. A conversation is taken only by a prompt that
//! repeats at least half of it: a shared system prompt alone must not take another chat's cache away.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::generate::Conversation;

/// Longest time that a cache is kept, whatever a request says.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

struct Idle {
    model: String,
    conversation: Conversation,
    until: Instant,
}

pub struct Pool {
    idle: Mutex<Vec<Idle>>,
    most: usize,
}

impl Pool {
    pub fn new(most: usize) -> Pool {
        Pool { idle: Mutex::default(), most }
    }

    fn live(&self) -> MutexGuard<'_, Vec<Idle>> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        idle.retain(|i| i.until > now);
        idle
    }

    /// Drops what is too old, which ends its sessions at the parties.
    pub fn expire(&self) {
        drop(self.live());
    }

    /// The conversation that shares the longest beginning with a prompt.
    pub fn take(&self, model: &str, prompt: &[u32]) -> Option<Conversation> {
        let mut idle = self.live();
        let fits = |i: &Idle| i.model == model && i.conversation.common(prompt) * 2 >= i.conversation.len().max(1);
        let all = idle.iter().enumerate().filter(|(_, i)| fits(i));
        let (at, _) = all.max_by_key(|(_, i)| i.conversation.common(prompt))?;
        Some(idle.swap_remove(at).conversation)
    }

    /// Keeps a conversation for a while; the one that would go first makes room.
    pub fn put(&self, model: &str, conversation: Conversation, keep: Duration) {
        if keep.is_zero() || self.most == 0 {
            return;
        }
        let mut idle = self.live();
        if idle.len() >= self.most
            && let Some((at, _)) = idle.iter().enumerate().min_by_key(|(_, i)| i.until)
        {
            idle.swap_remove(at);
        }
        idle.push(Idle { model: model.into(), conversation, until: Instant::now() + keep.min(LONGEST) });
    }

    /// Drops a model's conversations.
    pub fn unload(&self, model: &str) {
        self.live().retain(|i| i.model != model);
    }
}
