//! Why an evaluation failed.

/// Why an evaluation failed, in the device's words.
pub(super) enum DeviceFault {
    /// For want of memory: fewer rows may do.
    OutOfMemory(String),
    /// As all will from now on in this process.
    Lost(String),
    /// For any other reason.
    Otherwise(String),
}

impl DeviceFault {
    /// candle keeps what CUDA's libraries say as text, with their own names of errors: the driver's
    /// `CUDA_ERROR_OUT_OF_MEMORY`, cuBLAS's `CUBLAS_STATUS_ALLOC_FAILED`, cuDNN's
    /// `CUDNN_STATUS_ALLOC_FAILED` and `CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED`.
    pub(super) fn of(error: &candle_core::Error) -> Self {
        const NO_MEMORY: [&str; 3] = ["OUT_OF_MEMORY", "ALLOC_FAILED", "ALLOCATION_FAILED"];
        // Those of which CUDA's documentation says that the process must be ended, and ECC's and NVLink's.
        const LOST: [&str; 12] = [
            "CUDA_ERROR_ILLEGAL_ADDRESS",
            "CUDA_ERROR_LAUNCH_FAILED",
            "CUDA_ERROR_LAUNCH_TIMEOUT",
            "CUDA_ERROR_ILLEGAL_INSTRUCTION",
            "CUDA_ERROR_MISALIGNED_ADDRESS",
            "CUDA_ERROR_INVALID_ADDRESS_SPACE",
            "CUDA_ERROR_INVALID_PC",
            "CUDA_ERROR_HARDWARE_STACK_ERROR",
            "CUDA_ERROR_ASSERT",
            "CUDA_ERROR_CONTAINED",
            "CUDA_ERROR_ECC_UNCORRECTABLE",
            "CUDA_ERROR_NVLINK_UNCORRECTABLE",
        ];
        let text = error.to_string();
        let names = |names: &[&str]| names.iter().any(|name| text.contains(name));
        if names(&NO_MEMORY) {
            Self::OutOfMemory(text)
        } else if names(&LOST) {
            Self::Lost(text)
        } else {
            Self::Otherwise(text)
        }
    }
}
