//! The step against the scalar reference, and the promises it makes.
#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

use super::{Advanced, advance, quantile::threshold};
use crate::noise;
use crate::sampler::{Bound, Element, MEMORIES, NoiseScale, Remember, Step};

const SHAPE: (usize, usize, usize) = (2, 3, 5);
const LENGTH: usize = 2 * 3 * 5;

fn random(seed: u64, rows: usize, channels: usize) -> Tensor {
    let mut values = vec![0.0; rows * channels * SHAPE.1 * SHAPE.2];
    noise::normal(seed, 0, &mut values);
    Tensor::from_vec(values, (rows, channels, SHAPE.1, SHAPE.2), &Device::Cpu).unwrap()
}

/// Steps with every bound, noise scale and use of memory.
fn steps() -> Vec<Step> {
    let bounds =
        [Bound::None, Bound::Clamp { range: 0.7 }, Bound::Threshold { ratio: 0.8, max: 1.5 }];
    let scales = [
        NoiseScale::Fixed(0.0),
        NoiseScale::Fixed(0.3),
        NoiseScale::LearnedRange { min_log: -46.0, max_log: -2.0 },
        NoiseScale::Learned,
    ];
    let memories = [
        ([0.0; MEMORIES], Remember::Nothing),
        ([0.5, 0.0, 0.0], Remember::Nothing),
        ([-0.4, 0.0, 0.0], Remember::X0),
        ([0.0, 0.3, -0.2], Remember::Answer),
    ];
    let mut steps = Vec::new();
    for bound in bounds {
        for d in scales {
            for (c, remember) in memories {
                let (p, q, a, b, e) = (1.3, -0.6, 0.4, 0.7, 0.1);
                steps.push(Step { p, q, bound, a, b, e, c, d, remember });
            }
        }
    }
    steps
}

struct Batch {
    x: Tensor,
    memory: Tensor,
    model: Tensor,
    noise: Tensor,
}

impl Batch {
    fn new(rows: usize) -> Self {
        Self {
            x: random(1, rows, SHAPE.0),
            memory: random(2, rows, MEMORIES * SHAPE.0),
            model: random(3, rows, 2 * SHAPE.0),
            noise: random(4, rows, SHAPE.0),
        }
    }

    fn rows(&self, indices: &[u32]) -> Self {
        let indices = Tensor::new(indices, &Device::Cpu).unwrap();
        let pick = |tensor: &Tensor| tensor.index_select(&indices, 0).unwrap();
        Self {
            x: pick(&self.x),
            memory: pick(&self.memory),
            model: pick(&self.model),
            noise: pick(&self.noise),
        }
    }

    fn run(&self, steps: &[Step]) -> Advanced {
        advance(&self.x, &self.memory, &self.model, Some(&self.noise), steps).unwrap()
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_row_is_the_scalar_reference() {
    let steps = steps();
    let batch = Batch::new(steps.len());
    let (x, memory, model, noise) =
        (values(&batch.x), values(&batch.memory), values(&batch.model), values(&batch.noise));
    let got = batch.run(&steps);
    let (got_x, got_memory, got_x0) = (values(&got.x), values(&got.memory), values(&got.x0));
    for (row, step) in steps.iter().enumerate() {
        let answer = &model[row * 2 * LENGTH..(row + 1) * 2 * LENGTH];
        let raw: Vec<f32> = (0..LENGTH)
            .map(|i| step.p as f32 * x[row * LENGTH + i] + step.q as f32 * answer[i])
            .collect();
        for i in 0..LENGTH {
            let at = row * LENGTH + i;
            let want = step.evaluate(Element {
                x: x[at].into(),
                memory: std::array::from_fn(|k| memory[(row * MEMORIES + k) * LENGTH + i].into()),
                model: answer[i].into(),
                variance: answer[LENGTH + i].into(),
                noise: noise[at].into(),
                threshold: threshold(&raw, 0.8, 1.5).into(),
            });
            let near =
                |got: f32, want: f64| (f64::from(got) - want).abs() < 3e-6 * (1.0 + want.abs());
            assert!(near(got_x[at], want.x), "{step:?}: {} {}", got_x[at], want.x);
            for (k, want) in want.memory.into_iter().enumerate() {
                let got = got_memory[(row * MEMORIES + k) * LENGTH + i];
                assert!(near(got, want), "{step:?}: {got} for {want} in memory {k}");
            }
            assert!(near(got_x0[at], want.x0), "{step:?}");
        }
    }
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).iter().map(|value| value.to_bits()).collect()
}

proptest! {
    #[test]
    fn a_row_does_not_depend_on_its_neighbours(
        row in 0_u32..48,
        neighbours in prop::collection::vec(0_u32..48, 0..6),
        place in 0_usize..6,
        broken in any::<bool>(),
    ) {
        let steps = steps();
        let mut batch = Batch::new(steps.len());
        if broken {
            // Infinities and negative zeros: what `+ 0·term` would not leave alone.
            batch.noise = (batch.noise.ones_like().unwrap() / 0.0).unwrap();
            batch.memory = (batch.memory.ones_like().unwrap() / 0.0).unwrap();
            batch.x = batch.x.zeros_like().unwrap().neg().unwrap();
            batch.model = batch.model.zeros_like().unwrap();
        }
        let mut indices = neighbours;
        let place = place.min(indices.len());
        indices.insert(place, row);
        let pick = |indices: &[u32]| indices.iter().map(|&i| steps[i as usize]).collect::<Vec<_>>();
        let alone = batch.rows(&[row]).run(&pick(&[row]));
        let together = batch.rows(&indices).run(&pick(&indices));
        for (alone, together) in [
            (&alone.x, &together.x),
            (&alone.memory, &together.memory),
            (&alone.x0, &together.x0),
        ] {
            prop_assert_eq!(bits(alone), bits(&together.get(place).unwrap()));
        }
    }
}

#[test]
fn nan_is_not_hidden() {
    let steps = steps();
    let mut batch = Batch::new(steps.len());
    batch.model = (batch.model.zeros_like().unwrap() / 0.0).unwrap();
    let got = batch.run(&steps);
    assert!(values(&got.x).iter().all(|value| value.is_nan()));
    assert!(values(&got.x0).iter().all(|value| value.is_nan()));
}

#[test]
fn quantile_interpolates() {
    let values = [-4.0, 1.0, 3.0, -2.0, 0.0];
    assert_eq!(threshold(&values, 0.5, 10.0), 2.0);
    assert_eq!(threshold(&values, 0.625, 10.0), 2.5);
    assert_eq!(threshold(&values, 1.0, 10.0), 4.0);
    assert_eq!(threshold(&values, 0.0, 10.0), 1.0);
    assert_eq!(threshold(&values, 1.0, 3.5), 3.5);
    assert!(threshold(&[1.0, f32::NAN], 0.5, 2.0).is_nan());
}

#[test]
fn what_does_not_fit_is_refused() {
    let batch = Batch::new(1);
    let step = steps()[4];
    let mean = batch.model.narrow(1, 0, 2).unwrap();
    let run = |x: &Tensor, model: &Tensor, noise: Option<&Tensor>, steps: &[Step]| {
        advance(x, &batch.memory, model, noise, steps).map(|_| ()).map_err(|e| e.to_string())
    };
    assert!(run(&batch.x, &mean, Some(&batch.noise), &[step]).is_ok());
    assert!(run(&batch.x, &mean, None, &[step]).unwrap_err().contains("noise"));
    assert!(run(&batch.x, &mean, Some(&batch.noise), &[]).unwrap_err().contains("0 steps"));
    assert!(run(&batch.x, &mean, Some(&mean.get(0).unwrap()), &[step]).is_err());
    let learned = Step { d: NoiseScale::Learned, ..step };
    assert!(run(&batch.x, &mean, Some(&batch.noise), &[learned]).unwrap_err().contains("variance"));
    let half = batch.x.to_dtype(DType::F16).unwrap();
    assert!(run(&half, &mean, Some(&batch.noise), &[step]).unwrap_err().contains("F32"));
}
