// cuBLAS, cuDNN, cuRAND and NVML in software: the few functions that candle and this project call, in plain loops. Sums
// are taken in f32 (f64 for f64), whatever compute type is asked for.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cudnn.h>
#include <curand.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
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

// Its graphs, as far as this project tells them: one convolution, or one of its gradients. It is told everything that
// there is to tell, in order, or ends the process; what NVIDIA's refuses, it refuses. Its heuristics propose engines
// that are not for us, too; having one of those do anything ends the process.

struct cudnnContext {
    cudaStream_t stream;
};

namespace {

struct Layout {
    Type type;
    int64_t size[4], stride[4];
    size_t at(int64_t n, int64_t c, int64_t h, int64_t w) const {
        return n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
    }
    size_t count() const { return size_t(size[0]) * size[1] * size[2] * size[3]; }
    bool last() const { return size[1] > 1 && size[2] * size[3] > 1 && stride[1] == 1; }
};
enum class Part { Answer, OfInput, OfWeight };
struct Convolved {
    Part part;
    Layout x, w, y;
    int64_t names[3], alignment, padding[2], stride[2];
};

std::vector<float> gathered(const Layout &tensor, const void *from) {
    auto [n, c, h, w] = tensor.size;
    std::vector<float> values;
    values.reserve(tensor.count());
    for (int i = 0; i < n; i++)
        for (int j = 0; j < c; j++)
            for (int k = 0; k < h; k++)
                for (int l = 0; l < w; l++) values.push_back(load(tensor.type, from, tensor.at(i, j, k, l)));
    return values;
}

void scatter(const Layout &tensor, const std::vector<float> &values, void *to) {
    auto [n, c, h, w] = tensor.size;
    size_t next = 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < c; j++)
            for (int k = 0; k < h; k++)
                for (int l = 0; l < w; l++) store(tensor.type, to, tensor.at(i, j, k, l), values[next++]);
}

// The pixels that output pixels see: `[C·K·K, H'·W']` of sample `n`, which `visit(column's place, x's place)` is told
// of; zeros around are left out.
template <typename F> void windows(const Convolved &c, int n, F visit) {
    const Layout &x = c.x, &w = c.w, &y = c.y;
    size_t pixels = size_t(y.size[2]) * y.size[3];
    for (int channel = 0; channel < x.size[1]; channel++)
        for (int i = 0; i < w.size[2]; i++)
            for (int j = 0; j < w.size[3]; j++)
                for (int row = 0; row < y.size[2]; row++)
                    for (int column = 0; column < y.size[3]; column++) {
                        int64_t up = row * c.stride[0] + i - c.padding[0];
                        int64_t left = column * c.stride[1] + j - c.padding[1];
                        if (up < 0 || up >= x.size[2] || left < 0 || left >= x.size[3]) continue;
                        size_t of_window = (size_t(channel) * w.size[2] + i) * w.size[3] + j;
                        size_t of_x = ((size_t(n) * x.size[1] + channel) * x.size[2] + up) * x.size[3] + left;
                        visit(of_window * pixels + size_t(row) * y.size[3] + column, of_x);
                    }
}

// Does it with x, the weights and y.
void convolve(const Convolved &c, void *x, void *w, void *y) {
    int outputs = int(c.w.size[0]), pixels = int(c.y.size[2] * c.y.size[3]), reach = int(c.w.count() / outputs);
    size_t answers = size_t(outputs) * pixels;
    if (c.part == Part::Answer) {
        std::vector<float> image = gathered(c.x, x), weight = gathered(c.w, w), sum(c.y.count());
        std::vector<float> seen(size_t(reach) * pixels);
        for (int n = 0; n < c.x.size[0]; n++) {
            std::fill(seen.begin(), seen.end(), 0);
            windows(c, n, [&](size_t of_window, size_t of_x) { seen[of_window] = image[of_x]; });
            multiply(weight.data(), seen.data(), sum.data() + n * answers, outputs, pixels, reach);
        }
        scatter(c.y, sum, y);
    } else if (c.part == Part::OfInput) {
        std::vector<float> given = gathered(c.y, y), weight = gathered(c.w, w), sum(c.x.count());
        std::vector<float> turned(weight.size());
        for (int o = 0; o < outputs; o++)
            for (int r = 0; r < reach; r++) turned[size_t(r) * outputs + o] = weight[size_t(o) * reach + r];
        for (int n = 0; n < c.x.size[0]; n++) {
            std::vector<float> seen(size_t(reach) * pixels);
            multiply(turned.data(), given.data() + n * answers, seen.data(), reach, pixels, outputs);
            windows(c, n, [&](size_t of_window, size_t of_x) { sum[of_x] += seen[of_window]; });
        }
        scatter(c.x, sum, x);
    } else {
        std::vector<float> image = gathered(c.x, x), given = gathered(c.y, y), sum(c.w.count());
        std::vector<float> seen(size_t(pixels) * reach);
        for (int n = 0; n < c.x.size[0]; n++) {
            std::fill(seen.begin(), seen.end(), 0);
            windows(c, n, [&](size_t of_window, size_t of_x) {
                seen[of_window % pixels * reach + of_window / pixels] = image[of_x];
            });
            multiply(given.data() + n * answers, seen.data(), sum.data(), outputs, reach, pixels);
        }
        scatter(c.w, sum, w);
    }
}

struct Engine {
    int64_t number;
    std::vector<cudnnBackendNumericalNote_t> notes;
    int64_t bytes;
    // Whether there is a plan with it, and whether one may be used for f32, and for other types.
    bool planned, for_f32, for_others;
};
const Engine first_engines[] = {
    {4, {CUDNN_NUMERICAL_NOTE_TENSOR_CORE, CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC}, 0, true, false, false},
    {5, {CUDNN_NUMERICAL_NOTE_REDUCED_PRECISION_REDUCTION}, 0, true, false, false},
    {6, {CUDNN_NUMERICAL_NOTE_DOWN_CONVERT_INPUTS}, 0, true, false, false},
    {7, {CUDNN_NUMERICAL_NOTE_TENSOR_CORE}, 0, false, false, false},
    {8, {CUDNN_NUMERICAL_NOTE_TENSOR_CORE}, int64_t(1) << 40, true, false, false},
    {9, {CUDNN_NUMERICAL_NOTE_TENSOR_CORE}, 131, true, false, true},
    {10, {CUDNN_NUMERICAL_NOTE_TENSOR_CORE}, 0, true, false, true},
};
const Engine last_engines[] = {
    {1, {}, 4608, true, true, true},
    {0, {CUDNN_NUMERICAL_NOTE_STRICT_NAN_PROP}, 0, true, true, true},
};

struct Described {
    cudnnBackendDescriptorType_t kind;
    bool finished = false;
    std::map<cudnnBackendAttributeName_t, std::vector<char>> told;
    // What it comes to: of operations and what is made of them, and of engines and what is made of them.
    Convolved convolved = {};
    const Engine *engine = nullptr;

    template <typename T> const T *get(cudnnBackendAttributeName_t name) const {
        return reinterpret_cast<const T *>(told.at(name).data());
    }
    const Described &other(cudnnBackendAttributeName_t name) const { return **get<Described *>(name); }
};
// Those that are there. They are of all threads.
std::mutex described;
std::set<Described *> &there = *new std::set<Described *>;
Described &known(const void *descriptor) {
    std::lock_guard lock(described);
    auto *known = static_cast<Described *>(const_cast<void *>(descriptor));
    if (!there.count(known)) wrong("a descriptor that is not there");
    return *known;
}

// What each kind of descriptor is to be told: so many values of a type, or another descriptor.
struct Told {
    cudnnBackendDescriptorType_t kind;
    cudnnBackendAttributeName_t name;
    cudnnBackendAttributeType_t type;
    int64_t count;
    size_t size;
    cudnnBackendDescriptorType_t other = {};
};
const auto A_DESCRIPTOR = CUDNN_TYPE_BACKEND_DESCRIPTOR;
#define OPERATION(KIND, NAME, X, W, Y)                                                                     \
    {KIND, NAME##_ALPHA, CUDNN_TYPE_FLOAT, 1, 4}, {KIND, NAME##_BETA, CUDNN_TYPE_FLOAT, 1, 4},             \
        {KIND, NAME##_CONV_DESC, A_DESCRIPTOR, 1, 8, CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR},                \
        {KIND, NAME##_##X, A_DESCRIPTOR, 1, 8, CUDNN_BACKEND_TENSOR_DESCRIPTOR},                           \
        {KIND, NAME##_##W, A_DESCRIPTOR, 1, 8, CUDNN_BACKEND_TENSOR_DESCRIPTOR},                           \
        {KIND, NAME##_##Y, A_DESCRIPTOR, 1, 8, CUDNN_BACKEND_TENSOR_DESCRIPTOR}
const Told all_told[] = {
    {CUDNN_BACKEND_TENSOR_DESCRIPTOR, CUDNN_ATTR_TENSOR_DATA_TYPE, CUDNN_TYPE_DATA_TYPE, 1, 4},
    {CUDNN_BACKEND_TENSOR_DESCRIPTOR, CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, 8},
    {CUDNN_BACKEND_TENSOR_DESCRIPTOR, CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, 8},
    {CUDNN_BACKEND_TENSOR_DESCRIPTOR, CUDNN_ATTR_TENSOR_UNIQUE_ID, CUDNN_TYPE_INT64, 1, 8},
    {CUDNN_BACKEND_TENSOR_DESCRIPTOR, CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, CUDNN_TYPE_INT64, 1, 8},
    {CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR, CUDNN_ATTR_CONVOLUTION_COMP_TYPE, CUDNN_TYPE_DATA_TYPE, 1, 4},
    {CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR, CUDNN_ATTR_CONVOLUTION_CONV_MODE, CUDNN_TYPE_CONVOLUTION_MODE, 1, 4},
    {CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR, CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS, CUDNN_TYPE_INT64, 1, 8},
    {CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR, CUDNN_ATTR_CONVOLUTION_DILATIONS, CUDNN_TYPE_INT64, 2, 8},
    {CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR, CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES, CUDNN_TYPE_INT64, 2, 8},
    {CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR, CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS, CUDNN_TYPE_INT64, 2, 8},
    {CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR, CUDNN_ATTR_CONVOLUTION_POST_PADDINGS, CUDNN_TYPE_INT64, 2, 8},
    OPERATION(
        CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD, X, W, Y
    ),
    OPERATION(
        CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA, DX, W,
        DY
    ),
    OPERATION(
        CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER, X,
        DW, DY
    ),
    {CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, 8},
    // Of any of the three kinds.
    {CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR, CUDNN_ATTR_OPERATIONGRAPH_OPS, A_DESCRIPTOR, 1, 8},
    {CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, A_DESCRIPTOR, 1, 8,
     CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR},
    {CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, 4},
    {CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, 8},
    {CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, A_DESCRIPTOR, 1, 8,
     CUDNN_BACKEND_ENGINECFG_DESCRIPTOR},
    {CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, 3, 8},
    {CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, 3, 8},
    {CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR, CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, 8},
};

thread_local const char *last_error = "";
cudnnStatus_t refuse(cudnnStatus_t status, const char *why) {
    last_error = why;
    return status;
}

cudnnStatus_t finish_tensor(const Described &tensor) {
    auto sizes = tensor.get<int64_t>(CUDNN_ATTR_TENSOR_DIMENSIONS);
    auto stride = tensor.get<int64_t>(CUDNN_ATTR_TENSOR_STRIDES);
    for (int i = 0; i < 4; i++)
        if (sizes[i] <= 0) return refuse(CUDNN_STATUS_BAD_PARAM, "a dimension of nothing");
    int64_t c = sizes[1], h = sizes[2], w = sizes[3];
    const int64_t rows[4] = {c * h * w, h * w, w, 1}, pixels[4] = {c * h * w, 1, w * c, c};
    if (!std::equal(rows, rows + 4, stride) && !std::equal(pixels, pixels + 4, stride))
        return refuse(CUDNN_STATUS_BAD_PARAM, "a tensor with gaps, or of another order");
    auto alignment = *tensor.get<int64_t>(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT);
    bool power = alignment > 0 && (alignment & (alignment - 1)) == 0;
    auto bytes = int64_t(size(of(*tensor.get<cudnnDataType_t>(CUDNN_ATTR_TENSOR_DATA_TYPE))));
    if (!power || alignment < bytes) return refuse(CUDNN_STATUS_BAD_PARAM, "an alignment that there is not");
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t finish_convolution(const Described &convolution) {
    auto pair = [&](cudnnBackendAttributeName_t name) { return convolution.get<int64_t>(name); };
    const int64_t *before = pair(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS);
    const int64_t *after = pair(CUDNN_ATTR_CONVOLUTION_POST_PADDINGS);
    bool good = *pair(CUDNN_ATTR_CONVOLUTION_SPATIAL_DIMS) == 2;
    good = good && *convolution.get<cudnnDataType_t>(CUDNN_ATTR_CONVOLUTION_COMP_TYPE) == CUDNN_DATA_FLOAT;
    good = good && *convolution.get<cudnnConvolutionMode_t>(CUDNN_ATTR_CONVOLUTION_CONV_MODE) == CUDNN_CROSS_CORRELATION;
    for (int i = 0; i < 2; i++) {
        good = good && pair(CUDNN_ATTR_CONVOLUTION_DILATIONS)[i] == 1 && before[i] == after[i] && before[i] >= 0;
        good = good && pair(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES)[i] > 0;
    }
    return good ? CUDNN_STATUS_SUCCESS : refuse(CUDNN_STATUS_BAD_PARAM, "another convolution than there is here");
}

cudnnStatus_t finish_operation(Described &operation, Part part) {
    using Names = cudnnBackendAttributeName_t[6];
    static const Names names[] = {
        {CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W,
         CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
         CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_ALPHA, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_BETA},
        {CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W,
         CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
         CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_ALPHA, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_BETA},
        {CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW,
         CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
         CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_ALPHA, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_BETA},
    };
    const Names &of = names[int(part)];
    if (*operation.get<float>(of[4]) != 1 || *operation.get<float>(of[5]) != 0)
        return refuse(CUDNN_STATUS_BAD_PARAM, "other scales than 1 and 0");
    Convolved &c = operation.convolved;
    c.part = part;
    Layout *layouts[] = {&c.x, &c.w, &c.y};
    bool good = true;
    for (int i = 0; i < 3; i++) {
        const Described &tensor = operation.other(of[i]);
        layouts[i]->type = ::of(*tensor.get<cudnnDataType_t>(CUDNN_ATTR_TENSOR_DATA_TYPE));
        std::copy_n(tensor.get<int64_t>(CUDNN_ATTR_TENSOR_DIMENSIONS), 4, layouts[i]->size);
        std::copy_n(tensor.get<int64_t>(CUDNN_ATTR_TENSOR_STRIDES), 4, layouts[i]->stride);
        c.names[i] = *tensor.get<int64_t>(CUDNN_ATTR_TENSOR_UNIQUE_ID);
        c.alignment = *tensor.get<int64_t>(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT);
        good = good && layouts[i]->type == c.x.type;
    }
    const Described &convolution = operation.other(of[3]);
    std::copy_n(convolution.get<int64_t>(CUDNN_ATTR_CONVOLUTION_PRE_PADDINGS), 2, c.padding);
    std::copy_n(convolution.get<int64_t>(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES), 2, c.stride);
    good = good && c.names[0] != c.names[1] && c.names[1] != c.names[2] && c.names[2] != c.names[0];
    good = good && c.x.size[0] == c.y.size[0] && c.x.size[1] == c.w.size[1] && c.y.size[1] == c.w.size[0];
    for (int i = 0; i < 2; i++)
        good = good && c.y.size[2 + i] == (c.x.size[2 + i] + 2 * c.padding[i] - c.w.size[2 + i]) / c.stride[i] + 1;
    return good ? CUDNN_STATUS_SUCCESS : refuse(CUDNN_STATUS_BAD_PARAM, "tensors that do not fit");
}

std::vector<const Engine *> engines(const Described &heuristics) {
    const Convolved &c = heuristics.convolved;
    // As if channels had to come before pixels.
    static const bool rows_only = std::getenv("EMULATED_ROWS") != nullptr;
    std::vector<const Engine *> found;
    if (rows_only && c.x.last()) return found;
    auto add = [&](const auto &engines) { for (const Engine &engine : engines) found.push_back(&engine); };
    auto mode = *heuristics.get<cudnnBackendHeurMode_t>(CUDNN_ATTR_ENGINEHEUR_MODE);
    if (mode == CUDNN_HEUR_MODE_FALLBACK) add(last_engines);
    else if (mode != CUDNN_HEUR_MODE_A) wrong("heuristics of another mode");
    // NVIDIA's has the rest only for what is aligned to what its kernels load at once.
    else if (c.alignment >= 16) add(first_engines);
    return found;
}

cudnnStatus_t finish(Described &made) {
    switch (made.kind) {
    case CUDNN_BACKEND_TENSOR_DESCRIPTOR: return finish_tensor(made);
    case CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR: return finish_convolution(made);
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR: return finish_operation(made, Part::Answer);
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR: return finish_operation(made, Part::OfInput);
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR: return finish_operation(made, Part::OfWeight);
    case CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR:
        made.convolved = made.other(CUDNN_ATTR_OPERATIONGRAPH_OPS).convolved;
        return CUDNN_STATUS_SUCCESS;
    case CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR:
        made.convolved = made.other(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH).convolved;
        return CUDNN_STATUS_SUCCESS;
    case CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR: {
        const Described &config = made.other(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG);
        made.convolved = config.convolved;
        made.engine = config.engine;
        if (!config.engine->planned) return refuse(CUDNN_STATUS_NOT_SUPPORTED, "an engine without a plan");
        return CUDNN_STATUS_SUCCESS;
    }
    case CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR: return CUDNN_STATUS_SUCCESS;
    default: wrong("a descriptor that is not to be finished");
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
void cudnnGetLastErrorString(char *message, size_t size) { std::snprintf(message, size, "%s", last_error); }
size_t cudnnGetVersion() { return CUDNN_VERSION; }

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t kind, cudnnBackendDescriptor_t *made) {
    std::lock_guard lock(described);
    *made = *there.insert(new Described{kind}).first;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
    Described &gone = known(descriptor);
    std::lock_guard lock(described);
    there.erase(&gone);
    delete &gone;
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendSetAttribute(
    cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
    int64_t count, const void *values
) {
    Described &of = known(descriptor);
    if (of.finished) wrong("a finished descriptor is told more");
    for (const Told &told : all_told) {
        if (told.kind != of.kind || told.name != name) continue;
        if (told.type != type || told.count != count) wrong("an attribute of another type, or another number of them");
        auto bytes = static_cast<const char *>(values);
        if (type == A_DESCRIPTOR) {
            const Described &other = known(*static_cast<void *const *>(values));
            if (!other.finished) wrong("a descriptor that is not finished is told of");
            if (told.other != cudnnBackendDescriptorType_t{} && other.kind != told.other)
                wrong("a descriptor of another kind is told of");
        }
        of.told[name].assign(bytes, bytes + count * told.size);
        return CUDNN_STATUS_SUCCESS;
    }
    std::fprintf(stderr, "attribute %d of a descriptor of kind %d\n", int(name), int(of.kind));
    wrong("an attribute that is not emulated");
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t descriptor) {
    Described &of = known(descriptor);
    if (of.finished) wrong("a descriptor is finished twice");
    for (const Told &told : all_told) {
        if (told.kind != of.kind) continue;
        if (!of.told.count(told.name)) wrong("a descriptor is finished before it is told all");
        if (told.type == A_DESCRIPTOR) known(&of.other(told.name));
    }
    cudnnStatus_t status = finish(of);
    of.finished = status == CUDNN_STATUS_SUCCESS;
    return status;
}
cudnnStatus_t cudnnBackendGetAttribute(
    cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
    int64_t most, int64_t *count, void *values
) {
    Described &of = known(descriptor);
    if (!of.finished) wrong("a descriptor that is not finished is asked");
    auto asked = [&](cudnnBackendDescriptorType_t kind, cudnnBackendAttributeName_t known_name) {
        return of.kind == kind && name == known_name;
    };
    auto number = [&](int64_t value) {
        if (type != CUDNN_TYPE_INT64 || most != 1) wrong("an attribute is asked for that is one number");
        *static_cast<int64_t *>(values) = value;
        *count = 1;
        return CUDNN_STATUS_SUCCESS;
    };
    // Fills in descriptors that there are. NVIDIA's, asked how many there are, may say too many.
    auto fill = [&](cudnnBackendDescriptorType_t kind, const std::vector<const Engine *> &engines, int64_t said) {
        if (type != A_DESCRIPTOR) wrong("descriptors are asked for as something else");
        *count = most == 0 ? said : std::min(most, int64_t(engines.size()));
        for (int64_t i = 0; most > 0 && i < *count; i++) {
            Described &made = known(static_cast<void **>(values)[i]);
            if (made.kind != kind || made.finished) wrong("there is no room for a descriptor");
            made.finished = true;
            made.engine = engines[i];
            made.convolved = of.convolved;
        }
        return CUDNN_STATUS_SUCCESS;
    };
    if (asked(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, CUDNN_ATTR_ENGINEHEUR_RESULTS)) {
        auto found = engines(of);
        return fill(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, found, found.size() + 2);
    }
    if (asked(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, CUDNN_ATTR_ENGINECFG_ENGINE))
        return fill(CUDNN_BACKEND_ENGINE_DESCRIPTOR, {of.engine}, 1);
    if (asked(CUDNN_BACKEND_ENGINE_DESCRIPTOR, CUDNN_ATTR_ENGINE_GLOBAL_INDEX)) return number(of.engine->number);
    if (asked(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE))
        return number(of.engine->bytes);
    if (asked(CUDNN_BACKEND_ENGINE_DESCRIPTOR, CUDNN_ATTR_ENGINE_NUMERICAL_NOTE)) {
        if (type != CUDNN_TYPE_NUMERICAL_NOTE || most < CUDNN_NUMERICAL_NOTE_TYPE_COUNT) wrong("not all notes are asked for");
        *count = of.engine->notes.size();
        std::copy(of.engine->notes.begin(), of.engine->notes.end(), static_cast<cudnnBackendNumericalNote_t *>(values));
        return CUDNN_STATUS_SUCCESS;
    }
    std::fprintf(stderr, "attribute %d of a descriptor of kind %d\n", int(name), int(of.kind));
    wrong("an attribute that is not emulated");
}
cudnnStatus_t cudnnBackendExecute(
    cudnnHandle_t handle, cudnnBackendDescriptor_t plan_descriptor, cudnnBackendDescriptor_t pack_descriptor
) {
    const Described &plan = known(plan_descriptor), &pack = known(pack_descriptor);
    if (plan.kind != CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR || pack.kind != CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)
        wrong("something else than a plan is to be done");
    if (!plan.finished || !pack.finished) wrong("a plan is to be done that is not finished");
    if (*plan.get<cudnnHandle_t>(CUDNN_ATTR_EXECUTION_PLAN_HANDLE) != handle) wrong("another handle's plan is to be done");
    const Convolved &c = plan.convolved;
    const Engine &engine = *plan.engine;
    if (!(c.x.type == Type::F32 ? engine.for_f32 : engine.for_others)) wrong("a plan is to be done that is not for us");
    void *at[3] = {};
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++)
            if (pack.get<int64_t>(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS)[j] == c.names[i])
                at[i] = pack.get<void *>(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS)[j];
    for (void *address : at)
        if (!address || reinterpret_cast<uintptr_t>(address) % c.alignment) wrong("an operand is not where it was to be");
    void *memory = *pack.get<void *>(CUDNN_ATTR_VARIANT_PACK_WORKSPACE);
    if (engine.bytes && !memory) wrong("a plan has no workspace");
    static const char *const names[] = {"cuDNN convolutions", "cuDNN gradients of inputs", "cuDNN gradients of weights"};
    emulated_count(names[int(c.part)]);
    emulated_submit(handle->stream, [c, x = at[0], w = at[1], y = at[2], memory, bytes = engine.bytes] {
        if (bytes) std::memset(memory, 0xff, bytes);
        convolve(c, x, w, y);
    });
    return CUDNN_STATUS_SUCCESS;
}
}
