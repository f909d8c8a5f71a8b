// Runs the group norm kernel's own source on threads of the CPU, against double precision: what can be known of
// it without a GPU. f16 is left out, whose conversions are the GPU's instructions.
//
//     c++ -std=c++20 -O1 -pthread benches/gpu/emulate.cpp -o emulate && ./emulate
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

struct Index {
    unsigned x;
};
static thread_local Index threadIdx;
static Index blockIdx;
static std::barrier<> barrier(256);
#define __device__
#define __global__
#define __shared__ static
#define __syncthreads() barrier.arrive_and_wait()
#define __uint_as_float std::bit_cast<float>
#define __float_as_uint std::bit_cast<unsigned>
#define asm(...) narrow_or_wide()
static void narrow_or_wide() {}
#include "../../models/src/unet/group_norm/kernel.cu"

static std::mt19937 generator(std::random_device{}());

static std::vector<float> normal(size_t count, float mean) {
    std::normal_distribution<float> distribution(mean, 1);
    std::vector<float> values(count);
    for (float &value : values) value = distribution(generator);
    return values;
}

// The largest error in units of the value, of at least 1.
template <typename T>
static double worst(
    void (*kernel)(
        const typename T::Stored *, typename T::Stored *, const float *, const float *, const float *, int, int, int,
        float, int
    ),
    int samples, int channels, int groups, int pixels, bool modulated, bool silu
) {
    size_t count = size_t(samples) * channels * pixels;
    std::vector<typename T::Stored> x(count), y(count, T::store(NAN));
    std::vector<float> given = normal(count, 3);
    for (size_t i = 0; i < count; i++) x[i] = T::store(given[i]);
    std::vector<float> weight = normal(channels, 1), bias = normal(channels, 0);
    std::vector<float> modulation = normal(2 * channels * samples, 0);
    for (blockIdx.x = 0; blockIdx.x < unsigned(samples * groups); blockIdx.x++) {
        std::vector<std::jthread> threads;
        for (unsigned thread = 0; thread < THREADS; thread++)
            threads.emplace_back([&, thread] {
                threadIdx.x = thread;
                kernel(
                    x.data(), y.data(), weight.data(), bias.data(), modulated ? modulation.data() : nullptr, channels,
                    groups, pixels, 1e-5f, silu
                );
            });
    }
    double worst = 0;
    int size = channels / groups * pixels;
    for (int block = 0; block < samples * groups; block++) {
        double mean = 0, square = 0;
        for (int i = 0; i < size; i++) mean += T::load(x[size_t(block) * size + i]) / double(size);
        for (int i = 0; i < size; i++) square += std::pow(T::load(x[size_t(block) * size + i]) - mean, 2) / size;
        for (int i = 0; i < size; i++) {
            int sample = block / groups, channel = block % groups * (channels / groups) + i / pixels;
            double expected = (T::load(x[size_t(block) * size + i]) - mean) / std::sqrt(square + 1e-5);
            expected = expected * weight[channel] + bias[channel];
            const float *own = &modulation[size_t(sample) * 2 * channels + channel];
            if (modulated) expected = expected * (1 + double(own[0])) + own[channels];
            if (silu) expected /= 1 + std::exp(-expected);
            double error = std::abs(T::load(y[size_t(block) * size + i]) - expected);
            error /= std::max(1.0, std::abs(expected));
            // NaN is the worst.
            if (!(error <= worst)) worst = error;
        }
    }
    return worst;
}

int main() {
    bool good = true;
    struct { int samples, channels, groups, pixels; } shapes[] = {{2, 12, 4, 35}, {1, 32, 8, 1024}, {3, 6, 3, 7}, {1, 8, 1, 600}};
    for (auto [samples, channels, groups, pixels] : shapes)
        for (int way = 0; way < 4; way++) {
            double f32 = worst<F32>(group_norm_f32, samples, channels, groups, pixels, way & 1, way & 2);
            double bf16 = worst<BF16>(group_norm_bf16, samples, channels, groups, pixels, way & 1, way & 2);
            bool here = f32 < 1e-5 && bf16 < 1.0 / 256;
            good = good && here;
            std::printf(
                "%s [%d, %d, %d] in %d groups%s%s: f32 %.1e, bf16 %.1e\n", here ? "ok" : "WRONG", samples, channels,
                pixels, groups, way & 1 ? ", scale-shift" : "", way & 2 ? ", SiLU" : "", f32, bf16
            );
        }
    return good ? 0 : 1;
}
