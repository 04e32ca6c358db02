//! Where values lie: an arena laid out once for a program, in which the place of a value that is read no more serves others.

/// Places of words in an arena, first fit.
#[derive(Default)]
pub(super) struct Arena {
    /// Start and length of what is free below the end, in order and apart.
    free: Vec<(usize, usize)>,
    end: usize,
}

impl Arena {
    /// A place for so many words.
    pub(super) fn take(&mut self, len: usize) -> usize {
        if let Some(i) = self.free.iter().position(|(_, free)| *free >= len) {
            let (start, free) = self.free[i];
            self.free[i] = (start + len, free - len);
            self.free.retain(|(_, free)| *free > 0);
            return start;
        }
        // What is free at the end grows.
        let start = match self.free.last() {
            Some((start, free)) if start + free == self.end => self.free.pop().map_or(self.end, |(start, _)| start),
            _ => self.end,
        };
        self.end = start + len;
        start
    }

    /// Gives a place back.
    pub(super) fn give(&mut self, start: usize, len: usize) {
        if len == 0 {
            return;
        }
        let i = self.free.partition_point(|(at, _)| *at < start);
        self.free.insert(i, (start, len));
        let mut joined: Vec<(usize, usize)> = Vec::with_capacity(self.free.len());
        for &(start, len) in &self.free {
            match joined.last_mut() {
                Some((at, free)) if *at + *free == start => *free += len,
                _ => joined.push((start, len)),
            }
        }
        self.free = joined;
    }

    /// Words of the whole arena.
    pub(super) fn len(&self) -> usize {
        self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_serve_again_and_never_overlap() {
        let mut arena = Arena::default();
        let mut held: Vec<(usize, usize)> = Vec::new();
        let mut state = 1u64;
        for _ in 0..2000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            if state >> 63 == 0 || held.len() < 3 {
                let len = (state >> 40) as usize % 50;
                let at = arena.take(len);
                assert!(held.iter().all(|(a, n)| at + len <= *a || a + n <= at || len == 0 || *n == 0));
                assert!(at + len <= arena.len());
                held.push((at, len));
            } else {
                let (at, len) = held.swap_remove((state >> 33) as usize % held.len());
                arena.give(at, len);
            }
        }
        held.drain(..).for_each(|(at, len)| arena.give(at, len));
        assert_eq!(arena.free, [(0, arena.len())]);
        let (all, first) = (arena.len(), arena.take(10));
        assert_eq!((first, arena.len()), (0, all));
    }
}
