// The step of the samplers, for NVIDIA's run-time compiler: no headers. host.rs is its twin.

// What a row's step is made of, as launch.rs writes it. Flags are 0 or 1; noise is 0 for none, or one of those below.
struct Row {
    float p, q, a, b, e, c0, c1, c2, d, middle, slope, limit, divisor, remember, noise;
};
#define X0 1
#define ANSWER 2
#define FIXED 1
#define LEARNED_RANGE 2
#define LEARNED 3

// x, noise, the next latents and the estimates have `count` values, `length` in a row; a row of memory and of the next
// memory has three times as many, the newest first. The results lie one behind the other. A row of the answer has
// `answer` values, the variance after the rest. Noise is null where no row needs any.
extern "C" __global__ void advance(
    const float *rows, const float *x, const float *memory, const float *model, const float *noise, float *given,
    int length, int answer, long long count
) {
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        long long number = i / length;
        const Row row = ((const Row *)rows)[number];
        const float *answered = model + number * answer + i % length;
        const float *remembered = memory + number * 3 * length + i % length;
        float x0 = row.p * x[i] + row.q * *answered;
        // NaN is neither above nor below, and stays; one in the limit goes through the division.
        if (x0 > row.limit) x0 = row.limit;
        else if (x0 < -row.limit) x0 = -row.limit;
        x0 /= row.divisor;
        float next = row.a * x[i] + row.b * x0 + row.e * *answered;
        // What a row's step does not have is left out: infinity times zero would be NaN.
        if (row.c0 != 0) next += row.c0 * remembered[0];
        if (row.c1 != 0) next += row.c1 * remembered[length];
        if (row.c2 != 0) next += row.c2 * remembered[2 * (long long)length];
        if (row.noise == FIXED) next += row.d * noise[i];
        if (row.noise == LEARNED_RANGE) next += expf(row.middle + row.slope * answered[length]) * noise[i];
        if (row.noise == LEARNED) next += (answered[length] < 0 ? 0 : sqrtf(answered[length])) * noise[i];
        given[i] = next;
        given[count + i] = x0;
        float *next_memory = given + 2 * count + number * 3 * length + i % length;
        bool keeps = row.remember == 0;
        next_memory[0] = keeps ? remembered[0] : row.remember == X0 ? x0 : *answered;
        next_memory[length] = remembered[keeps ? length : 0];
        next_memory[2 * (long long)length] = remembered[keeps ? 2 * (long long)length : length];
    }
}
