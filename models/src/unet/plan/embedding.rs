//! The time embedding on a GPU: [`crate::unet::embeddings`] as layers there.

use candle_core::{DType, Tensor};

use crate::assembly::{Assembly, End, FIXED, Map, Size, TOLD};
use crate::gpu::{Builder, Waves};
use crate::kernels::Function;
use crate::layers::frequencies;
use crate::unet::UNet2DConfig;
use crate::unet::config::{ClassEmbedding, TimeEmbedding};
use crate::weights::Weights;

/// Input [`FIXED`], the times, and input [`TOLD`], what a network with a condition is told, as one vector of each sample,
/// through the activation that every residual block begins its use of it with.
pub(super) fn embedding(
    builder: &mut Builder<UNet2DConfig>,
    weights: &Weights,
) -> crate::Result<Map> {
    let config = builder.config();
    let (input, width) = (config.projected_width(), config.time_width());
    let projection = Projection::new(config, &weights.at("time_proj"))?;
    let place = weights.at("class_embedding");
    let class = match config.class_embedding {
        ClassEmbedding::None => None,
        ClassEmbedding::Table(rows) => {
            Some(builder.row(TOLD, place.get("weight", &[rows, width])?)?)
        }
        ClassEmbedding::Timestep => {
            let number = projection.of(builder, TOLD, input)?;
            Some(layers(builder, &place, number, width, None)?)
        }
        ClassEmbedding::Identity => {
            Some(builder.import(TOLD, Size { height: 1, width: 1, channels: width }, 1.0, 0.0))
        }
    };
    let time = projection.of(builder, FIXED, input)?;
    let sum = layers(builder, &weights.at("time_embedding"), time, width, class)?;
    let told = builder.activate(sum, config.activation.into());
    for map in class.into_iter().chain([sum]) {
        builder.release(map);
    }
    Ok(told)
}

/// Numbers to vectors.
enum Projection {
    Waves(Waves),
    /// Row `t` of a table; a time without a row is told NaN.
    Table(Tensor),
}

impl Projection {
    fn new(config: &UNet2DConfig, weights: &Weights) -> crate::Result<Self> {
        let channels = config.channels[0];
        Ok(match config.time_embedding {
            TimeEmbedding::Positional => Self::Waves(Waves {
                frequencies: frequencies(channels / 2, config.freq_shift, weights.device())?,
                cosines_first: config.flip_sin_to_cos,
                logarithm: false,
            }),
            TimeEmbedding::Fourier => Self::Waves(Waves {
                frequencies: weights.get_as("weight", &[channels], DType::F32)?,
                cosines_first: false,
                logarithm: true,
            }),
            TimeEmbedding::Learned => {
                let rows = config.num_train_timesteps.unwrap_or(1);
                Self::Table(weights.get("weight", &[rows, channels])?)
            }
        })
    }

    fn of(
        &self,
        builder: &mut Builder<UNet2DConfig>,
        input: usize,
        width: usize,
    ) -> crate::Result<Map> {
        match self {
            Self::Waves(waves) => Ok(builder.waves(input, waves.clone(), width)),
            Self::Table(table) => builder.row(input, table.clone()),
        }
    }
}

/// Two linear maps of `x`, which is used up, with SiLU between them, plus `more`.
fn layers(
    builder: &mut Builder<UNet2DConfig>,
    weights: &Weights,
    x: Map,
    width: usize,
    more: Option<Map>,
) -> crate::Result<Map> {
    let input = builder.size(x).channels;
    let affine = |name, input| -> crate::Result<_> {
        let place = weights.at(name);
        Ok((place.get("weight", &[width, input])?, place.get("bias", &[width])?, 1.0))
    };
    let hidden = builder.map(1, 1, width);
    builder.pointwise(&[x], hidden, &[affine("linear_1", input)?], End::default())?;
    builder.release(x);
    let active = builder.activate(hidden, Function::Silu);
    builder.release(hidden);
    let y = builder.map(1, 1, width);
    let end = End { residual: more, ..End::default() };
    builder.pointwise(&[active], y, &[affine("linear_2", width)?], end)?;
    builder.release(active);
    Ok(y)
}
