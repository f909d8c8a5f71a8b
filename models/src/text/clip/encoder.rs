//! CLIP's text encoder: what its configuration tells, its graph, and what it answers.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Result as TensorResult, Tensor, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::compiled::Compiled;
use crate::demand::Demand;
use crate::denoiser::Conditions;
use crate::fields::{Fields, typed};
use crate::graph::{Epilogue, Graph, GraphBuilder, Map, Name};
use crate::kernels::{Footprint, Function};
use crate::weight::{Weight, here};
use crate::{Error, Result, weights};

const WIDTH_LIMIT: usize = 1 << 16;
const LAYER_LIMIT: usize = 1 << 10;
const TOKEN_LIMIT: usize = 1 << 16;
/// Numbers of tokens are f32 on their way into a compiled network, which holds each up to here.
const VOCABULARY_LIMIT: usize = 1 << 24;
/// Files written before transformers 4.32 have this for the token that ends a text, whichever it is; with them the largest
/// number is it.
const UNTOLD_END: u32 = 2;

const PLAIN: &str = "CLIPTextModel";
const PROJECTED: &str = "CLIPTextModelWithProjection";

/// The function of a hidden layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum HiddenAct {
    /// `x·σ(1.702·x)`.
    QuickGelu,
    /// `x·Φ(x)`, exact.
    Gelu,
}

/// A checked configuration of transformers' `CLIPTextModel` or `CLIPTextModelWithProjection`.
///
/// transformers writes much beside it that is of training, generation and other libraries; such fields are not looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClipConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    projection_dim: Option<usize>,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    max_position_embeddings: usize,
    hidden_act: HiddenAct,
    layer_norm_eps: f64,
    eos_token_id: u32,
    /// Whether what is pooled goes through one more product.
    #[serde(skip)]
    projects: bool,
}

impl Default for ClipConfig {
    fn default() -> Self {
        Self {
            vocab_size: 49_408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: Some(512),
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: HiddenAct::QuickGelu,
            layer_norm_eps: 1e-5,
            eos_token_id: 49_407,
            projects: false,
        }
    }
}

impl ClipConfig {
    /// The transformers classes.
    pub const CLASSES: [&str; 2] = [PLAIN, PROJECTED];

    /// Reads and checks the `config.json` of a text encoder of a transformers class, which `model_index.json` names;
    /// `file` is what error messages call it. Absent fields take transformers' defaults.
    ///
    /// # Errors
    /// [`Error::Value`] naming file, field, value and remedy for anything that cannot be honoured.
    pub fn from_json(class: &str, value: &Value, file: &str) -> Result<Self> {
        let projects = match class {
            PLAIN => false,
            PROJECTED => true,
            other => {
                let remedy = format!("only {} are supported", Self::CLASSES.join(" and "));
                return Err(Error::value("text encoder's class", other, remedy));
            }
        };
        let config = Self { projects, ..typed(value, file)? };
        config.check(&Fields::new(value, file)?)?;
        Ok(config)
    }

    fn check(&self, fields: &Fields) -> Result<()> {
        fields.bounded("vocab_size", self.vocab_size, VOCABULARY_LIMIT)?;
        fields.bounded("hidden_size", self.hidden_size, WIDTH_LIMIT)?;
        fields.bounded("intermediate_size", self.intermediate_size, WIDTH_LIMIT)?;
        fields.bounded("num_hidden_layers", self.num_hidden_layers, LAYER_LIMIT)?;
        fields.bounded("max_position_embeddings", self.max_position_embeddings, TOKEN_LIMIT)?;
        let (heads, width) = (self.num_attention_heads, self.hidden_size);
        if heads == 0 || !width.is_multiple_of(heads) {
            let remedy = format!("must divide hidden_size, {width}");
            return Err(fields.refuse("num_attention_heads", remedy));
        }
        if self.projects {
            fields.bounded("projection_dim", self.projection_dim.unwrap_or(0), WIDTH_LIMIT)?;
        }
        if !(0.0..=f64::from(f32::MAX)).contains(&self.layer_norm_eps) {
            return Err(fields.refuse("layer_norm_eps", "must not be negative"));
        }
        if self.eos_token_id != UNTOLD_END && self.eos_token_id as usize >= self.vocab_size {
            let remedy = format!("must be below vocab_size, {}", self.vocab_size);
            return Err(fields.refuse("eos_token_id", remedy));
        }
        Ok(())
    }

    /// Tokens of a prompt, those that begin and end it among them.
    pub fn tokens(&self) -> usize {
        self.max_position_embeddings
    }

    /// Numbers of a token's hidden state.
    pub fn width(&self) -> usize {
        self.hidden_size
    }

    /// Numbers of what is pooled.
    pub fn pooled(&self) -> usize {
        self.projection_dim.filter(|_| self.projects).unwrap_or(self.hidden_size)
    }

    /// Whether what is pooled goes through a projection.
    pub fn projects(&self) -> bool {
        self.projects
    }

    /// Tokens that it knows: a tokenizer's numbers must be below.
    pub fn vocabulary(&self) -> usize {
        self.vocab_size
    }

    /// Names, as transformers 5 has them, and shapes of all weights.
    pub fn weight_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        self.graph().shapes()
    }

    /// Builds the encoder from its weights, in `dtype` on `device` (types as [`crate::NetworkConfig::load`]).
    ///
    /// # Errors
    /// [`Error::Weights`] naming what is missing, what does not belong, and what has another shape; [`Error::Value`]
    /// naming the field that asks for more memory than there is.
    pub fn load(
        &self,
        weights: HashMap<String, Tensor>,
        dtype: DType,
        device: &Device,
    ) -> Result<ClipEncoder> {
        let graph = self.graph();
        let weights = weights::fit(&graph.shapes(), renamed(here(weights)))?;
        let json = serde_json::to_value(self).unwrap_or_default();
        let demand = Demand::of(&json, ["vocab_size", "max_position_embeddings"]);
        demand.check(&graph, device, dtype.size_in_bytes())?;
        let build = || Compiled::new(graph, weights, dtype, device);
        let compiled = demand.built(build, Compiled::footprint)?;
        Ok(ClipEncoder { compiled, config: self.clone() })
    }

    /// The states before the last layer, after the last norm, and, where there is one, after the projection.
    fn graph(&self) -> Graph {
        let mut g = GraphBuilder::new(1);
        let root = Name::default();
        let place = root.at("embeddings");
        let mut x = g.embed(
            &place.at("token_embedding.weight"),
            &place.at("position_embedding.weight"),
            [self.vocab_size, self.max_position_embeddings],
            self.hidden_size,
        );
        for index in 0..self.num_hidden_layers {
            if index + 1 == self.num_hidden_layers {
                g.answer(x);
            }
            x = self.layer(&mut g, &root.at(format_args!("encoder.layers.{index}")), x);
        }
        let last = g.layer_norm(&root.at("final_layer_norm"), x, self.layer_norm_eps);
        match self.projection_dim.filter(|_| self.projects) {
            None => g.finish(last, false),
            Some(width) => {
                g.answer(last);
                let place = root.at("text_projection");
                let projected = g.linear_unbiased(&place, last, width, Epilogue::default());
                g.finish(projected, false)
            }
        }
    }

    /// Attention to what came before and a hidden layer, each after a norm and with a way around.
    fn layer(&self, g: &mut GraphBuilder, name: &Name, x: Map) -> Map {
        let (width, eps) = (self.hidden_size, self.layer_norm_eps);
        let around = |residual| Epilogue { residual: Some(residual), ..Epilogue::default() };
        let normed = g.layer_norm(&name.at("layer_norm1"), x, eps);
        let place = name.at("self_attn");
        let parts = ["q_proj", "k_proj", "v_proj"];
        let gathered = g.causal_attention(&place, parts, normed, self.num_attention_heads);
        let x = g.linear_with(&place.at("out_proj"), gathered, width, around(x));
        let normed = g.layer_norm(&name.at("layer_norm2"), x, eps);
        let hidden = g.linear(&name.at("mlp.fc1"), normed, self.intermediate_size);
        let active = g.activate(hidden, self.hidden_act.into());
        g.linear_with(&name.at("mlp.fc2"), active, width, around(x))
    }
}

impl From<HiddenAct> for Function {
    fn from(act: HiddenAct) -> Self {
        match act {
            HiddenAct::QuickGelu => Self::QuickGelu,
            HiddenAct::Gelu => Self::Gelu,
        }
    }
}

/// The name of a weight in a file, which any version of transformers reads: all but the projection lie below `text_model`.
pub(crate) fn file_name(name: &str) -> String {
    if name.starts_with("text_projection.") {
        name.to_owned()
    } else {
        format!("text_model.{name}")
    }
}

/// Weights under the names of today: files have all but the projection below `text_model`, and earlier ones the numbers of
/// places among them.
pub(crate) fn renamed(weights: HashMap<String, Weight>) -> HashMap<String, Weight> {
    let renamed = weights.into_iter().map(|(name, weight)| {
        let short = name.strip_prefix("text_model.").map(str::to_owned);
        (short.unwrap_or(name), weight)
    });
    renamed.filter(|(name, _)| name != "embeddings.position_ids").collect()
}

/// What a text encoder makes of prompts.
pub struct ClipStates {
    /// After the last layer and norm: `[B, tokens, width]`.
    pub last: Tensor,
    /// Before the last layer: `[B, tokens, width]`.
    pub penultimate: Tensor,
    /// Of the token that ends the text: `[B, width]` after the last norm, or, of a `CLIPTextModelWithProjection`,
    /// `[B, projection_dim]`.
    pub pooled: Tensor,
}

/// A text encoder on a device.
pub struct ClipEncoder {
    compiled: Compiled,
    config: ClipConfig,
}

impl ClipEncoder {
    /// The states of the tokens of prompts, u32 `[B, tokens]` on the CPU, in [`ClipEncoder::dtype`].
    ///
    /// On the CPU a prompt's states depend, to the bit, only on its own tokens.
    ///
    /// # Errors
    /// Another shape or type, tokens that it does not know, prompts without an end, and whatever the device says.
    pub fn forward(&self, ids: &Tensor) -> TensorResult<ClipStates> {
        let (tokens, vocabulary) = (self.config.tokens(), self.config.vocabulary());
        let batch = ids.dims().first().copied().unwrap_or(0);
        if batch == 0 || ids.dims() != [batch, tokens] || ids.dtype() != DType::U32 {
            bail!("tokens are {:?} {:?}, not U32 [B, {tokens}] with B ≥ 1", ids.dtype(), ids.dims())
        }
        let mut ends = Vec::with_capacity(batch);
        for row in ids.to_vec2::<u32>()? {
            if let Some(id) = row.iter().find(|&&id| id as usize >= vocabulary) {
                bail!(
                    "token {id} is not below {vocabulary}, the encoder's vocab_size: use its own tokenizer"
                )
            }
            ends.push(self.end(&row)?);
        }
        let ids = ids.to_device(self.compiled.device())?;
        let mut answers = self.compiled.answers(&ids, None, Conditions::default())?.into_iter();
        let mut next = || -> TensorResult<Tensor> {
            // A map [B, width, 1, tokens].
            let Some(map) = answers.next() else { bail!("the encoder has too few answers") };
            map.squeeze(2)?.transpose(1, 2)?.contiguous()
        };
        let (penultimate, last) = (next()?, next()?);
        let pooling = if self.config.projects { next()? } else { last.clone() };
        let pooled: TensorResult<Vec<Tensor>> =
            ends.into_iter().enumerate().map(|(row, end)| pooling.get(row)?.get(end)).collect();
        Ok(ClipStates { last, penultimate, pooled: Tensor::stack(&pooled?, 0)? })
    }

    /// The place of the token that ends a text.
    pub(in crate::text) fn end(&self, ids: &[u32]) -> TensorResult<usize> {
        let end = match self.config.eos_token_id {
            UNTOLD_END => ids.iter().copied().max().unwrap_or(0),
            told => told,
        };
        match ids.iter().position(|&id| id == end) {
            Some(place) => Ok(place),
            None => bail!("a prompt has no token {end}, which ends it (eos_token_id)"),
        }
    }

    /// The configuration.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// The element type of its answers.
    pub fn dtype(&self) -> DType {
        self.compiled.dtype()
    }

    /// Where the weights live.
    pub fn device(&self) -> &Device {
        self.compiled.device()
    }

    /// Number of weights.
    pub fn parameters(&self) -> usize {
        self.compiled.parameters()
    }

    /// What it keeps in memory; nothing where it is not compiled into kernels.
    pub fn footprint(&self) -> Option<Footprint> {
        self.compiled.footprint()
    }
}
