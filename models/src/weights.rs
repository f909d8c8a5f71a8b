//! The weights of a network on their way into it, and the check that a set of weights fits a configuration.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor};

use crate::graph::WeightSpec;
use crate::weight::Weight;
use crate::wrappers::{Naming, take_off};
use crate::{Error, Result};

/// Checked weights, each read when the operation that has it is added.
pub(crate) struct Weights {
    store: RefCell<HashMap<String, Weight>>,
    dtype: DType,
    device: Device,
    trained: bool,
    parameters: usize,
}

impl Weights {
    /// Those of a network, of `dtype` on `device`; [`fit`] has checked them.
    pub(crate) fn new(weights: HashMap<String, Weight>, dtype: DType, device: &Device) -> Self {
        let trained = weights.values().any(Weight::trained);
        let count = |weight: &Weight| weight.dims().iter().product::<usize>();
        let parameters = weights.values().map(count).sum();
        Self { store: RefCell::new(weights), dtype, device: device.clone(), trained, parameters }
    }

    /// A weight, in the network's element type and on its device.
    ///
    /// # Errors
    /// One that cannot be read.
    pub(crate) fn get(&self, weight: &WeightSpec) -> Result<Tensor> {
        self.get_as(weight, self.dtype)
    }

    /// A weight in an element type of its own.
    ///
    /// # Errors
    /// As [`Weights::get`].
    pub(crate) fn get_as(&self, weight: &WeightSpec, dtype: DType) -> Result<Tensor> {
        let WeightSpec { name, readers, .. } = weight;
        let there = self.store.borrow_mut().remove(name);
        let missing = || Error::Weights(format!("`{name}` is asked for twice"));
        let tensor = there.ok_or_else(missing)?.take()?;
        if *readers > 1 {
            self.store.borrow_mut().insert(name.clone(), Weight::Here(tensor.clone()));
        }
        Ok(tensor.to_device(&self.device)?.to_dtype(dtype)?)
    }

    /// Whether some weight tracks gradients: then all stay as they are, since a copy would not follow its updates.
    pub(crate) fn trained(&self) -> bool {
        self.trained
    }

    /// The element type of the network.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the network lives.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Number of weights in all tensors together.
    pub(crate) fn parameters(&self) -> usize {
        self.parameters
    }
}

/// Checks that the weights are exactly those needed, once what wrappers add to their names is taken off.
pub(crate) fn fit(
    shapes: &Shapes,
    weights: HashMap<String, Weight>,
) -> Result<HashMap<String, Weight>> {
    let naming =
        Naming::find(&shapes.keys().cloned().collect(), weights.keys().map(String::as_str));
    let weights = take_off(&naming, weights, "weights").map_err(Error::Weights)?;
    let found = weights.iter().map(|(name, weight)| (name.clone(), weight.dims().to_vec()));
    if let Some(difference) = mismatch(shapes, &found.collect()) {
        let remedy = "use the config.json that belongs to these weights";
        return Err(Error::Weights(format!("{difference}. {remedy}")));
    }
    let whole = weights.iter().filter(|(_, weight)| !weight.dtype().is_float());
    if let Some((name, weight)) = whole.min_by_key(|(name, _)| *name) {
        let dtype = weight.dtype().as_str();
        let problem = format!("`{name}` is {dtype}: weights are f16, bf16, f32 or f64");
        return Err(Error::Weights(problem));
    }
    Ok(weights)
}

/// How many tensors of a kind an error lists before it only counts.
const LISTED: usize = 8;

/// Names and shapes of tensors.
pub(crate) type Shapes = BTreeMap<String, Vec<usize>>;

/// Compares what is needed with what there is, and names every kind of difference at once.
pub(crate) fn mismatch(expected: &Shapes, found: &Shapes) -> Option<String> {
    let list = |(name, shape): (&String, &Vec<usize>)| format!("`{name}` {shape:?}");
    let only = |these: &Shapes, those: &Shapes| -> Vec<String> {
        these.iter().filter(|(name, _)| !those.contains_key(*name)).map(list).collect()
    };
    let misshapen = expected.iter().filter_map(|(name, shape)| {
        let found = found.get(name).filter(|found| *found != shape)?;
        Some(format!("`{name}` is {found:?}, not {shape:?}"))
    });
    let complaints: Vec<String> = [
        ("missing", only(expected, found)),
        ("not of this network", only(found, expected)),
        ("of another shape", misshapen.collect()),
    ]
    .into_iter()
    .filter(|(_, list)| !list.is_empty())
    .map(|(kind, list)| listed(kind, &list))
    .collect();
    (!complaints.is_empty()).then(|| complaints.join("; "))
}

fn listed(kind: &str, list: &[String]) -> String {
    let shown = list[..list.len().min(LISTED)].join(", ");
    match list.len().checked_sub(LISTED) {
        None | Some(0) => format!("{} {kind}: {shown}", list.len()),
        Some(more) => format!("{} {kind}: {shown} and {more} more", list.len()),
    }
}
