//! Convolutions and their gradients by cuDNN.
//!
//! candle describes each anew, has an algorithm chosen and zeroes memory for it whenever it is asked; sums f16 in
//! f16, and lets f32 be rounded to TF32; and has gradients made by kernels that it has for every shape. Here what a
//! convolution is and how it is done is worked out once for each shape and thread; sums are taken in f32 of what
//! their operands are; and no algorithm adds in an order that differs from one time to the next.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cudnn::{
    ConvBackwardData, ConvBackwardFilter, ConvDescriptor, ConvForward, Cudnn, CudnnDataType,
    FilterDescriptor, TensorDescriptor,
    sys::{
        cudnnConvolutionBwdDataAlgo_t as DataAlgorithm,
        cudnnConvolutionBwdFilterAlgo_t as FilterAlgorithm,
        cudnnConvolutionFwdAlgo_t as ForwardAlgorithm, cudnnConvolutionMode_t, cudnnMathType_t,
        cudnnTensorFormat_t,
    },
};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice, DeviceId};
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor,
    WithDType, bail,
};

use crate::gpu::view;

/// As [`super::convolve`], with gradients of both operands; each is taken if it is asked for.
pub(super) fn convolve(
    x: &Tensor,
    weight: &Tensor,
    padding: usize,
    stride: usize,
) -> Result<Tensor> {
    let problem = Problem::new(x, weight, padding, stride)?;
    x.contiguous()?.apply_op2(&weight.contiguous()?, Convolution { problem, part: Part::Answer })
}

/// What is convolved with what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Problem {
    x: [usize; 4],
    weight: [usize; 4],
    y: [usize; 4],
    padding: usize,
    stride: usize,
}

impl Problem {
    fn new(x: &Tensor, weight: &Tensor, padding: usize, stride: usize) -> Result<Self> {
        let (batch, channels, height, width) = x.dims4()?;
        let (outputs, inputs, tall, wide) = weight.dims4()?;
        let (seen_height, seen_width) = (height + 2 * padding, width + 2 * padding);
        if batch == 0 || inputs != channels || seen_height < tall || seen_width < wide {
            bail!("a convolution of {:?} with {:?}, padding {padding}", x.dims(), weight.dims())
        }
        let windows = |seen: usize, size: usize| (seen - size) / stride + 1;
        Ok(Self {
            x: [batch, channels, height, width],
            weight: [outputs, inputs, tall, wide],
            y: [batch, outputs, windows(seen_height, tall), windows(seen_width, wide)],
            padding,
            stride,
        })
    }
}

/// What of a convolution is asked for, of which operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// y, of x and the weights.
    Answer,
    /// x's gradient, of the weights and y's.
    OfInput,
    /// The weights' gradient, of x and y's.
    OfWeight,
}

struct Convolution {
    problem: Problem,
    part: Part,
}

impl Convolution {
    /// The shapes of its operands and of what it gives.
    fn shapes(&self) -> [[usize; 4]; 3] {
        let Problem { x, weight, y, .. } = self.problem;
        match self.part {
            Part::Answer => [x, weight, y],
            Part::OfInput => [weight, y, x],
            Part::OfWeight => [x, y, weight],
        }
    }

    fn gradient(&self, part: Part, first: &Tensor, second: &Tensor) -> Result<Tensor> {
        let (first, second) = (first.detach().contiguous()?, second.detach().contiguous()?);
        first.apply_op2_no_bwd(&second, &Self { problem: self.problem, part })
    }

    fn launch<T: Number>(
        &self,
        device: &CudaDevice,
        first: &CudaView<T>,
        second: &CudaView<T>,
        given: &mut CudaSlice<T>,
    ) -> Result<()> {
        let plan = planned::<T>(device, self.problem)?;
        let Plan { convolution: conv, x, weight: w, y, .. } = &*plan;
        let scales = (T::one(), T::zero());
        let memory = |bytes: usize| -> Result<Option<CudaSlice<u8>>> {
            // SAFETY: cuDNN's scratch memory may hold anything.
            if bytes == 0 { Ok(None) } else { unsafe { device.alloc(bytes).map(Some) } }
        };
        // SAFETY: `run` has found the operands and the result to be as long as the descriptors' shapes, and they
        // lie as the descriptors say, row after row.
        unsafe {
            match self.part {
                Part::Answer => {
                    let mut memory = memory(plan.forward.1)?;
                    ConvForward { conv, x, w, y }.launch(
                        plan.forward.0,
                        memory.as_mut(),
                        scales,
                        first,
                        second,
                        given,
                    )
                }
                Part::OfInput => {
                    let mut memory = memory(plan.of_input.1)?;
                    ConvBackwardData { conv, dx: x, w, dy: y }.launch(
                        plan.of_input.0,
                        memory.as_mut(),
                        scales,
                        given,
                        first,
                        second,
                    )
                }
                Part::OfWeight => {
                    let mut memory = memory(plan.of_weight.1)?;
                    ConvBackwardFilter { conv, x, dw: w, dy: y }.launch(
                        plan.of_weight.0,
                        memory.as_mut(),
                        scales,
                        first,
                        given,
                        second,
                    )
                }
            }?;
        }
        Ok(())
    }

    fn run<T: Number>(
        &self,
        device: &CudaDevice,
        (first, first_at): (&CudaSlice<T>, &Layout),
        (second, second_at): (&CudaSlice<T>, &Layout),
    ) -> Result<CudaStorage> {
        let [of_first, of_second, of_given] = self.shapes();
        if first_at.dims() != of_first || second_at.dims() != of_second {
            bail!("a convolution of {:?} with {:?}", first_at.dims(), second_at.dims())
        }
        let (first, second) = (view(first, first_at)?, view(second, second_at)?);
        // SAFETY: cuDNN writes all of it, and reads none, as its old values count zero times.
        let mut given = unsafe { device.alloc::<T>(of_given.iter().product())? };
        self.launch(device, &first, &second, &mut given)?;
        Ok(CudaStorage::wrap_cuda_slice(given, device.clone()))
    }
}

impl CustomOp2 for Convolution {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("cuDNN convolves on GPUs")
    }

    fn cuda_fwd(
        &self,
        first: &CudaStorage,
        first_at: &Layout,
        second: &CudaStorage,
        second_at: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        use CudaStorageSlice::{BF16, F16, F32};
        let device = &first.device;
        let given = match (&first.slice, &second.slice) {
            (F32(a), F32(b)) => self.run(device, (a, first_at), (b, second_at)),
            (BF16(a), BF16(b)) => self.run(device, (a, first_at), (b, second_at)),
            (F16(a), F16(b)) => self.run(device, (a, first_at), (b, second_at)),
            _ => bail!("a convolution's operands are of one type: f32, bf16 or f16"),
        }?;
        let [.., shape] = self.shapes();
        Ok((given, Shape::from(shape.to_vec())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let of_x = self.gradient(Part::OfInput, weight, gradient)?;
        let of_weight = self.gradient(Part::OfWeight, x, gradient)?;
        Ok((Some(of_x), Some(of_weight)))
    }
}

/// A type of element that cuDNN convolves.
trait Number: CudaDType + DeviceRepr + CudnnDataType + WithDType {}

impl<T: CudaDType + DeviceRepr + CudnnDataType + WithDType> Number for T {}

/// How a problem is described to cuDNN, and for each part the algorithm and the bytes that it needs.
struct Plan<T> {
    /// Its type is that of the sums.
    convolution: ConvDescriptor<f32>,
    x: TensorDescriptor<T>,
    weight: FilterDescriptor<T>,
    y: TensorDescriptor<T>,
    forward: (ForwardAlgorithm, usize),
    of_input: (DataAlgorithm, usize),
    of_weight: (FilterAlgorithm, usize),
}

impl<T: Number> Plan<T> {
    fn new(cudnn: &Arc<Cudnn>, problem: Problem) -> Result<Self> {
        let int = |value: usize| match i32::try_from(value) {
            Ok(value) => Ok(value),
            Err(_) => bail!("a convolution of {problem:?}: cuDNN counts to 2^31 - 1"),
        };
        let four = |[a, b, c, d]: [usize; 4]| {
            Ok::<_, candle_core::Error>([int(a)?, int(b)?, int(c)?, int(d)?])
        };
        let (padding, stride) = (int(problem.padding)?, int(problem.stride)?);
        let rows = cudnnTensorFormat_t::CUDNN_TENSOR_NCHW;
        let mode = cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        let mut convolution =
            cudnn.create_conv2d::<f32>([padding; 2], [stride; 2], [1; 2], mode)?;
        convolution.set_math_type(match T::DTYPE {
            // Otherwise it may round what it multiplies to TF32.
            DType::F32 => cudnnMathType_t::CUDNN_FMA_MATH,
            _ => cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
        })?;
        let x = cudnn.create_4d_tensor::<T>(rows, four(problem.x)?)?;
        let weight = cudnn.create_4d_filter::<T>(rows, four(problem.weight)?)?;
        let y = cudnn.create_4d_tensor::<T>(rows, four(problem.y)?)?;

        let forward = ConvForward { conv: &convolution, x: &x, w: &weight, y: &y };
        let algorithm = forward.pick_algorithm()?;
        let forward = (algorithm, forward.get_workspace_size(algorithm)?);

        let of_input = ConvBackwardData { conv: &convolution, dx: &x, w: &weight, dy: &y };
        let algorithm = match of_input.pick_algorithm()? {
            // Adds atomically.
            DataAlgorithm::CUDNN_CONVOLUTION_BWD_DATA_ALGO_0 => {
                DataAlgorithm::CUDNN_CONVOLUTION_BWD_DATA_ALGO_1
            }
            algorithm => algorithm,
        };
        let of_input = (algorithm, of_input.get_workspace_size(algorithm)?);

        let of_weight = ConvBackwardFilter { conv: &convolution, x: &x, dw: &weight, dy: &y };
        let algorithm = match of_weight.pick_algorithm()? {
            // Add atomically.
            FilterAlgorithm::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0
            | FilterAlgorithm::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3 => {
                FilterAlgorithm::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1
            }
            algorithm => algorithm,
        };
        let of_weight = (algorithm, of_weight.get_workspace_size(algorithm)?);
        Ok(Self { convolution, x, weight, y, forward, of_input, of_weight })
    }
}

/// The plan for a problem on a device, made once in every thread: cuDNN's handles belong to one.
fn planned<T: Number>(device: &CudaDevice, problem: Problem) -> Result<Rc<Plan<T>>> {
    type Plans = HashMap<(DeviceId, DType, Problem), Rc<dyn Any>>;
    thread_local! {
        static HANDLES: RefCell<HashMap<DeviceId, Arc<Cudnn>>> = RefCell::default();
        static PLANS: RefCell<Plans> = RefCell::default();
    }
    let key = (device.id(), T::DTYPE, problem);
    let known = PLANS.with_borrow(|plans| plans.get(&key).cloned());
    if let Some(Ok(plan)) = known.map(Rc::downcast) {
        return Ok(plan);
    }
    let cudnn = match HANDLES.with_borrow(|handles| handles.get(&device.id()).cloned()) {
        Some(cudnn) => cudnn,
        None => {
            let cudnn = Cudnn::new(device.cuda_stream())?;
            HANDLES.with_borrow_mut(|handles| handles.insert(device.id(), Arc::clone(&cudnn)));
            cudnn
        }
    };
    let plan = Rc::new(Plan::new(&cudnn, problem)?);
    PLANS.with_borrow_mut(|plans| plans.insert(key, plan.clone()));
    Ok(plan)
}
