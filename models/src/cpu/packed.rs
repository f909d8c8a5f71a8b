//! The weights of a network as its layers take them, which are the same at all sizes of its maps.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::Result;
use crate::graph::Map;
use crate::kernels::{Aligned, Variant};

/// Packed by the first network of a graph, and read by those of the same operations over maps of other sizes. A layer is
/// known by the map that it writes.
#[derive(Default)]
pub(super) struct Packed {
    layers: Mutex<HashMap<Map, Vec<Arc<Aligned>>>>,
    /// By which transforms the weights of each convolution are kept, if by any: as pays for the size that was first, so
    /// that all have the same weights.
    variants: Mutex<HashMap<Map, Option<Variant>>>,
}

impl Packed {
    /// A layer's weights, made by `make` the first time.
    ///
    /// # Errors
    /// Those of `make`.
    pub(super) fn layer<const N: usize>(
        &self,
        layer: Map,
        make: impl FnOnce() -> Result<[Aligned; N]>,
    ) -> Result<[Arc<Aligned>; N]> {
        let list = self.list(layer, || Ok(make()?.into()))?;
        Ok(std::array::from_fn(|i| list[i].clone()))
    }

    /// The same of a layer that has as many as `make` makes.
    ///
    /// # Errors
    /// Those of `make`.
    pub(super) fn list(
        &self,
        layer: Map,
        make: impl FnOnce() -> Result<Vec<Aligned>>,
    ) -> Result<Vec<Arc<Aligned>>> {
        let mut all = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = all.get(&layer) {
            return Ok(there.clone());
        }
        let made: Vec<_> = make()?.into_iter().map(Arc::new).collect();
        all.insert(layer, made.clone());
        Ok(made)
    }

    /// The transforms by which a convolution's weights are kept, `own` being what pays for this size.
    pub(super) fn variant(&self, layer: Map, own: Option<Variant>) -> Option<Variant> {
        let mut all = self.variants.lock().unwrap_or_else(PoisonError::into_inner);
        *all.entry(layer).or_insert(own)
    }
}
