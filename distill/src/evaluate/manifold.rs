//! Precision and recall (Kynkäänniemi et al. 2019): a set's manifold is the union of balls around its
//! members, each reaching to the member's k-th nearest neighbour.

use candle_core::{D, Result, Tensor};

/// Neighbours that a ball reaches to, the paper's.
const NEIGHBOURS: usize = 3;
/// Rows of the table of distances that are held at a time.
const ROWS: usize = 1000;

/// Precision (the share of `samples` within the reference's manifold) and recall (the share of the
/// reference within the samples' manifold), both 0 to 1.
///
/// Both are f64 `[N, D]` with more than three rows; the measure is meant for sets of about the same size.
///
/// # Errors
/// Whatever the device says.
pub fn precision_and_recall(samples: &Tensor, reference: &Tensor) -> Result<(f64, f64)> {
    let precision = share_within(samples, reference)?;
    let recall = share_within(reference, samples)?;
    Ok((precision, recall))
}

/// The share of `points` in at least one ball of `manifold`.
fn share_within(points: &Tensor, manifold: &Tensor) -> Result<f64> {
    let mut radii = Vec::new();
    for_each_row(manifold, manifold, |row| {
        // The smallest is the distance to itself.
        let (_, radius, _) = row.select_nth_unstable_by(NEIGHBOURS, f64::total_cmp);
        radii.push(*radius);
    })?;
    let mut within = 0;
    for_each_row(points, manifold, |row| {
        let inside = |(distance, radius): (&f64, &f64)| distance <= radius;
        within += usize::from(row.iter().zip(&radii).any(inside));
    })?;
    Ok(within as f64 / points.dim(0)? as f64)
}

/// Squared distances of each point to all others, row by row.
fn for_each_row(points: &Tensor, others: &Tensor, mut each: impl FnMut(&mut [f64])) -> Result<()> {
    let transposed = others.t()?.contiguous()?;
    let lengths = others.sqr()?.sum(D::Minus1)?.unsqueeze(0)?;
    let rows = points.dim(0)?;
    for begin in (0..rows).step_by(ROWS) {
        let part = points.narrow(0, begin, ROWS.min(rows - begin))?.contiguous()?;
        let own = part.sqr()?.sum_keepdim(D::Minus1)?;
        let dots = part.matmul(&transposed)?;
        let distances = dots.affine(-2.0, 0.0)?.broadcast_add(&own)?.broadcast_add(&lengths)?;
        for mut row in distances.to_vec2::<f64>()? {
            each(&mut row);
        }
    }
    Ok(())
}
