//! A model: a network, on one device or several, with all that belongs to it.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use candle_core::{DType, Device};
use tokio::sync::OnceCell;
use understudy_models::{
    Denoiser, Error, FixedBatch, Geometry,
    autoencoder::{Decoder, Encoder, Preview},
    checkpoint::{Lora, ModelFolder, Reader, card::Card},
    quantization::dtype_name,
    sampler::{Kind, Trajectory},
    schedule::ScheduleConfig,
    text::PromptEncoder,
};

use super::{
    forms::{Changes, Form, Forms},
    text::{NEGATIVE, Syntax, Text},
    trajectories::Trajectories,
};

use crate::engine::{
    CostModel, Embeddings, Tokens,
    batcher::ModelKey,
    stage::{PerStage, Stage},
};

/// The key of the next model in another form.
static NEXT_FORM: AtomicU64 = AtomicU64::new(u64::MAX);
/// A decode that takes no longer than that is never done in parts.
const SHORT_DECODE_SECONDS: f64 = 0.02;
/// What an autoencoder's way to latents costs of its way back: Stable Diffusion's has two layers a level, and three.
const ENCODING: f64 = 0.5;

/// A model that is ready to serve.
pub struct Model {
    /// Its folder's name (`owner--name` for a Hub model).
    pub id: String,
    /// This load of it; another load of the same folder has another key.
    pub key: ModelKey,
    /// Its model card, with defaults where the folder has none.
    pub card: Card,
    /// Shapes of its network.
    pub geometry: Geometry,
    /// Channels, height and width of its images.
    pub image: [usize; 3],
    /// What the sides of its images may be multiples of; nothing for a model of one size.
    pub size_multiple: Option<usize>,
    /// Why it makes none, where it does not.
    pub refusal: Option<String>,
    /// Its noise schedule.
    pub schedule: ScheduleConfig,
    /// Number of weights.
    pub parameters: usize,
    /// `f32`, `bf16`, `f16` or `int8`.
    pub dtype: &'static str,
    /// Unix seconds when it was loaded.
    pub created: u64,
    /// One for each of the engine's devices, in their order.
    replicas: Vec<Replica>,
    text: Option<Arc<Text>>,
    embeddings: Arc<Embeddings>,
    trajectories: Trajectories,
    /// The same model in other forms.
    forms: Forms<Self>,
    /// The same model with LoRAs.
    changed: Forms<Self, Changes>,
    origin: Origin,
    /// Whether the replicas have their image encoders.
    takes_images: OnceCell<()>,
}

/// Where a model comes from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// Its folder.
    pub folder: PathBuf,
    /// What is added to its weights, beside what its card names.
    pub loras: Vec<Lora>,
    /// The element type of its weights and activations.
    pub dtype: DType,
    /// Where its networks run: one on each.
    pub devices: Vec<Device>,
}

impl Origin {
    /// A folder as it is.
    pub fn new(folder: &Path, dtype: DType, devices: &[Device]) -> Self {
        let (folder, devices) = (folder.to_owned(), devices.to_vec());
        Self { folder, loras: Vec::new(), dtype, devices }
    }
}

/// The networks on one device.
pub struct Replica {
    network: Box<dyn Denoiser>,
    decoder: Option<Arc<Decoder>>,
    encoder: Option<Arc<PromptEncoder>>,
    /// Makes latents of images; loaded when it is first needed.
    image_encoder: OnceLock<Encoder>,
    preview: Option<Preview>,
    /// Whether all evaluations of the network have as many rows.
    padded: bool,
    /// What evaluations cost; replaced by the warm-up.
    costs: PerStage<Mutex<CostModel>>,
    /// In how many evaluations a latent is decoded.
    decode_parts: AtomicUsize,
}

impl Model {
    /// Reads a model folder, once for each device. What it costs is not known yet: it takes one row at a
    /// time until it is warmed up, or told.
    ///
    /// # Errors
    /// As [`ModelFolder::open`], [`ModelFolder::with_loras`] and [`ModelFolder::load`]; [`Error::Value`] for no device.
    pub fn load(origin: Origin, id: String, key: u64) -> understudy_models::Result<Self> {
        let Origin { folder, loras, dtype, devices } = &origin;
        let dtype = *dtype;
        let Some((first, others)) = devices.split_first() else {
            return Err(Error::value("device", "none", "name at least one"));
        };
        let read = |device| {
            let folder = ModelFolder::open(folder)?.with_loras(loras.iter().cloned())?;
            let refusal = folder.check_images().err().map(|error| error.to_string());
            let multiple = folder.size_multiple();
            let (image, pipeline) = (folder.image_shape(), folder.load(dtype, device)?);
            let (tokenizer, encoder) = pipeline
                .reader
                .map(|Reader { tokenizer, encoder, zero_empty_prompt }| {
                    ((tokenizer, zero_empty_prompt), encoder)
                })
                .unzip();
            let replica = Replica::new(pipeline.network, pipeline.decoder, encoder)?;
            let told = (pipeline.schedule, pipeline.card, image, multiple, refusal);
            Ok::<_, Error>((replica, tokenizer, told))
        };
        let (replica, tokenizer, (schedule, card, image, size_multiple, refusal)) = read(first)?;
        let length = replica.encoder().map_or(0, |encoder| encoder.tokens());
        let text = tokenizer
            .map(|(tokenizer, zeros)| Text::new(tokenizer, length, zeros).map(Arc::new))
            .transpose()?;
        let mut replicas = vec![replica];
        for device in others {
            replicas.push(read(device)?.0);
        }
        let network = replicas[0].network();
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Self {
            id,
            key: ModelKey(key),
            card,
            geometry: network.geometry().clone(),
            image,
            size_multiple,
            refusal,
            schedule,
            parameters: replicas[0].parameters(),
            dtype: dtype_name(dtype),
            created: since_epoch.map_or(0, |since| since.as_secs()),
            replicas,
            text,
            embeddings: Arc::default(),
            trajectories: Trajectories::default(),
            forms: Forms::default(),
            changed: Forms::default(),
            origin,
            takes_images: OnceCell::new(),
        })
    }

    /// Has it ready for requests that begin with an image, which those of a latent model need an encoder for: it is loaded on the
    /// blocking pool. Until its evaluations are observed, they are taken to cost half of a decoder's.
    ///
    /// # Errors
    /// As [`ModelFolder::load`].
    pub async fn take_images(self: &Arc<Self>) -> Result<(), Arc<Error>> {
        let load = async || {
            let model = Arc::clone(self);
            let loading = tokio::task::spawn_blocking(move || model.load_image_encoders()).await;
            loading.map_err(|error| Arc::new(super::forms::ended(&error)))?.map_err(Arc::new)
        };
        self.takes_images.get_or_try_init(load).await.copied()
    }

    /// Has it ready for requests that say prompts, whose text encoder's weights may not be in memory: they are read on the
    /// blocking pool, unless it is known what all of the prompts come to.
    ///
    /// # Errors
    /// As [`ModelFolder::load`].
    pub async fn take_prompts(self: &Arc<Self>, prompts: &[Tokens]) -> Result<(), Arc<Error>> {
        let lazy =
            self.replicas.iter().filter_map(|it| it.encoder.clone()).filter(|it| it.is_lazy());
        let lazy: Vec<Arc<PromptEncoder>> = lazy.collect();
        if lazy.is_empty() || prompts.iter().all(|it| self.embeddings.get(it).is_some()) {
            return Ok(());
        }
        let load = move || lazy.iter().try_for_each(|encoder| encoder.load());
        let loading = tokio::task::spawn_blocking(load).await;
        loading.map_err(|error| Arc::new(super::forms::ended(&error)))?.map_err(Arc::new)
    }

    /// Forgets the weights of text encoders that were not used for so long, where they can be read again; whether there were some.
    pub fn unload_idle_encoders(&self, idle: Duration) -> bool {
        let encoders = self.replicas.iter().filter_map(Replica::encoder);
        let unloaded = encoders.filter(|encoder| encoder.unload_if_idle(idle));
        unloaded.count() > 0
    }

    fn load_image_encoders(&self) -> understudy_models::Result<()> {
        let folder = ModelFolder::open(&self.origin.folder)?;
        let [_, height, width] = self.image;
        for replica in &self.replicas {
            let (dtype, device) = (self.origin.dtype, replica.network().device());
            let Some(encoder) = folder.image_encoder([height, width], dtype, device)? else {
                continue;
            };
            let cost = replica.cost(Stage::Decode).enlarged(ENCODING);
            replica.set_cost(Stage::Embed, cost);
            // Whoever was here before has set the same.
            let _ = replica.image_encoder.set(encoder);
        }
        Ok(())
    }

    /// The same model with LoRAs, which is made on the blocking pool if it is not kept. It has weights of its own; until its
    /// evaluations are observed they are taken to cost what this one's do.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub async fn with_loras(
        self: &Arc<Self>,
        loras: Vec<(String, Lora)>,
    ) -> Result<Arc<Self>, Arc<Error>> {
        if loras.is_empty() {
            return Ok(Arc::clone(self));
        }
        let named =
            loras.iter().map(|(name, lora)| (name.clone(), lora.scale().to_bits())).collect();
        let model = Arc::clone(self);
        let change = move || model.change(loras.into_iter().map(|(_, lora)| lora));
        self.changed.get(named, change).await
    }

    fn change(&self, loras: impl Iterator<Item = Lora>) -> understudy_models::Result<Self> {
        let mut origin = self.origin.clone();
        origin.loras.extend(loras);
        let key = NEXT_FORM.fetch_sub(1, Ordering::Relaxed);
        let mut changed = Self::load(origin, self.id.clone(), key)?;
        if self.on(0).padded() {
            changed = changed.padded(self.on(0).max_rows()[Stage::Denoise]);
        }
        for (replica, own) in changed.replicas.iter_mut().zip(&self.replicas) {
            // No LoRA changes one of T5's, which is too large to be there twice.
            if let (Some(encoder), Some(own)) =
                (replica.encoder.as_mut().and_then(Arc::get_mut), own.encoder())
            {
                encoder.share(own);
            }
            for stage in Stage::ALL {
                replica.set_cost(stage, own.cost(stage).clone());
            }
            replica.split_decode();
        }
        Ok(changed)
    }

    /// What its networks are compiled for.
    pub fn form(&self) -> Form {
        let [_, height, width] = self.image;
        let tokens = self.geometry.prompt.map_or(0, |prompt| prompt.tokens);
        let parts = self.text.as_ref().map_or(1, |text| text.parts(tokens).max(1));
        Form { size: [height, width], parts }
    }

    /// The form that draws after prompts, at a size or its own.
    pub fn form_for(&self, size: Option<[usize; 2]>, prompts: &[Tokens]) -> Form {
        let own = self.form();
        let told = self.text.as_ref().zip(prompts.first());
        let parts = told.map_or(own.parts, |(text, prompt)| text.parts(prompt.ids().len()));
        Form { size: size.unwrap_or(own.size), parts }
    }

    /// The same model in a form, which is compiled on the blocking pool if it is not kept.
    ///
    /// # Errors
    /// As [`Model::compiled`].
    pub async fn in_form(self: &Arc<Self>, form: Form) -> Result<Arc<Self>, Arc<Error>> {
        if form == self.form() {
            return Ok(Arc::clone(self));
        }
        let model = Arc::clone(self);
        self.forms.get(form, move || model.compiled(form)).await
    }

    /// The same model, compiled for another form. It shares weights, prompts and name; until evaluations are observed they
    /// are taken to cost what they do at its own size, for each pixel.
    ///
    /// # Errors
    /// [`Error::Value`] for a form that it cannot have, or that no memory holds.
    pub fn compiled(&self, form: Form) -> understudy_models::Result<Self> {
        let Form { size, parts } = form;
        let [channels, height, width] = self.image;
        if let Some(multiple) = self.size_multiple
            && !size.iter().all(|side| side.is_multiple_of(multiple))
        {
            let remedy = format!("sides must be multiples of {multiple}");
            return Err(Error::value("size", format!("{}x{}", size[1], size[0]), remedy));
        }
        let pixels = |[height, width]: [usize; 2]| (height * width) as f64;
        let factor = pixels(size) / pixels([height, width]);
        let scale = height / self.geometry.height;
        let tokens = self.geometry.prompt.map_or(0, |prompt| prompt.tokens);
        let tokens = tokens / self.form().parts * parts;
        let latent = size.map(|side| side / scale);
        let replicas = self.replicas.iter().map(|replica| replica.at(latent, tokens, factor));
        let replicas: Vec<Replica> = replicas.collect::<understudy_models::Result<_>>()?;
        Ok(Self {
            id: self.id.clone(),
            // Other than those that the registry counts, from 0.
            key: ModelKey(NEXT_FORM.fetch_sub(1, Ordering::Relaxed)),
            card: self.card.clone(),
            geometry: replicas[0].network().geometry().clone(),
            image: [channels, size[0], size[1]],
            size_multiple: self.size_multiple,
            refusal: self.refusal.clone(),
            schedule: self.schedule.clone(),
            parameters: self.parameters,
            dtype: self.dtype,
            created: self.created,
            replicas,
            text: self.text.clone(),
            embeddings: Arc::clone(&self.embeddings),
            trajectories: Trajectories::default(),
            forms: Forms::default(),
            changed: Forms::default(),
            origin: self.origin.clone(),
            takes_images: OnceCell::new(),
        })
    }

    /// The same model, whose evaluations on GPUs all have `rows` rows, so that the bits of an answer do not
    /// depend on the size of the batch. On a CPU they never do, and nothing is padded.
    #[must_use]
    pub fn padded(mut self, rows: usize) -> Self {
        let pad = |replica: Replica| {
            if replica.network.device().is_cpu() {
                return replica;
            }
            let network = Box::new(FixedBatch::new(replica.network, rows));
            Replica { network, padded: true, ..replica }
        };
        self.replicas = self.replicas.into_iter().map(pad).collect();
        self
    }

    /// The network on the engine's device of that number; every model has one on each.
    pub fn on(&self, device: usize) -> &Replica {
        &self.replicas[device]
    }

    /// How it reads prompts, where it draws after text.
    pub fn text(&self) -> Option<&Text> {
        self.text.as_deref()
    }

    /// The prompts of the rows of a request's evaluations: none for a model without text; one, or, where evaluations have
    /// two rows, one and what is guided away from. All have as many parts as the longest: the model that draws after
    /// them is the one in that form.
    ///
    /// # Errors
    /// [`Error::Value`] naming `prompt` or `negative_prompt`, and telling how many tokens it has where that is too many; those
    /// of a scale that the network has not learned, or of a negative prompt that it does not take.
    pub fn prompts(
        &self,
        prompt: &str,
        negative_prompt: &str,
        guidance_scale: f64,
        syntax: Syntax,
    ) -> understudy_models::Result<Vec<Tokens>> {
        self.check_guidance(negative_prompt, guidance_scale)?;
        let Some(text) = &self.text else { return Ok(Vec::new()) };
        let mut texts = vec![("prompt", prompt)];
        if guidance_scale != 1.0 && !self.geometry.guidance {
            texts.push((NEGATIVE, negative_prompt));
        }
        text.prompts(&texts, syntax)
    }

    /// What a request must leave alone of guidance, for a network that takes the scale as an input: scales that it has not
    /// learned, and what to be guided away from.
    ///
    /// # Errors
    /// [`Error::Value`] naming `guidance_scale` or `negative_prompt`.
    pub(crate) fn check_guidance(
        &self,
        negative_prompt: &str,
        guidance_scale: f64,
    ) -> understudy_models::Result<()> {
        self.card.check_scale(&self.id, guidance_scale)?;
        if self.geometry.guidance && !negative_prompt.is_empty() {
            let remedy = format!(
                "{} takes the guidance scale as an input and is guided away from nothing; leave it out",
                self.id
            );
            return Err(Error::value("negative_prompt", format!("{negative_prompt:.60?}"), remedy));
        }
        Ok(())
    }

    /// Whether guidance has something to be guided away from.
    pub fn guides(&self) -> bool {
        self.text.is_some() || self.card.null_class.is_some()
    }

    /// Whether what its network makes is decoded.
    pub fn decodes(&self) -> bool {
        self.replicas[0].decoder.is_some()
    }

    /// In how many evaluations its latents are decoded.
    pub fn decode_parts(&self) -> usize {
        self.replicas[0].decode_parts()
    }

    /// Whether its images go through a stage that is measured when it is loaded.
    pub fn has(&self, stage: Stage) -> bool {
        match stage {
            // One whose weights are read when it is first asked is asked by nobody before.
            Stage::Encode => self.replicas[0].encoder().is_some_and(|encoder| !encoder.is_lazy()),
            // Few images begin with another, so this is not measured before one does.
            Stage::Embed => false,
            Stage::Denoise => true,
            Stage::Decode => self.decodes(),
        }
    }

    /// What its prompts came to.
    pub(crate) fn embeddings(&self) -> &Embeddings {
        &self.embeddings
    }

    /// Guidance of who does not say: the card's, else none.
    pub fn default_guidance(&self) -> f64 {
        self.card.defaults.guidance_scale.unwrap_or(1.0)
    }

    /// Steps of who does not say: the card's, else 50, or all the schedule has where those are fewer.
    pub fn default_steps(&self) -> usize {
        self.card.steps(&self.schedule)
    }

    /// The sampler of who does not say: the card's, else the one that fits the schedule's class.
    pub fn default_scheduler(&self) -> Kind {
        self.card.sampler(&self.schedule)
    }

    /// The steps of a sampler, from noise to a sample; `eta` is the share of fresh noise, 0 to 1.
    ///
    /// # Errors
    /// As [`understudy_models::sampler::trajectory`].
    pub fn trajectory(
        &self,
        kind: Kind,
        steps: usize,
        eta: f64,
    ) -> understudy_models::Result<Trajectory> {
        let learned = self.geometry.learned_variance();
        self.trajectories.get(&self.schedule, (kind, steps, eta), learned)
    }
}

impl Replica {
    fn new(
        network: Box<dyn Denoiser>,
        decoder: Option<Decoder>,
        encoder: Option<PromptEncoder>,
    ) -> understudy_models::Result<Self> {
        let preview = decoder.as_ref().map(Preview::fit).transpose()?;
        let costs = PerStage::new(|_| Mutex::new(CostModel::new(vec![(1, 0.0)], None)));
        let (decoder, encoder) = (decoder.map(Arc::new), encoder.map(Arc::new));
        let decode_parts = AtomicUsize::new(1);
        let image_encoder = OnceLock::new();
        Ok(Self {
            network,
            decoder,
            encoder,
            image_encoder,
            preview,
            padded: false,
            costs,
            decode_parts,
        })
    }

    /// The same at another size of latents, whose evaluations cost so many times as much, and for prompts of so many tokens.
    fn at(
        &self,
        latent: [usize; 2],
        tokens: usize,
        factor: f64,
    ) -> understudy_models::Result<Self> {
        let one = || Error::value("size", format!("{latent:?}"), "the model has one size");
        let costs = PerStage::new(|stage| {
            let cost = self.cost(stage).clone();
            Mutex::new(if stage == Stage::Encode { cost } else { cost.enlarged(factor) })
        });
        let decoder = self.decoder.as_ref().map(|decoder| match decoder.latent_shape() {
            [_, height, width] if [height, width] == latent => Ok(Arc::clone(decoder)),
            _ => decoder.at(latent).map(Arc::new),
        });
        let replica = Self {
            network: self.network.at(latent, tokens).ok_or_else(one)??,
            decoder: decoder.transpose()?,
            encoder: self.encoder.clone(),
            image_encoder: OnceLock::new(),
            preview: self.preview.clone(),
            padded: self.padded,
            costs,
            decode_parts: AtomicUsize::new(1),
        };
        replica.split_decode();
        Ok(replica)
    }

    /// Has decodes hold the device no longer than the longest evaluation of the network does, by what both cost now: fewer
    /// samples share one, and what one takes too long for is done in parts, where it can be.
    pub(crate) fn split_decode(&self) {
        let Some(decoder) = &self.decoder else { return };
        let longest = {
            let denoise = self.cost(Stage::Denoise);
            denoise.seconds(denoise.max_rows()).max(SHORT_DECODE_SECONDS)
        };
        let mut decode = self.cost(Stage::Decode);
        decode.shorten(longest);
        if decoder.stretches() {
            let parts = (decode.seconds(1) / longest).ceil().max(1.0);
            self.decode_parts.store(parts as usize, Ordering::Relaxed);
        }
    }

    /// Has a text encoder that nobody asks before a prompt is said cost what its size tells beside the network's, until its
    /// evaluations are observed.
    pub(crate) fn guess_encode(&self) {
        let Some(encoder) = self.encoder().filter(|encoder| encoder.is_lazy()) else { return };
        let geometry = self.network.geometry();
        let weights = encoder.parameters() as f64 / self.network.parameters() as f64;
        // A prompt of half the tokens that there may be, and latents in patches of 2×2.
        let tokens = 2.0 * encoder.tokens() as f64 / (geometry.height * geometry.width) as f64;
        let cost = self.cost(Stage::Denoise).enlarged(weights * tokens);
        self.set_cost(Stage::Encode, cost);
    }

    /// In how many evaluations a latent is decoded; where there are several each is of one sample.
    pub fn decode_parts(&self) -> usize {
        self.decode_parts.load(Ordering::Relaxed)
    }

    /// Most rows an evaluation has, by stage.
    pub fn max_rows(&self) -> PerStage<usize> {
        PerStage::new(|stage| match stage {
            Stage::Decode if self.decode_parts() > 1 => 1,
            _ => self.cost(stage).max_rows(),
        })
    }

    /// Predicted seconds of one evaluation of so many rows; of a decode in parts, of one of these.
    pub fn evaluation_seconds(&self, stage: Stage, rows: usize) -> f64 {
        self.cost(stage).seconds(rows) / self.parts(stage)
    }

    fn parts(&self, stage: Stage) -> f64 {
        if stage == Stage::Decode { self.decode_parts() as f64 } else { 1.0 }
    }

    /// Number of weights of all its networks.
    fn parameters(&self) -> usize {
        let decoder = self.decoder.as_ref().map_or(0, |decoder| decoder.parameters());
        let encoder = self.encoder.as_ref().map_or(0, |encoder| encoder.parameters());
        self.network.parameters() + decoder + encoder
    }

    /// For the thread of its device alone.
    pub(crate) fn network(&self) -> &dyn Denoiser {
        self.network.as_ref()
    }

    /// Makes images of what the network makes; for the thread of its device alone.
    pub(crate) fn decoder(&self) -> Option<&Decoder> {
        self.decoder.as_deref()
    }

    /// Reads prompts; for the thread of its device alone.
    pub(crate) fn encoder(&self) -> Option<&PromptEncoder> {
        self.encoder.as_deref()
    }

    /// Makes latents of images, once [`Model::take_images`] has ended; for the thread of its device alone.
    pub(crate) fn image_encoder(&self) -> Option<&Encoder> {
        self.image_encoder.get()
    }

    /// Shows latents on their way; for the thread of its device alone.
    pub(crate) fn preview(&self) -> Option<&Preview> {
        self.preview.as_ref()
    }

    /// Whether all evaluations of the network have as many rows.
    pub(crate) fn padded(&self) -> bool {
        self.padded
    }

    pub(crate) fn observe(&self, stage: Stage, rows: usize, seconds: f64) {
        self.cost(stage).observe(rows, seconds * self.parts(stage));
    }

    pub(crate) fn set_cost(&self, stage: Stage, cost: CostModel) {
        *self.cost(stage) = cost;
    }

    /// As [`CostModel::shrink`]; gives the new limit.
    pub(crate) fn shrink(&self, stage: Stage, rows: usize) -> usize {
        let mut cost = self.cost(stage);
        cost.shrink(rows);
        cost.max_rows()
    }

    fn cost(&self, stage: Stage) -> MutexGuard<'_, CostModel> {
        self.costs[stage].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("id", &self.id)
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
impl Replica {
    pub(crate) fn decode_in(&self, parts: usize) {
        self.decode_parts.store(parts, Ordering::Relaxed);
    }
}

#[cfg(test)]
impl Model {
    /// A model around one network per device, costing `seconds` per evaluation however many rows it has.
    pub(crate) fn for_test(
        networks: Vec<Box<dyn Denoiser>>,
        schedule: ScheduleConfig,
        card: Card,
        key: u64,
        max_rows: usize,
        seconds: f64,
    ) -> std::sync::Arc<Self> {
        let points = vec![(1, seconds), (max_rows.max(2), seconds)];
        let replica = |network| {
            let replica = Replica::new(network, None, None).expect("nothing to fit");
            replica.set_cost(Stage::Denoise, CostModel::new(points.clone(), Some(max_rows)));
            replica
        };
        let replicas: Vec<Replica> = networks.into_iter().map(replica).collect();
        std::sync::Arc::new(Self {
            id: format!("model-{key}"),
            key: ModelKey(key),
            card,
            geometry: replicas[0].network().geometry().clone(),
            image: [1, 2, 2],
            size_multiple: None,
            refusal: None,
            schedule,
            parameters: replicas[0].network().parameters(),
            dtype: "f32",
            created: 0,
            replicas,
            text: None,
            embeddings: Arc::default(),
            trajectories: Trajectories::default(),
            forms: Forms::default(),
            changed: Forms::default(),
            origin: Origin::new(Path::new(""), DType::F32, &[Device::Cpu]),
            takes_images: OnceCell::new(),
        })
    }

    /// The model in a folder, on the CPU.
    pub(crate) fn from_folder_for_test(folder: &Path) -> std::sync::Arc<Self> {
        let origin = Origin::new(folder, DType::F32, &[Device::Cpu]);
        let model = Self::load(origin, "model".into(), 0);
        std::sync::Arc::new(model.expect("a model folder"))
    }
}
