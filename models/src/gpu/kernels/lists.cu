// Many tensors as one: `table` has `count` addresses, then where each tensor begins in `flat`, which has `size` numbers,
// then how many it has itself.

// Where number i is in its tensor; null where it belongs to none.
static __device__ float *find(const unsigned long long *table, int count, int i) {
    int first = 0, after = count;
    while (after - first > 1) {
        int middle = (first + after) / 2;
        if (table[count + middle] <= i) first = middle;
        else after = middle;
    }
    int place = i - (int)table[count + first];
    return place < (int)table[2 * count + first] ? reinterpret_cast<float *>(table[first]) + place : nullptr;
}

extern "C" __global__ void join_f32(const unsigned long long *table, int count, float *flat, int size) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) {
        const float *from = find(table, count, i);
        flat[i] = from ? *from : 0;
    }
}

extern "C" __global__ void part_f32(const unsigned long long *table, int count, const float *flat, int size) {
    int step = gridDim.x * THREADS;
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < size; i += step) {
        float *to = find(table, count, i);
        if (to) *to = flat[i];
    }
}
