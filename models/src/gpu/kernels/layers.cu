// What lies between convolutions and products.

// The functions between layers, numbered as in `layers.rs`.
static __device__ float activate(int function, float x) {
    switch (function) {
    case 1: return x / (1 + expf(-x));
    // ln(1 + eˣ) = max(x, 0) + ln(1 + e^−|x|), which cannot overflow.
    case 2: return x * tanhf(fmaxf(x, 0) + log1pf(expf(-fabsf(x))));
    case 3: return x * 0.5f * (1 + erff(x * 0.70710678f));
    case 4: return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case 5: return fmaxf(x, 0);
    default: return x;
    }
}

// Bytes of a group that a block keeps at hand.
#define KEPT 40960

// Group norm (Wu & He 2018) of x, or of x and `more` side by side, then scale-shift, then a function. One block per
// sample and group; N channels at once, which must divide those of x and of a group.
//
// x is normed as (x + residual + owed + offset) * factor, rounded; where it is to `keep` that, x is that afterwards. x
// has `own` of the channels and `more` the others. residual is like x, or null; owed [own], or null; offset and
// modulation null, or so many numbers from one sample to the next: [own], and scale [channels], then shift; weight and
// bias [channels]. What does not fit `at_hand` is read three times.
template <typename T, int N>
static __device__ void group_norm(
    typename T::Stored *x, const typename T::Stored *residual, const float *owed, const float *offset, int of_offset,
    float factor, int keep, const typename T::Stored *more, int own, const float *modulation, int told,
    const float *weight, const float *bias, typename T::Stored *y, int channels, int groups, int pixels, float eps,
    int function, void *at_hand
) {
    typedef Pack<T, N> Numbers;
    int sample = blockIdx.x / groups, width = channels / groups / N, first = blockIdx.x % groups * width;
    int size = width * pixels, others = channels - own;
    x += (long long)sample * pixels * own;
    if (residual) residual += (long long)sample * pixels * own;
    if (more) more += (long long)sample * pixels * others;
    y += (long long)sample * pixels * channels;
    if (offset) offset += (long long)sample * of_offset;
    if (modulation) modulation += (long long)sample * told;
    Numbers *kept = reinterpret_cast<Numbers *>(at_hand);
    bool fits = size <= KEPT / (int)sizeof(Numbers), added = residual || owed || offset || factor != 1;

    auto raw = [=](int pixel, int channel) {
        const typename T::Stored *from =
            channel < own ? x + (long long)pixel * own + channel : more + (long long)pixel * others + channel - own;
        return *reinterpret_cast<const Numbers *>(from);
    };
    auto whole = [=](int pixel, int channel) {
        Numbers numbers = raw(pixel, channel), other;
        if (!added || channel >= own) return numbers;
        if (residual) other = *reinterpret_cast<const Numbers *>(residual + (long long)pixel * own + channel);
        for (int j = 0; j < N; j++) {
            float value = T::load(numbers.values[j]);
            if (residual) value += T::load(other.values[j]);
            if (owed) value += owed[channel + j];
            if (offset) value += offset[channel + j];
            numbers.values[j] = T::store(value * factor);
        }
        return numbers;
    };
    // The thread that wrote numbers is the one that sees them again.
    auto again = [=](int i, int pixel, int channel) {
        return fits ? kept[i] : keep ? raw(pixel, channel) : whole(pixel, channel);
    };

    float total = 0;
    each(size, width, [&](int i, int pixel, int place) {
        int channel = (first + place) * N;
        Numbers numbers = whole(pixel, channel);
        if (fits) kept[i] = numbers;
        if (keep && channel < own) *reinterpret_cast<Numbers *>(x + (long long)pixel * own + channel) = numbers;
        for (int j = 0; j < N; j++) total += T::load(numbers.values[j]);
    });
    float count = (float)size * N, mean = sum(total) / count;
    total = 0;
    each(size, width, [&](int i, int pixel, int place) {
        Numbers numbers = again(i, pixel, (first + place) * N);
        for (int j = 0; j < N; j++) {
            float centred = T::load(numbers.values[j]) - mean;
            total += centred * centred;
        }
    });
    float deviation = sqrtf(sum(total) / count + eps);

    each(size, width, [&](int i, int pixel, int place) {
        int from = (first + place) * N;
        Numbers numbers = again(i, pixel, from);
        for (int j = 0; j < N; j++) {
            int channel = from + j;
            float scale = weight[channel] / deviation, shift = bias[channel];
            if (modulation) {
                float factor = 1 + modulation[channel];
                scale *= factor;
                shift = shift * factor + modulation[channels + channel];
            }
            float normed = (T::load(numbers.values[j]) - mean) * scale + shift;
            numbers.values[j] = T::store(activate(function, normed));
        }
        *reinterpret_cast<Numbers *>(y + (long long)pixel * channels + from) = numbers;
    });
}

// y = function((x + residual + bias + offset) * factor), which may take x's place; N numbers at once. Residual, bias
// [channels] and offset, whose samples lie `told` apart, may be null.
template <typename T, int N>
static __device__ void finish(
    const typename T::Stored *x, const typename T::Stored *residual, const float *bias, const float *offset, int told,
    float factor, int function, typename T::Stored *y, int channels, int pixels, int size
) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size / N; i += step) {
        auto pack = reinterpret_cast<const Pack<T, N> *>(x)[i];
        Pack<T, N> other;
        if (residual) other = reinterpret_cast<const Pack<T, N> *>(residual)[i];
        int channel = i * N % channels, sample = i * N / channels / pixels;
        for (int j = 0; j < N; j++) {
            float value = T::load(pack.values[j]);
            if (residual) value += T::load(other.values[j]);
            if (bias) value += bias[channel + j];
            if (offset) value += offset[(long long)sample * told + channel + j];
            pack.values[j] = T::store(activate(function, value * factor));
        }
        reinterpret_cast<Pack<T, N> *>(y)[i] = pack;
    }
}

// A map of x [samples, channels, pixels], whose samples lie `apart`, times `factor`, plus `shift`.
template <typename T>
static __device__ void imported(
    const typename T::Stored *x, int apart, typename T::Stored *y, float factor, float shift, int channels, int pixels,
    int size
) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) {
        int channel = i % channels, pixel = i / channels % pixels, sample = i / channels / pixels;
        float value = T::load(x[(long long)sample * apart + channel * pixels + pixel]);
        y[i] = T::store(value * factor + shift);
    }
}

// y [samples, channels, pixels], of a map x, to which bias [channels] is added, or null; divided by a number of each
// sample, or null.
template <typename T>
static __device__ void exported(
    const typename T::Stored *x, const float *bias, const float *divisor, typename T::Stored *y, int channels,
    int pixels, int size
) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) {
        int pixel = i % pixels, channel = i / pixels % channels, sample = i / pixels / channels;
        float value = T::load(x[((long long)sample * pixels + pixel) * channels + channel]);
        if (bias) value += bias[channel];
        y[i] = T::store(divisor ? value / divisor[sample] : value);
    }
}

// Sines and cosines of a number of each sample, or of 2π times its logarithm, times `half` frequencies; what is left
// of the `width` of a sample is 0.
template <typename T>
static __device__ void waves(
    const float *numbers, const float *frequencies, typename T::Stored *y, int half, int width, int cosines_first,
    int logarithm, int size
) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) {
        int place = i % width, sample = i / width;
        if (place >= 2 * half) {
            y[i] = T::store(0);
            continue;
        }
        float number = numbers[sample], frequency = frequencies[place % half];
        float phase = logarithm ? logf(number) * frequency * 2 * 3.14159265f : number * frequency;
        y[i] = T::store((place < half) == (cosines_first != 0) ? cosf(phase) : sinf(phase));
    }
}

// Each sample's row of a table of so many rows, which either labels or numbers tell; NaN where there is no such row.
template <typename T>
static __device__ void rows_of(
    const typename T::Stored *table, const unsigned *labels, const float *numbers, typename T::Stored *y, int rows,
    int channels, int size
) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) {
        int sample = i / channels;
        float number = labels ? (float)labels[sample] : numbers[sample];
        bool there = number >= 0 && number < rows && number == floorf(number);
        y[i] = there ? table[(long long)number * channels + i % channels] : T::store(__uint_as_float(0x7fc00000));
    }
}

// Each pixel as `times` by `times`, and zeros to the right and below of what x has; y is of `size` values.
template <typename T, int N>
static __device__ void enlarge(
    const typename T::Stored *x, typename T::Stored *y, int height, int width, int times, int tall, int wide, int channels,
    int size
) {
    int step = gridDim.x * THREADS, packs = channels / N;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size / N; i += step) {
        int column = i / packs % wide / times, row = i / packs / wide % tall / times, sample = i / packs / wide / tall;
        Pack<T, N> pack = {};
        if (row < height && column < width) {
            long long pixel = ((long long)sample * height + row) * width + column;
            pack = reinterpret_cast<const Pack<T, N> *>(x)[pixel * packs + i % packs];
        }
        reinterpret_cast<Pack<T, N> *>(y)[i] = pack;
    }
}

// The mean of each four pixels; y is of `size` values and `wide` pixels wide.
template <typename T>
static __device__ void halve(const typename T::Stored *x, typename T::Stored *y, int wide, int channels, int size) {
    int step = gridDim.x * THREADS, row = 2 * wide * channels;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) {
        int channel = i % channels, column = i / channels % wide, above = i / channels / wide;
        const typename T::Stored *from = x + (long long)above * 2 * row + column * 2 * channels + channel;
        float total = T::load(from[0]) + T::load(from[channels]) + T::load(from[row]) + T::load(from[row + channels]);
        y[i] = T::store(total / 4);
    }
}

// Layer norm (Ba et al. 2016) of every token, times one plus scale, plus shift, whose samples lie `told` apart. One block
// per token.
template <typename T>
static __device__ void modulate(
    const typename T::Stored *x, const typename T::Stored *scale, const typename T::Stored *shift, int told,
    typename T::Stored *y, int tokens, int channels, float eps
) {
    x += (long long)blockIdx.x * channels;
    y += (long long)blockIdx.x * channels;
    scale += (long long)(blockIdx.x / tokens) * told;
    shift += (long long)(blockIdx.x / tokens) * told;
    float total = 0;
    for (int i = threadIdx.x; i < channels; i += THREADS) total += T::load(x[i]);
    float mean = sum(total) / channels;
    total = 0;
    for (int i = threadIdx.x; i < channels; i += THREADS) {
        float centred = T::load(x[i]) - mean;
        total += centred * centred;
    }
    float deviation = sqrtf(sum(total) / channels + eps);
    for (int i = threadIdx.x; i < channels; i += THREADS)
        y[i] = T::store((T::load(x[i]) - mean) / deviation * (1 + T::load(scale[i])) + T::load(shift[i]));
}

// y = residual + gate * (x + bias), with bias [channels], or null; gate's samples lie `told` apart.
template <typename T>
static __device__ void gate(
    const typename T::Stored *x, const float *bias, const typename T::Stored *residual, const typename T::Stored *gate,
    int told, typename T::Stored *y, int tokens, int channels, int size
) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) {
        int sample = i / channels / tokens, channel = i % channels;
        float value = T::load(x[i]) + (bias ? bias[channel] : 0);
        y[i] = T::store(T::load(residual[i]) + T::load(gate[(long long)sample * told + channel]) * value);
    }
}

// Softmax over rows of f32 scores; one warp per row.
template <typename T>
static __device__ void softmax(const float *scores, typename T::Stored *y, int rows, int length) {
    int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    // Whole warps leave, so that none is waited for.
    if (row >= rows) return;
    scores += (long long)row * length;
    y += (long long)row * length;
    float most = scores[0], total = 0;
    for (int i = lane; i < length; i += 32) most = fmaxf(most, scores[i]);
    for (int other = 16; other > 0; other /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, other));
    for (int i = lane; i < length; i += 32) total += expf(scores[i] - most);
    for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(0xffffffff, total, other);
    for (int i = lane; i < length; i += 32) y[i] = T::store(expf(scores[i] - most) / total);
}

#define KERNELS(NAME, T)                                                                                             \
    extern "C" __global__ void group_norm_##NAME(                                                                    \
        T::Stored *x, const T::Stored *residual, const float *owed, const float *offset, int of_offset,              \
        float factor, int keep, const T::Stored *more, int own, const float *modulation, int told,                   \
        const float *weight, const float *bias, T::Stored *y, int channels, int groups, int pixels, float eps,       \
        int function                                                                                                 \
    ) {                                                                                                              \
        __shared__ float4 kept[KEPT / 16];                                                                           \
        if (own % 4 == 0 && channels / groups % 4 == 0)                                                              \
            group_norm<T, 4>(                                                                                        \
                x, residual, owed, offset, of_offset, factor, keep, more, own, modulation, told, weight, bias, y,    \
                channels, groups, pixels, eps, function, kept                                                        \
            );                                                                                                       \
        else                                                                                                         \
            group_norm<T, 1>(                                                                                        \
                x, residual, owed, offset, of_offset, factor, keep, more, own, modulation, told, weight, bias, y,    \
                channels, groups, pixels, eps, function, kept                                                        \
            );                                                                                                       \
    }                                                                                                                \
    extern "C" __global__ void finish_##NAME(                                                                        \
        const T::Stored *x, const T::Stored *residual, const float *bias, const float *offset, int told,             \
        float factor, int function, T::Stored *y, int channels, int pixels, int size                                 \
    ) {                                                                                                              \
        if (channels % 8 == 0)                                                                                       \
            finish<T, 8>(x, residual, bias, offset, told, factor, function, y, channels, pixels, size);              \
        else                                                                                                         \
            finish<T, 1>(x, residual, bias, offset, told, factor, function, y, channels, pixels, size);              \
    }                                                                                                                \
    extern "C" __global__ void imported_##NAME(                                                                      \
        const T::Stored *x, int apart, T::Stored *y, float factor, float shift, int channels, int pixels, int size   \
    ) {                                                                                                              \
        imported<T>(x, apart, y, factor, shift, channels, pixels, size);                                             \
    }                                                                                                                \
    extern "C" __global__ void exported_##NAME(                                                                      \
        const T::Stored *x, const float *bias, const float *divisor, T::Stored *y, int channels, int pixels, int size\
    ) {                                                                                                              \
        exported<T>(x, bias, divisor, y, channels, pixels, size);                                                    \
    }                                                                                                                \
    extern "C" __global__ void waves_##NAME(                                                                         \
        const float *numbers, const float *frequencies, T::Stored *y, int half, int width, int cosines_first,        \
        int logarithm, int size                                                                                      \
    ) {                                                                                                              \
        waves<T>(numbers, frequencies, y, half, width, cosines_first, logarithm, size);                              \
    }                                                                                                                \
    extern "C" __global__ void rows_of_##NAME(                                                                       \
        const T::Stored *table, const unsigned *labels, const float *numbers, T::Stored *y, int rows, int channels,  \
        int size                                                                                                     \
    ) {                                                                                                              \
        rows_of<T>(table, labels, numbers, y, rows, channels, size);                                                 \
    }                                                                                                                \
    extern "C" __global__ void enlarge_##NAME(                                                                       \
        const T::Stored *x, T::Stored *y, int height, int width, int times, int tall, int wide, int channels,        \
        int size                                                                                                     \
    ) {                                                                                                              \
        if (channels % 8 == 0) enlarge<T, 8>(x, y, height, width, times, tall, wide, channels, size);                \
        else enlarge<T, 1>(x, y, height, width, times, tall, wide, channels, size);                                  \
    }                                                                                                                \
    extern "C" __global__ void halve_##NAME(                                                                         \
        const T::Stored *x, T::Stored *y, int wide, int channels, int size                                           \
    ) {                                                                                                              \
        halve<T>(x, y, wide, channels, size);                                                                        \
    }                                                                                                                \
    extern "C" __global__ void modulate_##NAME(                                                                      \
        const T::Stored *x, const T::Stored *scale, const T::Stored *shift, int told, T::Stored *y, int tokens,      \
        int channels, float eps                                                                                      \
    ) {                                                                                                              \
        modulate<T>(x, scale, shift, told, y, tokens, channels, eps);                                                \
    }                                                                                                                \
    extern "C" __global__ void gate_##NAME(                                                                          \
        const T::Stored *x, const float *bias, const T::Stored *residual, const T::Stored *factor, int told,         \
        T::Stored *y, int tokens, int channels, int size                                                             \
    ) {                                                                                                              \
        gate<T>(x, bias, residual, factor, told, y, tokens, channels, size);                                         \
    }                                                                                                                \
    extern "C" __global__ void softmax_of_rows_##NAME(const float *scores, T::Stored *y, int rows, int length) {     \
        softmax<T>(scores, y, rows, length);                                                                         \
    }

KERNELS(f32, F32)
KERNELS(bf16, BF16)
KERNELS(f16, F16)
