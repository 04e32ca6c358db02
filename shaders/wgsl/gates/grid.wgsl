// Rows of attention scores: all of `keys`, or where `causal` is not zero as many in the first and one more in each after it.

fn row_start(causal: u32, keys: u32, row: u32) -> u32 {
    if causal == 0u {
        return row * keys;
    }
    return row * causal + row * (row - min(row, 1u)) / 2u;
}

fn row_len(causal: u32, keys: u32, row: u32) -> u32 {
    return select(keys, causal + row, causal > 0u);
}

// The row that a head's score is in.
fn row_of(causal: u32, keys: u32, rows: u32, score: u32) -> u32 {
    if causal == 0u {
        return score / keys;
    }
    var low = 0u;
    var high = rows;
    while high - low > 1u {
        let middle = (low + high) / 2u;
        if row_start(causal, keys, middle) <= score {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}
