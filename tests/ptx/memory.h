// Memory as a kernel may use it: ranges of bytes, and for each byte who wrote and who read it last. An access fails
// if it is not aligned to its size, leaves its range, or is not ordered with another thread's access to the same byte.
//
// Order comes from the end of a launch, from bar.sync within a block, and between blocks from an atomic with a
// membar.gl before it in the thread that gives and after it in the thread that takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

// What a kernel did that PTX does not define, or that the machine does not know.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An access: its launch, its block, the barriers that the block had passed, its thread.
struct Moment {
  uint32_t launch;
  uint32_t block;
  uint16_t epoch;
  uint16_t thread;
};
// Launches are counted from one. The moments of a byte that was never written, and of one that the host wrote:
constexpr Moment kNever{0, 0, 0, 0}, kByHost{0, 0, 0, 1};
// The thread of a byte that several threads have read.
constexpr uint16_t kSeveral = 0xFFFF;

// What the running block knows of another block: everything before `released`, from `acquired` on.
struct Known {
  Moment released = kNever, acquired = kNever;
};

// The running thread, and what its block knows of the others.
struct Running {
  Moment now;
  const std::vector<Known>* known;
};

// kUnwritten: it holds kUnwrittenByte until the host writes it unseen (torch), or a kernel does.
enum class Content { kWritten, kUnwritten, kTracked };
constexpr unsigned char kUnwrittenByte = 0x5A;

class Space {
 public:
  // reads_are_tracked: a write that is not ordered after another thread's read fails too.
  Space(const char* name, bool reads_are_tracked) : name_(name), reads_are_tracked_(reads_are_tracked) {}

  // Allows accesses to the addresses from `address` on, which are at `host`.
  void allow(uint64_t address, unsigned char* host, size_t bytes, Content content);
  // The host has written bytes of a range.
  void written_by_host(uint64_t address, size_t bytes);
  void forbid(uint64_t address) { ranges_.erase(address), last_ = nullptr; }
  void forbid_all() { ranges_.clear(), last_ = nullptr; }

  // What is loaded, and a bit for each byte that nobody wrote.
  struct Loaded {
    const unsigned char* bytes;
    uint32_t unwritten;
  };
  Loaded load(uint64_t address, size_t bytes, const Running& by);
  // unwritten: as above, of bytes that come from registers without a value.
  unsigned char* store(uint64_t address, size_t bytes, uint32_t unwritten, const Running& by);

 private:
  struct Range {
    uint64_t begin, end;
    unsigned char* host;
    Content content;
    std::vector<Moment> written;  // empty: the host wrote everything
    std::vector<Moment> read;     // empty: nothing was read
  };

  [[noreturn]] void fail(const char* what, uint64_t address, size_t bytes) const;
  Range& range_of(uint64_t address, size_t bytes);
  Range& aligned_range_of(uint64_t address, size_t bytes);

  const char* name_;
  bool reads_are_tracked_;
  std::map<uint64_t, Range> ranges_;
  Range* last_ = nullptr;
};

}  // namespace ptx
