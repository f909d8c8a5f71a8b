//! A compiled network whose weights are trained, as an operation of candle's with a gradient.
//!
//! candle's operations have at most three arguments, a network hundreds of weights. So the weights hang
//! on a chain of links: each link's value is a number that nobody reads, and its gradient hands out
//! what the network's own gradient has left. candle goes through the chain after the network.

use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{
    CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, bail,
};

use super::builder::Builder;
use super::{FEATURES, Inputs, Mode, PROMPT, SAMPLE, TIME, contiguous, floats, inputs, slice};
use crate::graph::backward::{Differentiate, backward};
use crate::graph::{Graph, Op, Size, lower};
use crate::kernels::{
    Call, Export, Footprint, Import, Isa, Part, Program, Scale, Timing, Workspace,
};
use crate::weights::Weights;

/// The evaluation, the gradients of weights and features, and that of the noisy sample.
const FORWARD: usize = 0;
const BACKWARD: usize = 1;
const INPUT: usize = 2;

/// A network whose weights are read anew at each evaluation, and whose memory is planned.
pub(crate) struct Training(Arc<Network>);

struct Network {
    program: Program,
    /// All weights that it reads, and where each one's gradient begins.
    parameters: Vec<(Tensor, usize)>,
    /// Floats of all gradients together.
    total: usize,
    output: Size,
    /// Whether the output is divided by the time.
    divided: bool,
}

impl Training {
    /// # Errors
    /// Those of weights that cannot be read.
    pub(crate) fn new(graph: &Graph, weights: &Weights, isa: Isa) -> crate::Result<Self> {
        let mut builder = Builder::trained(graph, isa);
        lower(graph, weights, &mut builder)?;
        let forward = builder.len();

        let (size, divided) = graph.answer();
        let answer = graph.ops.iter().rev().find_map(|op| match op {
            Op::Answer { source, factor, .. } => Some((*source, *factor)),
            _ => None,
        });
        let len = size.height * size.width * size.channels;
        if let Some((answer, factor)) = answer {
            let (output, _) = builder.gradient(answer);
            builder.push(Import { factor, ..Import::whole(0, output) });
        }
        let first = backward(graph, &mut builder);
        let features = graph.features();
        for &(map, start) in &features.starts {
            if let Some(input) = builder.maps[map.0].gradient {
                let apart = features.total;
                builder.push(Export { start, apart, ..Export::whole(input) });
            }
        }
        let backward = builder.len();

        if let Some(first) = first {
            builder.source_gradients(graph, first);
        }
        let (sample, factor) = graph.sample();
        let (input, _) = builder.gradient(sample);
        if factor != 1.0 {
            builder.push(Scale { map: input, factor });
        }
        builder.push(Export::whole(input));
        let all = builder.len();

        let inputs = inputs(graph, &Mode::Plain);
        let parts = vec![
            Part { operations: 0..forward, inputs: inputs.to_vec(), output: len },
            Part { operations: forward..backward, inputs: vec![len], output: inputs[FEATURES] },
            Part { operations: backward..all, inputs: Vec::new(), output: inputs[SAMPLE] },
        ];
        let (program, parameters, total) = builder.finish_training(parts);
        Ok(Self(Arc::new(Network { program, parameters, total, output: size, divided })))
    }

    /// As [`super::Inference::forward`], with a gradient.
    pub(crate) fn forward(&self, inputs: Inputs) -> Result<Tensor> {
        if inputs[PROMPT].track_op() {
            bail!("the gradient of a prompt is not worked out here; detach it")
        }
        let [sample, features, time, prompt] = contiguous(inputs)?;
        let gradients = Arc::new(Mutex::new(None));
        let mut link = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
        for (parameter, start) in self.0.parameters.iter().filter(|(one, _)| one.track_op()) {
            let op = Link { start: *start, gradients: gradients.clone() };
            link = parameter.apply_op2(&link, op)?;
        }
        let evaluation = Evaluation {
            network: self.0.clone(),
            time,
            prompt,
            parameters: self.0.parameters()?,
            workspace: Mutex::new(None),
            gradients,
        };
        sample.apply_op3(&features, &link, evaluation)
    }

    /// What each kernel of one evaluation did, and of the gradients of its weights, the output's own gradient being the output.
    pub(crate) fn profile(&self, inputs: Inputs) -> Result<Vec<Timing>> {
        let network = &self.0;
        let (batch, features) = (inputs[SAMPLE].dim(0)?, inputs[FEATURES].elem_count());
        let tensors = contiguous(inputs)?;
        let storages = tensors.each_ref().map(Tensor::storage_and_layout);
        let mut inputs: [&[f32]; 4] = [&[]; 4];
        for (input, (storage, layout)) in inputs.iter_mut().zip(&storages) {
            *input = floats(storage, layout)?;
        }
        let mut output = vec![0.0; batch * network.floats()];
        let (mut of_features, mut of_weights) = (vec![0.0; features], vec![0.0; network.total]);
        let mut workspace = network.program.begin();
        let (mut profile, parameters) = (Vec::new(), network.parameters()?);
        let lines = Some(&mut profile);
        network.run(
            &parameters,
            (FORWARD, &mut workspace),
            batch,
            &inputs,
            &mut output,
            &mut [],
            lines,
        )?;
        let (inputs, lines) = ([&output[..]], Some(&mut profile));
        let place = (BACKWARD, &mut workspace);
        network.run(
            &parameters,
            place,
            batch,
            &inputs,
            &mut of_features,
            &mut of_weights,
            lines,
        )?;
        network.program.end(workspace);
        Ok(profile)
    }

    /// What it keeps in memory, all weights being those of the parameters.
    pub(crate) fn footprint(&self) -> Footprint {
        let elements = self.0.parameters.iter().map(|(one, _)| one.elem_count()).sum::<usize>();
        let mut footprint = self.0.program.footprint();
        footprint.weight_bytes += 4 * elements;
        footprint
    }
}

/// The gradients of all parameters, once there are some.
type Gradients = Arc<Mutex<Option<Tensor>>>;

/// One evaluation, whose intermediate results wait for the gradient.
struct Evaluation {
    network: Arc<Network>,
    time: Tensor,
    prompt: Tensor,
    parameters: Vec<Tensor>,
    workspace: Mutex<Option<Workspace>>,
    gradients: Gradients,
}

impl Network {
    /// Floats of one sample's answer.
    fn floats(&self) -> usize {
        self.output.height * self.output.width * self.output.channels
    }

    /// The weights as they are now.
    fn parameters(&self) -> Result<Vec<Tensor>> {
        self.parameters.iter().map(|(parameter, _)| parameter.contiguous()).collect()
    }

    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        parameters: &[Tensor],
        (part, workspace): (usize, &mut Workspace),
        batch: usize,
        inputs: &[&[f32]],
        output: &mut [f32],
        gradients: &mut [f32],
        profile: Option<&mut Vec<Timing>>,
    ) -> Result<()> {
        let storages: Vec<_> = parameters.iter().map(Tensor::storage_and_layout).collect();
        let parameters: Vec<&[f32]> = storages
            .iter()
            .map(|(storage, layout)| floats(storage, layout))
            .collect::<Result<_>>()?;
        let call = Call { batch, inputs, parameters: &parameters, output, gradients };
        Ok(self.program.run_part(part, workspace, call, profile)?)
    }
}

impl Evaluation {
    fn run(
        &self,
        place: (usize, &mut Workspace),
        batch: usize,
        inputs: &[&[f32]],
        output: &mut [f32],
        gradients: &mut [f32],
    ) -> Result<()> {
        self.network.run(&self.parameters, place, batch, inputs, output, gradients, None)
    }
}

impl Drop for Evaluation {
    fn drop(&mut self) {
        if let Some(workspace) = locked(&self.workspace).take() {
            self.network.program.end(workspace);
        }
    }
}

impl CustomOp3 for Evaluation {
    fn name(&self) -> &'static str {
        "network"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        features: &CpuStorage,
        features_layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let batch = x_layout.dims()[0];
        let (time, time_layout) = self.time.storage_and_layout();
        let (prompt, prompt_layout) = self.prompt.storage_and_layout();
        let mut inputs: [&[f32]; 4] = [&[]; 4];
        inputs[SAMPLE] = slice(x, x_layout)?;
        inputs[FEATURES] = slice(features, features_layout)?;
        inputs[TIME] = floats(&time, time_layout)?;
        inputs[PROMPT] = floats(&prompt, prompt_layout)?;
        let Size { height, width, channels } = self.network.output;
        let mut output = vec![0.0; batch * channels * height * width];
        let mut workspace = self.network.program.begin();
        self.run((FORWARD, &mut workspace), batch, &inputs, &mut output, &mut [])?;
        *locked(&self.workspace) = Some(workspace);
        Ok((CpuStorage::F32(output), Shape::from((batch, channels, height, width))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        features: &Tensor,
        link: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(mut workspace) = locked(&self.workspace).take() else {
            bail!("the gradient of an evaluation can be taken once; evaluate the network again")
        };
        let batch = x.dim(0)?;
        let gradient = if self.network.divided {
            &gradient.broadcast_div(&self.time.reshape((batch, 1, 1, 1))?)?
        } else {
            gradient
        };
        let gradient = gradient.contiguous()?;
        let (storage, layout) = gradient.storage_and_layout();
        let mut of_features = vec![0.0; features.elem_count()];
        let mut of_weights = vec![0.0; self.network.total];
        let input = [floats(&storage, layout)?];
        self.run((BACKWARD, &mut workspace), batch, &input, &mut of_features, &mut of_weights)?;
        let total = of_weights.len();
        *locked(&self.gradients) = Some(Tensor::from_vec(of_weights, total, &Device::Cpu)?);
        let of_x = if x.track_op() {
            let mut of_x = vec![0.0; x.elem_count()];
            self.run((INPUT, &mut workspace), batch, &[], &mut of_x, &mut [])?;
            Some(Tensor::from_vec(of_x, x.shape(), &Device::Cpu)?)
        } else {
            None
        };
        self.network.program.end(workspace);
        let of_features = Tensor::from_vec(of_features, features.shape(), &Device::Cpu)?;
        Ok((of_x, Some(of_features), Some(link.zeros_like()?)))
    }
}

/// What leads from a network's gradient to that of one of its weights.
struct Link {
    /// Where among the gradients of all weights it begins.
    start: usize,
    gradients: Gradients,
}

impl CustomOp2 for Link {
    fn name(&self) -> &'static str {
        "network weight"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(1)))
    }

    fn bwd(
        &self,
        weight: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let all = locked(&self.gradients);
        let Some(all) = all.as_ref() else { bail!("the network has not made its gradients") };
        let own = all.narrow(0, self.start, weight.elem_count())?.reshape(weight.shape())?;
        Ok((Some(own), Some(gradient.clone())))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
