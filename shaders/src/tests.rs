//! The device's products are the processor's, bit for bit. Without an adapter (lavapipe will do) these say that they are
//! skipped.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tacet_protocol::gates::grid::Grid;
use tacet_protocol::gates::product::Side;
use tacet_protocol::gemm::Weights;

use super::*;

/// A device for every product; none, and the reason printed, where there is none.
pub(crate) fn gpu() -> Option<Gpu> {
    match Gpu::open(Choice::Any) {
        Ok(gpu) => {
            println!("on {} with {}", gpu.adapter(), gpu.adapter().driver);
            Some(gpu.for_all())
        }
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}

/// The ways to compute that a device may choose from: dot products, 64-bit integers, subgroups.
pub(crate) fn ways(gpu: &Gpu) -> Vec<[bool; 3]> {
    let about = gpu.adapter();
    let all = (0..8).map(|i| [i & 1 != 0, i & 2 != 0, i & 4 != 0]);
    all.filter(|[_, int64, subgroups]| (about.int64 || !int64) && (about.subgroups || !subgroups)).collect()
}

pub(crate) fn set(gpu: &Gpu, [dots, int64, subgroups]: [bool; 3]) {
    let state = &mut *gpu.state();
    let device = &mut state.device;
    device.dots = [dots; 2];
    device.int64 = int64;
    device.about.subgroups = subgroups;
    // What was laid out for other ways.
    state.layouts = Layouts::default();
}

pub(crate) fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

/// A layer with a digest of its own.
pub(crate) fn layer(out: usize, inp: usize, w: &[i16]) -> Arc<Linear> {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_le_bytes());
    Arc::new(Linear { weights: Some(Weights::new(out, inp, w)), bias: vec![0; out], macs: out * inp, digest })
}

/// Both kinds of weights of a shape, in all the ways, in several rings.
fn check_linear(gpu: &Gpu, x: &[u64], rows: usize, out: usize, inp: usize, w: &[i16]) {
    let layer = layer(out, inp, w);
    for bits in [1, 24, 32, 33, 50, 64] {
        let want = Cpu.linear(&layer, x, rows, bits).unwrap();
        for way in ways(gpu) {
            set(gpu, way);
            let got = gpu.linear(&layer, x, rows, bits).unwrap();
            assert!(got == want, "{rows} x {inp} -> {out}, {bits} bits, {way:?}");
        }
    }
}

#[test]
fn weights_times_shares_at_the_edges() {
    let Some(gpu) = gpu() else { return };
    let words = [0, 1, 0x7f, 0x80, 0x7fff, 0x8000, 0x8080_8080, 0x7f80_7f80, 0xffff_ffff, 1 << 63, u64::MAX];
    for weight in [i16::MIN, -129, -128, -1, 0, 1, 127, 128, 255, 32639, 32640, i16::MAX] {
        for word in words {
            check_linear(&gpu, &[word; 2 * 9], 2, 5, 9, &[weight; 5 * 9]);
        }
        check_linear(&gpu, &[u64::MAX; 70], 70, 1, 1, &[weight]);
    }
    // Rows on both sides of the two layouts and of a tile, odd sizes, inputs past a tile's depth.
    let mut next = noise(1);
    for (rows, out, inp) in [(1, 1, 1), (1, 67, 300), (7, 66, 33), (8, 63, 31), (33, 65, 17), (40, 130, 64)] {
        let x: Vec<u64> = (0..rows * inp).map(|_| next()).collect();
        for shift in [0, 8] {
            let w: Vec<i16> = (0..out * inp).map(|_| next() as i16 >> shift).collect();
            check_linear(&gpu, &x, rows, out, inp, &w);
        }
    }
}

/// Sums of one sign: the largest that 32 bits must hold, and more inputs than they can.
#[test]
fn deep_sums_stay_exact_in_wide_rings() {
    let Some(gpu) = gpu() else { return };
    for inp in [65_535, 65_536] {
        for word in [0x7f7f_7f7f_7f7f_7f7f, 0x8080_8080_8080_8080] {
            for weight in [-128, 127, 32639, i16::MIN] {
                check_linear(&gpu, &vec![word; inp], 1, 1, inp, &vec![weight; inp]);
            }
        }
    }
}

#[test]
fn weights_times_shares_of_any_shape() {
    let Some(gpu) = gpu() else { return };
    let shapes = (1usize..80, 1usize..140, 1usize..90, 0u32..16, any::<u64>());
    let mut runner = TestRunner::new(Config::with_cases(24));
    let check = |(rows, out, inp, shift, seed)| {
        let mut next = noise(seed);
        let x: Vec<u64> = (0..rows * inp).map(|_| next()).collect();
        let w: Vec<i16> = (0..out * inp).map(|_| next() as i16 >> shift).collect();
        check_linear(&gpu, &x, rows, out, inp, &w);
        Ok(())
    };
    runner.run(&shapes, check).unwrap();
}

fn check_product(gpu: &Gpu, g: &HeadProduct, next: &mut impl FnMut() -> u64) {
    let (queries, keys) = (g.grid.rows * g.heads * g.dim, g.grid.keys * g.kv_heads * g.dim);
    let first = if g.side == Side::Scores { queries } else { g.heads * g.grid.len() };
    let mut words = |n: usize| -> Vec<u64> {
        // As often as not all ones, the sign bit or zero.
        (0..n)
            .map(|_| if next() & 1 == 0 { next() } else { [u64::MAX, 1 << (g.k - 1), 0][next() as usize % 3] })
            .collect()
    };
    let (a, b, c, d) = (words(first), words(keys), words(first), words(keys));
    for pairs in [&[(&a[..], &b[..])][..], &[(&a, &b), (&c, &d)]] {
        let want = Cpu.product(g, pairs).unwrap();
        for way in ways(gpu) {
            set(gpu, way);
            assert!(gpu.product(g, pairs).unwrap() == want, "{g:?}, {} pairs, {way:?}", pairs.len());
        }
    }
}

#[test]
fn products_of_heads_of_any_shape() {
    let Some(gpu) = gpu() else { return };
    let side = prop_oneof![Just(Side::Scores), Just(Side::Attend)];
    let shapes =
        (1usize..60, 0usize..40, any::<bool>(), 1usize..4, 1usize..3, 1usize..40, 1u32..=64, side, any::<u64>());
    let mut runner = TestRunner::new(Config::with_cases(32));
    let check = |(rows, past, causal, kv_heads, share, dim, k, side, seed)| {
        let grid = if causal { Grid::causal(past, rows) } else { Grid::square(rows) };
        let g = HeadProduct { side, grid, heads: kv_heads * share, kv_heads, dim, k };
        check_product(&gpu, &g, &mut noise(seed));
        Ok(())
    };
    runner.run(&shapes, check).unwrap();
    // One row, as in a decoder's steps.
    for side in [Side::Scores, Side::Attend] {
        let g = HeadProduct { side, grid: Grid::causal(99, 1), heads: 4, kv_heads: 2, dim: 24, k: 45 };
        check_product(&gpu, &g, &mut noise(7));
    }
}

/// An adapter whose bindings are so small that everything goes in parts.
#[test]
fn operands_larger_than_a_binding_go_in_parts() {
    let Some(gpu) = gpu() else { return };
    gpu.state().device.room = 8 << 10;
    let mut next = noise(3);
    for (rows, out, inp) in [(40, 150, 100), (3, 150, 250), (1, 9000, 3)] {
        let x: Vec<u64> = (0..rows * inp).map(|_| next()).collect();
        let w: Vec<i16> = (0..out * inp).map(|_| next() as i16).collect();
        check_linear(&gpu, &x, rows, out, inp, &w);
        assert!(gpu.state().layers.parts().iter().all(|parts| *parts > 1), "{rows} x {inp} -> {out}");
    }
    for side in [Side::Scores, Side::Attend] {
        let g = HeadProduct { side, grid: Grid::causal(4, 30), heads: 6, kv_heads: 3, dim: 8, k: 60 };
        check_product(&gpu, &g, &mut next);
    }
}

/// A device beside a processor, and the lines that it said.
pub(crate) fn telling(gpu: Gpu) -> (Gpu, Arc<Mutex<Vec<String>>>) {
    let lines = Arc::<Mutex<Vec<String>>>::default();
    let to = Arc::clone(&lines);
    (gpu.beside(Arc::new(Cpu), move |line| lock(&to).push(line.into())), lines)
}

pub(crate) fn full(gpu: &Gpu) -> GpuError {
    GpuError::OutOfMemory { adapter: gpu.adapter().to_string() }
}

/// Of which not even the smallest part fits a binding.
#[test]
fn operands_without_parts_that_fit_are_the_processor_s() {
    let Some((gpu, lines)) = gpu().map(telling) else { return };
    gpu.state().device.room = 8 << 10;
    let g = HeadProduct { side: Side::Scores, grid: Grid::square(2), heads: 1, kv_heads: 1, dim: 1 << 12, k: 64 };
    check_product(&gpu, &g, &mut noise(4));
    check_linear(&gpu, &vec![u64::MAX; 1 << 20], 1, 1, 1 << 20, &vec![1; 1 << 20]);
    assert_eq!((gpu.products(), gpu.state().layers.parts()), (0, vec![0]));
    let lines = lock(&lines);
    assert!(lines.len() == 2 && lines[0].contains("does not fit") && lines[1].contains("do not fit"), "{lines:?}");
}

/// A device with memory for some layers: the processor computes the others, to the same words.
#[test]
fn weights_without_room_are_the_processor_s() {
    let Some((gpu, lines)) = gpu().map(telling) else { return };
    gpu.state().layers.most = 2 * 64 * 64;
    let mut next = noise(5);
    let x: Vec<u64> = (0..9 * 64).map(|_| next()).collect();
    let layers: Vec<_> = (0..5).map(|_| layer(64, 64, &[next() as i16 >> 9; 64 * 64])).collect();
    for l in layers.iter().chain(&layers) {
        assert_eq!(gpu.linear(l, &x, 9, 50).unwrap(), Cpu.linear(l, &x, 9, 50).unwrap());
    }
    let mut parts = gpu.state().layers.parts();
    parts.sort();
    assert_eq!((parts, gpu.products()), (vec![0, 0, 0, 1, 1], 4));
    assert_eq!(lock(&lines).len(), 1, "{lines:?}");
    assert!(lock(&lines)[0].starts_with("the weights of 1 of 3 layers (0.0 of 0.0 MB) do not fit"), "{lines:?}");
    // What makes room is used again.
    drop(layers);
    let l = layer(64, 64, &[-3; 64 * 64]);
    assert_eq!(gpu.linear(&l, &x, 9, 50).unwrap(), Cpu.linear(&l, &x, 9, 50).unwrap());
    assert_eq!((gpu.state().layers.parts(), gpu.products()), (vec![1], 5));
}

/// The device says so itself, of weights and of operands.
#[test]
fn a_device_without_memory_leaves_products_to_the_processor() {
    let Some((gpu, lines)) = gpu().map(telling) else { return };
    let [first, second] = [1, 2].map(|by| layer(3, 2, &[by, 2, 3, 4, 5, 6]));
    let linear =
        |l: &Arc<Linear>| assert_eq!(gpu.linear(l, &[1, 9], 1, 32).unwrap(), Cpu.linear(l, &[1, 9], 1, 32).unwrap());
    linear(&first);
    gpu.state().device.say(full(&gpu));
    // Here none stay, which are less than products may need.
    [&second, &first, &second].into_iter().for_each(linear);
    assert_eq!((gpu.state().layers.parts(), gpu.products()), (vec![0, 0], 1));
    assert_eq!(gpu.state().layers.most, 0);
    let g = HeadProduct { side: Side::Scores, grid: Grid::square(9), heads: 2, kv_heads: 1, dim: 5, k: 40 };
    for _ in 0..3 {
        gpu.state().device.say(full(&gpu));
        check_product(&gpu, &g, &mut noise(6));
    }
    assert!(gpu.products() > 1 && !gpu.lost(), "what passes is over");
    let lines = lock(&lines);
    assert!(lines.len() == 2 && lines[0].contains("2 of 2") && lines[1].contains("out of memory"), "{lines:?}");
}

/// Weights of layers that no program has any more make room for others.
#[test]
fn weights_stay_while_their_layer_does() {
    let Some(gpu) = gpu() else { return };
    let first = layer(3, 2, &[1, 2, 3, 4, 5, 6]);
    let second = layer(3, 2, &[6, 5, 4, 3, 2, 1]);
    for l in [&first, &second, &first] {
        assert_eq!(gpu.linear(l, &[1, 1], 1, 32).unwrap(), Cpu.linear(l, &[1, 1], 1, 32).unwrap());
    }
    assert_eq!(gpu.state().layers.parts().len(), 2);
    drop(first);
    let third = layer(1, 1, &[1]);
    assert_eq!(gpu.linear(&third, &[9], 1, 32).unwrap(), [9]);
    assert_eq!(gpu.state().layers.parts().len(), 2);
    drop(second);
}

/// What held words is zero after a product, in every buffer.
#[test]
fn nothing_of_a_product_stays_on_the_device() {
    let Some(gpu) = gpu() else { return };
    let l = layer(40, 40, &[77; 1600]);
    let g = HeadProduct { side: Side::Scores, grid: Grid::square(9), heads: 2, kv_heads: 1, dim: 5, k: 40 };
    for _ in 0..2 {
        gpu.linear(&l, &[u64::MAX; 400], 10, 64).unwrap();
        gpu.product(&g, &[(&[u64::MAX; 90], &[u64::MAX; 45])]).unwrap();
        let bytes = gpu.state().device.left_over().unwrap();
        let left = bytes.iter().filter(|b| **b != 0).count();
        assert_eq!(left, 0, "of {} bytes", bytes.len());
    }
}

#[test]
fn a_lost_device_is_an_error_and_stays_one() {
    let Some(gpu) = gpu() else { return };
    let l = layer(3, 2, &[1, 2, 3, 4, 5, 6]);
    gpu.linear(&l, &[1, 1], 1, 32).unwrap();
    assert!(!gpu.lost());
    gpu.close();
    for _ in 0..2 {
        let e = gpu.linear(&l, &[1, 1], 1, 32).unwrap_err();
        assert!(matches!(&e, Error::Device(t) if t.contains("was lost")), "{e}");
    }
    assert!(gpu.lost());
}

/// A refusal fails one product, not the next.
#[test]
fn a_refusal_is_an_error_and_passes() {
    let Some(gpu) = gpu() else { return };
    let l = layer(3, 2, &[1, 2, 3, 4, 5, 6]);
    gpu.state().device.ask_too_much();
    let e = gpu.linear(&l, &[1, 1], 1, 32).unwrap_err();
    assert!(matches!(&e, Error::Device(t) if t.contains("refused")), "{e}");
    assert_eq!(gpu.linear(&l, &[1, 1], 1, 32).unwrap(), [3, 7, 11]);
    assert!(!gpu.lost());
}

/// The choice between kernels is made by time, and any choice is right.
#[test]
fn kernels_are_chosen_by_measuring() {
    let Some(gpu) = gpu() else { return };
    gpu.state().device.prefer([8, 4, 4]).unwrap();
    let dots = gpu.state().device.dots;
    println!("dot products of bytes: {dots:?}, faster than the processor: {}", gpu.pays(&Cpu).unwrap());
    println!("gates are: {}", gpu.gates_pay(&Cpu).unwrap());
    let l = layer(3, 2, &[1, -2, 300, 4, 5, 6]);
    for bits in [32, 64] {
        let x = [3, u64::MAX];
        assert_eq!(gpu.linear(&l, &x, 1, bits).unwrap(), Cpu.linear(&l, &x, 1, bits).unwrap());
    }
}

#[test]
fn hardware_is_not_software() {
    let all = adapters();
    println!("{} adapters", all.len());
    match Gpu::open(Choice::Hardware) {
        Ok(gpu) => assert!(gpu.adapter().hardware && gpu.adapter().kind != "software"),
        Err(GpuError::NoAdapter(text)) => {
            assert!(all.iter().all(|a| !a.hardware));
            assert!(all.iter().all(|a| text.contains(&a.name)), "{text}");
        }
        Err(e) => panic!("{e}"),
    }
}
