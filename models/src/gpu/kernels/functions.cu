// What several kernels are made of.

// The sum of every thread's value, the same to all of them.
static __device__ float sum(float value) {
    __shared__ float sums[THREADS / 32];
    for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffff, value, other);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < THREADS / 32; i++) total += sums[i];
    return total;
}

// N numbers that lie side by side, loaded and stored 16 bytes at once.
template <typename T, int N, int BYTES = N * sizeof(typename T::Stored)> struct alignas(BYTES < 16 ? BYTES : 16) Pack {
    typename T::Stored values[N];
};

// Visits the thread's share of `size` packs, with the pixel and the place among the `width` of each.
template <typename F> static __device__ void each(int size, int width, F visit) {
    int pixel = threadIdx.x / width, place = threadIdx.x % width;
    int pixels_on = THREADS / width, places_on = THREADS % width;
    for (int i = threadIdx.x; i < size; i += THREADS) {
        visit(i, pixel, place);
        pixel += pixels_on;
        place += places_on;
        if (place >= width) {
            place -= width;
            pixel++;
        }
    }
}
