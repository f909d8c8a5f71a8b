//! Whether samples show what they were drawn after: the nearest captioned picture tells.

use std::collections::HashSet;

use candle_core::{D, Device, Result, Tensor};

/// Samples that are compared with all pictures at a time.
const TOGETHER: usize = 256;

/// The features of images with captions.
pub(super) struct Captioned {
    width: usize,
    /// `[captions, width]`, flat.
    features: Vec<f32>,
    captions: Vec<String>,
}

impl Captioned {
    pub(super) fn new(width: usize) -> Self {
        Self { width, features: Vec::new(), captions: Vec::new() }
    }

    /// Adds images by their features, `[B, width]`, and their captions, without the space around them, as prompts are read.
    pub(super) fn add(
        &mut self,
        features: &Tensor,
        captions: impl Iterator<Item = String>,
    ) -> Result<()> {
        self.features.extend(features.flatten_all()?.to_vec1::<f32>()?);
        self.captions.extend(captions.map(|caption| caption.trim().to_owned()));
        Ok(())
    }

    /// The share of these samples whose nearest picture (Euclidean, in features) has the caption that they were drawn
    /// after. Samples of a caption that no picture has are left out; nothing where all are.
    pub(super) fn adherence(&self, pictures: &Self) -> Result<Option<f64>> {
        let there: HashSet<&String> = pictures.captions.iter().collect();
        let known = |caption: &String| there.contains(caption);
        let asked: Vec<usize> =
            (0..self.captions.len()).filter(|&sample| known(&self.captions[sample])).collect();
        if asked.is_empty() {
            return Ok(None);
        }
        let theirs = matrix(&pictures.features, pictures.width)?;
        // The nearest has the least ‖p‖² − 2 s·p.
        let squares = theirs.sqr()?.sum(D::Minus1)?;
        let mut right = 0;
        for samples in asked.chunks(TOGETHER) {
            let rows = samples
                .iter()
                .flat_map(|sample| &self.features[sample * self.width..][..self.width]);
            let ours = matrix(&rows.copied().collect::<Vec<_>>(), self.width)?;
            let products = (ours.matmul(&theirs.t()?)? * 2.0)?;
            let nearest = squares.broadcast_sub(&products)?.argmin(D::Minus1)?.to_vec1::<u32>()?;
            let shows = |(sample, picture): (&usize, u32)| {
                self.captions[*sample] == pictures.captions[picture as usize]
            };
            right += samples.iter().zip(nearest).filter(|pair| shows(*pair)).count();
        }
        Ok(Some(right as f64 / asked.len() as f64))
    }
}

/// f64 `[rows, width]`.
fn matrix(values: &[f32], width: usize) -> Result<Tensor> {
    let rows = values.len() / width;
    let values: Vec<f64> = values.iter().copied().map(f64::from).collect();
    Tensor::from_vec(values, (rows, width), &Device::Cpu)
}
