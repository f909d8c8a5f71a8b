// The types of numbers that there are kernels for. This file comes before the others; all are for NVIDIA's run-time
// compiler: no headers. Maps are [samples, pixels, channels]. Sums are taken in f32. Nothing is atomic and no order
// follows from the batch's size, so the same row gives the same bits in any batch.

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
