//! Linear least squares with a ridge, by normal equations.

use candle_core::{DType, Result, Tensor};

/// The ridge, in mean squares of an unknown's inputs: small beside what many rows say, and what decides where they say nothing.
const RIDGE: f64 = 1e-3;

/// Sums over rows: `XᵀX` and `XᵀY`, f64.
pub(crate) struct Normal {
    unknowns: usize,
    outputs: usize,
    gram: Vec<f64>,
    right: Vec<f64>,
}

impl Normal {
    /// Of no rows.
    pub(crate) fn new(unknowns: usize, outputs: usize) -> Self {
        let (gram, right) = (vec![0.0; unknowns * unknowns], vec![0.0; unknowns * outputs]);
        Self { unknowns, outputs, gram, right }
    }

    /// Adds rows: `x` f32 `[rows, unknowns]`, `y` f32 `[rows, outputs]`.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub(crate) fn add(&mut self, x: &Tensor, y: &Tensor) -> Result<()> {
        let turned = x.t()?.contiguous()?;
        for (sums, product) in [(&mut self.gram, x), (&mut self.right, y)] {
            let product = turned.matmul(product)?.to_dtype(DType::F64)?.flatten_all()?;
            for (sum, value) in sums.iter_mut().zip(product.to_vec1::<f64>()?) {
                *sum += value;
            }
        }
        Ok(())
    }

    /// `B`, f64 `[unknowns, outputs]`, with the least `|XB − Y|² + ridge·|B|²`, by Cholesky's factors; zeros where no row had
    /// anything.
    pub(crate) fn solve(mut self) -> Vec<f64> {
        let (n, m) = (self.unknowns, self.outputs);
        let ridge = RIDGE * (0..n).map(|i| self.gram[i * n + i]).sum::<f64>() / n as f64;
        if ridge <= 0.0 {
            return vec![0.0; n * m];
        }
        let (a, b) = (&mut self.gram, &mut self.right);
        for i in 0..n {
            a[i * n + i] += ridge;
        }
        for i in 0..n {
            let (above, row) = a.split_at_mut(i * n);
            for j in 0..i {
                let other = &above[j * n..j * n + j];
                row[j] = (row[j] - dot(&row[..j], other)) / above[j * n + j];
            }
            row[i] = (row[i] - dot(&row[..i], &row[..i])).max(ridge * 1e-6).sqrt();
        }
        for i in 0..n {
            for j in 0..i {
                subtract(b, m, i, j, a[i * n + j]);
            }
            b[i * m..][..m].iter_mut().for_each(|value| *value /= a[i * n + i]);
        }
        for i in (0..n).rev() {
            for j in i + 1..n {
                subtract(b, m, i, j, a[j * n + i]);
            }
            b[i * m..][..m].iter_mut().for_each(|value| *value /= a[i * n + i]);
        }
        self.right
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Eight sums, which a processor does at once.
    let (mut sums, whole) = ([0.0; 8], a.len() / 8 * 8);
    for (a, b) in a[..whole].chunks_exact(8).zip(b.chunks_exact(8)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest = a[whole..].iter().zip(&b[whole..]);
    sums.iter().sum::<f64>() + rest.map(|(a, b)| a * b).sum::<f64>()
}

/// Row `i` of `b`, of `m` numbers each, less `factor` times row `j`.
fn subtract(b: &mut [f64], m: usize, i: usize, j: usize, factor: f64) {
    let (low, high) = (i.min(j), i.max(j));
    let (first, second) = b.split_at_mut(high * m);
    let (low, high) = (&mut first[low * m..][..m], &mut second[..m]);
    let (to, from) = if i < j { (low, high) } else { (high, low) };
    to.iter_mut().zip(from).for_each(|(to, from)| *to -= factor * *from);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn what_is_linear_is_found() {
        let (rows, unknowns, outputs) = (200, 11, 3);
        let number = |i: usize| ((i * 7919 % 1013) as f32 / 506.0) - 1.0;
        let x: Vec<f32> = (0..rows * unknowns).map(number).collect();
        let b: Vec<f32> = (0..unknowns * outputs).map(|i| number(i + 77)).collect();
        let tensor = |values, shape: (usize, usize)| {
            Tensor::from_vec::<_, f32>(values, shape, &Device::Cpu).unwrap()
        };
        let x = tensor(x, (rows, unknowns));
        let y = x.matmul(&tensor(b.clone(), (unknowns, outputs))).unwrap();
        let mut normal = Normal::new(unknowns, outputs);
        // In two parts, as they come.
        for (begin, count) in [(0, 150), (150, 50)] {
            normal
                .add(&x.narrow(0, begin, count).unwrap(), &y.narrow(0, begin, count).unwrap())
                .unwrap();
        }
        for (found, b) in normal.solve().iter().zip(&b) {
            assert!((found - f64::from(*b)).abs() < 0.01, "{found}, not {b}");
        }
        assert_eq!(Normal::new(2, 1).solve(), [0.0; 2]);
    }
}
