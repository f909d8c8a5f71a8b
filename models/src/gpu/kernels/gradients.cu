// The gradients of what lies between convolutions and products. Where it is to `add`, a gradient is added to what is
// there.

// The derivatives of the functions between layers.
static __device__ float slope(int function, float x) {
    float sigmoid = 1 / (1 + expf(-x));
    switch (function) {
    case 1: return sigmoid * (1 + x * (1 - sigmoid));
    case 2: {
        float inside = tanhf(fmaxf(x, 0) + log1pf(expf(-fabsf(x))));
        return inside + x * sigmoid * (1 - inside * inside);
    }
    case 3: return 0.5f * (1 + erff(x * 0.70710678f)) + x * 0.39894228f * expf(-0.5f * x * x);
    case 4: {
        float inside = tanhf(0.79788456f * (x + 0.044715f * x * x * x));
        return 0.5f * (1 + inside) + 0.5f * x * (1 - inside * inside) * 0.79788456f * (1 + 0.134145f * x * x);
    }
    case 5: return x > 0;
    default: return 1;
    }
}

template <typename T> static __device__ typename T::Stored added(int add, typename T::Stored there, float value) {
    return T::store(add ? T::load(there) + value : value);
}

// The sum over the lanes of every column, the same to all of a column's threads; a thread has lane
// `threadIdx.x / width` of column `threadIdx.x % width`, and those past the last lane nothing.
static __device__ float sum_of_lanes(float value, int width) {
    __shared__ float values[THREADS];
    int lanes = THREADS / width, column = threadIdx.x % width;
    __syncthreads();
    values[threadIdx.x] = value;
    __syncthreads();
    float total = 0;
    for (int lane = 0; lane < lanes; lane++) total += values[lane * width + column];
    return total;
}

// Of y = function(normed(x) * scale + shift), as `group_norm` has it, the gradients of x and `more`, and each sample's
// shares [samples, 2, channels] of those of scale and shift. One block per sample and group.
template <typename T>
static __device__ void norm_gradient(
    const typename T::Stored *x, const typename T::Stored *more, int own, const float *modulation, int told,
    const float *weight, const float *bias, const typename T::Stored *of_y, typename T::Stored *of_x, int add_to_x,
    typename T::Stored *of_more, int add_to_more, float *shares, int channels, int groups, int pixels, float eps,
    int function
) {
    int sample = blockIdx.x / groups, width = channels / groups, first = blockIdx.x % groups * width;
    int size = width * pixels, others = channels - own;
    x += (long long)sample * pixels * own;
    of_x += (long long)sample * pixels * own;
    of_y += (long long)sample * pixels * channels;
    if (more) {
        more += (long long)sample * pixels * others;
        of_more += (long long)sample * pixels * others;
    }
    if (modulation) modulation += (long long)sample * told;
    shares += (long long)sample * 2 * channels;

    auto value = [=](int pixel, int channel) {
        return channel < own ? T::load(x[(long long)pixel * own + channel])
                             : T::load(more[(long long)pixel * others + channel - own]);
    };
    float total = 0;
    each(size, width, [&](int, int pixel, int place) { total += value(pixel, first + place); });
    float mean = sum(total) / size;
    total = 0;
    each(size, width, [&](int, int pixel, int place) {
        float centred = value(pixel, first + place) - mean;
        total += centred * centred;
    });
    float deviation = sqrtf(sum(total) / size + eps);

    auto scale = [=](int channel) { return weight[channel] * (modulation ? 1 + modulation[channel] : 1); };
    auto shift = [=](int channel) {
        return modulation ? bias[channel] * (1 + modulation[channel]) + modulation[channels + channel] : bias[channel];
    };
    // The gradient of what the function sees.
    auto inside = [=](int pixel, int channel, float normed) {
        return T::load(of_y[(long long)pixel * channels + channel]) *
               slope(function, normed * scale(channel) + shift(channel));
    };

    // Sums over the group, of the gradient of what is normed, and of that times what is normed.
    float plain = 0, along = 0;
    for (int start = 0; start < width; start += THREADS) {
        int part = min(width - start, THREADS), lanes = THREADS / part, lane = threadIdx.x / part;
        int channel = first + start + threadIdx.x % part;
        float of_scale = 0, of_shift = 0;
        if (lane < lanes)
            for (int pixel = lane; pixel < pixels; pixel += lanes) {
                float normed = (value(pixel, channel) - mean) / deviation, gradient = inside(pixel, channel, normed);
                of_shift += gradient;
                of_scale += gradient * normed;
            }
        of_scale = sum_of_lanes(of_scale, part);
        of_shift = sum_of_lanes(of_shift, part);
        bool speaks = threadIdx.x < part;
        if (speaks) {
            shares[channel] = of_scale;
            shares[channels + channel] = of_shift;
        }
        plain += sum(speaks ? of_shift * scale(channel) : 0);
        along += sum(speaks ? of_scale * scale(channel) : 0);
    }
    plain /= size;
    along /= size;

    each(size, width, [&](int, int pixel, int place) {
        int channel = first + place;
        float normed = (value(pixel, channel) - mean) / deviation;
        float gradient = inside(pixel, channel, normed) * scale(channel);
        gradient = (gradient - plain - normed * along) / deviation;
        bool is_own = channel < own;
        long long at = is_own ? (long long)pixel * own + channel : (long long)pixel * others + channel - own;
        typename T::Stored *to = is_own ? of_x + at : of_more + at;
        *to = added<T>(is_own ? add_to_x : add_to_more, *to, gradient);
    });
}

// Of weight and bias, and of each sample's modulation, of the shares of all samples; one thread per channel.
extern "C" __global__ void norm_shares_f32(
    const float *shares, const float *weight, const float *bias, const float *modulation, float *of_modulation,
    int told, float *of_weight, float *of_bias, int channels, int samples
) {
    int channel = blockIdx.x * THREADS + threadIdx.x;
    if (channel >= channels) return;
    float total = 0, shifts = 0;
    for (int sample = 0; sample < samples; sample++) {
        const float *from = shares + (long long)sample * 2 * channels + channel;
        float of_scale = from[0], of_shift = from[channels], factor = 1;
        if (modulation) {
            long long at = (long long)sample * told + channel;
            factor += modulation[at];
            of_modulation[at] = of_scale * weight[channel] + of_shift * bias[channel];
            of_modulation[at + channels] = of_shift;
        }
        total += of_scale * factor;
        shifts += of_shift * factor;
    }
    of_weight[channel] = total;
    of_bias[channel] = shifts;
}

// The sums over all pixels of each sample, [samples, channels] with rows `apart`. One block per sample and 32 channels.
template <typename T>
static __device__ void sums(const typename T::Stored *x, float *y, int apart, int channels, int pixels) {
    int parts = (channels + 31) / 32, sample = blockIdx.x / parts;
    int channel = blockIdx.x % parts * 32 + threadIdx.x % 32;
    float total = 0;
    if (channel < channels)
        for (int pixel = threadIdx.x / 32; pixel < pixels; pixel += THREADS / 32)
            total += T::load(x[((long long)sample * pixels + pixel) * channels + channel]);
    total = sum_of_lanes(total, 32);
    if (threadIdx.x < 32 && channel < channels) y[(long long)sample * apart + channel] = total;
}

// The sums of columns of x [samples, columns], whose rows lie `apart`; one thread per column.
extern "C" __global__ void totals_f32(const float *x, int apart, float *y, int columns, int samples) {
    int column = blockIdx.x * THREADS + threadIdx.x;
    if (column >= columns) return;
    float total = 0;
    for (int sample = 0; sample < samples; sample++) total += x[(long long)sample * apart + column];
    y[column] = total;
}

// Of `enlarge`: each pixel's gradient is that of its copies; y is of `size` values.
template <typename T>
static __device__ void enlarge_gradient(
    const typename T::Stored *of_y, typename T::Stored *of_x, int add, int height, int width, int times, int tall,
    int wide, int channels, int size
) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) {
        int channel = i % channels, column = i / channels % width, row = i / channels / width % height;
        int sample = i / channels / width / height;
        float total = 0;
        for (int down = row * times; down < (row + 1) * times; down++)
            for (int right = column * times; right < (column + 1) * times; right++)
                total += T::load(of_y[(((long long)sample * tall + down) * wide + right) * channels + channel]);
        of_x[i] = added<T>(add, of_x[i], total);
    }
}

// Of `halve`: a quarter for each of four; x is of `size` values and `wide` pixels wide.
template <typename T>
static __device__ void halve_gradient(
    const typename T::Stored *of_y, typename T::Stored *of_x, int add, int wide, int channels, int size
) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) {
        // Rows of all samples follow one another, in twos.
        int channel = i % channels, column = i / channels % wide, above = i / channels / wide;
        float half = T::load(of_y[((long long)(above / 2) * (wide / 2) + column / 2) * channels + channel]);
        of_x[i] = added<T>(add, of_x[i], half / 4);
    }
}

// Of softmax over rows, given what it gave; one warp per row.
template <typename T>
static __device__ void softmax_gradient(
    const typename T::Stored *y, const float *of_y, typename T::Stored *of_scores, int rows, int length
) {
    int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    // Whole warps leave, so that none is waited for.
    if (row >= rows) return;
    y += (long long)row * length;
    of_y += (long long)row * length;
    of_scores += (long long)row * length;
    float along = 0;
    for (int i = lane; i < length; i += 32) along += T::load(y[i]) * of_y[i];
    for (int other = 16; other > 0; other /= 2) along += __shfl_xor_sync(0xffffffff, along, other);
    for (int i = lane; i < length; i += 32) of_scores[i] = T::store(T::load(y[i]) * (of_y[i] - along));
}

// Weights' gradients, [outputs, taps, inputs], as f32 [outputs, inputs, taps].
template <typename T>
static __device__ void weights_back(const typename T::Stored *x, float *y, int inputs, int taps, int size) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) {
        int tap = i % taps, input = i / taps % inputs, output = i / taps / inputs;
        y[i] = T::load(x[((long long)output * taps + tap) * inputs + input]);
    }
}

#define GRADIENTS(NAME, T)                                                                                           \
    extern "C" __global__ void norm_gradient_##NAME(                                                                 \
        const T::Stored *x, const T::Stored *more, int own, const float *modulation, int told, const float *weight,  \
        const float *bias, const T::Stored *of_y, T::Stored *of_x, int add_to_x, T::Stored *of_more,                 \
        int add_to_more, float *shares, int channels, int groups, int pixels, float eps, int function                \
    ) {                                                                                                              \
        norm_gradient<T>(                                                                                            \
            x, more, own, modulation, told, weight, bias, of_y, of_x, add_to_x, of_more, add_to_more, shares,        \
            channels, groups, pixels, eps, function                                                                  \
        );                                                                                                           \
    }                                                                                                                \
    extern "C" __global__ void sums_##NAME(const T::Stored *x, float *y, int apart, int channels, int pixels) {      \
        sums<T>(x, y, apart, channels, pixels);                                                                      \
    }                                                                                                                \
    extern "C" __global__ void enlarge_gradient_##NAME(                                                              \
        const T::Stored *of_y, T::Stored *of_x, int add, int height, int width, int times, int tall, int wide,       \
        int channels, int size                                                                                       \
    ) {                                                                                                              \
        enlarge_gradient<T>(of_y, of_x, add, height, width, times, tall, wide, channels, size);                      \
    }                                                                                                                \
    extern "C" __global__ void halve_gradient_##NAME(                                                                \
        const T::Stored *of_y, T::Stored *of_x, int add, int wide, int channels, int size                            \
    ) {                                                                                                              \
        halve_gradient<T>(of_y, of_x, add, wide, channels, size);                                                    \
    }                                                                                                                \
    extern "C" __global__ void softmax_gradient_##NAME(                                                              \
        const T::Stored *y, const float *of_y, T::Stored *of_scores, int rows, int length                            \
    ) {                                                                                                              \
        softmax_gradient<T>(y, of_y, of_scores, rows, length);                                                       \
    }                                                                                                                \
    extern "C" __global__ void weights_back_##NAME(const T::Stored *x, float *y, int inputs, int taps, int size) {   \
        weights_back<T>(x, y, inputs, taps, size);                                                                   \
    }

GRADIENTS(f32, F32)
GRADIENTS(bf16, BF16)
GRADIENTS(f16, F16)
