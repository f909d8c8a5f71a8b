//! Every kernel against plain loops in f64, over awkward shapes, with every instruction set that this
//! processor has; and its bits against those of other batches and thread counts.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::twin::{self, Plain};
use super::*;

/// Numbers from −1 to 1.
pub(super) fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Channels, height, width.
pub(super) type Size = [usize; 3];

pub(super) fn take(layout: &mut Layout, [channels, height, width]: Size) -> Image {
    let segments = [channels, 0];
    Image { buffer: layout.take(height * width * padded(channels)), height, width, segments }
}

/// A program whose inputs are maps of these sizes, with what `build` makes of them in between.
fn program(
    isa: Isa,
    inputs: &[Size],
    output: Size,
    build: impl FnOnce(&[Image], Image, &mut Layout) -> Vec<Box<dyn Operation>>,
) -> Program {
    let mut layout = Layout::default();
    let images: Vec<Image> = inputs.iter().map(|&size| take(&mut layout, size)).collect();
    let target = take(&mut layout, output);
    let mut operations: Vec<Box<dyn Operation>> = Vec::new();
    for (input, &output) in images.iter().enumerate() {
        operations.push(Box::new(Import { input, output, factor: 1.0, shift: 0.0 }));
    }
    operations.extend(build(&images, target, &mut layout));
    operations.push(Box::new(Export { input: target, divisor: None }));
    let lens = inputs.iter().map(|size| size.iter().product()).collect();
    Program::new(isa, operations, &layout, lens, output.iter().product())
}

/// Runs `make(isa)` for all instruction sets and compares it with `expected` of each sample, and its
/// bits with those for one sample alone and on other numbers of threads.
fn check(
    batch: usize,
    inputs: &[Size],
    output: Size,
    make: impl Fn(Isa) -> Program,
    expected: impl Fn(&[Plain]) -> Plain,
    limit: f64,
) {
    let data: Vec<Vec<f32>> = inputs
        .iter()
        .enumerate()
        .map(|(i, size)| numbers(batch * size.iter().product::<usize>(), 7 + i as u32))
        .collect();
    let sample = |s: usize| -> Vec<&[f32]> {
        data.iter()
            .zip(inputs)
            .map(|(data, size)| {
                let len: usize = size.iter().product();
                &data[s * len..][..len]
            })
            .collect()
    };
    let len: usize = output.iter().product();
    for isa in Isa::available() {
        let program = make(isa);
        let all: Vec<&[f32]> = data.iter().map(|data| &data[..]).collect();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut found = vec![f32::NAN; batch * len];
            pool.install(|| program.run(batch, &all, &mut found));
            found
        };
        let found = run(1);
        for threads in [2, 5] {
            assert!(bits(&run(threads)) == bits(&found), "{isa}: {threads} threads");
        }
        for s in 0..batch {
            let inputs_of: Vec<&[f32]> = sample(s);
            let mut alone = vec![f32::NAN; len];
            program.run(1, &inputs_of, &mut alone);
            let together = &found[s * len..][..len];
            assert!(bits(&alone) == bits(together), "{isa}: sample {s} of {batch}");
            let plain = inputs_of.iter().zip(inputs).map(|(data, &size)| Plain::new(size, data));
            let expected = expected(&plain.collect::<Vec<_>>());
            let error = twin::relative_error(together, &expected.values);
            if s == 0 {
                println!("{isa}: {inputs:?} → {output:?}: {error:.1e}");
            }
            assert!(error <= limit, "{isa}: sample {s} of {batch}: error {error:e}");
        }
    }
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn direct_convolution_is_that_of_plain_loops(
        batch in 1usize..10,
        (height, width) in (1usize..10, 1usize..10),
        (first, second) in (1usize..40, 0usize..20),
        outputs in 1usize..70,
        kind in 0usize..6,
        factor in prop::sample::select(vec![1.0f32, 0.5]),
    ) {
        let [side, stride, padding, double] =
            [[1, 1, 0, 0], [3, 1, 1, 0], [3, 2, 1, 0], [3, 2, 0, 0], [3, 1, 1, 1], [1, 1, 0, 1]][kind];
        let taps = Taps { side, stride, padding, doubled: double == 1 };
        let (height, width) = if stride == 2 { (2 * height, 2 * width) } else { (height, width) };
        let size = |side: usize| (side << double) / stride;
        let output = [outputs, size(height), size(width)];
        let mut inputs = vec![[first, height, width]];
        if second > 0 {
            inputs.push([second, height, width]);
        }
        let channels = first + second;
        let weights = numbers(outputs * channels * side * side, 1);
        let bias = numbers(outputs, 2);
        // A vector for each sample, and a residual.
        let count = inputs.len();
        inputs.push([outputs, 1, 1]);
        inputs.push(output);
        check(batch, &inputs, output, |isa| {
            program(isa, &inputs, output, |images, target, _| {
                let mut finish = Finish::new(&bias, isa.panel());
                finish.offset = Some((images[count].buffer, 0));
                finish.residual = Some(images[count + 1]);
                finish.factor = factor;
                vec![Box::new(Direct::new(isa, &images[..count], target, taps, &weights, finish))]
            })
        }, |plain| {
            let joined = Plain::joined(&plain[..count]);
            let y = joined.convolve(output, &weights, &bias, side, stride, padding, double == 1);
            y.finished(&plain[count], &plain[count + 1], factor)
        }, 1e-6);
    }

    #[test]
    fn winograd_is_the_direct_convolution(
        batch in 1usize..10,
        (height, width) in (1usize..14, 1usize..14),
        (channels, outputs) in (1usize..40, 1usize..70),
        four: bool,
        doubled: bool,
    ) {
        let double = usize::from(doubled);
        let output = [outputs, height << double, width << double];
        let inputs = [[channels, height, width], [outputs, 1, 1], output];
        let weights = numbers(outputs * channels * 9, 1);
        let bias = numbers(outputs, 2);
        let variant = if four { Variant::F4 } else { Variant::F2 };
        check(batch, &inputs, output, |isa| {
            program(isa, &inputs, output, |images, target, _| {
                let mut finish = Finish::new(&bias, isa.panel());
                finish.offset = Some((images[1].buffer, 0));
                finish.residual = Some(images[2]);
                let source = images[0];
                vec![Box::new(Winograd::new(isa, variant, source, target, doubled, &weights, finish))]
            })
        }, |plain| {
            let y = plain[0].convolve(output, &weights, &bias, 3, 1, 1, doubled);
            y.finished(&plain[1], &plain[2], 1.0)
        }, 5e-6);
    }

    #[test]
    fn norm_and_activation_are_those_of_plain_loops(
        batch in 1usize..6,
        (height, width) in (1usize..13, 1usize..13),
        (groups, of_first, of_second) in (1usize..6, 1usize..8, 0usize..8),
        function in prop::sample::select(vec![
            Function::Identity, Function::Silu, Function::Mish, Function::Gelu, Function::Relu,
        ]),
        modulated: bool,
    ) {
        let parts = [groups * of_first, of_second];
        // The second part makes the whole a multiple of the groups only together with the first.
        let parts = [parts[0] + (groups - parts[1] % groups) % groups, parts[1]];
        let channels = parts[0] + parts[1];
        let mut inputs = vec![[parts[0], height, width]];
        if parts[1] > 0 {
            inputs.push([parts[1], height, width]);
        }
        let count = inputs.len();
        inputs.push([2 * channels, 1, 1]);
        let output = [channels, height, width];
        let (weight, bias) = (numbers(channels, 3), numbers(channels, 4));
        check(batch, &inputs, output, |isa| {
            program(isa, &inputs, output, |images, target, layout| {
                let images = images.to_vec();
                let mut operations: Vec<Box<dyn Operation>> = Vec::new();
                let mut sources = Vec::new();
                for &input in &images[..count] {
                    let output = layout.take(Measure::len(&input));
                    operations.push(Box::new(Measure { input, output }));
                    sources.push((input, output));
                }
                let segments = [parts[0], parts[1]];
                let len = height * width * (padded(parts[0]) + padded(parts[1]));
                let joined = Image { buffer: layout.take(len), height, width, segments };
                let map = layout.take(2 * joined.stride());
                let modulation = modulated.then_some((images[count].buffer, 0));
                operations.push(Box::new(Settle {
                    sources, target: joined, groups, eps: 1e-5,
                    weight: Values::Own(weight.clone()), bias: Values::Own(bias.clone()), modulation,
                    output: map, moments: None,
                }));
                operations.push(Box::new(Apply::new(&images[..count], joined, map, function)));
                // Back to one segment, by a product with the identity.
                let identity: Vec<f32> =
                    (0..channels * channels).map(|i| f32::from(u8::from(i / channels == i % channels))).collect();
                let finish = Finish::new(&vec![0.0; channels], isa.panel());
                let point = Direct::new(isa, &[joined], target, Taps::POINT, &identity, finish);
                operations.push(Box::new(point));
                operations
            })
        }, |plain| {
            let modulation = modulated.then_some(&plain[count]);
            let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            let joined = Plain::joined(&plain[..count]);
            joined.normalised(groups, 1e-5, &wide(&weight), &wide(&bias), modulation, function)
        }, 2e-6);
    }

    #[test]
    fn attention_is_that_of_plain_loops(
        batch in 1usize..5,
        (height, width) in (1usize..8, 1usize..8),
        (heads, of_head) in (1usize..4, 1usize..40),
    ) {
        let channels = heads * of_head;
        let (inputs, output) = ([[3 * channels, height, width]], [channels, height, width]);
        check(batch, &inputs, output, |isa| {
            program(isa, &inputs, output, |images, target, layout| {
                let (input, panel, rows) = (images[0], isa.panel(), isa.rows());
                let keys = layout.take(PackKeys::len(&input, panel));
                vec![
                    Box::new(PackKeys { input, heads, panel, output: keys }),
                    Box::new(Attend { input, keys, heads, panel, rows, output: target }),
                ]
            })
        }, |plain| plain[0].attended(heads), 2e-6);
    }

    #[test]
    fn sizes_change_as_in_plain_loops(
        batch in 1usize..4, channels in 1usize..40, (height, width) in (1usize..12, 1usize..12),
    ) {
        let (small, large) = ([channels, height, width], [channels, 2 * height, 2 * width]);
        check(batch, &[small], large, |isa| program(isa, &[small], large, |images, output, _| {
            vec![Box::new(Upsample { input: images[0], output })]
        }), |plain| plain[0].doubled(), 0.0);
        check(batch, &[large], small, |isa| program(isa, &[large], small, |images, output, _| {
            vec![Box::new(Downsample { input: images[0], output })]
        }), |plain| plain[0].halved(), 1e-7);
    }
}

/// The shapes of the two networks that must be fast, each within what a layer may err.
#[test]
fn layers_of_real_networks_err_by_less_than_1e_5() {
    use Variant::{F2, F4};
    for (variant, from, to, side) in [
        (F4, 32, 32, 32),
        (F4, 96, 32, 32),
        (F4, 160, 64, 16),
        (F4, 192, 96, 8),
        (F4, 128, 128, 32),
        (F4, 256, 256, 16),
        (F4, 512, 256, 16),
        (F2, 512, 256, 8),
    ] {
        let (input, output) = ([from, side, side], [to, side, side]);
        let weights = numbers(to * from * 9, 1);
        let bias = numbers(to, 2);
        check(
            1,
            &[input],
            output,
            |isa| {
                program(isa, &[input], output, |images, target, _| {
                    let finish = Finish::new(&bias, isa.panel());
                    vec![Box::new(Winograd::new(
                        isa, variant, images[0], target, false, &weights, finish,
                    ))]
                })
            },
            |plain| plain[0].convolve(output, &weights, &bias, 3, 1, 1, false),
            1e-5,
        );
    }
}
