//! A model folder in the diffusers layout.
//!
//! ```text
//! model_index.json                 pipeline and component classes
//! unet/config.json                 _class_name: UNet2DModel (transformer/: DiTTransformer2DModel)
//! unet/diffusion_pytorch_model.safetensors
//! scheduler/scheduler_config.json
//! vae/ (vqvae/)                    of a latent model: config.json and weights of its autoencoder
//! text_encoder/ tokenizer/         of a text-to-image model
//! understudy.json                  the model card (optional)
//! ```
//!
//! Early diffusers folders have the network's and the scheduler's files beside `model_index.json`; those
//! are read too.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};

use super::{
    around,
    card::{CARD, Card},
    file::{read_json, read_text},
    parts::{Part, Parts, shown},
    read,
    weight_files::{self, DIFFUSERS},
};
use crate::{
    Denoiser, Error, NetworkConfig, Result,
    autoencoder::{AutoencoderConfig, Decoder},
    quantization::{self, Quantization},
    schedule::ScheduleConfig,
    text::{TextEncoder, TextEncoderConfig, Tokenizer},
    weight::Weight,
};

pub(super) const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

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
    /// A latent model's autoencoder.
    pub autoencoder: Option<Part<AutoencoderConfig>>,
    /// A text-to-image model's text encoder.
    pub text_encoder: Option<Part<TextEncoderConfig>>,
    tokenizer: PathBuf,
    /// Where `config.json` and the weights of the network are.
    folder: PathBuf,
    /// Components that have no part in making images.
    idle: Vec<String>,
}

/// A model on a device: the network, what is around it, and what belongs to it.
pub struct Pipeline {
    /// The network.
    pub network: Box<dyn Denoiser>,
    /// Makes images of a latent model's samples.
    pub decoder: Option<Decoder>,
    /// Reads the prompts of a text-to-image model.
    pub reader: Option<Reader>,
    /// The noise schedule.
    pub schedule: ScheduleConfig,
    /// The model card.
    pub card: Card,
}

/// What a text-to-image model reads prompts with.
pub struct Reader {
    /// From text to tokens.
    pub tokenizer: Tokenizer,
    /// From tokens to the hidden states that the network is told.
    pub encoder: TextEncoder,
}

impl ModelFolder {
    /// Reads everything but the weights.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file; [`Error::Value`] naming the field that cannot
    /// be honoured.
    pub fn open(path: &Path) -> Result<Self> {
        let Parts { network: component_name, autoencoder, text, idle } = Parts::read(path)?;
        let network_path = component(path, component_name, "config.json");
        let file = shown(&network_path);
        let network = NetworkConfig::from_json(&read_json(&network_path)?, &file)?;
        let network = fitted(network, autoencoder.as_ref(), text.as_ref().map(|it| &it.0), &file)?;
        let schedule_path = component(path, "scheduler", "scheduler_config.json");
        let schedule =
            ScheduleConfig::from_text(&read_text(&schedule_path)?, &shown(&schedule_path))?;
        let card = read_card(&path.join(CARD), &network)?;
        card.check(&network, &schedule, &path.join(CARD))?;
        let folder = network_path.parent().unwrap_or(path).to_owned();
        let (text_encoder, tokenizer) = text.unzip();
        let tokenizer = tokenizer.unwrap_or_default();
        let path = path.to_owned();
        Ok(Self {
            path,
            network,
            schedule,
            card,
            autoencoder,
            text_encoder,
            tokenizer,
            folder,
            idle,
        })
    }

    /// As [`ModelFolder::open`], of a model that makes images: what every command that draws any opens.
    ///
    /// # Errors
    /// Those, and [`Error::Value`] naming the field of the network's configuration that tells of other things than
    /// images.
    pub fn open_for_images(path: &Path) -> Result<Self> {
        let folder = Self::open(path)?;
        folder.check_images().map_err(|error| folder.at_config(error))?;
        Ok(folder)
    }

    /// Refuses a model that does not make images: see [`crate::Geometry::check_images`].
    ///
    /// # Errors
    /// [`Error::Value`] naming the field of the network's `config.json`.
    pub fn check_images(&self) -> Result<()> {
        let geometry = self.network.geometry();
        geometry.check_images(self.autoencoder.is_some(), self.text_encoder.is_some())?;
        match self.image_shape() {
            [1 | 3, ..] => Ok(()),
            [channels, ..] => {
                let remedy = "the autoencoder must make 1 (gray) or 3 (RGB) channels";
                Err(Error::value("out_channels", channels, remedy))
            }
        }
    }

    /// Channels, height and width of the images it makes.
    pub fn image_shape(&self) -> [usize; 3] {
        let geometry = self.network.geometry();
        match &self.autoencoder {
            None => [geometry.in_channels, geometry.height, geometry.width],
            Some(Part { config, .. }) => {
                let factor = config.factor();
                [config.image_channels(), geometry.height * factor, geometry.width * factor]
            }
        }
    }

    /// What the sides of its images may be multiples of; nothing for a model of one size.
    pub fn size_multiple(&self) -> Option<usize> {
        let tokens = self.network.geometry().prompt.map_or(0, |prompt| prompt.tokens);
        let factor = self.autoencoder.as_ref().map_or(1, |part| part.config.factor());
        // Levels halve a sample, so its sides are multiples of a power of two.
        let steps = (0..usize::BITS).map(|power| 1 << power).take_while(|step| *step <= 1 << 12);
        let takes = |step: &usize| self.network.at([*step, *step], tokens).map(|at| at.is_ok());
        let mut possible = steps.filter_map(|step| Some((step, takes(&step)?)));
        possible.find(|(_, takes)| *takes).map(|(step, _)| factor * step)
    }

    /// The files that hold the network's weights: one, or the shards that an index beside it names. They need not
    /// exist.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the index.
    pub fn weight_files(&self) -> Result<Vec<PathBuf>> {
        DIFFUSERS.files(&self.folder)
    }

    /// As [`ModelFolder::weight_files`], of all components.
    ///
    /// # Errors
    /// As there.
    pub fn all_weight_files(&self) -> Result<Vec<PathBuf>> {
        let mut files = self.weight_files()?;
        if let Some(part) = &self.autoencoder {
            files.extend(part.weight_files()?);
        }
        if let Some(part) = &self.text_encoder {
            files.extend(part.weight_files()?);
        }
        Ok(files)
    }

    /// The codes of the network's weights; nothing where it is not quantised.
    ///
    /// # Errors
    /// As [`Quantization::read`].
    pub fn quantization(&self) -> Result<Option<Quantization>> {
        let path = self.folder.join(quantization::FILE);
        // A link that leads nowhere is there, and is read to say so.
        path.symlink_metadata().is_ok().then(|| Quantization::read(&path)).transpose()
    }

    /// Reads the weights and builds the model; with [`quantization::INT8`], on the CPU, one with products of 8 bits.
    /// Components that have no part in making images are named in the log.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] for a corrupt file, [`Error::Weights`] naming what is missing, extra or of the
    /// wrong shape; [`Error::Value`] naming the field that asks for more memory than there is, and where products of 8 bits
    /// are asked of a model that is not quantised.
    pub fn load(self, dtype: DType, device: &Device) -> Result<Pipeline> {
        if !self.idle.is_empty() {
            let components = self.idle.join(", ");
            tracing::info!(model = %self.path.display(), components, "components that are not run");
        }
        let (network, dtype) = match dtype {
            quantization::INT8 => {
                let Some(quantization) = self.quantization()? else {
                    let remedy = format!(
                        "{} is not quantised; run `understudy quantize` first, or use f32",
                        self.path.display()
                    );
                    return Err(Error::value("dtype", "int8", remedy));
                };
                (self.network.load_codes(self.weights()?, quantization), DType::F32)
            }
            dtype => (self.network.load_weights(self.weights()?, dtype, device), dtype),
        };
        let network = network.map_err(|error| match error {
            Error::Weights(problem) => Error::Format { path: self.folder.join(WEIGHTS), problem },
            Error::Value { ref field, .. }
                if self.network.size_fields().contains(&field.as_str()) =>
            {
                self.at_config(error)
            }
            error => error,
        })?;
        Ok(Pipeline {
            decoder: self.decoder(dtype, device)?,
            reader: self.reader(dtype, device)?,
            network,
            schedule: self.schedule,
            card: self.card,
        })
    }

    /// What makes images of a latent model's samples.
    ///
    /// # Errors
    /// As [`ModelFolder::load`].
    pub fn decoder(&self, dtype: DType, device: &Device) -> Result<Option<Decoder>> {
        let Some(part) = &self.autoencoder else { return Ok(None) };
        let geometry = self.network.geometry();
        let names = || part.config.weight_shapes().into_keys().collect();
        let weights = taken(weight_files::open(&part.weight_files()?, names)?)?;
        let latent = [geometry.height, geometry.width];
        let decoder = part.config.decoder(weights, latent, dtype, device);
        decoder.map(Some).map_err(|error| at_part(&part.folder, error))
    }

    /// What a text-to-image model reads prompts with.
    ///
    /// # Errors
    /// As [`ModelFolder::load`].
    pub fn reader(&self, dtype: DType, device: &Device) -> Result<Option<Reader>> {
        let (Some(part), Some(tokenizer)) = (&self.text_encoder, self.tokenizer()?) else {
            return Ok(None);
        };
        let names = || part.config.weight_shapes().into_keys().collect();
        let weights = taken(weight_files::open(&part.weight_files()?, names)?)?;
        // A prompt is read once, an image is many evaluations: f32 is fast enough for it on a CPU.
        let dtype = if device.is_cpu() { DType::F32 } else { dtype };
        let encoder = part.config.load(weights, dtype, device);
        let encoder = encoder.map_err(|error| at_part(&part.folder, error))?;
        Ok(Some(Reader { tokenizer, encoder }))
    }

    /// What turns a text-to-image model's prompts into tokens.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file, also where it knows more tokens than the text encoder.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        let Some(part) = &self.text_encoder else { return Ok(None) };
        let tokenizer = Tokenizer::open(&self.tokenizer)?;
        let (known, most) = (tokenizer.vocabulary(), part.config.vocabulary());
        if known > most {
            return Err(Error::Format {
                path: self.tokenizer.clone(),
                problem: format!(
                    "has {known} tokens, and the text encoder knows {most} (vocab_size); use the tokenizer that belongs \
                     to it"
                ),
            });
        }
        Ok(Some(tokenizer))
    }

    /// The files that decide what a prompt comes to: tokenizer, text encoder and its weights. None of a model that reads
    /// no text.
    ///
    /// # Errors
    /// As [`ModelFolder::weight_files`].
    pub fn reader_files(&self) -> Result<Vec<PathBuf>> {
        let Some(part) = &self.text_encoder else { return Ok(Vec::new()) };
        let mut files = around::tokenizer_files(&self.tokenizer);
        files.push(part.folder.join("config.json"));
        files.extend(part.weight_files()?);
        Ok(files)
    }

    /// An error about a field, as one of the network's `config.json`.
    fn at_config(&self, error: Error) -> Error {
        at_part(&self.folder, error)
    }

    /// Reads the network's weights as they are in the files, on the CPU.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] for a corrupt file.
    pub fn tensors(&self) -> Result<HashMap<String, Tensor>> {
        taken(self.weights()?)
    }

    fn weights(&self) -> Result<HashMap<String, Weight>> {
        let names = || self.network.weight_shapes().into_keys().collect();
        weight_files::open(&self.weight_files()?, names)
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

fn taken(weights: HashMap<String, Weight>) -> Result<HashMap<String, Tensor>> {
    weights.into_iter().map(|(name, weight)| Ok((name, weight.take()?))).collect()
}

/// An error about a component, with the file that it is about.
fn at_part(folder: &Path, error: Error) -> Error {
    let file = folder.join("config.json");
    match error {
        Error::Weights(problem) => Error::Format { path: folder.to_owned(), problem },
        Error::Value { field, value, remedy } => {
            Error::value(format!("{}: {field}", file.display()), value, remedy)
        }
        error => error,
    }
}

/// The network as its text encoder speaks to it, once what is around it fits.
fn fitted(
    network: NetworkConfig,
    autoencoder: Option<&Part<AutoencoderConfig>>,
    text: Option<&Part<TextEncoderConfig>>,
    file: &str,
) -> Result<NetworkConfig> {
    let geometry = network.geometry();
    let made = autoencoder.map(|part| part.config.latent_channels());
    if let Some(made) = made.filter(|&made| made != geometry.in_channels) {
        let remedy = format!(
            "the autoencoder makes latents of {made} channels, which it must be; a network that is told an image \
             beside them, as one for inpainting is, is not supported"
        );
        return Err(Error::value(format!("{file}: in_channels"), geometry.in_channels, remedy));
    }
    let (Some(prompt), Some(Part { config, .. })) = (geometry.prompt, text) else {
        return Ok(network);
    };
    if prompt.width != config.width() {
        let remedy = format!(
            "must be {}, the hidden_size of the text encoder; use the text encoder that belongs to the network",
            config.width()
        );
        return Err(Error::value(format!("{file}: cross_attention_dim"), prompt.width, remedy));
    }
    let resized = network.at([geometry.height, geometry.width], config.tokens());
    resized.unwrap_or(Ok(network))
}

fn read_card(path: &Path, network: &NetworkConfig) -> Result<Card> {
    // A link that leads nowhere is there, and is read to say so.
    if path.symlink_metadata().is_err() {
        return Ok(Card { null_class: network.null_class(), ..Card::default() });
    }
    read::json(path)
}
