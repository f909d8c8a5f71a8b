//! Many tensors as one vector and back, by one kernel each: a copy for each tensor would take longer to ask for than to
//! do.

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Result, Tensor, bail};

use super::launch::{Argument, Kernels, over, pointer};
use super::machine::Machine;

static LISTS: Kernels = Kernels::new(
    "lists",
    concat!(include_str!("kernels/numbers.cu"), include_str!("kernels/lists.cu")),
    None,
);

/// The numbers of contiguous f32 tensors of one GPU, one after the other: `[N]`.
///
/// # Errors
/// Tensors of another type or place, none or empty ones, and whatever the device says.
pub(crate) fn join(tensors: &[Tensor]) -> Result<Tensor> {
    let (machine, size) = check(tensors)?;
    let flat = machine.empty(size, DType::F32)?;
    copy(&machine, "join", tensors, &flat)?;
    Ok(flat)
}

/// Writes what [`join`] would read: the numbers of `flat` `[N]` into `tensors`.
///
/// # Errors
/// As [`join`], and a vector of another length.
pub(crate) fn part(flat: &Tensor, tensors: &[Tensor]) -> Result<()> {
    let (machine, size) = check(tensors)?;
    if flat.dims() != [size] || flat.dtype() != DType::F32 {
        bail!("{:?} of {:?} is not f32 [{size}]", flat.dtype(), flat.dims())
    }
    copy(&machine, "part", tensors, flat)
}

fn check(tensors: &[Tensor]) -> Result<(Machine, usize)> {
    let Some(first) = tensors.first() else { bail!("there are no tensors to join") };
    for tensor in tensors {
        let there = tensor.device().same_device(first.device());
        if !there || tensor.dtype() != DType::F32 || tensor.elem_count() == 0 {
            bail!("{:?} of {:?} does not fit", tensor.dtype(), tensor.dims())
        }
    }
    let size = tensors.iter().map(Tensor::elem_count).sum();
    Ok((Machine::new(first.device(), DType::F32)?, size))
}

fn copy(machine: &Machine, name: &str, tensors: &[Tensor], flat: &Tensor) -> Result<()> {
    let mut table: Vec<u64> =
        tensors.iter().map(|tensor| pointer(tensor, 0)).collect::<Result<_>>()?;
    let mut start = 0;
    for tensor in tensors {
        table.push(start);
        start += tensor.elem_count() as u64;
    }
    let stream = machine.cuda.cuda_stream();
    let table = stream.clone_htod(&table).w()?;
    let arguments = [
        Argument::Pointer(super::launch::address(&table, &stream)),
        Argument::int(tensors.len())?,
        Argument::from(flat, 0)?,
        Argument::int(flat.elem_count())?,
    ];
    // SAFETY: the tensors, all of f32, are as long as the table says, and together as long as `flat`.
    unsafe { LISTS.launch(machine, name, over(flat.elem_count()), &arguments) }
}
