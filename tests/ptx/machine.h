// A kernel as the machine runs it, and the state of a warp. An operand is a slot of the warp's frame: 32 values side
// by side, one for each lane, or for a predicate one word with a bit for each lane. Immediates and special registers
// are slots too, so an instruction reads nothing but slots.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "memory.h"

namespace ptx {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
// Where shared memory and the parameters begin in their own address spaces: null is outside of them.
constexpr uint64_t kSharedBegin = 1024;
constexpr uint64_t kParameterStride = 1 << 20;

struct Slot {
  uint32_t offset;  // in the frame
  uint32_t number;  // of its word in Warp::written
  uint32_t bytes;   // of each value; 0 for a predicate
};

struct Warp;
struct Instruction;
using Run = void (*)(Warp& warp, const Instruction& instruction, uint32_t lanes);

// What the scheduler of a warp does at an instruction.
enum class Control { kNone, kBranch, kUniformBranch, kExit, kWholeWarp, kBarrier };

// An opcode with all its suffixes. to, from: the bytes of each operand's values, 0 for a predicate.
struct Operation {
  Run run = nullptr;
  std::vector<uint32_t> to, from;
  Control control = Control::kNone;
  // Registers may be wider than the type (ld, st).
  bool widens = false;
  // The last source is an address.
  bool addresses = false;
  // The lanes whose result has a value, or an error if a lane needs one that it has not; null: those of all sources.
  uint32_t (*written)(const Warp& warp, const Instruction& instruction, uint32_t lanes) = nullptr;
};
// Null for an opcode that is unknown, or has a suffix that is.
const Operation* operation_of(const std::string& opcode);

struct Instruction {
  const Operation* operation;
  std::array<Slot, 4> to;
  std::array<Slot, 6> from;
  uint8_t to_count, from_count;
  bool is_guarded, guard_is_negated;
  Slot guard;
  uint32_t target;       // of a branch
  int64_t displacement;  // of an address
  std::string text;
  size_t begin;  // of the text in the kernel's
  mutable bool has_run;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> code;
  std::vector<size_t> parameter_bytes;
  uint32_t most_threads = 1024;
  uint32_t frame_bytes = 0;
  uint32_t slots = 0;
  std::vector<std::pair<Slot, uint64_t>> constants;
  std::unordered_map<std::string, Slot> special;  // by name, such as %tid.x
};
// Of the text of an .entry, without comments, from its name on. It names the shared memory shared_memory.
Kernel decoded(const std::string& text);

// Lanes that are at one instruction.
struct Group {
  uint32_t at;
  uint32_t lanes;
  bool waits;
};

struct Thread {
  // The epoch of its last membar.gl, or -1.
  int fenced = -1;
  // What its last atomic saw, until a fence makes it known.
  std::vector<Moment> seen;
};

struct Warp {
  std::vector<unsigned char> memory;
  unsigned char* frame;             // in memory, aligned to a cache line
  std::vector<uint32_t> written;    // of each slot, the lanes that have a value
  std::array<uint32_t, 4> results;  // the same of the running instruction's results
  std::vector<Group> groups;
  std::array<Thread, kLanes> threads;
  uint32_t alive;
  uint32_t first_thread;

  template <typename T>
  T* at(const Slot& slot) const {
    return reinterpret_cast<T*>(frame + slot.offset);
  }
};

// The spaces of the running block, and what the approximations add to the nearest result, in ulps.
struct Machine {
  Space global{"global", false}, shared{"shared", true}, parameters{"parameter", false};
  Moment now = kNever;  // without the thread
  std::vector<Known> known;
  int exponential_ulps = 0, inverse_ulps = 0;
  // Of each word: who had a fence before an atomic on it, and what it held before the first.
  std::unordered_map<uint64_t, std::vector<Moment>> released;
  std::unordered_map<uint64_t, uint32_t> counted;

  Running running(const Warp& warp, uint32_t lane) const {
    Running by{now, &known};
    by.now.thread = static_cast<uint16_t>(warp.first_thread + lane);
    return by;
  }
};
extern Machine machine;

// Fails if a lane has no value in the slot.
void require_written(const Warp& warp, const Slot& slot, uint32_t lanes);

}  // namespace ptx
