//! Evaluations on a GPU as CUDA graphs: launched at once instead of operation by operation.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{
    CudaGraph,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};

use crate::denoiser::{Conditions, Denoiser, Geometry};

/// More rows than that keep a GPU busy for longer than it takes to launch their operations.
const MOST_ROWS: usize = 64;

/// Asks its network itself the first time it is asked about so many rows, and writes down what the network
/// has the GPU do; from then on it has that done to other numbers. Shapes, types and errors are the network's.
///
/// A network that cannot be written down, because it reads numbers back on the way, is asked every time; the
/// log says why.
pub(crate) struct CudaGraphs {
    network: Box<dyn Denoiser>,
    device: CudaDevice,
    /// By rows; nothing where it could not be written down.
    evaluations: Mutex<HashMap<usize, Option<Evaluation>>>,
}

/// What the network does to so many rows, and the tensors that it takes them from and puts its answer into.
struct Evaluation {
    x: Tensor,
    timesteps: Tensor,
    condition: Option<Tensor>,
    answer: Tensor,
    graph: Graph,
}

struct Graph(CudaGraph);

// SAFETY: what the driver hands out for a graph belongs to no thread, but may be used by one at a time; the mutex
// around the evaluations sees to that.
unsafe impl Send for Graph {}

impl CudaGraphs {
    /// Around a network without gradients on a GPU, whose weights do not change and whose tensors are used on
    /// that device's one stream.
    pub(crate) fn new(network: Box<dyn Denoiser>, device: &CudaDevice) -> Self {
        Self { network, device: device.clone(), evaluations: Mutex::default() }
    }

    fn capture(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
        answer: &Tensor,
    ) -> Result<Evaluation> {
        let x = copied(x)?;
        let timesteps = copied(timesteps)?;
        let condition = condition.map(copied).transpose()?;
        let answer = answer.zeros_like()?;
        let stream = self.device.cuda_stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        // All that the network allocates is gone at the end of this statement, so the graph frees what it allocates.
        let asked = self
            .network
            .forward(&x, &timesteps, condition.as_ref())
            .and_then(|given| set(&answer, &given));
        // Whatever came of it, the stream must leave the capture.
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        asked?;
        let Some(graph) = graph? else { bail!("the evaluation asked nothing of the GPU") };
        Ok(Evaluation { x, timesteps, condition, answer, graph: Graph(graph) })
    }
}

impl Evaluation {
    fn of(&self, x: &Tensor, timesteps: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        set(&self.x, x)?;
        set(&self.timesteps, timesteps)?;
        if let (Some(there), Some(condition)) = (&self.condition, condition) {
            set(there, condition)?;
        }
        self.graph.0.launch()?;
        self.answer.copy()
    }
}

/// Puts the numbers of one tensor into another of its shape and type.
fn set(there: &Tensor, numbers: &Tensor) -> Result<()> {
    there.slice_set(&numbers.contiguous()?, 0, 0)
}

fn copied(tensor: &Tensor) -> Result<Tensor> {
    let there = tensor.zeros_like()?;
    set(&there, tensor)?;
    Ok(there)
}

impl Denoiser for CudaGraphs {
    fn pin(&mut self) {
        self.network.pin();
    }

    fn forward(
        &self,
        x: &Tensor,
        timesteps: &Tensor,
        condition: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.geometry().check(self.dtype(), x, timesteps, Conditions::of(condition))?;
        let rows = x.dim(0)?;
        if rows > MOST_ROWS || x.track_op() {
            return self.network.forward(x, timesteps, condition);
        }
        let mut evaluations = self.evaluations.lock().unwrap_or_else(PoisonError::into_inner);
        match evaluations.get(&rows) {
            Some(Some(evaluation)) => evaluation.of(x, timesteps, condition),
            Some(None) => self.network.forward(x, timesteps, condition),
            None => {
                // Operations send shapes and strides along, which candle keeps on the GPU under this guard: an
                // upload cannot be captured. The first time also loads kernels, which cannot be either.
                let _kept = self.device.enable_cuda_graph_htod_cache();
                let answer = self.network.forward(x, timesteps, condition)?;
                let captured = self.capture(x, timesteps, condition, &answer);
                if let Err(reason) = &captured {
                    tracing::warn!(rows, %reason, "evaluations of so many rows are not captured");
                }
                evaluations.insert(rows, captured.ok());
                Ok(answer)
            }
        }
    }

    fn geometry(&self) -> &Geometry {
        self.network.geometry()
    }

    fn dtype(&self) -> DType {
        self.network.dtype()
    }

    fn device(&self) -> &Device {
        self.network.device()
    }

    fn parameters(&self) -> usize {
        self.network.parameters()
    }
}
