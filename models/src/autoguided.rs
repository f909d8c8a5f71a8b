//! A network that is led away from the mistakes of a worse one.

use candle_core::{DType, Device, Result, Tensor};

use crate::denoiser::{Conditions, Denoiser, Geometry};
use crate::kernels::{Footprint, Timing};

/// Answers with `B + w·(T − B)`, of its network T and a guide B that is like it, but worse: narrower, or taught for less (Karras
/// et al. 2024, arXiv 2406.02507, eq. 3). Where both are unsure of the same thing they differ most, and the answer goes further
/// from the guide. Shapes, types and errors are the networks'; a variance is that of T.
pub struct Autoguided {
    network: Box<dyn Denoiser>,
    guide: Box<dyn Denoiser>,
    scale: f64,
}

impl Autoguided {
    /// Of networks of equal geometry and type, whose answers mean the same; a scale of 1 is the network alone.
    pub fn new(network: Box<dyn Denoiser>, guide: Box<dyn Denoiser>, scale: f64) -> Self {
        Self { network, guide, scale }
    }
}

impl Denoiser for Autoguided {
    fn follows(&self) -> bool {
        self.network.follows() && self.guide.follows()
    }

    fn pin(&mut self) {
        self.network.pin();
        self.guide.pin();
    }

    fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.evaluate(x, timesteps, Conditions::of(condition))
    }

    fn evaluate(&self, x: &Tensor, timesteps: &Tensor, conditions: Conditions) -> Result<Tensor> {
        let answer = self.network.evaluate(x, timesteps, conditions)?;
        let guide = self.guide.evaluate(x, timesteps, conditions)?;
        let channels = self.geometry().in_channels;
        let [told, worse] =
            [&answer, &guide].map(|it| it.narrow(1, 0, channels)?.to_dtype(DType::F32));
        let (told, worse) = (told?, worse?);
        let led = (&worse + ((told - &worse)? * self.scale)?)?.to_dtype(answer.dtype())?;
        match answer.dim(1)? - channels {
            0 => Ok(led),
            rest => Tensor::cat(&[led, answer.narrow(1, channels, rest)?], 1),
        }
    }

    fn at(&self, size: [usize; 2], tokens: usize) -> Option<crate::Result<Box<dyn Denoiser>>> {
        let (network, guide) = (self.network.at(size, tokens)?, self.guide.at(size, tokens)?);
        let both = network.and_then(|network| Ok(Self::new(network, guide?, self.scale)));
        Some(both.map(|both| Box::new(both) as Box<dyn Denoiser>))
    }

    fn profile(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        conditions: Conditions,
    ) -> Result<Vec<Timing>> {
        let mut timings = self.network.profile(x, timesteps, conditions)?;
        timings.extend(self.guide.profile(x, timesteps, conditions)?);
        Ok(timings)
    }

    fn footprint(&self) -> Option<Footprint> {
        let (network, guide) = (self.network.footprint()?, self.guide.footprint()?);
        Some(Footprint {
            weight_bytes: network.weight_bytes + guide.weight_bytes,
            // One after the other.
            live_bytes_per_sample: network.live_bytes_per_sample.max(guide.live_bytes_per_sample),
            workspace_bytes: network.workspace_bytes + guide.workspace_bytes,
        })
    }

    fn geometry(&self) -> &Geometry {
        self.network.geometry()
    }

    fn dtype(&self) -> DType {
        self.network.dtype()
    }

    fn device(&self) -> &Device {
        self.network.device()
    }

    fn parameters(&self) -> usize {
        self.network.parameters() + self.guide.parameters()
    }
}
