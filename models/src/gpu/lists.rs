//! Many tensors as one vector and back, by one kernel each: a copy for each tensor would take longer to ask for than to
//! do.

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Result, Tensor, bail};

use super::context::Context;
use super::launch::{Argument, Kernels, address, over, pointer};

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
    join_at(tensors, &starts(tensors))
}

/// The same, each tensor beginning where `starts` says, which ends with the end of all; zeros between them.
///
/// # Errors
/// As [`join`], and places that overlap.
pub(super) fn join_at(tensors: &[Tensor], starts: &[usize]) -> Result<Tensor> {
    let context = check(tensors, starts)?;
    let flat = context.empty(starts[tensors.len()], DType::F32)?;
    copy(&context, "join", tensors, starts, &flat)?;
    Ok(flat)
}

/// Writes what [`join`] would read: the numbers of `flat` `[N]` into `tensors`.
///
/// # Errors
/// As [`join`], and a vector of another length.
pub(crate) fn part(flat: &Tensor, tensors: &[Tensor]) -> Result<()> {
    let starts = starts(tensors);
    let context = check(tensors, &starts)?;
    let size = starts[tensors.len()];
    if flat.dims() != [size] || flat.dtype() != DType::F32 {
        bail!("{:?} of {:?} is not f32 [{size}]", flat.dtype(), flat.dims())
    }
    copy(&context, "part", tensors, &starts, flat)
}

/// Where tensors begin that follow one another, and where the last one ends.
fn starts(tensors: &[Tensor]) -> Vec<usize> {
    let ends = tensors.iter().scan(0, |end, tensor| {
        *end += tensor.elem_count();
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

fn check(tensors: &[Tensor], starts: &[usize]) -> Result<Context> {
    let Some(first) = tensors.first() else { bail!("there are no tensors to join") };
    if starts.len() != tensors.len() + 1 || starts[0] != 0 {
        bail!("{} tensors do not begin at {} places", tensors.len(), starts.len())
    }
    for (tensor, place) in tensors.iter().zip(starts.windows(2)) {
        let there = tensor.device().same_device(first.device());
        let fits = (1..=place[1].saturating_sub(place[0])).contains(&tensor.elem_count());
        if !there || tensor.dtype() != DType::F32 || !fits {
            bail!("{:?} of {:?} does not fit", tensor.dtype(), tensor.dims())
        }
    }
    Context::new(first.device(), DType::F32)
}

fn copy(
    context: &Context,
    name: &str,
    tensors: &[Tensor],
    starts: &[usize],
    flat: &Tensor,
) -> Result<()> {
    let mut table: Vec<u64> =
        tensors.iter().map(|tensor| pointer(tensor, 0)).collect::<Result<_>>()?;
    table.extend(starts[..tensors.len()].iter().map(|&start| start as u64));
    table.extend(tensors.iter().map(|tensor| tensor.elem_count() as u64));
    let stream = context.cuda.cuda_stream();
    let table = stream.clone_htod(&table).w()?;
    let arguments = [
        Argument::Pointer(address(&table, &stream)),
        Argument::int(tensors.len())?,
        Argument::from(flat, 0)?,
        Argument::int(flat.elem_count())?,
    ];
    // SAFETY: the tensors, all of f32, are as long as the table says, and lie in `flat` as it says.
    unsafe { LISTS.launch(context, name, over(flat.elem_count()), &arguments) }
}
