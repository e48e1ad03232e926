// The fibers of cuda_runtime.h, and the functions that csrc/cuda/device.h takes from torch elsewhere. The GPU
// has two processors, so that small sizes already need grids that stride over their work and blocks that wait
// for the last one; and a cache of 1 KiB, so that results already exceed it.
//
// Settings (environment variables):
//   SIMT_WITHOUT_BARRIER=k, SIMT_WITHOUT_FENCE=k  the k-th barrier or fence of each thread orders nothing;
//                                                 threads still wait, so only ThreadSanitizer sees it
//   SIMT_REVERSED=1                               blocks, and threads between barriers, run in reverse order
//   SIMT_COMPUTE_CAPABILITY                       of the GPU
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
// Of a block on every GPU, without a request.
constexpr size_t kMostSharedBytes = 48 << 10;

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
  unsigned char* order = nullptr;  // its address for the sanitizer, another one in each block
};

struct Warp {
  Barrier barrier;
  uint64_t words[2][kWarpThreads];
};

struct Fiber {
  uint3 thread;  // threadIdx
  ucontext_t context;
  jmp_buf place_in_code;
  bool has_started;
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

// The running block.
struct Block {
  unsigned char* shared;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  size_t running;
  size_t alive;
  size_t idle;  // changes of fiber since a barrier opened or a thread ended
  int step;     // 1, or -1 for the reverse order
  ucontext_t scheduler;
  void* scheduler_tsan;
  const Call* call;
};

Block block;
// Shared memory, and for the sanitizer also stacks. Each block gets new ones, because writes of two blocks to
// one address would be a race.
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
std::vector<Access> accesses;  // of the running block

// What runs kernels instead of fibers, and is told of the memory that launchers use (tests/ptx/machine.cpp).
struct Runner {
  void (*launch)(const void* kernel, const dim3& grid, const dim3& block, size_t shared_bytes, void** arguments,
                 const size_t* argument_bytes, size_t argument_count);
  void (*allocated)(void* p, size_t bytes);
  void (*released)(void* p);
  void (*filled)(void* p, size_t bytes);
};
Runner runner;

Fiber& running() { return block.fibers[block.running]; }

void change_to_next() {
  Fiber& from = running();
  if (block.alive == 0) {
    SIMT_TSAN(__tsan_switch_to_fiber(block.scheduler_tsan, __tsan_switch_to_fiber_no_sync));
    setcontext(&block.scheduler);
  }
  const size_t count = block.fibers.size();
  do {
    block.running = (block.running + count + block.step) % count;
  } while (running().done);
  if (++block.idle > 4 * count) fail("threads wait at barriers that others do not reach");
  Fiber& to = running();
  if (&to == &from) return;
  threadIdx = to.thread;
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
  block.idle = 0;
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
  block.call->body(block.call->context);
  Fiber& fiber = running();
  fiber.done = true;
  --block.alive;
  block.idle = 0;
  SIMT_TSAN(__tsan_release(&block));
  // A barrier does not wait for a thread that has ended.
  leave(fiber.warp->barrier);
  leave(block.barrier);
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

void run_block(size_t shared_bytes) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned warps = (threads + kWarpThreads - 1) / kWarpThreads;
  block.warps.resize(warps);
  block.fibers.resize(threads);
  const size_t stack_bytes = threads * kStackBytes;
#if defined(SIMT_RACES)
  unsigned char* const stacks = memory_of(stack_bytes);
#else
  memories.clear();
  static std::vector<unsigned char> stacks_of_all;
  if (stacks_of_all.size() < stack_bytes) stacks_of_all.resize(stack_bytes);
  unsigned char* const stacks = stacks_of_all.data();
#endif
  // new[] aligns to 16 bytes. The memory is filled with nan, because on a GPU it has any content.
  block.shared = memory_of(shared_bytes);
  std::memset(block.shared, 0xFF, shared_bytes);
  unsigned char* orders = memory_of(8 * size_t{2 + warps});
  const auto reset = [&orders](Barrier& barrier, unsigned members) { barrier = {members, 0, barrier.generation, orders += 8}; };
  reset(block.barrier, threads);
  for (unsigned w = 0; w < warps; ++w) reset(block.warps[w].barrier, w + 1 < warps ? kWarpThreads : threads - w * kWarpThreads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.thread = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
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
    fiber.context.uc_stack.ss_sp = stacks + t * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, thread_main, 0);
    SIMT_TSAN(sanitized_fibers.push_back(fiber.tsan = __tsan_create_fiber(0)));
  }
  block.alive = threads;
  block.idle = 0;
  block.running = block.step > 0 ? 0 : threads - 1;
  threadIdx = running().thread;
  running().has_started = true;
  SIMT_TSAN(block.scheduler_tsan = __tsan_get_current_fiber());
  SIMT_TSAN(__tsan_switch_to_fiber(running().tsan, __tsan_switch_to_fiber_no_sync));
  swapcontext(&block.scheduler, &running().context);
  add_up_accesses();
}

}  // namespace

void run(dim3 grid, dim3 threads, size_t shared_bytes, const Call& call) {
  has_launched = is_watched;
  if (runner.launch != nullptr) {
    runner.launch(call.kernel, grid, threads, shared_bytes, call.arguments, call.argument_bytes, call.argument_count);
    return;
  }
  const unsigned count = threads.x * threads.y * threads.z;
  if (count == 0 || count > 1024) fail("a block has 1 to 1024 threads");
  if (shared_bytes > kMostSharedBytes) fail("too much shared memory");
  skipped_barrier = setting("SIMT_WITHOUT_BARRIER");
  skipped_fence = setting("SIMT_WITHOUT_FENCE");
  block.step = setting("SIMT_REVERSED") == 0 ? 1 : -1;
  block.call = &call;
  gridDim = grid;
  blockDim = threads;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t at = block.step > 0 ? i : blocks - 1 - i;
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                static_cast<unsigned>(at / grid.x / grid.y)};
    run_block(shared_bytes);
  }
  // The launch ends before the next operation on the stream begins.
  SIMT_TSAN(__tsan_acquire(&block));
  for ([[maybe_unused]] void* fiber : sanitized_fibers) SIMT_TSAN(__tsan_destroy_fiber(fiber));
  sanitized_fibers.clear();
  memories.clear();
}

void fill(void* data, int value, size_t bytes) {
  std::memset(data, value, bytes);
  if (runner.filled != nullptr) runner.filled(data, bytes);
}

bool has_code() { return setting("SIMT_BUILT_FOR") <= gradkernels::cuda::device_limits().compute_capability; }

void* shared_memory() { return block.shared; }

void block_sync() {
  Fiber& fiber = running();
  wait_at(block.barrier, ++fiber.barriers != skipped_barrier);
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
  static const DeviceLimits limits{2, simt::setting("SIMT_COMPUTE_CAPABILITY", 90), 1 << 10};
  return limits;
}

Workspace::Workspace(size_t bytes) : data_(bytes > 0 ? std::malloc(bytes) : nullptr) {
  if (bytes == 0) return;
  // An error after a launch would leave results half-written.
  if (simt::has_launched) simt::fail("a launcher allocates memory after a launch");
  if (data_ == nullptr) throw std::bad_alloc();
  std::memset(data_, 0xFF, bytes);
  if (simt::runner.allocated != nullptr) simt::runner.allocated(data_, bytes);
}
Workspace::~Workspace() {
  if (simt::runner.released != nullptr && data_ != nullptr) simt::runner.released(data_);
  std::free(data_);
}

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

// From here on `launch` runs the kernels.
extern "C" void run_on(decltype(simt::Runner::launch) launch, decltype(simt::Runner::allocated) allocated,
                       decltype(simt::Runner::released) released, decltype(simt::Runner::filled) filled) {
  simt::runner = {launch, allocated, released, filled};
}

extern "C" void count_sectors(int counts) { simt::counts_sectors = counts != 0; }
// Four numbers since begin_call: touched and needed by loads, then by stores.
extern "C" void sectors(int64_t* found) { std::memcpy(found, simt::sectors_of, sizeof(simt::sectors_of)); }
