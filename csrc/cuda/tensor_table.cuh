// A list of tensors as an argument of a kernel. The table is passed by value, in the 32 KB that arguments may
// have: one launch takes a list of 2,600 gradients, and a CUDA graph records the table with the launch. The
// table has the pointers of each tensor and 4 bytes more. A block finds its piece by binary search.
//
// Elements are counted in octets of eight; a tensor's last octet may be incomplete. The octets of all tensors
// form one line. The line is cut into slots of kSlotOctets, and also where a tensor begins:
//
//   tensors    |<------- tensor 0 ------->|<-- tensor 1 -->|<------ tensor 2 ...
//   slots      |    0    |    1    |   2  |  3 |     4     |    5    | ...
//
// Slot s belongs to the last entry that has at most s slots before it. A slot may be empty. The cuts, and
// with them the order of summation, depend only on the sizes of the tensors.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"

namespace gradkernels::cuda {

constexpr int kOctetElements = 8;
constexpr int64_t kSlotOctets = 2048;
constexpr int64_t kMostOctets = (int64_t{1} << 27) - 1;
// The most that arguments may have with CUDA 12.1 or later (from compute capability 7.0 on), minus room for a
// kernel's other arguments.
constexpr int kTableBytes = 32764 - 256;

// Elements [begin, begin + count) of entry `entry`.
struct Piece {
  int entry;
  DType dtype;
  bool is_first;  // whether it is the first piece of its tensor
  int64_t begin;
  int64_t count;
};

template <int kPointers>
struct TensorTable {
  static constexpr int kMostEntries = (kTableBytes - 32) / (8 * kPointers + 4) - 1;

  void* pointer[kPointers][kMostEntries];
  // Upper 27 bits: the number of octets before the entry. Then 3 bits: the number of elements that its last
  // octet lacks. 2 bits: its dtype.
  uint32_t place[kMostEntries + 1];
  int32_t entries;
  bool continues;        // whether the first entry continues a tensor of the previous table
  int64_t first_tensor;  // entry e is tensor first_tensor + e
  int64_t first_slot;    // counted over all tables

  GK_HOST_DEVICE int64_t octets_before(int entry) const { return place[entry] >> 5; }
  GK_HOST_DEVICE int64_t slots_before(int entry) const { return octets_before(entry) / kSlotOctets + entry; }
  GK_HOST_DEVICE int64_t slots() const { return slots_before(entries); }

  __device__ __forceinline__ Piece piece(int64_t slot) const {
    int low = 0, high = entries;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (slots_before(middle) <= slot) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int64_t first = octets_before(low), end = octets_before(low + 1);
    const int64_t line_begin = (first / kSlotOctets + slot - slots_before(low)) * kSlotOctets;
    const int64_t octet_begin = line_begin > first ? line_begin : first;
    const int64_t octet_end = line_begin + kSlotOctets < end ? line_begin + kSlotOctets : end;
    const uint32_t lacking = place[low] >> 2 & 7u;
    const int64_t count = (octet_end - octet_begin) * kOctetElements - (octet_end == end ? lacking : 0);
    return {low, static_cast<DType>(place[low] & 3u), slot == slots_before(low) && !(continues && low == 0),
            (octet_begin - first) * kOctetElements, octet_end > octet_begin ? count : 0};
  }
};

// An upper bound for the number of slots of all tables.
template <typename Run>
int64_t most_slots(const Run* runs, int64_t run_count) {
  int64_t octets = 0;
  for (int64_t r = 0; r < run_count; ++r) octets += (runs[r].count + kOctetElements - 1) / kOctetElements;
  return octets / kSlotOctets + run_count + octets / kMostOctets + 1;
}

// Calls launch(table) for one table after the other; pointer_of(run, i) is the i-th pointer of a run. Returns
// the number of slots of all tables. A tensor is split between tables only if it fills a table alone.
template <int kPointers, typename Run, typename PointerOf, typename Launch>
int64_t for_each_table(const Run* runs, int64_t run_count, const PointerOf& pointer_of, const Launch& launch) {
  TensorTable<kPointers> table;
  const auto begin = [&table](int64_t first_tensor, int64_t first_slot, bool continues) {
    table.entries = 0;
    table.place[0] = 0;
    table.first_tensor = first_tensor;
    table.first_slot = first_slot;
    table.continues = continues;
  };
  const auto finish = [&](int64_t next_tensor, bool continues) {
    if (table.entries > 0) launch(table);
    begin(next_tensor, table.first_slot + table.slots(), continues);
  };
  begin(0, 0, false);
  for (int64_t r = 0; r < run_count; ++r) {
    for (int64_t done = 0; done < runs[r].count || done == 0;) {
      const int64_t left = runs[r].count - done;
      const int64_t room = table.entries == table.kMostEntries ? -1 : kMostOctets - table.octets_before(table.entries);
      if (table.entries > 0 && (left + kOctetElements - 1) / kOctetElements > room) {
        finish(r, done > 0);
        continue;
      }
      const int64_t taken = left < room * kOctetElements ? left : room * kOctetElements;
      const int64_t octets = (taken + kOctetElements - 1) / kOctetElements;
      const int entry = table.entries++;
      for (int i = 0; i < kPointers; ++i) {
        void* const pointer = pointer_of(runs[r], i);
        table.pointer[i][entry] = pointer == nullptr ? nullptr : static_cast<char*>(pointer) + done * size_of(runs[r].dtype);
      }
      table.place[entry + 1] = static_cast<uint32_t>(table.octets_before(entry) + octets) << 5;
      table.place[entry] |= static_cast<uint32_t>(octets * kOctetElements - taken) << 2 | static_cast<uint32_t>(runs[r].dtype);
      done += taken;
      if (taken == 0) break;
    }
  }
  finish(run_count, false);
  return table.first_slot;
}

// Calls function(packet, first, valid) for a thread's packets of the `count` elements at x; kInFlight packets
// are loaded at a time. A packet has 16 bytes; at the end, `valid` is less than its elements, and may be 0 or
// negative. The elements before the first address that is aligned to 16 bytes are packets of one element, each
// in its own thread: gradients that are views of a flat buffer begin anywhere.
template <int kThreads, int kInFlight, typename scalar_t, typename Function>
__device__ __forceinline__ void for_each_packet(const scalar_t* x, int64_t count, const Function& function) {
  constexpr int W = kPacketElements<scalar_t>;
  const int after = static_cast<int>(reinterpret_cast<uintptr_t>(x) % kPacketBytes / sizeof(scalar_t));
  const int head = after == 0 ? 0 : W - after < count ? W - after : static_cast<int>(count);
  const bool has_head = static_cast<int>(threadIdx.x) < head;
  // Loaded with the other packets and used after them.
  Packet<scalar_t, 1> of_head;
  if (has_head) load(of_head, x + threadIdx.x);
  for (int64_t base = head + static_cast<int64_t>(threadIdx.x) * W; base < count; base += int64_t{kThreads} * kInFlight * W) {
    Packet<scalar_t, W> packet[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t first = base + int64_t{j} * kThreads * W;
      if (first + W <= count) {
        load(packet[j], x + first);
      } else {
        load_some(packet[j], x + first, count - first, scalar_t(0.0f));
      }
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t first = base + int64_t{j} * kThreads * W;
      function(packet[j], first, count - first);
    }
  }
  if (has_head) function(of_head, static_cast<int64_t>(threadIdx.x), int64_t{1});
}

// Stores a packet where for_each_packet has read it.
template <typename scalar_t, int W>
__device__ __forceinline__ void store_valid(scalar_t* p, const Packet<scalar_t, W>& packet, int64_t valid) {
  if (valid >= W) {
    store(p, packet);
  } else {
    store_some(p, packet, valid);
  }
}

}  // namespace gradkernels::cuda
