//! What networks predict, turned into one another: with `alpha = sqrt(alpha_bar)` and
//! `s = sqrt(1 − alpha_bar)`, `x_t = alpha·x0 + s·eps` and `v = alpha·eps − s·x0` (Salimans & Ho 2022,
//! arXiv 2202.00512, appendix D).

use candle_core::{Device, Result, Tensor};
use understudy_models::schedule::PredictionType;

/// `x·x_t + model·answer`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Linear {
    /// Factor of the noisy sample.
    pub x: f64,
    /// Factor of the network's answer.
    pub model: f64,
}

/// eps from x_t and a network's answer.
///
/// For a network that predicts x0 the factor of the answer is `−alpha/s`, which at t = 0 of the cosine
/// schedule is 156: a loss in eps gives an error in x0 there that much squared, 24 000 times its own
/// weight, and next to none at the last timesteps. `v` and eps weigh alike within `alpha² ≤ 1`. Where
/// nothing but noise is left (`alpha_bar = 0`) eps is x_t itself.
pub fn to_eps(prediction: PredictionType, alpha_bar: f64) -> Linear {
    let (alpha, s) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
    match prediction {
        PredictionType::Epsilon => Linear { x: 0.0, model: 1.0 },
        PredictionType::Sample => Linear { x: 1.0 / s, model: -alpha / s },
        PredictionType::Velocity => Linear { x: s, model: alpha },
    }
}

/// x0 from x_t and a network's answer; infinite for predicted noise where `alpha_bar = 0`.
pub fn to_x0(prediction: PredictionType, alpha_bar: f64) -> Linear {
    let (alpha, s) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
    match prediction {
        PredictionType::Epsilon => Linear { x: 1.0 / alpha, model: -s / alpha },
        PredictionType::Sample => Linear { x: 0.0, model: 1.0 },
        PredictionType::Velocity => Linear { x: alpha, model: -s },
    }
}

/// One number per row of a batch, as `[B, 1, 1, 1]`.
pub(crate) fn column(rows: impl Iterator<Item = f64>, device: &Device) -> Result<Tensor> {
    let values: Vec<f32> = rows.map(|value| value as f32).collect();
    let rows = values.len();
    Tensor::from_vec(values, (rows, 1, 1, 1), device)
}

/// Applies one [`Linear`] per row: `x` and `answer` `[B, C, H, W]`.
pub(crate) fn apply(rows: &[Linear], x: &Tensor, answer: &Tensor) -> Result<Tensor> {
    if rows.iter().all(|row| *row == Linear { x: 0.0, model: 1.0 }) {
        return Ok(answer.clone());
    }
    let from_x = column(rows.iter().map(|row| row.x), x.device())?;
    let from_model = column(rows.iter().map(|row| row.model), x.device())?;
    x.broadcast_mul(&from_x)? + answer.broadcast_mul(&from_model)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use PredictionType::{Epsilon, Sample, Velocity};

    /// From a known x0 and eps every prediction gives both back.
    #[test]
    fn conversions_agree_with_the_definitions() {
        for alpha_bar in [0.999_959, 0.7, 0.5, 0.02, 1e-4_f64] {
            let (alpha, s) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
            for (x0, eps) in [(0.3, -1.2), (-1.0, 0.0), (0.0, 2.5)] {
                let x = alpha * x0 + s * eps;
                for (prediction, answer) in
                    [(Epsilon, eps), (Sample, x0), (Velocity, alpha * eps - s * x0)]
                {
                    let of = |linear: Linear| linear.x * x + linear.model * answer;
                    assert!((of(to_eps(prediction, alpha_bar)) - eps).abs() < 1e-9);
                    assert!((of(to_x0(prediction, alpha_bar)) - x0).abs() < 1e-9);
                }
            }
        }
    }

    #[test]
    fn the_weight_of_an_error_in_x0_near_the_end_is_as_documented() {
        // The first alpha_bar of the cosine schedule of 1000 steps.
        let linear = to_eps(Sample, 0.999_958_7);
        assert!((linear.model + 155.6).abs() < 0.5, "{linear:?}");
        assert!(to_eps(Velocity, 0.999_958_7).model.abs() <= 1.0);
        assert_eq!(to_eps(Velocity, 0.0), Linear { x: 1.0, model: 0.0 });
    }

    #[test]
    fn rows_are_converted_each_in_its_own_way() {
        let x = Tensor::new(&[[[[1f32]]], [[[2.0]]]], &Device::Cpu).unwrap();
        let rows = [Linear { x: 1.0, model: 2.0 }, Linear { x: -1.0, model: 0.5 }];
        let y = apply(&rows, &x, &x).unwrap().flatten_all().unwrap();
        assert_eq!(y.to_vec1::<f32>().unwrap(), [3.0, -1.0]);
    }
}
