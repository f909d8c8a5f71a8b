// Group norm (Wu & He 2018), scale-shift and SiLU in one pass, for NVIDIA's run-time compiler: no headers.
//
// One block per sample and group, THREADS threads each. Sums are taken in f32, mean first, each in an order that
// follows from the group's size alone; nothing is atomic, so the same row gives the same bits in any batch.

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

// x and y [samples, channels, pixels]; weight and bias [channels]; modulation null, or [samples, 2 * channels]:
// scale, then shift.
template <typename T>
static __device__ void group_norm(
    const typename T::Stored *x, typename T::Stored *y, const float *weight, const float *bias,
    const float *modulation, int channels, int groups, int pixels, float eps, int silu
) {
    int sample = blockIdx.x / groups, first = blockIdx.x % groups * (channels / groups);
    int size = channels / groups * pixels;
    x += (long long)blockIdx.x * size;
    y += (long long)blockIdx.x * size;

    float total = 0;
    for (int i = threadIdx.x; i < size; i += THREADS) total += T::load(x[i]);
    float mean = sum(total) / size;
    total = 0;
    for (int i = threadIdx.x; i < size; i += THREADS) {
        float centred = T::load(x[i]) - mean;
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
        float value = (T::load(x[i]) - mean) * scale + shift;
        if (silu) value = value / (1 + expf(-value));
        y[i] = T::store(value);
    }
}

#define KERNEL(NAME, T)                                                                                              \
    extern "C" __global__ void NAME(                                                                                 \
        const T::Stored *x, T::Stored *y, const float *weight, const float *bias, const float *modulation,           \
        int channels, int groups, int pixels, float eps, int silu                                                    \
    ) {                                                                                                              \
        group_norm<T>(x, y, weight, bias, modulation, channels, groups, pixels, eps, silu);                          \
    }

KERNEL(group_norm_f32, F32)
KERNEL(group_norm_bf16, BF16)
KERNEL(group_norm_f16, F16)
