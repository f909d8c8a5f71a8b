// cuBLAS, cuDNN, cuRAND and NVML in software: the few functions that candle and this project call, in plain loops. Sums
// are taken in f32 (f64 for f64), whatever compute type is asked for.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cudnn.h>
#include <curand.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "driver.h"

namespace {

[[noreturn]] void wrong(const char *what) {
    std::fprintf(stderr, "emulated library: %s\n", what);
    std::abort();
}

enum class Type { F32, F64, F16, BF16 };
Type of(cudaDataType_t type) {
    switch (type) {
    case CUDA_R_32F: return Type::F32;
    case CUDA_R_64F: return Type::F64;
    case CUDA_R_16F: return Type::F16;
    case CUDA_R_16BF: return Type::BF16;
    default: wrong("a product of another type");
    }
}
Type of(cudnnDataType_t type) {
    switch (type) {
    case CUDNN_DATA_FLOAT: return Type::F32;
    case CUDNN_DATA_DOUBLE: return Type::F64;
    case CUDNN_DATA_HALF: return Type::F16;
    case CUDNN_DATA_BFLOAT16: return Type::BF16;
    default: wrong("a convolution of another type");
    }
}
double load(Type type, const void *at, size_t i) {
    switch (type) {
    case Type::F32: return static_cast<const float *>(at)[i];
    case Type::F64: return static_cast<const double *>(at)[i];
    case Type::F16: return __half2float(static_cast<const __half *>(at)[i]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16 *>(at)[i]);
    }
}
void store(Type type, void *at, size_t i, double value) {
    switch (type) {
    case Type::F32: static_cast<float *>(at)[i] = float(value); break;
    case Type::F64: static_cast<double *>(at)[i] = value; break;
    case Type::F16: static_cast<__half *>(at)[i] = __float2half(float(value)); break;
    default: static_cast<__nv_bfloat16 *>(at)[i] = __float2bfloat16(float(value));
    }
}
size_t size(Type type) { return type == Type::F64 ? 8 : type == Type::F32 ? 4 : 2; }
const char *moved(Type type, const void *at, size_t by) { return static_cast<const char *>(at) + by * size(type); }
char *moved(Type type, void *at, size_t by) { return static_cast<char *>(at) + by * size(type); }

// `into[m × n] += left[m × k] · right[k × n]`, all with rows after one another.
template <typename T> void multiply(const T *left, const T *right, T *into, int m, int n, int k) {
    for (int i = 0; i < m; i++)
        for (int p = 0; p < k; p++) {
            T factor = left[size_t(i) * k + p];
            const T *row = right + size_t(p) * n;
            for (int j = 0; j < n; j++) into[size_t(i) * n + j] += factor * row[j];
        }
}

struct Matrix {
    Type type;
    const void *at;
    int leading;
    bool transposed;
    // Element (row, column) of what the product takes.
    double operator()(int row, int column) const {
        return load(type, at, transposed ? size_t(row) * leading + column : size_t(column) * leading + row);
    }
};

template <typename T>
void product(const Matrix &a, const Matrix &b, Type type, void *c, int ldc, int m, int n, int k, T alpha, T beta) {
    std::vector<T> left(size_t(m) * k), right(size_t(k) * n), sum(size_t(m) * n);
    for (int i = 0; i < m; i++)
        for (int p = 0; p < k; p++) left[size_t(i) * k + p] = a(i, p);
    for (int p = 0; p < k; p++)
        for (int j = 0; j < n; j++) right[size_t(p) * n + j] = b(p, j);
    multiply(left.data(), right.data(), sum.data(), m, n, k);
    for (int j = 0; j < n; j++)
        for (int i = 0; i < m; i++) {
            size_t at = size_t(j) * ldc + i;
            // What beta = 0 multiplies may be NaN, and is not read.
            T old = beta == 0 ? 0 : beta * T(load(type, c, at));
            store(type, c, at, alpha * sum[size_t(i) * n + j] + old);
        }
}

struct Blas {
    cudaStream_t stream = nullptr;
};

template <typename T>
void products(
    cublasHandle_t handle, cublasOperation_t opa, cublasOperation_t opb, int m, int n, int k, T alpha, Type ta,
    const void *a, int lda, long long sa, Type tb, const void *b, int ldb, long long sb, T beta, Type tc, void *c,
    int ldc, long long sc, int batch
) {
    emulated_count("cuBLAS products");
    emulated_submit(reinterpret_cast<Blas *>(handle)->stream, [=] {
        for (int i = 0; i < batch; i++)
            product<T>(
                {ta, moved(ta, a, sa * i), lda, opa != CUBLAS_OP_N}, {tb, moved(tb, b, sb * i), ldb, opb != CUBLAS_OP_N},
                tc, moved(tc, c, sc * i), ldc, m, n, k, alpha, beta
            );
    });
}

} // namespace

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    *handle = reinterpret_cast<cublasHandle_t>(new Blas);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    delete reinterpret_cast<Blas *>(handle);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    reinterpret_cast<Blas *>(handle)->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t handle, cublasOperation_t opa, cublasOperation_t opb, int m, int n, int k, const void *alpha,
    const void *a, cudaDataType_t ta, int lda, long long sa, const void *b, cudaDataType_t tb, int ldb, long long sb,
    const void *beta, void *c, cudaDataType_t tc, int ldc, long long sc, int batch, cublasComputeType_t compute,
    cublasGemmAlgo_t
) {
    bool half = compute == CUBLAS_COMPUTE_16F || compute == CUBLAS_COMPUTE_16F_PEDANTIC;
    float by = half ? load(Type::F16, alpha, 0) : *static_cast<const float *>(alpha);
    float keep = half ? load(Type::F16, beta, 0) : *static_cast<const float *>(beta);
    products<float>(
        handle, opa, opb, m, n, k, by, of(ta), a, lda, sa, of(tb), b, ldb, sb, keep, of(tc), c, ldc, sc, batch
    );
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDgemmStridedBatched(
    cublasHandle_t handle, cublasOperation_t opa, cublasOperation_t opb, int m, int n, int k, const double *alpha,
    const double *a, int lda, long long sa, const double *b, int ldb, long long sb, const double *beta, double *c,
    int ldc, long long sc, int batch
) {
    products<double>(
        handle, opa, opb, m, n, k, *alpha, Type::F64, a, lda, sa, Type::F64, b, ldb, sb, *beta, Type::F64, c, ldc, sc,
        batch
    );
    return CUBLAS_STATUS_SUCCESS;
}

curandStatus_t curandCreateGenerator(curandGenerator_t *generator, curandRngType_t) {
    *generator = reinterpret_cast<curandGenerator_t>(1);
    return CURAND_STATUS_SUCCESS;
}
curandStatus_t curandDestroyGenerator(curandGenerator_t) { return CURAND_STATUS_SUCCESS; }
curandStatus_t curandSetStream(curandGenerator_t, cudaStream_t) { return CURAND_STATUS_SUCCESS; }
curandStatus_t curandSetPseudoRandomGeneratorSeed(curandGenerator_t, unsigned long long) { return CURAND_STATUS_SUCCESS; }
}

// ---- NVML: the few figures that are asked for -------------------------------------------------------------------

extern "C" {

struct NvmlMemory {
    unsigned version;
    unsigned long long total, reserved, free, used;
};
struct NvmlUtilization {
    unsigned gpu, memory;
};
int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
const char *nvmlErrorString(int) { return "an error of the emulated NVML"; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **device) {
    // The driver's emulated devices sit on buses 1, 2, ….
    unsigned domain, bus, slot;
    if (std::sscanf(bus_id, "%8x:%2x:%2x.0", &domain, &bus, &slot) != 3 || domain || slot || !bus) return 6;
    *device = reinterpret_cast<void *>(size_t(bus));
    return 0;
}
int nvmlDeviceGetMemoryInfo_v2(void *, NvmlMemory *memory) {
    *memory = {memory->version, 1 << 30, 0, 1 << 29, 1 << 29};
    return 0;
}
int nvmlDeviceGetUtilizationRates(void *, NvmlUtilization *utilization) {
    *utilization = {50, 25};
    return 0;
}
int nvmlDeviceGetTemperature(void *, int, unsigned *celsius) {
    *celsius = 40;
    return 0;
}
}

// ---- cuDNN ------------------------------------------------------------------------------------------------------

struct cudnnContext {
    cudaStream_t stream;
};
struct cudnnTensorStruct {
    Type type;
    int size[4], stride[4];
    size_t at(int n, int c, int h, int w) const {
        return size_t(n) * stride[0] + size_t(c) * stride[1] + size_t(h) * stride[2] + size_t(w) * stride[3];
    }
};
struct cudnnFilterStruct : cudnnTensorStruct {};
struct cudnnConvolutionStruct {
    int padding[2], stride[2], dilation[2], groups;
};

namespace {

void lay_out(cudnnTensorStruct &tensor, cudnnTensorFormat_t format, cudnnDataType_t type, int n, int c, int h, int w) {
    bool last = format == CUDNN_TENSOR_NHWC;
    if (!last && format != CUDNN_TENSOR_NCHW) wrong("a tensor of another format");
    tensor = {of(type), {n, c, h, w}, {c * h * w, last ? 1 : h * w, last ? w * c : w, last ? c : 1}};
}

cudnnStatus_t check(
    const cudnnTensorStruct &x, const cudnnFilterStruct &w, const cudnnConvolutionStruct &c, const cudnnTensorStruct &y
) {
    // As if channels had to come before pixels.
    static const bool rows_only = std::getenv("EMULATED_ROWS") != nullptr;
    if (rows_only && x.size[1] > 1 && x.size[2] * x.size[3] > 1 && x.stride[1] == 1) return CUDNN_STATUS_NOT_SUPPORTED;
    bool good = x.type == w.type && y.type == x.type && x.size[0] == y.size[0] && x.size[1] == w.size[1] * c.groups;
    good = good && y.size[1] == w.size[0] && c.groups == 1;
    for (int i = 0; i < 2; i++) {
        int reach = c.dilation[i] * (w.size[2 + i] - 1) + 1;
        good = good && y.size[2 + i] == (x.size[2 + i] + 2 * c.padding[i] - reach) / c.stride[i] + 1;
    }
    // Elements that lie over one another are for no tensor of cuDNN's.
    for (const cudnnTensorStruct *tensor : {&x, static_cast<const cudnnTensorStruct *>(&w), &y})
        for (int i = 0; i < 4; i++) good = good && tensor->size[i] > 0 && tensor->stride[i] > 0;
    return good ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_BAD_PARAM;
}

std::vector<float> gathered(const cudnnTensorStruct &tensor, const void *from) {
    auto [n, c, h, w] = tensor.size;
    std::vector<float> values;
    values.reserve(size_t(n) * c * h * w);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < c; j++)
            for (int k = 0; k < h; k++)
                for (int l = 0; l < w; l++) values.push_back(load(tensor.type, from, tensor.at(i, j, k, l)));
    return values;
}

void scatter(const cudnnTensorStruct &tensor, const std::vector<float> &values, float alpha, float beta, void *to) {
    auto [n, c, h, w] = tensor.size;
    size_t next = 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < c; j++)
            for (int k = 0; k < h; k++)
                for (int l = 0; l < w; l++) {
                    size_t at = tensor.at(i, j, k, l);
                    float old = beta == 0 ? 0 : beta * load(tensor.type, to, at);
                    store(tensor.type, to, at, alpha * values[next++] + old);
                }
}

// The pixels that output pixels see: `[C·K·K, H'·W']` of sample `n`, which `visit(column's place, x's place)` is told
// of; zeros around are left out.
template <typename F>
void windows(
    const cudnnTensorStruct &x, const cudnnFilterStruct &w, const cudnnConvolutionStruct &c,
    const cudnnTensorStruct &y, int n, F visit
) {
    size_t pixels = size_t(y.size[2]) * y.size[3];
    for (int channel = 0; channel < x.size[1]; channel++)
        for (int i = 0; i < w.size[2]; i++)
            for (int j = 0; j < w.size[3]; j++)
                for (int row = 0; row < y.size[2]; row++)
                    for (int column = 0; column < y.size[3]; column++) {
                        int up = row * c.stride[0] + i * c.dilation[0] - c.padding[0];
                        int left = column * c.stride[1] + j * c.dilation[1] - c.padding[1];
                        if (up < 0 || up >= x.size[2] || left < 0 || left >= x.size[3]) continue;
                        size_t of_window = (size_t(channel) * w.size[2] + i) * w.size[3] + j;
                        size_t of_x = ((size_t(n) * x.size[1] + channel) * x.size[2] + up) * x.size[3] + left;
                        visit(of_window * pixels + size_t(row) * y.size[3] + column, of_x);
                    }
}

} // namespace

extern "C" {

cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) { *handle = new cudnnContext{}; return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) { delete handle; return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
    handle->stream = stream;
    return CUDNN_STATUS_SUCCESS;
}
const char *cudnnGetErrorString(cudnnStatus_t) { return "an error of the emulated cuDNN"; }
size_t cudnnGetVersion() { return CUDNN_VERSION; }

cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t *made) {
    *made = new cudnnTensorStruct{};
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnDestroyTensorDescriptor(cudnnTensorDescriptor_t tensor) {
    delete tensor;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetTensor4dDescriptor(
    cudnnTensorDescriptor_t tensor, cudnnTensorFormat_t format, cudnnDataType_t type, int n, int c, int h, int w
) {
    lay_out(*tensor, format, type, n, c, h, w);
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetTensor4dDescriptorEx(
    cudnnTensorDescriptor_t tensor, cudnnDataType_t type, int n, int c, int h, int w, int ns, int cs, int hs, int ws
) {
    *tensor = {of(type), {n, c, h, w}, {ns, cs, hs, ws}};
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnCreateFilterDescriptor(cudnnFilterDescriptor_t *made) {
    *made = new cudnnFilterStruct{};
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnDestroyFilterDescriptor(cudnnFilterDescriptor_t filter) {
    delete filter;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetFilter4dDescriptor(
    cudnnFilterDescriptor_t filter, cudnnDataType_t type, cudnnTensorFormat_t format, int k, int c, int h, int w
) {
    lay_out(*filter, format, type, k, c, h, w);
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnCreateConvolutionDescriptor(cudnnConvolutionDescriptor_t *made) {
    *made = new cudnnConvolutionStruct{};
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnDestroyConvolutionDescriptor(cudnnConvolutionDescriptor_t convolution) {
    delete convolution;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetConvolution2dDescriptor(
    cudnnConvolutionDescriptor_t made, int ph, int pw, int sh, int sw, int dh, int dw, cudnnConvolutionMode_t mode,
    cudnnDataType_t
) {
    if (mode != CUDNN_CROSS_CORRELATION) return CUDNN_STATUS_NOT_SUPPORTED;
    *made = {{ph, pw}, {sh, sw}, {dh, dw}, 1};
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnSetConvolutionMathType(cudnnConvolutionDescriptor_t, cudnnMathType_t) { return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnSetConvolutionGroupCount(cudnnConvolutionDescriptor_t convolution, int groups) {
    convolution->groups = groups;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetConvolutionForwardAlgorithm_v7(
    cudnnHandle_t, const cudnnTensorDescriptor_t x, const cudnnFilterDescriptor_t w,
    const cudnnConvolutionDescriptor_t c, const cudnnTensorDescriptor_t y, int, int *found,
    cudnnConvolutionFwdAlgoPerf_t *results
) {
    *found = 1;
    results[0] = {};
    results[0].algo = CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM;
    return check(*x, *w, *c, *y);
}
cudnnStatus_t cudnnGetConvolutionForwardWorkspaceSize(
    cudnnHandle_t, const cudnnTensorDescriptor_t, const cudnnFilterDescriptor_t, const cudnnConvolutionDescriptor_t,
    const cudnnTensorDescriptor_t, cudnnConvolutionFwdAlgo_t, size_t *bytes
) {
    *bytes = 256;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnGetConvolutionBackwardDataAlgorithm_v7(
    cudnnHandle_t, const cudnnFilterDescriptor_t w, const cudnnTensorDescriptor_t y,
    const cudnnConvolutionDescriptor_t c, const cudnnTensorDescriptor_t x, int, int *found,
    cudnnConvolutionBwdDataAlgoPerf_t *results
) {
    *found = 1;
    results[0] = {};
    results[0].algo = CUDNN_CONVOLUTION_BWD_DATA_ALGO_0;
    return check(*x, *w, *c, *y);
}
cudnnStatus_t cudnnGetConvolutionBackwardDataWorkspaceSize(
    cudnnHandle_t, const cudnnFilterDescriptor_t, const cudnnTensorDescriptor_t, const cudnnConvolutionDescriptor_t,
    const cudnnTensorDescriptor_t, cudnnConvolutionBwdDataAlgo_t, size_t *bytes
) {
    *bytes = 0;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnGetConvolutionBackwardFilterAlgorithm_v7(
    cudnnHandle_t, const cudnnTensorDescriptor_t x, const cudnnTensorDescriptor_t y,
    const cudnnConvolutionDescriptor_t c, const cudnnFilterDescriptor_t w, int, int *found,
    cudnnConvolutionBwdFilterAlgoPerf_t *results
) {
    *found = 1;
    results[0] = {};
    results[0].algo = CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1;
    return check(*x, *w, *c, *y);
}
cudnnStatus_t cudnnGetConvolutionBackwardFilterWorkspaceSize(
    cudnnHandle_t, const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t, const cudnnConvolutionDescriptor_t,
    const cudnnFilterDescriptor_t, cudnnConvolutionBwdFilterAlgo_t, size_t *bytes
) {
    *bytes = 256;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnConvolutionForward(
    cudnnHandle_t handle, const void *alpha, const cudnnTensorDescriptor_t px, const void *x,
    const cudnnFilterDescriptor_t pw, const void *w, const cudnnConvolutionDescriptor_t pc, cudnnConvolutionFwdAlgo_t,
    void *, size_t, const void *beta, const cudnnTensorDescriptor_t py, void *y
) {
    emulated_count("cuDNN convolutions");
    auto tx = *px, ty = *py;
    auto tw = *pw;
    auto c = *pc;
    if (cudnnStatus_t status = check(tx, tw, c, ty)) return status;
    // Scales are f32 for all types but f64.
    if (tx.type == Type::F64) wrong("a convolution in f64");
    float by = *static_cast<const float *>(alpha), keep = *static_cast<const float *>(beta);
    emulated_submit(handle->stream, [=] {
        std::vector<float> image = gathered(tx, x), weight = gathered(tw, w);
        size_t pixels = size_t(ty.size[2]) * ty.size[3], reach = weight.size() / tw.size[0];
        std::vector<float> sum(size_t(ty.size[0]) * ty.size[1] * pixels), seen(reach * pixels);
        for (int n = 0; n < tx.size[0]; n++) {
            std::fill(seen.begin(), seen.end(), 0);
            windows(tx, tw, c, ty, n, [&](size_t of_window, size_t of_x) { seen[of_window] = image[of_x]; });
            multiply(
                weight.data(), seen.data(), sum.data() + size_t(n) * ty.size[1] * pixels, ty.size[1], int(pixels),
                int(reach)
            );
        }
        scatter(ty, sum, by, keep, y);
    });
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnConvolutionBackwardData(
    cudnnHandle_t handle, const void *alpha, const cudnnFilterDescriptor_t pw, const void *w,
    const cudnnTensorDescriptor_t py, const void *y, const cudnnConvolutionDescriptor_t pc,
    cudnnConvolutionBwdDataAlgo_t algorithm, void *, size_t, const void *beta, const cudnnTensorDescriptor_t px, void *x
) {
    emulated_count("cuDNN gradients of inputs");
    auto tx = *px, ty = *py;
    auto tw = *pw;
    auto c = *pc;
    if (cudnnStatus_t status = check(tx, tw, c, ty)) return status;
    if (algorithm == CUDNN_CONVOLUTION_BWD_DATA_ALGO_0) wrong("a gradient whose sums are added in any order");
    float by = *static_cast<const float *>(alpha), keep = *static_cast<const float *>(beta);
    emulated_submit(handle->stream, [=] {
        std::vector<float> given = gathered(ty, y), weight = gathered(tw, w);
        size_t pixels = size_t(ty.size[2]) * ty.size[3], reach = weight.size() / tw.size[0];
        std::vector<float> turned(weight.size()), sum(size_t(tx.size[0]) * tx.size[1] * tx.size[2] * tx.size[3]);
        for (int o = 0; o < tw.size[0]; o++)
            for (size_t r = 0; r < reach; r++) turned[r * tw.size[0] + o] = weight[o * reach + r];
        for (int n = 0; n < tx.size[0]; n++) {
            std::vector<float> seen(reach * pixels);
            multiply(
                turned.data(), given.data() + size_t(n) * ty.size[1] * pixels, seen.data(), int(reach), int(pixels),
                tw.size[0]
            );
            windows(tx, tw, c, ty, n, [&](size_t of_window, size_t of_x) { sum[of_x] += seen[of_window]; });
        }
        scatter(tx, sum, by, keep, x);
    });
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnConvolutionBackwardFilter(
    cudnnHandle_t handle, const void *alpha, const cudnnTensorDescriptor_t px, const void *x,
    const cudnnTensorDescriptor_t py, const void *y, const cudnnConvolutionDescriptor_t pc,
    cudnnConvolutionBwdFilterAlgo_t, void *, size_t, const void *beta, const cudnnFilterDescriptor_t pw, void *w
) {
    emulated_count("cuDNN gradients of weights");
    auto tx = *px, ty = *py;
    auto tw = *pw;
    auto c = *pc;
    if (cudnnStatus_t status = check(tx, tw, c, ty)) return status;
    float by = *static_cast<const float *>(alpha), keep = *static_cast<const float *>(beta);
    emulated_submit(handle->stream, [=] {
        std::vector<float> image = gathered(tx, x), given = gathered(ty, y);
        size_t pixels = size_t(ty.size[2]) * ty.size[3], reach = size_t(tw.size[1]) * tw.size[2] * tw.size[3];
        std::vector<float> sum(reach * tw.size[0]), seen(pixels * reach);
        for (int n = 0; n < tx.size[0]; n++) {
            std::fill(seen.begin(), seen.end(), 0);
            windows(tx, tw, c, ty, n, [&](size_t of_window, size_t of_x) {
                seen[of_window % pixels * reach + of_window / pixels] = image[of_x];
            });
            multiply(
                given.data() + size_t(n) * ty.size[1] * pixels, seen.data(), sum.data(), tw.size[0], int(reach),
                int(pixels)
            );
        }
        scatter(tw, sum, by, keep, w);
    });
    return CUDNN_STATUS_SUCCESS;
}
}
