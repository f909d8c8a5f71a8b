//! GPUs: how they are opened, and what NVIDIA's management library (NVML) tells of them.
//!
//! The library is part of the driver and looked for when the server starts; without it there are no such
//! metrics. It is read whenever they are scraped.

use candle_core::{
    Device, DeviceLocation,
    cuda_backend::cudarc::driver::{
        CudaContext, DriverError,
        result::{device::get_default_mem_pool, mem_pool},
        sys::{CUdevice_attribute, CUmemPool_attribute, CUresult},
    },
};
use nvml_wrapper::{Nvml, enum_wrappers::device::TemperatureSensor, error::NvmlError};
use prometheus::{
    GaugeVec, IntGaugeVec, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use crate::metrics::Metrics;

/// Whether there is any. A driver that fails to say so is taken for one that has: opening the GPU tells why.
pub(crate) fn exists() -> bool {
    match CudaContext::device_count() {
        Ok(count) => count > 0,
        Err(DriverError(error)) => error != CUresult::CUDA_ERROR_NO_DEVICE,
    }
}

/// Opens a GPU. It has a stream of its own, so that its work is done in order whatever thread asks for it, and
/// no events besides: three for every operation would cost as much as launching it. It keeps the memory that is
/// freed: an evaluation allocates hundreds of times, and each time its result has been waited for, the driver
/// would give all of that back to the system.
///
/// # Errors
/// Whatever the driver says.
pub(crate) fn open(gpu: usize) -> candle_core::Result<Device> {
    let device = Device::new_cuda_with_stream(gpu)?;
    if let Device::Cuda(cuda) = &device {
        let stream = cuda.cuda_stream();
        let mut kept_bytes = u64::MAX;
        let value = (&raw mut kept_bytes).cast();
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: all of the device's tensors are made, used and freed on its one stream. The device is that of
        // a context that lives; its default pool lives as long as it does; the attribute's type is u64, which
        // the driver reads before the call returns.
        unsafe {
            cuda.disable_event_tracking();
            let pool = get_default_mem_pool(stream.context().cu_device())?;
            mem_pool::set_attribute(pool, attribute, value)?;
        }
    }
    Ok(device)
}

/// Adds the metrics of those of `devices` that are GPUs.
///
/// # Errors
/// A sentence when the library is not there or does not know a GPU.
pub(crate) fn watch(devices: &[Device], metrics: &Metrics) -> Result<(), String> {
    let nvml = Nvml::init().map_err(|error| error.to_string())?;
    let mut gpus = Vec::new();
    for device in devices {
        if let (DeviceLocation::Cuda { gpu_id }, Device::Cuda(cuda)) = (device.location(), device) {
            // NVML counts GPUs otherwise than CUDA does, which CUDA_VISIBLE_DEVICES renumbers.
            let stream = cuda.cuda_stream();
            let attribute = |name| stream.context().attribute(name).map_err(|e| e.to_string());
            let bus_id = format!(
                "{:08X}:{:02X}:{:02X}.0",
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
                attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
            );
            let known = nvml.device_by_pci_bus_id(bus_id.as_str());
            known.map_err(|error| format!("GPU {gpu_id} at {bus_id}: {error}"))?;
            gpus.push((format!("cuda:{gpu_id}"), bus_id));
        }
    }
    let gpus = Gpus::new(nvml, gpus).map_err(|error| error.to_string())?;
    metrics.add(Box::new(gpus)).map_err(|error| error.to_string())
}

/// The gauges, and whose they are.
struct Gpus {
    nvml: Nvml,
    /// As `--device` names each, and as NVML knows it.
    gpus: Vec<(String, String)>,
    memory_used: IntGaugeVec,
    memory_total: IntGaugeVec,
    utilization: GaugeVec,
    temperature: IntGaugeVec,
}

impl Gpus {
    fn new(nvml: Nvml, gpus: Vec<(String, String)>) -> prometheus::Result<Self> {
        let whole = |name, help| IntGaugeVec::new(Opts::new(name, help), &["device"]);
        Ok(Self {
            nvml,
            gpus,
            memory_used: whole(
                "understudy_gpu_memory_used_bytes",
                "Memory of the GPU in use, by whatever process.",
            )?,
            memory_total: whole("understudy_gpu_memory_total_bytes", "Memory of the GPU.")?,
            utilization: GaugeVec::new(
                Opts::new(
                    "understudy_gpu_utilization_ratio",
                    "Share of the last sample period in which the GPU did anything, 0 to 1.",
                ),
                &["device"],
            )?,
            temperature: whole("understudy_gpu_temperature_celsius", "Temperature of the GPU.")?,
        })
    }

    fn read(&self, name: &str, bus_id: &str) -> Result<(), NvmlError> {
        let gpu = self.nvml.device_by_pci_bus_id(bus_id)?;
        let whole = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let memory = gpu.memory_info()?;
        self.memory_used.with_label_values(&[name]).set(whole(memory.used));
        self.memory_total.with_label_values(&[name]).set(whole(memory.total));
        let busy = f64::from(gpu.utilization_rates()?.gpu) / 100.0;
        self.utilization.with_label_values(&[name]).set(busy);
        let celsius = gpu.temperature(TemperatureSensor::Gpu)?;
        self.temperature.with_label_values(&[name]).set(celsius.into());
        Ok(())
    }
}

impl Collector for Gpus {
    fn desc(&self) -> Vec<&Desc> {
        let whole = [&self.memory_used, &self.memory_total, &self.temperature];
        let whole = whole.into_iter().flat_map(Collector::desc);
        whole.chain(self.utilization.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        for (name, bus_id) in &self.gpus {
            if let Err(error) = self.read(name, bus_id) {
                tracing::warn!(device = name, %error, "NVML does not tell how the GPU is");
            }
        }
        let whole = [&self.memory_used, &self.memory_total, &self.temperature];
        let whole = whole.into_iter().flat_map(Collector::collect);
        whole.chain(self.utilization.collect()).collect()
    }
}
