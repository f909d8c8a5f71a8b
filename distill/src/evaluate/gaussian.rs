//! Mean and covariance of features, gathered batch by batch: memory does not grow with images.

use std::path::Path;

use candle_core::{DType, Tensor, bail};
use understudy_models::Error;

use super::{FeatureNetwork, frechet::eigenvalues};
use crate::npz::{self, Array, Npz, Values};

/// A Gaussian fitted to features.
#[derive(Debug, Clone, PartialEq)]
pub struct Gaussian {
    /// `[D]`
    pub mean: Vec<f64>,
    /// `[D, D]`, divided by N − 1.
    pub covariance: Vec<f64>,
}

/// A Gaussian in the making.
#[derive(Debug, Clone)]
pub struct Moments {
    count: usize,
    mean: Vec<f64>,
    /// Σ (x − mean)(x − mean)ᵀ
    scatter: Vec<f64>,
}

impl Moments {
    /// Of nothing yet, in `width` dimensions.
    pub fn new(width: usize) -> Self {
        Self { count: 0, mean: vec![0.0; width], scatter: vec![0.0; width * width] }
    }

    /// Images so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Adds features `[B, D]`. The batch's own moments are merged into the others' in f64 (Chan, Golub
    /// and LeVeque 1979), which does not cancel as sums of squares would.
    ///
    /// # Errors
    /// Another width, NaN or infinity, and whatever the device says.
    pub fn add(&mut self, features: &Tensor) -> candle_core::Result<()> {
        let (rows, width) = features.dims2()?;
        if width != self.mean.len() {
            bail!("{width} features per image, not {}", self.mean.len());
        }
        let features = features.to_dtype(DType::F64)?;
        let mean = features.mean_keepdim(0)?;
        let centred = features.broadcast_sub(&mean)?;
        let scatter: Vec<f64> =
            centred.t()?.contiguous()?.matmul(&centred)?.flatten_all()?.to_vec1()?;
        let mean: Vec<f64> = mean.flatten_all()?.to_vec1()?;
        if !mean.iter().chain(&scatter).all(|value| value.is_finite()) {
            bail!("the feature network answered NaN or infinity");
        }
        let (before, added) = (self.count as f64, rows as f64);
        let total = before + added;
        let shift: Vec<f64> = mean.iter().zip(&self.mean).map(|(new, old)| new - old).collect();
        for (i, row) in self.scatter.chunks_exact_mut(width).enumerate() {
            let own = &scatter[i * width..][..width];
            for ((sum, own), other) in row.iter_mut().zip(own).zip(&shift) {
                *sum += own + shift[i] * other * (before * added / total);
            }
        }
        for (mean, shift) in self.mean.iter_mut().zip(&shift) {
            *mean += shift * added / total;
        }
        self.count += rows;
        Ok(())
    }

    /// The Gaussian; nothing for fewer than two images.
    pub fn gaussian(&self) -> Option<Gaussian> {
        let divisor = self.count.checked_sub(1).filter(|&divisor| divisor > 0)? as f64;
        let covariance = self.scatter.iter().map(|sum| sum / divisor).collect();
        Some(Gaussian { mean: self.mean.clone(), covariance })
    }
}

impl Gaussian {
    /// Reads statistics as pytorch-fid and guided-diffusion's evaluator write them: `mu` `[D]` and `sigma`
    /// `[D, D]`. Files written here name the feature network in `features` besides; without a name the width
    /// must be the network's, and only Inception's are taken on trust.
    ///
    /// # Errors
    /// [`Error::Format`] naming the file: corrupt, of another network, not finite, or with a `sigma` that is no
    /// covariance (symmetric, without negative eigenvalues, both within rounding).
    pub fn open(path: &Path, network: &dyn FeatureNetwork) -> understudy_models::Result<Self> {
        let refuse = |problem: String| Error::Format { path: path.to_owned(), problem };
        let mut npz = Npz::open(path)?;
        if let Some(named) = stranger(path, &mut npz, network)? {
            return Err(refuse(format!(
                "holds statistics of {named}, not of {}; distances between features of different \
                 networks mean nothing: use that network, or make them again with --write-stats",
                network.name()
            )));
        }
        let (mu, sigma) = (npz.array("mu")?, npz.array("sigma")?);
        let width = network.width();
        if mu.shape != [width] || sigma.shape != [width, width] {
            return Err(refuse(format!(
                "`mu` is {:?} and `sigma` {:?}; {} has {width} features",
                mu.shape,
                sigma.shape,
                network.name()
            )));
        }
        let gaussian = Self { mean: mu.values.to_f64(), covariance: sigma.values.to_f64() };
        gaussian.check().map_err(refuse)?;
        Ok(gaussian)
    }

    /// Refuses what is the covariance of nothing.
    fn check(&self) -> Result<(), String> {
        if !self.mean.iter().chain(&self.covariance).all(|value| value.is_finite()) {
            return Err("holds NaN or infinity".into());
        }
        let width = self.mean.len();
        let at = |i: usize, j: usize| self.covariance[i * width + j];
        for i in 0..width {
            if at(i, i) < 0.0 {
                return Err(format!("`sigma`[{i}, {i}] is {}; no variance is negative", at(i, i)));
            }
            for j in 0..i {
                let (lower, upper) = (at(i, j), at(j, i));
                let allowed =
                    ASYMMETRY * (at(i, i) * at(j, j)).sqrt().max(lower.abs().min(upper.abs()));
                if (lower - upper).abs() > allowed {
                    return Err(format!(
                        "`sigma` is not symmetric: [{i}, {j}] is {lower}, [{j}, {i}] is {upper}; write \
                         the whole covariance, as numpy.cov(features, rowvar=False) is"
                    ));
                }
            }
        }
        let values = eigenvalues(width, &self.covariance)?;
        let largest = values.iter().copied().fold(0.0, f64::max);
        match values.iter().copied().reduce(f64::min) {
            Some(least) if least < -NEGATIVE * largest => Err(format!(
                "`sigma` is no covariance: its least eigenvalue is {least:.3e}, its largest {largest:.3e}; \
                 a covariance has no negative ones"
            )),
            _ => Ok(()),
        }
    }

    /// The statistics in a file, whatever it is called; nothing where it holds none, or holds images beside
    /// statistics of another network, which say more.
    ///
    /// # Errors
    /// As [`Gaussian::open`].
    pub fn find(
        path: &Path,
        network: &dyn FeatureNetwork,
    ) -> understudy_models::Result<Option<Self>> {
        // What is no archive is read as images, whose reader says what is wrong with it.
        let Ok(mut npz) = Npz::open(path) else { return Ok(None) };
        let names = npz.names();
        let has = |name: &str| names.iter().any(|there| there == name);
        if !has("mu")
            || !has("sigma")
            || (has("arr_0") && stranger(path, &mut npz, network)?.is_some())
        {
            return Ok(None);
        }
        Self::open(path, network).map(Some)
    }

    /// Writes statistics that [`Gaussian::open`] and pytorch-fid read.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn write(
        &self,
        path: &Path,
        network: &dyn FeatureNetwork,
    ) -> understudy_models::Result<()> {
        let width = self.mean.len();
        let mu = Array { shape: vec![width], values: Values::F64(self.mean.clone()) };
        let sigma = Values::F64(self.covariance.clone());
        let sigma = Array { shape: vec![width, width], values: sigma };
        let name = Array { shape: Vec::new(), values: Values::Text(network.name().into()) };
        npz::write(path, &[("mu", mu), ("sigma", sigma), (NETWORK, name)])
    }
}

/// How far two entries that should be one may be apart, as a part of what their variances allow: sums in f32
/// differ by less.
const ASYMMETRY: f64 = 1e-4;
/// How far below 0 rounding may bring an eigenvalue, as a part of the largest: f32 of thousands of dimensions.
const NEGATIVE: f64 = 1e-4;

/// The member that names the feature network.
const NETWORK: &str = "features";

/// The network whose statistics these are, where it is another one.
fn stranger(
    path: &Path,
    npz: &mut Npz,
    network: &dyn FeatureNetwork,
) -> understudy_models::Result<Option<String>> {
    let named = match npz.names().iter().any(|name| name == NETWORK) {
        true => match npz.array(NETWORK)?.values {
            Values::Text(name) => Some(name),
            _ => {
                let problem = format!("`{NETWORK}` is no string");
                return Err(Error::Format { path: path.to_owned(), problem });
            }
        },
        // Nobody else writes statistics of the networks that are ours.
        false => (network.distance() != "FID").then(|| "an unnamed network".to_owned()),
    };
    Ok(named.filter(|named| named != network.name()))
}
