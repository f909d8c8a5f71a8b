//! Every kernel against plain loops in f64, over awkward shapes, with every instruction set that this
//! processor has; and its bits against those of other batches and thread counts.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use proptest::prelude::*;

use super::reference::{self, Plain};
use super::*;

const BOTH: [ElementType; 2] = [ElementType::F32, ElementType::Bf16];

/// ElementType from −1 to 1.
pub(super) fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// The nearest numbers of the type.
fn rounded(numbers: ElementType, values: Vec<f32>) -> Vec<f32> {
    match numbers {
        ElementType::F32 => values,
        ElementType::Bf16 => values.into_iter().map(|x| bf16::widen(bf16::narrow(x))).collect(),
    }
}

/// Channels, height, width.
pub(super) type Size = [usize; 3];

pub(super) fn take(
    layout: &mut Layout,
    numbers: ElementType,
    [channels, height, width]: Size,
) -> Image {
    let segments = [channels, 0];
    let buffer = layout.take(height * width * numbers.words(padded(channels)));
    Image { buffer, element: numbers, height, width, segments }
}

type Operations = Vec<Box<dyn Operation>>;

/// What makes an operation of maps and the one it writes.
type Make<'a> = &'a dyn Fn(&[Image], Image) -> Box<dyn Operation>;

/// A product of every pixel with the identity.
fn identity(isa: Isa, source: Image, target: Image) -> Box<dyn Operation> {
    let channels = source.channels();
    let one = |i| f32::from(u8::from(i / channels == i % channels));
    let weights: Vec<f32> = (0..channels * channels).map(one).collect();
    let finish = Finish::new(&vec![0.0; channels], isa.panel());
    Box::new(Direct::new(isa, &[source], target, Taps::POINT, &weights, finish))
}

/// The image as one of `numbers`.
fn of(
    numbers: ElementType,
    isa: Isa,
    image: Image,
    layout: &mut Layout,
    operations: &mut Operations,
) -> Image {
    if numbers == image.element {
        return image;
    }
    let copy = take(layout, numbers, [image.channels(), image.height, image.width]);
    operations.push(identity(isa, image, copy));
    copy
}

/// A program whose inputs are maps of these sizes, with what `build` makes of them in between.
fn program(
    isa: Isa,
    inputs: &[Size],
    output: Size,
    build: impl FnOnce(&[Image], Image, &mut Layout) -> Vec<Box<dyn Operation>>,
) -> Program {
    let mut layout = Layout::default();
    let images: Vec<Image> =
        inputs.iter().map(|&size| take(&mut layout, ElementType::F32, size)).collect();
    let target = take(&mut layout, ElementType::F32, output);
    let mut operations: Vec<Box<dyn Operation>> = Vec::new();
    for (input, &output) in images.iter().enumerate() {
        operations.push(Box::new(Import::whole(input, output)));
    }
    operations.extend(build(&images, target, &mut layout));
    operations.push(Box::new(Export::whole(target)));
    let lens = inputs.iter().map(|size| size.iter().product()).collect();
    Program::new(isa, operations, &layout, lens, output.iter().product())
}

/// Runs `make(isa)` for all instruction sets that have `numbers`, in which inputs are given, and compares
/// it with `expected` of each sample, and its bits with those for one sample alone and on other numbers
/// of threads.
fn check(
    numbers: ElementType,
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
        .map(|(i, size)| (7 + i as u32, batch * size.iter().product::<usize>()))
        .map(|(seed, len)| rounded(numbers, values(len, seed)))
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
    let mut isas = Isa::available();
    // The scalar reference, and where it is an instruction.
    isas.retain(|&isa| {
        numbers == ElementType::F32 || isa == Isa::Portable || isa.multiplies_bf16()
    });
    for isa in isas {
        let program = make(isa);
        let all: Vec<&[f32]> = data.iter().map(|data| &data[..]).collect();
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut found = vec![f32::NAN; batch * len];
            pool.install(|| program.run(batch, &all, &mut found)).unwrap();
            found
        };
        let found = run(1);
        for threads in [2, 5] {
            assert!(bits(&run(threads)) == bits(&found), "{isa}: {threads} threads");
        }
        for s in 0..batch {
            let inputs_of: Vec<&[f32]> = sample(s);
            let mut alone = vec![f32::NAN; len];
            program.run(1, &inputs_of, &mut alone).unwrap();
            let together = &found[s * len..][..len];
            assert!(bits(&alone) == bits(together), "{isa}: sample {s} of {batch}");
            let plain = inputs_of.iter().zip(inputs).map(|(data, &size)| Plain::new(size, data));
            let expected = expected(&plain.collect::<Vec<_>>());
            let error = reference::relative_error(together, &expected.values);
            if s == 0 {
                println!("{isa} {numbers:?}: {inputs:?} → {output:?}: {error:.1e}");
            }
            assert!(error <= limit, "{isa}: sample {s} of {batch}: error {error:e}");
        }
    }
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Adds an attention.
fn attention(
    isa: Isa,
    [queries, keys, values]: [Channels; 3],
    output: Image,
    (heads, causal): (usize, bool),
    layout: &mut Layout,
    operations: &mut Vec<Box<dyn Operation>>,
) {
    let (panel, rows) = (isa.panel(), isa.rows());
    let packed = layout.take(PackKeys::len(&keys, panel));
    operations.push(Box::new(PackKeys { keys, heads, panel, output: packed }));
    let pairs = (values.image.element == ElementType::Bf16).then(|| {
        let output = layout.take(PackValues::len(&values));
        operations.push(Box::new(PackValues { values, output }));
        output
    });
    let keys = packed;
    operations.push(Box::new(Attend {
        queries,
        keys,
        values,
        pairs,
        heads,
        panel,
        rows,
        causal,
        count: None,
        output,
    }));
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
        numbers in prop::sample::select(&BOTH[..]),
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
        let weights = rounded(numbers, values(outputs * channels * side * side, 1));
        let bias = values(outputs, 2);
        // A vector for each sample, and a residual.
        let count = inputs.len();
        inputs.push([outputs, 1, 1]);
        inputs.push(output);
        check(numbers, batch, &inputs, output, |isa| {
            program(isa, &inputs, output, |images, target, layout| {
                let mut operations = Vec::new();
                let mut of = |image| of(numbers, isa, image, layout, &mut operations);
                let sources: Vec<Image> = images[..count].iter().map(|&image| of(image)).collect();
                let mut finish = Finish::new(&bias, isa.panel());
                finish.offset = Some((images[count].buffer, 0));
                finish.residual = Some(of(images[count + 1]));
                finish.factor = factor;
                let direct = Direct::new(isa, &sources, target, taps, &weights, finish);
                operations.push(Box::new(direct));
                operations
            })
        }, |plain| {
            let joined = Plain::joined(&plain[..count]);
            let y = joined.convolve(output, &weights, &bias, side, stride, padding, double == 1);
            y.finished(&plain[count], &plain[count + 1], factor)
        }, 1e-6);
    }

    #[test]
    fn quantized_convolution_is_that_of_whole_numbers_to_the_bit(
        batch in 1usize..10,
        (height, width) in (1usize..10, 1usize..10),
        (channels, outputs) in (1usize..40, 1usize..70),
        kind in 0usize..6,
        factor in prop::sample::select(vec![1.0f32, 0.5]),
    ) {
        let [side, stride, padding, double] =
            [[1, 1, 0, 0], [3, 1, 1, 0], [3, 2, 1, 0], [3, 2, 0, 0], [3, 1, 1, 1], [1, 1, 0, 1]][kind];
        let taps = Taps { side, stride, padding, doubled: double == 1 };
        let (height, width) = if stride == 2 { (2 * height, 2 * width) } else { (height, width) };
        let size = |side: usize| (side << double) / stride;
        let output = [outputs, size(height), size(width)];
        // The time, a vector for each sample, and a residual.
        let inputs = [[channels, height, width], [1, 1, 1], [outputs, 1, 1], output];
        let codes: Vec<i8> =
            values(outputs * channels * side * side, 1).iter().map(|x| (127.0 * x) as i8).collect();
        let scales: Vec<f32> = values(outputs, 3).iter().map(|x| (x.abs() + 0.1) / 127.0).collect();
        let bias = values(outputs, 2);
        // Too narrow for some numbers, and another for each half of the times.
        let buckets = vec![(0.007f32, 128u8), (0.0091, 77)];
        let grid = Grid { time: 1, starts: [0.0].into(), buckets: buckets.clone() };
        let weights = QuantizedWeights { codes: &codes, scales: &scales };
        check(ElementType::F32, batch, &inputs, output, |isa| {
            program(isa, &inputs, output, |images, target, layout| {
                let mut finish = Finish::new(&bias, isa.panel());
                finish.offset = Some((images[2].buffer, 0));
                finish.residual = Some(images[3]);
                finish.factor = factor;
                let (source, grid) = (images[0], Arc::new(grid.clone()));
                let packed = Quantized::pack(isa, [&source, &target], taps, &weights, &grid);
                let packed = packed.map(Arc::new);
                let buffer = layout.take(Quantize::len(&source));
                let from = (source, buffer);
                vec![
                    Box::new(Quantize::new(source, buffer, grid.clone())),
                    Box::new(Quantized::new(isa, from, target, taps, packed, grid, finish)),
                ]
            })
        }, |plain| {
            let (scale, zero) = buckets[usize::from(plain[1].values[0] >= 0.0)];
            let code = |x: f64| {
                let x = (x as f32 * (1.0 / scale) + f32::from(zero)).clamp(0.0, 255.0);
                f64::from(x.round_ties_even()) - f64::from(zero)
            };
            let map = Plain { size: plain[0].size, values: plain[0].values.iter().copied().map(code).collect() };
            let weights: Vec<f32> = codes.iter().map(|&code| f32::from(code)).collect();
            // In f64 these whole numbers are exact, too.
            let none = vec![0.0; outputs];
            let sums = map.convolve(output, &weights, &none, side, stride, padding, double == 1);
            Plain::from_fn(output, |c, y, x| {
                let number = |map: &Plain, y, x| map.at(c, y, x) as f32;
                let sum = number(&sums, y, x) * (scale * scales[c]) + bias[c];
                f64::from((sum + number(&plain[2], 0, 0) + number(&plain[3], y, x)) * factor)
            })
        }, 0.0);
    }

    #[test]
    fn winograd_is_the_direct_convolution(
        batch in 1usize..10,
        (height, width) in (1usize..14, 1usize..14),
        (channels, outputs) in (1usize..40, 1usize..70),
        variant in prop::sample::select(vec![Some(Variant::F2), Some(Variant::F4), None]),
        doubled: bool,
        numbers in prop::sample::select(&BOTH[..]),
    ) {
        // Weights that are transformed as they are used are many and of f32; their depth comes in parts.
        let (channels, outputs) = if variant.is_some() { (channels, outputs) } else { (4 * channels, 32 + outputs) };
        let numbers = if variant.is_some() { numbers } else { ElementType::F32 };
        let double = usize::from(doubled);
        let output = [outputs, height << double, width << double];
        let inputs = [[channels, height, width], [outputs, 1, 1], output];
        let weights = values(outputs * channels * 9, 1);
        let bias = values(outputs, 2);
        check(numbers, batch, &inputs, output, |isa| {
            program(isa, &inputs, output, |images, target, layout| {
                let mut operations = Vec::new();
                let mut of = |image| of(numbers, isa, image, layout, &mut operations);
                let (source, residual) = (of(images[0]), of(images[2]));
                let mut finish = Finish::new(&bias, isa.panel());
                finish.offset = Some((images[1].buffer, 0));
                finish.residual = Some(residual);
                operations.push(Box::new(if let Some(variant) = variant {
                    Winograd::new(isa, variant, source, target, doubled, &weights, finish)
                } else {
                    let packed = Direct::pack(isa, &[source], target, Taps::SAME, &weights);
                    Winograd::of_taps(isa, source, target, doubled, Constants::Own(packed.into()), finish)
                }));
                operations
            })
        }, |plain| {
            let y = plain[0].convolve(output, &weights, &bias, 3, 1, 1, doubled);
            y.finished(&plain[1], &plain[2], 1.0)
        }, if numbers == ElementType::F32 { 5e-6 } else { 3e-2 });
    }

    #[test]
    fn norm_and_activation_are_those_of_plain_loops(
        batch in 1usize..6,
        (height, width) in (1usize..13, 1usize..13),
        (groups, of_first, of_second) in (1usize..6, 1usize..8, 0usize..8),
        function in prop::sample::select(vec![
            Function::Identity, Function::Silu, Function::Mish, Function::Gelu, Function::Relu, Function::SoftClamp,
        ]),
        modulated: bool,
        numbers in prop::sample::select(&BOTH[..]),
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
        // So few values may be all alike: then eps alone bounds what their rounding is multiplied by.
        let eps = 1e-5f64;
        let few = height * width * channels / groups < 8;
        let limit = if numbers == ElementType::F32 { 2e-6 } else { 4e-3 };
        let limit = if few { limit / eps.sqrt() } else { limit };
        let (weight, bias) = (values(channels, 3), values(channels, 4));
        check(numbers, batch, &inputs, output, |isa| {
            program(isa, &inputs, output, |images, target, layout| {
                let mut operations = Vec::new();
                let mut of = |&image| of(numbers, isa, image, layout, &mut operations);
                let maps: Vec<Image> = images[..count].iter().map(&mut of).collect();
                let mut sources = Vec::new();
                for &input in &maps {
                    let output = layout.take(GroupNormStatistics::len(&input));
                    operations.push(Box::new(GroupNormStatistics { input, output }));
                    sources.push((input, output));
                }
                let segments = [parts[0], parts[1]];
                let len = height * width * numbers.words(padded(parts[0]) + padded(parts[1]));
                let buffer = layout.take(len);
                let joined = Image { buffer, element: numbers, height, width, segments };
                let map = layout.take(2 * joined.stride());
                let modulation = modulated.then_some((images[count].buffer, 0));
                operations.push(Box::new(GroupNormAffine {
                    sources, target: joined, groups, eps,
                    weight: Values::Own(Aligned::of(&weight, 1).into()),
                    bias: Values::Own(Aligned::of(&bias, 1).into()), modulation,
                    output: map, moments: None,
                }));
                operations.push(Box::new(GroupNormApply::new(&maps, joined, map, function)));
                // Back to one segment.
                operations.push(identity(isa, joined, target));
                operations
            })
        }, |plain| {
            let modulation = modulated.then_some(&plain[count]);
            let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            let joined = Plain::joined(&plain[..count]);
            joined.normalised(groups, eps, &wide(&weight), &wide(&bias), modulation, function)
        }, limit);
    }

    #[test]
    fn attention_is_that_of_plain_loops(
        batch in 1usize..5,
        (height, width) in (1usize..8, 1usize..8),
        (heads, of_head) in (1usize..4, 1usize..40),
        numbers in prop::sample::select(&BOTH[..]),
    ) {
        let channels = heads * of_head;
        let (inputs, output) = ([[3 * channels, height, width]], [channels, height, width]);
        let part = |image, number| Channels { image, start: number * channels, width: channels };
        check(numbers, batch, &inputs, output, |isa| {
            program(isa, &inputs, output, |images, target, layout| {
                let mut operations = Vec::new();
                let numbers_of_input = if of_head % 2 == 0 { numbers } else { ElementType::F32 };
                let input = of(numbers_of_input, isa, images[0], layout, &mut operations);
                let parts = [part(input, 0), part(input, 1), part(input, 2)];
                let gathered = take(layout, numbers, output);
                attention(isa, parts, gathered, (heads, false), layout, &mut operations);
                operations.push(identity(isa, gathered, target));
                operations
            })
        }, |plain| plain[0].attended(heads), if numbers == ElementType::F32 { 2e-6 } else { 1e-2 });
    }

    #[test]
    fn attention_over_another_map_and_causal_attention_are_those_of_plain_loops(
        batch in 1usize..4,
        (height, width) in (1usize..8, 1usize..8),
        keys in 1usize..80,
        (heads, of_head) in (1usize..4, 1usize..40),
        causal: bool,
        numbers in prop::sample::select(&BOTH[..]),
    ) {
        let channels = heads * of_head;
        // Queries; keys and values, one after the other.
        let inputs = [[channels, height, width], [2 * channels, 1, keys]];
        let output = inputs[0];
        let part = |image, number| Channels { image, start: number * channels, width: channels };
        check(numbers, batch, &inputs, output, |isa| {
            program(isa, &inputs, output, |images, target, layout| {
                let mut operations = Vec::new();
                let numbers_of_input = if of_head % 2 == 0 { numbers } else { ElementType::F32 };
                let mut of = |image| of(numbers_of_input, isa, image, layout, &mut operations);
                let (queries, others) = (of(images[0]), of(images[1]));
                let parts = [part(queries, 0), part(others, 0), part(others, 1)];
                let gathered = take(layout, numbers, output);
                attention(isa, parts, gathered, (heads, causal), layout, &mut operations);
                operations.push(identity(isa, gathered, target));
                operations
            })
        }, |plain| {
            let [keys, values] = [0, 1].map(|part| plain[1].narrowed(part * channels, channels));
            plain[0].attending(&keys, &values, (heads, causal))
        }, if numbers == ElementType::F32 { 2e-6 } else { 1e-2 });
    }

    #[test]
    fn tokens_are_treated_as_in_plain_loops(
        batch in 1usize..4, channels in 2usize..70, (height, width) in (1usize..6, 1usize..6),
        numbers in prop::sample::select(&BOTH[..]),
    ) {
        let size = [channels, height, width];
        let inputs = [size, [3 * channels, 1, 1], size];
        let told = |images: &[Image], index: usize| {
            Vector { buffer: images[1].buffer, start: index * channels }
        };
        let rounding = |limit| if numbers == ElementType::F32 { limit } else { 1e-2 };
        // Maps of the numbers between one of f32 that comes in and one that goes out.
        let between = |isa: Isa, images: &[Image], target: Image, layout: &mut Layout, add: Make| {
            let mut operations = Vec::new();
            let mut maps = images.to_vec();
            for place in [0, 2] {
                maps[place] = of(numbers, isa, images[place], layout, &mut operations);
            }
            let made = take(layout, numbers, size);
            operations.push(add(&maps, made));
            operations.push(identity(isa, made, target));
            operations
        };
        let modulate = |isa| program(isa, &inputs, size, |images, target, layout| {
            between(isa, images, target, layout, &|maps, made| {
                let parts = [told(maps, 2), told(maps, 1)];
                Box::new(Modulate::new(maps[0], made, 1e-3, (parts, 1.0), None))
            })
        });
        let expected = |inputs: &[Plain]| inputs[0].modulated(&inputs[1], 1e-3, [2, 1]);
        check(numbers, batch, &inputs, size, modulate, expected, rounding(3e-6));
        let gate = |isa| program(isa, &inputs, size, |images, target, layout| {
            between(isa, images, target, layout, &|maps, made| {
                Box::new(Gate::new(maps[0], maps[2], made, told(maps, 1)))
            })
        });
        let expected = |inputs: &[Plain]| inputs[0].gated(&inputs[2], &inputs[1], 1);
        check(numbers, batch, &inputs, size, gate, expected, rounding(1e-6));
        for function in [Function::GeluTanh, Function::Silu, Function::Gelu] {
            let activate = |isa| program(isa, &inputs, size, |images, output, _| {
                vec![Box::new(Activate { input: images[0], output, function })]
            });
            let expected = |inputs: &[Plain]| Plain {
                size, values: inputs[0].values.iter().map(|&x| function.scalar(x)).collect(),
            };
            check(ElementType::F32, batch, &inputs, size, activate, expected, 1e-6);
        }
        // Halves of whole words.
        let half = channels.next_multiple_of(2);
        let (wide, narrow) = ([2 * half, height, width], [half, height, width]);
        let gated = |isa| program(isa, &[wide], narrow, |images, target, layout| {
            let mut operations = Vec::new();
            let input = of(numbers, isa, images[0], layout, &mut operations);
            let made = take(layout, numbers, narrow);
            operations.push(Box::new(Geglu::new(input, made)));
            operations.push(identity(isa, made, target));
            operations
        });
        let expected = |inputs: &[Plain]| {
            let [a, b] = [0, half].map(|start| inputs[0].narrowed(start, half));
            let product = |(a, b): (&f64, &f64)| a * Function::Gelu.scalar(*b);
            Plain { size: narrow, values: a.values.iter().zip(&b.values).map(product).collect() }
        };
        check(numbers, batch, &[wide], narrow, gated, expected, rounding(3e-6));
    }

    #[test]
    fn sizes_change_as_in_plain_loops(
        batch in 1usize..4, channels in 1usize..40, (height, width) in (1usize..12, 1usize..12),
        numbers in prop::sample::select(&BOTH[..]),
    ) {
        let (small, large) = ([channels, height, width], [channels, 2 * height, 2 * width]);
        let resampled = |isa, from, to, up: bool| {
            program(isa, &[from], to, |images, target, layout| {
                let mut operations = Vec::new();
                let input = of(numbers, isa, images[0], layout, &mut operations);
                let output = take(layout, numbers, to);
                operations.push(if up {
                    Box::new(Upsample { input, output })
                } else {
                    Box::new(Downsample { input, output })
                });
                operations.push(identity(isa, output, target));
                operations
            })
        };
        check(numbers, batch, &[small], large, |isa| resampled(isa, small, large, true),
            |plain| plain[0].doubled(), 0.0);
        check(numbers, batch, &[large], small, |isa| resampled(isa, large, small, false),
            |plain| plain[0].halved(), if numbers == ElementType::F32 { 1e-7 } else { 4e-3 });
    }
}

/// The shapes of the two networks that must be fast, each within what a layer may err: in f32 less than
/// 1e-5, in bf16 what its eight bits leave after the transforms.
#[test]
fn layers_of_real_networks_err_little() {
    use Variant::{F2, F4};
    let layers = [
        (Some(F4), 32, 32, 32),
        (Some(F4), 96, 32, 32),
        (Some(F4), 160, 64, 16),
        (Some(F4), 192, 32, 8),
        (Some(F4), 128, 32, 32),
        (Some(F4), 256, 32, 16),
        (Some(F4), 512, 32, 16),
        (Some(F2), 512, 32, 8),
        (None, 256, 32, 4),
        (None, 512, 32, 4),
        // Whose taps come one after another for all rows.
        (None, 1280, 32, 4),
    ];
    for ((variant, from, to, side), numbers) in
        layers.into_iter().flat_map(|layer| BOTH.map(|numbers| (layer, numbers)))
    {
        let (input, output) = ([from, side, side], [to, side, side]);
        let weights = values(to * from * 9, 1);
        let bias = values(to, 2);
        check(
            numbers,
            1,
            &[input],
            output,
            |isa| {
                program(isa, &[input], output, |images, target, layout| {
                    let mut operations = Vec::new();
                    let source = of(numbers, isa, images[0], layout, &mut operations);
                    let finish = Finish::new(&bias, isa.panel());
                    operations.push(match variant {
                        Some(variant) => Box::new(Winograd::new(
                            isa, variant, source, target, false, &weights, finish,
                        )),
                        None => {
                            let taps = Taps { side: 3, stride: 1, padding: 1, doubled: false };
                            Box::new(Direct::new(isa, &[source], target, taps, &weights, finish))
                        }
                    });
                    operations
                })
            },
            |plain| plain[0].convolve(output, &weights, &bias, 3, 1, 1, false),
            match (numbers, variant) {
                (ElementType::F32, _) => 1e-5,
                (ElementType::Bf16, Some(F4)) => 2e-2,
                (ElementType::Bf16, Some(F2)) => 1e-2,
                (ElementType::Bf16, None) => 4e-3,
            },
        );
    }
}
