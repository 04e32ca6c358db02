//! The layout of attention scores: which keys each row reads. Scores are stored head by head, row by row, without the
//! keys that a row does not read.

/// The scores of one head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Rows, the last of `keys` positions.
    pub rows: usize,
    /// Positions that have a key.
    pub keys: usize,
    /// A row reads the keys up to its own position only.
    pub causal: bool,
}

impl Grid {
    /// Every one of `tokens` rows reads every key.
    pub fn square(tokens: usize) -> Grid {
        Grid { rows: tokens, keys: tokens, causal: false }
    }

    /// `rows` new positions after `past` ones.
    pub fn causal(past: usize, rows: usize) -> Grid {
        Grid { rows, keys: past + rows, causal: true }
    }

    /// Keys that row `i` reads.
    pub fn row_len(&self, i: usize) -> usize {
        if self.causal { self.keys - self.rows + i + 1 } else { self.keys }
    }

    /// Scores of one head.
    pub fn len(&self) -> usize {
        (0..self.rows).map(|i| self.row_len(i)).sum()
    }

    /// Whether there are no scores.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Every row with its first score's place in a head.
    pub fn starts(&self) -> impl Iterator<Item = (usize, usize)> {
        let (grid, mut at) = (*self, 0);
        (0..grid.rows).map(move |i| {
            at += grid.row_len(i);
            (i, at - grid.row_len(i))
        })
    }

    /// The rows of one head, each with its number.
    pub fn split<'a, T>(&self, mut head: &'a [T]) -> impl Iterator<Item = (usize, &'a [T])> {
        let grid = *self;
        (0..grid.rows).map(move |i| {
            let (row, rest) = head.split_at(grid.row_len(i));
            head = rest;
            (i, row)
        })
    }

    /// The row of each score of one head.
    pub fn row_of(&self) -> Vec<usize> {
        (0..self.rows).flat_map(|i| std::iter::repeat_n(i, self.row_len(i))).collect()
    }

    /// One head with zeros for the keys that are not read, `rows x keys`.
    pub fn dense<T: Copy + Default>(&self, head: &[T]) -> Vec<T> {
        let mut out = Vec::with_capacity(self.rows * self.keys);
        for (i, row) in self.split(head) {
            out.extend_from_slice(row);
            out.resize((i + 1) * self.keys, T::default());
        }
        out
    }

    /// Inverse of [`Self::dense`]: appends one head without the keys that are not read.
    pub fn pack<T: Copy>(&self, dense: &[T], out: &mut Vec<T>) {
        for (i, row) in dense.chunks_exact(self.keys).enumerate() {
            out.extend_from_slice(&row[..self.row_len(i)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causal_rows_grow_by_one() {
        let g = Grid::causal(2, 3);
        assert_eq!((g.len(), g.row_of()), (3 + 4 + 5, vec![0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]));
        assert_eq!(g.starts().collect::<Vec<_>>(), [(0, 0), (1, 3), (2, 7)]);
        let head: Vec<u32> = (1..=12).collect();
        let dense = g.dense(&head);
        assert_eq!(dense, [1, 2, 3, 0, 0, 4, 5, 6, 7, 0, 8, 9, 10, 11, 12]);
        let mut back = vec![];
        g.pack(&dense, &mut back);
        assert_eq!(back, head);
        assert_eq!(Grid::square(3).dense(&head[..9]), head[..9]);
    }
}
