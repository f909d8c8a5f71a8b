//! Where layers find their weights, and the check that a set of weights fits a configuration.
//!
//! The constructors are the only description of the network's weights. Run without tensors they
//! record what they ask for ([`shapes`]); run with tensors they take it.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;

use candle_core::{DType, Device, Tensor};

use super::{UNet2DConfig, UNet2DModel};
use crate::kernels::{Isa, Numbers};
use crate::weight::Weight;
use crate::{Error, Result};

enum Store {
    /// Nothing is there: note names and shapes.
    Record(Shapes),
    /// Checked weights, each taken once.
    Take { weights: HashMap<String, Weight>, trained: bool },
}

/// A place in the tree of weights, named as in diffusers: `down_blocks.0.resnets.1`.
pub(super) struct Weights<'a> {
    prefix: String,
    store: &'a RefCell<Store>,
    dtype: DType,
    device: &'a Device,
    parameters: usize,
}

impl Weights<'_> {
    /// The place `name` below this one.
    pub(super) fn at(&self, name: impl Display) -> Self {
        Self { prefix: self.name(name), ..*self }
    }

    /// The tensor `name` in the network's element type and on its device.
    pub(super) fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.get_as(name, shape, self.dtype)
    }

    /// The tensor `name` in an element type of its own.
    pub(super) fn get_as(&self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
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
    pub(super) fn may_merge(&self) -> bool {
        matches!(&*self.store.borrow(), Store::Take { trained: false, .. })
    }

    /// Whether some weight tracks gradients.
    pub(super) fn trained(&self) -> bool {
        matches!(&*self.store.borrow(), Store::Take { trained: true, .. })
    }

    /// The element type of the network.
    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the network lives.
    pub(super) fn device(&self) -> &Device {
        self.device
    }

    /// Number of weights in all tensors together; 0 while only recording.
    pub(super) fn parameters(&self) -> usize {
        self.parameters
    }

    fn name(&self, name: impl Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}

/// Names and shapes of all weights of the network that `config` describes.
pub(super) fn shapes(config: &UNet2DConfig) -> Result<Shapes> {
    let store = RefCell::new(Store::Record(BTreeMap::new()));
    UNet2DModel::build(config, &root(&store, DType::F32, &Device::Cpu, 0), Numbers::F32)?;
    match store.into_inner() {
        Store::Record(shapes) => Ok(shapes),
        Store::Take { .. } => unreachable!("the store is made a few lines above"),
    }
}

/// Gives the weights their names of today and checks that they are exactly those needed.
pub(super) fn fit(
    config: &UNet2DConfig,
    mut weights: HashMap<String, Weight>,
) -> Result<HashMap<String, Weight>> {
    rename_legacy_attention(&mut weights);
    let found = weights.iter().map(|(name, weight)| (name.clone(), weight.dims().to_vec()));
    if let Some(difference) = mismatch(&shapes(config)?, &found.collect()) {
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

/// Checks the weights and builds the network from them.
pub(super) fn build(
    config: &UNet2DConfig,
    weights: HashMap<String, Weight>,
    dtype: DType,
    device: &Device,
) -> Result<UNet2DModel> {
    let weights = fit(config, weights)?;
    let trained = weights.values().any(Weight::trained);
    let parameters = weights.values().map(|weight| weight.dims().iter().product::<usize>()).sum();
    // The compiled network packs its weights from f32, whatever its products are of.
    let (dtype, numbers) = match dtype {
        DType::BF16 if device.is_cpu() && !trained => (DType::F32, bf16()?),
        other => (other, Numbers::F32),
    };
    let store = RefCell::new(Store::Take { weights, trained });
    UNet2DModel::build(config, &root(&store, dtype, device, parameters), numbers)
}

/// bf16, where this processor multiplies it.
fn bf16() -> Result<Numbers> {
    if Isa::detect().multiplies_bf16() {
        return Ok(Numbers::Bf16);
    }
    let remedy = "this processor does not multiply bf16 (AVX512-BF16); use f32";
    Err(Error::value("dtype", "bf16", remedy))
}

fn root<'a>(
    store: &'a RefCell<Store>,
    dtype: DType,
    device: &'a Device,
    parameters: usize,
) -> Weights<'a> {
    Weights { prefix: String::new(), store, dtype, device, parameters }
}

/// Checkpoints written before diffusers 0.15, most of those on the Hub among them, have other names
/// for the four products of an attention.
fn rename_legacy_attention(weights: &mut HashMap<String, Weight>) {
    const RENAMED: [(&str, &str); 4] =
        [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")];
    let legacy: Vec<String> =
        weights.keys().filter(|name| name.contains("attentions.")).cloned().collect();
    for name in legacy {
        for (old, new) in RENAMED {
            for end in ["weight", "bias"] {
                let Some(path) = name.strip_suffix(&format!(".{old}.{end}")) else {
                    continue;
                };
                if let Some(weight) = weights.remove(&name) {
                    weights.insert(format!("{path}.{new}.{end}"), weight);
                }
            }
        }
    }
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
