//! Group norm as an operation of candle's with a gradient, for networks that are trained: of maps in rows.

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, Device, Layout, Result, Shape, Tensor, bail,
};

use super::kernels::Rows;
use super::machine::Machine;
use crate::kernels::Function;

/// Group norm (Wu & He 2018) of `x` `[B, channels, …]`, f32, bf16 or f16: of what `parameters` `[B, 3, channels]` in f32
/// has third, added to every pixel, times what it has first, plus what it has second, then `function`. Sums are taken in
/// f32.
///
/// # Errors
/// Shapes that do not fit, and whatever the device says.
pub(crate) fn group_norm(
    x: &Tensor,
    parameters: &Tensor,
    (groups, eps): (usize, f64),
    function: Function,
) -> Result<Tensor> {
    let rows = Rows { groups, eps, function };
    x.contiguous()?.apply_op2(&parameters.contiguous()?, GroupNorm(rows))
}

struct GroupNorm(Rows);

impl CustomOp2 for GroupNorm {
    fn name(&self) -> &'static str {
        "group-norm"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("this group norm is for GPUs")
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_at: &Layout,
        parameters: &CudaStorage,
        parameters_at: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let machine = Machine::new(&Device::Cuda(x.device.clone()), x.dtype())?;
        let y = machine.norm_rows((x, x_at), (parameters, parameters_at), self.0)?;
        Ok((y, x_at.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        _: &Tensor,
        of_y: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let machine = Machine::new(x.device(), x.dtype())?;
        let (x, parameters) = (x.detach(), parameters.detach());
        let of_y = of_y.detach().contiguous()?;
        let [of_x, of_parameters] = machine.norm_rows_gradient(&x, &parameters, &of_y, self.0)?;
        Ok((Some(of_x), Some(of_parameters)))
    }
}
