//! Where layers find their weights, and the check that a set of weights fits a configuration.
//!
//! The constructors are the only description of the network's weights. Run without tensors they
//! record what they ask for ([`shapes`]); run with tensors they take it.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;

use candle_core::{DType, Device, Tensor};

use crate::weight::Weight;
use crate::wrappers::{Naming, take_off};
use crate::{Error, Result};

enum Store {
    /// Nothing is there: note names and shapes.
    Record(Shapes),
    /// Checked weights, each taken once.
    Take { weights: HashMap<String, Weight>, trained: bool },
}

/// A place in the tree of weights, named as in diffusers: `down_blocks.0.resnets.1`.
pub(crate) struct Weights<'a> {
    prefix: String,
    store: &'a RefCell<Store>,
    dtype: DType,
    device: &'a Device,
    parameters: usize,
}

impl Weights<'_> {
    /// The place `name` below this one.
    pub(crate) fn at(&self, name: impl Display) -> Self {
        Self { prefix: self.name(name), ..*self }
    }

    /// The tensor `name` in the network's element type and on its device.
    pub(crate) fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.get_as(name, shape, self.dtype)
    }

    /// The same weights, in f32 unless another type is asked for.
    #[cfg(feature = "cuda")]
    pub(crate) fn in_f32(&self) -> Self {
        Self { prefix: self.prefix.clone(), dtype: DType::F32, ..*self }
    }

    /// The tensor `name` in an element type of its own.
    pub(crate) fn get_as(&self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let name = self.name(name);
        match &mut *self.store.borrow_mut() {
            Store::Record(shapes) => {
                shapes.insert(name, shape.to_vec());
                // One element seen everywhere: the right shape, and no memory however large it is.
                Ok(Tensor::zeros((), dtype, &Device::Cpu)?.broadcast_as(shape)?)
            }
            Store::Take { weights, .. } => {
                let weight = weights
                    .remove(&name)
                    .ok_or_else(|| Error::Weights(format!("`{name}` is asked for twice")))?;
                Ok(weight.take()?.to_device(self.device)?.to_dtype(dtype)?)
            }
        }
    }

    /// Whether several weights may be merged into one new tensor: not while only recording, and not
    /// where a weight is trained, since the copy would not follow its updates.
    pub(crate) fn may_merge(&self) -> bool {
        matches!(&*self.store.borrow(), Store::Take { trained: false, .. })
    }

    /// Whether some weight tracks gradients.
    pub(crate) fn trained(&self) -> bool {
        matches!(&*self.store.borrow(), Store::Take { trained: true, .. })
    }

    /// The element type of the network.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the network lives.
    pub(crate) fn device(&self) -> &Device {
        self.device
    }

    /// Number of weights in all tensors together; 0 while only recording.
    pub(crate) fn parameters(&self) -> usize {
        self.parameters
    }

    fn name(&self, name: impl Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}

/// Names and shapes of all weights that `build` asks for.
pub(crate) fn shapes<T>(build: impl FnOnce(&Weights) -> Result<T>) -> Result<Shapes> {
    let store = RefCell::new(Store::Record(BTreeMap::new()));
    build(&root(&store, DType::F32, &Device::Cpu, 0))?;
    match store.into_inner() {
        Store::Record(shapes) => Ok(shapes),
        Store::Take { .. } => unreachable!("the store is made a few lines above"),
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

/// Builds a network from weights that fit it.
pub(crate) fn build<T>(
    weights: HashMap<String, Weight>,
    dtype: DType,
    device: &Device,
    build: impl FnOnce(&Weights) -> Result<T>,
) -> Result<T> {
    let trained = weights.values().any(Weight::trained);
    let parameters = weights.values().map(|weight| weight.dims().iter().product::<usize>()).sum();
    let store = RefCell::new(Store::Take { weights, trained });
    build(&root(&store, dtype, device, parameters))
}

fn root<'a>(
    store: &'a RefCell<Store>,
    dtype: DType,
    device: &'a Device,
    parameters: usize,
) -> Weights<'a> {
    Weights { prefix: String::new(), store, dtype, device, parameters }
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
