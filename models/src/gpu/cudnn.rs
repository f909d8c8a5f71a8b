//! cuDNN's descriptors, in which its graphs are told and asked about, and what computes them.
//!
//! cudarc has only the functions that came before them, which do not reach the kernels of newer GPUs.

use std::rc::Rc;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cudnn::result::{create_handle, destroy_handle, set_stream};
use candle_core::cuda_backend::cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Name, cudnnBackendAttributeType_t as Type,
    cudnnBackendCreateDescriptor, cudnnBackendDescriptor_t, cudnnBackendDescriptorType_t as Kind,
    cudnnBackendDestroyDescriptor, cudnnBackendExecute, cudnnBackendFinalize,
    cudnnBackendGetAttribute, cudnnBackendHeurMode_t, cudnnBackendNumericalNote_t,
    cudnnBackendSetAttribute, cudnnConvolutionMode_t, cudnnDataType_t, cudnnGetLastErrorString,
    cudnnHandle_t, cudnnStatus_t,
};
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{CudaDevice, Error, Result, bail};

use crate::DeviceFault;

/// cuDNN for one thread, on a device's stream.
pub(super) struct Handle {
    raw: cudnnHandle_t,
    /// Is there as long as it.
    stream: Arc<CudaStream>,
}

impl Handle {
    /// # Errors
    /// Whatever cuDNN says.
    pub(super) fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let raw = create_handle().map_err(|error| refused(error.0))?;
        let handle = Self { raw, stream };
        // SAFETY: both are there, and belong to the context that is now this thread's.
        unsafe { set_stream(handle.raw, handle.stream.cu_stream().cast()) }?;
        Ok(handle)
    }

    /// As a descriptor is told of it.
    pub(super) fn raw(&self) -> cudnnHandle_t {
        self.raw
    }

    /// Has a plan done with what a variant pack names.
    ///
    /// # Safety
    /// The plan is of this handle. Until the stream has done it, the pack's addresses are of memory on the device, as large
    /// as the plan's tensors and workspace, and nothing else writes there.
    ///
    /// # Errors
    /// Whatever cuDNN says.
    pub(super) unsafe fn execute(&self, plan: &Descriptor, pack: &Descriptor) -> Result<()> {
        // SAFETY: all three are there, the rest is the caller's promise.
        said(unsafe { cudnnBackendExecute(self.raw, plan.raw, pack.raw) })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Nobody would do anything about an error.
        // SAFETY: nobody else has it.
        let _ = unsafe { destroy_handle(self.raw) };
    }
}

/// Something that cuDNN is told; [`Descriptor::finish`] has it look whether it makes sense.
pub(super) struct Descriptor {
    raw: cudnnBackendDescriptor_t,
    /// Others that it speaks of, which are there as long as it.
    others: Vec<Rc<Descriptor>>,
}

impl Descriptor {
    /// # Errors
    /// Whatever cuDNN says, as from all that follows.
    pub(super) fn new(kind: Kind) -> Result<Self> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: there is a place for one.
        said(unsafe { cudnnBackendCreateDescriptor(kind, &raw mut raw) })?;
        Ok(Self { raw, others: Vec::new() })
    }

    pub(super) fn with<T: Value>(self, name: Name, values: &[T]) -> Result<Self> {
        let (count, values) = (values.len() as i64, values.as_ptr().cast());
        // SAFETY: so many values of that type are there.
        said(unsafe { cudnnBackendSetAttribute(self.raw, name, T::TYPE, count, values) })?;
        Ok(self)
    }

    pub(super) fn of(mut self, name: Name, other: &Rc<Self>) -> Result<Self> {
        let value = (&raw const other.raw).cast();
        let kind = Type::CUDNN_TYPE_BACKEND_DESCRIPTOR;
        // SAFETY: one descriptor is there.
        said(unsafe { cudnnBackendSetAttribute(self.raw, name, kind, 1, value) })?;
        self.others.push(Rc::clone(other));
        Ok(self)
    }

    pub(super) fn finish(self) -> Result<Rc<Self>> {
        // SAFETY: it is there.
        said(unsafe { cudnnBackendFinalize(self.raw) })?;
        Ok(Rc::new(self))
    }

    /// At most so many values.
    pub(super) fn values<T: Value + Default>(&self, name: Name, most: usize) -> Result<Vec<T>> {
        let mut values = vec![T::default(); most];
        let (mut count, place) = (0, values.as_mut_ptr().cast());
        // SAFETY: there are places for so many of that type, and any bits are such a value.
        said(unsafe {
            cudnnBackendGetAttribute(self.raw, name, T::TYPE, most as i64, &raw mut count, place)
        })?;
        values.truncate(count as usize);
        Ok(values)
    }

    /// The number of an attribute that is one.
    pub(super) fn number(&self, name: Name) -> Result<i64> {
        match self.values(name, 1)?[..] {
            [number] => Ok(number),
            _ => bail!("cuDNN does not know a descriptor's {name:?}"),
        }
    }

    /// Other descriptors, finished, of which it knows.
    pub(super) fn others(&self, name: Name, kind: Kind) -> Result<Vec<Rc<Self>>> {
        let get = |most: usize, place: *mut cudnnBackendDescriptor_t| {
            let (of, mut count) = (Type::CUDNN_TYPE_BACKEND_DESCRIPTOR, 0i64);
            // SAFETY: there are places for so many, which it fills in.
            said(unsafe {
                let (most, place) = (most as i64, place.cast());
                cudnnBackendGetAttribute(self.raw, name, of, most, &raw mut count, place)
            })?;
            Ok::<_, candle_core::Error>(count as usize)
        };
        let most = get(0, std::ptr::null_mut())?;
        let mut others: Vec<Self> = (0..most).map(|_| Self::new(kind)).collect::<Result<_>>()?;
        let mut places: Vec<_> = others.iter().map(|other| other.raw).collect();
        // It may then have fewer than it said.
        others.truncate(get(most, places.as_mut_ptr())?);
        Ok(others.into_iter().map(Rc::new).collect())
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // Nobody would do anything about an error.
        // SAFETY: nobody else has it.
        let _ = unsafe { cudnnBackendDestroyDescriptor(self.raw) };
    }
}

/// A value of an attribute.
///
/// # Safety
/// It is what cuDNN reads and writes where the type is [`Value::TYPE`]; any bits are one, where it has a default.
pub(super) unsafe trait Value: Copy {
    const TYPE: Type;
}

/// An address on the device.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Address(pub(super) u64);

/// What cuDNN says of an engine's numbers; one of a newer cuDNN may have no name here.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(super) struct Note(u32);

impl Note {
    pub(super) fn is(self, note: cudnnBackendNumericalNote_t) -> bool {
        self.0 == note as u32
    }
}

macro_rules! values {
    ($($value:ty: $type:ident,)*) => {
        // SAFETY: cuDNN's documentation of its attributes' types.
        $(unsafe impl Value for $value { const TYPE: Type = Type::$type; })*
    };
}

values! {
    i64: CUDNN_TYPE_INT64,
    f32: CUDNN_TYPE_FLOAT,
    Address: CUDNN_TYPE_VOID_PTR,
    Note: CUDNN_TYPE_NUMERICAL_NOTE,
    cudnnHandle_t: CUDNN_TYPE_HANDLE,
    cudnnDataType_t: CUDNN_TYPE_DATA_TYPE,
    cudnnConvolutionMode_t: CUDNN_TYPE_CONVOLUTION_MODE,
    cudnnBackendHeurMode_t: CUDNN_TYPE_HEUR_MODE,
}

/// What cuDNN says.
fn said(status: cudnnStatus_t) -> Result<()> {
    match status {
        cudnnStatus_t::CUDNN_STATUS_SUCCESS => Ok(()),
        status => Err(refused(status)),
    }
}

/// What a status means, with cuDNN's own words for what it refuses.
fn refused(status: cudnnStatus_t) -> Error {
    let mut text = [0u8; 512];
    // SAFETY: there is room for so much text, which it ends.
    unsafe { cudnnGetLastErrorString(text.as_mut_ptr().cast(), text.len()) };
    let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
    let name = format!("{status:?}");
    let reason = format!("{name}: {}", String::from_utf8_lossy(text));
    DeviceFault::of_status(&name, reason).into()
}
