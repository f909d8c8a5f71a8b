//! The Fréchet distance of two Gaussians (Dowson and Landau 1982; Heusel et al. 2017, eq. 6).

use faer::{Mat, MatRef, Side, linalg::solvers::SelfAdjointEigen};

use super::Gaussian;

/// `|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁Σ₂)^½)`, in f64.
///
/// Σ₁Σ₂ and the symmetric `Σ₁^½ Σ₂ Σ₁^½` have the same eigenvalues, so the trace of the root is taken
/// from the latter; eigenvalues that rounding made negative count as 0, and so does a distance.
///
/// # Errors
/// A sentence when the eigenvalues of a covariance cannot be found, or the distance is beyond f64.
///
/// # Panics
/// Where the two have different dimensions.
pub fn frechet_distance(a: &Gaussian, b: &Gaussian) -> Result<f64, String> {
    let width = a.mean.len();
    assert_eq!(width, b.mean.len());
    let square = |values: &[f64]| Mat::from_fn(width, width, |i, j| values[i * width + j]);
    let (first, second) = (square(&a.covariance), square(&b.covariance));
    let eigen = decompose(first.as_ref())?;
    let vectors = eigen.U();
    let roots = eigen.S().column_vector();
    let scaled = Mat::from_fn(width, width, |i, j| vectors[(i, j)] * roots[j].max(0.0).sqrt());
    let root = &scaled * vectors.transpose();
    let product = &root * &second * &root;
    let trace_of_root: f64 = decompose(product.as_ref())?
        .S()
        .column_vector()
        .iter()
        .map(|value| value.max(0.0).sqrt())
        .sum();
    let apart: f64 = a.mean.iter().zip(&b.mean).map(|(a, b)| (a - b) * (a - b)).sum();
    let trace = |matrix: &Mat<f64>| (0..width).map(|i| matrix[(i, i)]).sum::<f64>();
    let distance = apart + trace(&first) + trace(&second) - 2.0 * trace_of_root;
    match distance.is_finite() {
        // Equal Gaussians are apart by what rounding leaves, to either side of 0.
        true => Ok(distance.max(0.0)),
        false => {
            Err("the Fréchet distance is beyond f64; look at the statistics' magnitude".into())
        }
    }
}

/// The eigenvalues of a symmetric matrix `[width, width]`.
///
/// # Errors
/// A sentence when they cannot be found.
pub(super) fn eigenvalues(width: usize, values: &[f64]) -> Result<Vec<f64>, String> {
    let matrix = Mat::from_fn(width, width, |i, j| values[i * width + j]);
    matrix
        .self_adjoint_eigenvalues(Side::Lower)
        .map_err(|error| format!("the eigenvalues of a covariance cannot be found ({error:?})"))
}

fn decompose(matrix: MatRef<'_, f64>) -> Result<SelfAdjointEigen<f64>, String> {
    matrix
        .self_adjoint_eigen(Side::Lower)
        .map_err(|error| format!("the eigenvalues of a covariance cannot be found ({error:?})"))
}
