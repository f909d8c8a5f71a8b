// The step of the samplers, for NVIDIA's run-time compiler: no headers. host.rs is its twin.

// What a row's step is made of, as launch.rs writes it. Flags are 0 or 1; noise is 0 for none, or one of those below.
struct Row {
    float p, q, a, b, e, c, d, middle, slope, limit, divisor, reads_memory, remember, noise;
};
#define FIXED 1
#define LEARNED_RANGE 2
#define LEARNED 3

// x, memory, noise and the three results, which lie one behind the other, have `count` values, `length` in a row;
// a row of the answer has `answer` of them, the variance after the rest. Noise is null where no row needs any.
extern "C" __global__ void advance(
    const float *rows, const float *x, const float *memory, const float *model, const float *noise, float *given,
    int length, int answer, long long count
) {
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        long long number = i / length;
        const Row row = ((const Row *)rows)[number];
        const float *answered = model + number * answer + i % length;
        float x0 = row.p * x[i] + row.q * *answered;
        // NaN is neither above nor below, and stays; one in the limit goes through the division.
        if (x0 > row.limit) x0 = row.limit;
        else if (x0 < -row.limit) x0 = -row.limit;
        x0 /= row.divisor;
        float next = row.a * x[i] + row.b * x0 + row.e * *answered;
        // What a row's step does not have is left out: infinity times zero would be NaN.
        if (row.reads_memory != 0) next += row.c * memory[i];
        if (row.noise == FIXED) next += row.d * noise[i];
        if (row.noise == LEARNED_RANGE) next += expf(row.middle + row.slope * answered[length]) * noise[i];
        if (row.noise == LEARNED) next += (answered[length] < 0 ? 0 : sqrtf(answered[length])) * noise[i];
        given[i] = next;
        given[count + i] = row.remember != 0 ? x0 : memory[i];
        given[2 * count + i] = x0;
    }
}
