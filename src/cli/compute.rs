//! Arguments that several commands share: which model, and what it runs on.

use std::{
    num::{NonZeroU16, NonZeroU64},
    path::PathBuf,
    sync::Arc,
};

use candle_core::{DType, Device, DeviceLocation, utils::cuda_is_available};
use serde_json::{Map, Value, json};
use understudy_models::{
    checkpoint::{Lora, ModelFolder, hub},
    kernels::Isa,
    quantization::INT8,
};

use super::models_arg::ModelsArg;
use crate::{
    engine::{CostModel, stage::Stage},
    registry::{Model, Origin},
};

/// Which model.
#[derive(Debug, clap::Args)]
pub(super) struct ModelArg {
    /// A model folder, a name inside --models, or a Hub id (owner/name).
    #[arg(long, value_name = "MODEL")]
    model: String,
    #[command(flatten)]
    models: ModelsArg,
    /// A LoRA that is added to the model's weights, and how much of it [default: 1]; may be given several times.
    #[arg(long, value_name = "FILE[:SCALE]", value_parser = lora_file)]
    lora: Vec<(PathBuf, f64)>,
    /// On a GPU, give every evaluation --batch rows, as `serve --deterministic` does: with as many rows a seed
    /// gives the same bits in both.
    #[arg(long)]
    deterministic: bool,
}

/// What networks run on.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Compute")]
pub(crate) struct Compute {
    /// auto, cpu or cuda:N; serve takes several GPUs (cuda:0,cuda:1), each with every model.
    #[arg(long, env = "UNDERSTUDY_DEVICE", default_value = "auto")]
    pub(crate) device: String,
    /// auto, f32, bf16, f16 or int8; auto is f32 on a CPU, which must have AVX512-BF16 for bf16, and bf16 on a
    /// GPU. int8 is for models that `understudy quantize` made, on a CPU with AVX512-VNNI.
    #[arg(long, env = "UNDERSTUDY_DTYPE", default_value = "auto")]
    pub(crate) dtype: String,
    /// CPU threads [default: all this process may use].
    #[arg(long, env = "UNDERSTUDY_THREADS", value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<NonZeroU16>,
    /// Memory that a model may take, weights and one image's evaluation; a larger one is refused [default: what is
    /// free].
    #[arg(long, env = "UNDERSTUDY_MAX_MODEL_BYTES", value_name = "BYTES")]
    pub(crate) max_model_bytes: Option<NonZeroU64>,
}

/// Most threads: each takes a stack, and no machine has more processors.
const MOST_THREADS: u16 = 1024;

fn threads(text: &str) -> Result<NonZeroU16, String> {
    let asked = text.parse().ok().filter(|asked: &NonZeroU16| asked.get() <= MOST_THREADS);
    asked.ok_or_else(|| format!("write a whole number from 1 to {MOST_THREADS}"))
}

/// What `--device` says.
#[derive(Debug, PartialEq)]
enum Asked {
    /// The first GPU where there is one and the build has CUDA, else the CPU.
    Auto,
    Cpu,
    /// GPUs by number, all different.
    Cuda(Vec<usize>),
}

impl Asked {
    fn parse(text: &str) -> Result<Self, String> {
        let refuse = |problem: &str| Err(format!("--device {text}: {problem}"));
        match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            _ => {}
        }
        let mut gpus = Vec::new();
        for name in text.split(',') {
            let number = name.strip_prefix("cuda:").or((name == "cuda").then_some("0"));
            match number.map(str::parse) {
                Some(Ok(gpu)) if gpus.contains(&gpu) => {
                    return refuse("names a GPU twice; one network on it uses all of it");
                }
                Some(Ok(gpu)) => gpus.push(gpu),
                _ => return refuse("use auto, cpu, cuda:N, or several GPUs as in cuda:0,cuda:1"),
            }
        }
        Ok(Self::Cuda(gpus))
    }
}

#[cfg(feature = "cuda")]
use crate::gpu::{exists as gpu_exists, open as open_gpu};

/// A build without CUDA knows none.
#[cfg(not(feature = "cuda"))]
fn gpu_exists() -> bool {
    false
}

#[cfg(not(feature = "cuda"))]
fn open_gpu(gpu: usize) -> candle_core::Result<Device> {
    Device::new_cuda(gpu)
}

impl Compute {
    /// The devices: the CPU, or GPUs.
    ///
    /// # Errors
    /// A sentence when they are not some that this build and this machine have.
    pub(crate) fn devices(&self) -> Result<Vec<Device>, String> {
        let named = self.device.as_str();
        let gpus = match Asked::parse(named)? {
            Asked::Cpu => return Ok(vec![Device::Cpu]),
            Asked::Auto if !gpu_exists() => return Ok(vec![Device::Cpu]),
            Asked::Auto => vec![0],
            Asked::Cuda(_) if !cuda_is_available() => {
                return Err(format!(
                    "--device {named}: this build knows no GPU; use cpu, or build with \
                     `cargo build --release --features cuda`"
                ));
            }
            Asked::Cuda(gpus) => gpus,
        };
        let open = |gpu: usize| {
            open_gpu(gpu).map_err(|error| {
                format!(
                    "--device {named}: GPU {gpu} cannot be used: {error}; nvidia-smi lists those \
                     there are; or use cpu"
                )
            })
        };
        gpus.into_iter().map(open).collect()
    }

    /// The one device of a command that uses no more.
    ///
    /// # Errors
    /// As [`Compute::devices`]; a sentence when there are several.
    pub(crate) fn device(&self) -> Result<Device, String> {
        let mut devices = self.devices()?;
        match (devices.pop(), devices.is_empty()) {
            (Some(device), true) => Ok(device),
            _ => Err(format!("--device {}: only serve uses several; name one", self.device)),
        }
    }

    /// The device that training is done on, and the type in which networks without gradients are evaluated
    /// there.
    ///
    /// # Errors
    /// A sentence naming the flag.
    pub(super) fn for_training(&self) -> Result<(Device, DType), String> {
        let device = self.device()?;
        match self.dtype(&device)? {
            INT8 => {
                Err("--dtype int8: only what is not trained is evaluated so; use f32 or bf16"
                    .into())
            }
            DType::F16 => Err("--dtype f16: its gradients vanish; train in bf16 or f32".into()),
            dtype => Ok((device, dtype)),
        }
    }

    /// The type in which networks with gradients are evaluated where others are in `dtype`: theirs on a GPU,
    /// f32 on a CPU. Weights are f32 everywhere.
    pub(super) fn trained(device: &Device, dtype: DType) -> DType {
        if device.is_cpu() { DType::F32 } else { dtype }
    }

    /// What of it makes a training run another one than the same on a CPU.
    pub(super) fn identity(device: &Device, dtype: DType) -> Map<String, Value> {
        let identity = match device {
            Device::Cpu => json!({}),
            _ => json!({ "device": "gpu", "dtype": dtype.as_str() }),
        };
        identity.as_object().cloned().unwrap_or_default()
    }

    /// The element type of weights and activations on a device.
    ///
    /// # Errors
    /// A sentence when it is unknown, or the device cannot compute in it.
    pub(crate) fn dtype(&self, device: &Device) -> Result<DType, String> {
        match (self.dtype.as_str(), device.is_cpu()) {
            ("auto", true) | ("f32", _) => Ok(DType::F32),
            ("auto" | "bf16", false) => Ok(DType::BF16),
            ("f16", false) => Ok(DType::F16),
            ("bf16", true) if Isa::detect().multiplies_bf16() => Ok(DType::BF16),
            ("bf16", true) => {
                Err("--dtype bf16: this processor does not multiply bf16 (AVX512-BF16); use \
                           auto or f32"
                    .into())
            }
            ("f16", true) => {
                Err("--dtype f16: networks on the CPU are f32, bf16 or int8; use auto or f32"
                    .into())
            }
            ("int8", true) if Isa::detect().multiplies_int8() || Isa::chosen() => Ok(INT8),
            ("int8", true) => Err("--dtype int8: this processor does not multiply 8 bits \
                           (AVX512-VNNI); use auto or f32"
                .into()),
            ("int8", false) => Err(
                "--dtype int8: networks on a GPU are f32, bf16 or f16; use auto, or --device cpu"
                    .into(),
            ),
            (other, _) => Err(format!("--dtype {other}: use auto, f32, bf16, f16 or int8")),
        }
    }
}

impl ModelArg {
    /// The model, on its device, evaluated at most `max_rows` rows at a time.
    ///
    /// # Errors
    /// A sentence naming the file or field to mend.
    pub(super) fn load(&self, compute: &Compute, max_rows: usize) -> Result<Arc<Model>, String> {
        let device = compute.device()?;
        let dtype = compute.dtype(&device)?;
        let explain = |error| format!("--model {}: {error}", self.model);
        let folder = self.models.resolve("--model", &self.model)?;
        // Both commands draw images; what does not is refused before its weights are read.
        ModelFolder::open_for_images(&folder).map_err(explain)?;
        let loras = self.lora.iter().map(|(file, scale)| Lora::open(file, *scale));
        let loras = loras.collect::<Result<_, _>>().map_err(|error| format!("--lora: {error}"))?;
        let origin = Origin { folder, loras, dtype, devices: vec![device] };
        let mut model = Model::load(origin, hub::id_of(&self.model), 0).map_err(explain)?;
        if self.deterministic {
            model = model.padded(max_rows);
        }
        for stage in Stage::ALL {
            model.on(0).set_cost(stage, CostModel::new(vec![(1, 0.0)], Some(max_rows)));
        }
        Ok(Arc::new(model))
    }
}

/// A file, and behind the last colon a scale, if that is one.
pub(super) fn lora_file(text: &str) -> Result<(PathBuf, f64), String> {
    if text.is_empty() {
        return Err("name a LoRA's file, such as style.safetensors:0.8".into());
    }
    let scaled = text.rsplit_once(':').and_then(|(file, scale)| Some((file, scale.parse().ok()?)));
    let (file, scale) = scaled.unwrap_or((text, 1.0));
    Ok((file.into(), scale))
}

/// The device as it is shown to people, and as `--device` names it.
pub(super) fn device_name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".into(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// Several of them.
pub(super) fn device_names(devices: &[Device]) -> String {
    devices.iter().map(device_name).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_the_cpu_or_different_gpus() {
        assert_eq!(Asked::parse("auto"), Ok(Asked::Auto));
        assert_eq!(Asked::parse("cpu"), Ok(Asked::Cpu));
        assert_eq!(Asked::parse("cuda"), Ok(Asked::Cuda(vec![0])));
        assert_eq!(Asked::parse("cuda:1,cuda:0"), Ok(Asked::Cuda(vec![1, 0])));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu,cuda:0", "auto,cpu", "cuda:0,"]
        {
            let problem = Asked::parse(wrong).unwrap_err();
            assert!(problem.contains("use auto, cpu, cuda:N"), "{wrong}: {problem}");
        }
        assert!(Asked::parse("cuda:1,cuda:1").unwrap_err().contains("twice"));
    }

    #[test]
    fn a_loras_scale_stands_behind_the_last_colon() {
        for (text, file, scale) in [
            ("a.safetensors", "a.safetensors", 1.0),
            ("a.safetensors:0.8", "a.safetensors", 0.8),
            ("a:b.safetensors:-1", "a:b.safetensors", -1.0),
            ("a:b.safetensors", "a:b.safetensors", 1.0),
        ] {
            assert_eq!(lora_file(text), Ok((file.into(), scale)), "{text}");
        }
        assert!(lora_file("").is_err_and(|problem| problem.contains("style.safetensors")));
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_cuda_says_so() {
        let compute = Compute {
            device: "cuda:0".into(),
            dtype: "auto".into(),
            threads: None,
            max_model_bytes: None,
        };
        let problem = compute.devices().unwrap_err();
        assert!(problem.contains("--device cuda:0") && problem.contains("--features cuda"));
    }
}
