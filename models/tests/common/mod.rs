//! Golden files of networks, and how their answers are compared.
#![allow(clippy::unwrap_used)]

mod numbers;

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde_json::Value;
use understudy_models::{Conditioning, Geometry};

pub(crate) use numbers::{bits, formula, relative_error};

/// One network: a file of `make_unets.py` or `make_dits.py`.
pub(crate) struct Golden {
    pub(crate) name: String,
    pub(crate) config: Value,
    pub(crate) weights: HashMap<String, Tensor>,
    pub(crate) x: Tensor,
    pub(crate) timesteps: Tensor,
    pub(crate) condition: Option<Tensor>,
    pub(crate) output: Tensor,
    /// What only some files hold.
    #[allow(dead_code)]
    pub(crate) more: HashMap<String, Tensor>,
}

impl Golden {
    pub(crate) fn read(folder: &str, name: &str) -> Self {
        let path = golden(folder).join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let config = &header.metadata().as_ref().unwrap()["config"];
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let mut take = |name: &str| tensors.remove(name).unwrap();
        let (x, timesteps, output) = (take("x"), take("timesteps"), take("output"));
        let condition = tensors.remove("condition");
        let (mut weights, mut more) = (HashMap::new(), HashMap::new());
        for (name, tensor) in tensors {
            match name.strip_prefix("weights/") {
                Some(name) => {
                    weights.insert(name.to_string(), tensor.to_dtype(DType::F32).unwrap())
                }
                None => more.insert(name, tensor),
            };
        }
        Self {
            name: name.to_string(),
            config: serde_json::from_str(config).unwrap(),
            weights,
            x,
            timesteps,
            condition,
            output,
            more,
        }
    }

    pub(crate) fn read_all(folder: &str) -> Vec<Self> {
        let mut names: Vec<String> = std::fs::read_dir(golden(folder))
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_string())
            .collect();
        names.sort();
        names.iter().map(|name| Self::read(folder, name)).collect()
    }

    /// The condition in the type the network asks for.
    pub(crate) fn condition_for(&self, geometry: &Geometry) -> Option<Tensor> {
        let condition = self.condition.as_ref()?;
        Some(match geometry.conditioning {
            Conditioning::Classes(_) => condition.to_dtype(DType::U32).unwrap(),
            _ => condition.clone(),
        })
    }
}

fn golden(folder: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(folder)
}

/// What a process prints of this test run again with that many threads: candle reads the thread count
/// once per process.
pub(crate) fn digest_in_process(test: &str, variable: &str, threads: &str) -> String {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(variable, "1")
        .env("RAYON_NUM_THREADS", threads)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().find(|line| line.starts_with("digest ")).expect(&text).to_string()
}

/// FNV-1a of a tensor's bits, on a line of its own.
pub(crate) fn print_digest(tensor: &Tensor) {
    let digest = bits(tensor).into_iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, bits| {
        (hash ^ u64::from(bits)).wrapping_mul(0x0100_0000_01b3)
    });
    println!("\ndigest {digest:016x}");
}
