//! Regression to the end of a segment: one DDIM step of the student is to land where the teacher's walk does.

use candle_core::{Result, Tensor};

use super::{Linear, Losses};
use crate::training_batch::TrainingBatch;

/// The v with which a DDIM step from a time of `alpha_bar` ends at a given sample x_r of a later time, of a larger
/// `alpha_bar_end`: the factors of x_t and, in `model`'s place, of x_r.
///
/// With `alpha = cos φ` and `s = sin φ` that step is `x_r = cos(δ)·x_t − sin(δ)·v`, `δ = φ_t − φ_r` (Salimans & Ho
/// 2022, arXiv 2202.00512, appendix D), so `v = (cos(δ)·x_t − x_r) / sin(δ)`. It is the x0 that both ends imply,
/// `x0 = (s_r·x_t − s_t·x_r) / (alpha_t·s_r − alpha_r·s_t)` (Salimans & Ho, appendix G), turned into v.
pub fn secant(alpha_bar: f64, alpha_bar_end: f64) -> Linear {
    let (alpha, s) = (alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt());
    let (alpha_end, s_end) = (alpha_bar_end.sqrt(), (1.0 - alpha_bar_end).sqrt());
    let (cos, sin) = (alpha * alpha_end + s * s_end, s * alpha_end - alpha * s_end);
    Linear { x: cos / sin, model: -1.0 / sin }
}

/// The pseudo-Huber distance of the student's v to the batch's answers, which are v already.
///
/// `mean over rows of √(mean (v_S − v)² + c²) − c`, with c = 0.00054: the distance of Song & Dhariwal 2023 (arXiv
/// 2310.14189, eq. 7) divided by the root of the number of values in a sample. All times weigh alike, in v; nothing is
/// bounded. Of a network that tells a variance the mean half learns.
#[derive(Debug, Clone, Copy)]
pub struct SegmentEnd;

const C: f64 = 0.000_54;

impl SegmentEnd {
    /// The losses of a student's raw answer; `simple` is the mean square error in v.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn losses(self, batch: &TrainingBatch, student: &Tensor) -> Result<Losses> {
        let channels = batch.x.dim(1)?;
        let answer = batch.answer.narrow(1, 0, channels)?;
        let squares = (student.narrow(1, 0, channels)? - answer)?.sqr()?.flatten_from(1)?;
        let squares = squares.mean(1)?;
        let total = (((&squares + C * C)?.sqrt()? - C)?).mean_all()?;
        Ok(Losses { total, simple: squares.mean_all()?, vlb: None })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::{Device, Var};

    use super::*;

    /// x0 by the formula of both ends gives the same v.
    #[test]
    fn the_secant_is_x0_of_both_ends_in_v() {
        for (alpha_bar, alpha_bar_end) in [(2.4e-9, 0.15), (0.15, 0.5), (0.5, 0.998), (0.9, 1.0)] {
            let (alpha, s) = (f64::sqrt(alpha_bar), f64::sqrt(1.0 - alpha_bar));
            let (alpha_end, s_end) = (f64::sqrt(alpha_bar_end), f64::sqrt(1.0 - alpha_bar_end));
            let (x, end) = (0.7, -0.4);
            let x0 = (s_end * x - s * end) / (alpha * s_end - alpha_end * s);
            let expected = (alpha * x - x0) / s;
            let secant = secant(alpha_bar, alpha_bar_end);
            let v = secant.x * x + secant.model * end;
            assert!((v - expected).abs() < 1e-9, "{v} {expected}");
            // One DDIM step with that v ends where it should.
            let (x0, eps) = (alpha * x - s * v, alpha * v + s * x);
            assert!((alpha_end * x0 + s_end * eps - end).abs() < 1e-9);
        }
    }

    #[test]
    fn the_distance_is_pseudo_huber_a_row_and_pulls_towards_the_answer() {
        let cpu = &Device::Cpu;
        let answer = Tensor::new(&[[[[1f32, 0.0]]], [[[0.0, 0.0]]]], cpu).unwrap();
        let batch = TrainingBatch {
            x: answer.clone(),
            timesteps: vec![3, 7],
            labels: None,
            text: None,
            answer,
            seeds: vec![0, 1],
        };
        // Twice the channels: the second half is a variance, which nothing is told about.
        let student =
            Var::new(&[[[[1f32, 0.2]], [[9.0, 9.0]]], [[[0.0, 0.0]], [[9.0, 9.0]]]], cpu).unwrap();
        let losses = SegmentEnd.losses(&batch, student.as_tensor()).unwrap();
        let total: f32 = losses.total.to_scalar().unwrap();
        let first = (0.02_f64 + C * C).sqrt() - C;
        assert!((f64::from(total) - first / 2.0).abs() < 1e-6, "{total}");
        let gradients = losses.total.backward().unwrap();
        let gradient: Vec<f32> =
            gradients.get(&student).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        // d/dv = v / (√(…)·values·rows), zero where nothing is wrong.
        let expected = 0.2 / ((0.02_f64 + C * C).sqrt() * 2.0 * 2.0);
        assert!((f64::from(gradient[1]) - expected).abs() < 1e-4, "{gradient:?}");
        let others = gradient.iter().enumerate().filter(|(at, _)| *at != 1);
        assert!(others.into_iter().all(|(_, &value)| value == 0.0), "{gradient:?}");
    }
}
