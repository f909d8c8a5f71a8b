//! The vector that tells the network the time and the class.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::UNet2DConfig;
use super::config::{ClassEmbedding, TimeEmbedding};
use crate::layers::{Mlp, frequencies};
use crate::weights::Weights;

/// Timesteps to vectors, without the two layers that follow.
pub(super) enum TimeProjection {
    /// `sin(t·ω)` and `cos(t·ω)` with `ω_i = 10000^(−i / (half − shift))`.
    Positional { frequencies: Tensor, cos_first: bool, odd: bool },
    /// `sin` and `cos` of `2π·w·ln t` with random `w`.
    Fourier { weight: Tensor },
    /// Row `t` of a table.
    Learned { table: Tensor },
}

impl TimeProjection {
    pub(super) fn new(
        config: &UNet2DConfig,
        weights: &Weights,
        device: &Device,
    ) -> crate::Result<Self> {
        let channels = config.channels[0];
        Ok(match config.time_embedding {
            TimeEmbedding::Positional => Self::Positional {
                frequencies: frequencies(channels / 2, config.freq_shift, device)?,
                cos_first: config.flip_sin_to_cos,
                odd: !channels.is_multiple_of(2),
            },
            // In f32 whatever the network's type: these are phases, not features.
            TimeEmbedding::Fourier => {
                Self::Fourier { weight: weights.get_as("weight", &[channels], DType::F32)? }
            }
            TimeEmbedding::Learned => {
                let rows = config.num_train_timesteps.unwrap_or(1);
                Self::Learned { table: weights.get("weight", &[rows, channels])? }
            }
        })
    }

    /// f32 `[B]` → `[B, projected width]`, in f32 or the table's type.
    fn forward(&self, t: &Tensor) -> Result<Tensor> {
        match self {
            Self::Positional { frequencies, cos_first, odd } => {
                let phase = t.unsqueeze(1)?.broadcast_mul(frequencies)?;
                let (sin, cos) = (phase.sin()?, phase.cos()?);
                let both = if *cos_first { [cos, sin] } else { [sin, cos] };
                Tensor::cat(&both, 1)?.pad_with_zeros(1, 0, usize::from(*odd))
            }
            Self::Fourier { weight } => {
                let turns = t.log()?.unsqueeze(1)?.broadcast_mul(&weight.unsqueeze(0)?)?;
                let phase = ((turns * 2.0)? * std::f64::consts::PI)?;
                Tensor::cat(&[phase.sin()?, phase.cos()?], 1)
            }
            Self::Learned { table } => table.index_select(&rows(t, table.dim(0)?)?, 0),
        }
    }
}

/// Timesteps as row numbers of a table of `count` rows.
fn rows(t: &Tensor, count: usize) -> Result<Tensor> {
    let rows = t.to_vec1::<f32>()?;
    for t in &rows {
        if t.fract() != 0.0 || !(0.0..count as f32).contains(t) {
            bail!(
                "timestep {t} is not a row of the table of {count} learned time embeddings; \
                 use a sampler that stays on whole training timesteps"
            )
        }
    }
    let rows: Vec<u32> = rows.into_iter().map(|t| t as u32).collect();
    let count = rows.len();
    Tensor::from_vec(rows, count, t.device())
}

enum Class {
    None,
    Table(Tensor),
    Timestep(Mlp),
    Identity,
}

/// Time and class as one vector per sample.
pub(super) struct Embedding {
    projection: TimeProjection,
    time: Mlp,
    class: Class,
    dtype: DType,
}

impl Embedding {
    pub(super) fn new(
        config: &UNet2DConfig,
        weights: &Weights,
        dtype: DType,
        device: &Device,
    ) -> crate::Result<Self> {
        let (input, width) = (config.projected_width(), config.time_width());
        let place = weights.at("class_embedding");
        Ok(Self {
            projection: TimeProjection::new(config, &weights.at("time_proj"), device)?,
            time: Mlp::new(&weights.at("time_embedding"), input, width)?,
            class: match config.class_embedding {
                ClassEmbedding::None => Class::None,
                ClassEmbedding::Table(rows) => Class::Table(place.get("weight", &[rows, width])?),
                ClassEmbedding::Timestep => Class::Timestep(Mlp::new(&place, input, width)?),
                ClassEmbedding::Identity => Class::Identity,
            },
            dtype,
        })
    }

    /// `timesteps` f32 `[B]`, `condition` as [`crate::Conditioning`] says → `[B, time width]`.
    pub(super) fn forward(&self, timesteps: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        let time = self.embed(&self.time, timesteps)?;
        let class = match (&self.class, condition) {
            (Class::None, None) => return Ok(time),
            (Class::None, Some(_)) => bail!("this network is unconditional; pass no condition"),
            (_, None) => bail!("this network is conditional; pass a condition"),
            (Class::Table(table), Some(labels)) => table.index_select(labels, 0)?,
            (Class::Timestep(mlp), Some(number)) => self.embed(mlp, number)?,
            (Class::Identity, Some(vector)) => vector.to_dtype(self.dtype)?,
        };
        time + class
    }

    /// Bytes of its weights.
    pub(super) fn weight_bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let projection = match &self.projection {
            TimeProjection::Positional { frequencies, .. } => bytes(frequencies),
            TimeProjection::Fourier { weight } => bytes(weight),
            TimeProjection::Learned { table } => bytes(table),
        };
        let class = match &self.class {
            Class::None | Class::Identity => 0,
            Class::Table(table) => bytes(table),
            Class::Timestep(class) => class.weight_bytes(),
        };
        projection + self.time.weight_bytes() + class
    }

    fn embed(&self, mlp: &Mlp, numbers: &Tensor) -> Result<Tensor> {
        mlp.forward(&self.projection.forward(numbers)?.to_dtype(self.dtype)?)
    }
}
