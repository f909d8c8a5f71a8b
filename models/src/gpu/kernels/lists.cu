// Many tensors as one: `table` has `count` addresses, then where each tensor begins in `flat`, which has `size` numbers.

// The tensor that has number i, and its place there.
static __device__ float *find(const unsigned long long *table, int count, int i) {
    int first = 0, after = count;
    while (after - first > 1) {
        int middle = (first + after) / 2;
        if (table[count + middle] <= i) first = middle;
        else after = middle;
    }
    return reinterpret_cast<float *>(table[first]) + (i - (int)table[count + first]);
}

extern "C" __global__ void join_f32(const unsigned long long *table, int count, float *flat, int size) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) flat[i] = *find(table, count, i);
}

extern "C" __global__ void part_f32(const unsigned long long *table, int count, const float *flat, int size) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) *find(table, count, i) = flat[i];
}
