// libcuda in software: devices are this process's memory, kernels those that device.h was compiled with.
//
// It is stricter than a GPU where it can be: fresh memory is NaN and freed memory is filled with it again, writing
// past the end of an allocation ends the process, and so does a captured graph that would do what CUDA forbids.
// It says nothing of speed, and, since everything happens at once, nothing of missing synchronisation.
//
//   EMULATED_GPUS     how many [1]
//   EMULATED_BYTES    memory of each [1 GiB]
//   EMULATED_FAULT    launches after which each is broken and says so to everything [never]
//   EMULATED_LOG      counts of calls, kernels and bytes, as the process ends, go to this file
#include <cuda.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

#include "device.h"
#include "driver.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

[[noreturn]] void wrong(const std::string &what) {
    std::fprintf(stderr, "emulated GPU: %s\n", what.c_str());
    std::abort();
}

// What is kept is never destroyed: a thread may call while the process ends.
template <typename T> T &kept() {
    static T &made = *new T;
    return made;
}
// One call at a time: everything below is shared.
std::recursive_mutex &mutex = kept<std::recursive_mutex>();

using Counts = std::map<std::string, size_t>;
Counts &counts() {
    static bool told = std::getenv("EMULATED_LOG") && std::atexit([] {
        std::lock_guard lock(mutex);
        std::FILE *file = std::fopen(std::getenv("EMULATED_LOG"), "w");
        if (!file) return;
        for (auto &[name, count] : kept<Counts>()) std::fprintf(file, "%zu %s\n", count, name.c_str());
        std::fclose(file);
    }) == 0;
    (void)told;
    return kept<Counts>();
}
void count(const std::string &name, size_t by = 1) { counts()[name] += by; }

// ---- the threads of a block -------------------------------------------------------------------------------------

struct Kernel {
    std::string name;
    bool waits;
    EmulatedThread (*bind)(void **);
};
using Kernels = std::map<std::string, Kernel>;

// A thread of a block that waits for others has a stack of its own, which runs one body after another; the threads
// of a block are resumed in turns.
constexpr size_t STACK = 64 * 1024, MOST = 1024;
using Place = void *[5];
struct Fiber {
    Place place;
    bool started, done;
};
// Those who wait for one another: a block, or a warp of one.
struct Barrier {
    unsigned alive, waiting, opened;
    void open_if_all() {
        if (waiting == 0 || waiting < alive) return;
        waiting = 0;
        opened++;
    }
};
Barrier block_barrier, warp_barriers[MOST / 32];
Fiber fibers[MOST];
char *stacks;
Place scheduler;
unsigned running;
const EmulatedThread *body;
char slots[MOST][16];

[[gnu::noipa, noreturn]] void leap(Place &place) { __builtin_longjmp(place, 1); }
[[gnu::noipa]] void yield() {
    if (__builtin_setjmp(fibers[running].place) == 0) leap(scheduler);
}
void enter() {
    for (;;) {
        (*body)();
        fibers[running].done = true;
        for (Barrier *barrier : {&block_barrier, &warp_barriers[running / 32]}) {
            barrier->alive--;
            barrier->open_if_all();
        }
        yield();
    }
}
[[gnu::noipa, noreturn]] void start() {
    fibers[running].started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack = {stacks + STACK * running, 0, STACK};
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    setcontext(&context);
    wrong("no context for a thread");
}
[[gnu::noipa]] void resume() {
    if (__builtin_setjmp(scheduler) != 0) return;
    if (fibers[running].started) leap(fibers[running].place);
    start();
}

void run_in_turns(const EmulatedThread &thread) {
    if (!stacks) {
        void *at = mmap(nullptr, STACK * MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) wrong("no memory for stacks");
        stacks = static_cast<char *>(at);
    }
    body = &thread;
    unsigned threads = blockDim.x * blockDim.y * blockDim.z, left = threads;
    block_barrier = {threads, 0, 0};
    for (unsigned i = 0; i < threads; i += 32) warp_barriers[i / 32] = {std::min(threads - i, 32u), 0, 0};
    for (unsigned i = 0; i < threads; i++) fibers[i].done = false;
    while (left > 0) {
        left = 0;
        for (running = 0; running < threads; running++) {
            if (fibers[running].done) continue;
            threadIdx = {
                running % blockDim.x, running / blockDim.x % blockDim.y, running / (blockDim.x * blockDim.y)
            };
            resume();
            left += !fibers[running].done;
        }
    }
    body = nullptr;
}

void run(const Kernel &kernel, dim3 grid, dim3 block, const EmulatedThread &thread) {
    gridDim = grid;
    blockDim = block;
    for (blockIdx.z = 0; blockIdx.z < grid.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
                if (kernel.waits) {
                    run_in_turns(thread);
                    continue;
                }
                for (threadIdx.z = 0; threadIdx.z < block.z; threadIdx.z++)
                    for (threadIdx.y = 0; threadIdx.y < block.y; threadIdx.y++)
                        for (threadIdx.x = 0; threadIdx.x < block.x; threadIdx.x++) thread();
            }
}

// ---- memory -----------------------------------------------------------------------------------------------------

constexpr size_t GUARD = 64;
constexpr unsigned char FRESH = 0xff, FENCE = 0xa5;
struct Allocation {
    size_t bytes;
    int device;
};
using Allocations = std::map<CUdeviceptr, Allocation>;
Allocations &allocations = kept<Allocations>();
size_t used[16];

size_t number(const char *name, size_t otherwise) {
    const char *value = std::getenv(name);
    return value ? std::strtoull(value, nullptr, 10) : otherwise;
}
int gpus() { return int(number("EMULATED_GPUS", 1)); }
size_t capacity() { return number("EMULATED_BYTES", size_t(1) << 30); }

size_t launches = 0;
bool broken() {
    static const size_t fault = number("EMULATED_FAULT", SIZE_MAX);
    return launches >= fault;
}

CUresult allocate(CUdeviceptr *at, size_t bytes, int device) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
    if (used[device] + bytes > capacity()) return CUDA_ERROR_OUT_OF_MEMORY;
    char *memory = static_cast<char *>(std::aligned_alloc(256, (bytes + GUARD + 255) / 256 * 256));
    if (!memory) return CUDA_ERROR_OUT_OF_MEMORY;
    std::memset(memory, FRESH, bytes);
    std::memset(memory + bytes, FENCE, GUARD);
    *at = reinterpret_cast<CUdeviceptr>(memory);
    allocations[*at] = {bytes, device};
    used[device] += bytes;
    count("bytes allocated", bytes);
    return CUDA_SUCCESS;
}

void check_fence(CUdeviceptr at, const Allocation &allocation) {
    auto fence = reinterpret_cast<unsigned char *>(at) + allocation.bytes;
    for (size_t i = 0; i < GUARD; i++)
        if (fence[i] != FENCE) wrong("something wrote past the end of " + std::to_string(allocation.bytes) + " bytes");
}

CUresult release(CUdeviceptr at) {
    auto found = allocations.find(at);
    if (found == allocations.end()) wrong("freed what is not allocated");
    check_fence(at, found->second);
    std::memset(reinterpret_cast<void *>(at), FRESH, found->second.bytes);
    used[found->second.device] -= found->second.bytes;
    allocations.erase(found);
    std::free(reinterpret_cast<void *>(at));
    return CUDA_SUCCESS;
}

// Whether `bytes` at `at` are one allocation's.
void check_range(CUdeviceptr at, size_t bytes, const char *what) {
    auto after = allocations.upper_bound(at);
    if (after != allocations.begin()) {
        auto &[start, allocation] = *std::prev(after);
        if (at + bytes <= start + allocation.bytes) return;
    }
    wrong(std::string(what) + " of " + std::to_string(bytes) + " bytes is not within an allocation");
}

// ---- streams and graphs -----------------------------------------------------------------------------------------

using Operation = std::function<void()>;
struct Graph {
    std::vector<Operation> operations;
    // Of allocations made while capturing: those that the graph frees, and those it leaves.
    std::set<CUdeviceptr> freed, left;
};
struct Stream {
    int device = 0;
    std::shared_ptr<Graph> capturing;
    bool invalid = false;
};
struct Executable {
    std::shared_ptr<Graph> graph;
    bool frees_on_launch, launched = false;
};
struct Event {
    std::chrono::steady_clock::time_point at;
};
thread_local int current_device = 0;
thread_local CUcontext current = nullptr;
Stream &of(CUstream stream) {
    static Stream standing[16];
    auto small = reinterpret_cast<uintptr_t>(stream);
    return small <= 2 ? standing[current_device] : *reinterpret_cast<Stream *>(stream);
}
// Of all threads and streams; a capture in CUDA's global mode forbids more than this does.
int captures = 0;

// Does it now, or has the graph do it.
CUresult submit(CUstream given, Operation operation) {
    Stream &stream = of(given);
    if (stream.capturing)
        stream.capturing->operations.push_back(std::move(operation));
    else
        operation();
    return CUDA_SUCCESS;
}

// What may not be done while a graph is captured.
CUresult forbidden(CUstream given) {
    Stream &stream = of(given);
    if (!stream.capturing) return CUDA_SUCCESS;
    stream.invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

} // namespace

void emulated_kernel(const char *name, bool waits, EmulatedThread (*bind)(void **)) {
    // Sources are one library here, so the linker would take either.
    if (!kept<Kernels>().insert({name, {name, waits, bind}}).second) wrong("two kernels of one name");
}
void emulated_submit(void *stream, std::function<void()> operation) {
    std::lock_guard lock(mutex);
    submit(static_cast<CUstream>(stream), std::move(operation));
}
void emulated_count(const char *name) {
    std::lock_guard lock(mutex);
    count(name);
}
void *emulated_slot(unsigned lane) { return slots[running / 32 * 32 + lane]; }
static void wait(Barrier &barrier) {
    if (!body) wrong("a kernel's threads wait for one another, which build.sh does not say of it");
    unsigned before = barrier.opened;
    barrier.waiting++;
    barrier.open_if_all();
    while (barrier.opened == before) yield();
}
void emulated_block_barrier() { wait(block_barrier); }
void emulated_warp_barrier() { wait(warp_barriers[running / 32]); }

#define LOCKED std::lock_guard lock(mutex); count(__func__)
extern "C" {

CUresult cuInit(unsigned) { return gpus() > 0 ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
CUresult cuDeviceGetCount(int *n) { *n = gpus(); return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    if (ordinal < 0 || ordinal >= gpus()) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: *value = device + 1; break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = reinterpret_cast<CUcontext>(uintptr_t(device) + 1);
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) {
    current = context;
    current_device = context ? int(reinterpret_cast<uintptr_t>(context)) - 1 : 0;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = current; return CUDA_SUCCESS; }
CUresult cuCtxSynchronize() { return captures ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS; }

CUresult cuGetErrorName(CUresult error, const char **name) {
    switch (error) {
    case CUDA_ERROR_OUT_OF_MEMORY: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case CUDA_ERROR_ILLEGAL_ADDRESS: *name = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
    case CUDA_ERROR_NO_DEVICE: *name = "CUDA_ERROR_NO_DEVICE"; break;
    case CUDA_ERROR_INVALID_DEVICE: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
    case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: *name = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
    case CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: *name = "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"; break;
    default: *name = "CUDA_ERROR";
    }
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) { return cuGetErrorName(error, text); }

CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice device) {
    *pool = reinterpret_cast<CUmemoryPool>(uintptr_t(device) + 1);
    return CUDA_SUCCESS;
}
CUresult cuMemPoolSetAttribute(CUmemoryPool, CUmemPool_attribute, void *) { return CUDA_SUCCESS; }
CUresult cuMemPoolTrimTo(CUmemoryPool, size_t) { return CUDA_SUCCESS; }
CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
    *total = capacity();
    *free = *total - used[current_device];
    return CUDA_SUCCESS;
}
CUresult cuMemAlloc_v2(CUdeviceptr *at, size_t bytes) {
    LOCKED;
    if (captures) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return allocate(at, bytes, current_device);
}
CUresult cuMemFree_v2(CUdeviceptr at) {
    LOCKED;
    return captures ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : release(at);
}
CUresult cuMemAllocAsync(CUdeviceptr *at, size_t bytes, CUstream given) {
    LOCKED;
    Stream &stream = of(given);
    CUresult result = allocate(at, bytes, stream.device);
    if (result == CUDA_SUCCESS && stream.capturing) {
        stream.capturing->left.insert(*at);
        // Every launch finds the memory as an allocation does.
        auto fresh = [at = *at, bytes] { std::memset(reinterpret_cast<void *>(at), FRESH, bytes); };
        stream.capturing->operations.push_back(fresh);
    }
    return result;
}
CUresult cuMemFreeAsync(CUdeviceptr at, CUstream given) {
    LOCKED;
    Stream &stream = of(given);
    if (!stream.capturing) return release(at);
    // CUDA lets a graph free what was allocated before it; launched twice it would free twice.
    if (!stream.capturing->left.erase(at)) wrong("a captured graph frees what was allocated outside of it");
    stream.capturing->freed.insert(at);
    return CUDA_SUCCESS;
}
CUresult cuMemHostAlloc(void **at, size_t bytes, unsigned) {
    *at = std::malloc(bytes);
    return *at ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemFreeHost(void *at) { std::free(at); return CUDA_SUCCESS; }

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    LOCKED;
    if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
    count("bytes up", bytes);
    check_range(to, bytes, "an upload");
    // A graph would read the host's memory, which may be gone, whenever it is launched.
    if (of(stream).capturing) wrong("an upload while a graph is captured");
    std::memcpy(reinterpret_cast<void *>(to), from, bytes);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    LOCKED;
    if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
    count("bytes down", bytes);
    check_range(from, bytes, "a download");
    if (of(stream).capturing) wrong("a download while a graph is captured");
    std::memcpy(to, reinterpret_cast<void *>(from), bytes);
    return CUDA_SUCCESS;
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    LOCKED;
    check_range(to, bytes, "a copy");
    check_range(from, bytes, "a copy");
    return submit(stream, [=] { std::memmove(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes); });
}
CUresult cuMemcpyPeerAsync(CUdeviceptr to, CUcontext, CUdeviceptr from, CUcontext, size_t bytes, CUstream stream) {
    return cuMemcpyDtoDAsync_v2(to, from, bytes, stream);
}
CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t bytes, CUstream stream) {
    LOCKED;
    check_range(at, bytes, "a fill");
    return submit(stream, [=] { std::memset(reinterpret_cast<void *>(at), value, bytes); });
}

CUresult cuStreamCreate(CUstream *stream, unsigned) {
    LOCKED;
    auto made = new Stream;
    made->device = current_device;
    *stream = reinterpret_cast<CUstream>(made);
    return CUDA_SUCCESS;
}
CUresult cuStreamDestroy_v2(CUstream stream) {
    LOCKED;
    delete reinterpret_cast<Stream *>(stream);
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) { LOCKED; if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS; return forbidden(stream); }
CUresult cuStreamWaitEvent(CUstream stream, CUevent, unsigned) { LOCKED; return forbidden(stream); }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    Stream &asked = of(stream);
    *status = asked.capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}
CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode) {
    LOCKED;
    if (of(stream).capturing) return CUDA_ERROR_ILLEGAL_STATE;
    of(stream).capturing = std::make_shared<Graph>();
    of(stream).invalid = false;
    captures++;
    return CUDA_SUCCESS;
}
CUresult cuStreamEndCapture(CUstream given, CUgraph *graph) {
    LOCKED;
    Stream &stream = of(given);
    if (!stream.capturing) return CUDA_ERROR_ILLEGAL_STATE;
    captures--;
    auto captured = std::move(stream.capturing);
    stream.capturing = nullptr;
    if (stream.invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    count("operations captured", captured->operations.size());
    *graph = reinterpret_cast<CUgraph>(new std::shared_ptr<Graph>(std::move(captured)));
    return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph, unsigned long long flags) {
    LOCKED;
    bool frees = flags & CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    auto made = new Executable{*reinterpret_cast<std::shared_ptr<Graph> *>(graph), frees};
    *executable = reinterpret_cast<CUgraphExec>(made);
    return CUDA_SUCCESS;
}
CUresult cuGraphUpload(CUgraphExec, CUstream) { return CUDA_SUCCESS; }
CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    LOCKED;
    if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
    auto launched = reinterpret_cast<Executable *>(executable);
    if (of(stream).capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (launched->launched && !launched->graph->left.empty() && !launched->frees_on_launch)
        return CUDA_ERROR_INVALID_VALUE;
    launched->launched = true;
    launches++;
    for (auto &operation : launched->graph->operations) operation();
    return CUDA_SUCCESS;
}
CUresult cuGraphExecDestroy(CUgraphExec executable) {
    LOCKED;
    delete reinterpret_cast<Executable *>(executable);
    return CUDA_SUCCESS;
}
CUresult cuGraphDestroy(CUgraph graph) {
    LOCKED;
    auto destroyed = reinterpret_cast<std::shared_ptr<Graph> *>(graph);
    for (CUdeviceptr at : (*destroyed)->freed) release(at);
    delete destroyed;
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent *event, unsigned) {
    *event = reinterpret_cast<CUevent>(new Event);
    return CUDA_SUCCESS;
}
CUresult cuEventDestroy_v2(CUevent event) {
    delete reinterpret_cast<Event *>(event);
    return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
    LOCKED;
    reinterpret_cast<Event *>(event)->at = std::chrono::steady_clock::now();
    return forbidden(stream);
}
CUresult cuEventSynchronize(CUevent) { return CUDA_SUCCESS; }
CUresult cuEventQuery(CUevent) { return CUDA_SUCCESS; }
CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent from, CUevent to) {
    auto spent = reinterpret_cast<Event *>(to)->at - reinterpret_cast<Event *>(from)->at;
    *milliseconds = std::chrono::duration<float, std::milli>(spent).count();
    return CUDA_SUCCESS;
}

// NVIDIA's run-time compiler, which is not emulated, asks for a table of functions that nobody else knows, and does
// without where the table, which begins with its size, is too short to have them.
CUresult cuGetExportTable(const void **table, const CUuuid *) {
    static const size_t none[8] = {sizeof(size_t)};
    *table = none;
    return CUDA_SUCCESS;
}

// What a module holds is not looked at: kernels are found by name.
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    LOCKED;
    auto ptx = static_cast<const char *>(image);
    if (std::strstr(ptx, "mma.sync") && std::strstr(ptx, ".target sm_7")) return CUDA_ERROR_INVALID_PTX;
    if (captures) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    *module = reinterpret_cast<CUmodule>(1);
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *name) {
    LOCKED;
    auto found = kept<Kernels>().find(name);
    if (found == kept<Kernels>().end()) wrong(std::string("no kernel ") + name);
    *function = reinterpret_cast<CUfunction>(&found->second);
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(
    CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared_bytes, CUstream stream, void **arguments, void **
) {
    LOCKED;
    if (!gx || !gy || !gz || !bx || !by || !bz || bx * by * bz > 1024 || gy > 65535 || gz > 65535)
        return CUDA_ERROR_INVALID_VALUE;
    launches++;
    if (broken()) return CUDA_ERROR_ILLEGAL_ADDRESS;
    if (shared_bytes > 0) wrong("a kernel asks for shared memory at its launch");
    auto kernel = reinterpret_cast<Kernel *>(function);
    count("kernel " + kernel->name);
    if (of(stream).capturing) count("captured " + kernel->name);
    auto thread = kernel->bind(arguments);
    return submit(stream, [=] {
        auto began = std::chrono::steady_clock::now();
        run(*kernel, dim3(gx, gy, gz), dim3(bx, by, bz), thread);
        auto spent = std::chrono::steady_clock::now() - began;
        count("microseconds in " + kernel->name, std::chrono::duration_cast<std::chrono::microseconds>(spent).count());
    });
}
}
