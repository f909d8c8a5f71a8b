//! How alike two 8-bit images are: PSNR and SSIM, as scikit-image computes them.

use crate::engine::Image;

/// The largest value a pixel can have.
const DATA_RANGE: f64 = 255.0;
/// PSNR ends here; that of equal images would be infinite.
const MOST_PSNR_DB: f64 = 100.0;
/// Side of the SSIM's uniform window, in pixels.
const WINDOW: usize = 7;
/// Stabilise the SSIM's two quotients; fractions of the data range.
const K1: f64 = 0.01;
const K2: f64 = 0.03;

/// How alike two images are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Similarity {
    /// As [`psnr_db`].
    pub psnr_db: f64,
    /// As [`ssim`]; `None` for images smaller than its window.
    pub ssim: Option<f64>,
}

impl Similarity {
    /// Compares; `None` for images whose width, height or channels differ, which no pixel-wise measure
    /// compares.
    pub fn of(one: &Image, other: &Image) -> Option<Self> {
        let shape = |image: &Image| (image.width, image.height, image.channels);
        (shape(one) == shape(other))
            .then(|| Self { psnr_db: psnr_db(one, other), ssim: ssim(one, other) })
    }
}

/// Peak signal-to-noise ratio in dB, `10·log10(255² / MSE)`, at most 100. The images have the same shape.
pub fn psnr_db(one: &Image, other: &Image) -> f64 {
    let squares =
        one.pixels.iter().zip(&other.pixels).map(|(&a, &b)| u64::from(a.abs_diff(b)).pow(2));
    let mean = squares.sum::<u64>() as f64 / one.pixels.len() as f64;
    (10.0 * (DATA_RANGE * DATA_RANGE / mean).log10()).min(MOST_PSNR_DB)
}

/// Mean structural similarity (Wang et al. 2004, eq. 13), −1 to 1: a uniform window of 7×7, sample
/// covariances, the mean over all windows that lie within the image and over channels. The images have
/// the same shape; `None` when a side is shorter than the window.
pub fn ssim(one: &Image, other: &Image) -> Option<f64> {
    let Image { width, height, channels, .. } = *one;
    if width < WINDOW || height < WINDOW {
        return None;
    }
    let (rows, columns) = (height - WINDOW + 1, width - WINDOW + 1);
    let mut sum = 0.0;
    for channel in 0..channels {
        for top in 0..rows {
            for left in 0..columns {
                let inside = (top..top + WINDOW).flat_map(|y| {
                    (left..left + WINDOW).map(move |x| (y * width + x) * channels + channel)
                });
                sum += window(inside.map(|at| (one.pixels[at], other.pixels[at])));
            }
        }
    }
    Some(sum / (channels * rows * columns) as f64)
}

/// The structural similarity of one window.
fn window(pixels: impl Iterator<Item = (u8, u8)>) -> f64 {
    const COUNT: f64 = (WINDOW * WINDOW) as f64;
    // Whole numbers, so the sums are exact.
    let [mut x, mut y, mut xx, mut yy, mut xy] = [0u32; 5];
    for (a, b) in pixels.map(|(a, b)| (u32::from(a), u32::from(b))) {
        x += a;
        y += b;
        xx += a * a;
        yy += b * b;
        xy += a * b;
    }
    let mean = |sum: u32| f64::from(sum) / COUNT;
    let (ux, uy) = (mean(x), mean(y));
    let covariance = |sum, product: f64| COUNT / (COUNT - 1.0) * (mean(sum) - product);
    let (vx, vy, vxy) = (covariance(xx, ux * ux), covariance(yy, uy * uy), covariance(xy, ux * uy));
    let (c1, c2) = ((K1 * DATA_RANGE).powi(2), (K2 * DATA_RANGE).powi(2));
    (2.0 * ux * uy + c1) * (2.0 * vxy + c2) / ((ux * ux + uy * uy + c1) * (vx + vy + c2))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn images() -> impl Strategy<Value = (Image, Image)> {
        (7usize..12, 7usize..12, prop::sample::select(vec![1, 3])).prop_flat_map(
            |(width, height, channels)| {
                let image = move || {
                    prop::collection::vec(any::<u8>(), width * height * channels)
                        .prop_map(move |pixels| Image { width, height, channels, pixels })
                };
                (image(), image())
            },
        )
    }

    proptest! {
        #[test]
        fn likeness_is_symmetric_bounded_and_full_for_equals((one, other) in images()) {
            let there = Similarity::of(&one, &other).unwrap();
            prop_assert_eq!(there, Similarity::of(&other, &one).unwrap());
            prop_assert!((0.0..=100.0).contains(&there.psnr_db));
            prop_assert!(there.ssim.unwrap().abs() <= 1.0);
            let same = Similarity::of(&one, &one).unwrap();
            prop_assert_eq!(same.psnr_db, 100.0);
            prop_assert!((same.ssim.unwrap() - 1.0).abs() < 1e-12);
        }
    }

    /// `tests/golden/make_similarity.py` made them.
    #[test]
    fn scikit_image_says_the_same() {
        let golden: Value =
            serde_json::from_str(include_str!("../tests/golden/similarity.json")).unwrap();
        let cases = golden["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 16);
        for case in cases {
            let size = |name: &str| case[name].as_u64().unwrap() as usize;
            let image = |name: &str| Image {
                width: size("width"),
                height: size("height"),
                channels: size("channels"),
                pixels: serde_json::from_value(case[name].clone()).unwrap(),
            };
            let found = Similarity::of(&image("teacher"), &image("student")).unwrap();
            let near = |found: f64, name: &str| (found - case[name].as_f64().unwrap()).abs() < 1e-9;
            assert!(
                near(found.psnr_db, "psnr_db") && near(found.ssim.unwrap(), "ssim"),
                "{found:?}"
            );
        }
    }

    #[test]
    fn what_cannot_be_compared_is_not() {
        let gray =
            |width, height| Image { width, height, channels: 1, pixels: vec![9; width * height] };
        let rgb = Image { width: 8, height: 8, channels: 3, pixels: vec![9; 192] };
        assert_eq!(Similarity::of(&gray(8, 8), &gray(8, 9)), None);
        assert_eq!(Similarity::of(&gray(8, 8), &rgb), None);
        let small = Similarity::of(&gray(6, 8), &gray(6, 8)).unwrap();
        assert_eq!((small.psnr_db, small.ssim), (100.0, None));
    }
}
