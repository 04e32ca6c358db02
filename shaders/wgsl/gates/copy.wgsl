// Words at another place, or one word over and over.

struct Gate {
    n: u32,
    // Where there is nothing to read, the word that is written.
    filled: u32,
    fill: u32,
    x: u32,
    y: u32,
}
@group(0) @binding(0) var<uniform> g: Gate;

fn run(e: u32) {
    if g.filled == 1u {
        store(g.y + e, word(g.fill));
    } else {
        store(g.y + e, load(g.x + e));
    }
}
