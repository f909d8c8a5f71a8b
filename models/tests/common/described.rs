//! Golden files that hold no weights: these are by a formula, as `golden/formula.py` has it.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::numbers::formula;

/// One file of such a script.
#[derive(Clone)]
pub(crate) struct Described {
    pub(crate) name: String,
    pub(crate) config: Value,
    pub(crate) metadata: HashMap<String, String>,
    pub(crate) tensors: HashMap<String, Tensor>,
}

impl Described {
    pub(crate) fn all(folder: &str) -> Vec<Self> {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(folder);
        let mut paths: Vec<PathBuf> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        let read = |path: PathBuf| {
            let bytes = std::fs::read(&path).unwrap();
            let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
            let metadata = header.metadata().clone().unwrap();
            Self {
                name: path.file_stem().unwrap().to_str().unwrap().to_owned(),
                config: serde_json::from_str(&metadata["config"]).unwrap(),
                metadata,
                tensors: candle_core::safetensors::load(&path, &Device::Cpu).unwrap(),
            }
        };
        paths.into_iter().map(read).collect()
    }

    pub(crate) fn tensor(&self, name: &str) -> &Tensor {
        &self.tensors[name]
    }
}

/// The weights of a network by name and shape.
pub(crate) fn weights(shapes: &BTreeMap<String, Vec<usize>>) -> HashMap<String, Tensor> {
    let weight = |(seed, (name, shape)): (usize, (&String, &Vec<usize>))| {
        let values = match &shape[..] {
            [_] if name.contains("norm") && name.ends_with("weight") => {
                (formula(shape, 0.3, seed as u32) + 1.0).unwrap()
            }
            [_] => formula(shape, 0.3, seed as u32),
            [_, rest @ ..] => {
                let inputs: usize = rest.iter().product();
                formula(shape, (3.0 / inputs as f32).sqrt(), seed as u32)
            }
            [] => panic!("{name} is a number"),
        };
        (name.clone(), values)
    };
    shapes.iter().enumerate().map(weight).collect()
}
