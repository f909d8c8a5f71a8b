//! The network that is learned from.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};
use understudy_models::checkpoint::ModelFolder;
use understudy_models::checkpoint::card::Card;
use understudy_models::schedule::ScheduleConfig;
use understudy_models::{Conditioning, Denoiser, Geometry, NetworkConfig, Result, noise};

use crate::data::hex;

/// A teacher: a network without gradients, and what belongs to it.
pub struct Teacher {
    /// What its folder is called.
    pub name: String,
    /// Its architecture.
    pub config: NetworkConfig,
    /// Its noise schedule.
    pub schedule: ScheduleConfig,
    /// Its model card.
    pub card: Card,
    /// What it was read from.
    model: ModelFolder,
    /// SHA-256 of its architecture and weights, and of what guides it, in hexadecimal.
    pub hash: String,
    network: Box<dyn Denoiser>,
}

impl Teacher {
    /// Reads a model folder onto a device, to be evaluated in `dtype`; `name` is what the student's card will call it.
    ///
    /// # Errors
    /// As [`ModelFolder::open_for_images`] and [`ModelFolder::load`], and whatever the device says.
    pub fn open(folder: &Path, name: String, dtype: DType, device: &Device) -> Result<Self> {
        let model = ModelFolder::open_for_images(folder)?;
        let config = model.network.clone();
        let weights = config.fit(model.tensors()?)?;
        let mut hash = hash(&config, &weights)?;
        let network = model.guided(config.load(weights, dtype, device)?, dtype, device)?;
        if let Some((guide, scale)) = model.guide() {
            let guide = self::hash(&guide.network, &guide.network.fit(guide.tensors()?)?)?;
            hash = hex(&Sha256::digest(format!("{hash} guided by {guide}, {scale}")));
        }
        let (schedule, card) = (model.schedule.clone(), model.card.clone());
        Ok(Self { name, config, schedule, card, model, hash, network })
    }

    /// Where it was read from.
    pub fn folder(&self) -> &Path {
        let ModelFolder { path, .. } = &self.model;
        path
    }

    /// The folder's description: what there is around the network.
    pub fn model(&self) -> &ModelFolder {
        &self.model
    }

    /// The shapes.
    pub fn geometry(&self) -> &Geometry {
        self.network.geometry()
    }

    /// Whether it tells a variance beside its prediction.
    pub fn learned_variance(&self) -> bool {
        self.geometry().learned_variance()
    }

    /// The network itself.
    pub fn network(&self) -> &dyn Denoiser {
        self.network.as_ref()
    }

    /// Its weights, f32 on the CPU, read again: the network itself keeps them packed.
    ///
    /// # Errors
    /// As [`Teacher::open`].
    pub fn weights(&self) -> Result<BTreeMap<String, Tensor>> {
        let weights = self.config.fit(self.model.tensors()?)?;
        let single = |(name, weight): (String, Tensor)| Ok((name, weight.to_dtype(DType::F32)?));
        weights.into_iter().map(single).collect()
    }

    /// The class of the trajectory with that seed, for a class-conditional teacher; the class that means
    /// "none" is drawn like any other, so that the student learns it too.
    pub fn label(&self, seed: u64) -> Option<u32> {
        match self.geometry().conditioning {
            Conditioning::Classes(classes) => Some(noise::class_label(seed, classes) as u32),
            _ => None,
        }
    }
}

/// SHA-256 of an architecture and its weights (in f32, by name), in hexadecimal.
pub(crate) fn hash(
    config: &NetworkConfig,
    weights: &std::collections::HashMap<String, Tensor>,
) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(config.to_json().to_string());
    let mut names: Vec<&String> = weights.keys().collect();
    names.sort();
    for name in names {
        let values: Vec<f32> = weights[name].to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        hash.update(name);
        for value in values {
            hash.update(value.to_le_bytes());
        }
    }
    Ok(hex(&hash.finalize()))
}
