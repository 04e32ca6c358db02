use std::sync::Arc;

use tacet_protocol::gates::local::Truncate;
use tacet_protocol::gates::rescale::Rescale;

use super::*;

#[test]
fn truncations() {
    let Some(gpu) = gpu() else { return };
    for (k, shift, raise) in
        [(2, 1, false), (31, 1, true), (32, 5, true), (33, 32, false), (50, 13, true), (64, 63, true)]
    {
        let kind = Kind::Truncate(Truncate { k, shift, raise });
        check(&gpu, "truncate", kind, &[(131, k, false)], &[(131, k - shift, false)], k.into());
    }
}

#[test]
fn rescales() {
    let Some(gpu) = gpu() else { return };
    let mut next = noise(5);
    // All the widths that multipliers and shifts may have.
    for (k_in, shift, top) in
        [(2, 0, 1), (23, 9, 20), (40, 35, 28), (62, 64, 28), (62, 90, 55), (64, 100, 62), (33, 63, 60), (30, 65, 62)]
    {
        for k_out in [1, 17, 32, 33, 64] {
            let (cols, rows, first) = (5, 7, 2);
            let mult = (0..cols).map(|_| (next() as i64) >> (63 - top)).collect();
            let bias = (0..if k_out % 2 == 0 { cols } else { 0 }).map(|_| next() as i64 >> 20).collect();
            let g = Rescale { rows, stride: 9, first, mult: Arc::new(mult), shift, k_in, k_out, bias };
            let out = [(g.len(), k_out, false)];
            check(&gpu, &format!("{g:?}"), Kind::Rescale(g.clone()), &[(rows * 9, k_in, false)], &out, next());
        }
    }
}
