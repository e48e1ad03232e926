// The fibers of cuda_runtime.h, and the functions that csrc/cuda/device.h takes from torch elsewhere. The GPU
// has two processors, so that small sizes already need grids that stride over their work and blocks that wait
// for the last one.
//
// Settings (environment variables):
//   SIMT_WITHOUT_BARRIER=k, SIMT_WITHOUT_FENCE=k  the k-th barrier or fence of each thread orders nothing;
//                                                 threads still wait, so only ThreadSanitizer sees it
//   SIMT_REVERSED=1                               blocks, and threads between barriers, run in reverse order
//   SIMT_SHARED_BYTES, SIMT_COMPUTE_CAPABILITY    properties of the GPU
//   SIMT_ACTIVE_CLUSTERS                          the number of clusters of any size that the GPU can hold; if
//                                                 negative, asking for it is an error
//   SIMT_BUILT_FOR                                the smallest compute capability with code
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "cuda/device.h"

// This file is compiled without the sanitizer, which would report races in its bookkeeping.
#if defined(SIMT_RACES)
#include <sanitizer/tsan_interface.h>
#define SIMT_TSAN(call) call
#else
#define SIMT_TSAN(call)
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kWarpThreads = 32;
constexpr uintptr_t kSectorBytes = 32;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "simt: %s\n", message);
  std::abort();
}

int setting(const char* name, int otherwise = 0) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

struct Barrier {
  unsigned members = 0;
  unsigned arrived = 0;
  unsigned generation = 0;
  unsigned char* order = nullptr;  // its address for the sanitizer, another one in each cluster
};

struct Warp {
  Barrier barrier;
  uint64_t words[2][kWarpThreads];
};

struct Block {
  unsigned char* shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Fiber {
  uint3 thread, place;  // threadIdx and blockIdx
  ucontext_t context;
  jmp_buf place_in_code;
  bool has_started;
  Block* block;
  Warp* warp;
  bool done;
  int barriers;
  int fences;
  bool fenced;
  void* last_atomic;
  unsigned exchanges;
  std::map<const void*, unsigned> accesses;  // at each place in the code
  void* tsan;
};

// Accesses of the lanes of a warp with the same place and number are one access of the warp.
struct Access {
  const Warp* warp;
  const void* place;
  unsigned number;
  uintptr_t begin, end;
  bool writes;

  bool is_with(const Access& other) const { return warp == other.warp && place == other.place && number == other.number; }
  bool operator<(const Access& other) const {
    return std::tie(warp, place, number, begin) < std::tie(other.warp, other.place, other.number, other.begin);
  }
};

// Of all accesses since begin_call.
struct Sectors {
  int64_t touched;
  int64_t needed;  // the fewest that can hold the bytes of each access of a warp
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier barrier;
  size_t running;
  size_t alive;
  size_t idle;  // changes of fiber since a barrier opened or a thread ended
  int step;     // 1, or -1 for the reverse order
  ucontext_t scheduler;
  void* scheduler_tsan;
  void (*body)(const void*);
  const void* context;
};

Cluster cluster;
// Shared memory, and for the sanitizer also stacks. Each cluster gets new ones, because writes of two
// clusters to one address would be a race.
std::vector<std::unique_ptr<unsigned char[]>> memories;
// Kept until the launch ends: a new fiber would take over the state of a destroyed one.
std::vector<void*> sanitized_fibers;
int skipped_barrier;
int skipped_fence;
// State of the launcher that runs between two calls of begin_call.
bool is_watched;
bool has_launched;
bool counts_sectors;
Sectors sectors_of[2];         // loads, stores
std::vector<Access> accesses;  // of the running cluster

Fiber& running() { return cluster.fibers[cluster.running]; }

void change_to_next() {
  Fiber& from = running();
  if (cluster.alive == 0) {
    SIMT_TSAN(__tsan_switch_to_fiber(cluster.scheduler_tsan, __tsan_switch_to_fiber_no_sync));
    setcontext(&cluster.scheduler);
  }
  const size_t count = cluster.fibers.size();
  do {
    cluster.running = (cluster.running + count + cluster.step) % count;
  } while (running().done);
  if (++cluster.idle > 4 * count) fail("threads wait at barriers that others do not reach");
  Fiber& to = running();
  if (&to == &from) return;
  threadIdx = to.thread;
  blockIdx = to.place;
  SIMT_TSAN(__tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync));
#if defined(SIMT_RACES)
  if (from.done) {
    setcontext(&to.context);
  } else {
    swapcontext(&from.context, &to.context);
  }
#else
  // longjmp avoids the system calls of swapcontext, except when a fiber starts.
  if (!from.done && _setjmp(from.place_in_code) != 0) return;
  if (to.has_started) _longjmp(to.place_in_code, 1);
  to.has_started = true;
  setcontext(&to.context);
#endif
}

void release_if_complete(Barrier& barrier) {
  if (barrier.arrived < barrier.members || barrier.arrived == 0) return;
  barrier.arrived = 0;
  ++barrier.generation;
  cluster.idle = 0;
}

void wait_at(Barrier& barrier, bool orders) {
  if (orders) {
    SIMT_TSAN(__tsan_release(barrier.order));
  }
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  release_if_complete(barrier);
  while (barrier.generation == generation) change_to_next();
  if (orders) {
    SIMT_TSAN(__tsan_acquire(barrier.order));
  }
}

void leave(Barrier& barrier) {
  --barrier.members;
  release_if_complete(barrier);
}

unsigned char* memory_of(size_t bytes) {
  memories.emplace_back(new unsigned char[bytes]);
  return memories.back().get();
}

void thread_main() {
  cluster.body(cluster.context);
  Fiber& fiber = running();
  fiber.done = true;
  --cluster.alive;
  cluster.idle = 0;
  SIMT_TSAN(__tsan_release(&cluster));
  // A barrier does not wait for a thread that has ended.
  leave(fiber.warp->barrier);
  leave(fiber.block->barrier);
  leave(cluster.barrier);
  change_to_next();
}

void add_up_accesses() {
  std::sort(accesses.begin(), accesses.end());
  for (auto first = accesses.begin(); first != accesses.end();) {
    int64_t touched = 0;
    uintptr_t bytes = 0, end = 0, next_sector = 0;
    auto each = first;
    for (; each != accesses.end() && each->is_with(*first); ++each) {
      const uintptr_t from = std::max(each->begin, end), sector = std::max(each->begin / kSectorBytes, next_sector);
      end = std::max(end, each->end);
      next_sector = std::max(next_sector, (each->end - 1) / kSectorBytes + 1);
      bytes += end > from ? end - from : 0;
      touched += next_sector > sector ? next_sector - sector : 0;
    }
    sectors_of[first->writes].touched += touched;
    sectors_of[first->writes].needed += (bytes + kSectorBytes - 1) / kSectorBytes;
    first = each;
  }
  accesses.clear();
}

void run_cluster(const cudaLaunchConfig_t& config, unsigned blocks, uint3 first) {
  const unsigned threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  if (threads == 0 || threads > 1024) fail("a block has 1 to 1024 threads");
  const unsigned warps = (threads + kWarpThreads - 1) / kWarpThreads;
  cluster.blocks.resize(blocks);
  cluster.fibers.resize(size_t{blocks} * threads);
  const size_t stack_bytes = cluster.fibers.size() * kStackBytes;
#if defined(SIMT_RACES)
  unsigned char* const stacks = memory_of(stack_bytes);
#else
  memories.clear();
  static std::vector<unsigned char> stacks_of_all;
  if (stacks_of_all.size() < stack_bytes) stacks_of_all.resize(stack_bytes);
  unsigned char* const stacks = stacks_of_all.data();
#endif
  const size_t shared_bytes = (config.dynamicSmemBytes + 15) / 16 * 16;
  unsigned char* orders = memory_of(8 * (2 + blocks * size_t{1 + warps}));
  const auto reset = [&orders](Barrier& barrier, unsigned members) { barrier = {members, 0, barrier.generation, orders += 8}; };
  reset(cluster.barrier, blocks * threads);
  for (unsigned b = 0; b < blocks; ++b) {
    Block& block = cluster.blocks[b];
    // new[] aligns to 16 bytes. The memory is filled with nan, because on a GPU it has any content.
    block.shared = memory_of(shared_bytes);
    std::memset(block.shared, 0xFF, shared_bytes);
    reset(block.barrier, threads);
    block.warps.resize(warps);
    for (unsigned w = 0; w < warps; ++w) {
      reset(block.warps[w].barrier, w + 1 < warps ? kWarpThreads : threads - w * kWarpThreads);
    }
    for (unsigned t = 0; t < threads; ++t) {
      const size_t i = size_t{b} * threads + t;
      Fiber& fiber = cluster.fibers[i];
      fiber.thread = {t % config.blockDim.x, t / config.blockDim.x % config.blockDim.y, t / config.blockDim.x / config.blockDim.y};
      fiber.place = {first.x + b, first.y, first.z};
      fiber.block = &block;
      fiber.warp = &block.warps[t / kWarpThreads];
      fiber.done = false;
      fiber.has_started = false;
      fiber.barriers = 0;
      fiber.fences = 0;
      fiber.fenced = false;
      fiber.last_atomic = nullptr;
      fiber.exchanges = 0;
      fiber.accesses.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks + i * kStackBytes;
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, thread_main, 0);
      SIMT_TSAN(sanitized_fibers.push_back(fiber.tsan = __tsan_create_fiber(0)));
    }
  }
  cluster.alive = cluster.fibers.size();
  cluster.idle = 0;
  cluster.running = cluster.step > 0 ? 0 : cluster.fibers.size() - 1;
  threadIdx = running().thread;
  blockIdx = running().place;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  running().has_started = true;
  SIMT_TSAN(cluster.scheduler_tsan = __tsan_get_current_fiber());
  SIMT_TSAN(__tsan_switch_to_fiber(running().tsan, __tsan_switch_to_fiber_no_sync));
  swapcontext(&cluster.scheduler, &running().context);
  add_up_accesses();
}

}  // namespace

void run(const cudaLaunchConfig_t& config, void (*body)(const void*), const void* context) {
  has_launched = is_watched;
  const unsigned size = config.numAttrs == 1 ? config.attrs[0].val.clusterDim.x : 1;
  if (config.gridDim.x % size != 0) fail("a grid is made of whole clusters");
  if (config.dynamicSmemBytes > static_cast<size_t>(gradkernels::cuda::device_limits().shared_bytes)) fail("too much shared memory");
  skipped_barrier = setting("SIMT_WITHOUT_BARRIER");
  skipped_fence = setting("SIMT_WITHOUT_FENCE");
  cluster.step = setting("SIMT_REVERSED") == 0 ? 1 : -1;
  cluster.body = body;
  cluster.context = context;
  const uint64_t clusters = uint64_t{config.gridDim.x / size} * config.gridDim.y * config.gridDim.z;
  for (uint64_t i = 0; i < clusters; ++i) {
    const uint64_t at = cluster.step > 0 ? i : clusters - 1 - i;
    const unsigned per_row = config.gridDim.x / size;
    run_cluster(config, size,
                {static_cast<unsigned>(at % per_row) * size, static_cast<unsigned>(at / per_row % config.gridDim.y),
                 static_cast<unsigned>(at / per_row / config.gridDim.y)});
  }
  // The launch ends before the next operation on the stream begins.
  SIMT_TSAN(__tsan_acquire(&cluster));
  for ([[maybe_unused]] void* fiber : sanitized_fibers) SIMT_TSAN(__tsan_destroy_fiber(fiber));
  sanitized_fibers.clear();
  memories.clear();
}

void set_attribute(cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value != gradkernels::cuda::device_limits().shared_bytes) {
    fail("a kernel's limit on shared memory is not that of the GPU");
  }
}

bool has_code() { return setting("SIMT_BUILT_FOR") <= gradkernels::cuda::device_limits().compute_capability; }

void* shared_memory() { return running().block->shared; }
int active_clusters() { return setting("SIMT_ACTIVE_CLUSTERS", 1); }
void cluster_sync() { wait_at(cluster.barrier, true); }

void* of_cluster_block(void* mine, unsigned rank) {
  if (rank >= cluster.blocks.size()) fail("no such block in the cluster");
  return cluster.blocks[rank].shared + (static_cast<unsigned char*>(mine) - running().block->shared);
}

void block_sync() {
  Fiber& fiber = running();
  wait_at(fiber.block->barrier, ++fiber.barriers != skipped_barrier);
}

void fence() {
  Fiber& fiber = running();
  if (++fiber.fences == skipped_fence) return;
  fiber.fenced = true;
  if (fiber.last_atomic != nullptr) {
    SIMT_TSAN(__tsan_acquire(fiber.last_atomic));
  }
}

void before_atomic(void* p) {
  Fiber& fiber = running();
  if (fiber.fenced) {
    SIMT_TSAN(__tsan_release(p));
  }
  fiber.last_atomic = p;
}

// Two sets of words in turn: a lane writes a set again only after all lanes have read it.
const uint64_t* exchange(uint64_t word) {
  Fiber& fiber = running();
  uint64_t* words = fiber.warp->words[fiber.exchanges++ % 2];
  words[threadIdx.x % kWarpThreads] = word;
  wait_at(fiber.warp->barrier, true);
  return words;
}

void check_alignment(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("a packet is not aligned to its size");
}

void access(const void* p, size_t bytes, bool writes) {
  if (!counts_sectors) return;
  Fiber& fiber = running();
  const void* const place = __builtin_return_address(0);
  const auto begin = reinterpret_cast<uintptr_t>(p);
  accesses.push_back({fiber.warp, place, fiber.accesses[place]++, begin, begin + bytes, writes});
}

}  // namespace simt

namespace gradkernels::cuda {

cudaStream_t current_stream() { return nullptr; }

const DeviceLimits& device_limits() {
  // A GPU of its own for each combination of settings, because launchers keep the limits of a GPU.
  static std::map<std::tuple<int, int, int>, DeviceLimits> gpus;
  const int shared_bytes = simt::setting("SIMT_SHARED_BYTES", 227 << 10);
  const int compute_capability = simt::setting("SIMT_COMPUTE_CAPABILITY", 90);
  const DeviceLimits limits{2, shared_bytes, compute_capability, 4 << 20};
  return gpus.try_emplace({shared_bytes, compute_capability, simt::active_clusters()}, limits).first->second;
}

Workspace::Workspace(size_t bytes) : data_(bytes > 0 ? std::malloc(bytes) : nullptr) {
  if (bytes == 0) return;
  // An error after a launch would leave results half-written.
  if (simt::has_launched) simt::fail("a launcher allocates memory after a launch");
  if (data_ == nullptr) throw std::bad_alloc();
  std::memset(data_, 0xFF, bytes);
}
Workspace::~Workspace() { std::free(data_); }

void check(cudaError_t status) {
  if (status == cudaErrorNoKernelImageForDevice) simt::fail(without_code("sm_90", device_limits().compute_capability).c_str());
}

}  // namespace gradkernels::cuda

// Called before each call of a launcher whose rules are checked.
extern "C" void begin_call() {
  simt::is_watched = true;
  simt::has_launched = false;
  simt::sectors_of[0] = simt::sectors_of[1] = {0, 0};
}

extern "C" void count_sectors(int counts) { simt::counts_sectors = counts != 0; }
// Four numbers since begin_call: touched and needed by loads, then by stores.
extern "C" void sectors(int64_t* found) { std::memcpy(found, simt::sectors_of, sizeof(simt::sectors_of)); }

extern "C" unsigned blocks_of_last_cluster() { return static_cast<unsigned>(simt::cluster.blocks.size()); }
