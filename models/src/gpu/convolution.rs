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
use std::sync::{Arc, Once};

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
    CpuStorage, CudaDevice, CudaStorage, CustomOp2, DType, Error, Layout, Result, Shape, Tensor,
    WithDType, bail,
};

use super::launch::view;

/// `x` convolved with `weight`, with zeros around, with gradients of both; each is taken if it is asked for. Which
/// dimensions of theirs, and of the answer, are which says `lie`. What cuDNN does not convolve in pixels is turned into
/// rows and back, of which the log tells the first.
///
/// # Errors
/// Shapes that do not fit, and whatever cuDNN says.
pub(crate) fn convolve(
    x: &Tensor,
    weight: &Tensor,
    padding: usize,
    stride: usize,
    lie: Lie,
) -> Result<Tensor> {
    let problem = Problem::new(x, weight, padding, stride, lie)?;
    let asked = Convolution { problem, part: Part::Answer };
    let answer = x.contiguous()?.apply_op2(&weight.contiguous()?, asked);
    match (lie, answer) {
        (Lie::Pixels, Err(reason)) if unknown(&reason) => {
            // Which of the two ways cuDNN goes for which types and sizes is not written down anywhere.
            static TOLD: Once = Once::new();
            TOLD.call_once(
                || tracing::warn!(?problem, %reason, "convolved in rows, which is slower"),
            );
            let [x, weight] = [x, weight].map(|tensor| tensor.permute((0, 3, 1, 2)));
            let y = convolve(&x?, &weight?, padding, stride, Lie::Rows)?;
            y.permute((0, 2, 3, 1))?.contiguous()
        }
        (_, answer) => answer,
    }
}

/// The gradient of the weights `[O, K, K, C]` of a convolution of maps, whose answer's is `of_y`.
pub(super) fn gradient_of_weight(
    x: &Tensor,
    of_y: &Tensor,
    padding: usize,
    stride: usize,
) -> Result<Tensor> {
    let weight = Tensor::zeros((of_y.dim(3)?, 3, 3, x.dim(3)?), x.dtype(), x.device())?;
    let problem = Problem::new(x, &weight, padding, stride, Lie::Pixels)?;
    Convolution { problem, part: Part::Answer }.gradient(Part::OfWeight, x, of_y)
}

/// The gradient of a map of dimensions `x` that was convolved.
pub(super) fn gradient_of_input(
    weight: &Tensor,
    of_y: &Tensor,
    x: (usize, usize, usize, usize),
    padding: usize,
    stride: usize,
) -> Result<Tensor> {
    let x = Tensor::zeros(x, of_y.dtype(), of_y.device())?;
    let problem = Problem::new(&x, weight, padding, stride, Lie::Pixels)?;
    Convolution { problem, part: Part::Answer }.gradient(Part::OfInput, weight, of_y)
}

/// Whether that says that cuDNN has no such convolution; candle keeps its errors as text.
fn unknown(reason: &Error) -> bool {
    let text = reason.to_string();
    ["CUDNN_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_BAD_PARAM"].iter().any(|name| text.contains(name))
}

/// How images and weights lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Lie {
    /// `[B, C, H, W]` and `[O, C, K, K]`.
    Rows,
    /// `[B, H, W, C]` and `[O, K, K, C]`.
    Pixels,
}

impl Lie {
    /// Dimensions as they lie, of those of [`Lie::Rows`].
    fn of(self, [a, b, c, d]: [usize; 4]) -> [usize; 4] {
        match self {
            Self::Rows => [a, b, c, d],
            Self::Pixels => [a, c, d, b],
        }
    }

    /// Dimensions of [`Lie::Rows`], of those as they lie.
    fn rows(self, [a, b, c, d]: [usize; 4]) -> [usize; 4] {
        match self {
            Self::Rows => [a, b, c, d],
            Self::Pixels => [a, d, b, c],
        }
    }

    fn format(self) -> cudnnTensorFormat_t {
        match self {
            Self::Rows => cudnnTensorFormat_t::CUDNN_TENSOR_NCHW,
            Self::Pixels => cudnnTensorFormat_t::CUDNN_TENSOR_NHWC,
        }
    }
}

/// What is convolved with what, the dimensions as of [`Lie::Rows`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Problem {
    lie: Lie,
    x: [usize; 4],
    weight: [usize; 4],
    y: [usize; 4],
    padding: usize,
    stride: usize,
}

impl Problem {
    fn new(x: &Tensor, weight: &Tensor, padding: usize, stride: usize, lie: Lie) -> Result<Self> {
        let [batch, channels, height, width] = lie.rows(x.dims4()?.into());
        let [outputs, inputs, tall, wide] = lie.rows(weight.dims4()?.into());
        let (seen_height, seen_width) = (height + 2 * padding, width + 2 * padding);
        if batch == 0 || inputs != channels || seen_height < tall || seen_width < wide {
            bail!("a convolution of {:?} with {:?}, padding {padding}", x.dims(), weight.dims())
        }
        let windows = |seen: usize, size: usize| (seen - size) / stride + 1;
        Ok(Self {
            lie,
            x: [batch, channels, height, width],
            weight: [outputs, inputs, tall, wide],
            y: [batch, outputs, windows(seen_height, tall), windows(seen_width, wide)],
            padding,
            stride,
        })
    }
}

/// What of a convolution is asked for, of which operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
    /// The shapes of its operands and of what it gives, as they lie.
    fn shapes(&self) -> [[usize; 4]; 3] {
        let Problem { lie, x, weight, y, .. } = self.problem;
        match self.part {
            Part::Answer => [x, weight, y],
            Part::OfInput => [weight, y, x],
            Part::OfWeight => [x, y, weight],
        }
        .map(|shape| lie.of(shape))
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
        let plan = planned::<T>(device, self.problem, self.part)?;
        let Plan { convolution: conv, x, weight: w, y, algorithm, bytes } = &*plan;
        let scales = (T::one(), T::zero());
        let mut memory: Option<CudaSlice<u8>> = match bytes {
            0 => None,
            // SAFETY: cuDNN's scratch memory may hold anything.
            bytes => Some(unsafe { device.alloc(*bytes)? }),
        };
        let memory = memory.as_mut();
        // SAFETY: `run` has found the operands and the result to be as long as the descriptors' shapes, and they
        // lie as the descriptors say.
        unsafe {
            match *algorithm {
                Algorithm::Answer(algorithm) => ConvForward { conv, x, w, y }
                    .launch(algorithm, memory, scales, first, second, given),
                Algorithm::OfInput(algorithm) => ConvBackwardData { conv, dx: x, w, dy: y }
                    .launch(algorithm, memory, scales, given, first, second),
                Algorithm::OfWeight(algorithm) => ConvBackwardFilter { conv, x, dw: w, dy: y }
                    .launch(algorithm, memory, scales, first, given, second),
            }
        }?;
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

/// How a problem is described to cuDNN, what does a part of it, and the bytes that this needs.
struct Plan<T> {
    /// Its type is that of the sums.
    convolution: ConvDescriptor<f32>,
    x: TensorDescriptor<T>,
    weight: FilterDescriptor<T>,
    y: TensorDescriptor<T>,
    algorithm: Algorithm,
    bytes: usize,
}

#[derive(Clone, Copy)]
enum Algorithm {
    Answer(ForwardAlgorithm),
    OfInput(DataAlgorithm),
    OfWeight(FilterAlgorithm),
}

impl<T: Number> Plan<T> {
    fn new(cudnn: &Arc<Cudnn>, problem: Problem, part: Part) -> Result<Self> {
        let int = |value: usize| match i32::try_from(value) {
            Ok(value) => Ok(value),
            Err(_) => bail!("a convolution of {problem:?}: cuDNN counts to 2^31 - 1"),
        };
        let four = |[a, b, c, d]: [usize; 4]| {
            Ok::<_, candle_core::Error>([int(a)?, int(b)?, int(c)?, int(d)?])
        };
        let (padding, stride) = (int(problem.padding)?, int(problem.stride)?);
        let format = problem.lie.format();
        let mode = cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        let mut convolution =
            cudnn.create_conv2d::<f32>([padding; 2], [stride; 2], [1; 2], mode)?;
        convolution.set_math_type(match T::DTYPE {
            // Otherwise it may round what it multiplies to TF32.
            DType::F32 => cudnnMathType_t::CUDNN_FMA_MATH,
            _ => cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
        })?;
        let x = cudnn.create_4d_tensor::<T>(format, four(problem.x)?)?;
        let weight = cudnn.create_4d_filter::<T>(format, four(problem.weight)?)?;
        let y = cudnn.create_4d_tensor::<T>(format, four(problem.y)?)?;

        let (algorithm, bytes) = match part {
            Part::Answer => {
                let asked = ConvForward { conv: &convolution, x: &x, w: &weight, y: &y };
                let algorithm = asked.pick_algorithm()?;
                (Algorithm::Answer(algorithm), asked.get_workspace_size(algorithm)?)
            }
            Part::OfInput => {
                let asked = ConvBackwardData { conv: &convolution, dx: &x, w: &weight, dy: &y };
                let algorithm = match asked.pick_algorithm()? {
                    // Adds atomically.
                    DataAlgorithm::CUDNN_CONVOLUTION_BWD_DATA_ALGO_0 => {
                        DataAlgorithm::CUDNN_CONVOLUTION_BWD_DATA_ALGO_1
                    }
                    algorithm => algorithm,
                };
                (Algorithm::OfInput(algorithm), asked.get_workspace_size(algorithm)?)
            }
            Part::OfWeight => {
                let asked = ConvBackwardFilter { conv: &convolution, x: &x, dw: &weight, dy: &y };
                let algorithm = match asked.pick_algorithm()? {
                    // Add atomically.
                    FilterAlgorithm::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0
                    | FilterAlgorithm::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3 => {
                        FilterAlgorithm::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1
                    }
                    algorithm => algorithm,
                };
                (Algorithm::OfWeight(algorithm), asked.get_workspace_size(algorithm)?)
            }
        };
        Ok(Self { convolution, x, weight, y, algorithm, bytes })
    }
}

/// The plan for a part of a problem on a device, made once in every thread: cuDNN's handles belong to one.
fn planned<T: Number>(device: &CudaDevice, problem: Problem, part: Part) -> Result<Rc<Plan<T>>> {
    type Plans = HashMap<(DeviceId, DType, Problem, Part), Rc<dyn Any>>;
    thread_local! {
        static HANDLES: RefCell<HashMap<DeviceId, Arc<Cudnn>>> = RefCell::default();
        static PLANS: RefCell<Plans> = RefCell::default();
    }
    let key = (device.id(), T::DTYPE, problem, part);
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
    let plan = Rc::new(Plan::new(&cudnn, problem, part)?);
    PLANS.with_borrow_mut(|plans| plans.insert(key, plan.clone()));
    Ok(plan)
}
