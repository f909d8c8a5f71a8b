//! A compiled network that tells what it sees in noisy samples.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use super::Compiled;
use crate::cpu::Mode;
use crate::denoiser::Conditions;
use crate::graph::Graph;
use crate::kernels::{Footprint, Timing};
use crate::weight::Weight;
use crate::{Denoiser, Geometry};

/// A network that answers for a batch of samples, each at a time of its own.
pub(crate) struct Network {
    compiled: Compiled,
    geometry: Geometry,
    sizes: Arc<Sizes>,
}

/// What a network is over samples of another height and width, for prompts of so many tokens; nothing for one of one size.
pub(crate) type Sizes =
    dyn Fn([usize; 2], usize) -> Option<crate::Result<(Graph, Geometry)>> + Send + Sync;

impl Network {
    /// As [`Compiled::in_mode`], of a graph with such a geometry.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn new(
        graph: Graph,
        geometry: Geometry,
        weights: HashMap<String, Weight>,
        (dtype, device): (DType, &Device),
        mode: Mode,
    ) -> crate::Result<Self> {
        let compiled = Compiled::in_mode(graph, weights, dtype, device, mode)?;
        Ok(Self { compiled, geometry, sizes: Arc::new(|_, _| None) })
    }

    /// The same network, which may be had at other sizes.
    pub(crate) fn of_sizes(self, sizes: Arc<Sizes>) -> Self {
        Self { sizes, ..self }
    }
}

impl Denoiser for Network {
    #[cfg(feature = "cuda")]
    fn pin(&mut self) {
        self.compiled.pin();
    }

    fn follows(&self) -> bool {
        self.compiled.follows()
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
        self.geometry.check(self.dtype(), x, timesteps, conditions)?;
        self.compiled.forward(x, Some(timesteps), conditions)
    }

    fn at(&self, size: [usize; 2], tokens: usize) -> Option<crate::Result<Box<dyn Denoiser>>> {
        let resized = (self.sizes)(size, tokens)?.and_then(|(graph, geometry)| {
            let (compiled, sizes) = (self.compiled.at(graph)?, self.sizes.clone());
            Ok(Box::new(Self { compiled, geometry, sizes }) as Box<dyn Denoiser>)
        });
        Some(resized)
    }

    fn profile(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        conditions: Conditions,
    ) -> Result<Vec<Timing>> {
        self.geometry.check(self.dtype(), x, timesteps, conditions)?;
        self.compiled.profile(x, Some(timesteps), conditions)
    }

    fn footprint(&self) -> Option<Footprint> {
        self.compiled.footprint()
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn dtype(&self) -> DType {
        self.compiled.dtype()
    }

    fn device(&self) -> &Device {
        self.compiled.device()
    }

    fn parameters(&self) -> usize {
        self.compiled.parameters()
    }
}
