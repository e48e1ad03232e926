// Runs kernels: blocks one after the other, the warps of a block up to the next barrier in turn, and of the lanes of a
// warp those that are furthest behind, so that lanes meet again where ways join. What ctypes calls is at the end.
//
// SIMT_REVERSED=1 (an environment variable, as in tests/simt/simt.cpp) runs blocks and warps in reverse order.
#include "machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace ptx {

Machine machine;

void require_written(const Warp& warp, const Slot& slot, uint32_t lanes) {
  if ((warp.written[slot.number] & lanes) != lanes) throw Fault("a value that was never written");
}

namespace {

// Far more instructions than any kernel of the tests takes in a warp.
constexpr uint64_t kMostInstructions = 1 << 24;
constexpr uint32_t kMostThreads = 1024;
// Of a block on every GPU, without a request.
constexpr size_t kMostSharedBytes = 48 << 10;

struct Grid {
  const uint32_t* blocks;   // three numbers
  const uint32_t* threads;  // three numbers
  size_t shared_bytes;
};

std::unordered_map<const void*, std::string> texts;
std::unordered_map<const void*, Kernel> kernels;
std::unordered_map<const void*, int> times_run;
std::string error;
// Counted over all launches.
uint32_t launches;
uint64_t instructions;
std::vector<Warp> warps;

void set_constant(Warp& warp, const Slot& slot, uint64_t bits) {
  warp.written[slot.number] = kAllLanes;
  if (slot.bytes == 0) *warp.at<uint32_t>(slot) = bits != 0 ? kAllLanes : 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) std::memcpy(warp.at<unsigned char>(slot) + slot.bytes * lane, &bits, slot.bytes);
}

// block: blockIdx.
void start(Warp& warp, const Kernel& kernel, const Grid& grid, const uint32_t* block, uint32_t number) {
  constexpr size_t kAlignment = 64;
  warp.memory.resize(kernel.frame_bytes + kAlignment);
  void* aligned = warp.memory.data();
  size_t room = warp.memory.size();
  warp.frame = static_cast<unsigned char*>(std::align(kAlignment, kernel.frame_bytes, aligned, room));
  warp.written.assign(kernel.slots, 0);
  const uint32_t threads = std::min(grid.threads[0] - number * kLanes, kLanes);
  warp.alive = threads == kLanes ? kAllLanes : (1u << threads) - 1;
  warp.first_thread = number * kLanes;
  warp.groups = {{0, warp.alive, false}};
  warp.threads.fill({});
  for (const auto& [slot, bits] : kernel.constants) set_constant(warp, slot, bits);
  const std::unordered_map<std::string, uint32_t> known{
      {"%tid.x", 0},          {"%ntid.x", grid.threads[0]},  {"%ctaid.x", block[0]},
      {"%ctaid.y", block[1]}, {"%nctaid.x", grid.blocks[0]}, {"%nctaid.y", grid.blocks[1]}};
  for (const auto& [name, slot] : kernel.special) {
    const auto found = known.find(name);
    if (found == known.end()) throw Fault("unknown special register " + name);
    set_constant(warp, slot, found->second);
    for (uint32_t lane = 0; lane < kLanes && name == "%tid.x"; ++lane) warp.at<uint32_t>(slot)[lane] = warp.first_thread + lane;
  }
}

// Merges groups that are at one place.
void tidy(Warp& warp) {
  std::vector<Group>& groups = warp.groups;
  std::sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.at < b.at; });
  size_t last = 0;
  for (size_t i = 1; i < groups.size(); ++i) {
    if (groups[i].at == groups[last].at) {
      groups[last] = {groups[last].at, groups[last].lanes | groups[i].lanes, false};
    } else {
      groups[++last] = groups[i];
    }
  }
  groups.resize(last + 1);
}

std::string place_of(const Kernel& kernel, const Warp& warp, const Group& group) {
  char numbers[80];
  std::snprintf(numbers, sizeof(numbers), " [block %u, warp %u, lanes %#x] at: ", machine.now.block, warp.first_thread / kLanes,
                group.lanes);
  return numbers + kernel.code[group.at].text;
}

void run_instruction(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  const Operation& operation = *instruction.operation;
  uint32_t written = kAllLanes;
  if (operation.written != nullptr) {
    written = operation.written(warp, instruction, lanes);
  } else {
    for (int i = 0; i < instruction.from_count; ++i) written &= warp.written[instruction.from[i].number];
  }
  warp.results.fill(written);
  operation.run(warp, instruction, lanes);
  for (int i = 0; i < instruction.to_count; ++i) {
    uint32_t& of_slot = warp.written[instruction.to[i].number];
    of_slot = (of_slot & ~lanes) | (warp.results[i] & lanes);
  }
}

// Runs a group up to where the others are, or to where it has to wait or ends.
void run_group(const Kernel& kernel, Warp& warp, size_t which) {
  Group& group = warp.groups[which];
  uint32_t meeting = static_cast<uint32_t>(kernel.code.size());
  for (const Group& other : warp.groups) {
    if (other.at > group.at) meeting = std::min(meeting, other.at);
  }
  while (true) {
    if (group.at >= kernel.code.size()) throw Fault("the code ends without ret");
    const Instruction& instruction = kernel.code[group.at];
    const Operation& operation = *instruction.operation;
    if (++instructions > kMostInstructions) throw Fault("a warp does not end");
    uint32_t lanes = group.lanes;
    if (instruction.is_guarded) {
      require_written(warp, instruction.guard, lanes);
      const uint32_t guard = *warp.at<uint32_t>(instruction.guard);
      lanes &= instruction.guard_is_negated ? ~guard : guard;
    }
    instruction.has_run |= lanes != 0;
    switch (operation.control) {
      case Control::kBranch:
      case Control::kUniformBranch:
        if (lanes != 0 && lanes != group.lanes) {
          if (operation.control == Control::kUniformBranch) throw Fault("bra.uni parts a warp");
          const uint32_t others = group.lanes & ~lanes;
          warp.groups.push_back({group.at + 1, others, false});
          warp.groups[which].lanes = lanes;
          warp.groups[which].at = instruction.target;
          return;
        }
        group.at = lanes != 0 ? instruction.target : group.at + 1;
        if (warp.groups.size() > 1) return;
        continue;
      case Control::kExit:
        warp.alive &= ~lanes;
        group.lanes &= ~lanes;
        ++group.at;
        if (group.lanes == 0) warp.groups.erase(warp.groups.begin() + static_cast<std::ptrdiff_t>(which));
        // Threads that wait for those that have ended go on.
        for (Group& other : warp.groups) other.waits = false;
        return;
      case Control::kWholeWarp:
      case Control::kBarrier:
        if (lanes != group.lanes) throw Fault("a predicate parts a warp");
        if (group.lanes != warp.alive) {
          group.waits = true;
          return;
        }
        break;
      case Control::kNone:
        break;
    }
    if (lanes != 0) run_instruction(warp, instruction, lanes);
    ++group.at;
    if (operation.control == Control::kBarrier) {
      group.waits = true;
      return;
    }
    if (group.at >= meeting) return;
  }
}

// Runs a warp until all of its lanes have passed a barrier, or have ended.
void run_to_barrier(const Kernel& kernel, Warp& warp) {
  instructions = 0;
  for (Group& group : warp.groups) group.waits = false;
  while (!warp.groups.empty()) {
    const auto next = std::min_element(warp.groups.begin(), warp.groups.end(),
                                       [](const Group& a, const Group& b) { return a.waits != b.waits ? b.waits : a.at < b.at; });
    if (next->waits) {
      if (warp.groups.size() == 1 && next->lanes == warp.alive) return;
      throw Fault("lanes wait for lanes that wait elsewhere" + place_of(kernel, warp, *next));
    }
    const Group running = *next;
    const size_t which = static_cast<size_t>(next - warp.groups.begin());
    try {
      run_group(kernel, warp, which);
    } catch (const Fault& fault) {
      throw Fault(fault.what() + place_of(kernel, warp, which < warp.groups.size() ? warp.groups[which] : running));
    }
    if (warp.groups.size() > 1) tidy(warp);
  }
}

void run_block(const Kernel& kernel, const Grid& grid, const uint32_t* block, bool reversed) {
  std::vector<unsigned char> shared(grid.shared_bytes);
  machine.shared.forbid_all();
  if (!shared.empty()) machine.shared.allow(kSharedBegin, shared.data(), shared.size(), Content::kTracked);
  const auto count = static_cast<uint32_t>((grid.threads[0] + kLanes - 1) / kLanes);
  warps.resize(std::max<size_t>(warps.size(), count));
  for (uint32_t w = 0; w < count; ++w) start(warps[w], kernel, grid, block, w);
  machine.known.assign(size_t{grid.blocks[0]} * grid.blocks[1], {});
  for (machine.now.epoch = 0;; ++machine.now.epoch) {
    bool all_ended = true;
    for (uint32_t i = 0; i < count; ++i) {
      Warp& warp = warps[reversed ? count - 1 - i : i];
      if (warp.groups.empty()) continue;
      run_to_barrier(kernel, warp);
      all_ended = all_ended && warp.groups.empty();
    }
    if (all_ended) return;
    if (machine.now.epoch == kSeveral) throw Fault("a block does not end");
  }
}

void launch(const Kernel& kernel, const Grid& grid, void** arguments, const size_t* sizes, size_t argument_count) {
  if (grid.threads[1] != 1 || grid.threads[2] != 1 || grid.blocks[2] != 1) throw Fault("a block or a grid of too many dimensions");
  if (grid.threads[0] == 0 || grid.threads[0] > std::min(kernel.most_threads, kMostThreads)) throw Fault("too many threads");
  if (grid.shared_bytes > kMostSharedBytes) throw Fault("too much shared memory");
  if (argument_count != kernel.parameter_bytes.size()) throw Fault("another number of parameters");
  machine.parameters.forbid_all();
  for (size_t i = 0; i < argument_count; ++i) {
    if (sizes[i] != kernel.parameter_bytes[i]) throw Fault("a parameter of another size");
    machine.parameters.allow((i + 1) * kParameterStride, static_cast<unsigned char*>(arguments[i]), sizes[i], Content::kWritten);
  }
  machine.released.clear();
  machine.counted.clear();
  machine.now = {++launches, 0, 0, 0};
  const char* const setting = std::getenv("SIMT_REVERSED");
  const bool reversed = setting != nullptr && std::atoi(setting) != 0;
  const uint32_t blocks = grid.blocks[0] * grid.blocks[1];
  for (uint32_t i = 0; i < blocks; ++i) {
    machine.now.block = reversed ? blocks - 1 - i : i;
    const uint32_t block[] = {machine.now.block % grid.blocks[0], machine.now.block / grid.blocks[0]};
    run_block(kernel, grid, block, reversed);
  }
  for (const auto& [address, before] : machine.counted) {
    uint32_t after;
    std::memcpy(&after, reinterpret_cast<const void*>(address), sizeof(after));
    if (after != before) throw Fault("a counter that is not reset");
  }
}

uint64_t address_of(const void* p) { return reinterpret_cast<uint64_t>(p); }

}  // namespace
}  // namespace ptx

using namespace ptx;

extern "C" {

// Binds a kernel of the host, which launchers name by its address, to the text of a module with one entry.
void bind_kernel(const void* host, const char* text) {
  texts[host] = text;
  kernels.erase(host);
}

// How often a kernel ran without an error.
int runs_of(const void* host) { return times_run[host]; }

// Sets the bytes of the text, which has the kernel's size, whose instructions ran since bind_kernel.
void mark_run(const void* host, char* marks) {
  const auto found = kernels.find(host);
  if (found == kernels.end()) return;
  for (const Instruction& instruction : found->second.code) {
    if (instruction.has_run) std::memset(marks + instruction.begin, 1, instruction.text.size());
  }
}

// 0: the nearest results.
void approximate(int exponential_ulps, int inverse_ulps) {
  machine.exponential_ulps = exponential_ulps;
  machine.inverse_ulps = inverse_ulps;
}

void allow(void* p, size_t bytes, int is_written) {
  if (bytes != 0)
    machine.global.allow(address_of(p), static_cast<unsigned char*>(p), bytes, is_written ? Content::kWritten : Content::kUnwritten);
}
void forbid_all() { machine.global.forbid_all(); }

// What went wrong since the last call, or an empty text.
const char* take_error() {
  static std::string taken;
  taken.swap(error);
  error.clear();
  return taken.c_str();
}

// What tests/simt/simt.cpp calls instead of its own fibers (run_on).

void launch_kernel(const void* host, const uint32_t* blocks, const uint32_t* threads, size_t shared_bytes, void** arguments,
                   const size_t* sizes, size_t count) {
  // An exception cannot pass the launchers' callers: the first error stays until it is taken, and nothing runs.
  if (!error.empty()) return;
  std::string name = "a kernel";
  try {
    auto found = kernels.find(host);
    if (found == kernels.end()) {
      const auto text = texts.find(host);
      if (text == texts.end()) throw Fault("a kernel without PTX");
      found = kernels.emplace(host, decoded(text->second)).first;
    }
    name = found->second.name;
    launch(found->second, {blocks, threads, shared_bytes}, arguments, sizes, count);
    ++times_run[host];
  } catch (const Fault& fault) {
    error = name + ": " + fault.what();
  }
}

void allocated(void* p, size_t bytes) { machine.global.allow(address_of(p), static_cast<unsigned char*>(p), bytes, Content::kTracked); }
void released(void* p) { machine.global.forbid(address_of(p)); }
void filled(void* p, size_t bytes) { machine.global.written_by_host(address_of(p), bytes); }

}  // extern "C"
