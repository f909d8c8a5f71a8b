//! A model folder in the diffusers layout.
//!
//! ```text
//! model_index.json                 pipeline and component classes
//! unet/config.json                 _class_name: UNet2DModel (transformer/: DiTTransformer2DModel)
//! unet/diffusion_pytorch_model.safetensors
//! scheduler/scheduler_config.json
//! vae/ (vqvae/)                    of a latent model: config.json and weights of its autoencoder
//! guide/                           a whole model folder, where the card says `autoguidance`
//! text_encoder/ tokenizer/         of a text-to-image model; Stable Diffusion XL has text_encoder_2/ and tokenizer_2/, too,
//!                                  Stable Diffusion 3 these and, where it has T5, text_encoder_3/ and tokenizer_3/
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
    card::{Autoguidance, CARD, Card},
    file::{read_json, read_text},
    joint,
    lora::{self, Lora},
    parts::{Part, Parts, TEXT_ENCODERS, TextConfig, TextPart, shown},
    read, t5,
    weight_files::{self, DIFFUSERS},
};
use crate::{
    Autoguided, Conditioning, Denoiser, Error, NetworkConfig, Result,
    autoencoder::{AutoencoderConfig, Decoder, Encoder},
    quantization::{self, Quantization},
    schedule::ScheduleConfig,
    text::{
        PromptEncoder, Tokenizer,
        clip::{self, ClipConfig, ClipEncoder},
    },
    weight::Weight,
    weights::Shapes,
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
    /// A text-to-image model's text encoders: one, or two or three that read the same prompt.
    pub text_encoders: Vec<TextPart>,
    /// Whether an empty negative prompt is told as zeros instead of being read.
    pub zero_empty_prompt: bool,
    /// Where `config.json` and the weights of the network are.
    folder: PathBuf,
    /// Components that have no part in making images.
    idle: Vec<String>,
    /// What is added to its weights when they are read.
    loras: Vec<Lora>,
    /// The worse model that guides it, and how far.
    guide: Option<(Box<ModelFolder>, f64)>,
}

/// The folder of the guide in a model's.
const GUIDE: &str = "guide";

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
    pub encoder: PromptEncoder,
    /// Whether an empty negative prompt is told as zeros instead of being read.
    pub zero_empty_prompt: bool,
}

impl ModelFolder {
    /// Reads everything but the weights.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file; [`Error::Value`] naming the field that cannot
    /// be honoured.
    pub fn open(path: &Path) -> Result<Self> {
        Self::read(path)?.with_own_guide()
    }

    /// As [`ModelFolder::open`], without what guides it.
    fn read(path: &Path) -> Result<Self> {
        let Parts { network: component_name, autoencoder, text, zero_empty_prompt, idle } =
            Parts::read(path)?;
        let network_path = component(path, component_name, "config.json");
        let file = shown(&network_path);
        let network = NetworkConfig::from_json(&read_json(&network_path)?, &file)?;
        let network = fitted(network, autoencoder.as_ref(), &text, &file)?;
        let schedule_path = component(path, "scheduler", "scheduler_config.json");
        let schedule =
            ScheduleConfig::from_text(&read_text(&schedule_path)?, &shown(&schedule_path))?;
        let card = read_card(&path.join(CARD), &network)?;
        card.check(&network, &schedule, &path.join(CARD))?;
        let folder = network_path.parent().unwrap_or(path).to_owned();
        let path = path.to_owned();
        Self {
            path,
            network,
            schedule,
            card,
            autoencoder,
            text_encoders: text,
            zero_empty_prompt,
            folder,
            idle,
            loras: Vec::new(),
            guide: None,
        }
        .with_own_loras()
    }

    /// Reads the description of the model that the card is guided by.
    fn with_own_guide(mut self) -> Result<Self> {
        let Some(Autoguidance { scale }) = self.card.autoguidance else { return Ok(self) };
        let guide = Self::read(&self.path.join(GUIDE))?;
        let refuse = |field: &str, own: String, value: String| {
            let field = format!("{}: {field}", guide.path.display());
            Err(Error::value(
                field,
                value,
                format!("must be {own}, as of the model that it guides"),
            ))
        };
        let (own, other) = (self.network.geometry(), guide.network.geometry());
        if own != other {
            return refuse("network", format!("{own:?}"), format!("{other:?}"));
        }
        // What an answer means, and at which noise.
        let (own, other) = (&self.schedule, &guide.schedule);
        let [predicts, told] = [own, other].map(|schedule| schedule.prediction_type().name());
        if predicts != told {
            return refuse("prediction_type", predicts.into(), told.into());
        }
        if !own.same_noise(other)? {
            let told = |schedule: &ScheduleConfig| schedule.to_json().to_string();
            return refuse("noise schedule", told(own), told(other));
        }
        if guide.card.autoguidance.is_some() {
            return refuse("autoguidance", "absent".into(), "there".into());
        }
        self.guide = Some((Box::new(guide), scale));
        Ok(self)
    }

    /// The worse model that guides it, and how far.
    pub fn guide(&self) -> Option<(&Self, f64)> {
        self.guide.as_ref().map(|(guide, scale)| (guide.as_ref(), *scale))
    }

    /// A network of this model's as its card has it guided.
    ///
    /// # Errors
    /// As [`ModelFolder::load`], of the guide.
    pub fn guided(
        &self,
        network: Box<dyn Denoiser>,
        dtype: DType,
        device: &Device,
    ) -> Result<Box<dyn Denoiser>> {
        let Some((guide, scale)) = &self.guide else { return Ok(network) };
        Ok(Box::new(Autoguided::new(network, guide.bare(dtype, device)?, *scale)))
    }

    /// Reads the LoRAs that the card names.
    fn with_own_loras(self) -> Result<Self> {
        let own = self.card.loras.iter();
        let own = own.map(|lora| Lora::open(&self.path.join(&lora.file), lora.scale));
        let own: Vec<Lora> = own.collect::<Result<_>>()?;
        self.with_loras(own)
    }

    /// The same model with LoRAs added to the weights of its network and text encoder, in their order, when these are read.
    ///
    /// # Errors
    /// [`Error::Format`] naming what in a LoRA's file fits no weight, or was made for one of another shape.
    pub fn with_loras(mut self, loras: impl IntoIterator<Item = Lora>) -> Result<Self> {
        let before = self.loras.len();
        self.loras.extend(loras);
        if self.loras.len() > before {
            let all: Vec<lora::Targets> =
                std::iter::once(self.targets()).chain(self.text_targets()).collect();
            let all: Vec<&lora::Targets> = all.iter().collect();
            self.loras[before..].iter().try_for_each(|lora| lora.check(&all))?;
        }
        Ok(self)
    }

    /// The network's weights that LoRAs may change.
    fn targets(&self) -> lora::Targets {
        lora::targets(lora::Component::Network, &self.network.weight_shapes())
    }

    /// Those of each text encoder.
    fn text_targets(&self) -> impl Iterator<Item = lora::Targets> {
        let of = |(number, part): (usize, &TextPart)| {
            // No LoRA is known that changes T5's.
            let shapes = match &part.encoder.config {
                TextConfig::Clip(config) => config.weight_shapes(),
                TextConfig::T5 { .. } => Shapes::new(),
            };
            lora::targets(lora::Component::TextEncoder(number), &shapes)
        };
        self.text_encoders.iter().enumerate().map(of)
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
        geometry.check_images(self.autoencoder.is_some(), self.reads_text())?;
        match self.image_shape() {
            [1 | 3, ..] => Ok(()),
            [channels, ..] => {
                let remedy = "the autoencoder must make 1 (gray) or 3 (RGB) channels";
                Err(Error::value("out_channels", channels, remedy))
            }
        }
    }

    /// Whether it draws after prompts.
    pub fn reads_text(&self) -> bool {
        !self.text_encoders.is_empty()
    }

    /// Whether its network's samples are images as they are: it has no autoencoder and reads no text.
    pub fn makes_pixels(&self) -> bool {
        self.autoencoder.is_none() && !self.reads_text()
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
        if let Some((guide, _)) = &self.guide {
            files.extend(guide.weight_files()?);
        }
        if let Some(part) = &self.autoencoder {
            files.extend(part.weight_files()?);
        }
        for part in &self.text_encoders {
            files.extend(part.encoder.weight_files()?);
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
        Ok(Pipeline {
            network: self.guided(self.bare(dtype, device)?, dtype, device)?,
            decoder: self.decoder(dtype, device)?,
            reader: self.reader(dtype, device)?,
            schedule: self.schedule,
            card: self.card,
        })
    }

    /// The network as it is, whatever guides it.
    fn bare(&self, dtype: DType, device: &Device) -> Result<Box<dyn Denoiser>> {
        let network = match dtype {
            quantization::INT8 => {
                let Some(quantization) = self.quantization()? else {
                    let remedy = format!(
                        "{} is not quantised; run `understudy quantize` first, or use f32",
                        self.path.display()
                    );
                    return Err(Error::value("dtype", "int8", remedy));
                };
                self.network.load_codes(self.weights()?, quantization)
            }
            dtype => self.network.load_weights(self.weights()?, dtype, device),
        };
        network.map_err(|error| match error {
            Error::Weights(problem) => Error::Format { path: self.folder.join(WEIGHTS), problem },
            Error::Value { ref field, .. }
                if self.network.size_fields().contains(&field.as_str()) =>
            {
                self.at_config(error)
            }
            error => error,
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
        let decoder = part.config.decoder(weights, latent, part_dtype(dtype), device);
        decoder.map(Some).map_err(|error| at_part(&part.folder, error))
    }

    /// What makes latents of images of a height and a width, of a latent model.
    ///
    /// # Errors
    /// As [`ModelFolder::load`].
    pub fn image_encoder(
        &self,
        image: [usize; 2],
        dtype: DType,
        device: &Device,
    ) -> Result<Option<Encoder>> {
        let Some(part) = &self.autoencoder else { return Ok(None) };
        let names = || part.config.weight_shapes().into_keys().collect();
        let weights = taken(weight_files::open(&part.weight_files()?, names)?)?;
        let encoder = part.config.encoder(weights, image, part_dtype(dtype), device);
        encoder.map(Some).map_err(|error| at_part(&part.folder, error))
    }

    /// The files that tell what the autoencoder does; none of a model without one.
    ///
    /// # Errors
    /// As [`ModelFolder::weight_files`].
    pub fn autoencoder_files(&self) -> Result<Vec<PathBuf>> {
        let Some(part) = &self.autoencoder else { return Ok(Vec::new()) };
        let mut files = vec![part.folder.join("config.json")];
        files.extend(part.weight_files()?);
        Ok(files)
    }

    /// What a text-to-image model reads prompts with.
    ///
    /// # Errors
    /// As [`ModelFolder::load`].
    pub fn reader(&self, dtype: DType, device: &Device) -> Result<Option<Reader>> {
        let [first, others @ ..] = &self.text_encoders[..] else { return Ok(None) };
        let Some(tokenizer) = self.tokenizer()? else { return Ok(None) };
        let dtype = part_dtype(dtype);
        let encoder = match (&first.encoder.config, others.first()) {
            (TextConfig::T5 { config, tokens }, _) => {
                let encoder = t5::encoder(config.clone(), &first.encoder.folder, device)?;
                PromptEncoder::t5(encoder, *tokens)
            }
            (TextConfig::Clip(config), None) => {
                PromptEncoder::clip(self.clip_encoder(0, config, dtype, device)?)
            }
            (TextConfig::Clip(config), Some(second)) => {
                let pad = second.pad_like(first)?;
                let first = self.clip_encoder(0, config, dtype, device)?;
                let TextConfig::Clip(config) = &second.encoder.config else {
                    // Refused where the index was read.
                    let class = "of another kind than the first";
                    return Err(Error::value("text_encoder_2", class, "must be one of CLIP's"));
                };
                let second = self.clip_encoder(1, config, dtype, device)?;
                match (&self.network, self.network.geometry().prompt) {
                    (NetworkConfig::SD3(_), Some(prompt)) => {
                        let t5 = joint::t5(others.get(1), device)?;
                        PromptEncoder::joint(first, (second, pad), t5, prompt.width)
                    }
                    _ => PromptEncoder::two_clips(first, second, pad),
                }
            }
        };
        Ok(Some(Reader { tokenizer, encoder, zero_empty_prompt: self.zero_empty_prompt }))
    }

    fn clip_encoder(
        &self,
        number: usize,
        config: &ClipConfig,
        dtype: DType,
        device: &Device,
    ) -> Result<ClipEncoder> {
        let part = &self.text_encoders[number].encoder;
        let names = || config.weight_shapes().into_keys().collect();
        let weights = match self.changed_text_encoder(number)? {
            Some(changed) => changed,
            None => taken(weight_files::open(&part.weight_files()?, names)?)?,
        };
        config.load(weights, dtype, device).map_err(|error| at_part(&part.folder, error))
    }

    /// What turns a text-to-image model's prompts into tokens.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file, also where it knows more tokens than the text encoder.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        match (&self.network, &self.text_encoders[..]) {
            (NetworkConfig::SD3(_), [first, _, others @ ..]) => {
                joint::tokenizer(first, others.first()).map(Some)
            }
            (_, parts) => parts.first().map(TextPart::tokenizer).transpose(),
        }
    }

    /// The files that decide what a prompt comes to: tokenizer, text encoder and its weights. None of a model that reads
    /// no text.
    ///
    /// # Errors
    /// As [`ModelFolder::weight_files`].
    pub fn reader_files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for TextPart { encoder, tokenizer } in &self.text_encoders {
            files.extend(around::tokenizer_files(tokenizer));
            files.push(encoder.folder.join("config.json"));
            files.extend(encoder.weight_files()?);
        }
        files.extend(self.loras.iter().map(|lora| lora.path().to_owned()));
        Ok(files)
    }

    /// The text encoders that a LoRA changes, by their names, and their weights.
    ///
    /// # Errors
    /// As [`ModelFolder::tensors`].
    pub(super) fn changed_text_encoders(
        &self,
    ) -> Result<Vec<(&'static str, HashMap<String, Tensor>)>> {
        let changed = TEXT_ENCODERS.into_iter().enumerate().map(|(number, name)| {
            Ok(self.changed_text_encoder(number)?.map(|weights| (name, weights)))
        });
        changed.filter_map(Result::transpose).collect()
    }

    /// The weights of a text encoder where a LoRA changes them, and so they are in none of the folder's files.
    ///
    /// # Errors
    /// As [`ModelFolder::tensors`].
    fn changed_text_encoder(&self, number: usize) -> Result<Option<HashMap<String, Tensor>>> {
        if self.loras.is_empty() {
            return Ok(None);
        }
        let (Some(TextPart { encoder: part, .. }), Some(targets)) =
            (self.text_encoders.get(number), self.text_targets().nth(number))
        else {
            return Ok(None);
        };
        if !self.loras.iter().any(|lora| lora.changes(&targets)) {
            return Ok(None);
        }
        let names = || part.config.weight_shapes().into_keys().collect();
        let mut weights = clip::renamed(weight_files::open(&part.weight_files()?, names)?);
        self.loras.iter().for_each(|lora| lora.merge(&targets, &mut weights));
        taken(weights).map(Some)
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
        let mut weights = weight_files::open(&self.weight_files()?, names)?;
        if !self.loras.is_empty() {
            let targets = self.targets();
            self.loras.iter().for_each(|lora| lora.merge(&targets, &mut weights));
        }
        Ok(weights)
    }
}

/// The type of what is around a network: products of 8 bits are the network's alone.
fn part_dtype(dtype: DType) -> DType {
    if dtype == quantization::INT8 { DType::F32 } else { dtype }
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
    text: &[TextPart],
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
    let network = match autoencoder {
        Some(part) => network.with_factor(part.config.factor())?,
        None => network,
    };
    let (Some(prompt), Some(first)) = (geometry.prompt, text.first()) else {
        return Ok(network);
    };
    if let NetworkConfig::SD3(_) = &network {
        return joint::fitted(network, text, file);
    }
    let first = &first.encoder.config;
    let second = text.get(1).map(|part| &part.encoder.config);
    let width = first.width() + second.map_or(0, TextConfig::width);
    if prompt.width != width {
        let what = match second {
            None => format!("the {} of the text encoder", first.width_field()),
            Some(_) => "the hidden_sizes of both text encoders together".into(),
        };
        let remedy =
            format!("must be {width}, {what}; use the text encoder that belongs to the network");
        let field = format!("{file}: {}", network.prompt_field());
        return Err(Error::value(field, prompt.width, remedy));
    }
    let pooled = match geometry.conditioning {
        Conditioning::TextTime { text, .. } => Some(text),
        _ => None,
    };
    let made = second.and_then(TextConfig::pooled);
    if pooled != made {
        let told = |width: Option<usize>| match width {
            Some(width) => format!("a pooled text of {width} numbers"),
            None => "no pooled text".to_owned(),
        };
        let remedy = format!(
            "the text encoders make {}: with a text_encoder_2 the network must take what that one pools, and without one none",
            told(made)
        );
        return Err(Error::value(format!("{file}: addition_embed_type"), told(pooled), remedy));
    }
    if let Some(second) = second.filter(|second| second.tokens() != first.tokens()) {
        let remedy = format!("must be {}, as of text_encoder", first.tokens());
        let field = "text_encoder_2: max_position_embeddings";
        return Err(Error::value(field, second.tokens(), remedy));
    }
    let resized = network.at([geometry.height, geometry.width], first.tokens());
    resized.unwrap_or(Ok(network))
}

fn read_card(path: &Path, network: &NetworkConfig) -> Result<Card> {
    // A link that leads nowhere is there, and is read to say so.
    if path.symlink_metadata().is_err() {
        return Ok(Card { null_class: network.null_class(), ..Card::default() });
    }
    read::json(path)
}
