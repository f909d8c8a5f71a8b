//! How good generated images are: distances from a reference set in the features of a network.
//!
//! ```text
//! images ─ network (Inception, or a judge) ─▶ Observer ─ compare ─▶ Scores
//!          features, logits                   moments,   with the
//!                                             IS sums    reference
//! ```
//!
//! Reference and samples come through the same 8-bit quantisation and the same resize. What is gathered
//! for the Fréchet distance and the Inception score does not grow with the number of images; features are
//! kept only where the kernel distance, precision and recall are wanted.

mod captioned;
mod frechet;
mod gaussian;
mod inception;
mod inception_score;
pub mod judge;
mod kernel_distance;
mod layers;
mod manifold;
mod network;
#[cfg(test)]
mod tests;

use candle_core::{D, DType, Device, Result, Tensor};
use understudy_models::Error;

use crate::data::Images;
use captioned::Captioned;
pub use frechet::frechet_distance;
pub use gaussian::{Gaussian, Moments};
pub use inception::Inception;
pub use inception_score::InceptionScore;
pub use judge::Judge;
pub use kernel_distance::kernel_distance;
pub use manifold::precision_and_recall;
pub use network::{FeatureNetwork, Observed};

/// Subsets of the kernel distance, and images in each, as torch-fidelity has them.
const SUBSETS: usize = 100;
const SUBSET_IMAGES: usize = 1000;
/// Fewer than this many kept images say nothing of manifolds and kernels.
const FEWEST_KEPT: usize = 10;

/// What is gathered from a set of images as they come.
pub struct Observer<'a> {
    network: &'a dyn FeatureNetwork,
    total: usize,
    keep: usize,
    moments: Moments,
    score: InceptionScore,
    /// `[kept, width]`, flat.
    kept: Vec<f32>,
    /// Features and captions of all images that have one.
    captioned: Captioned,
    agreed: usize,
    asked: usize,
}

impl<'a> Observer<'a> {
    /// For `total` images, features of `keep` of them (evenly spaced) to be kept.
    ///
    /// # Errors
    /// [`Error::Value`] on `what` when so few images have no covariance of full rank.
    pub fn new(
        network: &'a dyn FeatureNetwork,
        what: &str,
        total: usize,
        keep: usize,
    ) -> understudy_models::Result<Self> {
        let width = network.width();
        if total <= width {
            return Err(Error::value(
                what,
                format!("{total} images"),
                format!(
                    "{} has {width} features, whose covariance takes at least {} images; 10000 are usual",
                    network.name(),
                    width + 1
                ),
            ));
        }
        Ok(Self {
            network,
            total,
            keep: keep.min(total),
            moments: Moments::new(width),
            score: InceptionScore::new(total, None),
            kept: Vec::new(),
            captioned: Captioned::new(width),
            agreed: 0,
            asked: 0,
        })
    }

    /// The images come in an order that means something, such as class by class: those of each of the Inception score's splits are
    /// drawn from all of them.
    #[must_use]
    pub fn in_order(self) -> Self {
        Self { score: InceptionScore::new(self.total, Some(0)), ..self }
    }

    /// Looks at images, which must have the network's shape; their labels, where they have some, are compared
    /// with its answers, and their captions are kept.
    ///
    /// # Errors
    /// More images than announced, and whatever the device says.
    pub fn add(&mut self, images: &Images) -> Result<()> {
        let indices: Vec<usize> = (0..images.len()).collect();
        for indices in indices.chunks(self.network.batch()) {
            let before = self.moments.count();
            let observed = self.network.observe(&images.batch(indices, &Device::Cpu)?)?;
            self.moments.add(&observed.features)?;
            self.score.add(&observed.logits)?;
            for row in 0..indices.len() {
                let (kept, next) = (before + row, before + row + 1);
                if next * self.keep / self.total > kept * self.keep / self.total {
                    self.kept.extend(observed.features.get(row)?.to_vec1::<f32>()?);
                }
            }
            if let Some(captions) = &images.captions {
                let captions = indices.iter().map(|&index| captions[index].clone());
                self.captioned.add(&observed.features, captions)?;
            }
            if let (Some(labels), Some(_)) = (&images.labels, self.network.classes()) {
                let answers: Vec<u32> = observed.logits.argmax(D::Minus1)?.to_vec1()?;
                let pairs = indices.iter().zip(&answers);
                self.agreed += pairs.filter(|(index, answer)| labels[**index] == **answer).count();
                self.asked += indices.len();
            }
        }
        Ok(())
    }

    /// The Gaussian of the features; nothing before two images were seen.
    pub fn gaussian(&self) -> Option<Gaussian> {
        self.moments.gaussian()
    }

    /// The features that were kept, f64 `[kept, width]`; nothing where they are too few.
    fn features(&self) -> Result<Option<Tensor>> {
        let shape = (self.kept.len() / self.network.width(), self.network.width());
        if shape.0 < FEWEST_KEPT {
            return Ok(None);
        }
        Tensor::from_slice(&self.kept, shape, &Device::Cpu)?.to_dtype(DType::F64).map(Some)
    }
}

/// What samples are compared with.
pub struct Reference {
    gaussian: Gaussian,
    /// f64 `[kept, width]`; nothing where only statistics are known.
    features: Option<Tensor>,
    captioned: Captioned,
}

impl Reference {
    /// From statistics alone: the Fréchet distance can be taken, and nothing else.
    pub fn from_statistics(gaussian: Gaussian) -> Self {
        Self { gaussian, features: None, captioned: Captioned::new(0) }
    }

    /// From images that were looked at.
    ///
    /// # Errors
    /// Fewer than two images, and whatever the device says.
    pub fn from_images(observer: Observer<'_>) -> Result<Self> {
        let Some(gaussian) = observer.gaussian() else {
            candle_core::bail!("a reference takes at least two images")
        };
        let features = observer.features()?;
        Ok(Self { gaussian, features, captioned: observer.captioned })
    }
}

/// Mean and standard deviation.
pub type MeanAndDeviation = (f64, f64);

/// What a set of samples is worth. Nothing stands where there was too little to tell by.
#[derive(Debug, Clone, PartialEq)]
pub struct Scores {
    /// The Fréchet distance; [`FeatureNetwork::distance`] is its name.
    pub distance: f64,
    /// The Inception score over ten splits.
    pub inception_score: Option<MeanAndDeviation>,
    /// The kernel distance over 100 subsets of 1,000 images (or of as many as the smaller set has), and its deviation; over all images,
    /// and without one, where both sets are no larger than that.
    pub kernel_distance: Option<(f64, Option<f64>)>,
    /// Precision and recall, three neighbours, between sets of the same size.
    pub precision_and_recall: Option<(f64, f64)>,
    /// The share of samples that the judge takes for the class they were made as.
    pub class_agreement: Option<f64>,
    /// The share of samples whose nearest picture of the reference has the caption that they were drawn after, among
    /// samples of captions that the reference has.
    pub prompt_adherence: Option<f64>,
}

/// Compares what was seen of samples with a reference.
///
/// # Errors
/// Fewer than two samples, a covariance without eigenvalues, and whatever the device says.
pub fn compare(samples: &Observer<'_>, reference: &Reference) -> Result<Scores> {
    let Some(gaussian) = samples.gaussian() else {
        candle_core::bail!("scores take at least two samples")
    };
    let distance =
        frechet_distance(&gaussian, &reference.gaussian).map_err(candle_core::Error::Msg)?;
    let (kernel_distance, precision_and_recall) =
        match (samples.features()?, reference.features.as_ref()) {
            (Some(ours), Some(theirs)) => {
                let size = SUBSET_IMAGES.min(ours.dim(0)?).min(theirs.dim(0)?);
                // Subsets of as many as there are would all be the same.
                let all = size == ours.dim(0)? && size == theirs.dim(0)?;
                let subsets = if all { 1 } else { SUBSETS };
                let (kernel, deviation) = kernel_distance(&ours, theirs, subsets, size, 0)?;
                (
                    Some((kernel, (!all).then_some(deviation))),
                    Some(manifold::precision_and_recall(&ours, theirs)?),
                )
            }
            _ => (None, None),
        };
    Ok(Scores {
        distance,
        inception_score: samples.score.finish(),
        kernel_distance,
        precision_and_recall,
        class_agreement: (samples.asked > 0).then(|| samples.agreed as f64 / samples.asked as f64),
        prompt_adherence: samples.captioned.adherence(&reference.captioned)?,
    })
}
