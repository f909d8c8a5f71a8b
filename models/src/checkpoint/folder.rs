//! A model folder in the diffusers layout.
//!
//! ```text
//! model_index.json                 pipeline and component classes
//! unet/config.json                 _class_name: UNet2DModel (transformer/: DiTTransformer2DModel)
//! unet/diffusion_pytorch_model.safetensors
//! scheduler/scheduler_config.json
//! understudy.json                  the model card (optional)
//! ```
//!
//! Early diffusers folders have the network's and the scheduler's files beside `model_index.json`; those
//! are read too.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::{
    Draft,
    card::{Card, normal_name},
    file::{read_json, read_text, write_atomically},
    read,
    readme::{self, README},
    tensors,
};
use crate::{
    Conditioning, Denoiser, Error, NetworkConfig, Result, sampler::Kind, schedule::ScheduleConfig,
    weight::Weight,
};

pub(super) const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";
pub(super) const CARD: &str = "understudy.json";

/// A folder whose descriptions have been read and understood; its weights have not.
#[derive(Debug)]
pub struct ModelFolder {
    /// Where it is.
    pub path: PathBuf,
    /// The network.
    pub network: NetworkConfig,
    /// The noise schedule.
    pub schedule: ScheduleConfig,
    /// The model card; a folder without one is a teacher with the defaults of its scheduler.
    pub card: Card,
    weights: PathBuf,
}

/// A network on a device, and what belongs to it.
pub struct Loaded {
    /// The network.
    pub network: Box<dyn Denoiser>,
    /// The noise schedule.
    pub schedule: ScheduleConfig,
    /// The model card.
    pub card: Card,
}

impl ModelFolder {
    /// Reads everything but the weights.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file; [`Error::Value`] naming the field that cannot
    /// be honoured.
    pub fn open(path: &Path) -> Result<Self> {
        let index_path = path.join("model_index.json");
        let index = read_json(&index_path)?;
        let names = |(component, class): &&(&str, &str)| index[component][1] == *class;
        let Some((folder, _)) = NetworkConfig::FAMILIES.iter().find(names) else {
            return Err(Error::Format { path: index_path, problem: unknown_family(&index) });
        };
        let network_path = component(path, folder, "config.json");
        let network = NetworkConfig::from_json(&read_json(&network_path)?, &shown(&network_path))?;
        let schedule_path = component(path, "scheduler", "scheduler_config.json");
        let schedule =
            ScheduleConfig::from_text(&read_text(&schedule_path)?, &shown(&schedule_path))?;
        let card = read_card(&path.join(CARD), &network)?;
        check_card(&card, &network, &schedule, &path.join(CARD))?;
        let weights = network_path.with_file_name(WEIGHTS);
        Ok(Self { path: path.to_owned(), network, schedule, card, weights })
    }

    /// As [`ModelFolder::open`], of a network that makes images by itself: what every command that draws any opens.
    ///
    /// # Errors
    /// Those, and [`Error::Value`] naming the field of the network's configuration that tells of other things than
    /// images.
    pub fn open_for_images(path: &Path) -> Result<Self> {
        let folder = Self::open(path)?;
        folder.network.geometry().check_images().map_err(|error| match error {
            Error::Value { field, value, remedy } => {
                let file = folder.weights.with_file_name("config.json");
                Error::value(format!("{}: {field}", file.display()), value, remedy)
            }
            error => error,
        })?;
        Ok(folder)
    }

    /// The files that hold the weights: one, or the shards that an index beside it names. They need not
    /// exist.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the index.
    pub fn weight_files(&self) -> Result<Vec<PathBuf>> {
        let index = index_of(&self.weights);
        if self.weights.exists() || !index.exists() {
            return Ok(vec![self.weights.clone()]);
        }
        shards(&index)
    }

    /// Reads the weights and builds the network.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] for a corrupt file, [`Error::Weights`] naming what is missing, extra or of the
    /// wrong shape; [`Error::Value`] naming the field that asks for more memory than there is.
    pub fn load(self, dtype: DType, device: &Device) -> Result<Loaded> {
        let network = self.network.load_weights(self.weights()?, dtype, device);
        let network = network.map_err(|error| match error {
            Error::Weights(problem) => Error::Format { path: self.weights.clone(), problem },
            Error::Value { field, value, remedy }
                if self.network.size_fields().contains(&field.as_str()) =>
            {
                let file = self.weights.with_file_name("config.json");
                Error::value(format!("{}: {field}", file.display()), value, remedy)
            }
            error => error,
        })?;
        Ok(Loaded { network, schedule: self.schedule, card: self.card })
    }

    /// Reads the weights as they are in the files, on the CPU.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] for a corrupt file.
    pub fn tensors(&self) -> Result<HashMap<String, Tensor>> {
        self.weights()?.into_iter().map(|(name, weight)| Ok((name, weight.take()?))).collect()
    }

    fn weights(&self) -> Result<HashMap<String, Weight>> {
        let mut weights = HashMap::new();
        for file in self.weight_files()? {
            weights.extend(tensors::open(&file)?);
        }
        Ok(weights)
    }

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
        check_card(card, &network, &schedule, Path::new(CARD))
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
        let index = json!({
            "_class_name": network.pipeline(),
            "scheduler": ["diffusers", schedule["_class_name"]],
            component: ["diffusers", network.class_name()],
        });
        draft.write_json("model_index.json", &index)?;
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
        check_card(card, &self.network, &self.schedule, &path)?;
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

/// Whether a folder is a model's: it has a `model_index.json`, which may still be one that nobody understands.
pub fn is_model(folder: &Path) -> bool {
    folder.join("model_index.json").is_file()
}

/// `folder/file`, or `file` beside the index where only that is there.
fn component(path: &Path, folder: &str, file: &str) -> PathBuf {
    let nested = path.join(folder).join(file);
    let flat = path.join(file);
    if !nested.exists() && flat.exists() { flat } else { nested }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// What `model_index.json` names instead of a network that can be served.
fn unknown_family(index: &Value) -> String {
    let mut components = NetworkConfig::FAMILIES.iter().map(|(component, _)| *component);
    let found = components.find(|component| !index[component].is_null()).unwrap_or("unet");
    let known = NetworkConfig::FAMILIES
        .map(|(component, class)| format!("[\"diffusers\", \"{class}\"] as `{component}`"));
    format!("`{found}` is {}, only {} can be served", index[found], known.join(" or "))
}

fn read_card(path: &Path, network: &NetworkConfig) -> Result<Card> {
    // A link that leads nowhere is there, and is read to say so.
    if path.symlink_metadata().is_err() {
        return Ok(Card { null_class: network.null_class(), ..Card::default() });
    }
    read::json(path)
}

/// Whether all of a tensor's elements are numbers, neither NaN nor infinite.
///
/// # Errors
/// Whatever the device says.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    let values: Vec<f64> = tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    Ok(values.iter().all(|value| value.is_finite()))
}

/// A card that speaks of classes, steps or samplers that are not there would mislead every request.
fn check_card(
    card: &Card,
    network: &NetworkConfig,
    schedule: &ScheduleConfig,
    path: &Path,
) -> Result<()> {
    let refuse = |problem: String| Err(Error::Format { path: path.to_owned(), problem });
    let classes = match network.geometry().conditioning {
        Conditioning::Classes(classes) => classes,
        _ => 0,
    };
    let names = card.class_names.len();
    // The class that means "none" needs no name.
    if names > 0 && names != classes && names + usize::from(card.null_class.is_some()) != classes {
        return refuse(format!(
            "`class_names` has {names} names, the network has {classes} classes; name each one"
        ));
    }
    let mut seen = HashMap::new();
    for name in &card.class_names {
        if let Some(other) = seen.insert(normal_name(name), name) {
            return refuse(format!(
                "`class_names` has two names that read the same, \"{other}\" and \"{name}\" (case, spaces, - \
                 and _ make no difference); rename one of the classes"
            ));
        }
    }
    if let Some(null_class) = card.null_class
        && null_class as usize >= classes
    {
        return refuse(format!("`null_class` is {null_class}, the network has {classes} classes"));
    }
    let most = schedule.train_timesteps();
    if let Some(steps) = card.defaults.num_inference_steps
        && !(1..=most).contains(&steps)
    {
        return refuse(format!(
            "`defaults.num_inference_steps` is {steps}: the schedule allows 1 to {most}"
        ));
    }
    let falling = card.evaluations.is_sorted_by(|more, fewer| more > fewer);
    if !falling || card.evaluations.iter().any(|steps| !(1..=most).contains(steps)) {
        return refuse(format!(
            "`evaluations` is {:?}: list numbers from {most} down to 1, each once, such as [4, 2, 1]",
            card.evaluations
        ));
    }
    if let Some(Err(error)) = card.defaults.scheduler.as_ref().map(|name| name.parse::<Kind>()) {
        return refuse(format!("`defaults`: {error}"));
    }
    Ok(())
}

/// The index of weights that are split into shards.
fn index_of(weights: &Path) -> PathBuf {
    let mut index = weights.as_os_str().to_owned();
    index.push(".index.json");
    index.into()
}

fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let malformed = || Error::Format {
        path: index.to_owned(),
        problem: "`weight_map` must map tensor names to file names beside it".into(),
    };
    let value = read_json(index)?;
    let map = value["weight_map"].as_object().ok_or_else(malformed)?;
    let names: Option<BTreeSet<&str>> = map.values().map(Value::as_str).collect();
    // A shard is a file beside its index, never elsewhere.
    let beside = |name: &&str| Path::new(name).components().count() == 1 && *name != "..";
    let names = names.ok_or_else(malformed)?;
    if names.is_empty() || !names.iter().all(beside) {
        return Err(malformed());
    }
    Ok(names.into_iter().map(|name| index.with_file_name(name)).collect())
}
