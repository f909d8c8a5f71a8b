//! Model folders written, as this crate and diffusers read them.

use std::{collections::HashMap, fs, path::Path};

use candle_core::{DType, Tensor};
use serde_json::json;

use super::{
    Draft, around,
    card::{CARD, Card},
    file::write_atomically,
    folder::{ModelFolder, WEIGHTS},
    readme::{self, README},
};
use crate::{Error, NetworkConfig, Result, schedule::ScheduleConfig, text::clip};

impl ModelFolder {
    /// Reads back what [`ModelFolder::write`] would write, by the rules of [`ModelFolder::open`]: nothing is
    /// written that could not be loaded.
    ///
    /// # Errors
    /// As [`ModelFolder::open`]; files are named by their places in the folder.
    pub fn check(network: &NetworkConfig, schedule: &ScheduleConfig, card: &Card) -> Result<()> {
        let file = format!("{}/config.json", network.component());
        let network = NetworkConfig::from_json(&network.to_json(), &file)?;
        let file = "scheduler/scheduler_config.json";
        let schedule = ScheduleConfig::from_text(&schedule.to_json().to_string(), file)?;
        card.check(&network, &schedule, Path::new(CARD))
    }

    /// Writes a folder that this crate and diffusers read, at the place the draft was begun for.
    ///
    /// # Errors
    /// As [`ModelFolder::check`]; [`Error::Weights`] for weights that are not finite; [`Error::Io`] or
    /// [`Error::Format`] naming the file. Nothing is left behind then.
    pub fn write(
        draft: Draft,
        network: &NetworkConfig,
        weights: &HashMap<String, Tensor>,
        schedule: &ScheduleConfig,
        card: &Card,
    ) -> Result<()> {
        Self::write_around(draft, network, weights, schedule, card, None)
    }

    /// As [`ModelFolder::write`], with what `around` has around its network: its text encoder, tokenizer and autoencoder,
    /// as links to the same files where the file system can, else as copies, and the settings of its pipeline.
    /// Components that have no part in making images (a safety checker) stay behind.
    ///
    /// # Errors
    /// As [`ModelFolder::write`]; [`Error::Value`] for a network of another kind than that of `around`.
    pub fn write_around(
        draft: Draft,
        network: &NetworkConfig,
        weights: &HashMap<String, Tensor>,
        schedule: &ScheduleConfig,
        card: &Card,
        around: Option<&Self>,
    ) -> Result<()> {
        Self::check(network, schedule, card)?;
        for (name, weight) in weights {
            if !is_finite(weight)? {
                let problem =
                    format!("`{name}` holds NaN or infinity, which no model can be served with");
                return Err(Error::Weights(problem));
            }
        }
        let readme = readme::text(network, schedule, card);
        let schedule = schedule.to_json();
        let component = network.component();
        let mut index = match around {
            Some(around) => around::index(&around.path, &around.network, network)?,
            None => json!({"_class_name": network.pipeline()}),
        };
        index["scheduler"] = json!(["diffusers", schedule["_class_name"]]);
        index[component] = json!(["diffusers", network.class_name()]);
        draft.write_json("model_index.json", &index)?;
        let files = around.map(|around| around::files(&around.path)).transpose()?;
        let changed = around.map(Self::changed_text_encoders).transpose()?.unwrap_or_default();
        for (name, file) in files.unwrap_or_default() {
            let replaced = changed.iter().any(|(encoder, _)| {
                name.split_once('/')
                    .is_some_and(|(of, file)| of == *encoder && file != "config.json")
            });
            if !replaced {
                draft.link(&name, &file)?;
            }
        }
        for (encoder, weights) in changed {
            let named = weights.into_iter().map(|(name, weight)| (clip::file_name(&name), weight));
            draft.write_tensors(&format!("{encoder}/model.safetensors"), &named.collect())?;
        }
        draft.write_json(&format!("{component}/config.json"), &network.to_json())?;
        draft.write_json("scheduler/scheduler_config.json", &schedule)?;
        draft.write_json(CARD, &json!(card))?;
        draft.write(README, readme.as_bytes())?;
        draft.write_tensors(&format!("{component}/{WEIGHTS}"), weights)?;
        draft.finish()
    }

    /// Writes another card into the folder. Its `README.md` follows, where it is as [`ModelFolder::write`] left it.
    ///
    /// # Errors
    /// [`Error::Value`] for a card that does not fit the network; [`Error::Io`] naming the file.
    pub fn write_card(&self, card: &Card) -> Result<()> {
        let path = self.path.join(CARD);
        card.check(&self.network, &self.schedule, &path)?;
        let readme = self.path.join(README);
        let untouched = fs::read_to_string(&readme).is_ok_and(|there| there == self.readme());
        write_atomically(&path, format!("{:#}\n", json!(card)).as_bytes())?;
        if untouched {
            let text = readme::text(&self.network, &self.schedule, card);
            write_atomically(&readme, text.as_bytes())?;
        }
        Ok(())
    }

    /// The `README.md` that belongs to the folder: a model card as the Hugging Face Hub reads it.
    pub fn readme(&self) -> String {
        readme::text(&self.network, &self.schedule, &self.card)
    }
}

/// Whether all of a tensor's elements are numbers, neither NaN nor infinite.
///
/// # Errors
/// Whatever the device says.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    let values: Vec<f64> = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    Ok(values.iter().all(|value| value.is_finite()))
}
