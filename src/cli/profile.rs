//! `understudy bench --profile`: where the time of an evaluation goes, beside what the machine reaches.

use std::fmt::Write as _;

use serde_json::{Value, json};
use understudy_models::kernels::{Isa, Peak, Timing};

use crate::{engine::probe_inputs, registry::Model};

/// Evaluations, of which each layer's fastest counts.
const EVALUATIONS: usize = 20;

/// The kernels of one evaluation, in their order, and the machine's ceilings measured beside them.
pub(super) struct Profile {
    peak: Peak,
    /// Of the network's element type.
    flop_per_second: f64,
    kernels: Vec<Timing>,
}

/// Times every kernel of `model`'s network for `batch` rows.
///
/// # Errors
/// Where the network is not compiled into kernels, or its evaluation fails.
pub(super) fn measure(model: &Model, batch: usize) -> Result<Profile, String> {
    let network = model.on(0).network();
    let timestep = (model.schedule.train_timesteps() - 1) as f32;
    let inputs = probe_inputs(network, batch, timestep).map_err(|error| error.to_string())?;
    let mut kernels: Vec<Timing> = Vec::new();
    for _ in 0..EVALUATIONS {
        let timings = network
            .profile(&inputs.x, &inputs.timesteps, inputs.conditions())
            .map_err(|error| error.to_string())?;
        if kernels.is_empty() {
            kernels = timings;
        } else {
            for (kernel, timing) in kernels.iter_mut().zip(timings) {
                kernel.seconds = kernel.seconds.min(timing.seconds);
            }
        }
    }
    if kernels.is_empty() {
        return Err("--profile: only networks compiled for the CPU have kernels to time".into());
    }
    let peak = Peak::measure(Isa::detect());
    let flop_per_second = match model.dtype {
        "int8" => peak.int8_op_per_second.unwrap_or(peak.f32_flop_per_second),
        "bf16" => peak.bf16_flop_per_second.unwrap_or(peak.f32_flop_per_second),
        _ => peak.f32_flop_per_second,
    };
    Ok(Profile { peak, flop_per_second, kernels })
}

impl Profile {
    /// Share of the arithmetic's and of the memory's ceiling.
    fn shares(&self, kernel: &Timing) -> (f64, f64) {
        let arithmetic = kernel.flop / kernel.seconds / self.flop_per_second;
        (arithmetic, kernel.bytes / kernel.seconds / self.peak.bytes_per_second)
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let total: f64 = self.kernels.iter().map(|kernel| kernel.seconds).sum();
        let mut text = format!(
            "GFLOP are those of direct convolutions: beyond 100 % of the {:.0} GFLOP/s that products \
             reach here, multiplications are saved. Bytes are each map and weight once: beyond 100 % \
             of the {:.0} GB/s of memory they came from caches.\n{:>10}{:>8}{:>9}{:>9}{:>8}{:>8}\n",
            self.flop_per_second * 1e-9,
            self.peak.bytes_per_second * 1e-9,
            "µs",
            "time",
            "GFLOP",
            "MB",
            "GFLOP/s",
            "GB/s",
        );
        for kernel in &self.kernels {
            let (arithmetic, memory) = self.shares(kernel);
            let _ = writeln!(
                text,
                "{:10.1}{:7.1}%{:9.4}{:9.3}{:7.0}%{:7.0}%  {}",
                kernel.seconds * 1e6,
                100.0 * kernel.seconds / total,
                kernel.flop * 1e-9,
                kernel.bytes * 1e-6,
                100.0 * arithmetic,
                100.0 * memory,
                kernel.name,
            );
        }
        let flop: f64 = self.kernels.iter().map(|kernel| kernel.flop).sum();
        let _ = write!(
            text,
            "{:10.1}  all kernels, {:.2} GFLOP, {:.0}%",
            total * 1e6,
            flop * 1e-9,
            100.0 * flop / total / self.flop_per_second
        );
        text
    }

    /// For programs.
    pub(super) fn json(&self) -> Value {
        let kernels: Vec<Value> = self
            .kernels
            .iter()
            .map(|kernel| {
                let (arithmetic, memory) = self.shares(kernel);
                json!({
                    "name": kernel.name,
                    "gflop": kernel.flop * 1e-9,
                    "bytes": kernel.bytes,
                    "seconds": kernel.seconds,
                    "share_of_arithmetic_peak": arithmetic,
                    "share_of_memory_peak": memory,
                })
            })
            .collect();
        json!({
            "peak_gflop_per_second": self.flop_per_second * 1e-9,
            "peak_memory_bytes_per_second": self.peak.bytes_per_second,
            "kernels": kernels,
        })
    }
}
