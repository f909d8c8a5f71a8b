//! A part of a convolution as cuDNN is told it: a graph of one operation.

use std::rc::Rc;

use candle_core::cuda_backend::cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind,
    cudnnConvolutionMode_t, cudnnDataType_t,
};
use candle_core::{DType, Result};

use super::{Part, Problem};
use crate::gpu::cudnn::{Descriptor, Handle};

/// What cuDNN knows x, the weights and y by.
pub(super) const NAMES: [i64; 3] = [1, 2, 3];

/// Whose operands are at multiples of `alignment`.
///
/// # Errors
/// Whatever cuDNN says.
pub(super) fn graph(
    handle: &Rc<Handle>,
    problem: Problem,
    part: Part,
    alignment: i64,
) -> Result<Rc<Descriptor>> {
    let Problem { dtype, lie, shapes, padding, stride } = problem;
    let numbers = |numbers: [usize; 4]| numbers.map(|number| number as i64);
    let dtype = match dtype {
        DType::BF16 => cudnnDataType_t::CUDNN_DATA_BFLOAT16,
        DType::F16 => cudnnDataType_t::CUDNN_DATA_HALF,
        _ => cudnnDataType_t::CUDNN_DATA_FLOAT,
    };
    let tensor = |place: usize| {
        let (shape, name) = (shapes[place], NAMES[place]);
        Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_TENSOR_DATA_TYPE, &[dtype])?
            .with(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, &numbers(shape))?
            .with(Name::CUDNN_ATTR_TENSOR_STRIDES, &numbers(lie.strides(shape)))?
            .with(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, &[name])?
            .with(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[alignment])?
            .finish()
    };
    let (paddings, strides) = ([padding as i64; 2], [stride as i64; 2]);
    let convolution = Descriptor::new(Kind::CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR)?
        // The type of the sums.
        .with(Name::CUDNN_ATTR_CONVOLUTION_COMP_TYPE, &[cudnnDataType_t::CUDNN_DATA_FLOAT])?
        .with(
            Name::CUDNN_ATTR_CONVOLUTION_CONV_MODE,
            &[cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION],
        )?
        .with(Name::CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, &[2i64])?
        .with(Name::CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, &paddings)?
        .with(Name::CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, &paddings)?
        .with(Name::CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, &strides)?
        .with(Name::CUDNN_ATTR_CONVOLUTION_DILATIONS, &[1i64; 2])?
        .finish()?;
    let (kind, of_convolution, [of_x, of_weight, of_y], [new, old]) = match part {
        Part::Answer => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR,
            Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y,
            ],
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA,
            ],
        ),
        Part::OfInput => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR,
            Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
            ],
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA,
            ],
        ),
        Part::OfWeight => (
            Kind::CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR,
            Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
            ],
            [
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
                Name::CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA,
            ],
        ),
    };
    let operation = Descriptor::new(kind)?
        .of(of_convolution, &convolution)?
        .of(of_x, &tensor(0)?)?
        .of(of_weight, &tensor(1)?)?
        .of(of_y, &tensor(2)?)?
        .with(new, &[1f32])?
        .with(old, &[0f32])?
        .finish()?;
    Descriptor::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?
        .with(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, &[handle.raw()])?
        .of(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, &operation)?
        .finish()
}
