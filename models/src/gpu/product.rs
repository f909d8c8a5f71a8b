//! Products of matrices by cuBLAS.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::result::gemm_strided_batched_ex;
use candle_core::cuda_backend::cudarc::cublas::sys::{
    cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t,
};
use candle_core::{CudaDevice, DType, Result, Tensor, bail};

use super::launch::pointer;

/// Matrices within a contiguous tensor, one for each product.
#[derive(Clone, Copy)]
pub(super) struct Matrices<'a> {
    pub(super) tensor: &'a Tensor,
    /// Where the first begins.
    pub(super) start: usize,
    /// Numbers from one row to the next.
    pub(super) row: usize,
    /// Numbers from one matrix to the next.
    pub(super) next: usize,
}

impl<'a> Matrices<'a> {
    /// One matrix, all of the tensor, with rows of so many numbers.
    pub(super) fn whole(tensor: &'a Tensor, row: usize) -> Self {
        Self { tensor, start: 0, row, next: 0 }
    }

    fn check(&self, count: usize, rows: usize, columns: usize) -> Result<()> {
        let last = self.start + (count - 1) * self.next + (rows - 1) * self.row + columns;
        if self.row < columns || last > self.tensor.elem_count() {
            let shape = self.tensor.shape();
            bail!("{count} matrices of {rows} × {columns} do not lie in {shape:?} as told")
        }
        Ok(())
    }
}

/// How many products there are, rows and columns of each, and over how many numbers its sums go.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) count: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) depth: usize,
}

/// How the matrices of a product lie.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// The first as `[rows, depth]`, the second as `[depth, columns]`.
    Plain,
    /// The first as `[depth, rows]`, the second as `[columns, depth]`, as weights and keys are.
    Transposed,
}

impl Order {
    fn operation(self) -> cublasOperation_t {
        match self {
            Self::Plain => cublasOperation_t::CUBLAS_OP_N,
            Self::Transposed => cublasOperation_t::CUBLAS_OP_T,
        }
    }
}

/// `c = factor·a·b`, or `c = c + factor·a·b` where it is to `add`; sums are taken in f32.
///
/// # Errors
/// Matrices that do not lie in their tensors, and whatever cuBLAS says.
pub(super) fn multiply(
    device: &CudaDevice,
    Extent { count, rows, columns, depth }: Extent,
    (a, first): (Matrices, Order),
    (b, second): (Matrices, Order),
    c: Matrices,
    (factor, add): (f32, bool),
) -> Result<()> {
    if count == 0 || rows == 0 || columns == 0 || depth == 0 {
        bail!("a product of {rows} × {depth} × {columns}, {count} times");
    }
    c.check(count, rows, columns)?;
    match first {
        Order::Plain => a.check(count, rows, depth)?,
        Order::Transposed => a.check(count, depth, rows)?,
    }
    match second {
        Order::Plain => b.check(count, depth, columns)?,
        Order::Transposed => b.check(count, columns, depth)?,
    }
    let int = |value: usize| match i32::try_from(value) {
        Ok(value) => Ok(value),
        Err(_) => bail!("a product of {rows} × {depth} × {columns}: cuBLAS counts to 2^31 - 1"),
    };
    let keep = if add { 1.0f32 } else { 0.0 };
    // cuBLAS has columns where tensors have rows: it is asked for cᵀ = bᵀ·aᵀ.
    // SAFETY: the checks above have found all matrices within their tensors, whose types are told.
    unsafe {
        gemm_strided_batched_ex(
            *device.cublas_handle().handle(),
            second.operation(),
            first.operation(),
            int(columns)?,
            int(rows)?,
            int(depth)?,
            (&raw const factor).cast(),
            pointer(b.tensor, b.start)? as *const _,
            kind(b.tensor)?,
            int(b.row)?,
            b.next as i64,
            pointer(a.tensor, a.start)? as *const _,
            kind(a.tensor)?,
            int(a.row)?,
            a.next as i64,
            (&raw const keep).cast(),
            pointer(c.tensor, c.start)? as *mut _,
            kind(c.tensor)?,
            int(c.row)?,
            c.next as i64,
            int(count)?,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()?;
    Ok(())
}

fn kind(tensor: &Tensor) -> Result<cudaDataType_t> {
    Ok(match tensor.dtype() {
        DType::F32 => cudaDataType_t::CUDA_R_32F,
        DType::BF16 => cudaDataType_t::CUDA_R_16BF,
        DType::F16 => cudaDataType_t::CUDA_R_16F,
        other => bail!("products are of f32, bf16 and f16, not of {other:?}"),
    })
}
