//! Inception-V3 as the Fréchet Inception Distance has it (Szegedy et al. 2015; Heusel et al. 2017):
//! the network of pytorch-fid, whose weights are `pt_inception-2015-12-05`.
//!
//! It differs from torchvision's: average pools leave the padding out, the last block pools by maximum,
//! and there are 1,008 logits. Images are resized to 299×299 bilinearly, without antialiasing and with
//! `align_corners` off. The Inception score is that of the logits without the bias, as in the original
//! code (Salimans et al. 2016) and torch-fidelity.

use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};

use candle_core::{DType, Device, Result, Tensor, bail};
use understudy_models::{Error, checkpoint::StateDict};

use super::{
    layers::{Convolution, Pool, Window},
    network::{FeatureNetwork, Observed},
};

const SIZE: usize = 299;
const WIDTH: usize = 2048;
const BATCH_NORM_EPS: f64 = 1e-3;

/// The network.
pub struct Inception {
    convolutions: HashMap<String, Convolution>,
    /// `[2048, 1008]`
    head: Tensor,
}

/// A convolution's name below its block, stride, and rows and columns of padding.
type Layer = (&'static str, usize, (usize, usize));

const STEM: [Layer; 5] = [
    ("Conv2d_1a_3x3", 2, (0, 0)),
    ("Conv2d_2a_3x3", 1, (0, 0)),
    ("Conv2d_2b_3x3", 1, (1, 1)),
    ("Conv2d_3b_1x1", 1, (0, 0)),
    ("Conv2d_4a_3x3", 1, (0, 0)),
];
const A: [Layer; 7] = [
    ("branch1x1", 1, (0, 0)),
    ("branch5x5_1", 1, (0, 0)),
    ("branch5x5_2", 1, (2, 2)),
    ("branch3x3dbl_1", 1, (0, 0)),
    ("branch3x3dbl_2", 1, (1, 1)),
    ("branch3x3dbl_3", 1, (1, 1)),
    ("branch_pool", 1, (0, 0)),
];
const B: [Layer; 4] = [
    ("branch3x3", 2, (0, 0)),
    ("branch3x3dbl_1", 1, (0, 0)),
    ("branch3x3dbl_2", 1, (1, 1)),
    ("branch3x3dbl_3", 2, (0, 0)),
];
const C: [Layer; 10] = [
    ("branch1x1", 1, (0, 0)),
    ("branch7x7_1", 1, (0, 0)),
    ("branch7x7_2", 1, (0, 3)),
    ("branch7x7_3", 1, (3, 0)),
    ("branch7x7dbl_1", 1, (0, 0)),
    ("branch7x7dbl_2", 1, (3, 0)),
    ("branch7x7dbl_3", 1, (0, 3)),
    ("branch7x7dbl_4", 1, (3, 0)),
    ("branch7x7dbl_5", 1, (0, 3)),
    ("branch_pool", 1, (0, 0)),
];
const D: [Layer; 6] = [
    ("branch3x3_1", 1, (0, 0)),
    ("branch3x3_2", 2, (0, 0)),
    ("branch7x7x3_1", 1, (0, 0)),
    ("branch7x7x3_2", 1, (0, 3)),
    ("branch7x7x3_3", 1, (3, 0)),
    ("branch7x7x3_4", 2, (0, 0)),
];
const E: [Layer; 9] = [
    ("branch1x1", 1, (0, 0)),
    ("branch3x3_1", 1, (0, 0)),
    ("branch3x3_2a", 1, (0, 1)),
    ("branch3x3_2b", 1, (1, 0)),
    ("branch3x3dbl_1", 1, (0, 0)),
    ("branch3x3dbl_2", 1, (1, 1)),
    ("branch3x3dbl_3a", 1, (0, 1)),
    ("branch3x3dbl_3b", 1, (1, 0)),
    ("branch_pool", 1, (0, 0)),
];

/// The blocks after the stem, in order.
const BLOCKS: [(&str, &[Layer]); 11] = [
    ("Mixed_5b", &A),
    ("Mixed_5c", &A),
    ("Mixed_5d", &A),
    ("Mixed_6a", &B),
    ("Mixed_6b", &C),
    ("Mixed_6c", &C),
    ("Mixed_6d", &C),
    ("Mixed_6e", &C),
    ("Mixed_7a", &D),
    ("Mixed_7b", &E),
    ("Mixed_7c", &E),
];

/// Every convolution: its name, stride and padding.
fn layers() -> impl Iterator<Item = (String, usize, (usize, usize))> {
    let blocks = BLOCKS.iter().flat_map(|(block, layers)| {
        layers
            .iter()
            .map(move |&(name, stride, padding)| (format!("{block}.{name}"), stride, padding))
    });
    let stem = STEM.iter().map(|&(name, stride, padding)| (name.to_owned(), stride, padding));
    stem.chain(blocks)
}

/// The tensors of pytorch-fid's state dict that are read.
fn names() -> impl Iterator<Item = String> {
    let parts = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"];
    let layers = layers().flat_map(move |(name, ..)| parts.map(|part| format!("{name}.{part}")));
    layers.chain(["fc.weight".to_owned()])
}

impl Inception {
    /// Reads the weights: pytorch-fid's `.pth`, or its state dict as safetensors, whatever the file is called.
    ///
    /// # Errors
    /// [`Error::Format`] naming the file: not one of these, or of another network.
    pub fn open(path: &Path) -> understudy_models::Result<Self> {
        let explain = |problem: String| Error::Format {
            path: path.to_owned(),
            problem: format!("{problem}; use pytorch-fid's pt_inception-2015-12-05 weights"),
        };
        let names: BTreeSet<String> = names().collect();
        let mut file = StateDict::open(path, &names).map_err(|error| match error {
            Error::Format { problem, .. } => explain(format!("cannot be read ({problem})")),
            error => error,
        })?;
        let mut tensors = HashMap::new();
        for name in names {
            let tensor = file.take(&name).map_err(|error| match error {
                Error::Format { problem, .. } => explain(format!("cannot be read ({problem})")),
                error => error,
            })?;
            tensors.insert(name, tensor);
        }
        Self::new(&tensors).map_err(|error| explain(error.to_string()))
    }

    /// From the tensors of pytorch-fid's state dict; batch norms are folded into the convolutions.
    ///
    /// # Errors
    /// A tensor that is not there, or of a shape that does not fit.
    pub fn new(tensors: &HashMap<String, Tensor>) -> Result<Self> {
        let find = |name: String| match tensors.get(&name) {
            Some(tensor) => tensor.to_dtype(DType::F32),
            None => bail!("has no tensor `{name}`"),
        };
        let mut convolutions = HashMap::new();
        for (name, stride, padding) in layers() {
            let weight = find(format!("{name}.conv.weight"))?;
            let norm = |part: &str| find(format!("{name}.bn.{part}"));
            let scale = (norm("weight")? / (norm("running_var")? + BATCH_NORM_EPS)?.sqrt()?)?;
            let bias = (norm("bias")? - (norm("running_mean")? * &scale)?)?;
            let weight = weight.broadcast_mul(&scale.reshape(((), 1, 1, 1))?)?;
            let convolution = Convolution::from_torch(&weight, Some(bias), stride, padding)?;
            convolutions.insert(name, convolution);
        }
        let head = find("fc.weight".into())?;
        if head.dims() != [1008, WIDTH] {
            bail!("`fc.weight` is {:?}, not [1008, {WIDTH}]", head.dims());
        }
        let network = Self { convolutions, head: head.t()?.contiguous()? };
        // Whether every convolution fits the next shows when an image passes through them.
        network.observe(&Tensor::zeros((1, 3, 32, 32), DType::F32, &Device::Cpu)?)?;
        Ok(network)
    }

    /// Convolution and ReLU.
    fn layer(&self, block: &str, name: &str, x: &Tensor) -> Result<Tensor> {
        let name = if block.is_empty() { name.to_owned() } else { format!("{block}.{name}") };
        match self.convolutions.get(&name) {
            Some(convolution) => convolution.forward(x)?.relu(),
            None => bail!("no layer `{name}`"),
        }
    }

    /// Several layers one after another.
    fn chain(&self, block: &str, names: &[&str], x: &Tensor) -> Result<Tensor> {
        names.iter().try_fold(x.clone(), |x, name| self.layer(block, name, &x))
    }

    fn block(&self, block: &str, x: &Tensor) -> Result<Tensor> {
        let chain = |names: &[&str], x: &Tensor| self.chain(block, names, x);
        let same = Window::square(3, 1, 1);
        let halve = Window::square(3, 2, 0);
        let branches = match block {
            "Mixed_5b" | "Mixed_5c" | "Mixed_5d" => vec![
                chain(&["branch1x1"], x)?,
                chain(&["branch5x5_1", "branch5x5_2"], x)?,
                chain(&["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], x)?,
                chain(&["branch_pool"], &Pool::Mean.forward(x, same)?)?,
            ],
            "Mixed_6a" => vec![
                chain(&["branch3x3"], x)?,
                chain(&["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], x)?,
                Pool::Largest.forward(x, halve)?,
            ],
            "Mixed_7a" => vec![
                chain(&["branch3x3_1", "branch3x3_2"], x)?,
                chain(&["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"], x)?,
                Pool::Largest.forward(x, halve)?,
            ],
            "Mixed_7b" | "Mixed_7c" => {
                let single = chain(&["branch3x3_1"], x)?;
                let double = chain(&["branch3x3dbl_1", "branch3x3dbl_2"], x)?;
                // pytorch-fid: the last block of this network pools by maximum.
                let pool = if block == "Mixed_7c" { Pool::Largest } else { Pool::Mean };
                vec![
                    chain(&["branch1x1"], x)?,
                    chain(&["branch3x3_2a"], &single)?,
                    chain(&["branch3x3_2b"], &single)?,
                    chain(&["branch3x3dbl_3a"], &double)?,
                    chain(&["branch3x3dbl_3b"], &double)?,
                    chain(&["branch_pool"], &pool.forward(x, same)?)?,
                ]
            }
            _ => vec![
                chain(&["branch1x1"], x)?,
                chain(&["branch7x7_1", "branch7x7_2", "branch7x7_3"], x)?,
                chain(
                    &[
                        "branch7x7dbl_1",
                        "branch7x7dbl_2",
                        "branch7x7dbl_3",
                        "branch7x7dbl_4",
                        "branch7x7dbl_5",
                    ],
                    x,
                )?,
                chain(&["branch_pool"], &Pool::Mean.forward(x, same)?)?,
            ],
        };
        Tensor::cat(&branches, 3)
    }
}

impl FeatureNetwork for Inception {
    fn name(&self) -> &str {
        "inception-2015-12-05"
    }

    fn distance(&self) -> String {
        "FID".into()
    }

    fn width(&self) -> usize {
        WIDTH
    }

    fn input(&self) -> Option<(usize, usize, usize)> {
        None
    }

    fn batch(&self) -> usize {
        8
    }

    fn observe(&self, images: &Tensor) -> Result<Observed> {
        let (batch, channels, height, width) = images.dims4()?;
        let images = match channels {
            3 => images.clone(),
            1 => images.broadcast_as((batch, 3, height, width))?.contiguous()?,
            _ => bail!("Inception takes gray or RGB images, not {channels} channels"),
        };
        // pytorch-fid scales to [−1, 1] after the resize; its weights sum to 1, so that is the same.
        let x = images.upsample_bilinear2d(SIZE, SIZE, false)?;
        let x = x.permute((0, 2, 3, 1))?.contiguous()?;
        let halve = Window::square(3, 2, 0);
        let x = self.chain("", &["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"], &x)?;
        let x = Pool::Largest.forward(&x, halve)?;
        let x = self.chain("", &["Conv2d_3b_1x1", "Conv2d_4a_3x3"], &x)?;
        let x = Pool::Largest.forward(&x, halve)?;
        let x = BLOCKS.iter().try_fold(x, |x, (block, _)| self.block(block, &x))?;
        let features = x.flatten(1, 2)?.mean(1)?;
        let logits = features.matmul(&self.head)?;
        Ok(Observed { features, logits })
    }
}
