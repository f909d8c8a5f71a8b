//! Why a device failed at what it was asked, as a type that travels in candle's errors.

use candle_core::Error;

/// Why an evaluation failed, in the device's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceFault {
    /// For want of memory: fewer rows may do.
    #[error("{0}")]
    OutOfMemory(String),
    /// As all will from now on in this process.
    #[error("{0}")]
    Lost(String),
    /// For any other reason.
    #[error("{0}")]
    Otherwise(String),
}

impl DeviceFault {
    /// What an error says of the device, whatever has been put around it.
    pub fn of(error: &Error) -> Self {
        Self::inside(error).unwrap_or_else(|| Self::Otherwise(error.to_string()))
    }

    /// The same in other words.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) fn saying(self, reason: String) -> Self {
        match self {
            Self::OutOfMemory(_) => Self::OutOfMemory(reason),
            Self::Lost(_) => Self::Lost(reason),
            Self::Otherwise(_) => Self::Otherwise(reason),
        }
    }

    fn inside(error: &Error) -> Option<Self> {
        match error {
            Error::Context { inner, .. }
            | Error::WithPath { inner, .. }
            | Error::WithBacktrace { inner, .. } => Self::inside(inner),
            Error::Cuda(inside) => match inside.downcast_ref::<Self>() {
                Some(fault) => Some(fault.clone()),
                None => of_driver(inside.as_ref()),
            },
            _ => None,
        }
    }

    /// What the driver and its libraries mean by the status of that name: the driver's (`CUDA_ERROR_…`), cuBLAS's
    /// (`CUBLAS_STATUS_…`), cuDNN's (`CUDNN_STATUS_…`). By name, since not every release of theirs has all of them.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) fn of_status(name: &str, reason: String) -> Self {
        match name {
            "CUDA_ERROR_OUT_OF_MEMORY"
            | "CUBLAS_STATUS_ALLOC_FAILED"
            | "CUDNN_STATUS_ALLOC_FAILED"
            | "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"
            | "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED" => Self::OutOfMemory(reason),
            // Those of which CUDA's documentation says that the process must be ended, and ECC's and NVLink's.
            "CUDA_ERROR_ILLEGAL_ADDRESS"
            | "CUDA_ERROR_LAUNCH_FAILED"
            | "CUDA_ERROR_LAUNCH_TIMEOUT"
            | "CUDA_ERROR_ILLEGAL_INSTRUCTION"
            | "CUDA_ERROR_MISALIGNED_ADDRESS"
            | "CUDA_ERROR_INVALID_ADDRESS_SPACE"
            | "CUDA_ERROR_INVALID_PC"
            | "CUDA_ERROR_HARDWARE_STACK_ERROR"
            | "CUDA_ERROR_ASSERT"
            | "CUDA_ERROR_CONTAINED"
            | "CUDA_ERROR_ECC_UNCORRECTABLE"
            | "CUDA_ERROR_NVLINK_UNCORRECTABLE" => Self::Lost(reason),
            _ => Self::Otherwise(reason),
        }
    }
}

impl From<DeviceFault> for Error {
    /// In the one variant of candle's that keeps an error as it is, on a CPU too.
    fn from(fault: DeviceFault) -> Self {
        Self::Cuda(Box::new(fault))
    }
}

/// What candle keeps of the driver's and cuBLAS's statuses.
#[cfg(feature = "cuda")]
fn of_driver(error: &(dyn std::error::Error + Send + Sync + 'static)) -> Option<DeviceFault> {
    use candle_core::cuda_backend::CudaError;

    let status = match error.downcast_ref::<CudaError>()? {
        CudaError::Cuda(driver) | CudaError::Load { cuda: driver, .. } => {
            format!("{:?}", driver.0)
        }
        CudaError::Cublas(cublas) => format!("{:?}", cublas.0),
        _ => return None,
    };
    Some(DeviceFault::of_status(&status, error.to_string()))
}

#[cfg(not(feature = "cuda"))]
fn of_driver(_: &(dyn std::error::Error + Send + Sync + 'static)) -> Option<DeviceFault> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_found_in_whatever_is_put_around_it() {
        let fault = DeviceFault::OutOfMemory("none left".into());
        let error = Error::from(fault.clone()).context("of the third layer").with_path("weights");
        assert_eq!(DeviceFault::of(&error), fault);
        assert_eq!(Error::from(fault).to_string(), "none left");
    }

    #[test]
    fn what_an_error_says_makes_no_fault() {
        let error = Error::Msg("CUDA_ERROR_OUT_OF_MEMORY".into());
        assert_eq!(DeviceFault::of(&error), DeviceFault::Otherwise(error.to_string()));
    }

    #[test]
    fn statuses_are_known_by_their_whole_names() {
        let of = |name: &str| DeviceFault::of_status(name, name.into());
        assert!(matches!(of("CUBLAS_STATUS_ALLOC_FAILED"), DeviceFault::OutOfMemory(_)));
        assert!(matches!(of("CUDA_ERROR_ECC_UNCORRECTABLE"), DeviceFault::Lost(_)));
        assert!(matches!(of("CUDA_ERROR_INVALID_VALUE"), DeviceFault::Otherwise(_)));
    }
}
