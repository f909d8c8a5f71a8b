//! Convolutions of the bundled teacher and of `google/ddpm-cifar10-32`, by each algorithm.
#![allow(missing_docs)]

use divan::Bencher;
use divan::counter::ItemsCount;
use understudy_models::kernels::{Algorithm, Convolution, Isa};

/// Channels in, channels out, side.
const SHAPES: [(usize, usize, usize); 9] = [
    (32, 32, 32),
    (96, 32, 32),
    (64, 64, 16),
    (160, 64, 16),
    (96, 96, 8),
    (128, 128, 32),
    (256, 256, 16),
    (256, 256, 8),
    (256, 256, 4),
];

fn main() {
    divan::main();
}

/// Items are the floating-point operations of a direct convolution.
#[divan::bench(args = SHAPES, consts = [1, 8])]
fn direct<const BATCH: usize>(bencher: Bencher, shape: (usize, usize, usize)) {
    convolve(bencher, Algorithm::Direct, shape, BATCH);
}

#[divan::bench(args = SHAPES, consts = [1, 8])]
fn f2<const BATCH: usize>(bencher: Bencher, shape: (usize, usize, usize)) {
    convolve(bencher, Algorithm::F2, shape, BATCH);
}

#[divan::bench(args = SHAPES, consts = [1, 8])]
fn f4<const BATCH: usize>(bencher: Bencher, shape: (usize, usize, usize)) {
    convolve(bencher, Algorithm::F4, shape, BATCH);
}

fn convolve(
    bencher: Bencher,
    algorithm: Algorithm,
    (from, to, side): (usize, usize, usize),
    batch: usize,
) {
    let numbers = |len: usize| -> Vec<f32> {
        (0..len).map(|i| ((i * 7919) % 1009) as f32 / 504.5 - 1.0).collect()
    };
    let (weights, bias) = (numbers(to * from * 9), numbers(to));
    let size = [from, side, side];
    let convolution = Convolution::new(Isa::detect(), algorithm, size, &weights, &bias);
    let x = numbers(batch * from * side * side);
    let mut y = vec![0.0; batch * to * side * side];
    bencher
        .counter(ItemsCount::new(18 * batch * from * to * side * side))
        .bench_local(|| convolution.forward(batch, &x, &mut y));
}
