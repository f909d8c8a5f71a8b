// CUDA's device language on a CPU: enough of it for candle's kernels and this project's own. Blocks run one after
// another, the threads of a block in turns (see driver.cpp), so atomic operations are plain ones.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

#undef __shared__
#define __shared__ static
#undef __forceinline__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __CUDA_ARCH__ 900

// Waits for the other threads of the block, or of the warp.
void emulated_block_barrier();
void emulated_warp_barrier();
// 16 bytes that a lane shows to its warp.
void *emulated_slot(unsigned lane);

#define __syncthreads() emulated_block_barrier()

static inline unsigned emulated_lane() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32;
}

template <typename T> T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
    static_assert(sizeof(T) <= 16);
    std::memcpy(emulated_slot(emulated_lane()), &value, sizeof(T));
    emulated_warp_barrier();
    std::memcpy(&value, emulated_slot(emulated_lane() ^ mask), sizeof(T));
    emulated_warp_barrier();
    return value;
}

template <typename T> T atomicAdd(T *at, std::type_identity_t<T> value) {
    T old = *at;
    *at = old + value;
    return old;
}
template <typename T> T atomicCAS(T *at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    T old = *at;
    if (old == expected) *at = value;
    return old;
}
template <typename T> T atomicMax(T *at, std::type_identity_t<T> value) {
    T old = *at;
    if (value > old) *at = value;
    return old;
}
template <typename T> T atomicMin(T *at, std::type_identity_t<T> value) {
    T old = *at;
    if (value < old) *at = value;
    return old;
}

template <typename T> T emulated_bits(auto value) {
    T result;
    static_assert(sizeof(T) == sizeof(value));
    std::memcpy(&result, &value, sizeof(T));
    return result;
}
inline float __uint_as_float(unsigned value) { return emulated_bits<float>(value); }
inline float __int_as_float(int value) { return emulated_bits<float>(value); }
inline unsigned __float_as_uint(float value) { return emulated_bits<unsigned>(value); }
inline int __float_as_int(float value) { return emulated_bits<int>(value); }
inline double __longlong_as_double(long long value) { return emulated_bits<double>(value); }
inline long long __double_as_longlong(double value) { return emulated_bits<long long>(value); }

template <typename A, typename B> std::common_type_t<A, B> min(A a, B b) { return a < b ? a : b; }
template <typename A, typename B> std::common_type_t<A, B> max(A a, B b) { return a > b ? a : b; }
using std::isnan;
using std::signbit;
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float normcdff(float x) { return 0.5f * std::erfc(-x * float(M_SQRT1_2)); }
inline double normcdf(double x) { return 0.5 * std::erfc(-x * M_SQRT1_2); }

#define EMULATED_HALF(NAME, FUNCTION)                                                                                \
    inline __half NAME(__half x) { return __float2half(FUNCTION(__half2float(x))); }                                 \
    inline __nv_bfloat16 NAME(__nv_bfloat16 x) { return __float2bfloat16(FUNCTION(__bfloat162float(x))); }
EMULATED_HALF(hsqrt, std::sqrt)
EMULATED_HALF(hcos, std::cos)
EMULATED_HALF(hsin, std::sin)
EMULATED_HALF(hexp, std::exp)
EMULATED_HALF(hlog, std::log)

// Our kernels' instructions.
#define EMULATED

// d += a · b on tensor cores, m16n8k16: lanes show their parts of a, then of b, and each takes what its part of d needs.
template <typename F>
void emulated_multiply_add(F load, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned lane = emulated_lane(), group = lane / 4, four = lane % 4, left[4][4], right[2][4][2];
    std::memcpy(emulated_slot(lane), a, sizeof(a));
    emulated_warp_barrier();
    for (unsigned i = 0; i < 4; i++) std::memcpy(left[i], emulated_slot(group * 4 + i), sizeof(a));
    emulated_warp_barrier();
    std::memcpy(emulated_slot(lane), b, sizeof(b));
    emulated_warp_barrier();
    for (unsigned column = 0; column < 2; column++)
        for (unsigned i = 0; i < 4; i++)
            std::memcpy(right[column][i], emulated_slot((2 * four + column) * 4 + i), sizeof(b));
    emulated_warp_barrier();
    for (unsigned k = 0; k < 16; k++) {
        unsigned from = k % 8 / 2, far = k / 8, shift = k % 2 * 16;
        for (unsigned i = 0; i < 4; i++) {
            float one = load(left[from][2 * far + i / 2] >> shift & 0xffff);
            float other = load(right[i % 2][from][far] >> shift & 0xffff);
            d[i] += one * other;
        }
    }
}

inline void emulated_asm(const char *, float &to, unsigned short from) {
    to = __half2float(emulated_bits<__half>(from));
}
inline void emulated_asm(const char *, unsigned short &to, float from) {
    to = emulated_bits<unsigned short>(__float2half_rn(from));
}

// A launch with its arguments copied, as a launch and a captured launch copy them: what one thread does.
using EmulatedThread = std::function<void()>;

// `waits`: whether threads of a block wait for one another.
void emulated_kernel(const char *name, bool waits, EmulatedThread (*bind)(void **));

template <typename... A> struct EmulatedArguments {
    template <void (*F)(A...)> static EmulatedThread bind(void **given) {
        return of<F>(given, std::index_sequence_for<A...>());
    }
    template <void (*F)(A...), size_t... I> static EmulatedThread of(void **given, std::index_sequence<I...>) {
        std::tuple<std::remove_const_t<A>...> copied(*static_cast<std::remove_const_t<A> *>(given[I])...);
        return [copied] { std::apply(F, copied); };
    }
};
template <typename... A> EmulatedArguments<A...> emulated_arguments(void (*)(A...));
#define EMULATED_KERNEL(NAME, WAITS)                                                                                 \
    emulated_kernel(#NAME, WAITS, decltype(emulated_arguments(&NAME))::template bind<&NAME>)
