//! Every operation, compiled in f32 and with gradients, against candle's operations in f64.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};

use super::{Epilogue, Graph, GraphBuilder, Map, Name, Scalar, Sees, Size, Slice, Wave};
use crate::compiled::Network;
use crate::cpu::Mode;
use crate::kernels::{Function, Taps};
use crate::weight::Weight;
use crate::{Conditioning, Denoiser, Geometry, noise};

const SIZE: Size = Size { height: 16, width: 16, channels: 3 };

/// Kernels of 1, 3 and 4 pixels a side, strides of 1 and 2, and both ways to change the size.
fn convolutions() -> Graph {
    let mut g = GraphBuilder::new(1);
    let name = Name::default();
    let x = g.sample(SIZE, 2.0, -1.0);
    let taps = |side, stride, padding| Taps { side, stride, padding, doubled: false };
    let plain = Epilogue::default();
    let mut h = g.convolve(&name.at("one"), x, 24, taps(1, 1, 0), plain);
    h = g.convolve(&name.at("four"), h, 20, taps(4, 2, 1), plain);
    h = g.activate(h, Function::QuickGelu);
    let around = g.downsample(h);
    h = g.convolve(&name.at("three"), h, 20, taps(3, 2, 0), plain);
    h = g.convolve(
        &name.at("point"),
        h,
        20,
        taps(1, 1, 0),
        Epilogue { residual: Some(around), factor: 0.5, ..plain },
    );
    h = g.group_norm(&name.at("norm"), &[h], (4, 1e-5), None, Function::Gelu);
    h = g.convolve(&name.at("wide"), h, 17, Taps { doubled: true, ..Taps::SAME }, plain);
    h = g.upsample(h);
    let y = g.convolve(&name.at("out"), h, 3, Taps::SAME, plain);
    g.finish(y, false)
}

/// A transformer's block over learned places and a learned context, with a modulated norm before it and a causal attention
/// behind it.
fn tokens() -> Graph {
    let mut g = GraphBuilder::new(2);
    let name = Name::default();
    let (side, width, heads) = (SIZE.height / 2, 24, 3);
    let patch = Size { height: side, width: side, channels: 4 * SIZE.channels };
    let time = g.sinusoid(Scalar::Time, Wave::Positional { shift: 0.0, cosines_first: true }, 12);
    let offset = g.project(&name.at("time"), time, width);
    let x = g.sample(patch, 1.0, 0.0);
    let places = g.learned(&name.at("places"), Size { channels: width, ..patch });
    let residual = |residual: Map| Epilogue { residual: Some(residual), ..Epilogue::default() };
    let epilogue = Epilogue { offset: Some(offset), ..residual(places) };
    let mut h = g.kernel(&name.at("patch"), &[x], &[width, SIZE.channels, 2, 2], epilogue);
    let context = g.learned(&name.at("context"), Size { height: 1, width: 7, channels: 10 });

    let vector = g.linear(&name.at("vector"), time, width);
    let table = g.table(&name.at("table"), [2, width]);
    let parts = g.sum(table, &[vector, vector]);
    h = g.modulate(h, 1e-5, parts, [1, 0]);
    let normed = g.layer_norm(&name.at("norm1"), h, 1e-5);
    let gathered = g.self_attention(&name.at("self"), normed, heads, true);
    h = g.linear_with(&name.at("self.out"), gathered, width, residual(h));
    let normed = g.layer_norm(&name.at("norm2"), h, 1e-5);
    let gathered = g.cross_attention(&name.at("cross"), normed, context, heads, (true, Sees::All));
    h = g.linear_with(&name.at("cross.out"), gathered, width, residual(h));
    let normed = g.layer_norm(&name.at("norm3"), h, 1e-5);
    let wide = g.linear(&name.at("wide"), normed, 2 * 4 * width);
    let gated = g.geglu(wide);
    h = g.linear_with(&name.at("narrow"), gated, width, residual(h));

    let map = g.linear(&name.at("causal"), h, 3 * width);
    let parts = [0, 1, 2].map(|part| Slice { map, start: part * width, width });
    h = g.attend(parts, heads, Sees::Earlier);
    let y = g.linear(&name.at("out"), h, patch.channels);
    g.finish(y, false)
}

/// Tokens beside a context in one row, by their root mean squares, at places cut out of a table; heads of an odd width.
fn joint() -> Graph {
    let mut g = GraphBuilder::new(2);
    let name = Name::default();
    let (side, width, heads) = (SIZE.height / 2, 20, 4);
    let patch = Size { height: side, width: side, channels: 4 * SIZE.channels };
    let x = g.sample(patch, 1.0, 0.0);
    let places = g.crop(&name.at("table"), side + 3, Size { channels: width, ..patch });
    let around = Epilogue { residual: Some(places), ..Epilogue::default() };
    let mut h = g.kernel(&name.at("patch"), &[x], &[width, SIZE.channels, 2, 2], around);
    let context = g.learned(&name.at("context"), Size { height: 1, width: 7, channels: width });
    let row = g.join(&[h, context]);
    let parts = [("q", 0.5), ("k", 1.0), ("v", 1.0)].map(|(part, factor)| {
        let map = g.scaled(&name.at(part), row, 1.0);
        g.rms_norm(&name.at(part).at("norm"), map, width / heads, (1e-6, factor))
    });
    let gathered = g.attend(parts.map(|map| Slice { map, start: 0, width }), heads, Sees::All);
    let own = g.take(gathered, 0, h);
    let others = g.take(gathered, side * side, context);
    h = g.linear(&name.at("own"), own, width);
    let others = g.linear(&name.at("others"), others, width);
    let seen = g.cross_attention(&name.at("cross"), h, others, heads, (true, Sees::All));
    let y = g.linear(&name.at("out"), seen, patch.channels);
    g.finish(y, false)
}

fn formula(shape: &[usize], scale: f32, seed: u64) -> Tensor {
    let mut values = vec![0.0; shape.iter().product()];
    noise::normal(seed, 0, &mut values);
    values.iter_mut().for_each(|value| *value *= scale);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn weights(graph: &Graph) -> Vec<(String, Tensor)> {
    let weight = |(i, spec): (usize, &super::WeightSpec)| {
        let inputs: usize = spec.shape[1..].iter().product();
        let centre =
            if spec.name.contains("norm") && spec.name.ends_with("weight") { 1.0 } else { 0.0 };
        let values = formula(&spec.shape, 1.0 / (inputs as f32).sqrt().max(4.0), 1 + i as u64);
        (spec.name.clone(), (values + centre).unwrap())
    };
    graph.weights.iter().enumerate().map(weight).collect()
}

fn network(graph: &Graph, weights: Vec<(String, Tensor)>, dtype: DType) -> Network {
    let weights: HashMap<String, Weight> =
        weights.into_iter().map(|(name, tensor)| (name, Weight::Here(tensor))).collect();
    let Size { height, width, channels } = SIZE;
    let geometry = Geometry {
        in_channels: channels,
        out_channels: channels,
        height,
        width,
        conditioning: Conditioning::None,
        prompt: None,
        guidance: false,
    };
    Network::new(graph.clone(), geometry, weights, (dtype, &Device::Cpu), Mode::Plain).unwrap()
}

fn error(found: &Tensor, expected: &Tensor) -> f64 {
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
    let found = found.to_dtype(DType::F64).unwrap();
    norm(&(found - expected).unwrap()) / norm(expected)
}

/// The answer, and the gradients of the noisy sample and all weights.
fn gradients(graph: &Graph, dtype: DType) -> (Tensor, Vec<(String, Tensor)>) {
    let to = |tensor: &Tensor| tensor.to_dtype(dtype).unwrap();
    let vars: Vec<(String, Var)> = weights(graph)
        .into_iter()
        .map(|(name, tensor)| (name, Var::from_tensor(&to(&tensor)).unwrap()))
        .collect();
    let all = vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let x = Var::from_tensor(&to(&formula(&[3, 3, 16, 16], 1.0, 77))).unwrap();
    let t = Tensor::new(&[1f32, 20.5, 999.0], &Device::Cpu).unwrap();
    let y = network(graph, all, dtype).forward(&x, &t, None).unwrap();
    let direction = to(&formula(&[3, 3, 16, 16], 1.0, 78));
    let grads = (&y * direction).unwrap().sum_all().unwrap().backward().unwrap();
    // A table of places has none.
    let named =
        |(name, var): &(String, Var)| grads.get(var).map(|grad| (name.clone(), grad.clone()));
    let mut found: Vec<_> = vars.iter().filter_map(named).collect();
    found.push(("x".into(), grads.get(&x).unwrap().clone()));
    (y, found)
}

#[test]
fn every_operation_is_that_of_f64_and_so_is_its_gradient() {
    for (what, graph) in
        [("convolutions", convolutions()), ("tokens", tokens()), ("joint", joint())]
    {
        let (expected, slopes) = gradients(&graph, DType::F64);
        let (trained, found) = gradients(&graph, DType::F32);
        let x = formula(&[3, 3, 16, 16], 1.0, 77);
        let t = Tensor::new(&[1f32, 20.5, 999.0], &Device::Cpu).unwrap();
        let plain = network(&graph, weights(&graph), DType::F32).forward(&x, &t, None).unwrap();
        for y in [plain, trained] {
            let error = error(&y, &expected);
            assert!(error <= 1e-5, "{what}: {error:e}");
        }
        for ((name, found), (_, expected)) in found.iter().zip(&slopes) {
            // The bias of keys adds the same to all scores of a query, so its gradient is nothing but rounding.
            if name.ends_with("to_k.bias") {
                continue;
            }
            let error = error(found, expected);
            assert!(error <= 2e-5, "{what}: {name}: {error:e}");
        }
    }
}

#[test]
fn a_row_of_tokens_does_not_depend_on_its_batch() {
    for graph in [tokens(), joint()] {
        let network = network(&graph, weights(&graph), DType::F32);
        let x = formula(&[3, 3, 16, 16], 1.0, 77);
        let t = Tensor::new(&[1f32, 20.5, 999.0], &Device::Cpu).unwrap();
        let bits = |y: Tensor| -> Vec<u32> {
            let values: Vec<f32> = y.flatten_all().unwrap().to_vec1().unwrap();
            values.into_iter().map(f32::to_bits).collect()
        };
        let together = bits(network.forward(&x, &t, None).unwrap());
        for row in 0..3 {
            let [x, t] = [&x, &t].map(|all| all.narrow(0, row, 1).unwrap());
            let alone = bits(network.forward(&x, &t, None).unwrap());
            assert!(alone == together[row * alone.len()..][..alone.len()], "row {row}");
        }
    }
}
