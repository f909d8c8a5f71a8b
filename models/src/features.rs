//! The vectors that time and condition become before a network's first product: sines and cosines, rows of tables.
//!
//! They are worked out by candle in every kind of network, so that a compiled one's gradients of tables are candle's, and
//! a time has the same sines everywhere.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::denoiser::Conditions;
use crate::graph::{Graph, Op, Scalar, Wave};
use crate::weights::Weights;

/// One of them.
#[derive(Clone)]
pub(crate) struct Feature {
    source: Source,
    of: Scalar,
    width: usize,
}

#[derive(Clone)]
enum Source {
    /// `sin(t·ω)` and `cos(t·ω)`.
    Positional { frequencies: Tensor, cosines_first: bool },
    /// `sin` and `cos` of `2π·w·ln t`, with random `w`.
    Fourier { weight: Tensor },
    /// Row `t` of a table.
    Table(Tensor),
    /// The condition itself.
    Condition,
    /// The condition's first `text` numbers, and sines and cosines of each of the others.
    TextTime { text: usize, frequencies: Tensor, cosines_first: bool },
}

impl Feature {
    /// Of an operation that makes one; nothing for others.
    ///
    /// # Errors
    /// Those of weights that cannot be read.
    pub(crate) fn new(graph: &Graph, op: &Op, weights: &Weights) -> crate::Result<Option<Self>> {
        let device = weights.device();
        let (of, source, to) = match *op {
            Op::Sinusoid { of, wave: Wave::Positional { shift, cosines_first }, to } => {
                let half = graph.size(to).channels / 2;
                let frequencies = match of {
                    Scalar::Guidance => guidance_frequencies(half, shift, device)?,
                    _ => frequencies(half, shift, device)?,
                };
                (of, Source::Positional { frequencies, cosines_first }, to)
            }
            // In f32 whatever the network's type: these are phases, not features.
            Op::Sinusoid { of, wave: Wave::Fourier { weight }, to } => {
                let weight = weights.get_as(graph.weight(weight), DType::F32)?;
                (of, Source::Fourier { weight }, to)
            }
            Op::Row { of, table, to } => {
                // A trained table stays as it is, so that what is made of it follows.
                let dtype = match weights.trained() && !device.is_cpu() {
                    true => DType::F32,
                    false => weights.dtype(),
                };
                (of, Source::Table(weights.get_as(graph.weight(table), dtype)?), to)
            }
            Op::Condition { to } => (Scalar::Condition, Source::Condition, to),
            Op::TextTime { text, numbers, shift, cosines_first, to } => {
                let half = (graph.size(to).channels - text) / numbers / 2;
                let frequencies = frequencies(half, shift, device)?;
                (Scalar::Condition, Source::TextTime { text, frequencies, cosines_first }, to)
            }
            _ => return Ok(None),
        };
        Ok(Some(Self { source, of, width: graph.size(to).channels }))
    }

    /// The same of an operation in the same place of another graph, which differs from the first one in the sizes of its maps,
    /// and so in what it is told of them.
    pub(crate) fn at(&self, op: &Op) -> Self {
        let of = match *op {
            Op::Sinusoid { of, .. } => of,
            _ => self.of,
        };
        Self { of, ..self.clone() }
    }

    /// `timesteps` f32 `[B]`, `conditions` as [`crate::Geometry`] says → `[B, width]`, in f32 or the table's type. A
    /// table of one row needs no condition.
    pub(crate) fn forward(&self, timesteps: &Tensor, conditions: Conditions) -> Result<Tensor> {
        let number = match (self.of, conditions.condition, conditions.guidance) {
            (Scalar::Time, ..) => timesteps,
            (Scalar::Condition, Some(condition), _) => condition,
            (Scalar::Condition, None, _) => {
                &Tensor::zeros(timesteps.dims(), DType::U32, timesteps.device())?
            }
            (Scalar::Guidance, _, Some(guidance)) => &(guidance * 1000.0)?,
            (Scalar::Guidance, _, None) => bail!("the network was given no guidance scale"),
            (Scalar::Number(number), ..) => {
                &Tensor::full(number, timesteps.dims(), timesteps.device())?
            }
        };
        match &self.source {
            Source::Positional { frequencies, cosines_first } => {
                let both = waves(number, frequencies, *cosines_first)?;
                both.pad_with_zeros(1, 0, self.width % 2)
            }
            Source::Fourier { weight } => {
                let turns = number.log()?.unsqueeze(1)?.broadcast_mul(&weight.unsqueeze(0)?)?;
                let phase = ((turns * 2.0)? * std::f64::consts::PI)?;
                Tensor::cat(&[phase.sin()?, phase.cos()?], 1)
            }
            Source::Table(table) if number.dtype() == DType::U32 => table.index_select(number, 0),
            Source::Table(table) => table.index_select(&rows(number, table.dim(0)?)?, 0),
            Source::Condition => Ok(number.clone()),
            Source::TextTime { text, frequencies, cosines_first } => {
                let (rows, all) = number.dims2()?;
                let told = number.narrow(1, *text, all - text)?.flatten_all()?;
                let waves = waves(&told, frequencies, *cosines_first)?;
                Tensor::cat(&[number.narrow(1, 0, *text)?, waves.reshape((rows, ()))?], 1)
            }
        }
    }

    fn weight_bytes(&self) -> usize {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        match &self.source {
            Source::Positional { frequencies, .. } | Source::TextTime { frequencies, .. } => {
                bytes(frequencies)
            }
            Source::Fourier { weight } => bytes(weight),
            Source::Table(table) => bytes(table),
            Source::Condition => 0,
        }
    }
}

/// All of a network's, side by side.
#[derive(Clone)]
pub(crate) struct Features(Vec<Feature>);

impl Features {
    /// # Errors
    /// Those of weights that cannot be read.
    pub(crate) fn new(graph: &Graph, weights: &Weights) -> crate::Result<Self> {
        let mut all = Vec::new();
        for op in &graph.ops {
            all.extend(Feature::new(graph, op, weights)?);
        }
        Ok(Self(all))
    }

    /// As [`Feature::at`], of a graph.
    pub(crate) fn at(&self, graph: &Graph) -> Self {
        let ops = graph.ops.iter().filter(|op| op.feature().is_some());
        Self(self.0.iter().zip(ops).map(|(feature, op)| feature.at(op)).collect())
    }

    /// As [`Feature::forward`]: f32 `[B, all widths]`.
    pub(crate) fn forward(&self, timesteps: &Tensor, conditions: Conditions) -> Result<Tensor> {
        let all: Result<Vec<Tensor>> = self
            .0
            .iter()
            .map(|feature| feature.forward(timesteps, conditions)?.to_dtype(DType::F32))
            .collect();
        match all? {
            // A network that knows neither time nor condition.
            none if none.is_empty() => {
                Tensor::zeros((timesteps.dim(0)?, 0), DType::F32, timesteps.device())
            }
            all => Tensor::cat(&all, 1),
        }
    }

    /// Bytes of tables and frequencies.
    pub(crate) fn weight_bytes(&self) -> usize {
        self.0.iter().map(Feature::weight_bytes).sum()
    }
}

/// Sines and cosines of `numbers` `[N]`: `[N, 2·half]`.
fn waves(numbers: &Tensor, frequencies: &Tensor, cosines_first: bool) -> Result<Tensor> {
    let phase = numbers.unsqueeze(1)?.broadcast_mul(frequencies)?;
    let (sin, cos) = (phase.sin()?, phase.cos()?);
    Tensor::cat(&if cosines_first { [cos, sin] } else { [sin, cos] }, 1)
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

/// `ω_i = 10000^(−i / (half − shift))`, f32 `[1, half]` (Vaswani et al. 2017, §3.5).
///
/// Worked out in f32 step by step as torch does, so that `t·ω` agrees to the last bits at large `t`.
pub(crate) fn frequencies(half: usize, shift: f64, device: &Device) -> Result<Tensor> {
    let logarithm = -(10_000f64.ln()) as f32;
    let span = (half as f64 - shift) as f32;
    let frequencies: Vec<f32> =
        (0..half).map(|i| libm::expf(logarithm * i as f32 / span)).collect();
    Tensor::from_vec(frequencies, (1, half), device)
}

/// The same, for guidance scales: as the pipelines that have them round on the way. Thousands of them are multiplied with
/// these, so the last bits show.
fn guidance_frequencies(half: usize, shift: f64, device: &Device) -> Result<Tensor> {
    let step = -(libm::logf(10_000.0) / (half as f64 - shift) as f32);
    let frequencies: Vec<f32> = (0..half).map(|i| libm::expf(i as f32 * step)).collect();
    Tensor::from_vec(frequencies, (1, half), device)
}
