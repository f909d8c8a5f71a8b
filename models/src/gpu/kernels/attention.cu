// Attention (Vaswani et al. 2017) without its table of scores in memory: softmax as the keys go by (Dao et al. 2022), on
// tensor cores. Fragments lie as PTX's m16n8k16 has them: a lane is one of four in one of eight groups, and has of the
// left matrix rows `group` and `group + 8`, of the right one column `group`, of their product both rows, columns
// `2 * four` and the next.

#define WARPS 4
#define KEYS 32

// d += a · b, 16 × 16 times 16 × 8, of all lanes of a warp.
static __device__ void multiply_add(BF16, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef EMULATED
    emulated_multiply_add(BF16::load, d, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

static __device__ void multiply_add(F16, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef EMULATED
    emulated_multiply_add(F16::load, d, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two numbers that lie side by side, the first at an even place.
static __device__ unsigned pair(const unsigned short *at) { return *reinterpret_cast<const unsigned *>(at); }

template <typename T> static __device__ unsigned pair(float first, float second) {
    return T::store(first) | (unsigned)T::store(second) << 16;
}

// One block for each 16 * WARPS queries of a head of a sample, 16 of them for each warp.
//
// qkv [samples, tokens, 3 * channels]: queries, keys and values, each head by head, and what is to be added to them, bias
// [3 * channels], or null; the queries are multiplied with `scale` then; y [samples, tokens, channels]. A head has `depth`
// channels, an even number up to DEPTH.
//
// What is added to all keys moves all scores of a query alike, which softmax does not see; what is added to all values
// is added to their mean.
template <typename T, int DEPTH>
static __device__ void attend(
    const unsigned short *qkv, const float *bias, float scale, unsigned short *y, int heads, int tokens, int depth
) {
    // Rows end in padding so that the lanes of a load meet different banks.
    __shared__ unsigned short keys[KEYS][DEPTH + 8], values[DEPTH][KEYS + 8];
    int tiles = (tokens + 16 * WARPS - 1) / (16 * WARPS);
    int tile = blockIdx.x % tiles, head = blockIdx.x / tiles % heads, sample = blockIdx.x / tiles / heads;
    int lane = threadIdx.x % 32, group = lane / 4, four = lane % 4;
    int first = (tile * WARPS + threadIdx.x / 32) * 16 + group, channels = heads * depth, row = 3 * channels;
    qkv += (long long)sample * tokens * row + head * depth;
    if (bias) bias += head * depth;
    y += (long long)sample * tokens * channels + head * depth;

    unsigned queries[DEPTH / 16][4];
    for (int step = 0; step < DEPTH / 16; step++)
        for (int part = 0; part < 4; part++) {
            int query = first + part % 2 * 8, channel = step * 16 + part / 2 * 8 + 2 * four;
            bool there = query < tokens && channel < depth;
            queries[step][part] = 0;
            if (!there) continue;
            const unsigned short *from = qkv + (long long)query * row + channel;
            float one = T::load(from[0]), next = T::load(from[1]);
            if (bias) one += bias[channel], next += bias[channel + 1];
            queries[step][part] = pair<T>(one * scale, next * scale);
        }

    // Of rows `first` and `first + 8`: the largest score so far, the lane's share of the sum, and what is gathered.
    float most[2] = {-1e30f, -1e30f}, total[2] = {}, gathered[DEPTH / 8][4] = {};
    for (int start = 0; start < tokens; start += KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < KEYS * DEPTH / 2; i += 32 * WARPS) {
            int key = 2 * i / DEPTH, channel = 2 * i % DEPTH;
            bool there = start + key < tokens && channel < depth;
            const unsigned short *from = qkv + (long long)(start + key) * row + channel;
            *reinterpret_cast<unsigned *>(&keys[key][channel]) = there ? pair(from + channels) : 0;
            unsigned value = there ? pair(from + 2 * channels) : 0;
            values[channel][key] = value & 0xffff;
            values[channel + 1][key] = value >> 16;
        }
        __syncthreads();

        float scores[KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < DEPTH / 16; step++)
#pragma unroll
            for (int column = 0; column < KEYS / 8; column++) {
                const unsigned short *at = &keys[column * 8 + group][step * 16 + 2 * four];
                unsigned right[2] = {pair(at), pair(at + 8)};
                multiply_add(T(), scores[column], queries[step], right);
            }

        float largest[2] = {most[0], most[1]};
#pragma unroll
        for (int column = 0; column < KEYS / 8; column++)
            for (int i = 0; i < 4; i++) {
                if (start + column * 8 + 2 * four + i % 2 >= tokens) scores[column][i] = -1e30f;
                largest[i / 2] = fmaxf(largest[i / 2], scores[column][i]);
            }
        for (int half = 0; half < 2; half++) {
            for (int other = 1; other < 4; other *= 2)
                largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffff, largest[half], other));
            float before = expf(most[half] - largest[half]);
            most[half] = largest[half];
            total[half] *= before;
#pragma unroll
            for (int column = 0; column < DEPTH / 8; column++) {
                gathered[column][2 * half] *= before;
                gathered[column][2 * half + 1] *= before;
            }
        }
#pragma unroll
        for (int column = 0; column < KEYS / 8; column++)
            for (int i = 0; i < 4; i++) {
                scores[column][i] = expf(scores[column][i] - most[i / 2]);
                total[i / 2] += scores[column][i];
            }

        // The scores of two columns of eight are, as they lie, the left matrix of the next product.
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            unsigned left[4];
            for (int part = 0; part < 4; part++) {
                const float *from = &scores[2 * step + part / 2][part % 2 * 2];
                left[part] = pair<T>(from[0], from[1]);
            }
#pragma unroll
            for (int column = 0; column < DEPTH / 8; column++) {
                const unsigned short *at = &values[column * 8 + group][step * 16 + 2 * four];
                unsigned right[2] = {pair(at), pair(at + 8)};
                multiply_add(T(), gathered[column], left, right);
            }
        }
    }

    for (int half = 0; half < 2; half++) {
        for (int other = 1; other < 4; other *= 2) total[half] += __shfl_xor_sync(0xffffffff, total[half], other);
        int query = first + 8 * half;
        for (int column = 0; column < DEPTH / 8; column++) {
            int channel = column * 8 + 2 * four;
            if (query >= tokens || channel >= depth) continue;
            float one = gathered[column][2 * half] / total[half];
            float next = gathered[column][2 * half + 1] / total[half];
            if (bias) one += bias[2 * channels + channel], next += bias[2 * channels + channel + 1];
            *reinterpret_cast<unsigned *>(y + (long long)query * channels + channel) = pair<T>(one, next);
        }
    }
}

#define ATTEND(DEPTH, NAME, T)                                                                                       \
    extern "C" __global__ void attend_##DEPTH##_##NAME(                                                              \
        const unsigned short *qkv, const float *bias, float scale, unsigned short *y, int heads, int tokens,         \
        int depth                                                                                                    \
    ) {                                                                                                              \
        attend<T, DEPTH>(qkv, bias, scale, y, heads, tokens, depth);                                                 \
    }

ATTEND(16, bf16, BF16)
ATTEND(32, bf16, BF16)
ATTEND(64, bf16, BF16)
ATTEND(128, bf16, BF16)
ATTEND(16, f16, F16)
ATTEND(32, f16, F16)
ATTEND(64, f16, F16)
ATTEND(128, f16, F16)
