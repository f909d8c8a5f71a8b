//! Every gradient against sums or differences in f64, over awkward shapes, with every instruction set
//! that this processor has; and its bits on other numbers of threads.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use crate::kernels::reference::{Plain, relative_error};
use crate::kernels::tests::{Size, bits, take, values};
use crate::kernels::*;

/// What one run of operations is checked on.
struct Case<'a> {
    batch: usize,
    inputs: &'a [Size],
    parameters: &'a [Vec<f32>],
    output: Size,
}

/// All maps, and the memory for weights.
struct Memories {
    layout: Layout,
    placed: Layout,
}

impl Case<'_> {
    fn input(&self, number: usize) -> Vec<f32> {
        let len = self.batch * self.inputs[number].iter().product::<usize>();
        values(len, 7 + number as u32)
    }

    /// Input `number` of one sample.
    fn plain(&self, number: usize, sample: usize) -> Plain {
        let len: usize = self.inputs[number].iter().product();
        Plain::new(self.inputs[number], &self.input(number)[sample * len..][..len])
    }

    /// The row of a parameter's numbers from `start` on.
    fn row(&self, parameter: usize, start: usize) -> Row {
        let before: usize = self.parameters[..parameter].iter().map(Vec::len).sum();
        Row { parameter, start, gradient: before + start, factor: 1.0 }
    }

    fn filter(&self, outputs: usize, channels: usize, taps: usize) -> Filter {
        let rows = (0..outputs).map(|o| self.row(0, o * channels * taps)).collect();
        Filter { rows, taps }
    }

    /// The output map and the gradients of all parameters, by each instruction set.
    fn run(
        &self,
        build: impl Fn(Isa, &[Image], Image, &mut Memories) -> Vec<Box<dyn Operation>>,
    ) -> Vec<(Isa, Vec<f32>, Vec<f32>)> {
        let data: Vec<Vec<f32>> = (0..self.inputs.len()).map(|i| self.input(i)).collect();
        let data: Vec<&[f32]> = data.iter().map(|data| &data[..]).collect();
        let parameters: Vec<&[f32]> = self.parameters.iter().map(|one| &one[..]).collect();
        let total = parameters.iter().map(|one| one.len()).sum();
        let len: usize = self.output.iter().product();
        let one = |isa: Isa| {
            let mut memories = Memories { layout: Layout::default(), placed: Layout::default() };
            let images: Vec<Image> = self
                .inputs
                .iter()
                .map(|&size| take(&mut memories.layout, ElementType::F32, size))
                .collect();
            let target = take(&mut memories.layout, ElementType::F32, self.output);
            let mut operations: Vec<Box<dyn Operation>> = Vec::new();
            for (input, &output) in images.iter().enumerate() {
                operations.push(Box::new(Import::whole(input, output)));
            }
            operations.extend(build(isa, &images, target, &mut memories));
            operations.push(Box::new(Export::whole(target)));
            let inputs = self.inputs.iter().map(|size| size.iter().product()).collect();
            let part = Part { operations: 0..operations.len(), inputs, output: len };
            let layouts = [&memories.layout, &memories.placed];
            let lens = self.parameters.iter().map(Vec::len).collect();
            let program = Program::in_parts(isa, operations, layouts, vec![part], lens);
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let (mut output, mut gradients) = (vec![0.0; self.batch * len], vec![0.0; total]);
                let mut workspace = program.begin();
                let call = Call {
                    batch: self.batch,
                    inputs: &data,
                    parameters: &parameters,
                    output: &mut output,
                    gradients: &mut gradients,
                };
                pool.install(|| program.run_part(0, &mut workspace, call, None)).unwrap();
                (output, gradients)
            };
            let (output, gradients) = run(1);
            for threads in [2, 5] {
                let (others, other_gradients) = run(threads);
                assert!(bits(&others) == bits(&output), "{isa}: {threads} threads");
                assert!(bits(&other_gradients) == bits(&gradients), "{isa}: {threads} threads");
            }
            (isa, output, gradients)
        };
        Isa::available().into_iter().map(one).collect()
    }
}

/// Nothing: the output of a case whose results are gradients.
fn nothing(output: Image) -> Box<dyn Operation> {
    Box::new(Scale { map: output, factor: 0.0 })
}

/// The output pixel's input pixel under a tap.
fn under(taps: Taps, tap: usize, y: usize, x: usize, size: Size) -> Option<(usize, usize)> {
    let row = (y * taps.stride + tap / taps.side).checked_sub(taps.padding)?;
    let column = (x * taps.stride + tap % taps.side).checked_sub(taps.padding)?;
    let shift = usize::from(taps.doubled);
    (row < size[1] << shift && column < size[2] << shift).then_some((row >> shift, column >> shift))
}

/// `Σ x·∂y` for each weight.
fn weight_gradient(case: &Case, taps: Taps, x: &[Plain], dy: &[Plain]) -> Vec<f64> {
    let (channels, outputs) = (case.inputs[0][0], case.inputs[1][0]);
    let mut all = Vec::new();
    for o in 0..outputs {
        for c in 0..channels {
            for tap in 0..taps.side * taps.side {
                let mut sum = 0.0;
                for (x, dy) in x.iter().zip(dy) {
                    for row in 0..dy.size[1] {
                        for column in 0..dy.size[2] {
                            if let Some((i, j)) = under(taps, tap, row, column, x.size) {
                                sum += x.at(c, i, j) * dy.at(o, row, column);
                            }
                        }
                    }
                }
                all.push(sum);
            }
        }
    }
    all
}

/// The gradient of a convolution's input, by scattering.
fn input_gradient(taps: Taps, weights: &[f32], size: Size, dy: &Plain) -> Vec<f64> {
    let mut all = vec![0.0; size.iter().product()];
    let count = taps.side * taps.side;
    for o in 0..dy.size[0] {
        for row in 0..dy.size[1] {
            for column in 0..dy.size[2] {
                for tap in 0..count {
                    if let Some((i, j)) = under(taps, tap, row, column, size) {
                        for c in 0..size[0] {
                            let weight = f64::from(weights[(o * size[0] + c) * count + tap]);
                            all[(c * size[1] + i) * size[2] + j] += weight * dy.at(o, row, column);
                        }
                    }
                }
            }
        }
    }
    all
}

const KINDS: [Taps; 5] = [
    Taps { side: 1, stride: 1, padding: 0, doubled: false },
    Taps { side: 3, stride: 1, padding: 1, doubled: false },
    Taps { side: 3, stride: 2, padding: 1, doubled: false },
    Taps { side: 3, stride: 2, padding: 0, doubled: false },
    Taps { side: 3, stride: 1, padding: 1, doubled: true },
];

/// The form a 3×3 convolution that keeps the size may have.
fn form(taps: Taps, number: usize) -> Form {
    match (taps.side == 3 && taps.stride == 1, number) {
        (true, 1) => Form::Winograd(Variant::F2),
        (true, 2) => Form::Winograd(Variant::F4),
        _ => Form::Direct,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn weights_packed_in_a_run_convolve_as_others(
        batch in 1usize..4, (height, width) in (1usize..9, 1usize..9),
        (channels, outputs) in (1usize..40, 1usize..70), kind in 0usize..5, number in 0usize..3,
    ) {
        let taps = KINDS[kind];
        let form = form(taps, number);
        let (height, width) = (height * taps.stride, width * taps.stride);
        let size = |side: usize| (side << usize::from(taps.doubled)) / taps.stride;
        let output = [outputs, size(height), size(width)];
        let count = taps.side * taps.side;
        let parameters = [values(outputs * channels * count, 1), values(outputs, 2)];
        let inputs = [[channels, height, width]];
        let case = Case { batch, inputs: &inputs, parameters: &parameters, output };
        let results = case.run(|isa, images, target, memories| {
            let inputs = places(images, 0, form == Form::Direct);
            let len = Pack::len(form, isa, inputs.len(), outputs, count);
            let filter = case.filter(outputs, channels, count);
            let (weights, bias) = (memories.placed.take(len), memories.placed.take(outputs + 32));
            let pack = Pack {
                filter, form, turned: false, inputs, outputs: (0..outputs).map(Some).collect(),
                output: weights,
            };
            let rows = (0..outputs).map(|o| case.row(1, o)).collect();
            let finish = Finish::with(Constants::Placed(bias));
            let constants = Constants::Placed(weights);
            let convolution: Box<dyn Operation> = match form {
                Form::Direct => Box::new(Direct::with(isa, images, target, taps, constants, finish)),
                Form::Winograd(variant) => Box::new(Winograd::with(
                    isa, variant, images[0], target, taps.doubled, constants, finish,
                )),
            };
            vec![Box::new(pack), Box::new(PackBias { rows, output: bias }), convolution]
        });
        for (isa, found, _) in results {
            for sample in 0..batch {
                let Taps { side, stride, padding, doubled } = taps;
                let plain = case.plain(0, sample);
                let expected = plain.convolve(
                    output, &parameters[0], &parameters[1], side, stride, padding, doubled,
                );
                let len = expected.values.len();
                let error = relative_error(&found[sample * len..][..len], &expected.values);
                prop_assert!(error <= 5e-6, "{isa}: {error:e}");
            }
        }
    }

    #[test]
    fn gradients_of_a_convolutions_input_are_scattered(
        batch in 1usize..4, (height, width) in (1usize..9, 1usize..9),
        (channels, outputs) in (1usize..40, 1usize..70), kind in 0usize..4, number in 0usize..3,
        add: bool,
    ) {
        let taps = KINDS[kind];
        let form = form(taps, number);
        let (height, width) = (height * taps.stride, width * taps.stride);
        let small = [outputs, height / taps.stride, width / taps.stride];
        let output = [channels, height, width];
        let count = taps.side * taps.side;
        let parameters = [values(outputs * channels * count, 1)];
        let inputs = [small, output];
        let case = Case { batch, inputs: &inputs, parameters: &parameters, output };
        let results = case.run(|isa, images, target, memories| {
            let inputs = places(&images[..1], 0, form == Form::Direct);
            let len = Pack::len(form, isa, inputs.len(), channels, count);
            let filter = case.filter(outputs, channels, count);
            let weights = memories.placed.take(len);
            let pack = Pack {
                filter, form, turned: true, inputs, outputs: (0..channels).map(Some).collect(),
                output: weights,
            };
            let residual = add.then_some(images[1]);
            let finish = Finish { residual, ..Finish::new(&vec![0.0; channels], isa.panel()) };
            let constants = Constants::Placed(weights);
            let convolution: Box<dyn Operation> = match form {
                Form::Direct => Box::new(
                    Direct::with(isa, &images[..1], target, taps, constants, finish).reversed(),
                ),
                Form::Winograd(variant) => Box::new(Winograd::with(
                    isa, variant, images[0], target, false, constants, finish,
                )),
            };
            vec![Box::new(pack), convolution]
        });
        for (isa, found, _) in results {
            for sample in 0..batch {
                let dy = case.plain(0, sample);
                let mut expected = input_gradient(taps, &parameters[0], output, &dy);
                if add {
                    let there = case.plain(1, sample).values;
                    expected.iter_mut().zip(there).for_each(|(a, b)| *a += b);
                }
                let len = expected.len();
                let error = relative_error(&found[sample * len..][..len], &expected);
                prop_assert!(error <= 5e-6, "{isa}: {error:e}");
            }
        }
    }

    #[test]
    fn gradients_of_weights_are_sums_over_all_pixels(
        batch in 1usize..6, (height, width) in (1usize..9, 1usize..9),
        (channels, outputs) in (1usize..90, 1usize..70), kind in 0usize..5, number in 0usize..3,
    ) {
        let taps = KINDS[kind];
        let form = form(taps, number);
        let (height, width) = (height * taps.stride, width * taps.stride);
        let size = |side: usize| (side << usize::from(taps.doubled)) / taps.stride;
        let count = taps.side * taps.side;
        let parameters = [vec![0.0; outputs * channels * count], vec![0.0; outputs]];
        let inputs = [[channels, height, width], [outputs, size(height), size(width)]];
        let output = [1, 1, 1];
        let case = Case { batch, inputs: &inputs, parameters: &parameters, output };
        let results = case.run(|_, images, target, memories| {
            let filter = case.filter(outputs, channels, count);
            let weights: Box<dyn Operation> = match form {
                Form::Direct => {
                    Box::new(DirectGradient::new(images[0], images[1], taps, filter, 0))
                }
                Form::Winograd(variant) => Box::new(WinogradGradient::new(
                    variant, images[0], images[1], taps.doubled, filter,
                )),
            };
            let biases = (0..outputs).map(|o| case.row(1, o)).collect();
            let sums = memories.layout.take(images[1].stride());
            let sums = Sums { input: images[1], biases, output: sums };
            vec![weights, Box::new(sums), nothing(target)]
        });
        let plain = |number| (0..batch).map(|s| case.plain(number, s)).collect::<Vec<_>>();
        let dy = plain(1);
        let expected = weight_gradient(&case, taps, &plain(0), &dy);
        let pixels = dy[0].values.len() / outputs;
        let of_bias = |o: usize| -> f64 {
            dy.iter().map(|dy| dy.values[o * pixels..][..pixels].iter().sum::<f64>()).sum()
        };
        let biases: Vec<f64> = (0..outputs).map(of_bias).collect();
        for (isa, _, found) in results {
            let (weights, rest) = found.split_at(expected.len());
            let error = relative_error(weights, &expected);
            prop_assert!(error <= 5e-6, "{isa}: {error:e}");
            let error = relative_error(rest, &biases);
            prop_assert!(error <= 1e-5, "{isa}: bias {error:e}");
        }
    }

    #[test]
    fn gradients_of_a_norm_are_what_differences_show(
        batch in 1usize..3, (height, width) in (1usize..5, 2usize..5),
        (groups, of_first, of_second) in (1usize..4, 1usize..5, 0usize..5),
        function in prop::sample::select(vec![
            Function::Identity, Function::Silu, Function::Mish, Function::Gelu,
        ]),
        (modulated, add) in any::<(bool, bool)>(),
    ) {
        let first = groups * of_first + (groups - of_second % groups) % groups;
        let channels = first + of_second;
        let mut inputs = vec![[first, height, width]];
        if of_second > 0 {
            inputs.push([of_second, height, width]);
        }
        let count = inputs.len();
        // Modulation, the gradient of the result, and one that is there already.
        inputs.extend([[2 * channels, 1, 1], [channels, height, width], inputs[0]]);
        let parameters = [values(channels, 3), values(channels, 4)];
        let output = inputs[0];
        let case = Case { batch, inputs: &inputs, parameters: &parameters, output };
        let results = case.run(|isa, images, target, memories| {
            let layout = &mut memories.layout;
            let mut operations: Vec<Box<dyn Operation>> = Vec::new();
            let mut sources = Vec::new();
            for &input in &images[..count] {
                let output = layout.take(GroupNormStatistics::len(&input));
                operations.push(Box::new(GroupNormStatistics { input, output }));
                sources.push((input, output));
            }
            let len = height * width * (padded(first) + padded(of_second));
            let segments = [first, of_second];
            let joined = Image { buffer: layout.take(len), element: ElementType::F32, height, width, segments };
            let (map, moments) = (layout.take(2 * joined.stride()), layout.take(2 * groups));
            let values = images[count].buffer;
            operations.push(Box::new(GroupNormAffine {
                sources, target: joined, groups, eps: 1e-5, weight: Values::Parameter(0),
                bias: Values::Parameter(1), modulation: modulated.then_some((values, 0)),
                output: map, moments: Some(moments),
            }));
            // The result's gradient has one segment; the norm's has as many as the sources.
            let place = |c: usize| (0..channels).map(|i| f32::from(u8::from(i == c))).collect();
            let rows: Vec<Vec<f32>> = (0..joined.stride())
                .map(|p| (0..channels).find(|&c| joined.place(c) == p).map_or(vec![0.0; channels], place))
                .collect();
            let gradient = Image { segments: [joined.stride(), 0], ..joined };
            let finish = Finish::new(&vec![0.0; joined.stride()], isa.panel());
            let spread = Direct::new(
                isa, &images[count + 1..count + 2], gradient, Taps::POINT, &rows.concat(), finish,
            );
            operations.push(Box::new(spread));
            if add {
                let input = images[count + 2];
                operations.push(Box::new(Combine { input, output: target, way: Way::Same, add: false }));
            }
            let mut pairs = vec![NormSource { value: images[0], gradient: target, add }];
            if count > 1 {
                let gradient = take(layout, ElementType::F32, inputs[1]);
                pairs.push(NormSource { value: images[1], gradient, add: false });
            }
            let shares = layout.take(2 * channels);
            let of_modulation = layout.take(2 * channels);
            operations.push(Box::new(NormGradient {
                sources: pairs, target: joined, function, groups, map, moments,
                weight: case.row(0, 0), bias: case.row(1, 0),
                modulation: modulated.then_some((values, of_modulation)), shares,
                real: NormGradient::mask(&joined),
            }));
            operations
        });
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let (weight, bias) = (wide(&parameters[0]), wide(&parameters[1]));
        // `Σ y·∂y` of one sample.
        let loss = |sample: usize, x: &Plain, weight: &[f64], bias: &[f64]| -> f64 {
            let mut parts = vec![Plain { size: x.size, values: x.values.clone() }];
            if count > 1 {
                parts.push(case.plain(1, sample));
            }
            let modulation = case.plain(count, sample);
            let modulation = modulated.then_some(&modulation);
            let y = Plain::joined(&parts).normalised(groups, 1e-5, weight, bias, modulation, function);
            y.values.iter().zip(case.plain(count + 1, sample).values).map(|(a, b)| a * b).sum()
        };
        let step = 1e-4;
        for (isa, found, gradients) in results {
            for sample in 0..batch {
                let x = case.plain(0, sample);
                let there = case.plain(count + 2, sample).values;
                let slope = |i: usize| {
                    let at = |offset: f64| {
                        let mut moved = Plain { size: x.size, values: x.values.clone() };
                        moved.values[i] += offset;
                        loss(sample, &moved, &weight, &bias)
                    };
                    let slope = (at(step) - at(-step)) / (2.0 * step);
                    if add { slope + there[i] } else { slope }
                };
                let expected: Vec<f64> = (0..x.values.len()).map(slope).collect();
                let found = &found[sample * expected.len()..][..expected.len()];
                // Where the group is small its numbers may be nearly equal: then the gradient is large.
                let size = 1.0 + expected.iter().fold(0f64, |a, b| a.max(b.abs()));
                let worst = found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs());
                let worst = worst.fold(0.0, f64::max) / size;
                prop_assert!(worst <= 1e-4, "{isa}: {worst:e} of {size}");
            }
            for (parameter, values) in [&weight, &bias].into_iter().enumerate() {
                let slope = |c: usize| -> f64 {
                    let at = |offset: f64| -> f64 {
                        let mut both = [weight.clone(), bias.clone()];
                        both[parameter][c] += offset;
                        (0..batch).map(|s| loss(s, &case.plain(0, s), &both[0], &both[1])).sum()
                    };
                    (at(step) - at(-step)) / (2.0 * step)
                };
                let expected: Vec<f64> = (0..values.len()).map(slope).collect();
                let found = &gradients[parameter * channels..][..channels];
                let worst = found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs());
                let size = 1.0 + expected.iter().fold(0f64, |a, b| a.max(b.abs()));
                let worst = worst.fold(0.0, f64::max) / size;
                prop_assert!(worst <= 1e-4, "{isa}: parameter {parameter}: {worst:e}");
            }
        }
    }

    #[test]
    fn gradients_of_attention_are_what_differences_show(
        batch in 1usize..3, (height, width) in (1usize..5, 1usize..5), keys in 1usize..20,
        (heads, of_head) in (1usize..4, 1usize..8), causal: bool, kind in 0..3usize,
    ) {
        let channels = heads * of_head;
        // Queries, keys and values in one map; then queries in one, keys and values in another, and the gradient of either.
        let (own, others) = ([channels, height, width], [2 * channels, 1, keys]);
        let all = [3 * channels, height, width];
        let kinds = [(vec![own, all], false), (vec![own, own, others], false), (vec![own, own, others], true)];
        let (inputs, of_others) = kinds[kind].clone();
        {
            let output = if of_others { others } else { inputs[1] };
            let case = Case { batch, inputs: &inputs, parameters: &[], output };
            let results = case.run(|isa, images, target, memories| {
                let part = |image, number| Channels { image, start: number * channels, width: channels };
                let parts = match images {
                    [_, all] => [0, 1, 2].map(|number| part(*all, number)),
                    _ => [part(images[1], 0), part(images[2], 0), part(images[2], 1)],
                };
                let gradients = match images.len() {
                    2 => [0, 1, 2].map(|number| part(target, number)),
                    _ => {
                        let size = if of_others { own } else { others };
                        let other = take(&mut memories.layout, ElementType::F32, size);
                        let (own, others) = if of_others { (other, target) } else { (target, other) };
                        [part(own, 0), part(others, 0), part(others, 1)]
                    }
                };
                let how = (heads, causal);
                vec![Box::new(AttendGradient::new(isa, parts, gradients, images[0], how))]
            });
            let step = 1e-4;
            for (isa, found, _) in results {
                for sample in 0..batch {
                    let dy = case.plain(0, sample);
                    let values: Vec<Plain> =
                        (1..inputs.len()).map(|input| case.plain(input, sample)).collect();
                    let answer = |moved: &[Plain]| -> f64 {
                        let [queries, keys, values] = match moved {
                            [all] => [0, 1, 2].map(|part| all.narrowed(part * channels, channels)),
                            _ => [
                                moved[0].narrowed(0, channels),
                                moved[1].narrowed(0, channels),
                                moved[1].narrowed(channels, channels),
                            ],
                        };
                        let y = queries.attending(&keys, &values, (heads, causal));
                        y.values.iter().zip(&dy.values).map(|(a, b)| a * b).sum()
                    };
                    let which = usize::from(of_others);
                    let slope = |i: usize| {
                        let at = |offset: f64| -> f64 {
                            let mut moved: Vec<Plain> = values
                                .iter()
                                .map(|one| Plain { size: one.size, values: one.values.clone() })
                                .collect();
                            moved[which].values[i] += offset;
                            answer(&moved)
                        };
                        (at(step) - at(-step)) / (2.0 * step)
                    };
                    let expected: Vec<f64> = (0..values[which].values.len()).map(slope).collect();
                    let len = expected.len();
                    let error = relative_error(&found[sample * len..][..len], &expected);
                    prop_assert!(error <= 1e-5, "{isa}: {error:e}");
                }
            }
        }
    }

    #[test]
    fn gradients_of_tokens_are_what_differences_show(
        batch in 1usize..3, channels in 2usize..40, (height, width) in (1usize..4, 1usize..4),
        add: bool,
    ) {
        let (size, vector) = ([channels, height, width], [3 * channels, 1, 1]);
        // Tokens, the gradient of the result, what they are told, and what the gradient is added to.
        let inputs = [size, size, vector, size];
        // Of the tokens, and of what they are told: of norm, gate and function.
        for (kind, of_told) in [(0, false), (0, true), (1, false), (1, true), (2, false)] {
            let output = if of_told { vector } else { size };
            let case = Case { batch, inputs: &inputs, parameters: &[], output };
            let results = case.run(|_, images, target, memories| {
                let layout = &mut memories.layout;
                let other = take(layout, ElementType::F32, if of_told { size } else { vector });
                let (gradient, of_vector) = if of_told { (other, target) } else { (target, other) };
                let part = |image: &Image, index| Vector { buffer: image.buffer, start: index * channels };
                let zeros = Fill::new(&vec![0.0; 3 * channels], of_vector);
                let there = Combine { input: images[3], output: gradient, way: Way::Same, add: false };
                let mut operations: Vec<Box<dyn Operation>> = vec![Box::new(zeros), Box::new(there)];
                let (value, dy) = (images[0], images[1]);
                match kind {
                    0 => {
                        let normed = take(layout, ElementType::F32, size);
                        let moments = layout.take(2 * value.pixels());
                        let parts = [part(&images[2], 2), part(&images[2], 0)];
                        let of_parts = [part(&of_vector, 2), part(&of_vector, 0)];
                        let forward = Modulate::new(value, normed, 1e-3, (parts, 1.0), Some(moments));
                        operations.push(Box::new(forward));
                        operations.push(Box::new(ModulateGradient::new(
                            value, dy, (gradient, add), moments, (parts[0], 1.0), of_parts,
                        )));
                    }
                    1 => {
                        let parts = (part(&images[2], 1), part(&of_vector, 1));
                        let op = GateGradient::new(value, dy, gradient, parts.0, parts.1);
                        operations.push(Box::new(op));
                    }
                    _ => operations.push(Box::new(ActivateGradient {
                        value, output: dy, gradient, add, function: Function::GeluTanh,
                    })),
                }
                operations
            });
            let add = add && kind != 1;
            let step = 1e-4;
            for (isa, found, _) in results {
                for sample in 0..batch {
                    let (x, dy) = (case.plain(0, sample), case.plain(1, sample));
                    let (told, there) = (case.plain(2, sample), case.plain(3, sample));
                    let loss = |x: &Plain, told: &Plain| -> f64 {
                        let y = match kind {
                            0 => x.modulated(told, 1e-3, [2, 0]),
                            1 => x.gated(&there, told, 1),
                            _ => Plain {
                                size,
                                values: x.values.iter().map(|&x| Function::GeluTanh.scalar(x)).collect(),
                            },
                        };
                        y.values.iter().zip(&dy.values).map(|(a, b)| a * b).sum()
                    };
                    let len: usize = output.iter().product();
                    let slope = |i: usize| {
                        let at = |offset: f64| {
                            let mut x = Plain { size, values: x.values.clone() };
                            let mut told = Plain { size: vector, values: told.values.clone() };
                            let moved = if of_told { &mut told } else { &mut x };
                            moved.values[i] += offset;
                            loss(&x, &told)
                        };
                        let slope = (at(step) - at(-step)) / (2.0 * step);
                        if add && !of_told { slope + there.values[i] } else { slope }
                    };
                    let expected: Vec<f64> = (0..len).map(slope).collect();
                    let found = &found[sample * len..][..len];
                    // Nearly equal channels have large gradients.
                    let size = 1.0 + expected.iter().fold(0f64, |a, b| a.max(b.abs()));
                    let worst = found.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs());
                    let worst = worst.fold(0.0, f64::max) / size;
                    prop_assert!(worst <= 1e-4, "{isa}: {kind} {of_told}: {worst:e}");
                }
            }
        }
    }

    #[test]
    fn gradients_of_sizes_are_those_of_plain_loops(
        batch in 1usize..3, channels in 1usize..40, (height, width) in (1usize..8, 1usize..8),
        add: bool,
    ) {
        let (small, large) = ([channels, height, width], [channels, 2 * height, 2 * width]);
        for (way, from, to) in [(Way::Doubled, large, small), (Way::Halved, small, large), (Way::Same, small, small)] {
            let inputs = [from, to];
            let case = Case { batch, inputs: &inputs, parameters: &[], output: to };
            let results = case.run(|_, images, output, _| {
                let (input, there) = (images[0], images[1]);
                vec![
                    Box::new(Combine { input: there, output, way: Way::Same, add: false }),
                    Box::new(Combine { input, output, way, add }),
                ]
            });
            for (isa, found, _) in results {
                for sample in 0..batch {
                    let (dy, there) = (case.plain(0, sample), case.plain(1, sample));
                    let expected = Plain::from_fn(to, |c, y, x| {
                        let moved = match way {
                            Way::Same => dy.at(c, y, x),
                            Way::Halved => 0.25 * dy.at(c, y / 2, x / 2),
                            Way::Doubled => {
                                let at = |i, j| dy.at(c, 2 * y + i, 2 * x + j);
                                at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1)
                            }
                        };
                        if add { moved + there.at(c, y, x) } else { moved }
                    });
                    let len = expected.values.len();
                    let error = relative_error(&found[sample * len..][..len], &expected.values);
                    prop_assert!(error <= 1e-6, "{isa}: {way:?} {error:e}");
                }
            }
        }
    }
}
