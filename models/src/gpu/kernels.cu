// What lies between convolutions, for NVIDIA's run-time compiler: no headers. Sums are taken in f32. Nothing is atomic
// and no order follows from the batch's size, so the same row gives the same bits in any batch.

#define THREADS 256

struct F32 {
    typedef float Stored;
    static __device__ float load(Stored value) { return value; }
    static __device__ Stored store(float value) { return value; }
};

struct BF16 {
    typedef unsigned short Stored;
    static __device__ float load(Stored value) { return __uint_as_float((unsigned)value << 16); }
    // To the nearest, ties to even; NaN stays NaN.
    static __device__ Stored store(float value) {
        unsigned bits = __float_as_uint(value);
        if (value != value) return 0x7fff;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
};

struct F16 {
    typedef unsigned short Stored;
    static __device__ float load(Stored value) {
        float wide;
        asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
        return wide;
    }
    static __device__ Stored store(float value) {
        Stored narrow;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(value));
        return narrow;
    }
};

// The sum of every thread's value, the same to all of them.
static __device__ float sum(float value) {
    __shared__ float sums[THREADS];
    __syncthreads();
    sums[threadIdx.x] = value;
    __syncthreads();
    for (unsigned half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];
}

// Group norm (Wu & He 2018) of x + offset, then scale-shift, then SiLU. One block per sample and group.
//
// x and y [samples, channels, pixels]; offset null, or [samples, channels]; weight and bias [channels]; modulation
// null, or [samples, 2 * channels]: scale, then shift. What mean and deviation are taken of is read three times.
template <typename T>
static __device__ void group_norm(
    const typename T::Stored *x, typename T::Stored *y, const float *offset, const float *weight, const float *bias,
    const float *modulation, int channels, int groups, int pixels, float eps, int silu
) {
    int sample = blockIdx.x / groups, first = blockIdx.x % groups * (channels / groups);
    int size = channels / groups * pixels;
    x += (long long)blockIdx.x * size;
    y += (long long)blockIdx.x * size;
    if (offset) offset += (long long)sample * channels + first;
    auto value = [=](int i) { return T::load(x[i]) + (offset ? offset[i / pixels] : 0); };

    float total = 0;
    for (int i = threadIdx.x; i < size; i += THREADS) total += value(i);
    float mean = sum(total) / size;
    total = 0;
    for (int i = threadIdx.x; i < size; i += THREADS) {
        float centred = value(i) - mean;
        total += centred * centred;
    }
    float deviation = sqrtf(sum(total) / size + eps);

    for (int i = threadIdx.x; i < size; i += THREADS) {
        int channel = first + i / pixels;
        float scale = weight[channel] / deviation, shift = bias[channel];
        if (modulation) {
            const float *own = modulation + (long long)sample * 2 * channels + channel;
            float factor = 1 + own[0];
            scale *= factor;
            shift = shift * factor + own[channels];
        }
        float normed = (value(i) - mean) * scale + shift;
        if (silu) normed = normed / (1 + expf(-normed));
        y[i] = T::store(normed);
    }
}

// a + b + bias. a, b and y [samples, channels, pixels], of `size` values in all; bias [channels].
template <typename T>
static __device__ void biased_sum(
    const typename T::Stored *a, const typename T::Stored *b, const typename T::Stored *bias, typename T::Stored *y,
    int channels, int pixels, long long size
) {
    long long step = (long long)gridDim.x * THREADS;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < size; i += step)
        y[i] = T::store(T::load(a[i]) + T::load(b[i]) + T::load(bias[i / pixels % channels]));
}

#define KERNELS(NAME, T)                                                                                             \
    extern "C" __global__ void group_norm_##NAME(                                                                    \
        const T::Stored *x, T::Stored *y, const float *offset, const float *weight, const float *bias,               \
        const float *modulation, int channels, int groups, int pixels, float eps, int silu                           \
    ) {                                                                                                              \
        group_norm<T>(x, y, offset, weight, bias, modulation, channels, groups, pixels, eps, silu);                  \
    }                                                                                                                \
    extern "C" __global__ void biased_sum_##NAME(                                                                    \
        const T::Stored *a, const T::Stored *b, const T::Stored *bias, T::Stored *y, int channels, int pixels,       \
        long long size                                                                                               \
    ) {                                                                                                              \
        biased_sum<T>(a, b, bias, y, channels, pixels, size);                                                        \
    }

KERNELS(f32, F32)
KERNELS(bf16, BF16)
KERNELS(f16, F16)
