//! Arguments that several commands share: which model, and what it runs on.

use std::{num::NonZeroU16, path::PathBuf, sync::Arc};

use candle_core::{DType, Device, DeviceLocation, utils::cuda_is_available};
use understudy_models::{checkpoint::hub, kernels::Isa};

use crate::{engine::CostModel, registry::Model};

/// Which model.
#[derive(Debug, clap::Args)]
pub(super) struct ModelArg {
    /// A model folder, a name inside --models, or a Hub id (owner/name).
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Folder of model folders [default: ./models/zoo, else the bundled one].
    #[arg(long, env = "UNDERSTUDY_MODELS", value_name = "DIR")]
    models: Option<PathBuf>,
}

/// What networks run on.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Compute {
    /// auto, cpu or cuda:N.
    #[arg(long, env = "UNDERSTUDY_DEVICE", default_value = "auto")]
    pub(crate) device: String,
    /// auto, f32, bf16 or f16; auto is f32 on a CPU, which must have AVX512-BF16 for bf16.
    #[arg(long, env = "UNDERSTUDY_DTYPE", default_value = "auto")]
    pub(crate) dtype: String,
    /// CPU threads [default: all this process may use].
    #[arg(long, env = "UNDERSTUDY_THREADS", value_name = "N")]
    pub(crate) threads: Option<NonZeroU16>,
}

impl Compute {
    /// The device.
    ///
    /// # Errors
    /// A sentence when it is not one that this build has.
    pub(crate) fn device(&self) -> Result<Device, String> {
        let named = self.device.as_str();
        let gpu = match named {
            "cpu" => None,
            "auto" => cuda_is_available().then_some(0),
            _ => match named.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(gpu)) => Some(gpu),
                _ => return Err(format!("--device {named}: use auto, cpu or cuda:N")),
            },
        };
        let Some(gpu) = gpu else { return Ok(Device::Cpu) };
        Device::new_cuda(gpu).map_err(|error| {
            format!(
                "--device {named}: {error}; use cpu, or a build with --features cuda and its GPU"
            )
        })
    }

    /// Refuses what training cannot use.
    ///
    /// # Errors
    /// A sentence naming the flag.
    pub(super) fn for_training(&self) -> Result<(), String> {
        self.dtype()?;
        match self.device()? {
            Device::Cpu => Ok(()),
            _ => Err(format!("--device {}: training runs on the CPU; use cpu", self.device)),
        }
    }

    /// The element type of weights and activations.
    ///
    /// # Errors
    /// A sentence when it is unknown, or this device cannot compute in it.
    pub(crate) fn dtype(&self) -> Result<DType, String> {
        match self.dtype.as_str() {
            "auto" | "f32" => Ok(DType::F32),
            "bf16" if Isa::detect().multiplies_bf16() => Ok(DType::BF16),
            "bf16" => {
                Err("--dtype bf16: this processor does not multiply bf16 (AVX512-BF16); use \
                           auto or f32"
                    .into())
            }
            "f16" => {
                Err("--dtype f16: networks on the CPU are f32 or bf16; use auto or f32".into())
            }
            other => Err(format!("--dtype {other}: use auto, f32, bf16 or f16")),
        }
    }
}

impl ModelArg {
    /// The model, on its device, evaluated at most `max_rows` rows at a time.
    ///
    /// # Errors
    /// A sentence naming the file or field to mend.
    pub(super) fn load(&self, compute: &Compute, max_rows: usize) -> Result<Arc<Model>, String> {
        let (device, dtype) = (compute.device()?, compute.dtype()?);
        let explain = |error| format!("--model {}: {error}", self.model);
        let models = super::models_folder(self.models.as_deref())?;
        let folder = hub::resolve(&self.model, &models).map_err(explain)?;
        let model =
            Model::load(&folder, hub::id_of(&self.model), 0, dtype, &device).map_err(explain)?;
        model.set_cost(CostModel::new(vec![(1, 0.0)], Some(max_rows)));
        Ok(Arc::new(model))
    }
}

/// The device as it is shown to people, and as `--device` names it.
pub(super) fn device_name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".into(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}
