//! Distribution matching: what pulls a student's images towards its teacher's distribution, told by two estimates of the
//! clean image: the teacher's, and that of a critic that knows the student's own images.

use candle_core::{Result, Tensor};

/// `mean over elements of √((F − D)² + c²) − c`, over `w`, with a gradient to `x0` alone.
///
/// Trajectory distribution matching (Luo et al. 2025, arXiv 2503.06674): `x0` f32 `[B, C, H, W]` is the student's
/// estimate, pulled to `x0 + D − F`, with `real` D the teacher's of it noised again and `fake` F the critic's, both held
/// constant. The difference is that of two scores, so this is the gradient of a Kullback–Leibler divergence (Yin et al.
/// 2023, arXiv 2311.18828, eq. 7), its length bounded by the pseudo-Huber distance. `w` is `mean |x0 − D|` of each row (eq. 8
/// there): how much a row says in all.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn matching(x0: &Tensor, real: &Tensor, fake: &Tensor) -> Result<Tensor> {
    let weights = row_weights(x0, real)?;
    let target = (x0 + (real - fake)?)?.detach();
    let distance = (((x0 - target)?.sqr()? + C * C)?.sqrt()? - C)?;
    distance.broadcast_div(&weights)?.mean_all()
}

/// c, of the pseudo-Huber distance, in units of the image.
const C: f64 = 1e-3;

/// `mean over elements of (D − F)·((D − x0) − α·(D − F))`, over `w`: score identity distillation (Zhou et al. 2024, arXiv
/// 2404.04057) with their α = 1.2, for students of one step. Its gradient goes through `real` and `fake` into the
/// noised sample too, so both must have come with one. It may be below 0.
///
/// # Errors
/// Shapes that do not fit.
pub(crate) fn score_identity(x0: &Tensor, real: &Tensor, fake: &Tensor) -> Result<Tensor> {
    let weights = row_weights(x0, real)?;
    let difference = (real - fake)?;
    let loss = (&difference * ((real - x0)? - (&difference * ALPHA)?)?)?;
    loss.broadcast_div(&weights)?.mean_all()
}

/// α of score identity distillation.
const ALPHA: f64 = 1.2;

/// `mean |x0 − D|` of each row as `[B, 1, 1, 1]`, constant.
fn row_weights(x0: &Tensor, real: &Tensor) -> Result<Tensor> {
    let mean = (x0 - real)?.detach().abs()?.mean_keepdim((1, 2, 3))?;
    // A row that is its own estimate has nothing to learn, and no 0 / 0.
    mean.maximum(LEAST_WEIGHT)
}

const LEAST_WEIGHT: f32 = 1e-4;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::{DType, Device, Var};

    use super::*;

    const X0: [f64; 4] = [0.3, -0.8, 0.1, 0.9];
    const REAL: [f64; 4] = [0.5, -0.6, 0.1, 0.4];
    const FAKE: [f64; 4] = [0.2, -0.9, 0.1003, 0.6];

    /// Two rows of two values.
    fn rows(values: &[f64]) -> Tensor {
        Tensor::from_slice(values, (2, 1, 1, 2), &Device::Cpu).unwrap()
    }

    /// w of the two rows.
    const WEIGHTS: [f64; 2] = [0.2, 0.25];

    #[test]
    fn matching_pulls_by_the_difference_of_the_estimates() {
        let x0 = Var::from_tensor(&rows(&X0)).unwrap();
        let loss = matching(x0.as_tensor(), &rows(&REAL), &rows(&FAKE)).unwrap();
        let distance = |at: usize| ((FAKE[at] - REAL[at]).powi(2) + C * C).sqrt() - C;
        let expected: f64 = (0..4).map(|at| distance(at) / WEIGHTS[at / 2] / 4.0).sum();
        assert!((loss.to_scalar::<f64>().unwrap() - expected).abs() < 1e-9);
        let gradients = loss.backward().unwrap();
        let gradient = gradients.get(&x0).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for at in 0..4 {
            let difference = FAKE[at] - REAL[at];
            let root = (difference.powi(2) + C * C).sqrt();
            let expected = difference / root / WEIGHTS[at / 2] / 4.0;
            assert!((gradient[at] - expected).abs() < 1e-9, "{gradient:?}");
        }
    }

    /// Score identity by finite differences, with estimates that follow x0 as networks do; weights are held.
    #[test]
    fn the_gradient_of_score_identity_goes_through_both_estimates() {
        let estimates = |x0: &Tensor| {
            let real = ((x0 * 0.7).unwrap() + 0.1).unwrap();
            let fake = (x0.sqr().unwrap() * 0.4).unwrap();
            (real, fake)
        };
        let x0 = Var::from_tensor(&rows(&X0)).unwrap();
        let (real, fake) = estimates(x0.as_tensor());
        let loss = score_identity(x0.as_tensor(), &real, &fake).unwrap();
        let gradients = loss.backward().unwrap();
        let gradient = gradients.get(&x0).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let weights: Vec<f64> =
            row_weights(x0.as_tensor(), &real).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let at = |x: f64, weight: f64| {
            let (real, fake) = (0.7 * x + 0.1, 0.4 * x * x);
            (real - fake) * ((real - x) - 1.2 * (real - fake)) / weight / 4.0
        };
        for (place, x) in X0.into_iter().enumerate() {
            let weight = weights[place / 2];
            let expected = (at(x + 1e-5, weight) - at(x - 1e-5, weight)) / 2e-5;
            assert!((gradient[place] - expected).abs() < 1e-7, "{place}: {gradient:?} {expected}");
        }
        let total: f64 = X0.iter().enumerate().map(|(i, &x)| at(x, weights[i / 2])).sum();
        assert!((loss.to_scalar::<f64>().unwrap() - total).abs() < 1e-9);
    }

    #[test]
    fn an_estimate_that_is_right_already_is_no_division_by_nothing() {
        let x0 = rows(&X0).to_dtype(DType::F32).unwrap();
        for loss in [matching(&x0, &x0, &x0), score_identity(&x0, &x0, &x0)] {
            assert_eq!(loss.unwrap().to_scalar::<f32>().unwrap(), 0.0);
        }
    }
}
