//! Networks that see a prompt, held against the files that diffusers made, and against themselves in other batches.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use understudy_models::kernels::Isa;
use understudy_models::{Conditions, Denoiser, NetworkConfig, Prompt};

use crate::described::{Described, weights};
use crate::numbers::{bits, formula, relative_error};

/// As the scripts have them.
const X_SEED: u32 = 1_000_001;
const PROMPT_SEED: u32 = 1_000_002;
const DIRECTION_SEED: u32 = 1_000_004;
const WEIGHT_SEED: u32 = 1_000_005;

/// A network of a script's, and what it is asked: three rows.
#[derive(Clone)]
pub(crate) struct Prompted {
    pub(crate) golden: Described,
    pub(crate) config: NetworkConfig,
    pub(crate) x: Tensor,
    pub(crate) timesteps: Tensor,
    pub(crate) condition: Option<Tensor>,
    pub(crate) prompt: Tensor,
    pub(crate) guidance: Option<Tensor>,
}

impl Prompted {
    /// Of a configuration at the size and for the prompts that it is asked about.
    pub(crate) fn new(golden: Described, config: NetworkConfig, timesteps: &[f32]) -> Self {
        let geometry = config.geometry();
        let Prompt { tokens, width } = geometry.prompt.unwrap();
        let rows = timesteps.len();
        let shape = [rows, geometry.in_channels, geometry.height, geometry.width];
        Self {
            x: formula(&shape, 1.7, X_SEED),
            timesteps: Tensor::new(timesteps, &Device::Cpu).unwrap(),
            condition: None,
            prompt: formula(&[rows, tokens, width], 1.7, PROMPT_SEED),
            guidance: None,
            golden,
            config,
        }
    }

    /// The one of that name.
    pub(crate) fn named(all: Vec<Self>, name: &str) -> Self {
        all.into_iter().find(|case| case.golden.name == name).unwrap()
    }

    pub(crate) fn network(&self, dtype: DType) -> Box<dyn Denoiser> {
        let weights = weights(&self.config.weight_shapes());
        self.config.load(weights, dtype, &Device::Cpu).unwrap()
    }

    pub(crate) fn conditions(&self) -> Conditions<'_> {
        Conditions {
            condition: self.condition.as_ref(),
            prompt: Some(&self.prompt),
            guidance: self.guidance.as_ref(),
        }
    }

    /// Some rows, one after another.
    pub(crate) fn answer(&self, network: &dyn Denoiser, rows: &[u32]) -> Tensor {
        let rows = Tensor::new(rows, &Device::Cpu).unwrap();
        let pick = |tensor: &Tensor| tensor.index_select(&rows, 0).unwrap();
        let picked = Self {
            condition: self.condition.as_ref().map(pick),
            prompt: pick(&self.prompt),
            guidance: self.guidance.as_ref().map(pick),
            ..self.clone()
        };
        let x = pick(&self.x).to_dtype(network.dtype()).unwrap();
        let y = network.evaluate(&x, &pick(&self.timesteps), picked.conditions()).unwrap();
        y.to_dtype(DType::F32).unwrap()
    }

    fn check_answer(&self, network: &dyn Denoiser, dtype: DType, limit: f32) {
        let error = relative_error(&self.answer(network, &[0, 1, 2]), self.golden.tensor("output"));
        println!("{} {dtype:?}: {error:.2e}", self.golden.name);
        assert!(error <= limit, "{} {dtype:?}: {error:e}", self.golden.name);
    }

    fn check_rows(&self, network: &dyn Denoiser) {
        let alone: Vec<_> = (0..3).map(|row| bits(&self.answer(network, &[row]))).collect();
        let rows = [2, 1, 0, 0, 1, 2, 2, 1];
        let together = self.answer(network, &rows);
        for (i, &row) in rows.iter().enumerate() {
            let found = bits(&together.get(i).unwrap());
            assert!(found == alone[row as usize], "{}: row {i}", self.golden.name);
        }
    }
}

/// Of the compiled network in f32, and of candle's operations in f64.
pub(crate) fn check_answers(cases: &[Prompted]) {
    for case in cases {
        for dtype in [DType::F32, DType::F64] {
            let network = case.network(dtype);
            assert_eq!(network.footprint().is_some(), dtype == DType::F32, "compiled");
            case.check_answer(&*network, dtype, 1e-5);
        }
    }
}

/// Eight bits of mantissa throughout, where the processor multiplies them; rows do not depend on their batch there either.
pub(crate) fn check_bf16(cases: &[Prompted], limit: f32) {
    if !Isa::detect().multiplies_bf16() {
        println!("this processor does not multiply bf16: nothing compared");
        return;
    }
    for case in cases {
        let network = case.network(DType::BF16);
        assert_eq!(network.dtype(), DType::F32, "what it takes and gives");
        case.check_answer(&*network, DType::BF16, limit);
        case.check_rows(&*network);
    }
}

/// A row's bits, alone and among others.
pub(crate) fn check_rows(cases: &[Prompted]) {
    for case in cases {
        case.check_rows(&*case.network(DType::F32));
    }
}

/// Tests of this binary in each instruction set: kernels choose theirs once per process, so each needs a process of its own.
pub(crate) fn check_instruction_sets(tests: &[&str]) {
    for isa in Isa::available() {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .arg("--exact")
            .args(tests)
            .env("UNDERSTUDY_ISA", isa.to_string())
            .output()
            .unwrap();
        assert!(output.status.success(), "{isa}: {}", String::from_utf8_lossy(&output.stdout));
    }
}

/// By the noisy sample and by every weight of a network that is trained, but `fixed` ones, which have none. Errors are told of a
/// gradient's norm and `floor` of all: one may be nothing but rounding, as that of a key's bias.
pub(crate) fn check_gradients(cases: &[Prompted], least: usize, fixed: &[&str], floor: f64) {
    let trained = cases.iter().filter(|case| case.golden.tensors.contains_key("gradients"));
    let trained: Vec<&Prompted> = trained.collect();
    assert!(trained.len() >= least);
    for case in trained {
        for dtype in [DType::F32, DType::F64] {
            let name = &case.golden.name;
            let to = |tensor: &Tensor| tensor.to_dtype(dtype).unwrap();
            let vars: HashMap<String, Var> = weights(&case.config.weight_shapes())
                .into_iter()
                .map(|(name, weight)| (name, Var::from_tensor(&to(&weight)).unwrap()))
                .collect();
            let tensors =
                vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
            let network = case.config.load(tensors, dtype, &Device::Cpu).unwrap();
            let x = Var::from_tensor(&to(&case.x)).unwrap();
            let y = network.evaluate(&x, &case.timesteps, case.conditions()).unwrap();
            let direction = to(&formula(y.dims(), 1.0, DIRECTION_SEED));
            let gradients = (y * direction).unwrap().sum_all().unwrap().backward().unwrap();
            let of_x = gradients.get(&x).unwrap().to_dtype(DType::F32).unwrap();
            let error = relative_error(&of_x, case.golden.tensor("gradient_x"));
            println!("{name} {dtype:?} x: {error:.2e}");
            assert!(error <= 1e-5, "{name} {dtype:?} x: {error:e}");
            let expected = case.golden.tensor("gradients").to_vec2::<f64>().unwrap();
            let all = expected.iter().map(|pair| pair[0] * pair[0]).sum::<f64>().sqrt();
            let mut shapes = case.config.weight_shapes();
            for name in fixed {
                shapes.remove(*name).unwrap();
                assert!(gradients.get(&vars[*name]).is_none(), "{name} is not trained");
            }
            assert_eq!(shapes.len(), expected.len());
            let mut worst = 0f64;
            for (weight, expected) in shapes.keys().zip(&expected) {
                let gradient = gradients.get(&vars[weight]).unwrap().to_dtype(DType::F64).unwrap();
                let direction =
                    formula(gradient.dims(), 1.0, WEIGHT_SEED).to_dtype(DType::F64).unwrap();
                let sum = |x: Tensor| x.sum_all().unwrap().to_scalar::<f64>().unwrap();
                let norm = sum(gradient.sqr().unwrap()).sqrt();
                let along = sum((&gradient * direction).unwrap());
                let scale = expected[0] + floor * all;
                let error = (norm - expected[0]).abs().max((along - expected[1]).abs()) / scale;
                worst = worst.max(error);
                assert!(error <= 2e-5, "{name} {dtype:?} {weight}: {error:e}");
            }
            println!("{name} {dtype:?} weights: {worst:.2e}");
        }
    }
}
