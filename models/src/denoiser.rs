//! The one question every network answers.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::kernels::{Footprint, Timing};

/// What a network takes beside the noisy sample and its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conditioning {
    /// Nothing: an unconditional network.
    None,
    /// One of this many classes: `condition` is u32 `[B]`, each entry below the count.
    Classes(usize),
    /// A number that is embedded as the timestep is (`class_embed_type: "timestep"`): `condition` is f32 `[B]`.
    Timestep,
    /// An embedding of this width, added as it comes (`class_embed_type: "identity"`): `condition` is f32 `[B, width]`.
    Embedding(usize),
    /// A text as one vector, and numbers beside it that say what the image is (`addition_embed_type: "text_time"`, Podell
    /// et al. 2023, §2.2), or none (Esser et al. 2024, §4): `condition` is f32 `[B, text + numbers]`.
    TextTime {
        /// Numbers of the text's vector: what its encoders pool.
        text: usize,
        /// Numbers beside it, 0 where there are none: height and width that the image had, from where it was cut, and height and width it has, in pixels.
        numbers: usize,
    },
}

/// What a network is given with each sample of a batch beside the noisy sample and its time; all tensors are as its
/// [`Geometry`] says.
#[derive(Debug, Clone, Copy, Default)]
pub struct Conditions<'a> {
    /// A class, a number or an embedding, as [`Geometry::conditioning`] says.
    pub condition: Option<&'a Tensor>,
    /// The hidden states of a text encoder, f32 `[B, tokens, width]`, where [`Geometry::prompt`] is a prompt of so many. A
    /// network for prompts of any length (PixArt's) takes shorter ones with zeros after their last token, and sees none of
    /// these.
    pub prompt: Option<&'a Tensor>,
    /// Guidance scales less one, f32 `[B]` (w of Meng et al. 2023), where [`Geometry::guidance`] says so.
    pub guidance: Option<&'a Tensor>,
}

impl<'a> Conditions<'a> {
    /// A condition and nothing else.
    pub(crate) fn of(condition: Option<&'a Tensor>) -> Self {
        Self { condition, ..Self::default() }
    }
}

/// The prompts a network takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prompt {
    /// Tokens of each: a text encoder's answer is always as long.
    pub tokens: usize,
    /// Numbers of a token's hidden state.
    pub width: usize,
}

/// The shapes a network takes and gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Channels of the noisy sample.
    pub in_channels: usize,
    /// Channels of the answer: `in_channels`, or twice that with learned variance.
    pub out_channels: usize,
    /// Pixels, top to bottom.
    pub height: usize,
    /// Pixels, left to right.
    pub width: usize,
    /// What else the network takes.
    pub conditioning: Conditioning,
    /// The prompts it takes as well, where it draws after text.
    pub prompt: Option<Prompt>,
    /// Whether it takes a guidance scale, instead of being evaluated twice.
    pub guidance: bool,
}

impl Geometry {
    /// Whether the network tells a variance beside its prediction: it answers with twice its channels.
    pub fn learned_variance(&self) -> bool {
        self.in_channels.checked_mul(2) == Some(self.out_channels)
    }

    /// Refuses a network that does not make images: one whose conditioning is numbers instead of classes, or prompts where nothing
    /// reads them; whose answer is no prediction of its input; or whose samples are neither gray nor RGB, where nothing
    /// decodes them.
    ///
    /// # Errors
    /// [`crate::Error::Value`] naming the field of its `config.json`.
    pub fn check_images(&self, decodes: bool, reads: bool) -> crate::Result<()> {
        let refuse = |field: &str, value: String, remedy: String| {
            Err(crate::Error::value(
                field,
                value,
                format!("{remedy}; it makes no images by itself"),
            ))
        };
        match self.conditioning {
            Conditioning::None | Conditioning::Classes(_) | Conditioning::TextTime { .. } => {}
            Conditioning::Timestep => {
                return refuse(
                    "class_embed_type",
                    "timestep".into(),
                    "the network is conditioned on a second timestep, not on classes".into(),
                );
            }
            Conditioning::Embedding(width) => {
                return refuse(
                    "class_embed_type",
                    "identity".into(),
                    format!(
                        "the network is conditioned on embeddings of width {width}, not on classes"
                    ),
                );
            }
        }
        if let Some(Prompt { width, .. }) = self.prompt.filter(|_| !reads) {
            let remedy = "the network is conditioned on the hidden states of a text encoder, which the folder does not have";
            return refuse("cross_attention_dim", width.to_string(), remedy.into());
        }
        if !decodes && !matches!(self.in_channels, 1 | 3) {
            let remedy = "must be 1 (gray) or 3 (RGB)".into();
            return refuse("in_channels", self.in_channels.to_string(), remedy);
        }
        if self.out_channels != self.in_channels && !self.learned_variance() {
            let remedy = format!(
                "must be in_channels, {}, or twice that where the network learns its variance",
                self.in_channels
            );
            return refuse("out_channels", self.out_channels.to_string(), remedy);
        }
        Ok(())
    }

    /// Refuses inputs of the wrong shape or type, so that a mistake is named where it is made.
    pub(crate) fn check(
        &self,
        dtype: DType,
        x: &Tensor,
        timesteps: &Tensor,
        conditions: Conditions,
    ) -> Result<()> {
        let Self { in_channels, height, width, conditioning, .. } = *self;
        let batch = x.dims().first().copied().unwrap_or(0);
        if batch == 0 || x.dims() != [batch, in_channels, height, width] || x.dtype() != dtype {
            bail!(
                "x is {:?} {:?}, not {dtype:?} [B, {in_channels}, {height}, {width}] with B ≥ 1",
                x.dtype(),
                x.dims(),
            )
        }
        if timesteps.dims() != [batch] || timesteps.dtype() != DType::F32 {
            bail!("timesteps are {:?} {:?}, not F32 [{batch}]", timesteps.dtype(), timesteps.dims())
        }
        let expected = match conditioning {
            Conditioning::None => None,
            Conditioning::Classes(_) => Some((DType::U32, vec![batch])),
            Conditioning::Timestep => Some((DType::F32, vec![batch])),
            Conditioning::Embedding(width) => Some((DType::F32, vec![batch, width])),
            Conditioning::TextTime { text, numbers } => {
                Some((DType::F32, vec![batch, text + numbers]))
            }
        };
        let agree = |name: &str, tensor: Option<&Tensor>, expected: Option<(DType, Vec<usize>)>| {
            let found = tensor.map(|tensor| (tensor.dtype(), tensor.dims().to_vec()));
            if expected != found {
                bail!("the {name} is {found:?}, not {expected:?}")
            }
            Ok(())
        };
        agree("condition", conditions.condition, expected)?;
        let states = |prompt: Prompt| (DType::F32, vec![batch, prompt.tokens, prompt.width]);
        agree("prompt", conditions.prompt, self.prompt.map(states))?;
        let scales = self.guidance.then(|| (DType::F32, vec![batch]));
        agree("guidance", conditions.guidance, scales)
    }
}

/// A network that looks at noisy samples and says what it sees in them: noise, the clean sample or
/// the velocity, as its schedule's `prediction_type` tells.
pub trait Denoiser: Send + Sync {
    /// Whether it sees later changes of the variables that it was loaded from: not where it has copies of another type.
    fn follows(&self) -> bool {
        self.dtype() == DType::F32
    }

    /// Has evaluations of one size done the same way in every process from now on, where they are not anyway.
    fn pin(&mut self) {}

    /// One evaluation of a batch whose samples may stand at different times.
    ///
    /// # Shapes
    /// - `x`: `[B, in_channels, height, width]`, in [`Denoiser::dtype`], variance-preserving latents.
    /// - `timesteps`: f32 `[B]`; whole or fractional training timesteps.
    /// - `condition`: as [`Conditioning`] says, `None` for an unconditional network.
    /// - result: `[B, out_channels, height, width]` in [`Denoiser::dtype`], the raw network output.
    ///
    /// On the CPU row `i` of the result depends, to the bit, only on row `i` of the inputs.
    fn forward(&self, x: &Tensor, timesteps: &Tensor, condition: Option<&Tensor>)
    -> Result<Tensor>;

    /// As [`Denoiser::forward`], of a network that may take a prompt or a guidance scale, too.
    ///
    /// The prompt has no gradient where the network is trained by kernels of its own.
    ///
    /// # Errors
    /// As [`Denoiser::forward`]; conditions that are not those of [`Denoiser::geometry`].
    fn evaluate(&self, x: &Tensor, timesteps: &Tensor, conditions: Conditions) -> Result<Tensor> {
        match conditions {
            Conditions { condition, prompt: None, guidance: None } => {
                self.forward(x, timesteps, condition)
            }
            _ => bail!("the network takes neither a prompt nor a guidance scale"),
        }
    }

    /// The same network over samples of another height and width, for prompts of so many tokens, where it takes any;
    /// nothing for a network of one size. Both share their weights, and each counts them in its [`Denoiser::footprint`].
    ///
    /// # Errors
    /// [`crate::Error::Value`] for a size that the network cannot have, that no memory holds, or that a network that is
    /// trained, or runs on a GPU by kernels, would have to be loaded anew for.
    fn at(&self, _size: [usize; 2], _tokens: usize) -> Option<crate::Result<Box<dyn Denoiser>>> {
        None
    }

    /// The same evaluation, kernel by kernel; nothing where the network is not compiled into kernels.
    ///
    /// # Errors
    /// As [`Denoiser::forward`].
    fn profile(
        &self,
        _x: &Tensor,
        _timesteps: &Tensor,
        _conditions: Conditions,
    ) -> Result<Vec<Timing>> {
        Ok(Vec::new())
    }

    /// What the network keeps in memory; `None` where it is not compiled into kernels.
    fn footprint(&self) -> Option<Footprint> {
        None
    }

    /// The shapes.
    fn geometry(&self) -> &Geometry;

    /// The element type of what it takes and gives.
    fn dtype(&self) -> DType;

    /// Where the weights live.
    fn device(&self) -> &Device;

    /// Whether an answer may still be in the making when it is given: a GPU is asked for its work and not waited for.
    fn defers(&self) -> bool {
        !self.device().is_cpu()
    }

    /// Number of weights.
    fn parameters(&self) -> usize;
}
