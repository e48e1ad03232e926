// The checks of memory.h.
#include "memory.h"

#include <cstdio>

namespace ptx {
namespace {

bool was_never(const Moment& moment) { return moment.launch == 0 && moment.thread == kNever.thread; }

// Whether `earlier` happened before the running access.
bool is_ordered(const Moment& earlier, const Running& by) {
  const Moment& now = by.now;
  if (earlier.launch != now.launch) return true;
  if (earlier.block == now.block) return earlier.epoch != now.epoch || earlier.thread == now.thread;
  const Known& known = (*by.known)[earlier.block];
  const bool released =
      earlier.epoch < known.released.epoch || (earlier.epoch == known.released.epoch && earlier.thread == known.released.thread);
  const bool acquired = known.acquired.epoch < now.epoch || known.acquired.thread == now.thread;
  return known.acquired.launch == now.launch && released && acquired;
}

}  // namespace

void Space::fail(const char* what, uint64_t address, size_t bytes) const {
  char text[160];
  std::snprintf(text, sizeof(text), "%s of %zu bytes at %#llx of %s memory", what, bytes, static_cast<unsigned long long>(address), name_);
  throw Fault(text);
}

void Space::allow(uint64_t address, unsigned char* host, size_t bytes, Content content) {
  // What an earlier owner of the addresses had is gone.
  auto next = ranges_.lower_bound(address);
  if (next != ranges_.begin() && std::prev(next)->second.end > address) --next;
  while (next != ranges_.end() && next->second.begin < address + bytes) next = ranges_.erase(next);
  last_ = nullptr;
  Range& range = ranges_[address] = {address, address + bytes, host, content, {}, {}};
  if (content != Content::kWritten) range.written.assign(bytes, kNever);
}

void Space::written_by_host(uint64_t address, size_t bytes) {
  Range& range = range_of(address, bytes);
  if (range.written.empty()) return;
  for (size_t i = 0; i < bytes; ++i) range.written[address - range.begin + i] = kByHost;
}

Space::Range& Space::range_of(uint64_t address, size_t bytes) {
  if (last_ == nullptr || address < last_->begin || address >= last_->end) {
    auto next = ranges_.upper_bound(address);
    if (next == ranges_.begin() || std::prev(next)->second.end <= address) fail("access outside of everything", address, bytes);
    last_ = &std::prev(next)->second;
  }
  if (last_->end - address < bytes) fail("access beyond the end", address, bytes);
  return *last_;
}

Space::Range& Space::aligned_range_of(uint64_t address, size_t bytes) {
  if (address % bytes != 0) fail("misaligned access", address, bytes);
  return range_of(address, bytes);
}

Space::Loaded Space::load(uint64_t address, size_t bytes, const Running& by) {
  Range& range = aligned_range_of(address, bytes);
  const size_t at = address - range.begin;
  Loaded loaded{range.host + at, 0};
  bool is_touched = false;
  for (size_t i = at; i < at + bytes && !range.written.empty(); ++i) {
    if (!is_ordered(range.written[i], by)) fail("race: read after another thread's write", address, bytes);
    if (!was_never(range.written[i])) continue;
    loaded.unwritten |= 1u << (i - at);
    is_touched = is_touched || (range.content == Content::kUnwritten && range.host[i] != kUnwrittenByte);
  }
  // A number that the host has written may have a byte that looks unwritten.
  if (is_touched) loaded.unwritten = 0;
  if (reads_are_tracked_) {
    if (range.read.empty()) range.read.assign(range.end - range.begin, kNever);
    for (size_t i = at; i < at + bytes; ++i) {
      Moment& read = range.read[i];
      const bool shared = read.launch == by.now.launch && read.epoch == by.now.epoch && read.thread != by.now.thread;
      read = by.now;
      if (shared) read.thread = kSeveral;
    }
  }
  return loaded;
}

unsigned char* Space::store(uint64_t address, size_t bytes, uint32_t unwritten, const Running& by) {
  Range& range = aligned_range_of(address, bytes);
  const size_t at = address - range.begin;
  if (range.written.empty()) range.written.assign(range.end - range.begin, kByHost);
  for (size_t i = at; i < at + bytes; ++i) {
    if (!is_ordered(range.written[i], by)) fail("race: write after another thread's write", address, bytes);
    if (!range.read.empty() && !is_ordered(range.read[i], by)) fail("race: write after another thread's read", address, bytes);
    range.written[i] = (unwritten >> (i - at) & 1) != 0 ? kNever : by.now;
  }
  return range.host + at;
}

}  // namespace ptx
