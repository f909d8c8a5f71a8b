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
use super::{Ends, assemble, floats, inputs, slice};
use crate::kernels::{Call, Export, Import, Isa, Part, Profile, Program, Scale, Workspace};
use crate::unet::UNet2DConfig;
use crate::unet::config::TimeEmbedding;
use crate::unet::weights::Weights;

/// The evaluation, the gradients of weights and time, and that of the input.
const FORWARD: usize = 0;
const BACKWARD: usize = 1;
const INPUT: usize = 2;

/// A network whose weights are read anew at each evaluation, and whose memory is planned.
pub(in crate::unet) struct Training(Arc<Network>);

struct Network {
    program: Program,
    /// All weights but those of the time and class embedding, and where each one's gradient begins.
    parameters: Vec<(Tensor, usize)>,
    /// Floats of all gradients together.
    total: usize,
    /// Channels, height and width of the output.
    outputs: [usize; 3],
    /// Whether the output was divided by sigma.
    divided: bool,
}

impl Training {
    /// Takes all weights but those of the time and class embedding.
    pub(in crate::unet) fn new(
        config: &UNet2DConfig,
        weights: &Weights,
        isa: Isa,
    ) -> crate::Result<Self> {
        let mut builder = Builder::trained(config, isa);
        let Ends { x, time, y, .. } = assemble(&mut builder, weights)?;
        let forward = builder.len();

        let (output, _) = builder.gradient(y);
        builder.push(Import { input: 0, output, factor: 1.0, shift: 0.0 });
        let first = builder.backward(x);
        let (input, _) = builder.gradient(time);
        builder.push(Export { input, divisor: None });
        let backward = builder.len();

        if let Some(first) = first {
            builder.gradient_of_input(&first);
        }
        let (input, _) = builder.gradient(x);
        if config.center_input_sample {
            builder.push(Scale { map: input, factor: 2.0 });
        }
        builder.push(Export { input, divisor: None });
        let all = builder.len();

        let outputs = [config.out_channels, config.height, config.width];
        let [x, width, one] = inputs(config)[..] else {
            unreachable!("a network has three inputs");
        };
        let len = outputs.iter().product();
        let parts = vec![
            Part { operations: 0..forward, inputs: vec![x, width, one], output: len },
            Part { operations: forward..backward, inputs: vec![len], output: width },
            Part { operations: backward..all, inputs: Vec::new(), output: x },
        ];
        let (program, parameters, total) = builder.finish_training(parts);
        let divided = config.time_embedding == TimeEmbedding::Fourier;
        Ok(Self(Arc::new(Network { program, parameters, total, outputs, divided })))
    }

    /// As [`super::Plan::forward`], with a gradient.
    pub(in crate::unet) fn forward(
        &self,
        x: &Tensor,
        time: &Tensor,
        sigma: &Tensor,
    ) -> Result<Tensor> {
        let gradients = Arc::new(Mutex::new(None));
        let mut link = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
        for (parameter, start) in self.0.parameters.iter().filter(|(one, _)| one.track_op()) {
            let op = Link { start: *start, gradients: gradients.clone() };
            link = parameter.apply_op2(&link, op)?;
        }
        let evaluation = Evaluation {
            network: self.0.clone(),
            sigma: sigma.contiguous()?,
            parameters: self.0.parameters()?,
            workspace: Mutex::new(None),
            gradients,
        };
        x.contiguous()?.apply_op3(&time.contiguous()?, &link, evaluation)
    }

    /// Name, floating-point operations and seconds of each kernel of one evaluation and of the gradients
    /// of its weights, the output's own gradient being the output.
    pub(in crate::unet) fn profile(
        &self,
        x: &Tensor,
        time: &Tensor,
        sigma: &Tensor,
    ) -> Result<Profile> {
        let network = &self.0;
        let tensors = [x.contiguous()?, time.contiguous()?, sigma.contiguous()?];
        let storages = tensors.each_ref().map(Tensor::storage_and_layout);
        let mut inputs: [&[f32]; 3] = [&[]; 3];
        for (input, (storage, layout)) in inputs.iter_mut().zip(&storages) {
            *input = floats(storage, layout)?;
        }
        let batch = x.dim(0)?;
        let mut output = vec![0.0; batch * network.outputs.iter().product::<usize>()];
        let (mut of_time, mut of_weights) =
            (vec![0.0; time.elem_count()], vec![0.0; network.total]);
        let mut workspace = network.program.begin();
        let (mut profile, parameters) = (Profile::new(), network.parameters()?);
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
        network.run(&parameters, place, batch, &inputs, &mut of_time, &mut of_weights, lines)?;
        network.program.end(workspace);
        Ok(profile)
    }

    /// Bytes kept from one evaluation to the next beside the weights.
    pub(in crate::unet) fn workspace_bytes(&self) -> usize {
        self.0.program.workspace_bytes()
    }
}

/// The gradients of all parameters, once there are some.
type Gradients = Arc<Mutex<Option<Tensor>>>;

/// One evaluation, whose intermediate results wait for the gradient.
struct Evaluation {
    network: Arc<Network>,
    sigma: Tensor,
    parameters: Vec<Tensor>,
    workspace: Mutex<Option<Workspace>>,
    gradients: Gradients,
}

impl Network {
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
        profile: Option<&mut Profile>,
    ) -> Result<()> {
        let storages: Vec<_> = parameters.iter().map(Tensor::storage_and_layout).collect();
        let parameters: Vec<&[f32]> = storages
            .iter()
            .map(|(storage, layout)| floats(storage, layout))
            .collect::<Result<_>>()?;
        let call = Call { batch, inputs, parameters: &parameters, output, gradients };
        self.program.run_part(part, workspace, call, profile);
        Ok(())
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
        "unet"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        time: &CpuStorage,
        time_layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let batch = x_layout.dims()[0];
        let (sigma, sigma_layout) = self.sigma.storage_and_layout();
        let inputs =
            [slice(x, x_layout)?, slice(time, time_layout)?, floats(&sigma, sigma_layout)?];
        let [channels, height, width] = self.network.outputs;
        let mut output = vec![0.0; batch * channels * height * width];
        let mut workspace = self.network.program.begin();
        self.run((FORWARD, &mut workspace), batch, &inputs, &mut output, &mut [])?;
        *locked(&self.workspace) = Some(workspace);
        Ok((CpuStorage::F32(output), Shape::from((batch, channels, height, width))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        time: &Tensor,
        link: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(mut workspace) = locked(&self.workspace).take() else {
            bail!("the gradient of an evaluation can be taken once; evaluate the network again")
        };
        let batch = x.dim(0)?;
        let gradient = if self.network.divided {
            &gradient.broadcast_div(&self.sigma.reshape((batch, 1, 1, 1))?)?
        } else {
            gradient
        };
        let gradient = gradient.contiguous()?;
        let (storage, layout) = gradient.storage_and_layout();
        let mut of_time = vec![0.0; time.elem_count()];
        let mut of_weights = vec![0.0; self.network.total];
        let input = [floats(&storage, layout)?];
        self.run((BACKWARD, &mut workspace), batch, &input, &mut of_time, &mut of_weights)?;
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
        let of_time = Tensor::from_vec(of_time, time.shape(), &Device::Cpu)?;
        Ok((of_x, Some(of_time), Some(link.zeros_like()?)))
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
        "unet weight"
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
