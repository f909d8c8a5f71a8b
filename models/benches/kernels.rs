//! Every kernel over the layers of the bundled teacher and of `google/ddpm-cifar10-32`, in f32 and, where
//! the processor multiplies it, bf16, with one and eight samples; and those of 8 bits, which quantise their map first.
//!
//! Items are the floating-point operations of a direct implementation.
#![allow(missing_docs)]

use divan::Bencher;
use divan::counter::ItemsCount;
use understudy_models::kernels::{Isa, KernelBench, Layer};

/// Channels in, channels out, side.
type Shape = (usize, usize, usize);

const CONVOLUTIONS: [Shape; 10] = [
    (32, 32, 32),
    (96, 32, 32),
    (64, 64, 16),
    (160, 64, 16),
    (96, 96, 8),
    (128, 128, 32),
    (384, 128, 32),
    (256, 256, 16),
    (256, 256, 8),
    (256, 256, 4),
];
const STRIDED: [Shape; 4] = [(32, 32, 32), (64, 64, 16), (128, 128, 32), (256, 256, 16)];
const POINTWISE: [Shape; 5] =
    [(96, 32, 32), (64, 192, 16), (384, 128, 32), (256, 768, 16), (512, 4992, 1)];
const MAPS: [Shape; 5] = [(32, 32, 32), (96, 96, 8), (128, 128, 32), (384, 384, 32), (256, 256, 8)];
/// Queries, keys and values together, one of them, side.
const ATTENTIONS: [Shape; 3] = [(192, 64, 16), (768, 256, 16), (768, 256, 4)];

fn main() {
    divan::main();
}

macro_rules! benches {
    ($($name:ident: $layer:ident over $shapes:ident;)*) => {
        $(
            #[divan::bench(args = cases(&$shapes, Layer::$layer))]
            fn $name(bencher: Bencher, case: &Case) {
                case.run(bencher, Layer::$layer);
            }
        )*
    };
}

benches! {
    direct: Direct over CONVOLUTIONS;
    f2: F2 over CONVOLUTIONS;
    f4: F4 over CONVOLUTIONS;
    strided: Strided over STRIDED;
    pointwise: Pointwise over POINTWISE;
    int8: Int8 over CONVOLUTIONS;
    int8_pointwise: Int8Pointwise over POINTWISE;
    norm: Norm over MAPS;
    upsample: Upsample over MAPS;
    attention: Attention over ATTENTIONS;
}

struct Case {
    bf16: bool,
    batch: usize,
    shape: Shape,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (from, to, side) = self.shape;
        let numbers = if self.bf16 { "bf16" } else { "f32" };
        write!(f, "{numbers} {}×{from}→{to} at {side}", self.batch)
    }
}

/// All element types and batches of some shapes; what is quantised comes as f32 alone.
fn cases(shapes: &[Shape], layer: Layer) -> Vec<Case> {
    let bf16 = Isa::detect().multiplies_bf16();
    let bf16 = bf16 && !matches!(layer, Layer::Int8 | Layer::Int8Pointwise);
    let types = if bf16 { &[false, true][..] } else { &[false] };
    let mut cases = Vec::new();
    for &shape in shapes {
        for batch in [1, 8] {
            cases.extend(types.iter().map(|&bf16| Case { bf16, batch, shape }));
        }
    }
    cases
}

impl Case {
    fn run(&self, bencher: Bencher, layer: Layer) {
        let (from, to, side) = self.shape;
        let alone = KernelBench::new(Isa::detect(), self.bf16, layer, [from, side], to);
        let flop = self.batch as f64 * alone.flop();
        bencher.counter(ItemsCount::new(flop as u64)).bench_local(|| alone.run(self.batch));
    }
}
